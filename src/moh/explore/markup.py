"""Readings as HTML: tables, bars, shaded tokens, the map of layers and heads. All text from outside is escaped here.

Clickable elements carry data-token, or data-layer and data-head, which `chooser.js` sends to the application.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import gradio as gr
from torch import Tensor

from moh.explore.observing import REPEATS
from moh.explore.subjects import Subject
from moh.inspection.trace import LayerTrace

if TYPE_CHECKING:
    from PIL.Image import Image


KEPT = 3600
"""Seconds for which uploads and a visitor's comparison are kept."""
_LOSS_OF_FULL_SHADE = 10.0  # nats
_DIFFERENCE_OF_FULL_SHADE = 2.0
_DEEPEST = 0.72  # opacity of the strongest shade, so that letters stay readable
_ORANGE, _BLUE = "213 94 0", "0 114 178"
_VISIBLE = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"})


def notice(text: str) -> str:
    """A line that reports a problem; empty for an empty text."""
    return f'<p class="moh-notice" role="status">{escape(text)}</p>' if text else ""


def note(text: str) -> str:
    """A paragraph of explanation."""
    return f'<p class="moh-note">{escape(text)}</p>' if text else ""


def heading(title: str, text: str) -> str:
    """The page's title and a paragraph below it."""
    return f"<h1>{escape(title)}</h1>{note(text)}"


def table(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A table whose rows are (heading, cells)."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
        for name, cells in rows
    )
    return (
        f'<div class="moh-scroll"><table class="moh-table"><thead><tr><td></td>{head}</tr></thead>{body}</table></div>'
    )


def bars(title: str, entries: Sequence[tuple[str, float]]) -> str:
    """Names with their probabilities, each with a bar."""
    rows = "".join(
        f'<li><bdi class="what" title="{_visible(name)}">{_visible(name)}</bdi>'
        f'<span class="track"><span style="width:{100 * p:.2f}%"></span></span><span class="number">{p:.1%}</span></li>'
        for name, p in entries
    )
    return f'<div class="moh-bars"><h3>{escape(title)}</h3><ol>{rows}</ol></div>'


def side_by_side(*parts: str) -> str:
    """Parts next to one another if there is room."""
    return f'<div class="moh-columns">{"".join(parts)}</div>'


def shaded_tokens(
    tokens: Sequence[str],
    losses: Sequence[float | None],
    other: Sequence[float | None] | None,
    *,
    difference: bool,
    chosen: int | None,
) -> str:
    """The text, each token shaded by its loss, or by how much larger it is than the other model's.

    Args:
        tokens: N parts of the text.
        losses: N losses in nats; None is not shaded.
        other: N losses of the reference.
        difference: shade by `losses - other`: orange if positive, blue if negative.
        chosen: the token to mark.
    """
    spans = []
    for index, (token, loss) in enumerate(zip(tokens, losses, strict=True)):
        beside = None if other is None else other[index]
        shade, said = "", "the first token: nothing predicts it" if index == 0 else "no loss: the model is an encoder"
        if loss is not None:
            said = f"loss {loss:.2f}, probability {math.exp(-loss):.2%}"
            strength, colour = loss / _LOSS_OF_FULL_SHADE, _ORANGE
            if beside is not None:
                said += f"; {beside:.2f}, {math.exp(-beside):.2%} in the other model"
                if difference:
                    strength = abs(loss - beside) / _DIFFERENCE_OF_FULL_SHADE
                    colour = _ORANGE if loss > beside else _BLUE
            shade = f' style="background:rgb({colour} / {_DEEPEST * min(1.0, strength):.3f})"'
        mark = ' aria-pressed="true"' if index == chosen else ""
        focus = 0 if index == (chosen or 0) else -1  # one stop for the Tab key; the arrow keys move on from it
        spans.append(
            f'<span role="button" tabindex="{focus}" data-token="{index}" title="token {index}: {said}"{mark}{shade}>'
            f"{_shown(token)}</span>"
        )
    return f'<div class="moh-text" dir="auto">{"".join(spans)}</div>'


