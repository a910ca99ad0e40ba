"""The counters by which the programs of a launch know who arrives last: zero before a launch, and after it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
import triton
from torch import Tensor

SPARE = 2**16
_lock = threading.Lock()
_of_streams: dict[tuple[int, torch.device, int], Tensor] = {}
_spare: dict[torch.device, Tensor] = {}


def counters_of(n_pairs: int, device: torch.device) -> Tensor:
    """1 + B zeros, and some more. The kernel leaves them zero, so one buffer per stream serves all launches on it.

    A CUDA graph gets a buffer of its own: graphs captured on one stream may be replayed side by side.
    """
    # 16 bytes at least: kernels are compiled for addresses that are multiples of that, and no other during a capture.
    size = max(4, triton.next_power_of_2(1 + n_pairs))
    if device.type != "cuda":
        return torch.zeros(size, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return _graph_counters(size, device)
    return _stream_counters(size, device, torch.cuda.current_stream(device).cuda_stream)


def _graph_counters(size: int, device: torch.device) -> Tensor:
    """Taken from what is spare, for good. Zeros made within a capture would be one more launch at every replay."""
    with _lock:
        spare = _spare.get(device)
        if spare is None or len(spare) < size:
            return torch.zeros(size, dtype=torch.int32, device=device)
        _spare[device] = spare[size:]
        return spare[:size]


def _stream_counters(size: int, device: torch.device, stream: int) -> Tensor:
    """Made by a thread of its own, on that thread's default stream: where torch.compile warms up for CUDA graphs,
    what the calling thread allocates comes from a pool that does not outlive the graph."""

    def make(size: int) -> Tensor:
        counters = torch.zeros(size, dtype=torch.int32, device=device)
        with torch.cuda.device(device):
            made = torch.cuda.Event()
            made.record()
            made.synchronize()  # once: whoever reads them, on whatever stream, finds zeros
        return counters

    key = size, device, stream
    counters = _of_streams.get(key)
    if counters is None:
        with _lock, ThreadPoolExecutor(1) as thread:
            if device not in _spare:
                _spare[device] = thread.submit(make, SPARE).result()
            if key not in _of_streams:
                _of_streams[key] = thread.submit(make, size).result()
            counters = _of_streams[key]
    return counters
