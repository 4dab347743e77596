"""The page of a language model: a text, its tokens and their losses at a share of heads, the next token, the curve.

`texts` computes the numbers; `parts` and `markup` show them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from moh.explore import markup, parts
from moh.explore.subjects import TextSubject
from moh.explore.texts import MOST_CHARACTERS, TextComparison, read_text, share_curve, time_text
from moh.inspection.tables import to_pandas

EXAMPLE = (
    "The lighthouse keeper climbed the stairs every evening to light the lamp. From the top he could see the whole "
    "coast, and on clear nights the lights of"
)
HEADS_USED, PERPLEXITY, MODEL = "heads used, %", "perplexity", "model"
LOSS, DIFFERENCE = "loss", "difference"


@dataclass(frozen=True)
class _Shown:
    """One visitor's view: a comparison, and the chosen token."""

    comparison: TextComparison
    chosen: int | None = None


def add_text_page(app: gr.Blocks, subject: TextSubject) -> None:
    """Add the page to an application."""
    page = _TextPage(subject)
    shown = gr.State(None, time_to_live=parts.KEPT)
    text = gr.Textbox(
        EXAMPLE,
        label=f"Text (at most {subject.max_tokens:,} tokens)",
        lines=4,
        max_lines=12,
        max_length=MOST_CHARACTERS,
        elem_id="text",
        rtl=False,
    )
    slider, own = parts.dial_controls(subject)
    compared = subject.reference is not None
    with gr.Row():
        read = gr.Button("Read", variant="primary", elem_id="read", scale=0, min_width=140)
        shade = gr.Radio(
            [LOSS, DIFFERENCE],
            value=LOSS,
            label="Shade tokens by",
            visible=compared and subject.predicts,
            elem_id="shade",
        )
    problem = gr.HTML("", elem_id="problem")
    summary = parts.table("summary")
    with gr.Tab("Tokens"), gr.Row():
        with gr.Column(scale=3, min_width=320):
            gr.HTML(markup.note("Choose a token (click, or arrow keys and Enter) to see which heads it used."))
            tokens = parts.token_chooser("tokens")
        with gr.Column(scale=2, min_width=320):
            heads = parts.head_map("heads")
    with gr.Tab("Next token", visible=subject.predicts), gr.Row():
        following = parts.bars("next"), parts.bars("next-of-reference", visible=compared)
    with gr.Tab("All shares", visible=bool(subject.dial.values) and subject.predicts):
        draw = gr.Button("Read the text at every share of heads", elem_id="draw")
        curve = gr.LinePlot(
            x=HEADS_USED, y=PERPLEXITY, color=MODEL, height=280, elem_id="curve", tooltip="all", visible=False
        )
        figures = parts.table("figures")

    results = [shown, problem, summary, tokens, heads, *following]
    again: Any = {"show_progress": "hidden", "api_visibility": "private", "trigger_mode": "always_last"}
    gr.on(
        [app.load, read.click, text.submit, own.input], page.read, [text, slider, own, shade, shown], results, **again
    )
    slider.input(page.move, [text, slider, shade, shown], [own, *results], **again)
    shade.input(page.shade, [shown, shade], [tokens], show_progress="hidden", api_visibility="private")
    tokens.select(page.choose, [shown], [shown, heads], show_progress="hidden", api_visibility="private")
    draw.click(page.curve, [text], [problem, curve, figures], api_visibility="private")


