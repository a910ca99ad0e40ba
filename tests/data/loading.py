"""What a loader should yield, worked out from the formulas, for tests."""

import threading

import numpy as np
import torch
from data.pairs import which

from polydpo_fast.data.order import Shuffled
from polydpo_fast.splitmix import mix

TINY = dict(size=2, dtype=torch.uint8)


def expected(size, seed, epoch, bad=(), last="drop", group=1, blocks=None, window=None):
    """The specification, in ten lines: which pair stands at each position of an epoch; -1 is none."""
    order = Shuffled(np.array(blocks or [size]), mix(seed, epoch), window)(np.arange(size)).tolist()
    result = []
    for position in range(size // group * group if last == "drop" else -(-size // group) * group):
        index, attempt = order[position % size], 0
        while index in bad:
            attempt += 1
            ahead = 1 + mix(seed, epoch, position % size, attempt) % min(size - 1, 4096)
            index = order[(position + ahead) % size]
        result.append(-1 if last == "pad" and position >= size else index)
    return result


def yielded(batch):
    """The numbers of the pairs of a batch, checked against everything else that the batch says of them."""
    numbers, arms = which(batch.pixels)
    pairs = len(batch)
    assert batch.index.tolist() == [
        number if ok else -1 for number, ok in zip(numbers[:pairs], batch.ok.tolist(), strict=True)
    ]
    for row, ok in enumerate(batch.ok.tolist()):
        if not ok:
            assert batch.keys[row] == batch.prompts[row] == ""
            assert batch.weight[row] == 0
            assert not batch.pixels[[row, row + pairs]].any()
            assert not batch.flipped[row]
            assert not batch.original_size[[row, row + pairs]].any()
            continue
        number = numbers[row]
        assert numbers[row + pairs] == number
        assert (arms[row], arms[row + pairs]) == (0, 1)
        assert batch.keys[row] == f"k{number}"
        assert batch.prompts[row] == f"prompt {number}"
        assert batch.weight[row] == 1 + number / 8
        assert batch.extra["number"][row] == number
        assert batch.original_size[[row, row + pairs]].tolist() == [[2, 2]] * 2
    return batch.index.tolist()


def threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("polydpo-")]
