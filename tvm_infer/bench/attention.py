"""`tvm-infer bench attention`: latency of attention beside its peers and the machine's ceilings, on the CPU or a CUDA device."""

from __future__ import annotations

import dataclasses
import datetime
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from .. import __version__, _ffi, ops
from ..doctor import package_versions
from ..errors import ArgumentError, TvmInferError
from . import peers as peers_module
from . import plot, report, run_cpu, run_cuda, suites
from .cuda_device import CudaDevice
from .rows import WrongResult, shape_of
from .timing import REST_S
from .workloads import Workload

DEVICES = ("cpu", "cuda")
SCHEMA = 2  # of the JSON; bumped when a key changes its meaning


def _workloads(
    device: str | None, suite: str | None, names: tuple[str, ...], dtypes: tuple[str, ...], custom: Sequence[Workload]
) -> tuple[str, list[Workload]]:
    """(device, workloads): what is asked for, the device following from the suite or the suite from the device."""
    if device is not None and device not in DEVICES:
        raise ArgumentError(f"argument `device` is {device!r}; it must be one of {', '.join(DEVICES)}")
    if custom:
        if suite is not None or names:
            raise ArgumentError(
                f"argument `{'suite' if suite else 'workload'}` is given together with shapes by flag; give either a suite or shapes"
            )
        return device or "cpu", list(custom)
    suite = suites.DEFAULT[device or "cpu"] if suite is None else suite
    chosen = suites.select(suite, names, dtypes)
    measured_on = suites.suite(suite).device
    if device not in (None, measured_on):
        raise ArgumentError(
            f"argument `suite` is {suite!r}, whose sizes are for {measured_on}, with `device` {device!r}; leave the device "
            "out, or give shapes by flag"
        )
    return measured_on, chosen


def _check_folder(path: str | None, argument: str) -> None:
    """What cannot be written is refused before minutes of measuring."""
    folder = pathlib.Path(path).resolve().parent if path else None
    if folder is not None and not folder.is_dir():
        raise ArgumentError(f"argument `{argument}` is {path!r}, but there is no folder {folder}; make it first")


@dataclasses.dataclass(frozen=True)
class _Bench:
    """What a device says of itself, how it measures a workload, and what it does after each."""

    head: dict[str, Any]
    measure: Callable[[Workload], dict[str, Any]]
    release: Callable[[], None]


def _cpu_bench(peers: Sequence[str]) -> _Bench:
    threads = ops.num_threads()
    isa = _ffi.func("cpu_info")().split()[0]
    head = {"device": "cpu", "isa": isa, "threads": threads, "method": run_cpu.METHOD}
    return _Bench(head, lambda w: run_cpu.measure_workload(w, peers, threads), lambda: None)


def _cuda_bench(device: CudaDevice, peers: Sequence[str]) -> _Bench:
    ceilings = device.ceilings()
    device.release()
    head = {
        "device": "cuda",
        **device.describe(),
        "method": run_cuda.METHOD,
        "rest_s": REST_S,
        "ceilings": vars(ceilings),
    }
    return _Bench(head, lambda w: run_cuda.measure_workload(device, w, ceilings, peers), device.release)


def _row(bench: _Bench, workload: Workload) -> dict[str, Any]:
    """The workload's row; one that fails says why under "failed", and the others are still measured."""
    try:
        return bench.measure(workload)
    except (WrongResult, TvmInferError, RuntimeError, MemoryError) as error:
        return shape_of(workload) | {"failed": f"{type(error).__name__}: {error}"}
    finally:
        bench.release()


def _write(results: dict[str, Any], json_path: str | None) -> None:
    if json_path == "-":
        sys.stdout.write(json.dumps(results, indent=2) + "\n")
    elif json_path:
        pathlib.Path(json_path).write_text(json.dumps(results, indent=2) + "\n")


def run(
    *,
    device: str | None = None,
    peers: Sequence[str] | None = None,
    suite: str | None = None,
    workloads: tuple[str, ...] = (),
    dtypes: tuple[str, ...] = (),
    custom: Sequence[Workload] = (),
    json_path: str | None = None,
    plot_path: str | None = None,
    cuda_device: Callable[[], CudaDevice] = CudaDevice,
) -> dict[str, Any]:
    """Measure, print a table, write JSON and a plot if asked, and return the results.

    Parameters
    ----------
    device : "cpu" or "cuda"; default: the suite's.
    suite, workloads, dtypes : a suite by name (default: the device's), and which of its workloads in which dtypes.
    custom : workloads in place of a suite's (shapes.py makes them from flags).
    peers : names of peers (peers.py); default: all that the device has.
    json_path : file for the results, or "-" for stdout; the table goes to stderr then. A file is written after every row.
    plot_path : file for a chart.
    cuda_device : makes what stands for the GPU.

    Returns
    -------
    dict : "schema", "date", "versions", "device" and what describes it, "method", on CUDA "rest_s" and "ceilings", "rows". A row whose
    result is wrong, or which could not be run, has "failed" in place of figures.

    Raises
    ------
    ArgumentError : an unknown device, suite, workload or peer. MissingDependencyError : torch or matplotlib is needed and absent.
    ExecutorError : no CUDA device. All before anything is measured.
    """
    from rich.console import Console
    from rich.progress import track

    device, chosen = _workloads(device, suite, workloads, dtypes, custom)
    peers = peers_module.known(device) if peers is None else list(peers)
    for name in peers:
        peers_module.peer(name, device)
    _check_folder(json_path if json_path != "-" else None, "json")
    _check_folder(plot_path, "plot")
    if plot_path:
        plot.require_matplotlib()
    bench = _cpu_bench(peers) if device == "cpu" else _cuda_bench(cuda_device(), peers)
    rows: list[dict[str, Any]] = []
    results = {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {"tvm_infer": __version__, **package_versions(), **peers_module.versions()},
        **bench.head,
        "rows": rows,
    }
    for workload in track(chosen, "measuring", console=Console(stderr=True), transient=True):
        rows.append(_row(bench, workload))
        if json_path != "-":
            _write(results, json_path)  # a run that is cut off leaves what it has
    console = Console(stderr=json_path == "-")
    console.width = max(console.width, 160 if device == "cpu" else 200)  # a table that wraps cannot be read
    report.print_table(console, results, peers)
    if json_path == "-":
        _write(results, json_path)
    if plot_path:
        plot.save(results, plot_path)
    return results


def num_failed(results: dict[str, Any]) -> int:
    """Rows without a figure."""
    return sum("failed" in row for row in results["rows"])
