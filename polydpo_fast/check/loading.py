"""The loader's batches: which pairs, in which order, on any number of ranks, after a resume, around a bad pair and at
the end; how they are cropped and mirrored; and from files of each kind.

Order and draws are recomputed from their formulas.
"""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .encoding import png
from .formulas import balanced, crop_at, drawn, mixed, place, windowed
from .report import Finding, must

__all__ = ["loader", "stored"]

_PAIRS = 24


def loader(seed: int) -> Iterator[tuple[Finding, str]]:
    """Tiny pairs whose pixels say which they are: each once whatever the ranks, resumed, one of them damaged."""
    from ..data import PairLoader

    records = [{"win": _png(number, 0), "lose": _png(number, 1), "prompt": str(number)} for number in range(_PAIRS)]
    how: Any = dict(seed=seed, size=2, resize=None, dtype=torch.uint8, readers=2, threads=1)
    one_rank: Any = dict(rank=0, world_size=1, **how)

    alone = _indices(PairLoader(records, 4, **one_rank))
    for ranks, size in ((1, 4), (2, 3), (4, 2)):
        loaders = [PairLoader(records, size, rank=rank, world_size=ranks, **how) for rank in range(ranks)]
        read = [batch for step in zip(*loaders, strict=True) for batch in step]
        yield _once(read, alone), f"{ranks} ranks of {size}"

    yield from _order(seed, records, alone, one_rank)
    yield _windowed(seed), "a window of 8 of 30 blocks"
    yield _labelled(one_rank), "jpg_0, jpg_1, label_0"

    first = PairLoader(records, 4, **one_rank)
    batches = iter(first)
    before = [next(batches), next(batches)]
    second = PairLoader(records, 6, **one_rank)
    second.load_state_dict(first.state_dict())
    order = _indices([*before, *second])
    same = order == alone[: len(order)] and len(order) >= _PAIRS - 6
    yield must("resumed", same, order), "after 8 of 24 pairs"

    bad = list(records)
    bad[5] = {**bad[5], "lose": bad[5]["lose"][:40]}
    read = list(PairLoader(bad, 4, **one_rank))
    order, at = _indices(read), alone.index(5)
    right = [*order[:at], *order[at + 1 :]] == [*alone[:at], *alone[at + 1 :]] and order[at] != 5
    yield must("a bad pair", right and all(map(_shown, read)), order), "pair 5 cut off"

    for last, number in (("pad", -1), ("wrap", alone[0])):
        ending: Any = dict(last=last, **one_rank)
        read = list(PairLoader(records, 5, **ending))
        end = read[-1]
        right = _indices(read) == [*alone, number] and all(map(_shown, read[:-1]))
        if last == "pad":
            right = right and [end.ok.tolist(), end.weight.tolist()] == [[True] * 4 + [False], [1.0] * 4 + [0.0]]
            right = right and not end.pixels[[4, 9]].any()
        yield must("the last batch", right, f"it has {end.index.tolist()}"), f"{_PAIRS} pairs by five, last={last}"
    yield from _shares(seed, records, one_rank)
    yield from _drawn(seed, how)


def _indices(batches: Iterable[Any]) -> list[int]:
    return [index for batch in batches for index in batch.index.tolist()]


def _once(batches: list[Any], order: list[int] | None = None) -> Finding:
    """Every pair, in this order if there is one, with pixels and prompt of its own."""
    found = _indices(batches)
    right = sorted(found) == list(range(_PAIRS)) and order in (None, found)
    note = "pixels or prompts of another pair or arm" if right else f"the order is {found}"
    return must("each pair once", right and all(map(_shown, batches)), note)


# --------------------------------------------------------------------------------------------------- order


