"""The runtimes that models are exported to: how transformers exports to each, what it needs and what it can be told.

Extra `hf`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from packaging.version import Version

from moh._extras import require

require("transformers", extra="hf")

import transformers  # noqa: E402

OLDEST = "5.23.0"
"""Oldest transformers whose exporters save a program together with what is needed to call it."""


@dataclass(frozen=True)
class Runtime:
    """How transformers exports to a runtime.

    Attributes:
        exporter: name of transformers' exporter, less "Exporter".
        needs: modules that have to be installed.
        is_dynamic: whether programs take batches and lengths other than the example's.
        options: of the exporter's configuration.
        files: patterns of the files that an export has, besides JSON.
        limits_threads: whether `load_exported` can set how many threads a program uses.
        spells_gelu: whether GELU by tanh is exported as its formula.
    """

    exporter: str
    needs: tuple[str, ...] = ()
    is_dynamic: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    limits_threads: bool = False
    spells_gelu: bool = False


RUNTIMES = {
    "onnx": Runtime(
        "Onnx",
        ("onnx", "onnxscript", "onnxruntime"),
        files=("*.onnx", "*.onnx.data", "*.onnx_data"),
        limits_threads=True,
    ),
    # The cache goes in and out, as in the others; a stateful program would keep it for itself
    "openvino": Runtime(
        "OpenVINO", ("openvino",), options={"stateful": False}, files=("*.xml", "*.bin"), limits_threads=True
    ),
    # XNNPACK, which runs it on CPUs, fails on the symbolic shapes of a transformers model. ExecuTorch 1.5.1 has it compute the
    # exact GELU where the one by tanh is asked for (pytorch/executorch#22851, mended after that version)
    "executorch": Runtime("Executorch", ("executorch",), is_dynamic=False, files=("*.pte",), spells_gelu=True),
    "torch": Runtime("Dynamo", is_dynamic=False, files=("*.pt2",)),
}
"""Runtimes by name; "torch" is a program of `torch.export`."""


def runtime_of(name: str) -> Runtime:
    """The runtime of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in RUNTIMES:
        raise ValueError(f"runtime must be one of {', '.join(map(repr, RUNTIMES))}, got {name!r}")
    return RUNTIMES[name]


def check_threads(runtime: str, threads: int | None) -> None:
    """Refuse a number of threads that a program of this runtime can't be given."""
    if threads is None:
        return
    if not isinstance(threads, int) or threads < 1:
        raise ValueError(f"threads must be 1 or more, or None for the runtime's own choice, got {threads!r}")
    if not RUNTIMES[runtime].limits_threads:
        able = " or ".join(repr(name) for name, other in RUNTIMES.items() if other.limits_threads)
        raise ValueError(
            f"threads must be None for an export to {runtime!r}, whose threads can't be set here, got {threads}; those of "
            f"{able} can"
        )


def exporters_of(runtime: str) -> ModuleType:
    """`transformers.exporters`, which has what the runtime needs.

    Raises:
        ImportError: the installed transformers doesn't have it.
    """
    if Version(transformers.__version__) < Version(OLDEST):
        raise ImportError(
            f"exports need transformers {OLDEST} or newer, and {transformers.__version__} is installed: "
            f"pip install --upgrade 'transformers>={OLDEST}'"
        )
    exporters = import_module("transformers.exporters")
    needed = ("ExportedModel", *(f"{RUNTIMES[runtime].exporter}{part}" for part in ("Exporter", "Config")))
    if missing := [name for name in needed if not hasattr(exporters, name)]:
        raise ImportError(
            f"runtime {runtime!r} needs transformers.exporters.{missing[0]}, which transformers {transformers.__version__} "
            f"doesn't have: install {OLDEST}, with which exports are tested"
        )
    return exporters


def check_installed(runtime: str) -> None:
    """Raise an ImportError that names the packages of the runtime that are missing."""
    if missing := [name for name in RUNTIMES[runtime].needs if find_spec(name) is None]:
        raise ImportError(
            f"runtime {runtime!r} needs {' and '.join(missing)}, not installed: pip install {' '.join(missing)}"
        )


def loading_options(runtime: str, threads: int | None) -> dict[str, Any]:
    """How `ExportedModel.from_pretrained` is called."""
    if runtime == "openvino":
        limit = {} if threads is None else {"INFERENCE_NUM_THREADS": threads}
        return {"device": "cpu", "config": {"INFERENCE_PRECISION_HINT": "f32"} | limit}
    if runtime == "onnx" and threads is not None:
        from onnxruntime import SessionOptions

        settings = SessionOptions()
        settings.intra_op_num_threads = threads
        return {"device": "cpu", "session_options": settings}
    return {"device": "cpu"} if runtime == "onnx" else {}
