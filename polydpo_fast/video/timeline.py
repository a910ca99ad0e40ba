"""When the frames of a clip are shown, and which moments of a pair of clips are taken."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Timeline", "TooShortError", "choose_times"]

_ROUNDED = Fraction(1, 1000)  # seconds: to milliseconds times are rounded at the most


class Timeline(NamedTuple):
    """The frames of a clip, in the order in which they are shown; at least one."""

    pts: NDArray[np.int64]  # ascending
    unit: Fraction  # seconds

    def span(self) -> int:
        """Ticks from the first frame to the last."""
        return int(self.pts[-1]) - int(self.pts[0])

    def ticks(self) -> int:
        """Ticks from the first frame to the end of the last, which is shown as long as the one before it."""
        last = int(self.pts[-1]) - int(self.pts[-2]) if len(self.pts) > 1 else 1
        return self.span() + last

    def duration(self) -> Fraction:
        """Seconds to the end. Times that are rounded may lie further apart than the frames, and tell too much of it."""
        told, rate = self.ticks() * self.unit, self._rate()
        exact = told if rate is None else len(self.pts) / rate
        return exact if self.span() * self.unit < exact < told else told

    def lap(self) -> Fraction:
        """Seconds that one round of a looped clip takes. If the rate is constant, that of as many frames; else the last
        frame is shown as long as the others on average."""
        count, rate = len(self.pts), self._rate()
        if rate is not None:
            return count / rate
        return self.unit if count == 1 else self.span() * self.unit * Fraction(count, count - 1)

    def _rate(self) -> Fraction | None:
        """Frames a second, if that is constant but for the clock's rounding: the simplest rate that fits."""
        frames, ticks = np.arange(1, len(self.pts)), self.pts[1:] - self.pts[0]
        if not len(frames):
            return None
        for out in (0.5, 1.0):  # ticks: where the first time was rounded as well, differences are out by up to one
            shortest, longest = float(((ticks - out) / frames).max()), float(((ticks + out) / frames).min())
            if 0 < shortest < longest:
                low, high = 1 / (Fraction(longest) * self.unit), 1 / (Fraction(shortest) * self.unit)
                for slower in (Fraction(1), Fraction(1000, 1001)):  # NTSC's rates are no simple fractions
                    if (whole := math.ceil(low / slower)) <= high / slower:
                        return whole * slower
                return _simplest(low, high)
        return None

    def slack(self, clock: Fraction = Fraction(0)) -> Fraction:
        """How far a time may lie before the frame that it means, because both are rounded, to ticks of the two clocks:
        as the first frame's are, too, each by almost a tick."""
        return (min(self.unit, _ROUNDED) + min(clock, _ROUNDED)) * Fraction(99, 100)

    def over(self, clock: Fraction = Fraction(0)) -> Fraction:
        """From when on one frame more would be shown, at the earliest, as times are rounded; in seconds. clock: of the
        clip that such a moment is taken from, if any."""
        end = self.duration()
        return end - min(self.slack(clock), end / (2 * len(self.pts)))

    def begun(self, moment: Fraction) -> int:
        """How many frames begin before that moment, in seconds from the first frame."""
        ticks = math.ceil(moment / self.unit)
        if ticks > self.span():
            return len(self.pts)
        return int(np.searchsorted(self.pts, int(self.pts[0]) + ticks))

    def times(self, first: int, last: int | None) -> list[Fraction]:
        """When these frames begin, in seconds from the first frame."""
        return [(int(pts) - int(self.pts[0])) * self.unit for pts in self.pts[first:last]]

    def shown_at(self, times: Sequence[Fraction], short: str, clock: Fraction = Fraction(0)) -> list[int]:
        """The pts of the frame that is shown at each time. clock: of the clip that the times are taken from, if any."""
        first, lap, slack = int(self.pts[0]), self.lap(), self.slack(clock)
        if short == "loop":
            times = [(time + slack) % lap - slack for time in times]
        ticks = np.array([first + max(0, min(time // self.unit, self.span())) for time in times], np.int64)
        places = np.searchsorted(self.pts, ticks, side="right") - 1
        here, after = self.pts[places].tolist(), self.pts[np.minimum(places + 1, len(self.pts) - 1)].tolist()
        shown = []
        for time, pts, following in zip(times, here, after, strict=True):
            past, ahead = time - (pts - first) * self.unit, (following - first) * self.unit - time
            shown.append(following if 0 < ahead < min(past, slack) else pts)
        return shown


def _simplest(low: Fraction, high: Fraction) -> Fraction:
    """The fraction from low to high with the smallest denominator."""
    whole = math.ceil(low)
    if whole <= high:
        return Fraction(whole)
    whole -= 1
    return whole + 1 / _simplest(1 / (high - whole), 1 / (low - whole))


class TooShortError(ValueError):
    """An arm ends before the last moment. arm: 0 or 1."""

    def __init__(self, arm: int, message: str) -> None:
        super().__init__(message)
        self.arm = arm


def choose_times(
    arms: tuple[Timeline, Timeline],
    frames: int,
    fps: float | Fraction | None,
    start: str | float | Fraction,
    drawn: float,
    short: str,
) -> list[Fraction]:
    """The times, from each clip's first frame, of the frames to take from both arms.

    The arguments are those of `decode_clips`; `drawn`, from 0 to 1, is where a random start falls.
    """
    if fps is None:  # the first arm's own times mean its frames exactly
        over = [arms[0].duration(), arms[1].over(arms[0].unit)]
        times = _times_of_frames(arms[0], frames, start, drawn, short, over[1])
    else:
        over = [arm.over() for arm in arms]
        times = _times_at_rate(arms, frames, Fraction(fps).limit_denominator(1_000_000), start, drawn)
    if short == "error":
        for arm, timeline in enumerate(arms):
            if times[-1] >= over[arm]:
                raise TooShortError(
                    arm,
                    f"it ends after {float(timeline.duration()):.3f} s ({len(timeline.pts)} frames); "
                    f"expected a frame at {float(times[-1]):.3f} s, or short='repeat' or 'loop'",
                )
    return times


def _times_of_frames(
    clip: Timeline, frames: int, start: str | float | Fraction, drawn: float, short: str, until: Fraction
) -> list[Fraction]:
    """Of successive frames of the clip, and beyond its end. until: when the other arm ends."""
    count, end = len(clip.pts), clip.duration()
    begin = end  # where there are no frames any more
    if isinstance(start, str):
        # Beyond the end, the places to start from are those of a clip that fits exactly.
        places = max(0, clip.begun(until) - frames)
        first = places // 2 if start == "center" else int(drawn * (places + 1))
    else:
        begin = max(begin, Fraction(start).limit_denominator(1_000_000))
        laps, rest = divmod(Fraction(start), clip.lap()) if short == "loop" else (0, Fraction(start))
        first = laps * count + clip.begun(rest - clip.slack())  # floats are not exact
    times = clip.times(first, first + frames)
    while len(times) < frames:
        if short == "loop":
            lap, place = divmod(first + len(times), count)
            times.append(clip.times(place, place + 1)[0] + lap * clip.lap())
        else:
            times.append(max(times[-1] + end / count, begin) if times else begin)
    return times


def _times_at_rate(
    arms: tuple[Timeline, Timeline], frames: int, fps: Fraction, start: str | float | Fraction, drawn: float
) -> list[Fraction]:
    if isinstance(start, str):
        ends, length = [arm.duration() for arm in arms], (frames - 1) / fps
        slack = max(Fraction(0), min(ends) - length)
        # Strictly before the end of what is left, so that the last frame is still shown, by either clock.
        begin = slack / 2 if start == "center" else slack * Fraction(drawn).limit_denominator(1 << 32)
        room = min(end - min(arm.unit, _ROUNDED) for arm, end in zip(arms, ends, strict=True))
        begin = max(Fraction(0), min(begin, slack - min(arm.unit for arm in arms), room - length))
    else:
        begin = Fraction(start).limit_denominator(1_000_000)
    return [begin + k / fps for k in range(frames)]
