"""The command `polydpo-fast`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table

from ..comparison import Comparison
from ..data import Source, open_source
from .errors import said
from .settings import SETTINGS, TakesSettings, takes_settings, training

app = typer.Typer(
    name="polydpo-fast",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # its tables leave the help of `train` sixteen columns, and cut names of options off
    pretty_exceptions_enable=False,
)

_Pairs = Annotated[list[str], typer.Argument(help="Files, globs, a folder or a URL of Parquet, tar, JSON or CSV.")]
_Ties = Annotated[
    str | None, typer.Option(help="Pairs without a winner: drop, keep (with weight 0.5) or error (default drop).")
]
_Root = Annotated[str | None, typer.Option(help="Folder that relative paths in a JSON or CSV start from.")]
_Category = Annotated[
    str | None, typer.Option(help="Parquet column of the category (default: category, if there is one; '' for none).")
]
_Weight = Annotated[
    str | None, typer.Option(help="Parquet column of the weight (default: weight, if there is one; '' for none).")
]
_ShardPairs = Annotated[int, typer.Option(min=1, help="Pairs per output file, the unit of work of a process.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from .._version import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _command(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Fused Poly-DPO losses and preference-pair decoding for diffusion models."""


@app.command()
def info() -> None:
    """Print versions, devices, loss backends, SIMD level and codecs."""
    from ..info import collect

    table = Table(show_header=False, box=None)
    for section, rows in collect().items():
        table.add_row(f"[bold]{section}[/bold]")
        for name, text in rows.items():
            table.add_row(f"  {name}", text)
    Console().print(table)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pairs, the picture and the figures.")] = Path("demo-output"),
    alpha: Annotated[float, typer.Option(help="Poly-DPO's alpha; 0 is Diffusion-DPO.")] = 0.0,
    beta: Annotated[float, typer.Option(min=0.0, help="Strength of the pull to the reference.")] = 2000.0,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of the alignment.")] = 150,
    seed: Annotated[int, typer.Option(min=0, help="Random seed.")] = 0,
    label_noise: Annotated[float, typer.Option(min=0.0, max=0.5, help="Share of pairs whose label is flipped.")] = 0.0,
    device: Annotated[str, typer.Option(help="Device of the models: cpu, cuda.")] = "cpu",
) -> None:
    """Teach a small model to prefer bold handwriting, on real digits."""
    from ..demo import Settings, run

    settings = Settings(alpha=alpha, beta=beta, steps=steps, seed=seed, label_noise=label_noise, device=device)
    with said(OSError):
        run(settings, out)


@app.command()
def inspect(
    source: _Pairs,
    every: Annotated[bool, typer.Option("--all", help="Decode every pair and list those that fail.")] = False,
    sample: Annotated[int, typer.Option(min=0, help="Pairs to decode and time.")] = 64,
    ties: _Ties = None,
    root: _Root = None,
    category: _Category = None,
    weight: _Weight = None,
    ledger: Annotated[Path | None, typer.Option(help="Ledger of a loader: try its bad pairs again.")] = None,
) -> None:
    """Show what preference data holds and what decoding it costs. Exits with 1 if a pair cannot be decoded."""
    from ..data.inspect import report

    with said():
        pairs = _open(source, ties=ties, root=root, category=category, weight=weight)
        fine = report(pairs, every=every, count=sample, ledger=ledger, console=Console())
    raise typer.Exit(0 if fine else 1)


@app.command()
def pack(
    source: _Pairs,
    out: Annotated[Path, typer.Argument(help="Folder for the shards; an interrupted run is continued.")],
    shard_size: Annotated[str, typer.Option(help="Largest size of a shard: 500MB, 1GB, 2GiB.")] = "1GB",
    ties: _Ties = None,
    root: _Root = None,
    category: _Category = None,
    weight: _Weight = None,
    columns: Annotated[list[str] | None, typer.Option(help="Further column to keep; may be repeated.")] = None,
) -> None:
    """Write pairs as WebDataset shards. Exits with 1 if some could not be read."""
    from ..data import pack as packing

    with said():
        for name in {"category", "weight"}.intersection(columns or ()):
            raise ValueError(f"--columns has {name}, which shards have of every pair; expected --{name} {name}")
        size = packing.bytes_of(shard_size)
        place = os.path.realpath(os.path.expanduser(out))
        for folder in source:
            inside = os.path.expanduser(folder)
            if os.path.isdir(inside) and Path(place).is_relative_to(os.path.realpath(inside)):
                raise ValueError(f"OUT is {out}, within {folder}, of which all is read; expected another place")
        pairs = _open(source, ties=ties, root=root, category=category, weight=weight, columns=columns)
        with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), transient=True) as progress:
            task = progress.add_task("pairs", total=len(pairs))
            done = packing.pack(
                pairs, out, shard_size=size, progress=lambda number: progress.update(task, completed=number)
            )
    left_out = f"; {done.unreadable} could not be read: {out / packing.UNREADABLE}" if done.unreadable else ""
    shards = "1 shard" if done.shards == 1 else f"{done.shards} shards"
    Console().print(f"{out}: {done.pairs} pairs in {shards}{left_out}", highlight=False, soft_wrap=True)
    raise typer.Exit(1 if done.unreadable else 0)


