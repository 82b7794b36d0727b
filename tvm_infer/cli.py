"""The command `tvm-infer`."""

from __future__ import annotations

import json as jsonlib
import sys
from typing import Any

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


@main.command()
@click.option("--spec", "names", multiple=True, help="a kernel's name (repeatable); --list prints all")
@click.option("--all", "every", is_flag=True, help="all kernels")
@click.option("--list", "listed", is_flag=True, help="print the names of all kernels and stop")
@click.option("--arch", default="sm_90a", show_default=True, help="architecture to compile for")
@click.option("--out", type=click.Path(file_okay=False), help="put the cubins here, for TVM_INFER_CUBIN_DIR elsewhere")
@click.option("--jobs", type=click.IntRange(min=1), help="kernels at once; default: the processors of this process")
def build(names: tuple[str, ...], every: bool, listed: bool, arch: str, out: str | None, jobs: int | None) -> None:
    """Compile CUDA kernels ahead of time, into the cache and, if asked, a folder for machines without a compiler.

    \b
      tvm-infer build --spec attention_bf16_h128_p16 --spec append_b16
      tvm-infer build --all --out cubins
    """
    from .jit import report

    if listed:
        click.echo("\n".join(report.all_names()))
    elif every == bool(names):
        raise click.UsageError("say which kernels: --all or --spec NAME, not both (--list prints the names)")
    else:
        report.build_and_print(report.all_names() if every else names, arch=arch, jobs=jobs, out=out)


@main.command("variant")
@click.argument("name")
@click.option("--kernel", default="attention_bf16_h128_p16", show_default=True, help="attention kernel to put it into")
@click.option("--arch", default="sm_90a", show_default=True, help="architecture to compile for")
@click.option("--out", type=click.Path(file_okay=False), help="put the cubin here, for TVM_INFER_CUBIN_DIR elsewhere")
def show_variant(name: str, kernel: str, arch: str, out: str | None) -> None:
    """Show what becomes of an attention variant: expression, band, C++, and what the CUDA kernel takes with it and without.

    NAME is one of the standard library's, or MODULE:NAME of your own, a tvm_infer.variant.Variant.

    \b
      tvm-infer variant soft_cap
      tvm-infer variant my_model.attention:decay --kernel attention_fp16_h64_p16
    """
    from .variant import show

    found = show.find(name)
    click.echo(show.stages(found))
    if not found.is_plain:
        click.echo("\n" + show.resources(found, kernel, arch, out))


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
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="SmolLM2's shapes, or Llama-3-8B's",
)
@click.option(
    "--peers",
    help='comma-separated: torch, tvm (the code TVM generates itself); "" for none; default: all',
)
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), help="on cuda [default: bfloat16]")
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="write the results to this file")
def bench_matmul(device: str, peers: str | None, dtype: str | None, json_path: str | None) -> None:
    """Matrix products of a decoder, beside torch and TVM."""
    from .bench import matmul, matmul_cuda

    if device == "cpu" and dtype not in (None, "float32"):
        raise click.UsageError(f"--dtype {dtype} needs --device cuda: the CPU multiplies in float32")
    names = None if peers is None else [p for p in peers.split(",") if p]
    if device == "cpu":
        matmul.run(peers=list(matmul.PEERS) if names is None else names, json_path=json_path)
    else:
        results = matmul_cuda.run(matmul_cuda.PEERS if names is None else names, json_path, dtype=dtype or "bfloat16")
        if any("error" in row["tvm_infer"] for row in results["rows"]):
            raise SystemExit(1)


@bench.command("streaming")
@click.option("--batch", default=128, show_default=True, help="requests")
@click.option("--sink", default=4, show_default=True, help="first keys that stay visible")
@click.option("--window", default=2000, show_default=True, help="keys before its own that a query sees")
@click.option("--kv", default=8192, show_default=True, help="tokens of each request so far")
@click.option(
    "--layers", default=32, show_default=True, help="of the model, of Llama-3-8B's sizes (436 MB of weights each)"
)
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="write the results to this file")
def bench_streaming(batch: int, sink: int, window: int, kv: int, layers: int, json_path: str | None) -> None:
    """StreamingLLM's decode step: keys turned in attention, and by a kernel of their own (cuda)."""
    from .bench import streaming

    streaming.run(streaming.Workload(batch, sink, window, kv, layers), json_path)


@bench.command("parallel")
@click.option(
    "--answers", multiple=True, type=int, default=(4, 8, 16, 32), show_default=True, help="of one prompt (repeatable)"
)
@click.option("--prompt", default=2048, show_default=True, help="tokens that the answers share")
@click.option("--tokens", default=256, show_default=True, help="of each answer")
@click.option("--model", default="llama-3-8b", show_default=True, help="sizes of the model: llama-3-8b, tiny")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cuda", show_default=True)
@click.option("--layers", type=int, help="of the model [default: all]")
@click.option("--page-size", default=16, show_default=True, help="tokens a page")
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="write the results to this file")
def bench_parallel(
    answers: tuple[int, ...],
    prompt: int,
    tokens: int,
    model: str,
    device: str,
    layers: int | None,
    page_size: int,
    json_path: str | None,
) -> None:
    """Answers of one prompt: inter-token latency with the prompt's keys read once, and with each answer reading its own."""
    from .bench import parallel

    parallel.run(parallel.Workload(answers, prompt, tokens, model, device, layers, page_size), json_path)


