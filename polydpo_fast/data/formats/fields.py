"""What a record says of a pair besides its images: a JSON object, or a row of a table."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..source import is_unicode, weight_of

__all__ = ["MAX_RECORD_BYTES", "Fields", "parse_json", "text_of"]

MAX_RECORD_BYTES = 1 << 24

_NAME_ENDS = re.compile(rb'"[ \t\r\n]*:')

Record = Mapping[str, Any]


class Fields(NamedTuple):
    """key, prompt: None where the record has none."""

    key: str | None
    prompt: str | None
    weight: float
    category: str
    extra: dict[str, Any]

    @classmethod
    def of(cls, record: Record, columns: Sequence[str] = (), key: str = "key") -> Fields:
        """Raises ValueError for a value that is not of its kind."""
        return cls(
            text_of(record, key) or None,
            text_of(record, "caption" if record.get("prompt") is None else "prompt"),
            _weight(record.get("weight")),
            text_of(record, "category") or "",
            {column: record.get(column) for column in columns},
        )


def parse_json(data: bytes) -> dict[str, Any]:
    """A JSON object in UTF-8. Raises ValueError for anything else."""
    try:
        text = data.removeprefix(b"\xef\xbb\xbf").decode()
        # The hook, which finds names that come twice, takes time. It is spared where as many names were parsed as the
        # text has; text within strings may be taken for names too, and then the hook decides.
        is_flat = data.count(b"{") == 1
        record = json.loads(text) if is_flat else _CHECKING.decode(text)
        if is_flat and data.count(b":") != len(record) != len(_NAME_ENDS.findall(data)):
            record = _CHECKING.decode(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8: {error.reason}") from error
    except RecursionError:
        raise ValueError("it is not JSON that can be read: too deeply nested") from None
    except _RepeatedNameError:
        raise
    except ValueError as error:
        raise ValueError(f"it is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"it is a JSON {type(record).__name__}; expected an object")
    return record


class _RepeatedNameError(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedNameError(f"it has {next(name for name in names if names.count(name) > 1)!r} twice")
    return record


_CHECKING = json.JSONDecoder(object_pairs_hook=_object)


def text_of(record: Record, name: str) -> str | None:
    """None if it is absent or null; integers become text. Raises ValueError for anything else."""
    value = record.get(name)
    if value is None:
        return None
    if isinstance(value, str):
        if not is_unicode(value):
            raise ValueError(f"{name} is not Unicode text: {value!a}")
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"{name} is of type {type(value).__name__}; expected text")


def _weight(value: Any) -> float:
    if value is None or value == "":
        return 1.0
    if isinstance(value, str):  # of a table
        with contextlib.suppress(ValueError):
            value = float(value)
    return weight_of(value)
