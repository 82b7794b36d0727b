"""The source of kernels that copy, merge and select, and of 8-bit tiles, run on the host (emulated/warp.h), against the definition."""

from __future__ import annotations

import pathlib
import shutil
import subprocess

import pytest

CUDA_SRC = pathlib.Path(__file__).resolve().parents[2] / "cuda_src"
EMULATED = pathlib.Path(__file__).resolve().parent / "emulated"
# what runs a header that is no kernel
PROGRAMS = {"rope_angle": "rope_append", "kv_cells": "append"}
PROGRAMS |= dict.fromkeys(("attention/decode_products_scaled", "attention/widen_tile", "tile/swizzle"), "float8_tiles")


def run(name: str, tmp_path: pathlib.Path, include: pathlib.Path = CUDA_SRC) -> subprocess.CompletedProcess[str]:
    """Compiles and runs emulated/<name>.cc against kernels in `include`."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler on PATH")
    program = tmp_path / name
    flags = ["-std=c++20", "-O1", "-fsanitize=undefined", "-fno-sanitize-recover=all", "-Wno-unknown-pragmas"]
    flags += ["-include", str(EMULATED / "warp.h")]
    # the stand-ins for what only a GPU can do come first
    command = [
        compiler,
        *flags,
        "-I",
        str(EMULATED),
        "-I",
        str(include),
        str(EMULATED / f"{name}.cc"),
        "-o",
        str(program),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return subprocess.run([str(program)], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "name",
    [
        "append",
        "arrivals",
        "float8_tiles",
        "merge_states",
        "move_tokens",
        "page_bounds",
        "page_scores",
        "rope_append",
        "scale_lse",
        "select_pages",
    ],
)
def test_kernel_does_what_its_definition_says(name, tmp_path):
    done = run(name, tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 60


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("append", "entries[i] <= token", "entries[i] < token"),
        ("append", "position % p.page_size", "(position + 1) % p.page_size"),
        ("append", "check.Stops(-1)", "false"),
        ("append", "is_v ? p.v_scales : p.k_scales", "p.k_scales"),
        ("append", "__ldg(scales + head)", "__ldg(scales)"),
        ("append", "* Cells::kElementBytes", "* 2"),
        ("kv_cells", "fmaf(fmaf(quotient, scale, -x), -reciprocal, quotient)", "quotient"),
        ("kv_cells", "fabsf(quotient) < kBeyond", "true"),
        ("kv_cells", "Pair(x.z) | Pair(x.w) << 16", "Pair(x.w) | Pair(x.z) << 16"),
        ("rope_append", "to[lane.second] = cells.Convert(second)", "to[lane.second] = cells.Convert(first)"),
        ("rope_append", "high[0] | high[1] << 16", "high[1] | high[0] << 16"),
        ("rope_append", "turns && p.is_interleaved == 0", "turns"),
        ("rope_append", "&& angles_token != token", "&& angles_token == -1"),
        ("rope_append", "if (is_padding) {", "if (false) {"),
        ("rope_append", "lane.turns && !row.is_v", "lane.turns"),
        ("rope_append", "unit + turning_lanes", "unit + row_lanes"),
        ("rope_append", "fmaf(x, angle.cos, -y * angle.sin)", "fmaf(x, angle.cos, y * angle.sin)"),
        ("rope_angle", "fmaf(inv_freq, kQuartersLow, ", "(0.f * kQuartersLow + "),
        ("rope_angle", "(quarters - whole) + quarters_low", "(quarters - whole)"),
        ("rope_angle", "(quadrant + 1) & 2", "quadrant & 2"),
        ("arrivals", "!MayHaveHelpers() || Left() > 0", "!MayHaveHelpers()"),
        ("arrivals", "== Helpers() - Left()", "== Helpers()"),
        ("arrivals", "count <= kMost", "true"),
        ("arrivals", "place + shares - turn * chunks % shares", "place"),
        ("arrivals", "turn * chunks % shares) % shares", "turn * chunks % shares)"),
        ("merge_states", "max == kNegInf ? 0.f : max", "max"),
        ("merge_states", "weights.a == 0.f ? 0.f : ", ""),
        ("merge_states", "__syncwarp();", ""),
        ("move_tokens", "column % row_vectors * 16", "column % row_vectors * 8"),
        ("move_tokens", "move.src_page * p", "move.dst_page * p"),
        ("move_tokens", "move.dst_slot * p.row_bytes", "move.src_slot * p.row_bytes"),
        ("move_tokens", "i < p.num_moves", "i < p.num_moves - 1"),
        ("page_bounds", "min(a.page_size, kv_len - index * a.page_size)", "a.page_size"),
        ("page_bounds", "first_token / a.page_size + 2 * request", "first_token / a.page_size + request"),
        ("page_bounds", "bounds.Merge(row_lanes);", ""),
        ("page_bounds", "to + p.bounds.stride_side", "to + p.bounds.stride_head"),
        ("page_bounds", "ptx::PairMax<Compared>(greatest[i], words[i])", "words[i]"),
        ("page_scores", "kIsAbove ? ptx::PairMax", "!kIsAbove ? ptx::PairMax"),
        ("page_scores", "part(query.x), part(query.y)", "part(query.y), part(query.x)"),
        ("page_scores", "first_head + 2 * t + i >= p.group_size", "false"),
        ("page_scores", "ptx::MaxNan(to, score)", "(score > to ? score : to)"),
        ("page_scores", "t == 0 ? of.x : of.y", "of.x"),
        ("page_scores", "num_pages <= p.min_pages", "false"),
        ("select_pages", "of > last.order", "of >= last.order"),
        ("select_pages", "my_equal < last.rest", "my_equal <= last.rest"),
        ("select_pages", "w < warp", "w <= warp"),
        ("select_pages", "== kNothingPlanned", "== kPlanMagic"),
        ("select_pages", "i < kSelectPagesHeld ?", "true ?"),
        ("select_pages", "is_refused ? 0 :", "false ? 0 :"),
        ("select_pages", "shared.rest = num_taken - above", "shared.rest = num_taken"),
        ("select_pages", "WithListLen(from, request.list_len,", "WithListLen(from, request.list_len - 1,"),
        ("select_pages", "__match_any_sync(0xffffffff, counts ? digit : 256)", "__ballot_sync(0xffffffff, counts)"),
        ("scale_lse", "i / p.num_heads * p.stride_row", "i % p.num_heads * p.stride_row"),
        ("scale_lse", "int64_t{gridDim.x} * kScaleLseThreads", "int64_t{kScaleLseThreads}"),
        ("scale_lse", "i < num_elements", "i < num_elements - 1"),
        ("attention/decode_products_scaled", "x &= keep[half]", "x &= ~0u"),
        ("attention/widen_tile", "lane / 4 * 5", "lane / 4"),  # right, but banks meet
        ("attention/widen_tile", "Config::kHeadDim <= 128 ? 2 : 1", "2"),  # wide heads: covers what is not read yet
        ("tile/swizzle", "key / kRowsOfLine % kChunks", "key % kChunks"),
    ],
)
def test_a_wrong_kernel_is_noticed(name, right, wrong, tmp_path):
    include = tmp_path / "include"
    shutil.copytree(CUDA_SRC, include, ignore=shutil.ignore_patterns("*.cc"))
    kernel = include / "tvm_infer" / f"{name if '/' in name else f'kernels/{name}'}.cuh"
    assert right in kernel.read_text()
    kernel.write_text(kernel.read_text().replace(right, wrong))
    assert run(PROGRAMS.get(name, name), tmp_path, include).returncode != 0
