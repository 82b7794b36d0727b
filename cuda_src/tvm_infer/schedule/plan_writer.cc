#include "tvm_infer/schedule/plan_writer.h"

#include <algorithm>
#include <cstring>

namespace tvm_infer {
namespace {

int64_t Align16(int64_t bytes) { return (bytes + 15) & ~int64_t{15}; }

// CTAs with works, if all are of the smallest of several classes; else 0 (PlanHeader::paced_ctas).
int32_t PacedCtas(const PlanParams& p, const Work* works, const int32_t* work_indptr) {
  if (p.num_tile_classes == 1) return 0;
  if (std::any_of(works, works + work_indptr[p.num_ctas], [](const Work& work) { return work.tile_class != 0; })) return 0;
  int32_t ctas = 0;
  for (int32_t c = 0; c < p.num_ctas; ++c) ctas += work_indptr[c] < work_indptr[c + 1];
  return ctas;
}

// Hands out the arrays of a plan in turn and zeroes the padding after each, so that equal input gives equal bytes.
class PlanWriter {
 public:
  explicit PlanWriter(void* out) : base_(static_cast<char*>(out)), offset_(Align16(sizeof(PlanHeader))) {}
  template <typename T>
  T* Array(int64_t count, int32_t* offset) {
    char* array = base_ + offset_;
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    *offset = count == 0 ? 0 : static_cast<int32_t>(offset_);
    std::memset(array + bytes, 0, Align16(bytes) - bytes);
    offset_ += Align16(bytes);
    return reinterpret_cast<T*>(array);
  }
  template <typename T>
  void Copy(const T* from, int64_t count, int32_t* offset) {
    T* array = Array<T>(count, offset);
    if (count > 0) std::memcpy(array, from, count * sizeof(T));
  }

