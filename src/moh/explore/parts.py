"""What the pages are made of: the dial, bars, tables and the map of heads, as Gradio's components and their values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import gradio as gr
from torch import Tensor

from moh.explore import markup
from moh.explore.observing import REPEATS
from moh.explore.subjects import Subject
from moh.inspection.page.page import layer_facts, page_file
from moh.inspection.trace import LayerTrace

KEPT = 3600
"""Seconds for which uploads and a visitor's comparison are kept."""

TIME_ROW = f"time (median of {REPEATS})"
_VISIBLE = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"})
_MAP = '<h3></h3><div class="moh-map"></div>'


def dial_controls(subject: Subject) -> tuple[gr.Slider, gr.Checkbox]:
    """The dial's slider, and the box for a saved setting that the slider can't show; hidden if they have no use."""
    dial = subject.dial
    values = dial.values or (0, 1)
    uneven = bool(dial.values) and dial.own is None
    label = "Routed heads active per token"
    shared = {router.config.num_shared for router in dial.routers}
    if len(shared) == 1:
        label += f", plus {shared.pop()} shared"
    if dial.by_cost:
        label += " (on average over the layers)"
    slider = gr.Slider(
        values[0],
        values[-1],
        value=dial.own if dial.own is not None else values[-1],
        step=values[1] - values[0],
        label=label,
        visible=bool(dial.values),
        elem_id="dial",
        buttons=[],
    )
    counts = dial.counts() or [0]
    own = gr.Checkbox(
        uneven,
        label=f"As saved: {min(counts)} to {max(counts)}, layer by layer",
        visible=uneven,
        elem_id="own-heads",
    )
    if subject.reference is not None and subject.reference.note:
        gr.HTML(markup.note(subject.reference.note))
    elif subject.reference is None:
        gr.HTML(markup.note("Nothing to compare with: give a dense model with --dense."))
    return slider, own


def active_heads_of(subject: Subject, value: float, own: bool) -> int | None:
    """The controls' setting: a value of the dial, or None for the model's own setting."""
    return None if own or not subject.dial.values else int(value)


def share_label(subject: Subject, share: float) -> str:
    """The explored model at a share of heads, as a heading."""
    return f"this model, {100 * share:.0f} % of the heads" if subject.dial.routers else "this model, dense"


def bars(elem_id: str, *, visible: bool = True) -> gr.Label:
    """Probabilities with their bars, for `likeliest`."""
    return gr.Label(show_heading=False, visible=visible, elem_id=elem_id, buttons=[])


def likeliest(title: str, entries: Sequence[tuple[str, float]]) -> gr.Label:
    """A value of `bars`; entries that look the same are added up."""
    shown: dict[str, float] = {}
    for name, p in entries:
        visible = name.translate(_VISIBLE)
        shown[visible] = shown.get(visible, 0.0) + p
    return gr.Label(shown, label=title)


def table(elem_id: str) -> gr.Dataframe:
    """A table to read, hidden until it is filled, for `filled`."""
    return gr.Dataframe(interactive=False, wrap=True, buttons=[], visible=False, elem_id=elem_id)


def filled(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> gr.Dataframe:
    """A value of `table`: rows are (heading, cells); hidden without rows.

    Columns are equally wide: Gradio's own widths fit the longest words and are wider than a phone.
    """
    value = {"headers": ["", *columns], "data": [[name, *cells] for name, cells in rows]}
    widths: list[str | int] = [f"{100 / (len(columns) + 1):.4f}%"] * (len(columns) + 1)
    return gr.Dataframe(value, visible=bool(rows), column_widths=widths)


def head_map(elem_id: str, *, choosable: bool = False) -> Any:
    """The map of layers and heads, that of the page of `moh inspect --html`, for `heads`.

    Args:
        elem_id: of the element.
        choosable: whether a click on a head sends `select` with `layer` and `head`.
    """
    script = page_file("map.js") + (files(__package__) / "head_map.js").read_text(encoding="utf-8")
    return gr.HTML(None, html_template=_MAP, js_on_load=script, elem_id=elem_id, choosable=choosable)


def heads(
    title: str,
    layers: Sequence[LayerTrace],
    values: Sequence[Tensor],
    *,
    what: str,
    chosen: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """A value of `head_map`.

    Args:
        title: title of the map.
        layers: L layers.
        values: per layer `[H]`, at least 0; layers may differ in H. The bluest is 1, or the largest value if above 1.
        what: name of a value.
        chosen: layer and head to mark.
    """
    if not layers:
        title = "This model's attention is of a kind that can't be inspected, so its heads are not shown."
    return {
        "title": title,
        "layers": layer_facts(layers),
        "values": [row.tolist() for row in values],
        "top": max(1.0, *(float(row.max()) for row in values)) if layers else 1.0,
        "what": what,
        "chosen": chosen,
    }


def token_chooser(elem_id: str) -> Any:
    """HTML that sends `select` with the data-token of the clicked element."""
    script = (files(__package__) / "chooser.js").read_text(encoding="utf-8")
    return gr.HTML("", elem_id=elem_id, js_on_load=script)


def duration(seconds: float) -> str:
    """Seconds as readable milliseconds."""
    return f"{1000 * seconds:.1f} ms" if seconds < 0.1 else f"{1000 * seconds:,.0f} ms"


def number(value: float | None) -> str:
    """Four significant digits; a dash for None."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "∞" if value == math.inf else "not a number"
    return f"{value:.4g}" if value < 10_000 else f"{value:,.0f}"


def whole_number(data: gr.EventData, name: str, limit: int) -> int:
    """A number from the browser.

    Raises:
        ValueError: it is missing, or not between 0 and `limit` - 1.
    """
    value = (data._data or {}).get(name)
    if not isinstance(value, int) or not 0 <= value < limit:
        raise ValueError(f"{name} must be between 0 and {limit - 1}, got {value!r}")
    return value
