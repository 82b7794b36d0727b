"""Random variants, compiled in one go: generated code, the numpy evaluation and the function itself on numpy arrays agree."""

from __future__ import annotations

import ctypes
import pickle
import subprocess
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from generated import LOG2_E, At, element, logits, output
from random_expressions import COLUMNS, HOLES, NUMPY, ROWS, TRACED, Generator

from tvm_infer import variant
from tvm_infer.jit import cxx, headers
from tvm_infer.variant.cpu import _FLAGS
from tvm_infer.variant.lower import lower

COUNT, KEYS = 210, 24
RNG = np.random.default_rng(3)
DECLARED = {
    "a": variant.scalar(),
    "n": variant.scalar("int32"),
    "slope": variant.per_head(),
    "half": variant.per_request("float16"),
    "flag": variant.per_head("bool"),
    "weights": variant.tensor(2, "bfloat16"),
    "marks": variant.tensor(2, "uint8"),
}
VALUES = {
    "a": 0.75,
    "n": -7,
    "slope": RNG.standard_normal(4).astype(np.float32),
    "half": RNG.standard_normal(3).astype(np.float16),
    "flag": np.array([True, False, True, True]),
    "weights": RNG.standard_normal((ROWS, COLUMNS)).astype(ml_dtypes.bfloat16),
    "marks": RNG.integers(0, 256, (COLUMNS, ROWS)).astype(np.uint8).T,  # strided
}
AT = [At(0, 0, 0, 3, 2, 5), At(1, 3, 1, 20, 1, 21), At(2, 2, 1, 7, 9, 16), At(2, 1, 0, 0, 3, 3)]


class Recording:
    """An environment that remembers which of its attributes were read."""

    def __init__(self, **values) -> None:
        self.__dict__["_values"] = values
        self.read: set[str] = set()

    def __getattr__(self, name):
        self.read.add(name)
        return self._values[name]


class Case:
    def __init__(self, seed: int) -> None:
        self.hole = HOLES[seed % len(HOLES)]
        generator = Generator(seed, self.hole)
        self.function = generator.make("b" if self.hole == "mask" else "f", 1 + seed % 5)
        recording = self.environment(AT[0], np.zeros(KEYS), 0.0, np.arange(KEYS))
        self.function(recording)
        arguments = sorted(recording.read - {"f"})
        # a function with these arguments' names
        scope = {"function": self.function, "Environment": SimpleNamespace, "TRACED": TRACED}
        given = ", ".join(f"{name}={name}" for name in arguments)
        traced = eval(f"lambda {', '.join(arguments)}: function(Environment(f=TRACED, {given}))", scope)
        declared = {name: p for name, p in DECLARED.items() if name in arguments}
        self.variant = variant.Variant(f"random{seed}", **{self.hole: traced}, **declared)
        self.code = self.variant.holes[self.hole]
        # the whole mask, without taking bands out
        self.struct = lower({self.hole: self.code}, self.variant.parameters)
        self.values = {name: VALUES[name] for name in self.variant.parameters}

    @staticmethod
    def environment(at: At, value, lse, kv_pos) -> Recording:
        """Variables and parameters as arrays."""
        shape = kv_pos.shape
        rows = {name: np.full(shape, x) for name, x in at._asdict().items()}
        return Recording(
            f=NUMPY,
            value=value,
            lse=np.full(shape, lse),
            kv_pos=kv_pos,
            channel=np.arange(len(value)),
            mean_square=np.full(shape, (value**2).mean()),
            **rows,
            a=np.full(shape, VALUES["a"]),
            n=np.full(shape, VALUES["n"]),
            slope=np.full(shape, VALUES["slope"][at.qo_head], np.float64),
            half=np.full(shape, VALUES["half"][at.batch], np.float64),
            flag=np.full(shape, VALUES["flag"][at.qo_head]),
            weights=VALUES["weights"].astype(np.float64),
            marks=VALUES["marks"].astype(np.int64),
        )

    def on_numpy(self, at: At, value, lse, kv_pos) -> np.ndarray:
        """The function itself, on arrays."""
        return np.broadcast_to(self.function(self.environment(at, value, lse, kv_pos)), kv_pos.shape)


@pytest.fixture(scope="module")
def cases():
    return [Case(seed) for seed in range(COUNT)]


