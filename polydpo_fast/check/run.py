"""What is checked on which device, how often, and what is left out."""

from __future__ import annotations

import importlib.util
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from ..backends import available_backends
from . import clips, data, images, loading, losses
from .cases import LARGE, SMALL, SPECIAL, Case, draw
from .exact import errors_of
from .planes import planes
from .report import Finding, Report, must

__all__ = ["check"]

_BACKENDS = ("cpp", "triton", "reference")
_GATES = {**data.GATES, **losses.GATES}
# How many cases, by default and thorough; the interpreter of Triton takes a thousand times as long as a kernel.
_CASES, _INTERPRETED, _COMPILED = (164, 820), (24, 120), (4, 8)
_ON_GPU = 64, 320  # nearly each of them compiles a few kernels
_IMAGES, _CLIPS, _PLANES = (24, 120), (4, 20), (6, 30)
# With fewer cases a part does not count as checked. The slowest machines have time for these.
_LEAST, _LEAST_SLOW, _LEAST_DATA = 20, 8, 2
_SMALL = 1 << 14  # elements, few enough for the interpreter
_SECONDS = 50.0  # less than a minute, also where the last case takes long


def check(
    *,
    seed: int = 0,
    thorough: bool = False,
    backend: str | None = None,
    device: str | None = None,
    case: int | None = None,
    seconds: float | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """Checks the losses on the devices of this machine, decoding and loading; see `polydpo_fast.check`.

    Args:
        seed: what the cases are drawn from, >= 0.
        thorough: five times as many cases, other compilers and the operators' contracts.
        backend: only this backend of the loss, and no decoding.
        device: only this device, "cpu" or "cuda" (with an index); decoding is checked with "cpu".
        case: only this case of the losses, and no decoding.
        seconds: after which no further cases are begun; None for 50, or no limit if thorough. They are divided among
            backends and data; where one of these gets too few cases, the report has not passed.
        progress: told what is being checked.

    Raises ValueError for a backend or device that is not there.
    """
    report = Report(seed, thorough)
    begin = time.monotonic()
    if seconds is None:
        seconds = math.inf if thorough else _SECONDS
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])] if device is None else [device]
    for name in devices:
        _check_device(name)
    wanted = [(name, place) for place in devices for name in _BACKENDS if backend in (None, name)]
    there = [(name, place) for name, place in wanted if name in available_backends(place)]
    if not there:
        reasons = "; ".join(f"{name} on {place}: {_why(name, place)}" for name, place in wanted)
        raise ValueError(f"backend is {backend!r}; {reasons or 'expected one of ' + ', '.join(map(repr, _BACKENDS))}")
    for name, place in wanted:
        if (name, place) not in there:
            report.skipped[f"{name} on {place}"] = _why(name, place)
    jobs = _jobs(report, there, backend, devices, case)
    for index, job in enumerate(jobs):
        progress(job.name)
        now = time.monotonic()
        share = job.weight / sum(later.weight for later in jobs[index:])
        with losses.quiet():
            job.run(now + share * max(0.0, begin + seconds - now))
    if case is None and device is None and "cuda" not in devices:
        report.skipped["CUDA or ROCm"] = "there is no such device"
    report.seconds = time.monotonic() - begin
    return report


class _Job(NamedTuple):
    """A part of the checks. weight: its share of the time that is left. run: takes the time at which to stop."""

    name: str
    weight: float
    run: Callable[[float], None]


def _jobs(
    report: Report, there: list[tuple[str, str]], backend: str | None, devices: list[str], case: int | None
) -> list[_Job]:
    """Data first: its parts are short, and what they leave of their time goes to the losses."""
    jobs = []
    if case is None and backend is None:
        for name, place in there:
            if name != "cpp":
                weight = 3 if name == "triton" else 1  # each colour is a kernel to compile
                jobs.append(_Job(f"planes, {name} on {place}", weight, partial(_planes, report, name, place)))
        if "cpu" in devices:
            jobs += _data(report)
    if case is None:
        for name, place in there:
            if name != "reference":
                jobs.append(_Job(f"torch.compile, {name} on {place}", 2, partial(_compiled, report, name, place)))
    # The backends that take the same cases take them in turns: drawing them and the truth cost as much as checking.
    for place in devices:
        slow = [name for name, at in there if at == place == "cpu" and name == "triton"]
        for names in (slow, [name for name, at in there if at == place and name not in slow]):
            if names:
                job = partial(_losses, report, names, place, None if case is None else [case])
                jobs.append(_Job(f"{' and '.join(names)} on {place}", 8 if names == slow else 4 * len(names), job))
    return jobs


def _check_device(device: str) -> None:
    kind, colon, index = device.partition(":")
    if device != "cpu" and (kind != "cuda" or (colon and not index.isdecimal())):
        raise ValueError(f"device is {device!r}; expected 'cpu', or 'cuda' with an index or without")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {device!r}; there are {torch.cuda.device_count()} CUDA or ROCm devices here")


def _why(backend: str, device: str) -> str:
    if backend == "cpp":
        return "the C++ extension is not built" if device == "cpu" else "C++ is for the CPU"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return "set TRITON_INTERPRET=1 to run the GPU kernels in Triton's interpreter"


# --------------------------------------------------------------------------------------------------- losses


