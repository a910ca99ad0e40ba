"""Images of pairs by DALI: which of them, in which runs of its pipelines; the others by C++."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Buffer

from .. import _C
from ..decode import DecodedPairs, DecodeError, DecodeFailure, decode_pairs
from ..decode_arguments import check_images
from .dali_canary import compare
from .dali_engine import Engine, for_cpp, reason
from .dali_picture import Finish, Placement

__all__ = ["decode"]

_RUN_BYTES = 1 << 29  # of decoded pixels, that a run of a pipeline holds at the most
_DEFAULTS: dict[str, Any] = decode_pairs.__kwdefaults__ or {}


def decode(engine: Engine, win: Sequence[Buffer], lose: Sequence[Buffer], options: dict[str, Any]) -> DecodedPairs:
    """`decode_pairs`, by DALI where it may have the images."""
    options = engine.with_defaults(_DEFAULTS, options)
    asked = check_images(win, lose, device=engine.device, **options)
    pairs, out, limits, draws = len(asked.win), asked.out, asked.limits, asked.draws
    images = [memoryview(image).cast("B") for image in (*asked.win, *asked.lose)]
    found = _C.foreign_plans(
        images, draws=draws, output=asked.output, apply_orientation=asked.exif == "apply", limits=limits
    )
    plans = {row: Placement(**plan) for row, plan in enumerate(found) if plan is not None}
    chosen = [i for i in range(pairs) if {i, i + pairs} <= plans.keys() and not asked.output.planes]
    finish = Finish(asked.output, engine.device)
    with engine.writing(out):
        rows = [row for first in (0, pairs) for row in (first + i for i in chosen)]
        done, trouble = _decoded(engine, rows, images, plans, finish, out)
        taken = [i for i in chosen if done.issuperset((i, i + pairs))]

        original = torch.zeros((2 * pairs, 2), dtype=torch.int64, device="cpu")
        corner = torch.zeros_like(original)
        for row in (*taken, *(i + pairs for i in taken)):
            original[row] = torch.tensor(plans[row].original(), device="cpu")
            corner[row] = torch.tensor(plans[row].corner(), device="cpu")
        ok = torch.ones(pairs, dtype=torch.bool, device="cpu")
        failures: list[DecodeFailure] = []
        damaged: list[DecodeFailure] = []
        others = sorted({*range(pairs)}.difference(taken))
        if others:
            *arms, given = for_cpp(asked, options, others)
            rest = decode_pairs(*arms, **given)
            ok[others] = rest.ok
            failures = [DecodeFailure(e.arm, others[e.index], e.reason) for e in rest.errors]
            damaged = [DecodeFailure(e.arm, others[e.index], e.reason) for e in rest.damaged]
            for k, row in enumerate((*others, *(i + pairs for i in others))):
                out[row].copy_(rest.pixels[k])
                original[row], corner[row] = rest.original_size[k], rest.crop_top_left[k]
            if chosen and not taken and rest.ok[[others.index(i) for i in chosen]].any():
                text = "DALI decoded none of the images of a batch that C++ could decode"
                warnings.warn(f"{text}: {reason(trouble)}", stacklevel=3)
        for i in taken:
            if engine.is_canary():
                *arms, given = for_cpp(asked, options, [i])
                known = decode_pairs(*arms, **given)
                if known.ok.all():
                    compare(i, out[[i, i + pairs]], known.pixels, asked.output)
    failures.sort(key=lambda failure: (failure.arm == "lose", failure.index))
    if failures and asked.on_error == "raise":
        raise DecodeError(failures)
    flipped = torch.tensor([draw.flipped for draw in draws], device="cpu")
    return DecodedPairs(out, ok, tuple(failures), original, corner, flipped, tuple(damaged))


def _decoded(
    engine: Engine, rows: list[int], images: list[memoryview], plans: dict[int, Placement], finish: Finish, out: Tensor
) -> tuple[set[int], RuntimeError | None]:
    """Decodes those rows, and returns which of them DALI could, and the last of its errors."""
    done: set[int] = set()
    trouble = None
    waiting = _runs(rows, plans)
    while waiting:
        part = waiting.pop()
        try:
            levels = _run(engine, part, images)
            for row, pixels in zip(part, levels, strict=True):
                finish.store(pixels, plans[row], out[row])
        except RuntimeError as error:  # one is too much for it: which?
            trouble = error
            if len(part) > 1:
                waiting += [part[: len(part) // 2], part[len(part) // 2 :]]
        else:
            done.update(part)
        levels = []
        engine.wait()
    return done, trouble


def _runs(rows: list[int], plans: dict[int, Placement]) -> list[list[int]]:
    """As many images at a time as there may be pixels, one at least."""
    runs: list[list[int]] = []
    room = 0
    for row in rows:
        size = 3 * plans[row].height * plans[row].width
        if size > room:
            runs.append([])
            room = _RUN_BYTES
        runs[-1].append(row)
        room -= size
    return runs


def _run(engine: Engine, rows: list[int], images: list[memoryview]) -> list[Tensor]:
    most = 1 << (len(rows) - 1).bit_length()
    inputs = {"encoded": [np.frombuffer(images[row], np.uint8) for row in rows]}
    return engine.run("images", lambda: _graph(engine), most, inputs)


def _graph(engine: Engine) -> Any:
    """Whole images as stored, (h, w, 3) uint8.

    Not a part of them (image_slice): of subsampled chroma that is to be interpolated nvJPEG decodes no parts since its
    version 13.2, and the CPU would decode them without a word; nor are parts one column wide the same pixels.
    """
    from nvidia.dali import fn, types

    # Not affine: its threads, and those of other ranks, would be bound to the same first processors.
    on_gpu = dict(hw_decoder_load=engine.hardware_load, affine=False) if engine.is_gpu else {}
    return fn.decoders.image(
        fn.external_source(name="encoded", dtype=types.UINT8, ndim=1),
        device="mixed" if on_gpu else "cpu",
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,
        **on_gpu,
    )