class _TextPage:
    """The page's event handlers for one model."""

    def __init__(self, subject: TextSubject) -> None:
        self.subject = subject

    def read(self, text: str, value: float, own: bool, shade: str, before: _Shown | None) -> Iterator[tuple[Any, ...]]:
        """Yields everything but the time at once, then the time as soon as it is measured."""
        active_heads = parts.active_heads_of(self.subject, value, own)
        try:
            comparison = read_text(self.subject, text, active_heads)
        except ValueError as error:
            yield None, markup.notice(str(error)), parts.filled([], []), "", None, None, None
            return
        same = before is not None and before.comparison.ids == comparison.ids
        shown = _Shown(comparison, before.chosen if same and before is not None else None)
        cut = ""
        if comparison.left_out:
            cut = (
                f"The text is too long: {len(comparison.ids):,} tokens are read, {comparison.left_out:,} are left out."
            )
        rest = self._tokens(shown, shade), self._heads(shown), *self._next(comparison)
        yield shown, markup.notice(cut), self._summary(comparison, None), *rest
        seconds = time_text(self.subject, comparison.ids, active_heads)
        yield shown, markup.notice(cut), self._summary(comparison, seconds), *rest

    def move(self, text: str, value: float, shade: str, before: _Shown | None) -> Iterator[tuple[Any, ...]]:
        """As `read`, after the slider was moved: leaves the saved setting and unticks its box."""
        for shown in self.read(text, value, False, shade, before):
            yield False, *shown

    def shade(self, shown: _Shown | None, shade: str) -> str:
        return "" if shown is None else self._tokens(shown, shade)

    def choose(self, shown: _Shown | None, data: gr.EventData) -> tuple[_Shown | None, dict[str, Any] | None]:
        """The heads of the clicked token."""
        if shown is None:
            return None, None
        shown = replace(shown, chosen=parts.whole_number(data, "token", len(shown.comparison.ids)))
        return shown, self._heads(shown)

    def curve(self, text: str, progress: gr.Progress = gr.Progress()) -> tuple[str, Any, Any]:  # noqa: B008 (Gradio's way)
        """Perplexity at every share of heads, as a picture and in figures."""
        try:
            points, reference = share_curve(
                self.subject, text, progress=lambda done, of: progress((done, of), unit="shares")
            )
        except ValueError as error:
            return markup.notice(str(error)), gr.LinePlot(visible=False), parts.filled([], [])
        rows: list[dict[str, object]] = [_row(point.share, point.perplexity, "this model") for point in points]
        figures = [
            (f"{point.value} routed heads, {100 * point.share:.0f} %", [parts.number(point.perplexity)])
            for point in points
        ]
        if reference is not None and self.subject.reference is not None:
            label = self.subject.reference.label
            rows += [_row(point.share, reference, label) for point in (points[0], points[-1])]
            figures.append((label, [parts.number(reference)]))
        return "", gr.LinePlot(to_pandas(rows), visible=True), parts.filled(["perplexity"], figures)

    def _summary(self, comparison: TextComparison, seconds: tuple[float, float | None] | None) -> gr.Dataframe:
        columns, readings = [parts.share_label(self.subject, comparison.share)], [comparison.model]
        if comparison.reference is not None and self.subject.reference is not None:
            columns.append(self.subject.reference.label)
            readings.append(comparison.reference)
        times = ["measuring …"] * len(columns)
        if seconds is not None:
            times = [parts.duration(taken) for taken in seconds if taken is not None]
        if not self.subject.predicts:
            read = f"{len(comparison.ids):,}"
            return parts.filled(columns, [("tokens read", [read] * len(columns)), (parts.TIME_ROW, times)])
        predicted = len(comparison.ids) - 1
        return parts.filled(
            columns,
            [
                ("perplexity", [parts.number(reading.perplexity) for reading in readings]),
                ("tokens predicted", [f"{predicted:,}"] * len(columns)),
                (parts.TIME_ROW, times),
            ],
        )

    def _tokens(self, shown: _Shown, shade: str) -> str:
        comparison = shown.comparison
        other = None if comparison.reference is None else comparison.reference.losses
        return markup.shaded_tokens(
            comparison.tokens,
            comparison.model.losses,
            other,
            difference=shade == DIFFERENCE and other is not None,
            chosen=shown.chosen,
        )

    def _heads(self, shown: _Shown) -> dict[str, Any]:
        layers = shown.comparison.layers
        if shown.chosen is None:
            used = [(layer.gates[0] > 0).float().mean(0) for layer in layers]
            return parts.heads("Share of all tokens that use each head", layers, used, what="load")
        token = shown.comparison.tokens[shown.chosen]
        gates = [layer.gates[0, shown.chosen] for layer in layers]
        used_heads = sum(int((row > 0).sum()) for row in gates)
        total = sum(len(row) for row in gates)
        title = f"Token {shown.chosen}, “{token.strip() or token}”, uses {used_heads} of {total} heads"
        return parts.heads(title, layers, gates, what="gate")

    def _next(self, comparison: TextComparison) -> tuple[gr.Label, gr.Label | None]:
        own = parts.likeliest(parts.share_label(self.subject, comparison.share), comparison.model.next_tokens)
        if comparison.reference is None or self.subject.reference is None:
            return own, None
        return own, parts.likeliest(self.subject.reference.label, comparison.reference.next_tokens)


def _row(share: float, perplexity: float, model: str) -> dict[str, object]:
    """A point of the curve, with the plot's column names."""
    return {HEADS_USED: 100 * share, PERPLEXITY: perplexity, MODEL: model}
