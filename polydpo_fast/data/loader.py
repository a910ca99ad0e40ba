"""`PairLoader`: batches of preference pairs in an order that does not depend on who reads them."""

from __future__ import annotations

import inspect
import os
import weakref
from collections.abc import Generator, Iterator, Mapping
from copy import copy
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from torch.utils.data._utils.collate import default_collate_fn_map

from ..values import is_int
from .batch import PairBatch
from .dali.decoder import choose_decoder
from .equipment import Equipment
from .ledger import Ledger, options_as_json
from .loader_arguments import batch_form, check_arguments, check_device, decode_function, ranks_of
from .order import Order, Shuffled, order_of
from .pipeline import Pipeline
from .plan import Plan, Step
from .progress import Progress
from .reading import LoaderError
from .source import Source
from .sources import open_source
from .stats import LoaderStats

__all__ = ["LoaderError", "LoaderStats", "PairLoader"]

_STATE_VERSION = 2  # to be raised when the order, or what is drawn for a pair, is another
_NOT_PART_OF_TRANSFORM = frozenset(("win", "lose", "seeds", "out", "on_error", "limits", "threads", "cache"))
_DEFAULT_WINDOW = 8  # row groups, where single pairs cannot be read


class PairLoader(IterableDataset[PairBatch]):
    """Reads, decodes and yields batches of preference pairs: `for batch in loader`.

    The order of the pairs is a function of the seed and the epoch. It is the same for any number of ranks, workers and
    threads: step k of W ranks takes the next W * batch_size positions, rank r the r-th batch_size of them. Each epoch
    has every pair once, but for the last batch and for replacements of bad pairs.

    A pair that cannot be read or decoded never changes shapes or shifts others: another one takes its place, which
    depends on seed, epoch and position alone, and it is written to the ledger.

    `state_dict()` says what was yielded so far, in a few numbers; `load_state_dict()` continues there, also with
    another number of ranks or another batch size. Iterating begins at the epoch's start, or where a state that was
    loaded last says. Each complete iteration goes on to the next epoch, as `set_epoch` does. One that is left early,
    by `break` or `next(iter(loader))`, does not: the next iteration begins the same epoch again. To go on behind what
    was yielded, `loader.load_state_dict(loader.state_dict())` first; for epochs of fewer steps, `set_epoch(n)`.

    Args:
        source: what `open_source` takes, or a Source.
        batch_size: B, pairs per batch and rank.
        shuffle: False for the order of the source.
        seed: of the order, and of each pair's crop, mirror and dropped prompt. The same on all ranks.
        window: shuffle blocks (Parquet row groups, shards), and pairs only among so many successive blocks, so that
            reading stays nearly sequential. 0 shuffles all pairs among each other. None chooses: 0, but 8 for Parquet,
            where reading one pair means reading its row group.
        categories: None takes pairs as they are; "balanced" gives all categories the same share, a mapping other
            shares, in proportion. Pairs of a category with a large share then come more than once in an epoch. They
            are drawn one by one from the whole source, so shuffle and window say nothing then.
        last: what becomes of the pairs after the last full batch of all ranks: "drop" leaves them out, "pad" fills up
            with rows that are no pairs (`ok` False, weight 0), "wrap" with the first pairs of the epoch.
        rank, world_size: None for those of torch.distributed, or of torchrun's environment, or 0 of 1.
        prompt_dropout: probability, 0 to 1, that a pair's prompt is replaced by "".
        device: where the pixels go. To a CUDA device they are copied from page-locked memory beside the training.
        decoder: "cpp", "dali", or "auto": DALI if it is installed and device is a CUDA device.
        prefetch: batches that are ready or on their way, at least 1.
        readers: threads that read pairs ahead.
        timeout_s: seconds that reading one pair may take. Decoding clips has its own limit, `limits`.
        ledger: a file to which bad pairs are appended, one line of JSON each.
        max_bad_rate: the share of bad pairs above which LoaderError is raised: of those that were asked for so far, but
            of no fewer than 10,000 or the whole source, as a damaged shard has its bad pairs all at once.
        max_bad_run: more pairs in a row that cannot be read, or that cannot be decoded, raise it too. Those of a row
            group that cannot be read count as one.
        decode: everything else goes to `decode_pairs`, or, with `frames=` among them, to `decode_clips`: size=1024,
            crop="random", hflip=0.5, dtype=torch.bfloat16 and so on.

    Raises:
        TypeError, ValueError, SourceError: when it is made.
        LoaderError: while iterating, when too many pairs are bad.
    """

    def __init__(
        self,
        source: Any,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        window: int | None = None,
        categories: Mapping[str, float] | Literal["balanced"] | None = None,
        last: Literal["drop", "pad", "wrap"] = "drop",
        rank: int | None = None,
        world_size: int | None = None,
        prompt_dropout: float = 0.0,
        device: torch.device | str | int | None = None,
        decoder: Literal["auto", "cpp", "dali"] = "auto",
        prefetch: int = 2,
        readers: int = 4,
        timeout_s: float = 60.0,
        ledger: str | os.PathLike[str] | None = None,
        max_bad_rate: float = 0.05,
        max_bad_run: int = 50,
        **decode: Any,
    ) -> None:
        check_arguments(
            batch_size=batch_size, shuffle=shuffle, seed=seed, window=window, last=last, prompt_dropout=prompt_dropout,
            prefetch=prefetch, readers=readers, timeout_s=timeout_s, max_bad_rate=max_bad_rate, max_bad_run=max_bad_run,
        )  # fmt: skip
        self._device = check_device(device)
        choose_decoder(decoder, self._device or "cpu")  # one that is not there shows now
        self.source: Source = open_source(source)
        if len(self.source) == 0:
            raise ValueError(f"the source has no pairs: {dict(self.source.counts)}")
        self.batch_size = batch_size
        self._shuffle, self.seed, self._last = shuffle, seed, last
        self._window = _window_of(self.source, shuffle, window)
        if self._window and categories is None:
            self.source.expect_window(self._window)
        if categories is not None and (not shuffle or window):
            raise ValueError(
                f"categories is {str(categories)[:99]!r} with shuffle={shuffle} and window={window}; expected "
                "shuffle=True and no window, because pairs in shares are drawn from the whole source"
            )
        self._categories = categories
        self._rank, self._world_size = ranks_of(rank, world_size)
        if last == "drop" and len(self.source) < batch_size * self._world_size:
            raise ValueError(
                f"batch_size is {batch_size} on {self._world_size} ranks; the source has only {len(self.source)} pairs "
                "(last='pad' or 'wrap' would yield them)"
            )
        self.prompt_dropout = prompt_dropout
        self._prefetch, self._readers, self._timeout_s = prefetch, readers, timeout_s
        self._ledger, self._max_bad_rate, self._max_bad_run = Ledger(ledger), max_bad_rate, max_bad_run
        self._options = decode
        self._shape, self._dtype = batch_form(decode, self.source.ready, batch_size)
        ready = self.source.ready
        if ready is not None and ready.conditioning and prompt_dropout > 0:
            names = ", ".join(ready.conditioning)
            raise ValueError(
                f"prompt_dropout is {prompt_dropout}; expected 0, because the source has {names} of whole prompts: "
                'put those of "" in their place in the loop'
            )
        self.stats = LoaderStats()
        self._progress = Progress(len(self.source))
        self._ordered: tuple[int, Order] | None = None
        self._order()  # an error in `categories` shows now
        self._equipment = Equipment(decoder if ready is None else "cpp", self._device, decode)

    def __len__(self) -> int:
        """Batches in an epoch, of this rank."""
        whole, rest = divmod(len(self.source), self.batch_size * self._world_size)
        return whole + (rest > 0 and self._last != "drop")

    @property
    def epoch(self) -> int:
        """Of the next iteration, or of the one that is under way."""
        return self._progress.epoch

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration yields, from its start; nothing changes if it is that one already."""
        if not is_int(epoch) or epoch < 0:
            raise ValueError(f"epoch is {epoch!r}; expected an int >= 0")
        self._progress.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """What was yielded so far, to be stored as JSON or anything else. The same on all ranks after the same step."""
        state = {
            "version": _STATE_VERSION,
            "epoch": self.epoch,
            "position": self._progress.position,
            "fingerprint": self.source.fingerprint,
            **self._identity(),
        }
        worker = get_worker_info()
        return state if worker is None else {**state, "turns": self._turns(worker.num_workers, self._progress.begin)}

    def load_state_dict(self, state: Mapping[str, Any], *, changed_source: bool = False) -> None:
        """The next iteration continues after what the state says was yielded.

        Raises ValueError if the source has changed since (unless changed_source says that this is meant), or if the
        order is another: seed, shuffle, window, categories. The state of a DataLoader's worker, as torchdata keeps it,
        goes on only among as many workers and ranks, with the same batch size.
        """
        if not isinstance(state, Mapping) or state.get("version") != _STATE_VERSION:
            raise ValueError(f"state is {state!r}; expected what state_dict() returned (version {_STATE_VERSION})")
        if state.get("fingerprint") != self.source.fingerprint and not changed_source:
            raise ValueError(
                f"the source has changed: its fingerprint is {self.source.fingerprint}, in the state "
                f"it is {state.get('fingerprint')}; load_state_dict(state, changed_source=True) goes on all the same"
            )
        for name, own in self._identity().items():
            if state.get(name) != own:
                raise ValueError(f"the state was taken with {name}={state.get(name)!r}; this loader has {own!r}")
        epoch, position = state.get("epoch"), state.get("position")
        if not is_int(epoch) or not is_int(position) or epoch < 0 or position < 0:
            raise ValueError(f"state has epoch {epoch!r} and position {position!r}; expected ints >= 0")
        turns, worker = state.get("turns"), get_worker_info()
        begin: Any = turns.get("begin") if isinstance(turns, Mapping) else position
        here = self._turns(worker.num_workers if worker else 0, begin) if is_int(begin) else None
        if not is_int(begin) or turns not in (None, here):
            raise ValueError(f"the state was taken by a DataLoader's worker with {turns!r}; here it is {here}")
        self._progress.resume(epoch, position, begin)

    @property
    def ranks(self) -> tuple[int, int]:
        """The rank, and of how many."""
        return self._rank, self._world_size

    @property
    def transform(self) -> dict[str, Any]:
        """What the pixels depend on beside the files: the decoder's options, defaults included. Empty where the
        source's pairs are tensors already."""
        if self.source.ready is not None:
            return {}
        parameters = inspect.signature(decode_function(self._options)).parameters
        chosen = {name: parameter.default for name, parameter in parameters.items()} | self._options
        return {name: value for name, value in chosen.items() if name not in _NOT_PART_OF_TRANSFORM}

    def walk(self, indices: np.ndarray) -> Generator[PairBatch, None, None]:
        """These pairs, (N,) int64, once and in this order, in batches of batch_size; nothing of the loader changes.

        Where an index is -1, in what is missing of the last batch, and in place of bad pairs, which go to the ledger
        as ever, there is no pair (`ok` False). Crops and mirrors depend on the seed and the index alone; prompts are
        whole. Raises IndexError for other numbers.
        """
        if len(indices) and not -1 <= indices.min() <= indices.max() < len(self.source):
            raise IndexError(f"indices are from {indices.min()} to {indices.max()}; the source has {len(self.source)}")
        positions = np.where(indices < 0, len(self.source), indices)
        rest = -len(positions) % self.batch_size
        positions = np.concatenate((positions, np.full(rest, len(self.source)))).reshape(-1, self.batch_size)
        order = Shuffled(np.array([len(self.source)]), 0, window=0)
        plan = replace(self._plan(None), order=order, epoch=0, prompt_dropout=0.0, replace_bad=False)
        pipeline = Pipeline(plan, (Step(row, 0) for row in positions), self._equipment.buffers, LoaderStats())
        close = weakref.finalize(plan, pipeline.close)  # also at the end of the process, where no generator is closed
        try:
            for _ in positions:
                yield pipeline.next()[0]
        finally:
            close()

    def __iter__(self) -> Iterator[PairBatch]:
        worker = get_worker_info()
        number = self._progress.begin_pass(is_worker=worker is not None)
        share, of = (0, 1) if worker is None else (worker.id, worker.num_workers)
        plan, steps = self._plan(worker), self._steps(self._progress.position, self._progress.begin, share, of)
        return _Iteration(self, number, Pipeline(plan, steps, self._equipment.buffers, self.stats))

    def __getstate__(self) -> dict[str, Any]:
        # A copy, by `copy.copy` too, goes on by itself. The order is large, and soon made again.
        own = {"_progress": copy(self._progress), "_equipment": copy(self._equipment)}
        return {**self.__dict__, **own, "_ordered": None}

    # ------------------------------------------------------------------------------------------------ inside

    def _plan(self, worker: Any) -> Plan:
        """The plan of the next iteration, in a DataLoader's worker or None."""
        decode, device = self._equipment.set_up(worker)
        return Plan(
            source=self.source,
            order=self._order(),
            seed=self.seed,
            epoch=self.epoch,
            rank=self._rank,
            clips="frames" in self._options,
            replace_bad=True,
            options=options_as_json(self._options),
            decode=decode,
            batch_shape=self._shape,
            dtype=self._dtype,
            prompt_dropout=self.prompt_dropout,
            device=device,
            prefetch=self._prefetch,
            readers=self._readers,
            timeout_s=self._timeout_s,
            max_bad_rate=self._max_bad_rate,
            max_bad_run=self._max_bad_run,
            ledger=self._ledger,
        )

    def _identity(self) -> dict[str, Any]:
        """What makes the order, beside the source."""
        categories: Any = self._categories
        if isinstance(categories, Mapping):
            categories = {name: float(share) for name, share in categories.items()}
        return {"seed": self.seed, "shuffle": self._shuffle, "window": self._window, "categories": categories}

    def _order(self) -> Order:
        if self._ordered is None or self._ordered[0] != self.epoch:
            categories = None if self._categories is None else self.source.categories
            order = order_of(
                self.source.blocks, categories, self._categories, seed=self.seed, epoch=self.epoch, window=self._window
            )
            self._ordered = self.epoch, order
        return self._ordered[1]

    def _turns(self, workers: int, begin: int) -> dict[str, int]:
        """What decides which worker of a DataLoader takes which steps."""
        return {"workers": workers, "step": self.batch_size * self._world_size, "begin": begin}

    def _steps(self, position: int, begin: int, share: int, of: int) -> Iterator[Step]:
        """Of this rank from a position on; every `of`-th of them, counted from where the turns began."""
        pairs, size = len(self.source), self.batch_size * self._world_size
        offsets = self._rank * self.batch_size + np.arange(self.batch_size)
        last = pairs - size if self._last == "drop" else pairs - 1
        for start in range(position, last + 1, size):
            if (start - begin) // size % of == share:
                positions = start + offsets
                yield Step(positions % pairs if self._last == "wrap" else positions, min(start + size, pairs))


