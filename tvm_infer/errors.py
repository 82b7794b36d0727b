"""Typed errors. Each names the argument, its value, the limit, and what to do.

C++ throws the same kinds by name; :mod:`tvm_infer._ffi` registers the classes with tvm-ffi so that they arrive typed.
"""

from __future__ import annotations


class TvmInferError(Exception):
    """Base of every error that tvm_infer raises on purpose."""


class ArgumentError(TvmInferError, ValueError):
    """An argument has a wrong value, shape, rank, stride or device."""


class DTypeError(TvmInferError, TypeError):
    """A tensor has a data type that the call does not take."""


class VariantError(ArgumentError):
    """A function or parameter of an attention variant cannot be used; where a function is at fault, the message starts with its
    file and line.
    """


class WorkspaceError(TvmInferError, ValueError):
    """A workspace or plan buffer is smaller than the batch needs."""


class PlanMismatchError(TvmInferError, ValueError):
    """A plan was made for other lengths, heads, band or another buffer than it is run with."""


class UnknownSequenceError(TvmInferError, KeyError):
    """A sequence id that the cache does not hold, or one that it holds already."""

    def __str__(self) -> str:  # KeyError would print the repr
        return str(self.args[0]) if self.args else ""


class OutOfPagesError(TvmInferError, RuntimeError):
    """The KV cache has too few free pages for the request."""


class CacheStateError(TvmInferError, RuntimeError):
    """A cache operation came in the wrong state (begin_forward twice, append without begin_forward, …)."""


class MatchError(TvmInferError, ValueError):
    """The Relax pass met an attention that it cannot prove, or a function that it cannot rewrite."""


class ModelError(TvmInferError, ValueError):
    """A model file or program that cannot be used: missing, not Llama-like, without packed-token inputs."""


class MissingDependencyError(TvmInferError, ImportError):
    """An optional package is needed and absent; the message says which extra installs it."""


class ExecutorError(TvmInferError, RuntimeError):
    """No executor for this device, data type or head_dim."""


class DeviceError(TvmInferError, RuntimeError):
    """The CUDA driver or cuBLAS refused a call; the message names the call and the reason given."""


class CompileError(TvmInferError, RuntimeError):
    """nvcc did not compile a kernel; the message holds what it printed."""


class AbiError(TvmInferError, RuntimeError):
    """A compiled model was built against another tvm_infer ABI."""


class InternalError(TvmInferError, RuntimeError):
    """An invariant of tvm_infer itself is broken: please report it."""
