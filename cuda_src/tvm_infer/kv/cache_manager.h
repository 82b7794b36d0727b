// Which sequence owns which pages. Pure bookkeeping: no page memory, no kernels, no threads (callers hold their own lock).
//
// A sequence is an id, a length in tokens and the pages that hold them: token t is slot t % page_size of pages[t / page_size], and
// there are exactly ceil(length / page_size) entries. Forks share pages; a page is written by a step only when one sequence owns it
// (copy-on-write), or when every owner writes it in this step and the longest of them keeps it (below).
//
// Where all layers have a window (SetWindow), a step first gives back the pages of its sequences that none of its tokens, nor a later
// one, can see. Their entries stay in the list, as kNoPage, so that positions keep their places. Not at the end of a step: tokens that
// a model proposed and rejects are popped then, and the window moves back with them. Nor does a cancelled step take them back: another
// sequence may own them alone by then, and write.
//
// Prefixes (EnablePrefixReuse): full pages whose tokens are known stay findable by them (prefix_index.h), also when their sequences are
// gone, until the pool needs the room. A sequence that begins alike shares them. A page leaves the index before anybody writes into it.
//
// A sequence can be away: its id, length and tokens stay, its pages are given back while somebody keeps their contents elsewhere.
//
// Strong guarantee: an operation that throws has changed nothing. Errors are Error(kind) of error.h:
//   UnknownSequenceError  an id that is not there, or is there already        CacheStateError  an operation between begin and end
//   OutOfPagesError       pages needed, pages free, and what would free some  ArgumentError    a number out of its range
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "tvm_infer/kv/key_window.h"
#include "tvm_infer/kv/page_pool.h"
#include "tvm_infer/kv/prefix_index.h"

namespace tvm_infer::kv {

inline constexpr int64_t kWholeLength = -1;  // Fork(): at the parent's end
inline constexpr int32_t kNoPage = -1;       // in place of a page that was given back

struct CacheLimits {
  int32_t page_size;  // tokens a page
  int32_t num_pages;
  int32_t max_batch;   // sequences in one step
  int32_t max_tokens;  // new tokens in one step, of all its sequences
};

// The first num_tokens slots of page src go to page dst, in every layer, before anything is appended.
struct PageCopy {
  int32_t src, dst, num_tokens;
};

// A token's keys and values, in every layer, go from one slot to another.
struct TokenMove {
  int32_t src_page, src_slot, dst_page, dst_slot;
};

// What executors read in a step. Row r is the r-th id given to BeginForward().
struct Step {
  std::vector<int32_t> qo_indptr;     // [num_requests + 1]: new tokens of request r are [qo_indptr[r], qo_indptr[r + 1])
  std::vector<int32_t> kv_len;        // [num_requests], new tokens included
  std::vector<int32_t> page_indptr;   // [num_requests + 1]: request r owns page_indices[page_indptr[r] … page_indptr[r + 1])
  std::vector<int32_t> page_indices;  // a shared page appears once for each owner; kNoPage where no token looks
  std::vector<PageCopy> copies;

  int32_t num_requests() const { return static_cast<int32_t>(kv_len.size()); }
  int32_t num_tokens() const { return qo_indptr.back(); }
};

class CacheManager {
 public:
  explicit CacheManager(const CacheLimits& limits);
  CacheManager(const CacheManager&) = delete;
  CacheManager& operator=(const CacheManager&) = delete;

  // Sequences. None of these may be called between BeginForward() and its end.
  void Add(int64_t id);
  void Remove(int64_t id);
  // `child` starts as the first `position` tokens of `parent`, sharing its pages.
  void Fork(int64_t parent, int64_t child, int64_t position);
  void Pop(int64_t id, int64_t num_tokens);       // drops the last tokens
  void Truncate(int64_t id, int64_t new_length);  // drops all tokens from new_length on
  // Takes whole pages out of a sequence, `num_pages` from its page `first_page` on: its later tokens move to lower positions.
  void DropPages(int64_t id, int64_t first_page, int64_t num_pages);
  // Token src[i] of sequence ids[i] is to stand at dst[i], too, one move after the other; pages written must be the sequence's own. The
  // tokens' places are as before; whoever has the memory moves them.
  std::vector<TokenMove> Moves(const int64_t* ids, const int64_t* src, const int64_t* dst, int64_t num_moves) const;
  void Clear();

