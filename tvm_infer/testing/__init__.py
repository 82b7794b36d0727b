"""Reference attention in float64, generators of paged batches, comparison: what the tests of tvm_infer and of its users need."""

from .batches import PagedBatch, make_paged_batch
from .reference import attention_reference, merge_reference, relative_error, rope_reference

__all__ = [
    "PagedBatch",
    "attention_reference",
    "make_paged_batch",
    "merge_reference",
    "relative_error",
    "rope_reference",
]
