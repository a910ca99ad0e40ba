"""The command `polydpo-fast`."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table

if TYPE_CHECKING:
    from .bench import Comparison

app = typer.Typer(
    name="polydpo-fast",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # its tables leave the help of `train` sixteen columns, and cut names of options off
    pretty_exceptions_enable=False,
)

_Source = Annotated[list[str], typer.Argument(help="Files, globs, a folder or a URL of Parquet, tar, JSON or CSV.")]
_Ties = Annotated[str | None, typer.Option(help="Pairs without a winner: drop, keep (with weight 0.5) or error.")]
_Root = Annotated[str | None, typer.Option(help="Folder that relative paths in a JSON or CSV start from.")]
_Category = Annotated[
    str | None, typer.Option(help="Parquet column of the category (default: category, if there is one; '' for none).")
]
_Weight = Annotated[
    str | None, typer.Option(help="Parquet column of the weight (default: weight, if there is one; '' for none).")
]
_Config = Annotated[Path | None, typer.Option(help="YAML file of settings; options on the command line win.")]
_Model = Annotated[str | None, typer.Option(help="Folder or hub id of a Diffusers pipeline.")]
_Data = Annotated[list[str] | None, typer.Option(help="Pairs: file, glob, folder or URL; or a folder made by `cache`.")]
_Size = Annotated[int | None, typer.Option(help="Side in pixels (default: the model's own).")]
_Precision = Annotated[
    str | None, typer.Option(help="no, fp16 or bf16 (default: what `accelerate` is configured for).")
]
_ShardPairs = Annotated[int, typer.Option(min=1, help="Pairs per output file, the unit of work of a process.")]
_Seed = Annotated[int | None, typer.Option(help="Random seed (default 0).")]
_Assign = Annotated[
    list[str] | None, typer.Option("--set", help="NAME=VALUE of any other setting, in YAML; may be repeated.")
]
_LESS_MEMORY = (
    "Less is taken by --gradient-checkpointing, a smaller --batch-size with more --accumulation, latents made ahead "
    "(`polydpo-fast cache`), --optimizer adamw8bit, --lora-rank"
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from ._version import __version__

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
    from .info import collect

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
    from .demo import Settings, run

    settings = Settings(alpha=alpha, beta=beta, steps=steps, seed=seed, label_noise=label_noise, device=device)
    try:
        run(settings, out)
    except OSError as error:
        raise _failed(error) from error


@app.command()
def inspect(
    source: _Source,
    every: Annotated[bool, typer.Option("--all", help="Decode every pair and list those that fail.")] = False,
    sample: Annotated[int, typer.Option(min=0, help="Pairs to decode and time.")] = 64,
    ties: _Ties = None,
    root: _Root = None,
    category: _Category = None,
    weight: _Weight = None,
    ledger: Annotated[Path | None, typer.Option(help="Ledger of a loader: try its bad pairs again.")] = None,
) -> None:
    """Show what preference data holds and what decoding it costs. Exits with 1 if a pair cannot be decoded."""
    from .data import open_source
    from .data.inspect import report

    console = Console()
    given = {"ties": ties, "root": root, "category": category, "weight": weight}
    options = _options(given)
    try:
        pairs = open_source(source[0] if len(source) == 1 else source, **options)
        fine = report(pairs, every=every, count=sample, ledger=ledger, console=console)
    except (OSError, TypeError, ValueError, ImportError) as error:
        raise _failed(error) from error
    raise typer.Exit(0 if fine else 1)


@app.command()
def pack(
    source: _Source,
    out: Annotated[Path, typer.Argument(help="Folder for the shards; an interrupted run is continued.")],
    shard_size: Annotated[str, typer.Option(help="Largest size of a shard: 500MB, 1GB, 2GiB.")] = "1GB",
    ties: _Ties = None,
    root: _Root = None,
    category: _Category = None,
    weight: _Weight = None,
    columns: Annotated[list[str] | None, typer.Option(help="Further column to keep; may be repeated.")] = None,
) -> None:
    """Write pairs as WebDataset shards. Exits with 1 if some could not be read."""
    from .data import open_source
    from .data import pack as packing

    given = {"ties": ties, "root": root, "category": category, "weight": weight, "columns": columns}
    try:
        for name in {"category", "weight"}.intersection(columns or ()):
            raise ValueError(f"--columns has {name}, which shards have of every pair; expected --{name} {name}")
        size = packing.bytes_of(shard_size)
        place = os.path.realpath(os.path.expanduser(out))
        for folder in source:
            inside = os.path.expanduser(folder)
            if os.path.isdir(inside) and Path(place).is_relative_to(os.path.realpath(inside)):
                raise ValueError(f"OUT is {out}, within {folder}, of which all is read; expected another place")
        where = source[0] if len(source) == 1 else source
        pairs = open_source(where, **_options(given))
        with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), transient=True) as progress:
            task = progress.add_task("pairs", total=len(pairs))
            done = packing.pack(
                pairs, out, shard_size=size, progress=lambda number: progress.update(task, completed=number)
            )
    except (OSError, TypeError, ValueError, ImportError) as error:
        raise _failed(error) from error
    left_out = f"; {done.unreadable} could not be read: {out / packing.UNREADABLE}" if done.unreadable else ""
    Console().print(f"{done.pairs} pairs in {done.shards} shards in {out}{left_out}", highlight=False, soft_wrap=True)
    raise typer.Exit(1 if done.unreadable else 0)


def _options(given: dict[str, Any]) -> dict[str, Any]:
    """Those of a source that were given; of a column "" means none."""
    none = {name: None for name in ("category", "weight") if given[name] == ""}
    return {**{name: value for name, value in given.items() if value is not None}, **none}


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
        float | None, typer.Option(min=0.0, help="Time limit (default 60; none with --thorough).")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the results to this file.")] = None,
) -> None:
    """Compare losses, decoding and loading with references. Exits with 1 if a gate is broken on this machine."""
    import secrets

    from .check import check as run

    console, errors = Console(), Console(stderr=True)
    if not console.is_terminal:
        console.width = 120  # in a log the table is to stay in one piece
    if case is not None and seed is None:
        errors.print("--case needs the --seed that it was drawn from", style="red")
        raise typer.Exit(2)
    try:
        if json is not None:
            json.open("a").close()  # before a minute is spent on what could not be put there
        with errors.status("checking") as status:
            report = run(
                seed=secrets.randbelow(1 << 31) if seed is None else seed,
                thorough=thorough,
                backend=backend,
                device=device,
                case=case,
                seconds=seconds if seconds is not None else math.inf if thorough else 60.0,
                progress=lambda text: status.update(f"checking {text}"),
            )
        report.print(console)
        if json is not None:
            json.write_text(report.as_json() + "\n")
    except (OSError, ValueError) as error:
        raise _failed(error) from error
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
    from . import bench as benchmarks

    try:
        if compare is None:
            path = benchmarks.run(suites or (), out, replace=replace, dirty=dirty)
            Console().print(f"results: {path}", highlight=False, soft_wrap=True)
            return
        if suites or out is not None or replace or dirty:
            raise ValueError("--compare measures nothing; expected no SUITES, --out, --replace or --dirty beside it")
        found = benchmarks.compare(*map(benchmarks.read_results, compare))
    except (OSError, RuntimeError, ValueError) as error:
        raise _failed(error) from error
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


@app.command()
def train(
    context: typer.Context,
    config: _Config = None,
    model: _Model = None,
    data: _Data = None,
    reference_errors: Annotated[
        str | None, typer.Option(help="Folder made by `reference`; then no reference model is run.")
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="Folder of the result, checkpoints and metrics (default train-output).")
    ] = None,
    size: _Size = None,
    batch_size: Annotated[int | None, typer.Option(help="Pairs per process and forward pass (default 1).")] = None,
    accumulation: Annotated[int | None, typer.Option(help="Forward passes per optimizer step (default 1).")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps (default 2000).")] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Poly-DPO's alpha, above 0 for noisy labels; 0 is Diffusion-DPO (default 0).")
    ] = None,
    beta: Annotated[
        float | None, typer.Option(help="Pull to the reference, with the factor 1/2 of Diffusion-DPO (default 5000).")
    ] = None,
    objective: Annotated[
        str | None, typer.Option(help="poly_dpo, robust, ipo, hinge or linear (default poly_dpo).")
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option(help="Train LoRA adapters of this rank; 0 trains all weights (default 0).")
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="adamw, adamw8bit, paged_adamw8bit or adafactor (default adamw).")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="After warmup (default: 1e-5 for LoRA, else 1e-8 per pair of a step).")
    ] = None,
    warmup: Annotated[int | None, typer.Option(help="Steps of linear warmup (default 0).")] = None,
    mixed_precision: _Precision = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option(help="Recompute activations in backward: less memory, more time (default off).")
    ] = None,
    ema: Annotated[float | None, typer.Option(help="Decay of the averaged weights; 0 for none (default 0).")] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints; 0 for none (default 0).")
    ] = None,
    keep: Annotated[int | None, typer.Option(help="Number of checkpoints to keep; 0 for all (default 0).")] = None,
    resume: Annotated[
        str | None, typer.Option(help="Resume from 'latest', or from the folder of a checkpoint.")
    ] = None,
    validation_prompts: Annotated[
        list[str] | None, typer.Option(help="Prompt to render into a grid of images; may be repeated.")
    ] = None,
    validation_every: Annotated[
        int | None, typer.Option(help="Steps between two grids; 0 for none but the last (default 0).")
    ] = None,
    trackers: Annotated[list[str] | None, typer.Option(help="tensorboard, wandb; may be repeated.")] = None,
    seed: _Seed = None,
    assign: _Assign = None,
) -> None:
    """Align a Diffusers pipeline with preference pairs. Runs under `accelerate launch` too."""
    with _training(context) as settings:
        from .diffusion.train import train as run

        run(settings)


@app.command()
def cache(
    context: typer.Context,
    out: Annotated[Path, typer.Argument(help="Folder for the latents; an interrupted run is continued.")],
    config: _Config = None,
    model: _Model = None,
    data: _Data = None,
    size: _Size = None,
    batch_size: Annotated[int | None, typer.Option(help="Pairs per process and forward pass (default 1).")] = None,
    mixed_precision: _Precision = None,
    seed: _Seed = None,
    shard_pairs: _ShardPairs = 128,
    store: Annotated[str | None, typer.Option(help="Dtype of the stored latents: float32, bfloat16, float16.")] = None,
    assign: _Assign = None,
) -> None:
    """Encode images and prompts once, for `train --data OUT`. Runs under `accelerate launch` too."""
    with _training(context, "out", "store", "shard_pairs") as settings:
        import torch

        from .diffusion.precompute import cache as run

        if store not in (None, "float32", "bfloat16", "float16"):
            raise ValueError(f"--store is {store!r}; expected float32, bfloat16 or float16")
        dtype = None if store is None else getattr(torch, store)
        run(settings, out, dtype=dtype, shard_pairs=shard_pairs)


@app.command()
def reference(
    context: typer.Context,
    out: Annotated[Path, typer.Argument(help="Folder for the errors; an interrupted run is continued.")],
    config: _Config = None,
    model: _Model = None,
    data: _Data = None,
    size: _Size = None,
    batch_size: Annotated[int | None, typer.Option(help="Pairs per process and forward pass (default 1).")] = None,
    mixed_precision: _Precision = None,
    lora_rank: Annotated[
        int | None, typer.Option(help="The --lora-rank that the training will have (default 0).")
    ] = None,
    seed: _Seed = None,
    shard_pairs: _ShardPairs = 1024,
    draws: Annotated[
        int, typer.Option(min=1, help="Draws of noise stored per pair; training reuses them when it has come as often.")
    ] = 4,
    assign: _Assign = None,
) -> None:
    """Compute the reference's errors once. They are for `train --reference-errors OUT`.

    Runs under `accelerate launch` too.
    """
    with _training(context, "out", "draws", "shard_pairs") as settings:
        from .diffusion.precompute import reference as run

        run(settings, out, draws=draws, shard_pairs=shard_pairs)


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
    import torch

    try:
        from .diffusion.geneval import render

        if dtype not in (None, "float32", "bfloat16", "float16"):
            raise ValueError(f"--dtype is {dtype!r}; expected float32, bfloat16 or float16")
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
                dtype=None if dtype is None else getattr(torch, dtype),
                variant=variant,
                revision=revision,
                progress=lambda done, total: bar.update(task, completed=done, total=total, visible=True),
            )
    except (OSError, TypeError, ValueError, ImportError) as error:
        raise _failed(error) from error
    except torch.OutOfMemoryError as error:
        raise _failed(f"{error}\nLess is taken by a smaller --batch-size, --dtype bfloat16", 1) from error


@contextmanager
def _training(context: typer.Context, *own: str) -> Iterator[Any]:
    """The settings that a command was given, without what is its own. What goes wrong is said in a line."""
    given = {name: value for name, value in context.params.items() if value is not None and value not in ([], ())}
    config, assign = given.pop("config", None), given.pop("assign", ())
    import torch

    from .data import LoaderError

    try:
        from .diffusion.config import read_assignments, read_settings

        given |= read_assignments(assign)
        yield read_settings(config, **{name: value for name, value in given.items() if name not in own})
    except (OSError, TypeError, ValueError, ImportError, ArithmeticError, LoaderError) as error:
        raise _failed(error, 1 if isinstance(error, (ArithmeticError, LoaderError)) else 2) from error
    except torch.OutOfMemoryError as error:
        raise _failed(f"{error}\n{_LESS_MEMORY}", 1) from error


def _failed(error: Exception | str, code: int = 2) -> typer.Exit:
    """Says in a line what went wrong; the exit to be raised then."""
    from .data.inspect import safe

    text = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:  # without a number
        text = f"{error.filename}: {error.strerror}"
    Console(stderr=True).print(safe(" ".join(text.splitlines())), style="red", soft_wrap=True)
    return typer.Exit(code)


if __name__ == "__main__":
    app()
