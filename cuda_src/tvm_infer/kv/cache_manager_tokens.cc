// What sequences allow to be done to tokens that they have: pages taken out of the middle, tokens put in the place of others.
#include "tvm_infer/error.h"
#include "tvm_infer/kv/cache_manager.h"

namespace tvm_infer::kv {

void CacheManager::DropPages(int64_t id, int64_t first_page, int64_t num_pages) {
  CheckIdle("drop_pages");
  CheckHere(id, "drop_pages");
  Sequence& sequence = sequences_[Find(id)];
  const int64_t whole = sequence.length / limits_.page_size;
  if (first_page < 0 || num_pages < 0 || first_page > whole || num_pages > whole - first_page) {
    TVM_INFER_THROW(ArgumentError) << "arguments `first_page` and `num_pages` of drop_pages are " << first_page << " and " << num_pages
                                   << "; sequence " << id << " of " << sequence.length << " tokens has whole pages 0 to " << whole - 1;
  }
  if (sequence.gone_end > sequence.gone_begin) {  // its window would move back over them
    TVM_INFER_THROW(ArgumentError) << "argument `id` of drop_pages is " << id << ", a sequence that gave back its pages "
                                   << sequence.gone_begin << " to " << sequence.gone_end - 1
                                   << ", which left the window of all layers; drop pages of sequences that have all theirs";
  }
  const auto begin = sequence.pages.begin() + first_page;
  for (auto page = begin; page != begin + num_pages; ++page) pool_.Release(*page);
  sequence.pages.erase(begin, begin + num_pages);
  sequence.length -= static_cast<int32_t>(num_pages * limits_.page_size);
  if (num_pages == 0) return;
  CutTokens(&sequence, first_page * limits_.page_size);
  sequence.is_plain = sequence.length == 0;
}

std::vector<TokenMove> CacheManager::Moves(const int64_t* ids, const int64_t* src, const int64_t* dst, int64_t num_moves) const {
  CheckIdle("move_tokens");
  std::vector<TokenMove> moves;
  moves.reserve(num_moves);
  for (int64_t i = 0; i < num_moves; ++i) {
    const Sequence& sequence = sequences_[Find(ids[i])];
    if (sequence.is_away) CheckHere(ids[i], "move_tokens");
    const auto page_of = [&](int64_t position, const char* name) {
      if (position < 0 || position >= sequence.length) {
        TVM_INFER_THROW(ArgumentError) << "argument `" << name << "` of move_tokens has " << position << " at entry " << i << "; sequence "
                                       << ids[i] << " has positions 0 to " << sequence.length - 1;
      }
      const int32_t page = sequence.pages[position / limits_.page_size];
      if (page == kNoPage) {
        TVM_INFER_THROW(ArgumentError) << "argument `" << name << "` of move_tokens has " << position << " at entry " << i
                                       << ", a position of sequence " << ids[i] << " that left the window and was given back";
      }
      return page;
    };
    const int32_t from = page_of(src[i], "src"), to = page_of(dst[i], "dst");
    if (pool_.ref_count(to) > 1) {
      TVM_INFER_THROW(CacheStateError) << "argument `dst` of move_tokens has " << dst[i] << " at entry " << i << ", a position of sequence "
                                       << ids[i] << " in a page that " << pool_.ref_count(to)
                                       << " sequences share; it would change the others: move tokens before forking";
    }
    moves.push_back({from, static_cast<int32_t>(src[i] % limits_.page_size), to, static_cast<int32_t>(dst[i] % limits_.page_size)});
  }
  return moves;
}

void CacheManager::NoteMoves(const int64_t* ids, const int64_t* dst, const std::vector<TokenMove>& moves) noexcept {
  if (prefixes_ == nullptr) return;
  for (size_t i = 0; i < moves.size(); ++i) {
    Sequence& sequence = sequences_[slot_of_.find(ids[i])->second];
    LeaveIndex(moves[i].dst_page);
    CutTokens(&sequence, dst[i]);
    sequence.is_plain = false;
  }
}

}  // namespace tvm_infer::kv
