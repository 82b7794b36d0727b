// Keys and values of a sequence as dense tensors, for tests and for looking inside. Through host memory, page by page: not for hot paths.
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "tvm_infer/mlc/kv_cache.h"
#include "tvm_infer/mlc/registry.h"
#include "tvm_infer/mlc/tensors.h"

namespace tvm_infer::mlc {
namespace {

struct Range {
  int64_t begin, end;  // positions
};

// One page of one layer, [2, num_kv_heads, page_size, head_dim], in host memory; a view of it on the device.
class Page {
 public:
  Page(const Tensor& layer, int64_t index, int64_t page_bytes) : view_(*layer.GetDLTensorPtr()), bytes_(page_bytes) {
    view_.byte_offset += index * page_bytes;
    view_.ndim -= 1;
    view_.shape += 1;
    view_.strides = nullptr;
  }
  void Read(char* host) const { Tensor::CopyToBytes(&view_, host, bytes_); }
  void Write(char* host) const { Tensor::CopyFromBytes(&view_, host, bytes_); }

 private:
  DLTensor view_;
  int64_t bytes_;
};

// A dense copy of what k_data or v_data hold: [num_layers, length, num_kv_heads, head_dim].
void CheckDense(const Tensor& tensor, const char* name, const Config& config, int64_t length) {
  const int64_t expected[4] = {config.num_layers, length, config.num_kv_heads, config.head_dim};
  const bool is_right = tensor->ndim == 4 && std::equal(expected, expected + 4, tensor->shape) && tensor.IsContiguous();
  if (!is_right) {
    TVM_FFI_THROW(ArgumentError) << "argument `" << name << "` has shape " << DimsText(*tensor.GetDLTensorPtr())
                                 << "; it must be contiguous, [" << expected[0] << ", " << expected[1] << ", " << expected[2] << ", "
                                 << expected[3] << "]: num_layers, length, num_kv_heads, head_dim";
  }
  if (tensor->dtype.code != config.dtype.code || tensor->dtype.bits != config.dtype.bits || tensor->dtype.lanes != config.dtype.lanes) {
    TVM_FFI_THROW(DTypeError) << "argument `" << name << "` has dtype " << tvm::ffi::DLDataTypeToString(tensor->dtype) << "; it must be "
                              << tvm::ffi::DLDataTypeToString(config.dtype) << ", the cache's";
  }
}

void CheckRange(const Range& range, int64_t length) {
  if (range.begin < 0 || range.begin >= range.end || range.end > length) {
    TVM_FFI_THROW(ArgumentError) << "arguments `start_pos` and `end_pos` are " << range.begin << " and " << range.end
                                 << " for a sequence of " << length << " tokens; they must satisfy 0 <= start_pos < end_pos <= " << length;
  }
}

// What is written before this returns is in the pages: copies below go around the stream.
void WaitForDevice(const Config& config) {
  if (!config.is_cuda()) return;
  tvm::runtime::DeviceAPI::Get(config.device)
      ->StreamSync(config.device, TVMFFIEnvGetStream(config.device.device_type, config.device.device_id));
}

Tensor PagesOf(const tvm::ffi::Any& cache, int64_t layer) { return Library().kv_cache_pages(cache, layer).cast<Tensor>(); }

// Positions of the cache below are those of the sequence only where nothing is hidden between its sinks and its window.
void CheckContiguous(const char* operation, int64_t seq_id, int64_t num_hidden) {
  if (num_hidden == 0) return;
  TVM_FFI_THROW(CacheStateError)
      << "operation " << operation << " on sequence " << seq_id
      << ", whose window has slid, is not supported yet by tvm_infer's cache; look at it before its window is full";
}

// All pages that are touched are there.
void CheckKept(const Shape& page_table, const Range& range, int64_t page_size) {
  for (int64_t i = range.begin / page_size; i * page_size < range.end; ++i) {
    if (page_table[i] >= 0) continue;
    TVM_FFI_THROW(ArgumentError) << "argument `start_pos` is " << range.begin << ", but positions " << i * page_size << " to "
                                 << (i + 1) * page_size - 1 << " left the window of all layers and were given back";
  }
}

class DenseCopy {
 public:
  DenseCopy(const Config& config, const Range& range)
      : config_(config),
        range_(range),
        row_bytes_(config.head_dim * ElementBytes(config.dtype)),
        k_((range.end - range.begin) * config.num_layers * config.num_kv_heads * row_bytes_),
        v_(k_.size()) {}

  // f(page, host memory of the page) for the pages that the range touches, in every layer.
  template <typename F>
  void ForEachPage(const tvm::ffi::Any& cache, const Shape& page_table, const F& f) {
    const int64_t page_bytes = 2 * config_.num_kv_heads * config_.page_size * row_bytes_;
    std::vector<char> host(page_bytes);
    for (int64_t layer = 0; layer < config_.num_layers; ++layer) {
      const Tensor pages = PagesOf(cache, layer);
      for (int64_t i = range_.begin / config_.page_size; i * config_.page_size < range_.end; ++i) {
        f(Page(pages, page_table[i], page_bytes), host.data(), layer, i);
      }
    }
  }

