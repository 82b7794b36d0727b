// The operations of TVM's cache that this one does not have yet. Each error names the operation and its values.
#include <tvm/ffi/error.h>

#include <string>

#include "tvm_infer/mlc/kv_cache.h"
#include "tvm_infer/mlc/tensors.h"

namespace tvm_infer::mlc {
namespace {

[[noreturn]] void ThrowUnsupported(const std::string& call, const char* way_out) {
  TVM_FFI_THROW(ArgumentError) << "operation " << call << " is not supported yet by tvm_infer's cache; " << way_out;
  TVM_FFI_UNREACHABLE();
}

std::string Number(const char* name, int64_t value) { return std::string(name) + "=" + std::to_string(value); }

constexpr const char* kOwnCache = "keep TVM's own cache for models that need it";

}  // namespace

Shape MLCPagedKVCacheObj::DisaggPrepareRecv(int64_t seq_id, int length) {
  ThrowUnsupported("disagg_prepare_recv(" + Number("seq_id", seq_id) + ", " + Number("length", length) + ")", kOwnCache);
}

void MLCPagedKVCacheObj::DisaggMarkSend(int64_t seq_id, int64_t begin, const Shape& compressed_remote_position_map,
                                        int32_t recver_pe_offset) {
  ThrowUnsupported("disagg_mark_send(" + Number("seq_id", seq_id) + ", " + Number("begin", begin) + ", compressed_remote_position_map=" +
                       ShapeText(compressed_remote_position_map) + ", " + Number("recver_pe_offset", recver_pe_offset) + ")",
                   kOwnCache);
}

void MLCPagedKVCacheObj::AppendMLAKV(int64_t layer_id, Tensor kv_data) {
  ThrowUnsupported("append_mla_kv(" + Number("layer_id", layer_id) + ", kv_data of shape " + DimsText(*kv_data.GetDLTensorPtr()) + ")",
                   kOwnCache);
}

void MLCPagedKVCacheObj::DebugGetKVMLA(int64_t seq_id, int64_t start_pos, int64_t end_pos, Tensor) {
  ThrowUnsupported(
      "debug_get_kv_mla(" + Number("seq_id", seq_id) + ", " + Number("start_pos", start_pos) + ", " + Number("end_pos", end_pos) + ")",
      "the cache holds keys and values of heads: use debug_get_kv");
}

void MLCPagedKVCacheObj::LinearAttention(int64_t layer_id, Tensor, Tensor, Tensor, double) {
  ThrowUnsupported("linear_attention(" + Number("layer_id", layer_id) + ")", kOwnCache);
}

String MLCPagedKVCacheObj::GetCheckpointMetadata(int64_t seq_id) const {
  ThrowUnsupported("get_checkpoint_metadata(" + Number("seq_id", seq_id) + ")", "copy keys and values out with debug_get_kv");
}

String MLCPagedKVCacheObj::GetLayoutHash() const { ThrowUnsupported("get_layout_hash()", kOwnCache); }

void MLCPagedKVCacheObj::ExportPageGroup(int64_t seq_id, int64_t group_id, Tensor) {
  ThrowUnsupported("export_page_group(" + Number("seq_id", seq_id) + ", " + Number("group_id", group_id) + ")",
                   "copy keys and values out with debug_get_kv");
}

void MLCPagedKVCacheObj::PrepareImport(int64_t seq_id, String) {
  ThrowUnsupported("prepare_import(" + Number("seq_id", seq_id) + ")", "prefill the sequence again");
}

void MLCPagedKVCacheObj::ImportPageGroup(int64_t seq_id, int64_t group_id, Tensor) {
  ThrowUnsupported("import_page_group(" + Number("seq_id", seq_id) + ", " + Number("group_id", group_id) + ")",
                   "prefill the sequence again");
}

void MLCPagedKVCacheObj::FinishImport(int64_t seq_id) {
  ThrowUnsupported("finish_import(" + Number("seq_id", seq_id) + ")", "prefill the sequence again");
}

}  // namespace tvm_infer::mlc
