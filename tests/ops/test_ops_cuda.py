"""The way of the ops to a cuda device, on machines without one: tensors that claim to lie there, packed functions that take notes."""

from __future__ import annotations

import numpy as np
import pytest

import tvm_infer
from tvm_infer import _array, _device, _ffi, errors, ops, planning

torch = pytest.importorskip("torch")
fake_tensor = pytest.importorskip("torch._subclasses.fake_tensor")

QO, KV_LEN = [0, 1, 4], [20, 3]
HEADS = {"num_qo_heads": 4, "num_kv_heads": 2, "head_dim": 64}
SETTINGS = {**HEADS, "dtype": "bfloat16"}
NUM_SMS = 5
ON_DEVICE = {"check_plan", "plan_upload", "plan_status", "paged_attention", "ragged_attention", "append", "merge"}


class Calls(list):
    """(name, arguments) of packed functions that would need the device."""

    status = 0

    def of(self, name):
        return [arguments for called, arguments in self if called == name]


@pytest.fixture
def calls(monkeypatch):
    real, noted = _ffi.func, Calls()

    def func(name):
        if name == "cuda_info":
            return lambda index: f"sm_90a {NUM_SMS} A Card of {index}"
        if name == "cuda_tile_table":
            return real("cpu_tile_table")
        if name in ON_DEVICE or name == "append_paged_attention":

            def note(*arguments):
                noted.append((name, arguments))
                return noted.status

            return note
        return real(name)

    for cached in (_device.cuda_info, planning._tile_table, planning._capacity):
        cached.cache_clear()
    monkeypatch.setattr(_ffi, "func", func)
    with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
        yield noted
    for cached in (_device.cuda_info, planning._tile_table, planning._capacity):
        cached.cache_clear()


def cuda(shape, dtype=torch.bfloat16, index=0):
    return torch.empty(shape, dtype=dtype, device=f"cuda:{index}")


def index(length, **kwargs):
    return cuda((length,), torch.int32, **kwargs)


def arguments(**changes):
    made = {
        "q": cuda((4, 4, 64)),
        "kv_cache": cuda((6, 2, 2, 16, 64)),
        "kv_page_indptr": index(3),
        "kv_page_indices": index(3),
        **changes,
    }
    made.setdefault("plan", tvm_infer.plan(QO, KV_LEN, device="cuda", **SETTINGS))
    return made


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (None, "cpu"),
        ("cpu", "cpu"),
        ("cpu:0", "cpu"),
        ("cuda", "cuda:0"),
        ("cuda:3", "cuda:3"),
        (torch.device("cuda:1"), "cuda:1"),
        (torch.device("cpu"), "cpu"),
        (_device.Device("cuda", 2), "cuda:2"),
    ],
)
def test_devices_by_name(device, expected):
    assert str(_device.parse(device)) == expected


def test_devices_of_tvm():
    tvm = pytest.importorskip("tvm")
    assert _device.parse(tvm.cuda(1)) == _device.Device("cuda", 1)
    assert _device.parse(tvm.cpu()) == _device.CPU


@pytest.mark.parametrize(
    ("device", "kind", "words"),
    [
        ("cuda:x", errors.ArgumentError, ["`device`", "'cuda:x'", '"cuda:1"']),
        ("", errors.ArgumentError, ["`device`", "''"]),
        (7, errors.ArgumentError, ["`device`", "7"]),
        ("rocm:0", errors.ExecutorError, ["rocm", '"cpu" and "cuda"']),
        (torch.device("meta"), errors.ExecutorError, ["meta"]),
    ],
)
def test_devices_that_are_none(device, kind, words):
    for call in (
        lambda: tvm_infer.plan(QO, KV_LEN, device=device, **SETTINGS),
        lambda: tvm_infer.workspace_size(max_requests=2, max_tokens=4, device=device, **SETTINGS),
    ):
        with pytest.raises(kind) as caught:
            call()
        for word in words:
            assert word in str(caught.value)