def _order(
    seed: int, records: list[dict[str, Any]], alone: list[int], one_rank: dict[str, Any]
) -> Iterator[tuple[Finding, str]]:
    """Against the formula: epochs, other seeds, no shuffle; and of many pairs, without loading them."""
    from ..data import PairLoader
    from ..data.order import order_of

    seen = {tuple(alone)}
    for epoch, of_seed in ((0, seed), (1, seed), (2, seed), (0, seed + 1)):
        own = PairLoader(records, 6, **{**one_rank, "seed": of_seed})
        own.set_epoch(epoch)
        order = _indices(own)
        seen.add(tuple(order))
        yield _by_formula(order, of_seed, epoch), f"epoch {epoch}, seed {of_seed}"
    own = PairLoader(records, 6, **one_rank)
    for epoch in (0, 1):
        yield _by_formula(_indices(own), seed, epoch), f"epoch {epoch}, after the one before"
    yield must("order", len(seen) == 4, "epochs or seeds have the same order"), "epochs and seeds"
    order = _indices(PairLoader(records, 6, shuffle=False, **one_rank))
    yield must("order", order == list(range(_PAIRS)), f"it is {order}"), "shuffle=False"
    for size in (1, 2, 5, 1000, 3_000_017):
        positions = np.unique(np.linspace(0, size - 1, 40).astype(np.int64))
        found = order_of(np.array([size]), None, None, seed=seed, epoch=7, window=None)(positions).tolist()
        right = found == [place(position, size, seed, 7) for position in positions.tolist()]
        yield must("order", right, f"it is {found}"), f"{size} pairs"


def _by_formula(order: list[int], seed: int, epoch: int) -> Finding:
    expected = [place(position, _PAIRS, seed, epoch) for position in range(_PAIRS)]
    return must("order", order == expected, f"it is {order}")


def _windowed(seed: int) -> Finding:
    """By the formula; and what is said to be shuffled among each other is of few blocks."""
    from ..data.order import order_of

    lengths = [1 + number * 7 % 5 for number in range(30)]
    order = order_of(np.array(lengths), None, None, seed=seed, epoch=3, window=8)
    found = order(np.arange(sum(lengths)))
    right = found.tolist() == windowed(lengths, seed, 3, 8)
    block, begin = np.repeat(np.arange(30), lengths)[found], 0
    while right and begin < len(found):
        first, end = order.window(begin)
        right, begin = first == begin < end and len(np.unique(block[begin:end])) <= 8, end
    return must("order", right, f"it is {found.tolist()}")


def _labelled(one_rank: dict[str, Any]) -> Finding:
    """The label says which of two images is the winner."""
    from ..data import PairLoader

    labels = (1, 0, 0, 1)
    records = [
        {"jpg_0": _png(number, 1 - label), "jpg_1": _png(number, label), "label_0": label, "caption": str(number)}
        for number, label in enumerate(labels)
    ]
    (batch,) = PairLoader(records, len(labels), **one_rank)
    return must("each pair once", _shown(batch), "of other arms")


def _shares(seed: int, records: list[dict[str, Any]], one_rank: dict[str, Any]) -> Iterator[tuple[Finding, str]]:
    """As many of each category in an epoch as its share says, by the formula."""
    from ..data import PairLoader

    codes = [int(number % 4 > 0) for number in range(len(records))]
    records = [{**record, "category": ("few", "many")[code]} for record, code in zip(records, codes, strict=True)]
    ways: list[tuple[Any, tuple[int, int]]] = [("balanced", (12, 12)), ({"few": 2.0, "many": 5.0}, (7, 17))]
    for shares, quotas in ways:
        own = PairLoader(records, 4, categories=shares, **one_rank)
        for epoch in (0, 1):
            read = list(own)
            order = _indices(read)
            told = [name for batch in read for name in batch.category] == [records[n]["category"] for n in order]
            right = told and order == balanced(codes, quotas, seed, epoch)
            yield must("order", right, f"it is {order}"), f"6 pairs of one category, 18 of another, {shares}"


# --------------------------------------------------------------------------------------------------- draws