def _open(source: list[str], **options: Any) -> Source:
    """None: not given. "" for a column: none."""
    given = {name: value for name, value in options.items() if value is not None}
    given |= {name: None for name in ("category", "weight") if options[name] == ""}
    return open_source(source[0] if len(source) == 1 else source, **given)


@app.command()
def check(
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of a run to repeat (default: a new one).")] = None,
    thorough: Annotated[
        bool, typer.Option("--thorough", help="Five times as many cases, and more kinds of them.")
    ] = False,
    backend: Annotated[
        str | None, typer.Option(help="Check only this backend of the loss (cpp, triton, reference); skips decoding.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Check only this device: cpu, cuda, cuda:1.")] = None,
    case: Annotated[int | None, typer.Option(min=0, help="Check only this case of the losses; needs --seed.")] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0.0, help="Time limit (default 50; none with --thorough).")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the results to this file.")] = None,
) -> None:
    """Compare losses, decoding and loading with references. Exits with 1 if something is out of tolerance."""
    import secrets

    from ..check import check as run

    console, errors = Console(), Console(stderr=True)
    if not console.is_terminal:
        console.width = 120  # in a log the table is to stay in one piece
    if case is not None and seed is None:
        errors.print("--case needs the --seed that it was drawn from", style="red")
        raise typer.Exit(2)
    with said(OSError, ValueError):
        if json is not None:
            json.open("a").close()  # before a minute is spent on what could not be put there
        with errors.status("checking") as status:
            report = run(
                seed=secrets.randbelow(1 << 31) if seed is None else seed,
                thorough=thorough,
                backend=backend,
                device=device,
                case=case,
                seconds=seconds,
                progress=lambda text: status.update(f"checking {text}"),
            )
        report.print(console)
        if json is not None:
            json.write_text(report.as_json() + "\n")
    raise typer.Exit(0 if report.passed else 1)


@app.command()
def bench(
    suites: Annotated[list[str] | None, typer.Argument(help="loss, decode, loader ... (default: all).")] = None,
    out: Annotated[Path | None, typer.Option(help="File of results (default benchmarks/results/MACHINE.json).")] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Overwrite even if this run lacks rows of the old file.")
    ] = False,
    dirty: Annotated[bool, typer.Option("--dirty", help="Allow uncommitted changes.")] = False,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Compare two files of results, before and after.")
    ] = None,
) -> None:
    """Run the benchmarks, or compare two files of results. Comparing exits with 1 if something got worse."""
    from .. import bench as benchmarks
    from ..comparison import compare as compared
    from ..results_file import read_results

    with said(OSError, RuntimeError, ValueError):
        if compare is None:
            path = benchmarks.run(suites or (), out, replace=replace, dirty=dirty)
            Console().print(f"results: {path}", highlight=False, soft_wrap=True)
            return
        if suites or out is not None or replace or dirty:
            raise ValueError("--compare measures nothing; expected no SUITES, --out, --replace or --dirty beside it")
        found = compared(*map(read_results, compare))
    _print_comparison(found)
    raise typer.Exit(1 if found.worse else 0)


def _print_comparison(found: Comparison) -> None:
    table = Table(
        "suite", "case", "way", "what", title="After / before, above 1 is worse; times without drift", box=None
    )
    for column in ("ratio", "noise", ""):
        table.add_column(column, justify="right")
    for change in found.changes:
        verdict = "[red]worse[/red]" if change.worse else "[green]better[/green]" if change.better else ""
        names = (change.suite, change.case, change.way, change.what)
        table.add_row(*map(escape, names), f"{change.ratio:.2f}", f"{change.noise:.0%}", verdict)
    console = Console()
    if not console.is_terminal:
        console.width = 160
    console.print(table)
    for title, lines in (("gone", found.vanished), ("note", found.warnings)):
        for line in lines:
            console.print(f"{title}: {line}", style="red" if lines is found.vanished else "yellow", markup=False)
    worse, better = (sum(getattr(change, name) for change in found.changes) for name in ("worse", "better"))
    of = f"of {len(found.changes)} that both have, {len(found.vanished)} gone"
    console.print(f"{worse} worse, {better} better {of}", highlight=False)


