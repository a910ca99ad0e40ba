"""What processes, which may be on several nodes, find out before they wait for each other.

A launcher ends the processes of its own node when one of them fails, and tells other nodes nothing.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["check_same", "check_shared", "of_all", "together"]


@contextlib.contextmanager
def together(accelerator: Any) -> Iterator[None]:
    """What one process raises within ends them all, the others with ValueError. Nothing within may wait for them."""
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    said = of_all(accelerator, None if error is None else f"on {socket.gethostname()}: {error}")
    if error is not None:
        raise error
    for number, text in enumerate(said):
        if text is not None:
            raise ValueError(f"process {number} of {len(said)}, {text}")


def check_same(accelerator: Any, facts: Mapping[str, Any]) -> None:
    """Raises ValueError, in all processes, where their facts differ: they would train apart, and sum their gradients.

    facts: by name, of what JSON can tell.
    """
    every = of_all(accelerator, json.loads(json.dumps(dict(facts), default=str)))
    for number, others in enumerate(every):
        for name in sorted({*every[0], *others}):
            if others.get(name) != every[0].get(name):
                raise ValueError(
                    f"{name} is {every[0].get(name)!r} in process 0 and {others.get(name)!r} in process {number}; "
                    "expected the same on all nodes"
                )


def check_shared(accelerator: Any, name: str, folder: Path) -> None:
    """Makes the folder, if it is not there. Raises ValueError, in all processes, where one sees another folder there.

    name: of the setting.
    """
    # A new name each time: of one that was looked for before, NFS may go on to say that it is not there.
    mark = folder / f".{of_all(accelerator, secrets.token_hex(8))[0]}.shared"
    with together(accelerator):
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            mark.touch()
    seen = of_all(accelerator, mark.exists())
    if accelerator.is_main_process:
        mark.unlink()
    if not all(seen):
        raise ValueError(
            f"{name} is {str(folder)!r}, where process {seen.index(False)} does not see what process 0 writes; "
            "expected a folder that all nodes share"
        )


def of_all(accelerator: Any, value: Any) -> list[Any]:
    """The values of all processes, which pickle can tell, in all of them."""
    from accelerate.utils import gather_object

    if accelerator.num_processes == 1:
        return [value]
    found: list[Any] = gather_object([value])
    return found