def _losses(report: Report, backends: list[str], device: str, numbers: list[int] | None, until: float) -> None:
    interpreted = device == "cpu" and backends == ["triton"]
    count = (_INTERPRETED if interpreted else _CASES if device == "cpu" else _ON_GPU)[report.thorough]
    least = _LEAST if device == "cpu" and not interpreted else _LEAST_SLOW
    if interpreted and numbers is None and time.monotonic() < until:
        # Of a sample so large that a program reads several blocks, only the errors: all else would take half a minute.
        case = draw(report.seed, LARGE)
        found = _found(losses.examine_errors, case, errors_of(case), "triton", device, False)
        _tried(report, "triton", device, case, found)
    for done, case in enumerate(itertools.islice(_cases(report, interpreted, numbers), count)):
        if time.monotonic() > until:
            for backend in backends:
                where = f"{backend} on {device}"
                report.out_of_time(where, f"case {case.number}", done, min(least, count))
            break
        errors = errors_of(case)
        for backend in backends:
            _tried(report, backend, device, case, losses.examine(case, errors, backend, device))


def _compiled(report: Report, backend: str, device: str, until: float) -> None:
    """torch.compile; and what PyTorch asks of operators, if thorough."""
    interpreted = backend == "triton" and device == "cpu"
    compilers = ["aot_eager"]
    if report.thorough and not interpreted:
        reason = _no_inductor(device)
        if reason:
            report.skipped[f"torch.compile with inductor, {backend} on {device}"] = reason
        else:
            compilers.append("inductor")
    plain = (case for case in _cases(report, True, None) if case.edge == "" and case.number not in SPECIAL["many"])
    with_alpha = (case for case in plain if isinstance(case.options.get("alpha"), float))
    few = itertools.chain(itertools.islice(with_alpha, 1), plain)
    for done, case in enumerate(itertools.islice(few, _COMPILED[report.thorough] // (2 if interpreted else 1))):
        if time.monotonic() > until:
            report.out_of_time(f"torch.compile, {backend} on {device}", f"case {case.number}", done, 1)
            break
        for compiler in compilers:
            found = _found(losses.examine_compiled, case, backend, device, compiler)
            _tried(report, backend, device, case, found, compiler)
        if report.thorough:
            found = _found(losses.examine_operators, case, backend, device)
            _tried(report, backend, device, case, found)


def _cases(report: Report, small: bool, numbers: list[int] | None) -> Iterator[Case]:
    """Those of the numbers; or all from 0 on, the special ones after the least."""
    special = [number for numbers in SPECIAL.values() for number in numbers]
    others = (number for number in itertools.count() if number not in special)
    least = _LEAST_SLOW if small else _LEAST
    in_turn = itertools.chain(itertools.islice(others, least), SMALL if small else special, others)
    for number in in_turn if numbers is None else numbers:
        case = draw(report.seed, number)
        if numbers is not None or not small or case.elements <= _SMALL:
            yield case


def _found(function: Callable[..., Finding], *arguments: object) -> Iterator[Finding]:
    """Called only when it is iterated over, where `_gather` catches what it raises."""
    yield function(*arguments)


def _tried(
    report: Report, backend: str, device: str, case: Case, findings: Iterable[Finding], compiler: str = ""
) -> None:
    what = f"{compiler}, {case}" if compiler else str(case)
    _gather(report, backend, device, zip(findings, itertools.repeat(what)), case.number, what)


def _gather(
    report: Report,
    subject: str,
    device: str,
    found: Iterable[tuple[Finding, str]],
    number: int | None = None,
    what: str = "",
) -> None:
    """Adds findings, each with what was tried. An exception is one too: no case here should raise any."""
    try:
        for finding, what in found:
            report.add(subject, device, finding, _GATES[finding.check], case=number, what=what)
    except Exception as error:
        note = f"{type(error).__name__}: {error}".split("\n")[0][:500]
        report.add(subject, device, must("runs", False, note), _GATES["runs"], case=number, what=what)


def _no_inductor(device: str) -> str:
    """Why torch.compile's own compiler cannot run here, or nothing."""
    try:
        torch._dynamo.reset()
        torch.compile(lambda x: 2 * x + 1, backend="inductor")(torch.ones(4, device=device))
    except Exception as error:
        return f"{type(error).__name__}: {error}".split("\n")[0][:200]
    return ""


# ----------------------------------------------------------------------------------------------------- data


def _planes(report: Report, backend: str, device: str, until: float) -> None:
    def job(number: int) -> Iterator[tuple[Finding, str]]:
        return planes(report.seed, number, device, backend)

    _numbered(report, f"planes, {backend}", device, _PLANES[report.thorough], job, until)


def _data(report: Report) -> list[_Job]:
    seed = report.seed
    parts: list[tuple[str, tuple[str, ...], int, float, Callable[[int], Iterator[tuple[Finding, str]]]]] = [
        ("PairLoader", (), 1, 1, lambda _: loading.loader(seed)),
        ("PairLoader of manifest, tar", (), 2, 1, lambda number: loading.stored(seed, ("manifest", "tar")[number])),
        ("PairLoader of Parquet", ("pyarrow",), 1, 1, lambda _: loading.stored(seed, "Parquet")),
        ("decode_clips", ("av",), _CLIPS[report.thorough], 1, lambda number: clips.clip(seed, number)),
        ("decode_pairs", ("PIL",), _IMAGES[report.thorough], 3, lambda number: images.image(seed, number)),
    ]
    jobs = []
    for name, packages, count, weight, part in parts:
        reason = data.missing(*packages)
        if reason:
            report.skipped[name] = reason
        else:
            jobs.append(_Job(name, weight, partial(_numbered, report, name, "cpu", count, part)))
    return jobs


def _numbered(
    report: Report,
    subject: str,
    device: str,
    count: int,
    part: Callable[[int], Iterator[tuple[Finding, str]]],
    until: float,
) -> None:
    for number in range(count):
        if time.monotonic() > until:
            report.out_of_time(f"{subject} on {device}", f"number {number}", number, min(count, _LEAST_DATA))
            break
        _gather(report, subject, device, part(number))
