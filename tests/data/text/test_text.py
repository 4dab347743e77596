"""Text files are read strictly, HTML by paragraphs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moh.data.text.files import html_paragraphs, paragraphs, read_texts


def test_directories_are_read_in_the_order_of_their_file_names(tmp_path: Path) -> None:
    for name, text in {"b.txt": "two", "a.md": "one", "sub/c.html": "<p>three", "d.py": "no"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert read_texts([tmp_path]) == ["one", "two", "three"]
    assert read_texts([tmp_path / "d.py", str(tmp_path / "a.md")]) == ["no", "one"]


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfword")
    assert read_texts([tmp_path]) == ["word"]


def test_text_that_is_not_utf8_names_the_file_and_the_offset(tmp_path: Path) -> None:
    file = tmp_path / "latin1.txt"
    file.write_bytes("na\u00efve".encode("latin-1"))
    with pytest.raises(ValueError, match=re.escape(f"{file} is not UTF-8 text: byte 0xef at offset 2")):
        read_texts([file])


@pytest.mark.parametrize("content", ["", " \n", "\ufeff"], ids=["empty", "blank", "mark_only"])
def test_a_file_without_text_is_an_error(tmp_path: Path, content: str) -> None:
    file = tmp_path / "nothing.txt"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"nothing\.txt holds no text"):
        read_texts([file])


def test_hidden_names_in_a_directory_are_left_out_and_named(tmp_path: Path, caplog) -> None:
    for name in (".venv/lib/x/LICENSE.txt", ".git/notes.txt", "a/node_modules/readme.md", ".b.txt", "a/c.txt", "d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read_texts([tmp_path]) == ["a/c.txt", "d.txt"]
    assert f"left out of {tmp_path}: .b.txt, .git, .venv, a/node_modules (hidden" in caplog.text
    assert read_texts([tmp_path / ".venv", tmp_path / ".b.txt"]) == [".venv/lib/x/LICENSE.txt", ".b.txt"]  # if named


def test_an_empty_file_does_not_stop_a_directory(tmp_path: Path, caplog) -> None:
    for name, text in (("a.txt", "text"), ("__init__.md", ""), ("b.html", "<nav>menu</nav>")):
        (tmp_path / name).write_text(text)
    assert read_texts([tmp_path]) == ["text"]
    assert f"left out, without text: {tmp_path / '__init__.md'}, {tmp_path / 'b.html'}" in caplog.text
    (tmp_path / "a.txt").unlink()
    with pytest.raises(ValueError, match=f"{tmp_path} holds no text"):
        read_texts([tmp_path])


def test_missing_files_and_directories_without_text_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such text file or directory: .*gone\.txt"):
        read_texts([tmp_path / "gone.txt"])
    with pytest.raises(FileNotFoundError, match="no text file"):
        read_texts([tmp_path])


def test_html_is_reduced_to_its_paragraphs() -> None:
    html = """<html><head><title>skipped</title><style>p { x: y }</style></head>
        <body><nav><ul><li>Menu</li></ul></nav>
        <h1>Title</h1><p>One &amp; <b>two</b>,
            <br>three.</p>
        <div>Outer <div>inner</div> rest</div><script>var a = "<p>no</p>"; if (1 < 2) {}</script>
        <pre>code  kept out</pre><ul><li>item<li>next</ul>tail"""
    expected = ["Title", "One & two, three.", "Outer", "inner", "rest", "item", "next", "tail"]
    assert html_paragraphs(html) == expected


def test_an_unclosed_head_does_not_swallow_the_page() -> None:
    assert html_paragraphs("<html><head><title>x</title><body><p>text</p></body>") == ["text"]


def test_paragraphs_are_what_blank_lines_separate() -> None:
    assert paragraphs("\n\n a\nb \n \t\n\n c\r\n\r\nd\n") == ["a\nb", "c", "d"]
