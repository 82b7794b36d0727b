// Prefixes: which tokens sequences have, full pages entered into the index by them, and sequences that begin with what is there.
#include <algorithm>
#include <unordered_map>

#include "tvm_infer/error.h"
#include "tvm_infer/kv/cache_manager.h"
#include "tvm_infer/kv/reserve.h"

namespace tvm_infer::kv {

void CacheManager::EnablePrefixReuse() {
  CheckIdle("enable_prefix_reuse");
  if (prefixes_ == nullptr) prefixes_ = std::make_unique<PrefixIndex>(&pool_, limits_.page_size);
}

PrefixIndex& CacheManager::Prefixes() const {
  if (prefixes_ == nullptr) {
    TVM_INFER_THROW(CacheStateError) << "the cache does not reuse prefixes, so it knows no tokens; create it with prefix_reuse=True";
  }
  return *prefixes_;
}

// ---- Finding ----

// Whole pages before the last token.
int64_t CacheManager::MostMatched(int64_t num_tokens) const { return num_tokens > 0 ? (num_tokens - 1) / limits_.page_size : 0; }

int64_t CacheManager::MatchPrefix(const int64_t* tokens, int64_t num_tokens, int64_t space) const {
  const PrefixIndex& prefixes = Prefixes();
  int64_t count = 0;
  for (int32_t page = -1; count < MostMatched(num_tokens); ++count) {
    page = prefixes.Find(space, page, tokens + count * limits_.page_size);
    if (page < 0) break;
  }
  return count * limits_.page_size;
}

int64_t CacheManager::AddWithPrefix(int64_t id, const int64_t* tokens, int64_t num_tokens, int64_t space) {
  CheckIdle("add");
  CheckNew(id, "id");
  PrefixIndex& prefixes = Prefixes();
  const int64_t most = MostMatched(num_tokens);
  const int32_t slot = NewSlot();
  Sequence& sequence = sequences_[slot];
  Reserve2x(&sequence.pages, most);
  Reserve2x(&sequence.tokens, most * limits_.page_size);
  slot_of_.emplace(id, slot);

  free_slots_.pop_back();
  sequence.id = id;
  sequence.is_live = true;
  sequence.space = space;
  int32_t num_pages = 0;
  for (; num_pages < most; ++num_pages) {
    const int32_t page = prefixes.Find(space, sequence.indexed.page, tokens + int64_t{num_pages} * limits_.page_size);
    if (page < 0) break;
    sequence.pages.push_back(page);
    sequence.indexed = prefixes.RefTo(page);
  }
  const int32_t length = num_pages * limits_.page_size;
  sequence.num_indexed = num_pages;
  sequence.length = length;
  sequence.tokens.assign(tokens, tokens + length);
  // What the window hides from its next token is not taken: it would count as used until the sequence's first step.
  const Entries hidden = window_.is_bounded() ? Leaving(sequence) : Entries{0, 0};
  for (int32_t i = 0; i < num_pages; ++i) {
    if (i >= hidden.begin && i < hidden.end) {
      sequence.pages[i] = kNoPage;
    } else {
      pool_.Share(sequence.pages[i]);
    }
  }
  if (hidden.size() > 0) {
    sequence.gone_begin = hidden.begin;
    sequence.gone_end = hidden.end;
  }
  if (num_tokens == 0) return 0;
  PrefixStats& stats = prefixes.stats();
  ++stats.lookups;
  stats.hits += num_pages > 0 ? 1 : 0;
  stats.tokens_asked += num_tokens;
  stats.tokens_reused += length;
  return length;
}

int64_t CacheManager::NumShared(const int64_t* ids, int64_t num_ids) const {
  std::unordered_map<int32_t, int32_t> owners;  // of each page, among these
  for (int64_t i = 0; i < num_ids; ++i) {
    for (int32_t page : Pages(ids[i])) {
      if (page != kNoPage) ++owners[page];
    }
  }
  return std::count_if(owners.begin(), owners.end(), [&](const auto& entry) { return pool_.ref_count(entry.first) > entry.second; });
}

// ---- Entering ----

void CacheManager::NoteTokens(const int64_t* tokens) {
  const Step& now = step();
  if (prefixes_ == nullptr) return;
  for (const Undo& undo : undo_) {
    Sequence& sequence = sequences_[undo.slot];
    if (static_cast<int32_t>(sequence.tokens.size()) == undo.length) Reserve2x(&sequence.tokens, sequence.length);
  }
  Reserve2x(&step_tokens_, now.num_tokens());
  step_tokens_.assign(tokens, tokens + now.num_tokens());
}

// Those of sequences of whom all tokens before the step are known.
void CacheManager::KeepTokens() noexcept {
  for (size_t r = 0; r < undo_.size(); ++r) {
    Sequence& sequence = sequences_[undo_[r].slot];
    if (static_cast<int32_t>(sequence.tokens.size()) != undo_[r].length) continue;
    sequence.tokens.insert(sequence.tokens.end(), step_tokens_.begin() + step_.qo_indptr[r], step_tokens_.begin() + step_.qo_indptr[r + 1]);
    Index(&sequence);
  }
}

void CacheManager::CommitTokens(int64_t id, const int64_t* tokens, int64_t num_tokens) {
  CheckIdle("commit_tokens");
  Prefixes();
  Sequence& sequence = sequences_[Find(id)];
  const auto known = static_cast<int64_t>(sequence.tokens.size());
  if (num_tokens > sequence.length - known) {
    TVM_INFER_THROW(ArgumentError) << "argument `tokens` of commit_tokens has " << num_tokens << " tokens for positions from " << known
                                   << " on; sequence " << id << " has " << sequence.length
                                   << " tokens: commit those that steps have appended, at most " << sequence.length - known;
  }
  Reserve2x(&sequence.tokens, known + num_tokens);
  sequence.tokens.insert(sequence.tokens.end(), tokens, tokens + num_tokens);
  Index(&sequence);
}

// Enters full pages whose tokens are known. Where another sequence's page with the same tokens is in the index, that one stays, and this
// sequence's later pages hang below it.
void CacheManager::Index(Sequence* sequence) noexcept {
  const auto whole = static_cast<int32_t>(sequence->tokens.size() / limits_.page_size);
  if (!sequence->is_plain || sequence->num_indexed >= whole) return;
  if (!prefixes_->IsThere(sequence->indexed)) {  // given up since: from the beginning
    sequence->indexed = {};
    sequence->num_indexed = 0;
  }
  for (; sequence->num_indexed < whole; ++sequence->num_indexed) {
    const int64_t* block = sequence->tokens.data() + int64_t{sequence->num_indexed} * limits_.page_size;
    int32_t page = prefixes_->Find(sequence->space, sequence->indexed.page, block);
    if (page < 0) {
      page = sequence->pages[sequence->num_indexed];
      // Gone behind a window; or in the index by other tokens, which somebody it is shared with committed: one of them is wrong.
      if (page == kNoPage || prefixes_->Has(page)) return;
      prefixes_->Insert(sequence->space, sequence->indexed.page, block, page);
    }
    sequence->indexed = prefixes_->RefTo(page);
  }
}

// ---- Leaving ----

// A page, of the free ones or one that was kept. There must be one.
int32_t CacheManager::TakePage() noexcept {
  if (pool_.free_pages().empty()) prefixes_->Evict();
  return pool_.Take();
}

void CacheManager::LeaveIndex(int32_t page) noexcept {
  if (pool_.IsWanted(page)) prefixes_->Remove(page);
}

// Forgets tokens from position `length` on.
void CacheManager::CutTokens(Sequence* sequence, int64_t length) const noexcept {
  if (length == 0) sequence->is_plain = true;
  if (prefixes_ == nullptr) return;
  if (static_cast<int64_t>(sequence->tokens.size()) > length) sequence->tokens.resize(length);
  const int64_t whole = length / limits_.page_size;
  while (sequence->num_indexed > whole) {
    --sequence->num_indexed;
    if (sequence->num_indexed == 0 || !prefixes_->IsThere(sequence->indexed)) {
      sequence->indexed = {};
      sequence->num_indexed = 0;
    } else {
      sequence->indexed = prefixes_->RefTo(prefixes_->parent(sequence->indexed.page));
    }
  }
}

void CacheManager::DropPrefixes() {
  CheckIdle("drop_prefixes");
  Prefixes().Clear();
}

void CacheManager::ForgetTokens() {
  DropPrefixes();
  for (Sequence& sequence : sequences_) {
    if (!sequence.is_live) continue;
    CutTokens(&sequence, 0);
    sequence.is_plain = sequence.length == 0;
  }
}

std::vector<int64_t> CacheManager::DumpPrefixes() const {
  const PrefixIndex& prefixes = Prefixes();
  std::vector<int64_t> state = {prefixes.num_nodes()};
  for (int32_t page = 0; page < limits_.num_pages; ++page) {
    if (!prefixes.Has(page)) continue;
    state.insert(state.end(), {page, prefixes.parent(page), prefixes.space(page)});
    state.insert(state.end(), prefixes.tokens(page), prefixes.tokens(page) + limits_.page_size);
  }
  return state;
}

}  // namespace tvm_infer::kv