@bench.command("attention")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="default: the suite's, else cpu")
@click.option(
    "--suite",
    help="a named list of workloads: cpu, h200, h200-quick, variants, formats, fp8; default: cpu, on cuda h200",
)
@click.option("--workload", "workloads", multiple=True, help="run only these workloads of the suite (repeatable)")
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    help="float32, float16 or bfloat16 (repeatable); default: the suite's, for shapes by flag bfloat16",
)
@click.option(
    "--peers",
    help='comma-separated: torch, tvm-tir, on cuda also flex, flashinfer; "" for none; what is absent is said; default: all',
)
@click.option(
    "--json", "json_path", is_flag=False, flag_value="-", help="write the results to this file; to stdout without one"
)
@click.option(
    "--plot", "plot_path", type=click.Path(dir_okay=False), help="draw a chart to this file (needs matplotlib)"
)
@click.option("--kv-lens", help="shapes by flag: keys of each request, new tokens included, such as 64x2048")
@click.option("--qo-lens", help="shapes by flag: new tokens of each request; default: one each")
@click.option("--heads", help="shapes by flag: query heads / KV heads [default: 32/8]")
@click.option("--head-dim", type=int, help="shapes by flag [default: 128]")
@click.option("--page-size", type=int, help="shapes by flag [default: 16]")
@click.option("--layout", help="shapes by flag: HND or NHD, of a page [default: HND]")
@click.option("--ragged", is_flag=True, help="shapes by flag: keys without pages")
def bench_attention(
    device: str | None,
    suite: str | None,
    workloads: tuple[str, ...],
    dtypes: tuple[str, ...],
    peers: str | None,
    json_path: str | None,
    plot_path: str | None,
    kv_lens: str | None,
    qo_lens: str | None,
    heads: str | None,
    head_dim: int | None,
    page_size: int | None,
    layout: str | None,
    ragged: bool,
) -> None:
    """Latency of attention beside its peers and the machine's ceilings.

    Lists of lengths are comma-separated items: 2048 (one request), 64x2048 (64 requests of 2048 each), 128..4096/16 (16 requests,
    evenly spaced). A list of one number serves every request of the other list. Example, two prompts beside 62 decode requests:

    \b
      tvm-infer bench attention --device cuda --qo-lens 2x1024,62x1 --kv-lens 2x1024,62x4096
    """
    from .bench import attention, shapes

    given = {
        "heads": heads,
        "head_dim": head_dim,
        "page_size": page_size,
        "kv_layout": layout,
        "ragged": ragged or None,
    }
    custom = shapes.from_flags(kv_lens, qo_lens, dtypes, **{k: v for k, v in given.items() if v is not None})
    results = attention.run(
        device=device,
        peers=None if peers is None else [p.strip() for p in peers.split(",") if p.strip()],
        suite=suite,
        workloads=workloads,
        dtypes=() if custom else dtypes,
        custom=custom,
        json_path=json_path,
        plot_path=plot_path,
    )
    failed = attention.num_failed(results)
    if failed:
        click.echo(f"{failed} of {len(results['rows'])} rows failed", err=True)
        sys.exit(1)


@bench.command("serve")
@click.option(
    "--model", default="tiny", show_default=True, help="tiny, smollm2 (real weights), llama-3-8b (random weights)"
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--dtype", help="default: float32 on cpu, bfloat16 on cuda")
@click.option(
    "--backends",
    default="tvm_infer,tvm-tir,flashinfer",
    show_default=True,
    help="comma-separated; tvm-tir and flashinfer: the same model on TVM's own cache",
)
@click.option("--workload", default="uniform", show_default=True, help="fixed, uniform, sharegpt, burstgpt or parallel")
@click.option("--prompt-lens", help="tokens of a prompt in place of the workload's: 128 or 512..2048")
@click.option("--output-lens", help="tokens of an output, likewise")
@click.option("--samples", type=int, help="texts of each prompt, by fork, in place of the workload's")
@click.option("--rate", type=float, default=1.0, show_default=True, help="requests a second; inf: all at once")
@click.option("--requests", type=int, default=64, show_default=True, help="how many")
@click.option("--decode-only", is_flag=True, help="full batches that decode, in place of a workload")
@click.option("--batch", default="16,64", show_default=True, help="of --decode-only, comma-separated")
@click.option("--kv", type=int, default=2048, show_default=True, help="of --decode-only: keys of each request")
@click.option("--steps", type=int, default=32, show_default=True, help="of --decode-only: timed steps")
@click.option("--max-batch", type=int, default=64, show_default=True, help="sequences of a step")
@click.option("--max-tokens", type=int, default=2048, show_default=True, help="new tokens of a step")
@click.option("--page-size", type=int, default=16, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="of lengths, arrivals and prompts")
@click.option(
    "--json", "json_path", is_flag=False, flag_value="-", help="write the results to this file; to stdout without one"
)
@click.option(
    "--plot", "plot_path", type=click.Path(dir_okay=False), help="draw a chart to this file (needs matplotlib)"
)
def bench_serve(backends: str, json_path: str | None, plot_path: str | None, **settings: Any) -> None:
    """A compiled model under load, with continuous batching: latency of tokens and where the time goes.

    \b
      tvm-infer bench serve --model smollm2 --prompt-lens 32..128 --output-lens 16 --rate 2 --requests 16
      tvm-infer bench serve --model llama-3-8b --device cuda --workload uniform --rate 4
      tvm-infer bench serve --model llama-3-8b --device cuda --decode-only --batch 16,64 --kv 2048
    """
    from .bench import serve

    names = [name.strip() for name in backends.split(",") if name.strip()]
    results = serve.run(serve.Options(backends=names, **settings), json_path=json_path, plot_path=plot_path)
    failed = serve.num_failed(results)
    if failed:
        click.echo(f"{failed} of {len(results['rows'])} rows failed", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
