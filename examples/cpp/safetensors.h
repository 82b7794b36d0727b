// Reads a safetensors file (https://github.com/huggingface/safetensors#format): 8 bytes of header length, a JSON header, raw data. The file
// is mapped, so on the CPU a weight costs no copy and is read from disk when a kernel first needs it.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/dtype.h>
#include <tvm/ffi/extra/json.h>
#include <unistd.h>

#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace example {

// A file in memory. Private: what is written into it (nothing here) would not reach the file.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path) {
    const int file = open(path.c_str(), O_RDONLY);
    struct stat status{};
    if (file < 0 || fstat(file, &status) != 0) throw std::runtime_error("cannot open " + path + ": " + std::strerror(errno));
    size_ = static_cast<size_t>(status.st_size);
    data_ = static_cast<char*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0));
    close(file);
    if (data_ == MAP_FAILED) throw std::runtime_error("cannot map " + path + ": " + std::strerror(errno));
  }
  ~MappedFile() { munmap(data_, size_); }
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  char* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  char* data_;
  size_t size_;
};

// The "allocator" of a tensor whose memory is there already; it keeps the file mapped for as long as the tensor lives.
struct InFile {
  std::shared_ptr<MappedFile> file;
  char* begin;
  void AllocData(DLTensor* tensor) { tensor->data = begin; }
  void FreeData(DLTensor*) {}
};

class Safetensors {
 public:
  explicit Safetensors(const std::string& path) : path_(path), file_(std::make_shared<MappedFile>(path)) {
    uint64_t length = 0;
    if (file_->size() < 8) Damaged("it has no header");
    std::memcpy(&length, file_->data(), 8);
    if (length > file_->size() - 8) Damaged("its header is cut short");
    const tvm::ffi::String text(file_->data() + 8, length);
    tvm::ffi::String problem;
    const tvm::ffi::json::Value parsed = tvm::ffi::json::Parse(text, &problem);
    if (problem.size() != 0) Damaged("its header is no JSON: " + std::string(problem));
    header_ = parsed.cast<tvm::ffi::json::Object>();
    data_ = file_->data() + 8 + length;
    data_bytes_ = file_->size() - 8 - length;
    // tvm_infer stores a weight that has two names (tied embeddings) once.
    const auto metadata = header_.Get(tvm::ffi::String("__metadata__"));
    if (!metadata.has_value()) return;
    metadata_ = metadata->cast<tvm::ffi::json::Object>();
    if (const auto same_as = metadata_.Get(tvm::ffi::String("tvm_infer.same_as"))) {
      same_as_ = tvm::ffi::json::Parse(same_as->cast<tvm::ffi::String>()).cast<tvm::ffi::json::Object>();
    }
  }

  // A host tensor that lies in the file, contiguous. `data` may have any alignment.
  tvm::ffi::Tensor Get(const std::string& name) const {
    tvm::ffi::Any key = tvm::ffi::String(name);
    if (const auto stored = same_as_.Get(key)) key = *stored;
    const auto found = header_.Get(key);
    if (!found.has_value()) throw std::runtime_error(path_ + " has no weight " + name);
    const auto entry = found->cast<tvm::ffi::json::Object>();
    std::vector<int64_t> shape;
    for (const auto& n : Field(entry, "shape").cast<tvm::ffi::json::Array>()) shape.push_back(n.cast<int64_t>());
    const DLDataType dtype = DType(Field(entry, "dtype").cast<tvm::ffi::String>());
    const auto offsets = Field(entry, "data_offsets").cast<tvm::ffi::json::Array>();
    const int64_t begin = offsets[0].cast<int64_t>(), end = offsets[1].cast<int64_t>();
    int64_t bytes = dtype.bits / 8;
    for (int64_t n : shape) bytes *= n;
    if (begin < 0 || end - begin != bytes || static_cast<size_t>(end) > data_bytes_)
      Damaged("weight " + name + " is not where it should be");
    return tvm::ffi::Tensor::FromNDAlloc(InFile{file_, data_ + begin}, tvm::ffi::ShapeView(shape.data(), shape.size()), dtype,
                                         DLDevice{kDLCPU, 0});
  }

  // What the writer put into the header, or "".
  std::string Metadata(const std::string& name) const {
    const auto value = metadata_.Get(tvm::ffi::String(name));
    return value.has_value() ? std::string(value->cast<tvm::ffi::String>()) : "";
  }

 private:
  [[noreturn]] void Damaged(const std::string& why) const { throw std::runtime_error(path_ + " is no whole safetensors file: " + why); }
  static tvm::ffi::Any Field(const tvm::ffi::json::Object& object, const char* name) { return object.at(tvm::ffi::String(name)); }
  DLDataType DType(const std::string& name) const {
    if (name == "F32") return {kDLFloat, 32, 1};
    if (name == "F16") return {kDLFloat, 16, 1};
    if (name == "BF16") return {kDLBfloat, 16, 1};
    if (name == "I64") return {kDLInt, 64, 1};
    if (name == "I32") return {kDLInt, 32, 1};
    throw std::runtime_error(path_ + " has a weight of type " + name + ", which this program does not know");
  }

  std::string path_;
  std::shared_ptr<MappedFile> file_;
  tvm::ffi::json::Object header_, metadata_, same_as_;
  char* data_ = nullptr;
  size_t data_bytes_ = 0;
};

}  // namespace example