  // ---- Prefixes (cache_manager_prefix.cc). CacheStateError before EnablePrefixReuse(), which allocates all room they take. ----
  void EnablePrefixReuse();
  bool reuses_prefixes() const { return prefixes_ != nullptr; }
  const PrefixIndex& prefixes() const { return Prefixes(); }
  // A sequence that will have these tokens: it starts with the whole pages that hold its beginning, one token at least left out, and with
  // those that its window still shows of them. Returns its length. `space`: tokens of one namespace do not match those of another.
  int64_t AddWithPrefix(int64_t id, const int64_t* tokens, int64_t num_tokens, int64_t space);
  // The length that it would have.
  int64_t MatchPrefix(const int64_t* tokens, int64_t num_tokens, int64_t space) const;
  // Tokens of the step under way, as many as it has; EndForward() then keeps them. Of sequences whose tokens so far are all known: a gap is
  // never known. Does nothing where prefixes are not reused.
  void NoteTokens(const int64_t* tokens);
  // The next tokens of a sequence that are not known yet, which steps have filled.
  void CommitTokens(int64_t id, const int64_t* tokens, int64_t num_tokens);
  const std::vector<int64_t>& Tokens(int64_t id) const { return sequences_[Find(id)].tokens; }
  int64_t Space(int64_t id) const { return sequences_[Find(id)].space; }
  // Of the pages of these sequences, each counted once, those that others have, too.
  int64_t NumShared(const int64_t* ids, int64_t num_ids) const;
  // These moves are about to be made: what they write is no longer what tokens say.
  void NoteMoves(const int64_t* ids, const int64_t* dst, const std::vector<TokenMove>& moves) noexcept;
  // Kept pages become free. ForgetTokens(): also what is known of the sequences there are, whose pages are never findable then.
  void DropPrefixes();
  void ForgetTokens();

  // ---- Contents elsewhere (cache_manager_away.cc): whoever has the memory copies it. ----
  bool IsAway(int64_t id) const { return sequences_[Find(id)].is_away; }
  std::vector<int32_t> HeldPages(int64_t id) const;  // its pages in order, those given back left out; none while it is away
  // Positions of pages that it gave back, [begin, end); empty: 0, 0.
  struct Gone {
    int64_t begin = 0, end = 0;
  };
  Gone GoneOf(int64_t id) const;
  void CheckHere(int64_t id, const char* operation) const;  // CacheStateError where it is away
  void SendAway(int64_t id);                                // gives its pages back
  void FetchBack(int64_t id);                               // takes as many as it gave: OutOfPagesError
  // A sequence of so many tokens, whose pages somebody fills; positions of `gone`, whole pages of it, have none. tokens: known ones.
  void AddFilled(int64_t id, int64_t length, const Gone& gone, const int64_t* tokens, int64_t num_tokens, int64_t space);
  void NoteFilled(int64_t id);  // its pages have their contents, and may be found

  // Which keys tokens see, from the next step on. ArgumentError where a sequence gave back pages that its next token would see.
  void SetWindow(const KeyWindow& window);
  void CheckWindow(const KeyWindow& window) const;  // the same, without setting it
  const KeyWindow& window() const { return window_; }

  // A step: every sequence grows by its append length, and has pages for it, until EndForward() confirms or CancelForward() takes all
  // of it back (lengths, pages, copies, even the order of free pages). ids must differ; a length of 0 attends nothing.
  // Allocates nothing once it has seen a step as large (page lists double when they are full).
  const Step& BeginForward(const int64_t* ids, const int64_t* append_lengths, int64_t num_requests);
  void EndForward();
  void CancelForward();
  bool in_forward() const { return in_forward_; }
  // Throws CacheStateError outside of a step.
  const Step& step() const;
  const Step& last_step() const { return step_; }

  // Pages in use in a step in which these sequences grow by so many tokens: copies counted, those that leave windows not. Exact; changes
  // nothing; may exceed num_pages.
  int64_t PagesAfter(const int64_t* ids, const int64_t* append_lengths, int64_t num_requests) const;
  // Pages that a sequence has at most while it grows to `length` tokens, in steps of at most max_append tokens, all its own.
  int64_t PeakPages(int64_t length, int64_t max_append) const;

  const CacheLimits& limits() const { return limits_; }
  const PagePool& pool() const { return pool_; }
  int64_t num_sequences() const { return static_cast<int64_t>(slot_of_.size()); }
  bool Has(int64_t id) const { return slot_of_.count(id) != 0; }
  int32_t Length(int64_t id) const { return sequences_[Find(id)].length; }
  const std::vector<int32_t>& Pages(int64_t id) const { return sequences_[Find(id)].pages; }  // kNoPage among them
  std::vector<int64_t> Ids() const;                                                           // ascending