def test_float32_has_no_cuda_executor(calls):
    for call in (
        lambda: tvm_infer.plan(QO, KV_LEN, device="cuda", **HEADS),
        lambda: tvm_infer.workspace_size(max_requests=2, max_tokens=4, device="cuda", **HEADS),
        lambda: ops.cuda_tile_table("float32", 64),
    ):
        with pytest.raises(errors.ExecutorError, match=r'`dtype` is "float32".*bfloat16 and float16'):
            call()
    with pytest.raises(errors.DTypeError, match="int8"):
        tvm_infer.plan(QO, KV_LEN, device="cuda", **{**SETTINGS, "dtype": "int8"})


def test_a_plan_for_a_device_is_uploaded_there(calls):
    plan = tvm_infer.plan(QO, KV_LEN, device="cuda:1", **SETTINGS)
    assert plan.num_ctas == NUM_SMS
    ((host, device_buffer),) = calls.of("plan_upload")
    assert np.shares_memory(host, plan.buffer) and device_buffer is plan.device_buffer
    assert device_buffer.device == torch.device("cuda:1") and device_buffer.dtype == torch.int32
    assert device_buffer.numel() * 4 == plan.bytes_used
    assert repr(plan).endswith("on cuda:1)")
    on_cpu = tvm_infer.plan(QO, KV_LEN, **SETTINGS)
    assert on_cpu.device_buffer is None and "cuda" not in repr(on_cpu) and len(calls.of("plan_upload")) == 1