@pytest.fixture(scope="module")
def library(cases, tmp_path_factory):
    folder = tmp_path_factory.mktemp("random")
    structs = {case.struct.name: case.struct.source for case in cases}
    text = "".join(f"{source}TVM_INFER_VARIANT_CPU({name});\n" for name, source in structs.items())
    (folder / "all.cc").write_text(f'#include "tvm_infer/variant/cpu_functions.h"\n{text}')
    warnings = ("-Wall", "-Wextra", "-Werror", "-Wno-tautological-compare")  # chance compares a value with itself
    command = [
        cxx.find().path,
        "-std=c++17",
        *_FLAGS,
        cxx.NATIVE,
        *warnings,
        "-fPIC",
        "-shared",
        f"-I{headers.include_dir()}",
    ]
    subprocess.run([*command, str(folder / "all.cc"), "-o", str(folder / "all.so")], check=True)
    return ctypes.CDLL(str(folder / "all.so"))


def address(library, case) -> int:
    return ctypes.addressof(ctypes.c_char.in_dll(library, f"{case.struct.name}_cpu"))


def test_they_are_of_the_whole_grammar(cases):
    from tvm_infer.variant.operations import OPERATIONS

    assert {node.op for case in cases for node in case.code.nodes} >= set(OPERATIONS)
    assert max(len(case.code.nodes) for case in cases) > 30


def test_generated_code_numpy_evaluation_and_the_function_agree(cases, library):
    finite = 0
    for case in cases:
        bound = case.variant.bind(**case.values)
        for at in AT:
            value = (RNG.standard_normal(KEYS) * 2).astype(np.float32)
            lse = float(np.float32(RNG.standard_normal()))
            kv_pos = np.full(KEYS, 5) if case.hole == "key" else np.arange(KEYS)
            expected = case.on_numpy(at, value.astype(np.float64), lse, kv_pos)
            variables = {**at._asdict(), "value": value, "lse": lse, "kv_pos": kv_pos, "channel": np.arange(KEYS)}
            variables["mean_square"] = (value.astype(np.float64) ** 2).mean()
            evaluated = np.broadcast_to(variant.evaluate(case.code, {**variables, **case.values}), (KEYS,))
            np.testing.assert_allclose(evaluated, expected, rtol=1e-6, atol=1e-6, err_msg=str(case.variant))
            if case.hole == "output":
                got = output(address(library, case), bound, at, lse, value)
            elif case.hole in ("query", "key"):
                got = element(address(library, case), bound, at, value, 5 if case.hole == "key" else None)
            else:
                got = logits(address(library, case), bound, at, value)
            if case.hole == "mask":
                np.testing.assert_array_equal(got != -np.inf, expected, err_msg=str(case.variant))
                assert np.allclose(got[expected] * LOG2_E, value[expected] * LOG2_E, rtol=1e-6)
                continue
            scale = 1 + np.abs(expected).max()
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * scale, err_msg=str(case.variant))
            finite += int(np.isfinite(got).sum())
    assert finite > 100 * COUNT / 3


def test_bands_and_what_is_left_are_the_mask(cases):
    kv_pos, q_pos = np.arange(KEYS)[None], np.arange(KEYS)[:, None]
    for case in cases:
        if case.hole != "mask":
            continue
        # the random mask among bands, in a spelling of its own
        narrow = variant.Variant(
            "narrow",
            mask=lambda q_pos, kv_pos, w: ~((kv_pos > q_pos) | (kv_pos + w < q_pos)),
            w=variant.scalar("int32"),
        )
        v = case.variant & narrow
        bound = v.bind(**case.values, w=6)
        assert bound.band.causal and 0 <= bound.band.window_left <= 6
        values = {**AT[1]._asdict(), "q_pos": q_pos, "kv_pos": kv_pos, "w": 6, **case.values}
        inside = (kv_pos <= q_pos) & (q_pos - kv_pos <= bound.band.window_left)
        if v.residual_mask is not None:
            inside = inside & variant.evaluate(v.residual_mask, values)
        seen = np.broadcast_to(variant.evaluate(v.mask, values), (KEYS, KEYS))
        np.testing.assert_array_equal(inside, seen, err_msg=str(v))


def test_they_are_stored_and_read_back(cases):
    for case in cases:
        again = pickle.loads(pickle.dumps(case.variant))
        assert again == case.variant and again.to_json() == case.variant.to_json()
        assert lower({case.hole: again.holes[case.hole]}, again.parameters) == case.struct
        from tvm_infer.variant.code import of_tir

        # through TIR and back
        assert of_tir(again.tir(case.hole)).kind == case.code.kind
        assert len(of_tir(again.tir(case.hole)).nodes) == len(case.code.nodes)
