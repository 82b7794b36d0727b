"""The weights file: against the safetensors package, shared and 16-bit weights, mapping, files that are damaged."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
import tvm

from tvm_infer import errors
from tvm_infer.runtime import weights_file
from tvm_infer.runtime.executable import as_weight
from tvm_infer.runtime.weights_file import WeightsFile


def as_tvm(array):
    return tvm.runtime.tensor(array)


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        "odd": rng.standard_normal(7).astype("float32"),  # 28 bytes: would shift what follows it
        "matrix": rng.standard_normal((5, 48)).astype("float32"),
        "half": rng.standard_normal((4, 16)).astype("float16"),
        "brain": rng.standard_normal((4, 16)).astype(ml_dtypes.bfloat16),
        "ids": np.arange(9, dtype="int64").reshape(3, 3),
        "scalar": np.array(2.5, "float32"),
        "empty": np.zeros((0, 4), "float32"),
        "ünïcode": np.ones((2, 32), "float32"),
    }


@pytest.fixture
def path(arrays, tmp_path):
    weights_file.save(tmp_path / "w.safetensors", {k: as_tvm(v) for k, v in arrays.items()}, {"who": "test"})
    return tmp_path / "w.safetensors"


def header_of(path):
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), 8 + size


def test_round_trip(arrays, path):
    read = WeightsFile(path)
    assert set(read) == set(arrays) and len(read) == len(arrays)
    assert read.metadata == {"who": "test"}
    for name, expected in arrays.items():
        assert read.shape_and_dtype(name) == (expected.shape, expected.dtype.name)
        tensor = as_weight(read[name], name)
        assert tensor.numpy().astype("float64").tolist() == expected.astype("float64").tolist()


def test_the_safetensors_package_reads_it(arrays, path):
    safetensors = pytest.importorskip("safetensors")
    torch = pytest.importorskip("torch")
    with safetensors.safe_open(str(path), "pt") as f:
        assert set(f.keys()) == set(arrays) and f.metadata()["who"] == "test"
        for name, expected in arrays.items():
            assert f.get_tensor(name).to(torch.float64).tolist() == expected.astype("float64").tolist()


def test_it_reads_what_the_safetensors_package_writes(arrays, tmp_path):
    numpy_format = pytest.importorskip("safetensors.numpy")
    plain = {k: v for k, v in arrays.items() if k != "brain"}
    numpy_format.save_file(plain, str(tmp_path / "theirs.safetensors"))
    read = WeightsFile(tmp_path / "theirs.safetensors")
    assert {k: np.asarray(read[k]).tolist() for k in read} == {k: v.tolist() for k, v in plain.items()}


def test_weights_are_mapped_where_their_place_allows(path):
    """64 bytes is what TVM's kernels assume; the sizes that are no multiple of it come last."""
    read = WeightsFile(path)
    assert all(read[name].ctypes.data % 64 == 0 for name in ("matrix", "half", "ünïcode"))
    view = read["matrix"]
    assert as_weight(view, "matrix").data_ptr() == view.ctypes.data  # no copy
    before = path.read_bytes()
    view[:] = 7.0  # private to this process
    assert path.read_bytes() == before


def test_a_tensor_of_two_names_is_stored_once(tmp_path):
    tensor = as_tvm(np.ones((64, 64), "float32"))
    other = as_tvm(np.ones((64, 64), "float32"))  # equal, but another
    weights_file.save(tmp_path / "w", {"embed": tensor, "head": tensor, "other": other}, {})
    header, _ = header_of(tmp_path / "w")
    assert set(header) == {"__metadata__", "embed", "other"}
    read = WeightsFile(tmp_path / "w")
    assert set(read) == {"embed", "head", "other"}
    assert np.shares_memory(read["head"], read["embed"]) and not np.shares_memory(read["other"], read["embed"])


def test_the_executable_s_weights(saved, executable):
    read = WeightsFile(saved / "model.safetensors")
    for name, weight in zip(executable.manifest.weights, executable._weights, strict=True):
        assert np.array_equal(read[name], weight.numpy())
    header, _ = header_of(saved / "model.safetensors")
    assert "lm_head.weight" in read and not {"lm_head.weight", "model.embed_tokens.weight"} <= set(header)  # tied


def test_a_type_that_the_format_lacks(tmp_path):
    with pytest.raises(errors.DTypeError, match="weight 'x' is uint32; the format has float64, float32"):
        weights_file.save(tmp_path / "w", {"x": as_tvm(np.zeros(3, "uint32"))}, {})
    assert list(tmp_path.iterdir()) == []


def with_header(text: bytes, data: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text + data


def entry(**changes):
    fields = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}
    return with_header(json.dumps({"x": fields}).encode(), b"\0" * 8)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "0 bytes cannot hold a header"),
        (b"1234", "4 bytes cannot hold a header"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "cannot hold a header of 1099511627776"),
        (with_header(b"no json"), "JSONDecodeError"),
        (with_header(b"[1]"), "its header cannot be read"),
        (entry(dtype="F8_E4M3"), "KeyError: 'F8_E4M3'"),
        (entry(shape=[3]), r"tensor 'x', float32 \[3\], at bytes 0 to 8 of 8"),
        (entry(shape=[-2]), "tensor 'x'"),
        (entry(data_offsets=[4, 12]), "at bytes 4 to 12 of 8; the file may be cut short"),
        (entry(data_offsets=[-8, 0]), "tensor 'x'"),
        (entry(data_offsets=[0]), "its header cannot be read"),
        (with_header(json.dumps({"__metadata__": {"tvm_infer.same_as": '{"y": "z"}'}}).encode()), "KeyError: 'z'"),
    ],
)
def test_damaged_files(tmp_path, contents, message):
    (tmp_path / "w").write_bytes(contents)
    with pytest.raises(errors.ModelError, match=rf"w is no whole safetensors file: .*{message}"):
        WeightsFile(tmp_path / "w")


def test_a_file_that_is_cut_short(path):
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(errors.ModelError, match="may be cut short"):
        WeightsFile(path)


def test_no_file(tmp_path):
    with pytest.raises(errors.ModelError, match="is a folder"):
        WeightsFile(tmp_path)
