"""Plots of a file of results: each a function of the results that gives a figure, or KeyError without its suite.

Colours are Okabe and Ito's and one of Tol's, told apart by the colour-blind; ours is always the first.
"""

import statistics
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
from tables import named, rows_of, steps, unit

COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#F0E442", "#000000", "#882255"]
MARKERS = "osD^v<>PX*"  # for those who see no colours
SHORT = EngFormatter(sep="")  # 10k, 1M
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: light, and readable by a screen reader
    "svg.hashsalt": "polydpo_fast",
    "figure.constrained_layout.use": True,
}


def roofline(results: dict) -> Figure:
    """Bandwidth of the loss, forward and backward, against the size of the tensors."""
    cases = steps(results)
    figure, axes = plt.subplots(figsize=(7, 3.6))
    for way, colour, marker in zip(("ours", "torch.compile", "eager"), COLOURS, MARKERS, strict=False):
        points = sorted((ways[way]["bytes"], ways[way]["bytes"] / ways[way]["median"]) for ways in cases if way in ways)
        if points:
            axes.plot(*zip(*points, strict=True), marker, label=way, color=colour, alpha=0.85, markersize=5)
    copy = statistics.median(ways["copy"]["bytes"] / ways["copy"]["median"] for ways in cases)
    axes.axhline(copy, color="black", linewidth=1, linestyle="--")
    axes.annotate("copying 256 MB", (0, copy), (4, 4), ("axes fraction", "data"), "offset points")
    axes.set(xscale="log", yscale="log", xlabel="bytes that must be moved", ylabel="bytes per second")
    axes.set_title("Bandwidth of the loss, forward and backward", loc="left")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def label_noise(results: dict) -> Figure:
    """Right decisions against the share of flipped labels, a line for each alpha; the seeds as dots."""
    rows = list(rows_of(results, "label_noise").values())
    figure, axes = plt.subplots(figsize=(7, 3))
    for way, colour, marker in zip(rows[0], COLOURS, MARKERS, strict=False):
        points = [(100 * found[way]["noise"], [100 * one for one in found[way]["accuracies"]]) for found in rows]
        at, means = [noise for noise, _ in points], [statistics.mean(right) for _, right in points]
        axes.plot(at, means, f"{marker}-", label=way, color=colour, markersize=5)
        for noise, right in points:
            axes.plot([noise] * len(right), right, ".", color=colour, alpha=0.4, markersize=4)
    axes.set(xlabel="% of the training's labels that are flipped", ylabel="% of other pairs decided right")
    axes.set_title("Poly-DPO on the demo's digits", loc="left")
    axes.legend(loc="lower left")
    return figure


def loss_ratios(results: dict) -> Figure:
    cases = {f"{ways['ours']['model']}, {ways['ours']['dtype']}": ways for ways in steps(results)}
    return _ratios(cases, "Forward and backward of the loss: time, in multiples of ours")


def decode_ratios(results: dict) -> Figure:
    rows = {named(case): ways for case, ways in rows_of(results, "decode").items()}
    return _ratios(rows, "An image, from bytes to the tensor: CPU time, in multiples of ours")


def _ratios(cases: dict[str, dict], title: str) -> Figure:
    """A line for each case, a dot for each way."""
    ways = [
        way for way in dict.fromkeys(way for found in cases.values() for way in found) if way not in ("ours", "copy")
    ]
    figure, axes = plt.subplots(figsize=(7, 1.2 + 0.27 * len(cases)))
    for number, way in enumerate(ways):
        points = [
            (found[way]["median"] / found["ours"]["median"], line)
            for line, found in enumerate(cases.values())
            if way in found
        ]
        colour = COLOURS[1:][number % (len(COLOURS) - 1)]
        marker = MARKERS[number % len(MARKERS)]
        axes.plot(*zip(*points, strict=True), marker, label=named(way), color=colour, markersize=5)
    axes.axvline(1, color=COLOURS[0], linewidth=2, label="ours", zorder=1)
    axes.set(
        xscale="log", yticks=range(len(cases)), yticklabels=list(cases), xlabel="right of the line: slower than ours"
    )
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.invert_yaxis()
    axes.set_title(title, loc="left")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def clips(results: dict) -> Figure:
    """Frames per second of CPU time, a group of bars for each bit rate."""
    rates = {case: ways for case, ways in rows_of(results, "clips").items() if case.startswith("720p at ")}
    ways = list(dict.fromkeys(way for found in rates.values() for way in found if way != "only_writing"))
    figure, axes = plt.subplots(figsize=(7, 3.6))
    height = 0.8 / len(rates)
    for number, (case, found) in enumerate(rates.items()):
        present = [line for line, way in enumerate(ways) if way in found]
        values = [1 / found[ways[line]]["median"] for line in present]
        at = [line + (number - (len(rates) - 1) / 2) * height for line in present]
        axes.barh(at, values, height, label=case, color=COLOURS[number])
    axes.set(yticks=range(len(ways)), yticklabels=list(map(named, ways)), xlabel="frames per second of CPU time")
    axes.invert_yaxis()
    axes.legend()
    axes.set_title("Clips of 720p H.264, one thread", loc="left")
    return figure


