#include "tvm_infer/ffi/model.h"

#include <set>
#include <string>

#include "tvm_infer/cuda/driver.h"
#include "tvm_infer/embedded.h"
#include "tvm_infer/ffi/common.h"

namespace tvm_infer::ffi_api {

tvm::ffi::String ModelManifest() {
  return Guarded([&] {
    const EmbeddedBytes& manifest = tvm_infer_embedded.manifest;
    if (manifest.size() == 0) {
      TVM_INFER_THROW(ArgumentError) << "this library was linked with tvm_infer's functions but holds no model; Executable.export_library "
                                     << "makes one that does";
    }
    return tvm::ffi::String(manifest.begin, manifest.size());
  });
}

tvm::ffi::Bytes ModelCubin(tvm::ffi::String name, tvm::ffi::String arch) {
  for (size_t i = 0; i < tvm_infer_embedded.num_cubins; ++i) {
    const EmbeddedCubin& embedded = tvm_infer_embedded.cubins[i];
    if (name == embedded.name && arch == embedded.arch) return tvm::ffi::Bytes(embedded.cubin.begin, embedded.cubin.size());
  }
  return tvm::ffi::Bytes();
}

void ModelCheckCuda(int64_t device_id) {
  Guarded([&] {
    const cuda::Device& device = cuda::GetDevice(static_cast<int32_t>(device_id));
    std::set<std::string> archs;
    for (size_t i = 0; i < tvm_infer_embedded.num_cubins; ++i) archs.insert(tvm_infer_embedded.cubins[i].arch);
    if (archs.count(device.arch) != 0) return;
    std::string have;
    for (const std::string& arch : archs) have += (have.empty() ? "" : ", ") + arch;
    TVM_INFER_THROW(ExecutorError) << "this library holds " << (have.empty() ? "no CUDA kernels" : "kernels for " + have)
                                   << "; cuda device " << device_id << " (" << device.name << ") needs " << device.arch
                                   << ". Export the model again with archs=[\"" << device.arch << "\"], or use another device";
  });
}

}  // namespace tvm_infer::ffi_api
