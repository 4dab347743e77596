"""Readings as HTML: notes, and a text whose tokens are shaded. All text from outside is escaped here.

Gradio's HighlightedText is not used for tokens: it separates the pieces of a word and drops line breaks. Tokens carry
data-token, which `chooser.js` sends to the application.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

_LOSS_OF_FULL_SHADE = 10.0  # nats
_DIFFERENCE_OF_FULL_SHADE = 2.0
_DEEPEST = 0.72  # opacity of the strongest shade, so that letters stay readable
_ORANGE, _BLUE = "213 94 0", "0 114 178"


def notice(text: str) -> str:
    """A line that reports a problem; empty for an empty text."""
    return f'<p class="moh-notice" role="status">{escape(text)}</p>' if text else ""


def note(text: str) -> str:
    """A paragraph of explanation."""
    return f'<p class="moh-note">{escape(text)}</p>' if text else ""


def heading(title: str, text: str) -> str:
    """The page's title and a paragraph below it."""
    return f"<h1>{escape(title)}</h1>{note(text)}"


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


def _shown(token: str) -> str:
    """A token in running text; its marks are not copied with the text."""
    return escape(token.replace("\r", "")).replace("\n", '<i aria-hidden="true">↵</i>\n') or "<i>∅</i>"