 private:
  char* base_;
  int64_t offset_;
};

// Works of a CTA in the order of items: CTAs walk the requests in the same order and meet in the same keys; shared works come first, so
// that the merges are mostly those of the requests' own works, a few rows each.
void WriteWorks(const PlanParams& p, const Attempt& attempt, int32_t* cursor, Work* works, int32_t* work_indptr) {
  const Layout& layout = *attempt.layout;
  std::fill_n(cursor, p.num_ctas, 0);
  for (int32_t i = 0; i < layout.num_placements; ++i) ++cursor[layout.placements[i].cta];
  int32_t sum = 0;
  for (int32_t c = 0; c < p.num_ctas; ++c) {
    work_indptr[c] = sum;
    sum += cursor[c];
    cursor[c] = work_indptr[c];
  }
  work_indptr[p.num_ctas] = sum;
  for (int32_t item = 0; item < attempt.items.count; ++item) {
    for (int32_t i = layout.of_item[item].begin; i < layout.of_item[item].end; ++i) {
      const Placement& placement = layout.placements[i];
      Work& work = works[cursor[placement.cta]++];
      work = attempt.items.work[item];
      work.kv_head_begin += placement.kv_head_begin;
      work.num_kv_heads = placement.num_kv_heads;
      if (placement.partial < 0) continue;  // `merge` and `out` say final
      const Partial& partial = layout.partials[placement.partial];
      work.kv_begin = partial.kv_begin;
      work.kv_end = partial.kv_end;
      work.out = partial.out;
      work.merge = partial.merge;
    }
  }
}

// Merges of tiles that share keys, then the layout's.
void WriteMerges(const PlanParams& p, const Attempt& attempt, Forest* forest, Merge* merges, int32_t* merge_indptr, int32_t* merge_slots) {
  const Layout& layout = *attempt.layout;
  const int32_t num_tree_merges = attempt.items.num_tree_merges;
  merge_indptr[0] = 0;
  if (forest != nullptr) forest->WriteMerges(attempt.items, layout, p.num_kv_heads, merges, merge_indptr, merge_slots);
  const int32_t first_slot = merge_indptr[num_tree_merges];
  std::copy_n(layout.merges.data(), layout.num_merges, merges + num_tree_merges);
  std::copy_n(layout.merge_slots.data(), layout.num_slots, merge_slots + first_slot);
  for (int32_t m = 1; m <= layout.num_merges; ++m) merge_indptr[num_tree_merges + m] = first_slot + layout.merge_indptr[m];
}

int32_t SharedWorks(const Attempt& attempt, const Forest* forest) {
  int32_t works = 0;
  for (int32_t item = 0; forest != nullptr && item < forest->num_shared_items(); ++item) {
    works += attempt.layout->of_item[item].end - attempt.layout->of_item[item].begin;
  }
  return works;
}

}  // namespace

int64_t PlanBytes(const PlanParams& p, const PlanSizes& sizes, int64_t num_requests, int64_t num_lists) {
  return Align16(sizeof(PlanHeader)) + (p.num_ctas + sizes.works) * int64_t{sizeof(Work)} + Align16((int64_t{p.num_ctas} + 1) * 4) +
         sizes.merges * int64_t{sizeof(Merge)} + Align16((sizes.merges + 1) * 4) + Align16(sizes.merge_slots * 4) +
         Align16((num_requests + 1) * 4) + Align16(num_lists * 4) + Align16(sizes.ordered_tokens * 4) +
         p.num_tile_classes * int64_t{sizeof(TileClass)} + Align16((kNumTickets + sizes.merges) * 4);
}

void WritePlan(const PlanParams& p, const Batch& batch, const Attempt& attempt, Forest* forest, const PlanSizes& sizes, int64_t bytes,
               int32_t* cursor, void* out) {
  const Layout& layout = *attempt.layout;
  PlanHeader header{};
  header.magic = kPlanMagic;
  header.version = kPlanVersion;
  const uint64_t key = CaptureKey(p);
  header.capture_key[0] = static_cast<uint32_t>(key);
  header.capture_key[1] = static_cast<uint32_t>(key >> 32);
  header.bytes_used = static_cast<int32_t>(bytes);
  header.num_ctas = p.num_ctas;
  header.num_requests = batch.num_requests;
  header.num_kv_lists = batch.num_lists();
  header.num_tokens = batch.num_tokens();
  header.num_kv_heads = p.num_kv_heads;
  header.group_size = p.num_qo_heads / p.num_kv_heads;
  header.num_works = static_cast<int32_t>(sizes.works);
  header.num_merges = static_cast<int32_t>(sizes.merges);
  header.num_merge_slots = static_cast<int32_t>(sizes.merge_slots);
  header.num_partial_rows = static_cast<int32_t>(layout.num_partial_rows);
  header.band = p.band.Tested();
  header.window_left = p.band.left;
  header.num_sink = p.band.num_sink;
  header.chunk = p.band.chunk;
  header.num_tile_classes = p.num_tile_classes;
  header.makespan = layout.makespan;
  header.total_cost = layout.total_cost;
  if (forest != nullptr) {
    header.flat_cost = forest->flat_cost() * p.num_kv_heads;
    header.num_levels = forest->num_levels();
  }

  PlanWriter writer(out);
  int32_t first_works_offset;
  Work* first_works = writer.Array<Work>(p.num_ctas, &first_works_offset);
  Work* works = writer.Array<Work>(header.num_works, &header.works_offset);
  int32_t* work_indptr = writer.Array<int32_t>(p.num_ctas + 1, &header.work_indptr_offset);
  WriteWorks(p, attempt, cursor, works, work_indptr);
  for (int32_t c = 0; c < p.num_ctas; ++c) first_works[c] = work_indptr[c] < work_indptr[c + 1] ? works[work_indptr[c]] : Work{};
  Merge* merges = writer.Array<Merge>(header.num_merges, &header.merges_offset);
  int32_t* merge_indptr = writer.Array<int32_t>(header.num_merges + 1, &header.merge_indptr_offset);
  int32_t* merge_slots = writer.Array<int32_t>(header.num_merge_slots, &header.merge_slots_offset);
  WriteMerges(p, attempt, forest, merges, merge_indptr, merge_slots);
  writer.Copy(batch.qo_indptr, batch.num_requests + 1, &header.qo_indptr_offset);
  writer.Copy(batch.kv_len, batch.num_lists(), &header.kv_len_offset);
  writer.Copy(forest == nullptr ? nullptr : forest->token_order(), sizes.ordered_tokens, &header.token_order_offset);
  writer.Copy(p.tile_classes, p.num_tile_classes, &header.tile_classes_offset);
  int32_t* tickets = writer.Array<int32_t>(kNumTickets + header.num_merges, &header.tickets_offset);
  std::memset(tickets, 0, (kNumTickets + header.num_merges) * sizeof(int32_t));
  header.paced_ctas = PacedCtas(p, works, work_indptr);
  header.num_shared_works = SharedWorks(attempt, forest);
  std::memcpy(out, &header, sizeof(header));
}

}  // namespace tvm_infer
