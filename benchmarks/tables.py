"""Markdown tables, and the sentences beneath them, from a file of results.

BLOCKS names what README.md and docs/benchmarks.md show between `<!-- results: NAME -->` and `<!-- end of results -->`.
Every figure there comes from here: `make report` writes them, and a test compares.
"""

import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence

Row = dict
Rows = dict[str, dict[str, Row]]  # by case, then by way

NAMES = {
    "bare_libjpeg": "libjpeg-turbo alone",
    "pillow_decoding_alone": "Pillow, decoding alone",
    "diffusers_recipe": "Diffusers' recipe",
    "opencv": "OpenCV + torch",
    "simplejpeg": "simplejpeg + torch",
    "imagecodecs": "imagecodecs + torch",
    "spdl": "SPDL + torch",
    "dali": "DALI, CPU + torch",
    "dali_decoder": "our geometry through DALI, CPU",
    "torchcodec": "torchcodec + torch",
    "photograph": "JPEG, smooth",
    "photograph, progressive": "the same, progressive",
    "dense": "JPEG, dense",
    "dense, progressive": "the same, progressive",
    "2048 x 2048 resized": "JPEG, 2048 x 2048, resized",
    "photograph, PNG": "PNG, smooth",
    "dense, PNG": "PNG, dense",
    "bare_decoding": "bare decoding, through PyAV",
    "ours_cthw": "ours, bfloat16 (C, T, H, W)",
    "ours_tchw": "ours, bfloat16 (T, C, H, W)",
    "ours_yuv420": "ours, stored planes",
    "ours_from_bytes": "ours, from bytes, indexed anew each time",
    "ours_without_out": "ours, without `out=`",
    "ours_into_fresh_memory": "ours, into fresh memory",
    "only_writing": "writing the bfloat16 frames, nothing decoded",
    "pyav_and_torch": "PyAV to RGB, to bfloat16 through torch",
    "decord2": "decord2, to bfloat16 through torch",
    "cpp_and_a_copy": "ours in bfloat16, copied to a GPU",
    "planes_and_a_kernel": "ours as stored planes, converted on a GPU",
    "nvdec_through_dali": "our geometry through DALI, NVDEC",
    "decoding_alone": "`decode_pairs` alone, on bytes in memory",
    "ours_parquet": "`PairLoader`, Parquet",
    "ours_tar": "`PairLoader`, WebDataset shards",
    "webdataset_and_torch": "WebDataset, Pillow, torch",
    "streaming_and_torch": "mosaicml-streaming, Pillow, torch",
    "the_scripts_pipeline": "Diffusers' DPO script: rows, Pillow, ToTensor, Normalize, DataLoader with two workers",
}


def named(way: str) -> str:
    return NAMES.get(way, way)


def rows_of(results: dict, suite: str) -> Rows:
    """Raises KeyError where the machine has no results of the suite."""
    found: Rows = {}
    for row in results["suites"][suite]["rows"]:
        found.setdefault(row["case"], {})[row["way"]] = row
    return found


def table(head: Sequence[str], body: Iterable[Sequence[str]], left: int = 1) -> str:
    """`left` columns are aligned to the left, the others to the right."""
    lines = [head, ["---"] * left + ["---:"] * (len(head) - left), *body]
    return "\n".join(f"|{''.join(f' {cell} |' if cell else ' |' for cell in line)}" for line in lines)


def ms(row: Row) -> str:
    """Three digits below a tenth: kernels of a GPU take so long."""
    return f"{1e3 * row['median']:.3f}" if row["median"] < 1e-4 else significant(1e3 * row["median"])


