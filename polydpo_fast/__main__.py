"""`python -m polydpo_fast`, for launchers of processes that take a module."""

from .cli import app

app(prog_name="polydpo-fast")
