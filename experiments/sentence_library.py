"""A converted sentence encoder in sentence-transformers, as its users load it: for `sentence_encoder.py --library`.

Each encoder is loaded in a process of its own: with `import moh`, or with the code of `moh export remote-code` where the package
can't be imported. Needs sentence-transformers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moh.models.transformers.remote_code import export_remote_code
from moh.models.transformers.sentences import copy_parts, sentence_parts

_ENCODE = """
import json, sys
with_package, directory, texts, output = sys.argv[1] == "True", *sys.argv[2:]
if with_package:
    import moh
else:
    sys.modules["moh"] = None  # importing it then fails
import torch
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(directory, device="cpu", trust_remote_code=not with_package)
torch.save(model.encode(json.load(open(texts)), convert_to_tensor=True, show_progress_bar=False), output)
"""


def encode(directory: Path, texts: Sequence[str], *, with_package: bool = True) -> Tensor:
    """Embeddings `[n, C]` by `SentenceTransformer(directory)`, with or without our package.

    Raises:
        subprocess.CalledProcessError: the library can't load or run the model.
    """
    with tempfile.TemporaryDirectory() as scratch:
        written, output = Path(scratch, "texts.json"), Path(scratch, "embeddings.pt")
        written.write_text(json.dumps(list(texts)), encoding="utf-8")
        command = [sys.executable, "-c", _ENCODE, str(with_package), str(directory), str(written), str(output)]
        # the exported code is copied to a folder of its own before it runs
        subprocess.run(command, check=True, env=os.environ | {"HF_MODULES_CACHE": scratch})
        embeddings: Tensor = torch.load(output, weights_only=True)
    return embeddings


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: Path, directory: Path) -> None:
    """Write a converted encoder as `moh convert` and `moh export remote-code` do, with the other parts of `source`."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    copy_parts(sentence_parts(source), directory)
    export_remote_code(directory)
