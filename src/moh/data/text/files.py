"""Reading text files: plain text, Markdown and HTML, strictly UTF-8, one string per file, blank lines between paragraphs."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from html.parser import HTMLParser
from pathlib import Path

from moh._files import files_below

_logger = logging.getLogger(__name__)

SUFFIXES = (".txt", ".md", ".html", ".htm")
"""Endings of the files that are read from a directory."""

# A paragraph ends where one of these starts or ends; every other element is part of the running text.
_BLOCKS = frozenset(
    "address article aside blockquote body caption center dd div dl dt fieldset figcaption figure footer form h1 h2 h3 "
    "h4 h5 h6 header hr li main ol p section table tbody td tfoot th thead tr ul".split()
)
# Not prose: invisible elements, menus, and verbatim text such as code.
_SKIPPED = frozenset("head script style nav pre template".split())


def read_texts(paths: Iterable[str | Path]) -> list[str]:
    """Read text files, or all the text files below directories, as one string per file.

    Args:
        paths: files of any suffix, or directories, whose files ending in `SUFFIXES` are read in the order of their
            names; hidden ones (`moh._files.is_hidden`) and those without text are left out, with a warning. Files ending
            in .html or .htm are reduced to their paragraphs.

    Raises:
        FileNotFoundError: a path does not exist, or a directory holds no text file.
        ValueError: a file is not UTF-8 (names the byte), or a path holds no text.
    """
    texts: list[str] = []
    for path in map(Path, paths):
        found = {file: read_text(file) for file in _files(path)}
        if not any(found.values()):
            raise ValueError(f"{path} holds no text")
        if empty := [str(file) for file, text in found.items() if not text]:
            _logger.warning("left out, without text: %s", ", ".join(empty))
        texts += filter(None, found.values())
    return texts


_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}  # a visible sign for each
_CONTROLS |= {0x7F: 0x2421, **dict.fromkeys(range(0x80, 0xA0), 0xFFFD)}


def printable(text: str) -> str:
    """The text of a model or file as a terminal may show it: control characters, which may steer it, become signs."""
    return text.translate(_CONTROLS)


def paragraphs(text: str) -> list[str]:
    """The non-empty paragraphs of a text, separated by blank lines, stripped."""
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]


def html_paragraphs(html: str) -> list[str]:
    """The paragraphs of an HTML page, white space collapsed; scripts, menus and verbatim text are left out."""
    parser = _ParagraphParser()
    parser.feed(html)
    parser.close()
    return parser.finish()


def decode_utf8(data: bytes, *, name: str | Path) -> str:
    """Decode strictly, without a byte order mark.

    Raises:
        ValueError: not UTF-8; the message names `name` and the offset of the first bad byte.
    """
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start} ({error.reason})"
        ) from None


def _files(path: Path) -> Sequence[Path]:
    if path.is_dir():
        found = sorted(file for folder, name in files_below(path, SUFFIXES) if (file := Path(folder, name)).is_file())
        if not found:
            raise FileNotFoundError(f"no text file ({', '.join(SUFFIXES)}) in the directory {path}")
        return found
    if not path.exists():
        raise FileNotFoundError(f"no such text file or directory: {path}")
    return [path]


def read_text(file: Path) -> str:
    """The text of one file, of HTML its paragraphs; "" if it holds none.

    Raises:
        ValueError: it is not UTF-8; names the byte.
    """
    text = decode_utf8(file.read_bytes(), name=file)
    if file.suffix.lower() in (".html", ".htm"):
        text = "\n\n".join(html_paragraphs(text))
    return text if text.strip() else ""


class _ParagraphParser(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._paragraphs: list[str] = []
        self._current: list[str] = []
        self._skipping: list[str] = []  # open elements whose text is left out

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _SKIPPED:
            self._end_paragraph()
            self._skipping.append(tag)
        elif tag in _BLOCKS:
            self._end_paragraph()
            if tag == "body":
                self._skipping.clear()  # a page whose <head> was never closed
        elif tag == "br":
            self._current.append(" ")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _SKIPPED:  # <script/> holds nothing to skip
            self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._skipping:
            del self._skipping[self._skipping.index(tag) :]
        elif tag in _BLOCKS:
            self._end_paragraph()

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self._current.append(data)

    def _end_paragraph(self) -> None:
        text = " ".join("".join(self._current).split())
        if text:
            self._paragraphs.append(text)
        self._current.clear()

    def finish(self) -> list[str]:
        self._end_paragraph()
        return self._paragraphs
