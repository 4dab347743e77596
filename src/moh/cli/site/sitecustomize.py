"""Imports `moh` in the Python processes that a program started by `moh run` starts: PYTHONPATH leads here."""

import contextlib
import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec

# Python runs one sitecustomize, the first on the path: this one runs the one that it hides
_here = os.path.dirname(os.path.abspath(__file__))
_spec = PathFinder.find_spec("sitecustomize", [path for path in sys.path if os.path.abspath(path) != _here])
if _spec is not None and _spec.loader is not None:
    _spec.loader.exec_module(module_from_spec(_spec))
with contextlib.suppress(ImportError):  # a Python of another environment, which lacks our package
    import moh  # noqa: F401