  // Everything, as integers, for tests: page_size, num_pages, in_forward, number of sequences, number of free pages, the free pages
  // (next one last), the reference count of every page, then for each sequence (ascending id) its id, length, number of entries, pages.
  std::vector<int64_t> DumpState() const;
  // The index alone: number of nodes, then of each (ascending page) its page, parent, namespace and page_size tokens.
  std::vector<int64_t> DumpPrefixes() const;

 private:
  struct Sequence {
    int64_t id = 0;
    int32_t length = 0;
    bool is_live = false;
    std::vector<int32_t> pages;            // keeps its capacity when the slot is used again
    int32_t gone_begin = 0, gone_end = 0;  // entries of pages that are kNoPage
    bool is_away = false;                  // all entries are
    std::vector<int64_t> tokens;           // of positions 0, 1, …, as far as they are known
    int64_t space = 0;
    bool is_plain = true;      // keys and values are what its tokens give; not after pages were dropped or tokens moved
    int32_t num_indexed = 0;   // leading pages whose tokens are in the index, in pages of its own or of another
    PrefixIndex::Ref indexed;  // the last of these
  };
  // How to undo one request of the step.
  struct Undo {
    int32_t slot, length, num_pages;
    int32_t shared_page;  // the page that was replaced by a copy, or -1
  };
  struct Growth {
    int64_t new_pages = 0;  // for new tokens
    int64_t copies = 0;     // of shared pages
    int64_t freed = 0;      // that no owner can see any more
  };
  struct Entries {
    int32_t begin, end;
    int32_t size() const { return end - begin; }
  };
  // Scratch of a measurement; as large as the largest step so far.
  struct Scratch {
    std::vector<int32_t> slots;  // [num_requests] of the sequences
    std::vector<uint64_t> seen;  // [slots]: the last measurement that met this sequence
    uint64_t measurement = 0;
    std::vector<int32_t> writers;    // [num_pages]: requests that write into this shared page; 0 between measurements
    std::vector<int32_t> keeper;     // [num_pages], where writers > 0: the slot that writes in place, or -1
    std::vector<int32_t> contested;  // pages with writers > 0
    std::vector<int32_t> leavers;    // [num_pages]: requests behind whose windows this page lies; 0 between measurements
    std::vector<int32_t> left;       // pages with leavers > 0
  };

  int32_t NumPages(int64_t length) const { return static_cast<int32_t>((length + limits_.page_size - 1) / limits_.page_size); }
  int32_t Find(int64_t id) const;  // throws UnknownSequenceError
  int32_t NewSlot();
  void CheckIdle(const char* operation) const;
  void CheckNew(int64_t id, const char* argument) const;
  void CheckStep(const int64_t* append_lengths, int64_t num_requests) const;
  void ShrinkTo(Sequence* sequence, int32_t new_length) noexcept;
  // Of its pages, those that no token from its end on sees and that are not given back yet.
  Entries Leaving(const Sequence& sequence) const;
  void CheckReach(const Sequence& sequence, int64_t new_length, const char* argument, int64_t value) const;
  Growth Measure(const int64_t* ids, const int64_t* append_lengths, int64_t num_requests) const;
  void MeasureRequests(const int64_t* ids, const int64_t* append_lengths, int64_t num_requests) const;
  void MeasureLeavers(Growth* growth) const;
  void Reserve(const int64_t* append_lengths, int64_t num_requests);
  void GiveBack() noexcept;
  void Grow(const int64_t* append_lengths, int64_t num_requests) noexcept;
  void FillStep(const int64_t* append_lengths, int64_t num_requests) noexcept;
  int32_t TakePage() noexcept;
  void LeaveIndex(int32_t page) noexcept;
  PrefixIndex& Prefixes() const;
  int64_t MostMatched(int64_t num_tokens) const;
  void KeepTokens() noexcept;
  void Index(Sequence* sequence) noexcept;
  void CutTokens(Sequence* sequence, int64_t length) const noexcept;
  [[noreturn]] void ThrowNoRoom(const char* operation, int64_t id, int64_t needed) const;
  [[noreturn]] void ThrowOutOfPages(const Growth& growth) const;
  [[noreturn]] void ThrowUnknown(int64_t id) const;

  CacheLimits limits_;
  KeyWindow window_;
  PagePool pool_;
  std::unique_ptr<PrefixIndex> prefixes_;  // null: prefixes are not reused
  std::vector<int64_t> step_tokens_;       // of the step under way; empty: not known
  std::unordered_map<int64_t, int32_t> slot_of_;
  std::vector<Sequence> sequences_;
  std::vector<int32_t> free_slots_;
  bool in_forward_ = false;
  Step step_;
  std::vector<Undo> undo_;
  mutable Scratch scratch_;
};

}  // namespace tvm_infer::kv
