"""`polydpo-fast geneval`: the images of GenEval's prompts, in the folders that its scorer reads.

GenEval (Ghosh et al. 2023, arXiv 2310.11513) has a file of prompts, one JSON object in each line, and a scorer of its
own, which goes through folders 00000, 00001 ... of a metadata.jsonl, the prompt's line, and samples/00000.png ...
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch

from ..atomic import write_atomically
from ..data.formats.fields import parse_json
from ..data.source import fingerprint_of
from ..splitmix import mix
from .extras import need
from .families import check_geometry, family_of, native_size
from .fingerprints import fingerprint
from .pipelines import load_pipeline
from .pixels import sample
from .result import load_result
from .setup import new_accelerator
from .together import check_same, check_shared, together

__all__ = ["read_prompts", "render"]

_MAX_BYTES = 1 << 26
_SETTINGS = "rendering.json"
# Of a pipeline's parts, beside the one that is trained, those that show in an image.
_SHOWS = {
    "vae",
    "scheduler",
    *(f"{kind}{number}" for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")),
}


def read_prompts(file: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of GenEval's evaluation_metadata.jsonl. Raises ValueError for a line without a prompt."""
    path = Path(file)
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes; expected a file of prompts, {_MAX_BYTES} at the most"
        )
    result = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
        if not isinstance(record.get("prompt"), str):
            raise ValueError(f"{path}:{number}: prompt is {record.get('prompt')!r}; expected text")
        result.append(record)
    if not result:
        raise ValueError(f"{path} has no prompts")
    return result


def render(
    model: str,
    prompts: str | os.PathLike[str],
    out: Path,
    *,
    result: Path | None = None,
    samples: int = 4,
    batch_size: int = 1,
    steps: int = 50,
    guidance: float | None = None,
    size: tuple[int, int] | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    revision: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Renders what is not there yet; under `accelerate launch` the processes share the prompts.

    model: a pipeline of images. result: the output folder of a training, whose weights take the place of the model's.
    samples: images of a prompt. batch_size: images that are rendered at once.
    guidance: None for the pipeline's own. size: height and width; None for what the model was made for.
    seed: each image is a function of it, of the prompt's number and the sample's alone, on one kind of device; of
        batch_size no more than by rounding.
    dtype: None for float32 on a CPU and bfloat16 elsewhere.
    variant, revision: of the model's files, as Diffusers has them.
    progress: called with the number of this process's images that are there, and that there will be.

    Raises ValueError where the folder holds images of other prompts, of another model, or made with other settings, and
    for a model that is none or makes clips.
    """
    need("accelerate", "transformers", "diffusers", "safetensors", what="geneval")
    from PIL import Image

    accelerator = new_accelerator()
    with together(accelerator):
        records, family = read_prompts(prompts), family_of(model, revision)
        if family.video:
            raise ValueError(f"model is {model!r}, which makes clips; GenEval is about images")
    check_same(accelerator, {"prompts": fingerprint_of("prompts", records), "samples": samples})
    check_shared(accelerator, "out", out)
    mine = range(accelerator.process_index, len(records), accelerator.num_processes)
    dtype = dtype or (torch.float32 if accelerator.device.type == "cpu" else torch.bfloat16)
    with together(accelerator):
        for number in mine:
            _claim(out / f"{number:05d}", records[number])
        pipe = load_pipeline(model, policy=dtype, frozen=dtype, variant=variant, revision=revision)
        if result is not None:
            load_result(pipe, result)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.to(accelerator.device)
    size = size or native_size(pipe, family)
    parts = {name: part for name, part in pipe.components.items() if part is not None and name in _SHOWS}
    parts["weights"] = getattr(pipe, family.model)  # a training may have written other ones since
    made_with = {
        "seed": seed,
        "steps": steps,
        "guidance": guidance,
        "size": list(size),
        "dtype": fingerprint(dtype),
        **{name: fingerprint(part) for name, part in parts.items()},
    }
    check_same(accelerator, made_with)
    with together(accelerator):
        check_geometry(pipe, family, size, None)
        _claim_all(out, made_with, {"model": model, "result": None if result is None else str(result)})
    missing = [image for image in product(mine, range(samples)) if not _file(out, *image).exists()]
    total = len(mine) * samples
    progress(total - len(missing), total)
    for begin in range(0, len(missing), batch_size):
        batch = missing[begin : begin + batch_size]
        pixels = sample(
            pipe,
            family,
            [records[number]["prompt"] for number, _ in batch],
            size=size,
            steps=steps,
            guidance=guidance,
            seeds=[mix(seed, number, one) for number, one in batch],
        )
        for (number, one), image in zip(batch, pixels, strict=True):
            png = io.BytesIO()
            Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(png, "PNG")
            write_atomically(_file(out, number, one), png.getvalue())
        progress(total - len(missing) + begin + len(batch), total)
    accelerator.wait_for_everyone()


def _file(out: Path, number: int, one: int) -> Path:
    return out / f"{number:05d}" / "samples" / f"{one:05d}.png"


def _claim_all(out: Path, settings: dict[str, Any], told: dict[str, Any]) -> None:
    """Writes with what the images are made, or sees that those which are there were made so.

    told: what is written and not compared: where models are.
    """
    file = out / _SETTINGS
    out.mkdir(parents=True, exist_ok=True)
    if not file.exists():  # each process may write it, as all write the same
        write_atomically(file, f"{json.dumps({**told, **settings})}\n".encode())
    old = parse_json(file.read_bytes())
    for name, value in settings.items():
        if old.get(name) != value:
            raise ValueError(f"{name} is {value!r}; {out} was rendered with {old.get(name)!r}: expected another folder")


def _claim(folder: Path, record: dict[str, Any]) -> None:
    """Makes the folder of a prompt, or sees that it is this prompt's."""
    metadata = folder / "metadata.jsonl"
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    if not metadata.exists():
        write_atomically(metadata, f"{json.dumps(record)}\n".encode())
    elif (old := parse_json(metadata.read_bytes())) != record:
        raise ValueError(f"{metadata} is of {old.get('prompt')!r}; expected {record['prompt']!r}, or another folder")
