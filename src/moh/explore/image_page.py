"""The page of an image classifier: an image, its likeliest classes at a share of heads, and each head's patches.

`images` computes the numbers; `parts` and `markup` show them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr

from moh.data.images.formats import decode
from moh.explore import markup, parts
from moh.explore.images import ImageComparison, read_image, shaded_picture, time_image
from moh.explore.subjects import ImageSubject


@dataclass(frozen=True)
class _Shown:
    """One visitor's view: a comparison, and the layer and head whose use is shown."""

    comparison: ImageComparison
    layer: int = 0
    head: int = 0


def add_image_page(subject: ImageSubject) -> None:
    """Add the page to an application."""
    page = _ImagePage(subject)
    shown = gr.State(None, time_to_live=parts.KEPT)
    with gr.Row():
        with gr.Column():
            image = gr.Image(
                type="filepath", image_mode=None, sources=["upload", "clipboard"], label="Image", height=320, buttons=[],
                elem_id="image",
            )  # fmt: skip
            slider, own = parts.dial_controls(subject)
            problem = gr.HTML("", elem_id="problem")
            with gr.Row():
                compared = subject.reference is not None
                classes = parts.bars("classes"), parts.bars("classes-of-reference", visible=compared)
            summary = parts.table("summary")
        with gr.Column():
            patches = gr.Image(
                format="png", interactive=False, visible=False, height=480, buttons=[], elem_id="patches"
            )
            heads = parts.head_map("heads", choosable=True)
    results = [shown, problem, *classes, summary, patches, heads]
    again: Any = {"show_progress": "hidden", "api_visibility": "private", "trigger_mode": "always_last"}
    gr.on([image.change, own.input], page.read, [image, slider, own, shown], results, **again)
    slider.input(page.move, [image, slider, shown], [own, *results], **again)
    heads.select(page.choose, [shown], [shown, patches], **again)


class _ImagePage:
    """The page's event handlers for one model."""

    def __init__(self, subject: ImageSubject) -> None:
        self.subject = subject

    def read(self, path: str | None, value: float, own: bool, before: _Shown | None) -> Iterator[tuple[Any, ...]]:
        """Yields everything but the time at once, then the time as soon as it is measured."""
        if path is None:
            yield self._nothing("")
            return
        active_heads = parts.active_heads_of(self.subject, value, own)
        try:
            seen = read_image(self.subject, decode(Path(path).read_bytes()), active_heads)
        except ValueError as error:
            yield self._nothing(f"This image can't be read: {error}")
            return
        shown = _Shown(seen, *_telling(seen)) if before is None else replace(before, comparison=seen)
        rest = self._patches(shown), self._heads(shown)
        yield shown, "", *self._classes(seen), self._summary(seen, None), *rest
        seconds = time_image(self.subject, seen, active_heads)
        yield shown, "", *self._classes(seen), self._summary(seen, seconds), *rest

    def move(self, path: str | None, value: float, before: _Shown | None) -> Iterator[tuple[Any, ...]]:
        """As `read`, after the slider was moved: leaves the saved setting and unticks its box."""
        for shown in self.read(path, value, False, before):
            yield False, *shown

    def choose(self, shown: _Shown | None, data: gr.EventData) -> tuple[_Shown | None, gr.Image]:
        """The patches of the clicked layer and head."""
        if shown is None:
            return None, gr.Image(None, visible=False)
        layers = shown.comparison.layers
        layer = parts.whole_number(data, "layer", len(layers))
        shown = replace(shown, layer=layer, head=parts.whole_number(data, "head", layers[layer].gates.shape[-1]))
        return shown, self._patches(shown)

    def _nothing(self, problem: str) -> tuple[Any, ...]:
        """The page without an image."""
        return None, markup.notice(problem), None, None, parts.filled([], []), gr.Image(None, visible=False), None

    def _classes(self, seen: ImageComparison) -> tuple[gr.Label, gr.Label | None]:
        own = parts.likeliest(parts.share_label(self.subject, seen.share), seen.classes)
        if seen.reference_classes is None or self.subject.reference is None:
            return own, None
        return own, parts.likeliest(self.subject.reference.label, seen.reference_classes)

    def _summary(self, seen: ImageComparison, seconds: tuple[float, float | None] | None) -> gr.Dataframe:
        columns = [parts.share_label(self.subject, seen.share)]
        if self.subject.reference is not None:
            columns.append(self.subject.reference.label)
        times = ["measuring …"] * len(columns)
        if seconds is not None:
            times = [parts.duration(taken) for taken in seconds if taken is not None]
        return parts.filled(columns, [(parts.TIME_ROW, times)])

    def _patches(self, shown: _Shown) -> gr.Image:
        layers = shown.comparison.layers
        if not layers:
            return gr.Image(None, visible=False)
        layer = layers[shown.layer]
        used = int((layer.gates[0, :, shown.head] > 0).sum())
        said = f"Layer {shown.layer}, head {shown.head}: {used} of {layer.gates.shape[1]} tokens use it"
        said += " (grey: patches that don't)." if used < layer.gates.shape[1] else "."
        try:
            return gr.Image(shaded_picture(shown.comparison, shown.layer, shown.head), label=said, visible=True)
        except ValueError as error:
            return gr.Image(None, label=f"{said} {error}", visible=True)

    def _heads(self, shown: _Shown) -> dict[str, Any]:
        layers = shown.comparison.layers
        used = [(layer.gates[0] > 0).float().mean(0) for layer in layers]
        title = "Share of the patches that use each head (choose one)"
        return parts.heads(title, layers, used, what="load", chosen=(shown.layer, shown.head))


def _telling(seen: ImageComparison) -> tuple[int, int]:
    """Layer and head to show first: in the first MoH layer, the head whose load is closest to half of the patches."""
    for number, layer in enumerate(seen.layers):
        if layer.config is not None:
            load = (layer.gates[0] > 0).float().mean(0)  # [H]
            return number, int((load - 0.5).abs().argmin())
    return 0, 0
