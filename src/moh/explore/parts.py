"""What both pages of the application have: the dial with its explanation, and HTML in which things can be chosen."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import gradio as gr

from moh.explore import markup
from moh.explore.observing import REPEATS
from moh.explore.subjects import Subject

TIME_ROW = f"time (median of {REPEATS})"


def budget_controls(subject: Subject) -> tuple[gr.Slider, gr.Checkbox]:
    """The slider over the dial, and the box for a budget that the slider can't show; hidden where they say nothing."""
    dial = subject.dial
    values = dial.values or (0, 1)
    uneven = bool(dial.values) and dial.own is None
    label = "Routed heads active per token"
    shared = {router.config.num_shared for router in dial.routers}
    if len(shared) == 1:
        label += f", beside {shared.pop()} shared"
    if dial.by_cost:
        label += " (on average over the layers)"
    slider = gr.Slider(
        values[0],
        values[-1],
        value=dial.own if dial.own is not None else values[-1],
        step=values[1] - values[0],
        label=label,
        visible=bool(dial.values),
        elem_id="budget",
        buttons=[],
    )
    counts = dial.counts() or [0]
    own = gr.Checkbox(
        uneven,
        label=f"As saved: {min(counts)} to {max(counts)}, layer by layer",
        visible=uneven,
        elem_id="own-budget",
    )
    if subject.reference is not None and subject.reference.note:
        gr.HTML(markup.note(subject.reference.note))
    elif subject.reference is None:
        gr.HTML(markup.note("Nothing to compare with: give a dense model by --dense."))
    return slider, own


def budget_of(subject: Subject, value: float, own: bool) -> int | None:
    """What the controls ask for: a value of the dial, or None for the model's own budget."""
    return None if own or not subject.dial.values else int(value)


def budget_label(subject: Subject, share: float) -> str:
    """The explored model at a budget, as a heading."""
    return f"this model, {100 * share:.0f} % of the heads" if subject.dial.routers else "this model, dense"


def chooser(elem_id: str) -> Any:
    """HTML that sends `select` with data-token, or data-layer and data-head, of what is clicked in it."""
    script = (files(__package__) / "chooser.js").read_text(encoding="utf-8")
    return gr.HTML("", elem_id=elem_id, js_on_load=script)


def whole_number(data: gr.EventData, name: str, limit: int) -> int:
    """A number that the browser sent.

    Raises:
        ValueError: it is none, or not between 0 and `limit` - 1.
    """
    value = (data._data or {}).get(name)
    if not isinstance(value, int) or not 0 <= value < limit:
        raise ValueError(f"{name} must be between 0 and {limit - 1}, got {value!r}")
    return value
