// Items and the better of two ways to lay them: whole, and with KV cut.
#pragma once

#include "tvm_infer/schedule/items.h"
#include "tvm_infer/schedule/layout.h"
#include "tvm_infer/schedule/planner.h"

namespace tvm_infer {

struct Attempt {
  Items items;
  const Layout* layout = nullptr;  // after Lay()

  void Lay(const PlanParams& p) { layout = &Choose(p); }

 private:
  const Layout& Choose(const PlanParams& p);

  Layout whole_, cut_;
};

}  // namespace tvm_infer
