"""`open_source`: which source a path, a glob, or a collection of records is."""

from __future__ import annotations

import glob
import inspect
import os
from collections.abc import Iterable
from typing import Any

from .formats.files import find, suffix_of_path
from .formats.manifest import ManifestPairs
from .formats.parquet import ParquetPairs
from .formats.records import RecordPairs
from .formats.tar import TarPairs
from .source import Source, SourceError

__all__ = ["open_source"]

_SUFFIXES: dict[str, type[Any]] = {
    "parquet": ParquetPairs,
    "tar": TarPairs,
    **dict.fromkeys(("jsonl", "csv", "json"), ManifestPairs),
}


def open_source(where: Any, **options: Any) -> Source:
    """The pairs of files, by their suffix, or of records.

    where: a path, a glob, a folder, an address that fsspec knows, numbered files such as s-{000..099}.tar, or a list
        of those:
        .parquet  Pick-a-Pic's or Open Image Preferences' columns (`ParquetPairs`)
        .tar      WebDataset shards, KEY.win.jpg and KEY.lose.jpg (`TarPairs`)
        .jsonl, .csv, .json  a manifest of files: win, lose, prompt, weight, category; or HPDv2's or HPDv3's list
                  (`ManifestPairs`)
        Or a `datasets.Dataset`, or a sequence of mappings (`RecordPairs`); or a source, which is returned.
    options: of that class: ties="drop", columns=, root=, cache= and so on.

    In a folder shards and tables go before manifests. Raises SourceError where there are no such files, or files of
    several kinds; TypeError for an option that this kind of source does not have.
    """
    if isinstance(where, Source):
        if options:
            raise TypeError(f"the source is open already; expected no options, got {', '.join(options)}")
        return where
    if not _is_location(where):
        return _make(RecordPairs, where, options)
    _check_no_dataset(where)
    kinds = _kinds(where, _SUFFIXES)
    if len(kinds) > 1:
        # A folder of shards or tables often has a JSON beside them that is none of the data.
        kinds = _kinds(where, kinds & {"parquet", "tar"} or kinds)
    if len(kinds) > 1:
        raise SourceError(f"{where} has files of several kinds: {', '.join(sorted(kinds))}; expected one")
    kind = kinds.pop()
    if kind not in _SUFFIXES:
        raise SourceError(f"{where} ends in .{kind}; expected {', '.join(f'.{suffix}' for suffix in _SUFFIXES)}")
    return _make(_SUFFIXES[kind], where, options)


def _kinds(where: Any, suffixes: Iterable[str]) -> set[str]:
    """Told by the names alone where these end in a suffix; else by the files."""
    kinds: set[str] = set()
    for one in where if isinstance(where, (list, tuple)) else [where]:
        suffix = suffix_of_path(os.fspath(one))
        if suffix in suffixes and not os.path.isdir(os.path.expanduser(one)):
            kinds.add(suffix)
        else:
            kinds |= {suffix_of_path(file.path) for file in find(one, [f".{suffix}" for suffix in suffixes])}
    return kinds


def _check_no_dataset(where: Any) -> None:
    """A folder that `datasets` or Diffusers wrote has JSON files, which are no manifests. One of Parquet files or
    shards, such as `download_and_prepare` makes, may have some of these too, and is read."""
    if isinstance(where, (str, os.PathLike)):
        folder = os.path.expanduser(os.fspath(where))

        def has(pattern: str) -> bool:
            return any(glob.iglob(os.path.join(glob.escape(folder), pattern), recursive=True))

        if has("model_index.json"):
            raise SourceError(f"{folder} has the model_index.json of a pipeline; expected preference data")
        saved = has("dataset_dict.json") or (has("dataset_info.json") and (has("state.json") or has("*.arrow")))
        if saved and not has("**/*.parquet") and not has("**/*.tar"):
            raise SourceError(
                f"{folder} was written by save_to_disk of the package datasets; expected what "
                f"datasets.load_from_disk({folder!r}) returns (of a DatasetDict one of its splits)"
            )


def _is_location(where: Any) -> bool:
    if isinstance(where, (list, tuple)):
        return bool(where) and all(isinstance(one, (str, os.PathLike)) for one in where)
    return isinstance(where, (str, os.PathLike))


def _make(kind: type[Any], where: Any, options: dict[str, Any]) -> Source:
    known = list(inspect.signature(kind).parameters)[1:]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(f"{', '.join(unknown)}: no option of {kind.__name__}; expected {', '.join(known)}")
    source: Source = kind(where, **options)
    return source
