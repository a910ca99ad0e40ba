"""Sources of tiny pairs whose pixels say which pair they are."""

import csv
import json
import struct
import tarfile
import threading
import time
import zlib

import numpy as np

from polydpo_fast.data import Pair, PairError, Source


def png(red, green, blue):
    """A PNG of 2 x 2 pixels of one colour."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    row = b"\0" + bytes([red, green, blue]) * 2
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(row * 2, 0))
        + chunk(b"IEND", b"")
    )


def which(pixels):
    """Of (2B, 3, 2, 2) uint8: the numbers of the pairs, and 0 or 1 for the arm, as the pixels tell."""
    colours = pixels[:, :, 0, 0].long()
    return (colours[:, 0] + 256 * colours[:, 1]).tolist(), colours[:, 2].tolist()


FORMS = ("pairs.parquet", "pairs.tar", "pairs.jsonl", "pairs.csv", "pairs.json")


def fill_folder(folder, numbers):
    """The same pairs in each of FORMS. Needs pyarrow."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "images").mkdir(parents=True, exist_ok=True)
    images = [{arm: png(n % 256, n // 256, at) for at, arm in enumerate(("win", "lose"))} for n in numbers]
    prompts = [f"prompt {number:02}" for number in numbers]
    first = [("win", "lose")[number % 2] for number in numbers]
    columns = {
        "jpg_0": [arms[arm] for arms, arm in zip(images, first, strict=True)],
        "jpg_1": [arms["lose" if arm == "win" else "win"] for arms, arm in zip(images, first, strict=True)],
        "label_0": [float(arm == "win") for arm in first],
        "caption": prompts,
    }
    pq.write_table(pa.table(columns), folder / "pairs.parquet", row_group_size=5, compression="none")
    records, ranked = [], []  # the latter as HPDv2 has them
    with tarfile.open(folder / "pairs.tar", "w") as shard:
        for i, (arms, prompt, better) in enumerate(zip(images, prompts, first, strict=True)):
            record = {"prompt": prompt}
            for arm, data in arms.items():
                path = folder / "images" / f"{i:02}.{arm}.png"
                path.write_bytes(data)
                shard.add(path, path.name)
                record[arm] = f"images/{path.name}"
            records.append(record)
            files = [record["win"], record["lose"]][:: 1 if better == "win" else -1]
            labels = [int(file == record["win"]) for file in files]
            ranked.append({"prompt": prompt, "file_path": files, "human_preference": labels})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "pairs.json").write_text(json.dumps(ranked))
    with open(folder / "pairs.csv", "w", newline="") as table:
        writer = csv.DictWriter(table, ["prompt", "win", "lose"])
        writer.writeheader()
        writer.writerows(records)


class Tiny(Source):
    """Pairs 0 to size - 1. bad: number to "read", "win", "lose" or "both": what fails. slow: number to seconds.
    hangs: until `let_go` is set."""

    kind = "Tiny"

    def __init__(self, size, bad=None, slow=None, hangs=(), blocks=None, version=0, codes=None):
        self.size, self.bad, self.slow, self.version = size, dict(bad or {}), dict(slow or {}), version
        self.hangs, self.let_go = set(hangs), threading.Event()
        self._blocks = np.array(blocks or [size])
        self._codes = np.zeros(size, dtype=np.uint8) if codes is None else codes

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if not 0 <= index < self.size:
            raise IndexError(index)
        time.sleep(self.slow.get(index, 0))
        if index in self.hangs:
            self.let_go.wait()
        how = self.bad.get(index)
        if how == "read":
            raise PairError("its shard is cut off")
        if how == "bug":
            raise RuntimeError("a bug of the source")
        arms = [png(index % 256, index // 256, arm) for arm in (0, 1)]
        if how in ("win", "both"):
            arms[0] = arms[0][:50]
        if how in ("lose", "both"):
            arms[1] = b"<html>"
        category = self.categories[0][self._codes[index]]
        return Pair(f"k{index}", *arms, f"prompt {index}", 1 + index / 8, category, {"number": index})

    def __getstate__(self):
        return {**self.__dict__, "let_go": None}

    @property
    def fingerprint(self):
        return f"tiny:{self.size}:{self.version}"

    def position(self, index):
        return f"tiny.tar:{index}"

    @property
    def blocks(self):
        return self._blocks

    @property
    def categories(self):
        return ("cat", "dog"), self._codes


def plain(pair):
    return pair.key, bytes(pair.win), bytes(pair.lose), pair.prompt, pair.weight, pair.category, dict(pair.extra)


def everything(source):
    return [plain(source[index]) for index in range(len(source))]
