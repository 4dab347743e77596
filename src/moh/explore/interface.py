"""The application: each model's page (`text_page` or `image_page`), its style, and a local server.

Nothing is requested from other machines: no fonts, no scripts, no telemetry.
"""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING, Any

import gradio as gr

from moh.explore import markup, parts
from moh.explore.subjects import ImageSubject, TextSubject
from moh.inspection.page.page import page_file

if TYPE_CHECKING:
    from collections.abc import Sequence

_FONT: Sequence[str] = ("system-ui", "sans-serif")
_MONOSPACED: Sequence[str] = ("ui-monospace", "monospace")
_LARGEST_FILE = "50mb"
_SWEPT_EVERY = 600  # seconds between two deletions of old uploads
_MOST_VISITORS = 100  # whose comparisons are kept, some 8 MB each; the one that came first is then forgotten


def build(subject: TextSubject | ImageSubject) -> gr.Blocks:
    """The application for a model; `serve` starts it."""
    app: gr.Blocks
    title = f"{subject.name}: heads at work"
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(_SWEPT_EVERY, parts.KEPT)) as app:
        gr.HTML(markup.heading(subject.name, subject.facts), elem_id="about")
        if isinstance(subject, TextSubject):
            from moh.explore.text_page import add_text_page

            add_text_page(app, subject)
        else:
            from moh.explore.image_page import add_image_page

            add_image_page(subject)
    return app


def serve(
    app: gr.Blocks,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    browser: bool = False,
    wait: bool = True,
) -> str:
    """Serve an application until it is interrupted, without a password: whoever reaches the address can use it.

    Args:
        app: from `build`.
        host: address to listen at; "0.0.0.0" lets other machines in.
        port: port to listen at; None takes the first free one from 7860 on.
        share: also open a public address, through the servers of Gradio's makers.
        browser: open it in this machine's browser.
        wait: False returns at once; `app.close()` stops it.

    Returns:
        the local address.

    Raises:
        OSError: the port is taken.
    """
    theme: Any = gr.themes.Default(font=list(_FONT), font_mono=list(_MONOSPACED))
    _, address, _ = app.queue(api_open=False).launch(
        server_name=host,
        server_port=port,
        share=share,
        inbrowser=browser,
        prevent_thread_lock=not wait,
        quiet=not wait,
        theme=theme,
        css=(files(__package__) / "style.css").read_text(encoding="utf-8") + page_file("map.css"),
        footer_links=[],
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        max_file_size=_LARGEST_FILE,
        state_session_capacity=_MOST_VISITORS,
    )
    return str(address)
