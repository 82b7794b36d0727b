"""Generated code becomes a library: once a digest, kept under all that it depends on."""

from __future__ import annotations

import dataclasses

import pytest

from tvm_infer import errors, variant
from tvm_infer.jit import cxx, headers
from tvm_infer.variant import cpu


def test_the_key_is_what_the_code_depends_on(monkeypatch):
    library, compiler = cpu.describe(variant.soft_cap), cxx.find()
    assert "tvm_infer/variant/variant.h" in library.sources
    keys = {library.key(compiler), cpu.describe(variant.alibi).key(compiler)}
    keys.add(dataclasses.replace(library, flags=("-O0",)).key(compiler))
    keys.add(
        dataclasses.replace(library, sources={**library.sources, "tvm_infer/variant/variant.h": b""}).key(compiler)
    )
    keys.add(library.key(cxx.Compiler(compiler.path, "PATH", "g++ 99")))
    monkeypatch.setattr(cxx, "processor", lambda: "another")
    keys.add(library.key(compiler))
    assert len(keys) == 6
    assert dataclasses.replace(library, include_dirs=[]).key(compiler) == library.key(compiler)


def test_the_processor_is_described_and_stays_the_same():
    cxx.processor.cache_clear()
    first = cxx.processor()
    cxx.processor.cache_clear()
    assert first == cxx.processor() and len(first) > 5 and "MHz" not in first


def test_a_digest_is_compiled_once(monkeypatch):
    v = variant.Variant("v", logits=lambda value: value * 17.25)
    address = variant.cpu_functions(v)
    monkeypatch.setattr(cxx, "_compile", lambda *args: pytest.fail("compiled again"))
    assert variant.cpu_functions(variant.Variant("other", logits=lambda value: value * 17.25)) == address
    cpu._loaded.pop(v.digest)  # as in another process: the cache on disk has it
    assert variant.cpu_functions(v) == address


def test_without_a_compiler_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("TVM_INFER_CXX", raising=False)
    with pytest.raises(errors.MissingDependencyError, match=r"C\+\+ compiler.*install"):
        variant.cpu_functions(variant.Variant("v", logits=lambda value: value * 18.25))


def test_the_constants_are_those_of_the_header():
    from tvm_infer.variant import parameters

    text = (headers.include_dir() / "tvm_infer" / "variant" / "variant.h").read_text()
    for name, value in (
        ("kMaxScalars", parameters.MAX_SCALARS),
        ("kMaxTables", parameters.MAX_TABLES),
        ("kMaxRank", parameters.MAX_RANK),
    ):
        assert f"{name} = {value};" in text
