"""Blocks of threads on memory that they share, for kernels that ptx.py has translated, and an eye on what they do.

`launch` runs the blocks ("programs" in Triton) a stretch at a time, in an order drawn from a seed. A `Fault` is raised
where a kernel

- loads or stores outside the elements of its tensors, or at an address that the width does not divide;
- stores into what it may only read, or loads what nobody has written;
- lets one thread read what another has written, or write what another has read or written, with nothing between that
  orders the two: a barrier within a block; between blocks an acquire-release atomic, with a barrier on either side.

Not seen are an overrun from one arm into the other where both are in one tensor; a store of the value that is there
already, which is no race here; and of several blocks that have read a byte, all but the last.
"""

import ctypes
import random
from collections.abc import Iterator, Sequence

import numpy as np
import ptx
import torch

WARP = 32


class Fault(Exception):  # noqa: N818
    """What a kernel must not do."""


class Region:
    """Memory that threads share, byte by byte: what may be done with it, and who did what last."""

    def __init__(self, name: str, address: int, data: np.ndarray, *, writable: bool) -> None:
        self.name, self.address, self.data = name, address, data
        self.readable = np.zeros(len(data), bool)
        self.writable = np.full(len(data), writable)
        # Of the last write and read of a byte: which block (-1: none), in which epoch, which thread (-2: several).
        self.written, self.read = (np.full((3, len(data)), -1) for _ in range(2))
        self.traffic = 0  # bytes loaded and stored, as often as they were


class Memory:
    """The tensors of a launch: their elements, not what lies between them."""

    def __init__(self) -> None:
        self._regions: dict[int, Region] = {}

    def give(self, name: str, x: torch.Tensor, *, readable: bool, writable: bool) -> None:
        storage = x.untyped_storage()
        if storage.data_ptr() not in self._regions:
            data = np.frombuffer((ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr()), np.uint8)
            self._regions[storage.data_ptr()] = Region(name, storage.data_ptr(), data, writable=False)
        region = self._regions[storage.data_ptr()]
        strides = (*(stride * x.itemsize for stride in x.stride()), 1)
        first = x.storage_offset() * x.itemsize
        places = torch.arange(len(region.data)).as_strided((*x.shape, x.itemsize), strides, first).flatten().numpy()
        region.readable[places] |= readable
        region.writable[places] |= writable

    def at(self, address: int) -> Region:
        for region in self._regions.values():
            if region.address <= address < region.address + len(region.data):
                return region
        raise Fault(f"address {address:#x} is in none of the tensors")

    def traffic(self) -> dict[str, int]:
        """Bytes that were loaded and stored, by the first name of the memory that they are in."""
        return {region.name: region.traffic for region in self._regions.values()}

    def unwritten(self, name: str) -> bool:
        """Whether a tensor that may only be written still has an element that nobody has written."""
        return any(bool((r.writable & ~r.readable).any()) for r in self._regions.values() if r.name == name)


