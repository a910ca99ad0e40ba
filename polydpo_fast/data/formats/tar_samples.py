"""The samples of a WebDataset shard: members that share a key, two of them the arms of a pair."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from ..source import PairError
from .columns import HAS_LABEL, is_labelled
from .fields import MAX_RECORD_BYTES, parse_json
from .indexed import Notes
from .media import CLIP_SUFFIXES, IMAGE_SUFFIXES
from .tar_members import Member, read_member

__all__ = ["CUT_OFF", "FIRST_WINS", "Order", "Sample", "only_sample", "samples"]

CUT_OFF = "files cut off"  # in counts, as the next two
_LINKED = "arms passed over for being links (tar --hard-dereference --dereference stores their files)"
_DOTTED = "arms passed over for a further dot in their names (a key ends at the first one)"
_ARMS = (("win", "lose"), ("0", "1"))
_TEXTS = ("json", "txt")
_MAX_PADDING = 1 << 20  # after the end mark; tar fills its last record, of 10 KB as a rule


class Order(NamedTuple):
    """arms: the winner, then the loser."""

    arms: tuple[str, str]
    tie: bool


FIRST_WINS = Order(_ARMS[0], False)


class Sample:
    """Members of one key. texts: the contents of its json and txt."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.arms: dict[str, Member] = {}
        self.texts: dict[str, bytes] = {}
        self.start = self.end = -1

    def add(self, role: str, member: Member, file: BinaryIO) -> None:
        if role in self.arms or role in self.texts:
            raise ValueError(f"sample {self.key!r} has two members {role!r}, the second at byte {member.start}")
        if role in _TEXTS:
            if member.size > MAX_RECORD_BYTES:
                raise ValueError(f"{member.name!r} has {member.size} bytes; expected at most {MAX_RECORD_BYTES}")
            file.seek(member.data)
            content = file.read(member.size)
            if len(content) < member.size:
                raise EOFError("it ends within a member")
            self.texts[role] = content
        else:
            self.arms[role] = member
        self.start, self.end = member.start if self.start < 0 else self.start, member.end

    @property
    def is_complete(self) -> bool:
        return any(set(arms) <= set(self.arms) for arms in _ARMS)

    def content(self) -> bytes:
        """What tells whether it has changed: its texts, and the names and sizes of its arms."""
        members = sorted((arm, member.name, member.size) for arm, member in self.arms.items())
        return b"%r %r %r %r" % (self.key, members, self.texts.get("json"), self.texts.get("txt"))

    def record(self) -> dict[str, Any]:
        """The object in its json. Raises ValueError."""
        return parse_json(self.texts["json"]) if "json" in self.texts else {}

    def prompt(self) -> str:
        """Of its txt. Raises PairError."""
        try:
            return self.texts.get("txt", b"").decode("utf-8-sig").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise PairError(f"sample {self.key!r}: its txt is not UTF-8") from error

    def order(self, record: dict[str, Any]) -> Order | None:
        """Its arms, by its record; None without a label. Raises ValueError for a label that means nothing."""
        if set(_ARMS[0]) <= set(self.arms):
            return FIRST_WINS
        if not is_labelled(record.get(HAS_LABEL)):
            return None
        labels = [_label(record, f"label_{arm}", self.key) for arm in "01"]
        if labels != [None, None]:
            first = 1 - labels[1] if labels[0] is None else labels[0]
            second = 1 - first if labels[1] is None else labels[1]
            return Order(("1", "0") if second > first else ("0", "1"), first == second)
        for name in ("label", "preferred"):
            if (number := _label(record, name, self.key)) is not None:
                if number not in (0, 0.5, 1):
                    raise ValueError(f"sample {self.key!r}: {name} is {number}; expected 0, 1, or 0.5 for a tie")
                return Order(("1", "0") if number == 1 else ("0", "1"), number == 0.5)
        return None


def samples(file: BinaryIO, size: int, notes: Notes) -> Iterator[Sample]:
    """All samples with at least one arm. Raises ValueError if it is no tar file."""
    at, sample = 0, None
    try:
        while (member := read_member(file, at, size)) is not None:
            at = member.end
            named = _key_and_role(member.name)
            if named is None:
                continue
            key, role = named
            if not member.is_file:
                if role and role not in _TEXTS:
                    notes.counts[_LINKED] += 1
                continue
            if sample is not None and sample.key != key:
                if sample.arms:
                    yield sample
                sample = None
            if role:
                sample = sample or Sample(key)
                sample.add(role, member, file)
            elif _is_arm(*member.name.lower().split(".")[-2:]):
                notes.counts[_DOTTED] += 1
    except EOFError:
        if at == 0:
            raise ValueError("it ends before its first member does") from None
        # The last sample may have had more members: its prompt, its label.
        notes.counts[CUT_OFF] += 1
        return
    if sample is not None and sample.arms:
        yield sample
    file.seek(at)
    rest = file.read(_MAX_PADDING + 1)
    if len(rest) > _MAX_PADDING or rest.strip(b"\0"):
        raise ValueError(f"it goes on after its end, at byte {at}: tar files put together, or a download not finished")


def only_sample(data: bytes) -> Sample:
    """Raises ValueError or EOFError if the data is not exactly one whole sample."""
    file, at, sample = io.BytesIO(data), 0, None
    while at < len(data):
        member = read_member(file, at, len(data))
        if member is None:
            raise ValueError("the archive ends where it should not")
        at = member.end
        key, role = (member.is_file and _key_and_role(member.name)) or ("", "")
        if role:
            sample = sample or Sample(key)
            if sample.key != key:
                raise ValueError(f"members of {sample.key!r} and {key!r} where those of one should be")
            sample.add(role, member, file)
    if sample is None:
        raise ValueError("no members of a sample")
    return sample


def _key_and_role(name: str) -> tuple[str, str] | None:
    """The role is an arm, "json", "txt", or "" for any other member; None for names without a key."""
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    if not stem or not dot:
        return None
    key, suffix = f"{folder}{slash}{stem}", suffix.lower()
    if suffix in _TEXTS:
        return key, suffix
    arm, _, form = suffix.rpartition(".")
    return key, arm if _is_arm(arm, form) else ""


def _is_arm(arm: str, form: str) -> bool:
    return any(arm in arms for arms in _ARMS) and (form in IMAGE_SUFFIXES or form in CLIP_SUFFIXES)


def _label(record: dict[str, Any], name: str, key: str) -> Any:
    value = record.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1):
        raise ValueError(f"sample {key!r}: {name} is {value!r}; expected a number from 0 to 1")
    return value