def significant(value: float) -> str:
    """Two digits after the point below ten, one below a hundred."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def against(row: Row | None, ours: Row) -> str:
    """Milliseconds, and how many times ours they are."""
    return f"{ms(row)} ({row['median'] / ours['median']:.1f}x)" if row else ""


def skipped(results: dict, suite: str) -> str:
    """What could not be measured, and why: a way in a line, or nothing."""
    cases: dict[tuple[str, str], list[str]] = {}
    for one in results["suites"][suite].get("skipped", ()):
        cases.setdefault((one["way"], one["reason"]), []).append(one["case"])
    lines = []
    for (way, reason), of in cases.items():
        which = f"`{of[0]}`" if len(of) == 1 else f"{len(of)} cases"
        lines.append(f"- {named(way)}{way and ', '}{which}: {reason}")
    return "\n".join(["Not measured:", "", *lines]) if lines else ""


def repeat(results: dict, *suites: str) -> str:
    """The line under a table."""
    commands = dict.fromkeys(results["suites"][name]["command"] for name in suites)
    return f"*To repeat: {', '.join(f'`{command}`' for command in commands)}.*"


# ------------------------------------------------------------------------------------------------- the blocks


def measured(results: dict) -> str:
    demo, machine = rows_of(results, "demo")["the demo"]["ours"], results["machine"]
    photograph = rows_of(results, "decode")["photograph"]
    video = next(
        ways for ways in steps(results) if ways["ours"]["model"] == "Wan 480p" and ways["ours"]["dtype"] == "bfloat16"
    )
    noisy = max(rows_of(results, "label_noise").values(), key=lambda ways: ways["alpha 0"]["noise"])
    low, high = demo["win_rate_95"]
    wins = f"{demo['win_rate']:.1%} of {demo['samples']} (95% interval {low:.1%} to {high:.1%})"
    body = [
        ["demo: samples in which the policy beats its reference by the true reward", wins],
        [
            "demo: samples that are still legible digits, before and after",
            f"{demo['legible_before']:.1%}, {demo['legible_after']:.1%}",
        ],
        [f"demo: time on {machine['processors']} processors, once set up", f"{demo['median']:.0f} s"],
        [
            f"demo with {noisy['alpha 0']['noise']:.0%} of its labels flipped: pairs decided right, alpha 0 and 8",
            ", ".join(f"{statistics.mean(noisy[way]['accuracies']):.1%}" for way in ("alpha 0", "alpha 8")),
        ],
        ["loss of a pair, forward and backward, Wan 480p, bfloat16", f"{ms(video['ours'])} ms"],
        [
            "torch.compile, eager PyTorch, on the same formula",
            f"{ms(video['torch.compile'])} ms, {ms(video['eager'])} ms",
        ],
        ["1024 x 1024 JPEG (synthetic) to normalised bfloat16 planes, one thread", f"{ms(photograph['ours'])} ms"],
        ["libjpeg-turbo alone, decoding it", f"{ms(photograph['bare_libjpeg'])} ms"],
        ["the recipe of Diffusers' scripts (Pillow, ToTensor, Normalize)", f"{ms(photograph['diffusers_recipe'])} ms"],
    ]
    if "dali" in photograph:
        body.append(["NVIDIA DALI on the CPU, finished by torch", f"{ms(photograph['dali'])} ms"])
    head = ["what", f"{machine['cpu']}, {machine['processors']} processors"]
    return f"{table(head, body, left=2)}\n\n{repeat(results, 'demo', 'label_noise', 'loss', 'decode')}"


def precision(results: dict) -> str:
    head = ["policy", "reference, target", "formula", "mean \\|logit\\|", "mean error", "wrong sign", "no sign"]
    body = [
        [
            *(row["policy"], row["other"], way, f"{row['mean |logit|']:.2f}", f"{row['mean error']:.1e}"),
            *(f"{row['wrong sign']:.0%}", f"{row['no sign']:.0%}"),
        ]
        for ways in rows_of(results, "precision").values()
        for way, row in ways.items()
    ]
    return f"{table(head, body, left=3)}\n\n{repeat(results, 'precision')}"


def label_noise(results: dict) -> str:
    """A row for each share of flipped labels; the least and the greatest of the seeds in brackets."""
    rows = rows_of(results, "label_noise")
    ways = list(next(iter(rows.values())))
    body = [
        [f"{found[ways[0]]['noise']:.0%}", *(text for way in ways for text in _judged(found[way]))]
        for found in rows.values()
    ]
    head = ["flipped", *(text for way in ways for text in (f"{way}: right", "gain"))]
    return f"{table(head, body)}\n\n{repeat(results, 'label_noise')}"


def _judged(row: Row) -> tuple[str, str]:
    right, gains = row["accuracies"], row["gains"]
    return (
        f"{statistics.mean(right):.1%} ({min(right):.1%} to {max(right):.1%})",
        f"{statistics.mean(gains):+.4f}",
    )


MIXED = "float32 and bfloat16"


def loss(results: dict, dtypes: Sequence[str] = ("bfloat16", "float32", MIXED)) -> str:
    """Forward and backward of the models' shapes; on a GPU with what the last replay left in its cache, too."""
    peers = ("torch.compile", "torch.compile, max-autotune", "eager", "Salesforce's formula")
    both = ("ours", "torch.compile")
    cases = [ways for ways in steps(results) if not _pairs(ways["ours"])]
    warm = both if any(WARM in ways["ours"] for ways in cases) else ()
    body = []
    for dtype in dtypes:
        for ways in cases:
            ours = ways["ours"]
            if ours["dtype"] == dtype:
                cells = [ours["model"], " x ".join(map(str, ours["shape"])), dtype, best(ours, ways)]
                cells += [against(ways.get(way), ours) for way in peers]
                body.append([*cells, *(warm_ms(ways.get(way)) for way in warm)])
    head = ["model", "shape", "dtype", "ours", *peers, *(f"{way}, warm L2" for way in warm)]
    return "\n\n".join(filter(None, (table(head, body, left=3), _loss_limits(results, peers), repeat(results, "loss"))))