class Block:
    """A block of threads within a launch: `self` of the functions that Program makes."""

    def __init__(self, number: int, grid: Sequence[int], threads: int, launched: "_Launch") -> None:
        self.number, self.launched, self.parameters = number, launched, launched.parameters
        index = number % grid[0], number // grid[0] % grid[1], number // grid[0] // grid[1]
        self.tid_x = np.arange(threads, dtype=np.uint32)
        self.ctaid_x, self.ctaid_y, self.ctaid_z = map(np.uint32, index)
        self.nctaid_x = np.uint32(grid[0])
        self.shared = Region("shared memory", ptx.SHARED_AT, np.zeros(launched.shared_bytes, np.uint8), writable=True)
        self.epoch = 1  # one more with each barrier
        # Of each block, before which of its epochs all is known to have happened: to all threads here, and to the one
        # that an atomic has told so since the last barrier.
        self.known, self.acquired, self.acquirer = np.zeros(launched.blocks, int), np.zeros(launched.blocks, int), -1

    # ------------------------------------------------------------------------------------- between threads

    def agreed(self, condition) -> bool:
        condition = np.unique(condition)
        if len(condition) != 1:
            raise NotImplementedError("a branch on which the threads of a block disagree")
        return bool(condition[0])

    def barrier(self) -> None:
        self.known, self.acquirer = np.maximum(self.known, self.acquired), -1
        self.epoch += 1

    def shuffle(self, value, lane):
        """The value of another lane of the warp."""
        return self._spread(value)[self.tid_x // WARP * WARP + lane % WARP]

    def warp_sum(self, value):
        lanes = self._spread(value).reshape(-1, WARP)
        return np.repeat(lanes.sum(1, dtype=lanes.dtype), WARP)

    def _spread(self, value):
        return np.broadcast_to(value, self.tid_x.shape)

    # --------------------------------------------------------------------------------------------- memory

    def load(self, address, mask, count: int, bits: int, old) -> list[np.ndarray]:
        lanes, region, places = self._places(address, mask, count * bits // 8)
        results = [np.zeros(len(self.tid_x), np.dtype(f"u{bits // 8}")) for _ in range(count)]
        if old is not None:
            for result, value in zip(results, old, strict=True):
                result[:] = value
        if region is None:
            return results
        if not region.readable[places].all():
            raise Fault(f"a load of {region.name} outside its elements, or of one that nobody has written")
        self._ordered(region, region.written, places, lanes, "read what another thread has written")
        self._note(region, places, lanes, wrote=False)
        values = np.ascontiguousarray(region.data[places]).view(np.dtype(f"u{bits // 8}"))
        for part, result in enumerate(results):
            result[lanes] = values[:, part]
        return results

    def store(self, address, mask, values) -> None:
        wide = np.stack([self._spread(value) for value in values], 1)
        lanes, region, places = self._places(address, mask, wide.shape[1] * wide.itemsize)
        if region is None:
            return
        if not region.writable[places].all():
            raise Fault(f"a store to {region.name} outside the elements that the kernel may write")
        data = np.ascontiguousarray(wide[lanes]).view(np.uint8)
        # Threads that hold the same value may all store it.
        new = (region.data[places] != data).any(1) | ~region.readable[places].all(1)
        self._ordered(region, region.written, places[new], lanes[new], "write what another thread has written")
        self._ordered(region, region.read, places[new], lanes[new], "write what another thread has read")
        region.data[places] = data
        kept = np.ascontiguousarray(region.data[places]).view(wide.dtype)
        # Of two NaN, which one it is depends on the order in which a lane has added them.
        floats = f"f{wide.itemsize}" if wide.itemsize > 1 else wide.dtype
        if ((kept != wide[lanes]) & ~(np.isnan(kept.view(floats)) & np.isnan(wide[lanes].view(floats)))).any():
            raise Fault(f"threads store different values at one place of {region.name}")
        region.readable[places] = True
        self._note(region, places, lanes, wrote=True)

    def load_matrix(self, address, matrix: int, transposed: bool):
        return ptx.joined(*(self.load(x, None, 1, 16, None)[0] for x in self._halves(address, matrix, transposed)))

    def store_matrix(self, address, matrix: int, transposed: bool, value) -> None:
        for half, at in enumerate(self._halves(address, matrix, transposed)):
            self.store(at, None, ((value >> np.uint32(16 * half)).astype(np.uint16),))

    def _halves(self, address, matrix: int, transposed: bool):
        """Where in memory the two elements are that a lane holds of a matrix of 8 x 8, 16 bits each.

        Lanes 8 matrix to 8 matrix + 7 have the addresses of its rows. A lane holds two neighbours of a row, or, if it
        is transposed, of a column.
        """
        if (self._spread(address) % 16).any():
            raise Fault("a row of a matrix at an address that 16 does not divide")
        along, across = self.tid_x % WARP // 4, self.tid_x % 4 * 2
        for half in np.uint32(0), np.uint32(1):
            row, column = (across + half, along) if transposed else (along, across + half)
            yield self.shuffle(address, np.uint32(8 * matrix) + row) + 2 * column

    def add(self, address, mask, value, old, ordered: bool):
        """An atomic addition by one thread. It makes known what is known here, and gets to know what others made."""
        lanes, region, places = self._places(address, mask, 4)
        assert len(lanes) == 1, "an atomic of several threads"
        result = self._spread(old).copy()
        place, thread = places[0], int(lanes[0])
        if not (region.readable[place] & region.writable[place]).all():
            raise Fault(f"an atomic on {region.name} outside the elements that the kernel may read and write")
        if ordered:
            clocks = self.launched.clocks.setdefault((region.name, int(place[0])), np.zeros_like(self.known))
            np.maximum(clocks, self.known, out=clocks)
            clocks[self.number] = max(clocks[self.number], self.epoch)
            self.acquired, self.acquirer = np.maximum(self.acquired, clocks), thread
            self._ordered(region, region.written, places, lanes, "add to what another thread has written")
        result[thread] = region.data[place].view(np.uint32)[0]
        region.data[place] = (result[thread] + self._spread(value)[thread]).reshape(1).view(np.uint8)
        self._note(region, places, lanes, wrote=True)
        region.written[1, place] -= 1  # the atomic itself is ordered, not only what came before it
        return result

    def _places(self, address, mask, size: int):
        """The lanes that take part, the region, and the bytes of each lane: (lanes, size)."""
        address = self._spread(address)
        lanes = self.tid_x.astype(int) if mask is None else np.flatnonzero(self._spread(mask))
        if not len(lanes):
            return lanes, None, None
        address = address[lanes].astype(np.int64)
        region = self.shared if address[0] < 2**32 else self.launched.memory.at(int(address[0]))
        if (address % size).any():
            raise Fault(f"{size} bytes of {region.name} at an address that {size} does not divide")
        first = address - region.address
        if (first < 0).any() or (first + size > len(region.data)).any():
            raise Fault(f"an access beyond {region.name}")
        return lanes, region, first[:, None] + np.arange(size)

    def _ordered(self, region: Region, last: np.ndarray, places: np.ndarray, lanes: np.ndarray, what: str) -> None:
        """What was done last with each place is ordered before what its lane does now."""
        block, epoch, thread = last[:, places]
        lane = lanes[:, None]
        here = (block == self.number) & (epoch == self.epoch) & (thread != lane)
        known = np.where(lane == self.acquirer, np.maximum(self.known, self.acquired)[block], self.known[block])
        there = (block >= 0) & (block != self.number) & (epoch >= known)
        if here.any() or (region is not self.shared and there.any()):
            raise Fault(f"threads of {'one block' if here.any() else 'two blocks'} {what} in {region.name}")

    def _note(self, region: Region, places: np.ndarray, lanes: np.ndarray, *, wrote: bool) -> None:
        region.traffic += places.size
        last = region.written if wrote else region.read
        lane = np.broadcast_to(lanes[:, None], places.shape)
        again = (last[0, places] == self.number) & (last[1, places] == self.epoch) & (last[2, places] != lane)
        last[0, places], last[1, places] = self.number, self.epoch
        last[2, places] = lane
        several = again | (last[2, places] != lane)
        last[2, places[several]] = -2


class _Launch:
    def __init__(self, memory: Memory, parameters: list, shared_bytes: int, blocks: int) -> None:
        self.memory, self.parameters, self.shared_bytes, self.blocks = memory, parameters, shared_bytes, blocks
        self.clocks: dict[tuple[str, int], np.ndarray] = {}


def launch(
    program: ptx.Program, grid: Sequence[int], parameters: list, memory: Memory, shared_bytes: int, seed: int
) -> None:
    """Runs all blocks of a grid, up to eight at a time. parameters: a pointer or the bits of a number each."""
    grid = (*grid, 1, 1)[:3]
    blocks = grid[0] * grid[1] * grid[2]
    # After the kernel's own, Triton's: scratch that no kernel here uses.
    parameters = parameters + [np.uint64(0)] * (program.parameters - len(parameters))
    launched = _Launch(memory, parameters, shared_bytes, blocks)
    draw = random.Random(seed)
    waiting = list(range(blocks))
    draw.shuffle(waiting)
    running: list[Iterator[None]] = []
    with np.errstate(all="ignore"):
        while waiting or running:
            while waiting and len(running) < 8:
                running.append(program.run(Block(waiting.pop(), grid, program.threads, launched)))
            chosen = draw.randrange(len(running))
            for _ in range(draw.choice((1, 1, 2, 50))):
                try:
                    next(running[chosen])
                except StopIteration:
                    del running[chosen]
                    break
