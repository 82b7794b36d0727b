"""Named workloads are what their names say, and shapes by flag become workloads or errors that name the flag."""

from __future__ import annotations

import pytest

from tvm_infer.bench import shapes, suites
from tvm_infer.errors import ArgumentError

H200 = {w.name: w for w in suites.H200}


def test_the_h200_suite_has_every_row():
    assert len(H200) == len(suites.H200) == 33
    assert all(w.dtype == "bfloat16" and w.head_dim == 128 and w.kv_layout == "HND" for w in suites.H200)
    assert sum(w.page_size == 1 for w in suites.H200) == 6
    assert [w.name for w in suites.H200 if w.plan_only] == ["plan 64 decode", "plan 16 mixed prefill"]
    assert suites.suite("h200").device == "cuda"


def test_quick_suite_is_six_rows_of_the_whole_one():
    quick = suites.suite("h200-quick").workloads
    assert len(quick) == 6 and set(quick) <= set(suites.H200)


@pytest.mark.parametrize(
    ("name", "requests", "qo_tokens", "kv_tokens", "gigaflop"),
    [
        ("decode h32/8 b1 kv32768", 1, 1, 32768, 0.537),
        ("decode h64/8 b64 kv8192", 64, 64, 64 * 8192, 17.180),
        ("decode h32/32 b16 kv2048", 16, 16, 16 * 2048, 0.537),
        ("skew one_long", 64, 64, 65536 + 63 * 512, 1.602),
        ("skew zipf", 64, 64, 155421, 2.546),
        ("skew uniform_random", 64, 64, 252617, 4.139),
        ("prefill 1x16384", 1, 16384, 16384, 2199.157),
        ("prefill 16 mixed", 16, 31370, 31370, 682.015),
        ("chunked 4x512 on 16384", 4, 2048, 65536, 541.182),
        ("mixed 2x1024 + 62x1@4096", 64, 2110, 2 * 1024 + 62 * 4096, 21.357),
        ("mixed 1x512@8192 + 63x1@2048", 64, 575, 8192 + 63 * 2048, 68.690),
        ("mixed 4x2048 + 60x1@8192", 64, 8252, 4 * 2048 + 60 * 8192, 145.559),
    ],
)
def test_counts_of_the_rows(name, requests, qo_tokens, kv_tokens, gigaflop):
    w = H200[name]
    assert (len(w.qo_lens), sum(w.qo_lens), sum(w.kv_lens)) == (requests, qo_tokens, kv_tokens)
    assert w.flops / 1e9 == pytest.approx(gigaflop, abs=1e-3)
    assert w.bytes_moved == 2 * (2 * kv_tokens * w.num_kv_heads + 2 * qo_tokens * w.num_qo_heads) * 128


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("2048", (2048,)),
        ("3x7", (7, 7, 7)),
        ("2x1024, 3x1", (1024, 1024, 1, 1, 1)),
        ("128..512/4", (128, 256, 384, 512)),
        ("5..5/1,0", (5, 0)),
        ("9..1/3", (9, 5, 1)),
    ],
)
def test_lists_of_lengths(text, lengths):
    assert shapes.parse_lengths(text, "--kv-lens") == lengths
    assert shapes.parse_lengths(shapes.format_lengths(lengths), "--kv-lens") == lengths


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "item ''"),
        ("1,,2", "item ''"),
        ("-4", "item '-4'"),
        ("64*2", r"item '64\*2'"),
        ("1..9", r"item '1\.\.9'"),
        ("0x5", "0 requests"),
        ("1..9/0", "0 requests"),
        ("65537x1", "65537 requests"),
        ("3x1000000000", "3000000000 tokens"),
    ],
)
def test_bad_lists_are_refused(text, message):
    with pytest.raises(ArgumentError, match=f"`--kv-lens`.*{message}|`--kv-lens` adds up to {message}"):
        shapes.parse_lengths(text, "--kv-lens")


def test_flags_make_a_workload():
    (w,) = shapes.from_flags("4096", "2x16,62x1", ("float16",), heads="28/4", head_dim=64, page_size=1, kv_layout="NHD")
    assert w.qo_lens == (16, 16) + (1,) * 62 and w.kv_lens == (4096,) * 64
    assert (w.num_qo_heads, w.num_kv_heads, w.head_dim, w.page_size, w.kv_layout) == (28, 4, 64, 1, "NHD")
    assert w.dtype == "float16" and not w.ragged
    assert w.name == "2x16@4096 + 62x1@4096 h28/4 d64 page1 NHD"


def test_one_list_is_enough():
    (decode,) = shapes.from_flags("3x100", None)
    assert decode.qo_lens == (1, 1, 1) and decode.dtype == "bfloat16"
    (prefill,) = shapes.from_flags(None, "3x100", ragged=True)
    assert prefill.kv_lens == prefill.qo_lens == (100, 100, 100) and prefill.ragged and "ragged" in prefill.name
    assert shapes.from_flags(None, None) == []
    assert [w.dtype for w in shapes.from_flags("9", None, ("bfloat16", "float16"))] == ["bfloat16", "float16"]


def test_many_lengths_have_a_short_name():
    (w,) = shapes.from_flags("1..64/64", None)
    assert w.name.startswith("64 requests, 64 tokens on 2080 keys")


@pytest.mark.parametrize(
    ("lens", "given", "message"),
    [
        (("3x9", "2x1"), {}, "`--kv-lens` lists 3 requests, `--qo-lens` 2"),
        (("9", "0"), {}, "`--qo-lens`: request 0 has 0 tokens"),
        (("9,4", "9,5"), {}, "`--kv-lens`: request 1 has 4 keys for 5"),
        (("9", None), {"heads": "32"}, "`--heads` is '32'"),
        (("9", None), {"heads": "32/5"}, "`--heads` is '32/5'"),
        (("9", None), {"heads": "8/0"}, "`--heads` is '8/0'"),
        (("9", None), {"head_dim": 0}, "`--head-dim` is 0"),
        (("9", None), {"page_size": -1}, "`--page-size` is -1"),
        (("9", None), {"kv_layout": "DHN"}, "`--layout` is 'DHN'"),
        (("9", None), {"dtypes": ("int8",)}, "`--dtype` is 'int8'"),
        ((None, None), {"page_size": 1}, "`--page-size` is given without"),
        ((None, None), {"ragged": True}, "`--ragged` is given without"),
    ],
)
def test_bad_flags_are_named(lens, given, message):
    with pytest.raises(ArgumentError, match=message):
        shapes.from_flags(*lens, **given)
