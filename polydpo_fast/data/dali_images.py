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
from .dali_engine import Engine, Finish, Plan, compare, for_cpp, reason, resized

__all__ = ["decode"]

_DEFAULTS: dict[str, Any] = decode_pairs.__kwdefaults__ or {}


def decode(engine: Engine, win: Sequence[Buffer], lose: Sequence[Buffer], options: dict[str, Any]) -> DecodedPairs:
    """`decode_pairs`, by DALI where it may have the images."""
    options = engine.with_defaults(_DEFAULTS, options)
    asked = check_images(win, lose, device=engine.device, **options)
    pairs, out, limits, draws = len(asked.win), asked.out, asked.limits, asked.draws
    images = [
        _bytes_of(f"{name}[{index}]", image)
        for name, arm in (("win", asked.win), ("lose", asked.lose))
        for index, image in enumerate(arm)
    ]
    plans = [
        Plan(*row)
        for row in _C.foreign_plans(
            images,
            draws=draws,
            size=asked.size,
            resize=asked.native["resize"],
            apply_orientation=options["exif"] == "apply",
            limits=limits.native,
        )
    ]
    chosen = [i for i in range(pairs) if plans[i].height and plans[i + pairs].height and not asked.planes]
    finish = Finish(out.dtype, asked.native, engine.device)
    with engine.writing(out):
        rows = [row for first in (0, pairs) for row in (first + i for i in chosen)]
        done, trouble = _decoded(engine, rows, images, plans, options["interpolation"], finish, out)
        taken = [i for i in chosen if done.issuperset((i, i + pairs))]

        original = torch.zeros((2 * pairs, 2), dtype=torch.int64, device="cpu")
        corner = torch.zeros_like(original)
        for row in (*taken, *(i + pairs for i in taken)):
            original[row], corner[row] = torch.tensor(plans[row].original()), torch.tensor(plans[row].corner())
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
                    compare(i, out[[i, i + pairs]], known.pixels, asked.native["normal"])
    failures.sort(key=lambda failure: (failure.arm == "lose", failure.index))
    if failures and options["on_error"] == "raise":
        raise DecodeError(failures)
    flipped = torch.tensor([bool(flip) for *_, flip in draws], device="cpu")
    return DecodedPairs(out, ok, tuple(failures), original, corner, flipped, tuple(damaged))


def _decoded(
    engine: Engine,
    rows: list[int],
    images: list[memoryview],
    plans: list[Plan],
    interpolation: str,
    finish: Finish,
    out: Tensor,
) -> tuple[set[int], RuntimeError | None]:
    """Decodes those rows, and returns which of them DALI could, and the last of its errors."""
    done: set[int] = set()
    trouble = None
    for is_resized in (False, True):
        group = [row for row in rows if plans[row].is_resized() == is_resized]
        waiting = [group] if group else []
        while waiting:
            part = waiting.pop()
            try:
                levels = _run(engine, part, images, plans, interpolation if is_resized else None)
            except RuntimeError as error:  # one is too much for it: which?
                trouble = error
                if len(part) > 1:
                    waiting += [part[: len(part) // 2], part[len(part) // 2 :]]
                continue
            for row, pixels in zip(part, levels, strict=True):
                finish.store(pixels, plans[row], out[row])
            done.update(part)
    return done, trouble


def _run(
    engine: Engine, rows: list[int], images: list[memoryview], plans: list[Plan], interpolation: str | None
) -> list[Tensor]:
    most = 1 << (len(rows) - 1).bit_length()
    inputs: dict[str, list[np.ndarray]] = {"encoded": [np.frombuffer(images[row], np.uint8) for row in rows]}
    for row in rows:
        for name, value in plans[row].inputs(interpolation).items():
            inputs.setdefault(name, []).append(value)
    return engine.run(("images", interpolation), lambda: _graph(engine, interpolation), most, inputs)


def _graph(engine: Engine, interpolation: str | None) -> Any:
    """A crop of the image as stored, (h, w, 3) uint8; resized, float32."""
    from nvidia.dali import fn, types

    # Not affine: its threads, and those of other ranks, would be bound to the same first processors.
    on_gpu = dict(hw_decoder_load=engine.hardware_load, affine=False) if engine.is_gpu else {}
    pixels = fn.decoders.image_slice(
        fn.external_source(name="encoded", dtype=types.UINT8, ndim=1),
        device="mixed" if on_gpu else "cpu",
        start=fn.external_source(name="start", dtype=types.INT32, ndim=1),
        shape=fn.external_source(name="shape", dtype=types.INT32, ndim=1),
        axes=[0, 1],
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,
        **on_gpu,
    )
    return pixels if interpolation is None else resized(pixels, interpolation)


def _bytes_of(name: str, image: Buffer) -> memoryview:
    try:
        return memoryview(image).cast("B")
    except (TypeError, ValueError):
        raise TypeError(
            f"{name} is a {type(image).__name__}; expected a contiguous bytes-like object (bytes, memoryview, ...)"
        ) from None
