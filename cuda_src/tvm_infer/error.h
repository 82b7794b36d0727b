// The exception type of the core. The core knows no FFI; ffi/ turns this into a typed Python exception of the same kind.
#pragma once

#include <exception>
#include <sstream>
#include <string>
#include <utility>

namespace tvm_infer {

// `kind` is the name of a class in tvm_infer/errors.py (e.g. "ArgumentError", "OutOfPagesError").
// `what()` names the argument, its value, the limit and the way out.
class Error : public std::exception {
 public:
  Error(std::string kind, std::string message) : kind_(std::move(kind)), message_(std::move(message)) {}
  const std::string& kind() const { return kind_; }
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  std::string kind_;
  std::string message_;
};

// Streams a message, then throws when the temporary dies: TVM_INFER_THROW(ArgumentError) << "…" << value;
class ErrorStream {
 public:
  explicit ErrorStream(const char* kind) : kind_(kind) {}
  [[noreturn]] ~ErrorStream() noexcept(false) { throw Error(kind_, stream_.str()); }
  std::ostringstream& stream() { return stream_; }

 private:
  const char* kind_;
  std::ostringstream stream_;
};

#define TVM_INFER_THROW(Kind) ::tvm_infer::ErrorStream(#Kind).stream()
// Our own broken invariant, never a user's mistake.
#define TVM_INFER_ICHECK(cond) \
  if (!(cond)) TVM_INFER_THROW(InternalError) << "invariant broken at " << __FILE__ << ":" << __LINE__ << ": " #cond

}  // namespace tvm_infer