def test_a_plan_into_given_buffers(calls):
    size = tvm_infer.workspace_size(max_requests=2, max_tokens=4, device="cuda", **SETTINGS)
    out, device_out = np.empty(size.plan_bytes // 4, np.int32), index(size.plan_bytes // 4)
    kwargs = {"out": out, "device_out": device_out, "max_partial_rows": size.partial_rows, **SETTINGS}
    for device in (None, "cuda", torch.device("cuda", 0)):
        plan = tvm_infer.plan(QO, KV_LEN, device=device, **kwargs)
        assert plan.buffer is out and plan.device_buffer is device_out
    with pytest.raises(errors.ArgumentError, match="`device` is 'cuda:1', `device_out` is on cuda:0"):
        tvm_infer.plan(QO, KV_LEN, device="cuda:1", **kwargs)
    with pytest.raises(errors.ArgumentError, match="`device` is 'cpu', `device_out` is on cuda:0"):
        tvm_infer.plan(QO, KV_LEN, device="cpu", **kwargs)
    with pytest.raises(errors.ArgumentError, match="`device_out` is on cpu"):
        tvm_infer.plan(QO, KV_LEN, **{**kwargs, "device_out": np.zeros(9, np.int32)})
    with pytest.raises(errors.ArgumentError, match="`qo_indptr` is on cuda:0; plans are made by the host"):
        tvm_infer.plan(index(3), KV_LEN, device="cuda", **SETTINGS)


def test_the_loop_in_the_documentation(calls):
    import pathlib
    import re
    import types

    page = pathlib.Path(__file__).parents[2] / "docs" / "plan.md"
    if not page.exists():
        pytest.skip("the documentation is not here")
    block = re.search(r"<!-- planning for a device.*?```python\n(.*?)```", page.read_text(), re.DOTALL)[1]
    steps = [types.SimpleNamespace(qo_indptr=QO, kv_len=[20 + i, 3 + i]) for i in range(3)]
    replays = []
    graph = types.SimpleNamespace(replay=lambda: replays.append(len(calls.of("plan_upload"))))
    names = {"tvm_infer": tvm_infer, "numpy": np, "torch": torch, "steps": steps, "graph": graph}
    exec(block, names)
    assert replays == [1, 2, 3]
    assert all(device is names["device"] and host is names["host"] for host, device in calls.of("plan_upload"))


def test_upload_refuses_what_is_no_device_buffer():
    """The real packed function, as far as it goes without a device."""
    plan = tvm_infer.plan(QO, KV_LEN, **SETTINGS)
    with pytest.raises(errors.ArgumentError, match="`plan_device` is on device type 1"):
        _ffi.func("plan_upload")(plan.buffer, np.zeros(999, np.int32))


def test_workspace_size_of_a_device_knows_its_ctas(calls):
    limits = {"max_requests": 8, "max_tokens": 64, "fixed_split_size": 0, **SETTINGS}
    assert tvm_infer.workspace_size(device="cuda", **limits) == tvm_infer.workspace_size(num_ctas=NUM_SMS, **limits)
    assert tvm_infer.workspace_size(device="cuda", **limits) != tvm_infer.workspace_size(num_ctas=NUM_SMS + 9, **limits)


def test_attention_passes_the_plan_on_the_device(calls):
    made = arguments()
    out, lse = tvm_infer.attention(**made, return_lse=True)
    assert out.device == lse.device == made["q"].device and out.dtype == torch.bfloat16
    assert tuple(lse.shape) == (4, 4) and lse.dtype == torch.float32
    ((words, q, k_cache, v_cache, layout, indptr, indices, scale, workspace, o, lse_out),) = calls.of("paged_attention")
    assert words is made["plan"].device_buffer and q is made["q"] and k_cache is made["kv_cache"] and v_cache is None
    assert indptr is made["kv_page_indptr"] and indices is made["kv_page_indices"] and layout == 0 and scale == 0.125
    assert o is out and lse_out is lse
    assert workspace.dtype == torch.float32 and workspace.device == q.device
    assert workspace.numel() == made["plan"].num_partial_rows * 65


def test_the_plan_is_checked_on_the_host_before_the_launch(calls):
    made = arguments(workspace=cuda((1000,), torch.float32))
    tvm_infer.attention(**made)
    assert [name for name, _ in calls] == ["plan_upload", "check_plan", "paged_attention"]
    ((host, *limits),) = calls.of("check_plan")
    assert np.shares_memory(np.from_dlpack(host), made["plan"].buffer)
    assert limits == [4, 4, 2, 1000 // 65, 2, NUM_SMS]
    tvm_infer.attention(**{**made, "kv_cache": cuda((6, 2, 16, 2, 64))}, kv_layout="NHD")
    assert calls.of("check_plan")[1][3] == 2
    tvm_infer.attention(
        **{**made, "kv_cache": cuda((6, 2, 64))}
    )  # a rank that is none is the packed function's to name
    assert len(calls.of("check_plan")) == 2 and len(calls.of("paged_attention")) == 3


@pytest.mark.parametrize("name", ["kv_page_indptr", "kv_page_indices"])
@pytest.mark.parametrize(
    ("value", "what"),
    [([0, 2, 3], "a list"), (np.zeros(3, np.int32), "on cpu"), ("cpu", "on cpu"), ("cuda:1", "on cuda:1")],
    ids=["list", "numpy", "torch on cpu", "another card"],
)
def test_nothing_is_copied_to_the_device_silently(calls, name, value, what):
    if isinstance(value, str):
        value = torch.empty(3, dtype=torch.int32, device=value)
    with pytest.raises(errors.ArgumentError, match=rf"`{name}` is {what}.*cuda:0.*\.cuda\(\)"):
        tvm_infer.attention(**arguments(**{name: value}))
    assert not calls.of("paged_attention")


def test_plans_that_lie_elsewhere(calls):
    with pytest.raises(errors.ArgumentError, match=r'`plan` lies on the host only, `q` on cuda:0.*device="cuda:0"'):
        tvm_infer.attention(**arguments(plan=tvm_infer.plan(QO, KV_LEN, **SETTINGS)))
    with pytest.raises(errors.ArgumentError, match="`plan` lies on cuda:1, `q` on cuda:0"):
        tvm_infer.attention(**arguments(plan=tvm_infer.plan(QO, KV_LEN, device="cuda:1", **SETTINGS)))
    with pytest.raises(errors.ArgumentError, match="`plan` is on cpu"):
        tvm_infer.attention(**arguments(plan=np.zeros(99, np.int32)))


def test_a_bare_device_plan_needs_a_workspace(calls):
    with pytest.raises(errors.ArgumentError, match="`workspace` is None with a `plan` that is bare device memory"):
        tvm_infer.attention(**arguments(plan=index(99)))
    plan, workspace = index(99), cuda((65,), torch.float32)
    tvm_infer.attention(**arguments(plan=plan, workspace=workspace))
    assert calls.of("paged_attention")[0][0] is plan and not calls.of("check_plan")


def test_ragged_append_and_merge(calls):
    made = arguments()
    kv = cuda((23, 2, 64))
    tvm_infer.ragged_attention(made["q"], kv, kv, made["plan"], kv_indptr=index(3))
    assert calls.of("check_plan")[0][1:] == (4, 4, 2, made["plan"].num_partial_rows, 2, NUM_SMS)
    assert calls.of("ragged_attention")[0][0] is made["plan"].device_buffer
    with pytest.raises(errors.ArgumentError, match="`kv_indptr` is a list"):
        tvm_infer.ragged_attention(made["q"], kv, kv, made["plan"], kv_indptr=[0, 20, 23])

    new = cuda((4, 2, 64))
    tables = {name: made[name] for name in ("kv_page_indptr", "kv_page_indices")}
    tvm_infer.append_attention(made["q"], new, new, made["kv_cache"], made["plan"], **tables)
    assert calls.of("append_paged_attention")[0][0] is made["plan"].device_buffer
    tvm_infer.append(new, new, made["kv_cache"], qo_indptr=index(3), kv_len=index(2), **tables)
    assert len(calls.of("append")) == 1
    for name in ("qo_indptr", "kv_len"):
        with pytest.raises(errors.ArgumentError, match=f"`{name}` is a list"):
            tvm_infer.append(
                new, new, made["kv_cache"], **{"qo_indptr": index(3), "kv_len": index(2), **tables, name: [1, 2]}
            )

    o, lse = cuda((4, 4, 64)), cuda((4, 4), torch.float32)
    out, out_lse = tvm_infer.merge(o, lse, o, lse)
    assert out.device == o.device and out_lse.dtype == torch.float32 and calls.of("merge")[0][4] is out


@pytest.mark.parametrize("status", range(8))
def test_plan_status(calls, status):
    plan = tvm_infer.plan(QO, KV_LEN, device="cuda", **SETTINGS)
    calls.status = status
    if status == 0:
        assert tvm_infer.plan_status(plan) == "accepted" == tvm_infer.plan_status(plan.device_buffer)
        assert calls.of("plan_status")[0][0] is plan.device_buffer
        return
    with pytest.raises(errors.PlanMismatchError, match=rf"\(status {status}\) and wrote nothing: "):
        tvm_infer.plan_status(plan)


def test_plan_status_is_about_devices():
    with pytest.raises(errors.ArgumentError, match="no device buffer"):
        tvm_infer.plan_status(tvm_infer.plan(QO, KV_LEN, **SETTINGS))
    with pytest.raises(errors.ArgumentError, match="`plan` is on cpu"):
        tvm_infer.plan_status(np.zeros(9, np.int32))


def test_every_refusal_has_a_meaning():
    import pathlib
    import re

    header = pathlib.Path(__file__).parents[2] / "cuda_src" / "tvm_infer" / "schedule" / "plan.h"
    if not header.exists():
        pytest.skip("the sources are not here")
    refusals = re.search(r"enum PlanRefusal.*?\{(.*?)\};", header.read_text(), re.DOTALL)[1]
    numbers = {int(n) for n in re.findall(r"k\w+ = (\d+)", refusals)}
    assert numbers - {0} == set(planning._REFUSALS)


def test_outputs_of_tvm_tensors_stay_on_their_device(monkeypatch):
    tvm = pytest.importorskip("tvm")
    asked = []
    monkeypatch.setattr(tvm.runtime, "empty", lambda shape, dtype, device: asked.append((shape, dtype, str(device))))

    class OnCuda:
        dtype, device, shape = "bfloat16", tvm.cuda(1), (4, 4, 64)

    _array.empty_like(OnCuda(), (4, 4), "float32")
    assert asked == [((4, 4), "float32", "cuda:1")]


def test_cubins_are_asked_of_python(monkeypatch):
    """C++ finds the compiler by this name when a kernel is missing."""
    import tvm_ffi

    from tvm_infer import jit

    _ffi.library()
    monkeypatch.setattr(jit, "cubin", lambda name, arch: f"{name} for {arch}".encode())
    assert bytes(tvm_ffi.get_global_func("tvm_infer.jit_cubin")("append_b16", "sm_90a")) == b"append_b16 for sm_90a"

    def fail(name, arch):
        raise errors.CompileError(f"no compiler for {name}")

    monkeypatch.setattr(jit, "cubin", fail)
    with pytest.raises(errors.CompileError, match="no compiler for append_b16"):
        tvm_ffi.get_global_func("tvm_infer.jit_cubin")("append_b16", "sm_90a")