def head_map(
    title: str,
    layers: Sequence[LayerTrace],
    values: Sequence[Tensor],
    *,
    said: str,
    choosable: bool = False,
    chosen: tuple[int, int] | None = None,
) -> str:
    """Layers x heads; the larger its value, the bluer a cell.

    Args:
        title: title of the map.
        layers: L layers.
        values: per layer `[H]`, at least 0; layers may differ in H. The bluest is 1, or the largest value if above 1.
        said: name of a value, for the cells' descriptions.
        choosable: whether cells are buttons.
        chosen: layer and head to mark.
    """
    if not layers:
        return note("This model's attention is of a kind that can't be inspected, so its heads are not shown.")
    widest = max(len(row) for row in values)
    top = max(1.0, *(float(row.max()) for row in values))
    head = "".join(f'<th scope="col">{i if widest <= 16 or i % 4 == 0 else ""}</th>' for i in range(widest))
    rows = []
    for number, (layer, row) in enumerate(zip(layers, values, strict=True)):
        shared = set() if layer.config is None else set(layer.config.shared_indices)
        cells = []
        for index, value in enumerate(row.tolist()):
            kind = "dense" if layer.config is None else "shared" if index in shared else "routed"
            what = f'title="layer {number}, head {index} ({kind}): {escape(said)} {value:.2f}"'
            shade = f' style="--v:{value / top:.3f}"'
            mark = "S" if kind == "shared" else "D" if kind == "dense" else ""
            if choosable:
                picked = ' aria-pressed="true"' if (number, index) == chosen else ""
                inner = (
                    f'<button type="button" data-layer="{number}" data-head="{index}" {what}{picked}>{mark}</button>'
                )
                cells.append(f"<td{shade}>{inner}</td>")
            else:
                cells.append(f"<td{shade} {what}>{mark}</td>")
        rows.append(f'<tr><th scope="row">{number}</th>{"".join(cells)}</tr>')
    dense = sum(layer.config is None for layer in layers)
    legend = "Rows are layers, columns heads; bluer means more. S: shared, used by every token."
    if dense:
        legend += f" D: the head of a dense layer ({dense} of {len(layers)} layers)."
    return (
        f'<div class="moh-map"><h3>{escape(title)}</h3><div class="moh-scroll"><table><thead><tr><td></td>{head}</tr>'
        f"</thead>{''.join(rows)}</table></div>{note(legend)}</div>"
    )


def image_element(image: Image, description: str) -> str:
    """The image, embedded in the page."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img class="moh-image" alt="{escape(description)}" src="data:image/png;base64,{data}">'


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


def _visible(text: str) -> str:
    return escape(text.translate(_VISIBLE))


def _shown(token: str) -> str:
    """A token in running text; its marks are not copied with the text."""
    return escape(token.replace("\r", "")).replace("\n", '<i aria-hidden="true">↵</i>\n') or "<i>∅</i>"


TIME_ROW = f"time (median of {REPEATS})"


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
        gr.HTML(note(subject.reference.note))
    elif subject.reference is None:
        gr.HTML(note("Nothing to compare with: give a dense model with --dense."))
    return slider, own


def active_heads_of(subject: Subject, value: float, own: bool) -> int | None:
    """The controls' setting: a value of the dial, or None for the model's own setting."""
    return None if own or not subject.dial.values else int(value)


def share_label(subject: Subject, share: float) -> str:
    """The explored model at a share of heads, as a heading."""
    return f"this model, {100 * share:.0f} % of the heads" if subject.dial.routers else "this model, dense"


def chooser(elem_id: str) -> Any:
    """HTML that sends `select` with data-token, or data-layer and data-head, of the clicked element."""
    script = (files(__package__) / "chooser.js").read_text(encoding="utf-8")
    return gr.HTML("", elem_id=elem_id, js_on_load=script)


def whole_number(data: gr.EventData, name: str, limit: int) -> int:
    """A number from the browser.

    Raises:
        ValueError: it is missing, or not between 0 and `limit` - 1.
    """
    value = (data._data or {}).get(name)
    if not isinstance(value, int) or not 0 <= value < limit:
        raise ValueError(f"{name} must be between 0 and {limit - 1}, got {value!r}")
    return value
