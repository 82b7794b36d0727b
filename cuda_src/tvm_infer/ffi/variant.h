// An attention variant with the parameters of a call, as an object: made once, passed to the variant_* functions of attention.h.
#pragma once

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/object.h>
#include <tvm/ffi/string.h>

#include <cstdint>
#include <utility>

#include "tvm_infer/ffi/common.h"
#include "tvm_infer/variant/cpu_functions.h"

#define TVM_INFER_VARIANT_FUNCTIONS(V) \
  V(variant_call, MakeVariantCall)     \
  V(standard_variant, FindStandardVariant)

namespace tvm_infer::ffi_api {

// Immutable. Keeps its tensors alive; what they hold may change between calls.
class VariantCallObj : public tvm::ffi::Object {
 public:
  // Throws ArgumentError, AbiError: see MakeVariantCall.
  VariantCallObj(tvm::ffi::String digest, int64_t cpu_functions, const tvm::ffi::Array<int64_t>& scalars,
                 tvm::ffi::Array<tvm::ffi::Tensor> tables, int64_t takes_shared_keys);
  VariantCallObj(const VariantCallObj&) = delete;  // call_ points into the object
  VariantCallObj& operator=(const VariantCallObj&) = delete;

  // For the executor of `place`, where q lies; valid as long as this object. Throws ArgumentError where the tables lie on another device,
  // or where there are no CPU functions for tensors on the host.
  const variant::Call* At(const Place& place) const;
  bool takes_shared_keys() const { return call_.takes_shared_keys; }

  // Made at first use, with the ABI in the key: as for the cache (kv_cache_object.h).
  static constexpr const char* _type_key = "tvm_infer.VariantCall.v5";
  static_assert(kAbiVersion == 5, "a new ABI needs a new type key");
  static constexpr bool _type_final = true;
  static constexpr bool _type_mutable = false;
  static constexpr int32_t _type_child_slots = 0;
  static constexpr int32_t _type_depth = tvm::ffi::Object::_type_depth + 1;
  static int32_t _GetOrAllocRuntimeTypeIndex();
  static int32_t RuntimeTypeIndex() noexcept { return _GetOrAllocRuntimeTypeIndex(); }

 private:
  const tvm::ffi::String digest_;
  const tvm::ffi::Array<tvm::ffi::Tensor> tables_;
  Place place_ = kHost;  // of the tables, if there are any
  variant::Args args_{};
  variant::Call call_;
};

class VariantCall : public tvm::ffi::ObjectRef {
 public:
  explicit VariantCall(tvm::ffi::ObjectPtr<VariantCallObj> object) : ObjectRef(std::move(object)) {}
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NOTNULLABLE(VariantCall, tvm::ffi::ObjectRef, VariantCallObj);
};

// A variant with its parameters.
//   digest         of the generated struct, 16 hexadecimal digits
//   cpu_functions  address of the variant::CpuFunctions that the generated library exports, which must outlive every call; 0: the variant
//                  is for cuda
//   scalars        at most kMaxScalars: the 32 bits of each, of a float or an int, as a number from -2^31 to 2^32 - 1
//   tables         at most kMaxTables of rank <= kMaxRank, any strides that fit in 32 bits, all on one device. Their data types are what
//                  the code was generated for: nobody else knows.
//   takes_shared_keys  kTakesSharedKeys of the generated struct, 1 or 0: whether plans may have works with rows of several requests
// ArgumentError: one of these is not so. AbiError: the CPU functions were compiled against structs of another tvm_infer.
VariantCall MakeVariantCall(tvm::ffi::String digest, int64_t cpu_functions, tvm::ffi::Array<int64_t> scalars,
                            tvm::ffi::Array<tvm::ffi::Tensor> tables, int64_t takes_shared_keys);

// The `cpu_functions` of a standard variant, or of one that this exported model embeds, compiled into this library: for the instruction set
// that the executor runs, good for as long as the library is loaded. 0: none has this digest. ArgumentError: `digest` is no digest, or
// TVM_INFER_CPU_ISA names no instruction set.
int64_t FindStandardVariant(tvm::ffi::String digest);

}  // namespace tvm_infer::ffi_api
