"""Samples -> one HTML file: compressed data, no external addresses, none of the user's text as markup.

The page itself is `template.html`, `page.css` and `page.js`; its map of heads, `map.js` and `map.css`, is that of
`moh explore` too.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moh._files import write_text
from moh.inspection.page.samples import PageSample
from moh.inspection.trace import LayerTrace

_VALUES = ("gates", "contributions")


@dataclass(frozen=True)
class HeadPage:
    """A finished page. `save` writes it; a notebook displays it."""

    html: str

    def save(self, path: str | Path) -> None:
        """Write the page, whole or not at all."""
        write_text(Path(path), self.html)

    def _repr_html_(self) -> str:
        return f'<iframe srcdoc="{html.escape(self.html)}" style="width:100%;height:760px;border:0"></iframe>'


def head_page(samples: Sequence[PageSample], *, title: str = "Which head does what") -> HeadPage:
    """Make the page of some inputs to one model.

    Args:
        samples: all from one model, with the same layers and heads.
        title: of the page.

    Raises:
        ValueError: there are no samples, or they come from different models.
    """
    if not samples:
        raise ValueError("samples must hold at least one input")
    first = [(layer.name, layer.gates.shape[-1]) for layer in samples[0].layers]
    for sample in samples:
        if [(layer.name, layer.gates.shape[-1]) for layer in sample.layers] != first:
            raise ValueError(f"samples must come from one model, but {sample.name!r} has other layers than the first")
    data = {
        "title": title,
        "layers": layer_facts(samples[0].layers),
        "samples": [_sample(sample) for sample in samples],
    }
    page = page_file("template.html")
    parts = {
        "title": html.escape(title),
        "style": page_file("page.css") + page_file("map.css"),
        "script": page_file("map.js") + page_file("page.js"),
        # without "<" no token can end the script element
        "data": json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"),
    }
    # All places at once: a text may hold such a place too. Names of files need not be UTF-8.
    page = re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], page)
    return HeadPage(page.encode(errors="replace").decode())


def page_file(name: str) -> str:
    """A file of this folder, such as "map.js"."""
    return (files(__package__) / name).read_text(encoding="utf-8")


def layer_facts(layers: Sequence[LayerTrace]) -> list[dict[str, Any]]:
    """What `map.js` must know of the layers: each one's number of heads, whether tokens choose, and its shared heads."""
    return [
        {
            "name": layer.name,
            "heads": layer.gates.shape[-1],
            "routed": layer.config is not None,
            "shared": [] if layer.config is None else list(layer.config.shared_indices),
        }
        for layer in layers
    ]


def _sample(sample: PageSample) -> dict[str, Any]:
    made: dict[str, Any] = {"name": sample.name, "group": sample.group, "layers": []}
    if sample.image is not None:
        buffer = io.BytesIO()
        sample.image.save(buffer, format="PNG")
        made["image"] = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    else:
        made["tokens"] = sample.tokens
    packed = bytearray()
    for layer in sample.layers:
        scales = {}
        for name in _VALUES:
            levels, scales[name] = _levels(getattr(layer, name)[0])
            packed += levels
        entry = {"tokens": layer.gates.shape[1], "scales": [scales[name] for name in _VALUES]}
        if sample.image is not None:
            entry["grid"] = list(sample.grid(layer))
        made["layers"].append(entry)
    made["values"] = base64.b64encode(zlib.compress(bytes(packed), 9)).decode()
    return made


def _levels(values: Tensor) -> tuple[bytes, float]:
    """`[N, H]` values of at least 0 -> one byte each, head by head, and the value of 255; only 0 becomes 0."""
    finite = values.nan_to_num(0.0, 0.0, 0.0).clamp_min(0).T.contiguous()  # [H, N]
    top = float(finite.max()) if finite.numel() else 0.0
    if top == 0:
        return bytes(finite.numel()), 0.0
    levels = torch.where(finite > 0, (finite / top * 255).round().clamp(1, 255), 0.0)
    return levels.to(torch.uint8).cpu().numpy().tobytes(), top
