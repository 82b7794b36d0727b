"""What a variant's functions may ask for by name: position variables, and declared parameters."""

from __future__ import annotations

from dataclasses import dataclass

from .location import error_here
from .operations import BOOL, FLOAT, INT

POSITIONS = ("batch", "qo_head", "kv_head", "q_pos", "kv_pos", "q_len", "kv_len")
_OF_A_ROW = tuple(name for name in POSITIONS if name != "kv_pos")
_OF_A_KEY = ("batch", "kv_head", "kv_pos", "q_len", "kv_len")
OF_A_REQUEST = ("batch", "q_len", "kv_len")
# hole -> the variables that its function may take, besides the parameters
VARIABLES = {
    "logits": ("value", *POSITIONS),
    "mask": POSITIONS,
    "output": ("value", "lse", *_OF_A_ROW),
    "query": ("value", "channel", "mean_square", *_OF_A_ROW),
    "key": ("value", "channel", "mean_square", *_OF_A_KEY),
    "rope_rate": ("pair", *OF_A_REQUEST),
    "rope_position": ("pos", *OF_A_REQUEST),
}
RESULTS = {
    "logits": FLOAT,
    "mask": BOOL,
    "output": FLOAT,
    "query": FLOAT,
    "key": FLOAT,
    "rope_rate": FLOAT,
    "rope_position": INT,
}
KIND_OF_VARIABLE = (
    dict.fromkeys(("value", "lse", "mean_square"), FLOAT)
    | dict.fromkeys(("channel", "pair", "pos"), INT)
    | dict.fromkeys(POSITIONS, INT)
)

# dtype of a table -> kind of its elements in expressions
TABLE_KINDS = {"float32": FLOAT, "float16": FLOAT, "bfloat16": FLOAT, "int32": INT, "uint8": INT, "bool": BOOL}
SCALAR_DTYPES = ("float32", "int32")
MAX_SCALARS, MAX_TABLES, MAX_RANK = 16, 8, 4  # of cuda_src/tvm_infer/variant/variant.h
_INDEX = {"per_head": "qo_head", "per_request": "batch", "per_channel": "channel", "per_pair": "pair"}


@dataclass(frozen=True)
class Parameter:
    """A parameter's declaration, made by :func:`scalar`, :func:`tensor`, or one of the ``per_`` functions."""

    sort: str
    dtype: str
    rank: int

    def __post_init__(self) -> None:
        if self.sort not in ("scalar", "tensor", *_INDEX):
            raise error_here(f"a parameter is a {self.sort!r}; there are scalar, tensor, {', '.join(_INDEX)}")
        known = SCALAR_DTYPES if self.is_scalar else tuple(TABLE_KINDS)
        if self.dtype not in known:
            raise error_here(
                f"argument `dtype` of variant.{self.sort} is {self.dtype!r}; it must be one of {', '.join(known)}"
            )
        lowest, highest = {"scalar": (0, 0), "tensor": (1, MAX_RANK)}.get(self.sort, (1, 1))
        if type(self.rank) is not int or not lowest <= self.rank <= highest:
            raise error_here(
                f"argument `rank` of variant.{self.sort} is {self.rank!r}; it must be {lowest} to {highest}"
            )

    @property
    def is_scalar(self) -> bool:
        """Whether it is a number, not a table."""
        return self.sort == "scalar"

    @property
    def kind(self) -> str:
        """float32, int32 or bool: what its value, or an element, is in expressions."""
        return self.dtype if self.is_scalar else TABLE_KINDS[self.dtype]

    @property
    def index(self) -> str | None:
        """The variable that it is read at without being asked, or None."""
        return _INDEX.get(self.sort)

    def __str__(self) -> str:
        if self.sort == "tensor":
            return f"tensor({self.rank}, {self.dtype})"
        return f"{self.sort}({self.dtype})"


def scalar(dtype: str = "float32") -> Parameter:
    """A number, float32 or int32, given at bind: another value compiles nothing anew. At most 16 to a variant.

    As a divisor of // or % it must be at least 1, which bind checks.
    """
    return Parameter("scalar", dtype, 0)


def per_head(dtype: str = "float32") -> Parameter:
    """A tensor [num_qo_heads] of which functions get the element of the row's own query head.

    dtype : float32, float16, bfloat16 (functions get float32), int32, uint8 (functions get int32), or bool. At most 8 tables to a
    variant, those of :func:`per_request` and :func:`tensor` included.
    """
    return Parameter("per_head", dtype, 1)


def per_request(dtype: str = "float32") -> Parameter:
    """A tensor [num_requests] of which functions get the element of the row's own request. dtype : as of :func:`per_head`."""
    return Parameter("per_request", dtype, 1)


def per_channel(dtype: str = "float32") -> Parameter:
    """A tensor [head_dim] of which ``query`` and ``key`` get the element of their channel. dtype : as of :func:`per_head`."""
    return Parameter("per_channel", dtype, 1)


def per_pair(dtype: str = "float32") -> Parameter:
    """A tensor [rotary_dim / 2] of which ``rope_rate`` gets the element of its pair. dtype : as of :func:`per_head`."""
    return Parameter("per_pair", dtype, 1)


def tensor(rank: int, dtype: str = "float32") -> Parameter:
    """A tensor of `rank` 1 to 4, indexed by functions: ``bias[qo_head, q_pos, kv_pos]``. dtype : as of :func:`per_head`.

    Nothing is checked while attention runs: an index outside the tensor reads foreign memory. Both sides of ``where`` are evaluated,
    so an index that one of them must not use has to be clamped (``variant.maximum(kv_pos - 8, 0)``).
    """
    return Parameter("tensor", dtype, rank)