def best(ours: Row, ways: dict[str, Row]) -> str:
    """Our time, in bold where no other way took less. (The copy is of other bytes.)"""
    least = min(row["median"] for way, row in ways.items() if way != "copy")
    return f"**{ms(ours)}**" if ours["median"] <= least else ms(ours)


WARM = "gpu, warm L2"


def warm_ms(row: Row | None) -> str:
    return f"{1e3 * row[WARM]:.3f}" if row and WARM in row else ""


def steps(results: dict) -> list[dict[str, Row]]:
    """The cases of forward and backward, if the suite of the loss has any."""
    if "loss" not in results["suites"]:
        return []
    return [ways for ways in rows_of(results, "loss").values() if ways["ours"].get("backward")]


def _pairs(row: Row) -> int | None:
    """Of the rows in which the number of pairs varies."""
    found = re.search(r", (\d+) pairs$", row["model"])
    return int(found[1]) if found else None


def _loss_limits(results: dict, peers: Iterable[str]) -> str:
    rows = rows_of(results, "loss")
    sentences = []
    if video := rows.get("Wan 480p, bfloat16, forward and backward"):
        rate, copy = (video[way]["bytes"] / video[way]["median"] for way in ("ours", "copy"))
        per_element = video["ours"]["bytes"] / math.prod(video["ours"]["shape"])
        sentences.append(
            f"The two passes over Wan 480p in bfloat16 run at {rate / 1e9:.0f} GB/s (counting {per_element:.0f} bytes "
            f"per element), {rate / copy:.0%} of the rate of copying 256 MB, which is more than caches hold."
        )
    if least := [row["least"] for ways in rows.values() for row in ways.values() if "least" in row]:
        sentences.append(
            f"Each time has the beginning of a CUDA graph's replay in it: one of one kernel of one element takes "
            f"{1e6 * min(least):.1f} us."
        )
    if any(row.get("dtype") == MIXED for ways in rows.values() for row in ways.values()):
        sentences.append(
            f"{MIXED.capitalize()}: the policy's prediction under autocast is in float32, reference and target are not."
        )
    if host := rows.get("host time, 16 elements"):
        us = {way: f"{1e6 * row['median']:.0f} us" for way, row in host.items()}
        sentences.append(
            f"A call costs {us['ours']} of the host's time for forward and backward on tiny inputs, of which an empty "
            f"`autograd.Function` takes {us['an empty autograd.Function']}."
        )
        if others := [f"{way} {us[way]}" for way in peers if way in us]:
            sentences[-1] = f"{sentences[-1][:-1]}; {', '.join(others)}."
    return " ".join(sentences)


