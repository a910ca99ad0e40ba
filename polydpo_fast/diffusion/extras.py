"""Packages that only the bridge needs, and by which extra they come."""

from __future__ import annotations

from importlib import import_module

__all__ = ["need"]


def need(*packages: str, what: str = "training") -> None:
    """Raises ImportError, which names the extra to install, where one of the packages is missing."""
    for package in packages:
        try:
            import_module(package)
        except ImportError as error:
            missing = (error.name or package).partition(".")[0]
            raise ImportError(f"{what} needs {missing}: pip install 'polydpo-fast[train]'") from error
