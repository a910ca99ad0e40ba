"""An extension of Griffe: the lines "name: what it is" and the tables of our docstrings become Markdown."""

import re
import textwrap

import griffe

SECTION = re.compile(r"(Args|Returns|Raises|Yields):\n")
ITEM = re.compile(r"(\w+(?:, \w+)*): ")
TABLE = re.compile(r"\S {2,}\S")


class HouseStyle(griffe.Extension):
    def on_object(self, *, obj, **_):
        if obj.docstring:
            names = set(obj.members) | {parameter.name.lstrip("*") for parameter in _parameters(obj)}
            obj.docstring.value = as_markdown(obj.docstring.value, names)


def _parameters(obj):
    if obj.is_class and "__init__" in obj.members:
        obj = obj.members["__init__"]
    return getattr(obj, "parameters", ())


def as_markdown(text, names):
    """names: of the parameters or attributes; a line that begins with others is prose."""
    return "\n\n".join(_block(block, names) for block in re.split(r"\n\s*\n", text))


def _block(block, names):
    if SECTION.match(block) or block.startswith(" "):
        return block  # Griffe's, or code
    parts, before = [], None
    # A line and what is indented below it. Items begin a block: in prose a name and a colon may begin a line by chance.
    for head, rest in re.findall(r"^(\S.*)((?:\n +.*)*)", block, re.MULTILINE):
        item = ITEM.match(head) if parts == [] or before is not None else None
        if item and names.issuperset(item[1].split(", ")):
            listed = ", ".join(f"`{name}`" for name in item[1].split(", "))
            parts.append(f"- {listed}: {head[item.end() :]}{_below(rest, 4)}")
            before = "item"
        elif before == "item" and head[0].islower():  # the sentence goes on
            parts.append(f"    {head}{_below(rest, 4)}")
        else:
            parts.append(("\n" if before == "item" else "") + head + _below(rest, 0))
            before = before and "prose"
    return "\n".join(parts)


def _below(rest, indent):
    """Continued text, or a table, as a block of code, from its first line on."""
    lines = textwrap.dedent(rest.lstrip("\n")).split("\n") if rest else []
    first = next((i for i, line in enumerate(lines) if TABLE.search(line)), len(lines))
    text = "".join(f"\n{' ' * indent}{line}" for line in lines[:first])
    table = "".join(f"\n{' ' * (indent + 4)}{line}" for line in lines[first:])
    return text + (f"\n{table}\n" if table else "")
