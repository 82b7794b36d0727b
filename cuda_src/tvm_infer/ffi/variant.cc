#include "tvm_infer/ffi/variant.h"

#include <cstdint>
#include <limits>
#include <string>

#include "tvm_infer/cpu/attention.h"

namespace tvm_infer::ffi_api {
namespace {

using tvm::ffi::Array;
using tvm::ffi::String;
using tvm::ffi::Tensor;

// It becomes part of kernels' and files' names.
String CheckedDigest(String digest) {
  constexpr size_t kDigits = 16;
  const std::string text(digest.data(), digest.size());
  if (text.size() != kDigits || text.find_first_not_of("0123456789abcdef") != std::string::npos) {
    TVM_INFER_THROW(ArgumentError) << "argument `digest` is \"" << text << "\"; it must be " << kDigits
                                   << " hexadecimal digits, as in the name of the generated struct";
  }
  return digest;
}

const variant::CpuFunctions* CheckedFunctions(int64_t address) {
  const auto* functions = reinterpret_cast<const variant::CpuFunctions*>(address);
  if (functions != nullptr && functions->abi != variant::kVariantAbi) {
    TVM_INFER_THROW(AbiError) << "argument `cpu_functions`: the variant's library was compiled for variant ABI " << functions->abi
                              << ", this tvm_infer has variant ABI " << variant::kVariantAbi << ". Compile the variant again";
  }
  return functions;
}

void CheckCount(size_t count, int32_t most, const char* name, const char* way_out) {
  if (count > static_cast<size_t>(most)) {
    TVM_INFER_THROW(ArgumentError) << "argument `" << name << "` has " << count << " entries; a variant has at most " << most << " " << name
                                   << ". " << way_out;
  }
}

uint32_t Bits(int64_t value, size_t i) {
  if (value < std::numeric_limits<int32_t>::min() || value > std::numeric_limits<uint32_t>::max()) {
    TVM_INFER_THROW(ArgumentError) << "argument `scalars` holds " << value << " at entry " << i
                                   << "; it must be the 32 bits of a float or an int, from -2^31 to 2^32 - 1";
  }
  return static_cast<uint32_t>(value);
}

variant::Table ToTable(const TensorView& tensor, size_t i) {
  if (tensor.ndim() > variant::kMaxRank) {
    TVM_INFER_THROW(ArgumentError) << "argument `tables[" << i << "]` has rank " << tensor.ndim() << ", shape " << ShapeString(tensor)
                                   << "; a table has rank " << variant::kMaxRank << " at most. Merge axes that are indexed together";
  }
  variant::Table table{};
  table.data = DataPtr<const void>(tensor);
  for (int axis = 0; axis < tensor.ndim(); ++axis) {
    if (tensor.size(axis) <= 1) continue;  // never stepped along; tensors have anything there
    const int64_t stride = Stride(tensor, axis);
    if (stride < std::numeric_limits<int32_t>::min() || stride > std::numeric_limits<int32_t>::max()) {
      TVM_INFER_THROW(ArgumentError)
          << "argument `tables[" << i << "]`, shape " << ShapeString(tensor) << ", has stride " << stride << " in dimension " << axis
          << "; strides of tables must fit in 32 bits (2^31 - 1 elements). Make the table contiguous, or smaller";
    }
    table.strides[axis] = static_cast<int32_t>(stride);
  }
  return table;
}

bool IsSame(const Place& a, const Place& b) {
  return a.device.device_type == b.device.device_type && a.device.device_id == b.device.device_id;
}

}  // namespace

int32_t VariantCallObj::_GetOrAllocRuntimeTypeIndex() {
  static const int32_t index = [] {
    TVMFFIByteArray key{_type_key, std::char_traits<char>::length(_type_key)};
    return TVMFFITypeGetOrAllocIndex(&key, -1, _type_depth, _type_child_slots, 0, tvm::ffi::Object::_GetOrAllocRuntimeTypeIndex());
  }();
  return index;
}

VariantCallObj::VariantCallObj(String digest, int64_t cpu_functions, const Array<int64_t>& scalars, Array<Tensor> tables,
                               int64_t takes_shared_keys)
    : digest_(CheckedDigest(std::move(digest))), tables_(std::move(tables)) {
  CheckCount(scalars.size(), variant::kMaxScalars, "scalars", "Put values that go together into a table");
  CheckCount(tables_.size(), variant::kMaxTables, "tables", "Stack tables of one shape into one");
  for (size_t i = 0; i < scalars.size(); ++i) args_.scalars[i] = Bits(scalars[i], i);
  for (size_t i = 0; i < tables_.size(); ++i) {
    const Tensor tensor = tables_[i];
    const TensorView view(tensor);
    const std::string name = "tables[" + std::to_string(i) + "]";
    const Place place = PlaceOf(view, name.c_str());
    if (i == 0) place_ = {place.device, "tables[0]"};
    if (!IsSame(place, place_)) {
      TVM_INFER_THROW(ArgumentError) << "argument `" << name << "` is on " << DeviceString(place.device) << ", `tables[0]` on "
                                     << DeviceString(place_.device) << "; all tables of a variant must be on one device. Move `" << name
                                     << "` there";
    }
    args_.tables[i] = ToTable(view, i);
  }
  if (takes_shared_keys != 0 && takes_shared_keys != 1) {
    TVM_INFER_THROW(ArgumentError) << "argument `takes_shared_keys` is " << takes_shared_keys << "; it must be 0 or 1";
  }
  call_ = {digest_.data(), CheckedFunctions(cpu_functions), &args_, takes_shared_keys != 0};
}

const variant::Call* VariantCallObj::At(const Place& place) const {
  if (tables_.size() > 0 && !IsSame(place, place_)) {
    TVM_INFER_THROW(ArgumentError) << "argument `variant` has tables on " << DeviceString(place_.device) << ", `q` is on "
                                   << DeviceString(place.device)
                                   << "; all tensors of a call must be on one device. Bind the variant to tables that are there";
  }
  if (!place.is_cuda() && call_.cpu == nullptr) {
    TVM_INFER_THROW(ArgumentError) << "argument `variant` has no CPU functions: the variant was bound for cuda, and `q` is on "
                                   << DeviceString(place.device)
                                   << ". Make the call object with the address of its compiled CPU functions, or move the tensors to cuda";
  }
  return &call_;
}

VariantCall MakeVariantCall(String digest, int64_t cpu_functions, Array<int64_t> scalars, Array<Tensor> tables, int64_t takes_shared_keys) {
  return Guarded([&] {
    return VariantCall(
        tvm::ffi::make_object<VariantCallObj>(std::move(digest), cpu_functions, scalars, std::move(tables), takes_shared_keys));
  });
}

int64_t FindStandardVariant(String digest) {
  return Guarded([&] { return reinterpret_cast<int64_t>(cpu::VariantFunctions(CheckedDigest(std::move(digest)).c_str())); });
}

}  // namespace tvm_infer::ffi_api