def loss_all(results: dict) -> str:
    """Every case, way and clock; memory beside time."""
    warm = [WARM] if any(WARM in ways["ours"] for ways in steps(results)) else []
    head = [
        "case",
        "way",
        "ms",
        "IQR, ms",
        *(f"{clock}, ms" for clock in warm),
        "CPU ms",
        "GB/s",
        "of a copy",
        "peak MB",
    ]
    body = []
    for case, ways in rows_of(results, "loss").items():
        for way, row in ways.items():
            if way == "copy":
                continue
            cells = ["", "", ""]
            if "bytes" in row:
                rate, copy = (r["bytes"] / r["median"] for r in (row, ways["copy"]))
                cells = [f"{rate / 1e9:.1f}", f"{rate / copy:.0%}", significant(row["peak_bytes"] / 1e6)]
            cpu = f"{1e3 * row['cpu']:.3f}" if "cpu" in row else ""
            times = [f"{1e3 * row['median']:.3f}", f"{1e3 * row['iqr']:.3f}", *(warm_ms(row) for _ in warm), cpu]
            body.append([case, way, *times, *cells])
    return table(head, body, left=2)


DECODERS = ("bare_libjpeg", "dali", "simplejpeg", "opencv", "diffusers_recipe", "pillow_decoding_alone")


def decode(results: dict) -> str:
    rows = rows_of(results, "decode")
    ways = [way for way in DECODERS if any(way in found for found in rows.values())]
    body = [
        [named(case), best(found["ours"], found), *(against(found.get(way), found["ours"]) for way in ways)]
        for case, found in rows.items()
    ]
    return f"{table(['1024 x 1024', 'ours', *map(named, ways)], body)}\n\n{repeat(results, 'decode')}"


def decode_all(results: dict) -> str:
    rows = rows_of(results, "decode")
    body = [
        [named(case), named(way), ms(row), significant(1e3 * row["iqr"]), significant(1e3 * row["wall"])]
        for case, ways in rows.items()
        for way, row in sorted(ways.items(), key=lambda item: item[1]["median"])
    ]
    return table(["source", "way", "CPU ms", "IQR", "wall ms"], body, left=2)


def clips(results: dict) -> str:
    rows = rows_of(results, "clips")
    rates = {case.removeprefix("720p at "): ways for case, ways in rows.items() if case.startswith("720p at ")}
    body = []
    for way in dict.fromkeys(way for ways in rates.values() for way in ways):
        cells = []
        for ways in rates.values():
            row, bare = ways.get(way), ways["bare_decoding"]["median"]
            share = "" if way == "bare_decoding" or row is None else f" ({bare / row['median']:.2f})"
            cells.append(f"{1 / row['median']:.0f}{share}" if row else "")
        body.append([named(way), *cells])
    sparse = rows["16 of 121 frames of both clips of a pair"]
    share = sparse["ours, sparsely"]["median"] / sparse["all frames, bare decoding"]["median"]
    text = f"16 frames spread over a clip of 121 cost {share:.1f} times what bare decoding of the whole clip costs."
    return f"{table(['', *rates], body)}\n\n{text}\n\n{repeat(results, 'clips')}"