  // Copies the part of page i that the range covers, between the page and the dense arrays.
  void Move(char* page, int64_t layer, int64_t i, bool to_page) {
    const int64_t first = std::max(range_.begin, i * config_.page_size), last = std::min(range_.end, (i + 1) * config_.page_size);
    const int64_t plane = config_.num_kv_heads * config_.page_size * row_bytes_;
    for (int64_t position = first; position < last; ++position) {
      for (int64_t head = 0; head < config_.num_kv_heads; ++head) {
        const int64_t slot = (head * config_.page_size + position % config_.page_size) * row_bytes_;
        const int64_t row = ((layer * (range_.end - range_.begin) + position - range_.begin) * config_.num_kv_heads + head) * row_bytes_;
        MoveRow(page + slot, k_.data() + row, to_page);
        MoveRow(page + plane + slot, v_.data() + row, to_page);
      }
    }
  }

  char* k() { return k_.data(); }
  char* v() { return v_.data(); }
  int64_t bytes() const { return static_cast<int64_t>(k_.size()); }

 private:
  void MoveRow(char* page, char* dense, bool to_page) const { std::memcpy(to_page ? page : dense, to_page ? dense : page, row_bytes_); }

  const Config& config_;
  const Range range_;
  const int64_t row_bytes_;
  std::vector<char> k_, v_;
};

// Reference counts of all pages, of kv_cache_debug_state: five numbers and the free pages stand before them.
std::vector<int64_t> ReferenceCounts(const tvm::ffi::Any& cache) {
  const Shape state = Library().kv_cache_debug_state(cache).cast<Shape>();
  const int64_t num_pages = state[1], first = 5 + state[4];
  return std::vector<int64_t>(state.begin() + first, state.begin() + first + num_pages);
}

}  // namespace

void MLCPagedKVCacheObj::DebugGetKV(int64_t seq_id, int64_t start_pos, int64_t end_pos, Tensor k_data, Tensor v_data) {
  const Range range{start_pos, end_pos};
  CheckContiguous("debug_get_kv", seq_id, windows_.num_hidden(seq_id));
  CheckRange(range, Length(seq_id));
  CheckDense(k_data, "k_data", config_, end_pos - start_pos);
  CheckDense(v_data, "v_data", config_, end_pos - start_pos);
  WaitForDevice(config_);
  const Shape page_table = Library().kv_cache_page_table(cache_, seq_id).cast<Shape>();
  CheckKept(page_table, range, config_.page_size);
  DenseCopy copy(config_, range);
  copy.ForEachPage(cache_, page_table, [&](const Page& page, char* host, int64_t layer, int64_t i) {
    page.Read(host);
    copy.Move(host, layer, i, false);
  });
  Tensor::CopyFromBytes(k_data.GetDLTensorPtr(), copy.k(), copy.bytes());
  Tensor::CopyFromBytes(v_data.GetDLTensorPtr(), copy.v(), copy.bytes());
}

void MLCPagedKVCacheObj::DebugSetKV(int64_t seq_id, int64_t start_pos, Tensor k_data, Tensor v_data) {
  const int64_t length = k_data->ndim == 4 ? k_data->shape[1] : 0;
  CheckDense(k_data, "k_data", config_, length);
  CheckDense(v_data, "v_data", config_, length);
  const Range range{start_pos, start_pos + length};
  CheckContiguous("debug_set_kv", seq_id, windows_.num_hidden(seq_id));
  CheckRange(range, Length(seq_id));
  const Shape page_table = Library().kv_cache_page_table(cache_, seq_id).cast<Shape>();
  CheckKept(page_table, range, config_.page_size);
  const std::vector<int64_t> references = ReferenceCounts(cache_);
  for (int64_t i = start_pos / config_.page_size; i * config_.page_size < range.end; ++i) {
    if (references[page_table[i]] > 1) {
      TVM_FFI_THROW(CacheStateError) << "positions " << i * config_.page_size << " to " << (i + 1) * config_.page_size - 1
                                     << " of sequence " << seq_id << " lie in a page that " << references[page_table[i]]
                                     << " sequences share; setting them would change the others: set keys before forking";
    }
  }
  WaitForDevice(config_);
  DenseCopy copy(config_, range);
  Tensor::CopyToBytes(k_data.GetDLTensorPtr(), copy.k(), copy.bytes());
  Tensor::CopyToBytes(v_data.GetDLTensorPtr(), copy.v(), copy.bytes());
  copy.ForEachPage(cache_, page_table, [&](const Page& page, char* host, int64_t layer, int64_t i) {
    page.Read(host);
    copy.Move(host, layer, i, true);
    page.Write(host);
  });
}

}  // namespace tvm_infer::mlc