def _drawn(seed: int, how: dict[str, Any]) -> Iterator[tuple[Finding, str]]:
    """Crop, mirror and dropped prompt of a pair are those of seed, epoch and position, whichever rank reads it; pixels
    show what is told of them, beside the pair's own size and weight."""
    from ..data import PairLoader

    sides = [[(3 + number % 3, 2 + number % 5), (4, 3 + number % 2)] for number in range(_PAIRS)]
    records = [
        {"win": _png(number, 0, *of[0]), "lose": _png(number, 1, *of[1]), "prompt": str(number), "weight": number / 8}
        for number, of in enumerate(sides)
    ]
    drawing: Any = dict(crop="random", hflip=0.4, prompt_dropout=0.3, **how)
    loaders = [PairLoader(records, 3, rank=rank, world_size=2, **drawing) for rank in range(2)]
    for epoch in (0, 1):
        batches = [batch for step in zip(*loaders, strict=True) for batch in step]
        wrong = ""
        for position in range(_PAIRS):
            batch, row = batches[position // 3], position % 3
            number, numbers = place(position, _PAIRS, seed, epoch), drawn(mixed(seed, epoch, position) >> 1)
            flipped, dropped = numbers[2] / 2**64 < 0.4, mixed(seed, epoch, position, 2**32) / 2**64 < 0.3
            facts = [batch.index[row], batch.flipped[row], batch.prompts[row], batch.weight[row]]
            right = facts == [number, flipped, "" if dropped else str(number), number / 8]
            for arm, (height, width) in enumerate(sides[number]):
                y, x = crop_at(numbers, (height, width), (2, 2))
                at = row + 3 * arm
                told = [*batch.original_size[at].tolist(), *batch.crop_top_left[at].tolist()]
                across = [width - 1 - x, width - 2 - x] if flipped else [x, x + 1]
                shown = [[number, arm, 16 * (y + down) + column] for down in (0, 1) for column in across]
                right = right and told == [height, width, y, x]
                right = right and batch.pixels[at].flatten(1).t().tolist() == shown
            wrong = wrong if right else wrong or f"at position {position}"
        yield must("draws", not wrong, wrong), f"epoch {epoch}, 2 ranks of 3"


# --------------------------------------------------------------------------------------------------- files


def stored(seed: int, kind: str) -> Iterator[tuple[Finding, str]]:
    """Every pair once, as it was written, from a manifest, a tar file or two files of Parquet, which needs pyarrow."""
    from ..data import PairLoader, open_source

    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        write = {"manifest": _write_manifest, "tar": _write_tar, "Parquet": _write_parquet}[kind]
        source = open_source(write(folder), cache=folder / "cache")
        how: Any = dict(seed=seed, size=2, resize=None, dtype=torch.uint8, threads=1, rank=0, world_size=1)
        yield _once(list(PairLoader(source, 4, **how))), kind


def _write_manifest(folder: Path) -> Path:
    lines = []
    for number in range(_PAIRS):
        for arm in (0, 1):
            (folder / f"{number} {arm}.png").write_bytes(_png(number, arm))
        lines.append(json.dumps({"win": f"{number} 0.png", "lose": f"{number} 1.png", "prompt": str(number)}))
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    return folder / "pairs.jsonl"


def _write_tar(folder: Path) -> Path:
    with tarfile.open(folder / "pairs.tar", "w") as shard:
        for number in range(_PAIRS):
            members = {"win.png": _png(number, 0), "lose.png": _png(number, 1), "txt": str(number).encode()}
            for name, data in members.items():
                facts = tarfile.TarInfo(f"{number:03}.{name}")
                facts.size = len(data)
                shard.addfile(facts, io.BytesIO(data))
    return folder / "pairs.tar"


def _write_parquet(folder: Path) -> Path:
    """Pick-a-Pic's columns, row groups of 5 rows and of 7. Each third row is none of the pairs: a tie."""
    import pyarrow
    import pyarrow.parquet

    rows = []
    for number in range(_PAIRS):
        label = number // 2 % 2  # whether the first image wins
        images = {"jpg_0": _png(number, 1 - label), "jpg_1": _png(number, label)}
        rows.append({**images, "label_0": float(label), "label_1": float(1 - label), "caption": str(number)})
        if number % 2:
            rows.append({**rows[-1], "label_0": 0.5, "label_1": 0.5})
    for name, part, size in (("0", rows[:20], 5), ("1", rows[20:], 7)):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), folder / f"{name}.parquet", row_group_size=size)
    return folder


# --------------------------------------------------------------------------------------------------- pairs


def _png(number: int, arm: int, height: int = 2, width: int = 2) -> bytes:
    """Each pixel says of which pair, arm and place it is."""
    pixels = np.array([[(number, arm, 16 * y + x) for x in range(width)] for y in range(height)])
    return png(pixels, 2, 8, False, [], np.zeros(height, int))


def _shown(batch: Any) -> bool:
    """Whether the rows show their pairs, winners before losers, beside their prompts."""
    numbers = batch.index.tolist()
    arms = [0] * len(numbers) + [1] * len(numbers)
    pixels = batch.pixels[:, :2, 0, 0].tolist()
    right: bool = pixels == [list(x) for x in zip(numbers * 2, arms, strict=True)]
    return right and batch.prompts == [str(number) for number in numbers]