def loader(results: dict) -> str:
    rows = rows_of(results, "loader")
    ways = rows["1024px JPEG pairs"]
    alone = ways["decoding_alone"]
    clocks = "wall", "median"  # the latter is CPU time
    body = [
        [named(way), *(text for c in clocks for text in (f"{1 / row[c]:.0f}", f"{alone[c] / row[c]:.2f}"))]
        for way, row in ways.items()
    ]
    million = {case.rpartition(", ")[2]: found["ours"] for case, found in rows.items() if case.startswith("a million")}
    facts = [
        [
            kind,
            f"{row['seconds to build the index']:.1f} s",
            f"{row['median']:.2f} s",
            f"{1e3 * row['seconds to resume']:.0f} ms",
            f"{row['bytes of memory per pair']:.0f}",
        ]
        for kind, row in million.items()
    ]
    head = ["a million pairs", "index, once", "first batch", "resume in mid-epoch", "the process grows, bytes per pair"]
    return "\n\n".join(
        (
            table(
                ["", "pairs per second", "of `decode_pairs` alone", "per CPU second", "of `decode_pairs` alone"], body
            ),
            table(head, facts),
            repeat(results, "loader"),
        )
    )


def training(results: dict) -> str:
    rows = rows_of(results, "training")
    steps, parts = rows["training step, 142 M parameters"], rows["parts of the step"]
    first = next(iter(steps.values()))
    body = [
        [way, f"{row['median']:.2f} s", f"{row['median'] / first['median']:.0%}", f"{row['peak MB']:.0f} MB"]
        for way, row in steps.items()
    ]
    shares = [[way, *_share(row["median"], first["median"])] for way, row in parts.items()]
    overhead = [
        [
            way,
            f"{1e6 * row['median']:.0f} us",
            f"{row['microseconds with noise given']:.0f} us",
            f"{row['share of the step']:.3%}" if "share of the step" in row else "",
        ]
        for way, row in rows["PairObjective beside models and loss"].items()
    ]
    head = ["`PairObjective`'s own time, latents", "noise drawn", "noise given", "of a whole step"]
    return "\n\n".join(
        (
            table(["a step of 142 M parameters", "CPU time", "of the first", "peak memory"], body),
            table(["its parts", "CPU time", "share"], shares),
            table(head, overhead),
            repeat(results, "training"),
        )
    )


def _share(seconds: float, of: float) -> tuple[str, str]:
    """With more digits where there is little."""
    if seconds < of / 100:
        return f"{1e6 * seconds:.0f} us", f"{seconds / of:.3%}"
    return f"{seconds:.2f} s", f"{seconds / of:.0%}"


def unit(curve: str) -> str:
    """Of a curve of scaling."""
    return "ms per image" if curve.startswith("decoding") else "ms"


def scaling(results: dict) -> str:
    curves: dict[str, list[Row]] = {}
    for ways in rows_of(results, "scaling").values():
        curves.setdefault(ways["ours"]["curve"], []).append({**ways["ours"], "copy": ways.get("copy")})
    blocks = []
    for curve, rows in curves.items():
        quantity = curve.rpartition(", ")[2]
        body = [[f"{row['at']:,}", ms(row), significant(1e3 * row["iqr"])] for row in rows]
        text = limit(curve, rows, results["machine"]["processors"])
        blocks.append(f"**{curve}**\n\n{table([quantity, unit(curve), 'IQR'], body, left=0)}\n\n{text}")
    return "\n\n".join([*blocks, repeat(results, "scaling")])