@app.command(cls=TakesSettings)
@takes_settings(*SETTINGS)
def train(**settings: Any) -> None:
    """Align a Diffusers pipeline with preference pairs. Runs under `accelerate launch` too."""
    with training(settings) as given:
        from ..diffusion.train import train as run

        run(given)


@app.command(cls=TakesSettings)
@takes_settings(
    *("model", "size", "batch_size", "mixed_precision", "seed"),
    data="Pairs: file, glob, folder or URL",
)
def cache(
    out: Annotated[Path, typer.Argument(help="Folder for the latents; an interrupted run is continued.")],
    *,
    shard_pairs: _ShardPairs = 128,
    store: Annotated[
        str | None, typer.Option(help="Stored dtype: float32, bfloat16 or float16 (default: as encoded).")
    ] = None,
    **settings: Any,
) -> None:
    """Encode images and prompts once, for `train --data OUT`. Runs under `accelerate launch` too."""
    with training(settings) as given:
        from ..diffusion.precompute import cache as run

        run(given, out, dtype=_dtype("--store", store), shard_pairs=shard_pairs)


@app.command(cls=TakesSettings)
@takes_settings(
    *("model", "data", "size", "batch_size", "mixed_precision", "seed"),
    lora_rank="The --lora-rank that the training will have",
)
def reference(
    out: Annotated[Path, typer.Argument(help="Folder for the errors; an interrupted run is continued.")],
    *,
    shard_pairs: _ShardPairs = 1024,
    draws: Annotated[
        int, typer.Option(min=1, help="Draws of noise stored per pair, one for each epoch; then the first again.")
    ] = 4,
    **settings: Any,
) -> None:
    """Compute the reference's errors once. They are for `train --reference-errors OUT`.

    Runs under `accelerate launch` too.
    """
    with training(settings) as given:
        from ..diffusion.precompute import reference as run

        run(given, out, draws=draws, shard_pairs=shard_pairs)


@app.command()
def geneval(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a Diffusers pipeline of images.")],
    prompts: Annotated[Path, typer.Argument(help="GenEval's evaluation_metadata.jsonl.")],
    out: Annotated[Path, typer.Argument(help="Folder for GenEval's scorer.")],
    result: Annotated[Path | None, typer.Option(help="Output folder of `train`, whose weights are rendered.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Images per prompt.")] = 4,
    batch_size: Annotated[int, typer.Option(min=1, help="Images rendered at once; more is faster on a GPU.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 50,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale (default: the pipeline's own).")] = None,
    size: Annotated[int | None, typer.Option(min=8, help="Side in pixels (default: the model's own).")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed.")] = 0,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16 (default: bfloat16; on a CPU float32).")
    ] = None,
    variant: Annotated[str | None, typer.Option(help="Variant of the model's files, such as fp16.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
) -> None:
    """Render GenEval's prompts for its official scorer. Goes on where it stopped.

    Runs under `accelerate launch` too.
    """
    less = "Less is taken by a smaller --batch-size, --dtype bfloat16"
    with said(), said(torch.OutOfMemoryError, code=1, more=less):
        from ..diffusion.geneval import render

        columns = (*Progress.get_default_columns(), MofNCompleteColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("rendering", visible=False)  # until the model is there
            render(
                model,
                prompts,
                out,
                result=result,
                samples=samples,
                batch_size=batch_size,
                steps=steps,
                guidance=guidance,
                size=None if size is None else (size, size),
                seed=seed,
                dtype=_dtype("--dtype", dtype),
                variant=variant,
                revision=revision,
                progress=lambda done, total: bar.update(task, completed=done, total=total, visible=True),
            )


def _dtype(option: str, name: str | None) -> torch.dtype | None:
    if name not in (None, "float32", "bfloat16", "float16"):
        raise ValueError(f"{option} is {name!r}; expected float32, bfloat16 or float16")
    return None if name is None else getattr(torch, name)
