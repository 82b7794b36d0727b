"""The command `tvm-infer`."""

from __future__ import annotations

import json as jsonlib
import sys

import click

from . import __version__
from .errors import TvmInferError


class _Group(click.Group):
    """Prints tvm_infer's own errors as one line instead of a traceback."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except TvmInferError as error:
            click.echo(f"{type(error).__name__}: {error}", err=True)
            sys.exit(1)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Attention for LLM inference inside the Apache TVM compiler."""


@main.command()
@click.option("--json", "as_json", is_flag=True, help="print plain JSON instead of tables")
def doctor(as_json: bool) -> None:
    """Show versions, devices and which executors can be used, and why not."""
    from . import doctor as module

    if as_json:
        click.echo(jsonlib.dumps(module.report(), indent=2))
    else:
        module.print_report()


@main.group()
def bench() -> None:
    """Measure; every figure that the documentation quotes comes from here."""


@bench.command("plan")
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="write the results to this file")
@click.option("--repeats", default=300, show_default=True, help="plans per workload")
def bench_plan(json_path: str | None, repeats: int) -> None:
    """Host time of the planner."""
    from .bench import plan

    plan.run(json_path=json_path, repeats=repeats)


@bench.command("matmul")
@click.option(
    "--peers", default="torch,tvm", show_default=True, help="comma-separated; tvm: the code TVM generates itself"
)
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="write the results to this file")
def bench_matmul(peers: str, json_path: str | None) -> None:
    """Matrix products of a decoder on the CPU."""
    from .bench import matmul

    matmul.run(peers=[p for p in peers.split(",") if p], json_path=json_path)


@bench.command("attention")
@click.option("--device", type=click.Choice(["cpu"]), default="cpu", show_default=True)
@click.option("--peers", default="torch,tvm-tir", show_default=True, help="comma-separated; what is absent is said")
@click.option("--suite", default="cpu", show_default=True, help="a named list of workloads")
@click.option("--workload", "workloads", multiple=True, help="run only these workloads (repeatable)")
@click.option(
    "--dtype", "dtypes", multiple=True, help="float32, float16 or bfloat16 (repeatable); default: the suite's"
)
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="write the results to this file")
def bench_attention(
    device: str,
    peers: str,
    suite: str,
    workloads: tuple[str, ...],
    dtypes: tuple[str, ...],
    json_path: str | None,
) -> None:
    """Latency of attention beside its peers and the machine's ceilings."""
    from .bench import attention

    attention.run(
        device=device,
        peers=[p for p in peers.split(",") if p],
        suite=suite,
        workloads=workloads,
        dtypes=dtypes,
        json_path=json_path,
    )


if __name__ == "__main__":
    main()