def limit(curve: str, rows: list[Row], processors: int) -> str:
    """The best and the worst of a curve, wherever they are, in a sentence that says no more than its figures do."""
    first, last = rows[0], rows[-1]
    fastest, slowest = (which(rows, key=lambda row: row["median"]) for which in (min, max))
    if curve.startswith("loss"):
        best = max(rows, key=_rate)
        worst = min(rows[rows.index(best) :], key=_rate)  # before it, what a call costs is most of the time
        text = f"The smallest takes {1e6 * first['median']:.0f} us. The rate is highest at {_loss_point(best)}"
        text += " of a copy of as many bytes"
        if worst is not best:
            text += f"; from there on lowest at {_loss_point(worst)}"
        if last is not worst:
            text += f"; in the end, at {_loss_point(last)}"
        return f"{text}."
    if curve.startswith("decoding, one thread"):
        pixels = [(row["at"] ** 2 / row["median"] / 1e6, row["at"]) for row in rows]
        low, high = (f"{rate:.0f} at {side} x {side}" for rate, side in (min(pixels), max(pixels)))
        return f"Megapixels per second: at least {low}, at most {high}."
    if curve.endswith("threads"):
        return (
            f"At best {first['median'] / fastest['median']:.2f} times one thread's speed, with {fastest['at']} threads "
            f"on {processors} processors."
        )
    if curve.startswith("decoding, two threads"):
        return (
            f"An image costs {1e3 * fastest['median']:.1f} ms (batches of {fastest['at']}) to "
            f"{1e3 * slowest['median']:.1f} ms (batches of {slowest['at']})."
        )
    if curve.endswith("pairs in the source"):
        pairs = [1e6 * row["seconds per pair"] for row in rows]
        return (
            f"The first batch takes {1e3 * fastest['median']:.0f} ms ({fastest['at']:,} pairs) to "
            f"{1e3 * slowest['median']:.0f} ms ({slowest['at']:,}); a pair after it costs {min(pairs):.0f} to "
            f"{max(pairs):.0f} us of CPU time."
        )
    worst = (
        f", and at worst one of {slowest['at']} after {1e3 * slowest['median']:.0f} ms"
        if slowest not in (first, last)
        else ""
    )
    return (
        f"The order is a formula: a rank computes its own positions. A single one has its first batch after "
        f"{1e3 * first['median']:.0f} ms, one of {last['at']} after {1e3 * last['median']:.0f} ms{worst}."
    )


def _rate(row: Row) -> float:
    """Bytes per second."""
    return row["bytes"] / row["median"]


def _loss_point(row: Row) -> str:
    return f"{row['at']:,}: {significant(_rate(row) / 1e9)} GB/s, {row['copy']['median'] / row['median']:.0%}"


def sd15_overhead(results: dict) -> str:
    row = rows_of(results, "sd15_overhead")["PairObjective in a step of SD1.5's UNet"]["own time"]
    text = (
        f"In a step of SD1.5's own UNet (860 M parameters, one pair of 128 x 128 pixels, {row['step s']:.1f} s) "
        f"`PairObjective` takes {1e6 * row['median']:.0f} us, {row['share of the step']:.3%}."
    )
    return f"{text}\n\n{repeat(results, 'sd15_overhead')}"


BLOCKS: dict[str, Callable[[dict], str]] = {
    function.__name__: function
    for function in (
        *(measured, precision, label_noise, loss, loss_all, decode, decode_all),
        *(clips, loader, training, sd15_overhead, scaling),
    )
}

_START, _END = "<!-- results: ", "<!-- end of results -->"
_BLOCK = re.compile(rf"({_START}(\w+) -->\n).*?({_END})", re.DOTALL)


def filled(text: str, results: dict) -> str:
    """The text with its blocks made anew.

    Raises KeyError for a block that there is not, or a suite without results; ValueError where a mark has no other.
    """
    new, count = _BLOCK.subn(lambda found: f"{found[1]}\n{BLOCKS[found[2]](results)}\n\n{found[3]}", text)
    marks = count, text.count(_START), text.count(_END)
    if len(set(marks)) > 1:
        raise ValueError(f"{count} blocks of results, but {marks[1]} times {_START!r} and {marks[2]} times {_END!r}")
    return new
