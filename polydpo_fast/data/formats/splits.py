"""The splits of a data set, told by the names of its files: nobody wants to train on the test split by accident."""

from __future__ import annotations

import fnmatch
import itertools
import os
import re
from collections.abc import Sequence

from ..source import SourceError, warn
from .files import BRACES, File, Location, find
from .remote import parts_of

__all__ = ["find_one_split"]

_SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<count>\d{5}).*")  # as the package datasets names them
# Folders and files begin with such a word, or files end with one, and perhaps numbers. A dev that ends a name is none:
# FLUX.1-dev is a model.
_SPLIT = re.compile(
    r"(?:(?<![^/])|(?<=[-_.])(?!dev)(?=[a-z]+[-_.\d]*\.\w+$))"
    r"(train|val|test|eval|dev(?=/|(?:\.\w+)?$))(?:ing|id|idation|uation)?(?=[-_.\d/]|$)",
    re.ASCII,
)


def find_one_split(where: Location | Sequence[Location], suffixes: Sequence[str]) -> list[File]:
    """As `find`; but raises SourceError for training files beside test or validation files, which many data sets have
    in one folder, unless a list gives them one by one. Warns of shards that are missing by the names of the others."""
    if not isinstance(where, (str, os.PathLike)):
        return [file for one in where for file in find_one_split(one, suffixes)]
    files = find(where, suffixes)
    _check_splits(os.fspath(where), files)
    _warn_of_missing(os.fspath(where), files)
    return files


def _check_splits(place: str, files: Sequence[File]) -> None:
    parts = [parts_of(file.path) for file in files]
    common = len([*itertools.takewhile(lambda level: len({*level}) == 1, zip(*parts, strict=False))])
    shards: dict[str, str] = {}
    splits: dict[str, str] = {}  # the first file of each
    for path in ("/".join(part[common:]) for part in parts):
        # Tar shards may be named after anything, such as what the pictures show.
        if path.lower().endswith(".parquet") and (found := _SHARD.fullmatch(path.rpartition("/")[2])):
            shards.setdefault(found["split"], path)
        if words := _SPLIT.findall(path.lower()):
            # test/train_a is a test file, and so is train/test_a.
            splits.setdefault(next((word for word in words if word != "train"), "train"), path)
    for one in (shards, splits if "train" in splits else {}):
        if len(one) > 1:
            raise SourceError(
                f"{place} has files of several splits: {', '.join(sorted(one))}, such as "
                f"{' and '.join(sorted(one.values())[:2])}; expected a folder or glob of one; to take all, give one "
                "after the other as a list"
            )


def _warn_of_missing(place: str, files: Sequence[File]) -> None:
    """An unfinished download has fewer shards than their names say. Only those count that the place would match."""
    given = parts_of(place)[-1]
    if BRACES.search(given):  # which means just these
        return
    is_glob = any(c in given for c in "*?[")
    there: dict[tuple[str, ...], dict[int, re.Match[str]]] = {}
    for file in files:
        if file.name != given and (found := _SHARD.fullmatch(file.name)):
            there.setdefault((file.folder, found["split"], found["count"]), {})[int(found["number"])] = found
    for (_, _, count), shards in there.items():
        some = next(iter(shards.values()))
        before, after = some[0][: some.start("number")], some[0][some.end("number") :]
        absent = [f"{before}{n:05}{after}" for n in range(int(count)) if n not in shards]
        if absent := [name for name in absent if not is_glob or fnmatch.fnmatchcase(name, given)]:
            warn(
                f"{place}: {len(absent)} files are not there, though the names of the others say so; the first is "
                f"{absent[0]}"
            )
