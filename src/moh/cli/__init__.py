"""The command `moh`: a thin layer over the package. `python -m moh` is the same."""

from moh.cli.main import main

__all__ = ["main"]
