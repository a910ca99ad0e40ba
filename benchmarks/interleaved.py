"""Ways to do one thing, timed in turns, so that a slow phase of the machine is everybody's; and their report."""

import time
from collections.abc import Callable, Mapping


def cpu_seconds(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each way in each round, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds + 1):
        for name, way in ways.items():
            begin = time.process_time()
            way()
            if round_ > 0:
                times[name].append(time.process_time() - begin)
    return times


def report(benchmark, group: str, seconds: list[float], **extra: float) -> None:
    """Gives pytest-benchmark times that have been measured already: its clock is set forward by them."""
    clock, rounds = [0.0], iter(seconds)

    def tick() -> None:
        clock[0] += next(rounds)

    benchmark.group = group
    benchmark.extra_info.update(extra)
    benchmark._timer = lambda: clock[0]
    benchmark.pedantic(tick, rounds=len(seconds))