class _Iteration(Iterator[PairBatch]):
    """One pass. When it is dropped, by `break` or an exception, its threads end."""

    def __init__(self, loader: PairLoader, number: int, pipeline: Pipeline) -> None:
        self._loader, self._number, self._pipeline = loader, number, pipeline
        self._close = weakref.finalize(self, pipeline.close)

    def __next__(self) -> PairBatch:
        if not self._close.alive:
            raise StopIteration
        try:
            batch, end = self._pipeline.next()
            self._loader.stats.pairs += int(batch.ok.sum())
            self._loader._progress.advance(self._number, end)
            return batch
        except StopIteration:
            self._close()
            if self._pipeline.is_complete:
                self._loader._progress.end_pass(self._number)
            raise
        except BaseException:
            self._close()
            raise

    def state_dict(self) -> dict[str, Any]:
        """The loader's."""
        return self._loader.state_dict()


def _window_of(source: Source, shuffle: bool, window: int | None) -> int | None:
    """As `Shuffled` has it."""
    if not shuffle:
        return 0
    if window is None:
        return None if source.random_access else _DEFAULT_WINDOW
    return window or None


def _refuse_to_collate(batch: Any, **_: Any) -> Any:
    raise TypeError("a PairLoader yields batches already; expected DataLoader(loader, batch_size=None)")


default_collate_fn_map[PairBatch] = _refuse_to_collate
