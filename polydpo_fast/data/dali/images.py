"""Images of pairs by DALI: which of them, in which runs of its pipelines; the others by C++."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor
from typing_extensions import Buffer

from ... import _C
from ...decode import DecodedPairs, DecodeFailure, decode_pairs
from ...decoding.arguments import ImageRequest, check_images
from .batch import Batch
from .canary import compare
from .engine import Engine
from .picture import Placement

__all__ = ["decode"]

_RUN_BYTES = 1 << 29  # of decoded pixels, that a run of a pipeline holds at the most
_DEFAULTS: dict[str, Any] = decode_pairs.__kwdefaults__ or {}


def decode(engine: Engine, win: Sequence[Buffer], lose: Sequence[Buffer], options: dict[str, Any]) -> DecodedPairs:
    """`decode_pairs`, by DALI where it may have the images."""
    options = engine.with_defaults(_DEFAULTS, options)
    asked = check_images(win, lose, device=engine.device, **options)
    batch = _Images(engine, asked, options)
    with engine.writing(asked.out):
        batch.decode()
    batch.raise_errors()
    facts = batch.original_size, batch.crop_top_left, batch.flipped()
    return DecodedPairs(asked.out, batch.ok, batch.errors, *facts, batch.damaged)


class _Images(Batch):
    """damaged: as of `DecodedPairs`."""

    asked: ImageRequest

    def __init__(self, engine: Engine, asked: ImageRequest, options: dict[str, Any]) -> None:
        super().__init__(engine, asked, options)
        self.damaged: tuple[DecodeFailure, ...] = ()
        self._images = [memoryview(image).cast("B") for image in (*asked.win, *asked.lose)]
        found = _C.foreign_plans(
            self._images,
            draws=asked.draws,
            output=asked.output,
            apply_orientation=asked.exif == "apply",
            limits=asked.limits,
        )
        self._placements = {row: Placement(**told) for row, told in enumerate(found) if told is not None}
        self._trouble: RuntimeError | None = None  # the last of DALI's errors

    def decode(self) -> None:
        """By DALI those that it may have, and the others by C++."""
        may = [pair for pair in range(self.pairs) if self._is_for_dali(pair)]
        done = self._decoded(self.rows(may))
        taken = [pair for pair in may if done.issuperset(self.rows([pair]))]
        for row in self.rows(taken):
            self.place(row, self._placements[row])
        if others := sorted({*range(self.pairs)}.difference(taken)):
            rest = self.by_cpp(decode_pairs, others)
            self.take(others, rest)
            self.damaged = self.renumbered(others, rest.damaged)
            if not taken and self.ok[may].any():
                self.warn("DALI decoded none of the images of a batch that C++ could decode", self._trouble)
        for pair in taken:
            if self.engine.is_canary():
                self._look_again(pair)

    def _is_for_dali(self, pair: int) -> bool:
        return not self.asked.output.planes and self._placements.keys() >= {*self.rows([pair])}

    def _decoded(self, rows: list[int]) -> set[int]:
        """Decodes those rows, and returns which of them DALI could."""
        done: set[int] = set()
        waiting = _runs(rows, self._placements)
        while waiting:
            part = waiting.pop()
            try:
                levels = _run(self.engine, part, self._images)
                for row, pixels in zip(part, levels, strict=True):
                    self.finish.store(pixels, self._placements[row], self.asked.out[row])
            except RuntimeError as error:  # one is too much for it: which?
                self._trouble = error
                if len(part) > 1:
                    waiting += [part[: len(part) // 2], part[len(part) // 2 :]]
            else:
                done.update(part)
            levels = []
            self.engine.wait()
        return done

    def _look_again(self, pair: int) -> None:
        known = self.by_cpp(decode_pairs, [pair])
        if known.ok.all():
            compare(pair, self.asked.out[self.rows([pair])], known.pixels, self.asked.output)


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
