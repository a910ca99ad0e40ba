"""A machine with two CUDA devices that does everything as late as CUDA may: when somebody waits for it.

Streams are queues of work. A copy reads the host's memory when it is carried out, and keeps none of it alive; until
then its result is garbage. The current device and stream are a thread's own, and a thread begins with device 0.
To make a device the current one makes a context on it, as CUDA has it from version 12 on.
"""

import ctypes
import threading
from contextlib import contextmanager

import torch

GARBAGE = 255
contexts = set()  # the devices that have one
_LOCK = threading.RLock()
_thread = threading.local()


class Stream:
    def __init__(self, device=None):
        self.device = torch.device("cuda", index_of(device))
        self.todo, self.done = [], 0

    def ask(self, work):
        with _LOCK:
            self.todo.append(work)

    def run(self, until=None):
        with _LOCK:
            while self.done < (len(self.todo) if until is None else until):
                self.todo[self.done]()
                self.done += 1

    synchronize = run

    def wait_event(self, event):
        self.ask(event.synchronize)


class Event:
    stream = at = None

    def record(self, stream):
        self.stream, self.at = stream, len(stream.todo)

    def query(self):
        return self.stream.done >= self.at

    def synchronize(self):
        self.stream.run(self.at)


class OnDevice(torch.Tensor):
    """Its numbers are there when the streams of its work were waited for."""

    @property
    def device(self):
        return self.where

    def record_stream(self, stream):
        self.used_by.append(stream)

    def __setitem__(self, places, values):
        target, places, values = plain(self), plain(places), plain(values)
        current_stream(self.device).ask(lambda: target.__setitem__(places, values))


def plain(x):
    return x.as_subclass(torch.Tensor) if isinstance(x, OnDevice) else x


def on_device(x, index):
    result = x.as_subclass(OnDevice)
    result.where, result.used_by, result.made_by = torch.device("cuda", index), [], current_stream(index)
    return result


def read(x):
    """What a kernel on the current stream finds."""
    stream = current_stream(x.device)
    assert stream in x.used_by or stream is x.made_by, "its memory may be given to others while it is read"
    stream.synchronize()
    return plain(x).clone()


def index_of(device):
    if isinstance(device, int):
        return device
    index = None if device is None else torch.device(device).index
    return current_device() if index is None else index


def current_device():
    return getattr(_thread, "device", 0)


def set_device(index):
    _thread.device = index_of(index)
    contexts.add(_thread.device)


def current_stream(device=None):
    index = index_of(device)
    return getattr(_thread, "streams", {}).get(index) or _default[index]


@contextmanager
def stream(chosen):
    device, streams = current_device(), getattr(_thread, "streams", {})
    set_device(chosen.device)
    _thread.streams = {**streams, chosen.device.index: chosen}
    try:
        yield
    finally:
        set_device(device)
        _thread.streams = streams


_default = [Stream(0), Stream(1)]


class Late:
    """page_locked: all the memory that was, by its address."""

    def __init__(self, monkeypatch):
        self.page_locked = {}
        _default[:] = Stream(0), Stream(1)
        contexts.clear()
        self._empty, self._to = torch.empty, torch.Tensor.to
        for name, value in (
            *dict(Stream=Stream, Event=Event, stream=stream, current_stream=current_stream).items(),
            *dict(set_device=set_device, current_device=current_device).items(),
            *dict(device_count=lambda: 2, is_available=lambda: True).items(),
        ):
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch, "empty", self.empty)
        monkeypatch.setattr(torch.Tensor, "to", lambda x, *given, **options: self.to(x, *given, **options))

    def empty(self, *shape, pin_memory=False, **options):
        result = self._empty(*shape, **options)
        if pin_memory:
            self.page_locked[result.data_ptr()] = result
        return result

    def to(self, x, *given, non_blocking=False, **options):
        device = next((place for place in (*given, options.get("device")) if isinstance(place, torch.device)), None)
        if device is None or device.type != "cuda":
            assert not isinstance(x, OnDevice)
            return self._to(x, *given, non_blocking=non_blocking, **options)
        if isinstance(x, OnDevice):
            assert x.device.index == index_of(device)
            return x
        result = torch.full_like(x, GARBAGE)
        if non_blocking and x.data_ptr() in self.page_locked:
            there, here, size = result.data_ptr(), x.data_ptr(), x.nbytes
            # `result` is held by the copy: its memory is the device's, and goes back when its streams are done.
            current_stream(device).ask(lambda result=result: ctypes.memmove(there, here, size))
        else:
            staged = x.clone()
            current_stream(device).ask(lambda: result.copy_(staged))
            if not non_blocking:
                current_stream(device).synchronize()
        return on_device(result, index_of(device))