def training(results: dict) -> Figure:
    """Where the time of a step goes, and what can be done ahead of it."""
    rows = rows_of(results, "training")
    steps, parts = rows["training step, 142 M parameters"], rows["parts of the step"]
    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 3.2), height_ratios=(1, 2))
    left = 0.0
    for (name, row), colour in zip(parts.items(), COLOURS, strict=False):
        above.barh(0, row["median"], left=left, color=colour, label=name)
        left += row["median"]
    above.set(yticks=[], xlabel="CPU seconds")
    above.legend(ncols=2, loc="lower left", bbox_to_anchor=(0, 1), fontsize=8)
    below.barh(list(steps), [row["median"] for row in steps.values()], color=COLOURS[0], height=0.6)
    below.set(xlabel="CPU seconds of a step")
    below.invert_yaxis()
    return figure


def scaling(results: dict) -> Figure:
    """One small plot for each curve."""
    curves: dict[str, list[dict]] = {}
    for ways in rows_of(results, "scaling").values():
        curves.setdefault(ways["ours"]["curve"], []).append(ways)
    columns = 2
    figure, grid = plt.subplots(-(-len(curves) // columns), columns, figsize=(7.5, 2.5 * -(-len(curves) // columns)))
    for axes, (curve, points) in zip(grid.flat, curves.items(), strict=False):
        at = [ways["ours"]["at"] for ways in points]
        for way, colour in (("ours", COLOURS[0]), ("copy", COLOURS[6])):
            if all(way in ways for ways in points):
                label = "ours" if way == "ours" else "a copy of as many bytes"
                milliseconds = [1e3 * ways[way]["median"] for ways in points]
                axes.plot(at, milliseconds, "o-", color=colour, label=label, markersize=3.5)
        title, _, quantity = curve.rpartition(", ")
        axes.set(xscale="log", yscale="log", xlabel=quantity, ylabel=unit(curve))
        axes.set_xticks(at, [SHORT(value) if value >= 10_000 else f"{value:,}" for value in at], minor=False)
        if max(milliseconds) < 5 * min(milliseconds):  # or noise looks like growth
            axes.set_ylim(min(milliseconds) / 2, max(milliseconds) * 2)
        axes.yaxis.set_major_locator(
            LogLocator(subs=(1, 2, 5) if max(milliseconds) < 100 * min(milliseconds) else (1,))
        )
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_formatter(NullFormatter())
        axes.set_title(title, loc="left", fontsize=9)
        if "copy" in points[0]:
            axes.legend(fontsize=7)
    for axes in list(grid.flat)[len(curves) :]:
        axes.remove()
    return figure


PLOTS: dict[str, Callable[[dict], Figure]] = {
    function.__name__: function
    for function in (roofline, loss_ratios, label_noise, decode_ratios, clips, training, scaling)
}


def save(results: dict, folder: Path) -> None:
    """Draws what the machine has results for."""
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        for name, plot in PLOTS.items():
            suite = {"roofline": "loss"}.get(name, name.removesuffix("_ratios"))
            if suite not in results["suites"] or (suite == "loss" and not steps(results)):
                continue
            figure = plot(results)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            plt.close(figure)
