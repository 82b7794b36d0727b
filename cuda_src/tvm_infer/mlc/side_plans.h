// Plans and page tables for what the cache object's own plan of a step does not serve: the fine-grained calls (self, cross and shared
// attention) and steps with a mask. Made when a step first needs them; all layers share them.
#pragma once

#include <tvm/ffi/any.h>
#include <tvm/runtime/tensor.h>

#include <cstdint>
#include <vector>

#include "tvm_infer/mlc/config.h"
#include "tvm_infer/mlc/inline_rope.h"
#include "tvm_infer/mlc/rope.h"
#include "tvm_infer/mlc/step.h"
#include "tvm_infer/mlc/tensors.h"

namespace tvm_infer::mlc {

class SidePlans {
 public:
  // `cache`: the object of kv_cache_create. What `inline_rope` turns it turns in all kinds of attention.
  SidePlans(const Config& config, const InlineRope& inline_rope, tvm::ffi::Any cache);

  // Forgets the plans; what was passed to a call that still runs stays until the next plan, in stream order.
  void NewStep();

  // The step's tokens attend to each other, causally; k and v are [num_tokens, num_kv_heads, head_dim].
  void Self(const Step& step, int64_t layer, TensorView q, TensorView k, TensorView v, double sm_scale, TensorView o, const Tensor& lse);
  // They attend to the keys in the cache at `layer`, all of them: those of before the step, in a decode step the new ones too.
  void Cross(const Step& step, int64_t layer, TensorView q, double sm_scale, TensorView o, const Tensor& lse);
  // Stores the step's k, rotated, and v at `layer`; q rotated goes to q_out.
  void RopeAppend(const Step& step, int64_t layer, const Rope& rope, TensorView q, TensorView k, TensorView v, TensorView q_out);
  // Turns q and k by the step's positions, for steps in which tokens stand elsewhere than at their positions.
  void Rotate(const Step& step, const Rope& rope, TensorView q, TensorView k, TensorView v, TensorView q_out, const Tensor& k_out);
  // Turns q by step.cross_turns, and k, which nobody needs, with it.
  void TurnAhead(const Step& step, TensorView q, TensorView k, TensorView q_out, const Tensor& k_out);
  // Stores k and v at `layer`; q attends to the keys there, under the step's mask.
  void AppendMasked(const Step& step, int64_t layer, TensorView q, TensorView k, TensorView v, double sm_scale, TensorView o);
  // They attend to the keys in the cache at `layer`, the new ones included: causally, within the layer's window, under the step's mask.
  void Whole(const Step& step, int64_t layer, TensorView q, double sm_scale, TensorView o);

 private:
  struct Planned {
    bool is_ready = false;
    IndexArray kv_len;
    Tensor plan, device_plan;
    int64_t words = 0;
  };
  // Positions that single tokens are turned by; where a call of rope_append_paged has its angles.
  struct Turns {
    bool is_ready = false;
    IndexArray ends;
  };
  void Allocate();
  void Prepare(const Step& step, bool needs_page_table);
  void MakePlan(bool is_causal, int64_t window_left, Planned* planned);
  Planned& PlanWhole(const Step& step, int64_t layer);
  // The step's mask, or what the layer does inline; None for neither.
  const tvm::ffi::Any& VariantOf(const Step& step, int64_t layer) const;
  void Turn(const Step& step, const std::vector<int32_t>& positions, Turns* turns, const Tensor& inv_freq, int64_t interleaved,
            double magnitude, TensorView q, TensorView k, TensorView v, TensorView q_out, const Tensor& k_out);
  void Paged(const Step& step, const Planned& planned, int64_t layer, TensorView q, double sm_scale, TensorView o, const Tensor* lse);

  const Config config_;
  const InlineRope inline_rope_;
  const tvm::ffi::Any cache_;
  const int64_t num_ctas_;
  const tvm::ffi::Shape tile_table_;
  int64_t partial_rows_ = 0;
  Tensor workspace_;
  bool has_query_indptr_ = false, has_page_table_ = false;
  IndexArray qo_indptr_, page_indptr_, page_indices_;
  Planned self_, cross_, whole_, sliding_;   // sliding_: whole_, of layers that have a window
  IndexArray token_indptr_, token_indices_;  // each token a request of its own
  Turns turns_, cross_turns_;
  Tensor values_;  // where rotation puts values, which nobody needs
};

}  // namespace tvm_infer::mlc
