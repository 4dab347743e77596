"""Every corpus has two disjoint parts, the same on every machine."""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
from pathlib import Path

import pytest

from moh.data import fetch as _sources
from moh.data.text.corpora import CORPORA, DEFAULT_CORPUS, corpus_from_files, equal_parts, load_corpus, split_documents


def test_every_tenth_document_is_held_out_and_none_is_in_both_parts() -> None:
    documents = [f"text {i}" for i in range(1, 26)]
    train, heldout = split_documents(documents)
    assert heldout == ["text 10", "text 20"]
    assert train == [text for text in documents if text not in heldout]
    assert split_documents(documents) == (train, heldout)


def test_too_few_documents_to_split_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"at least 10 .* got 9: give more text, or name heldout_files"):
        split_documents(["x"] * 9)


@pytest.mark.parametrize("count", [10, 57, 400])
@pytest.mark.parametrize("separator", ["\n\n", "\n"], ids=["paragraphs", "lines"])
def test_own_files_are_split_by_blocks_that_stay_together(tmp_path: Path, count: int, separator: str) -> None:
    units = [f"paragraph {i}." for i in range(count)]
    (tmp_path / "a.txt").write_text(separator.join(units[: count // 2]))
    (tmp_path / "b.txt").write_text(separator.join(units[count // 2 :]))
    corpus = corpus_from_files([tmp_path])
    parts = [[unit for block in part for unit in block.split("\n\n")] for part in (corpus.train, corpus.heldout)]
    assert sorted(parts[0] + parts[1]) == sorted(units)
    assert 0.02 * count < len(parts[1]) <= 0.2 * count
    assert max(block.count("\n\n") for block in corpus.train) < 20
    assert corpus == corpus_from_files([tmp_path])


def test_own_held_out_files_are_taken_whole(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("train")
    (tmp_path / "b.txt").write_text("measure")
    corpus = corpus_from_files([tmp_path / "a.txt"], [tmp_path / "b.txt"])
    assert (corpus.train, corpus.heldout) == (["train"], ["measure"])
    with pytest.raises(ValueError, match=r"heldout_files must not be among files, got .*a\.txt in both"):
        corpus_from_files([tmp_path / "a.txt"], [tmp_path / "a.txt"])


def test_equal_parts_of_several_texts_are_spread_over_each() -> None:
    long, short = [f"{i:05}" * 20 for i in range(50)], ["a" * 40, "b" * 250, "c" * 710]
    mixed = equal_parts([long, short])
    assert mixed[10:] == short
    assert [long.index(document) for document in mixed[:10]] == list(range(2, 50, 5))


def test_a_single_text_is_its_own_equal_part() -> None:
    documents = ["first", "", "a longer one"]
    assert equal_parts([documents]) == documents


def test_an_unknown_corpus_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"django-docs, botchan, debian-handbook, anarchism, .*, got 'bible'"):
        load_corpus("bible")
    assert DEFAULT_CORPUS in CORPORA


def _page(title: str) -> str:
    return f"<html><body><h1>{title}</h1>" + f"<p>{title} is a page with sentences that are long enough.</p>" * 5


def test_a_debian_package_is_read_from_where_it_was_unpacked(tmp_path: Path) -> None:
    folder = tmp_path / "anarchism/usr/share/doc/anarchism/html"
    folder.mkdir(parents=True)
    for i in range(12):
        (folder / f"sec{i:02}.html").write_text(_page(f"Section {i}"))
    (folder / "links.html").write_text("<p>Home</p>")
    corpus = load_corpus("anarchism", tmp_path)
    assert (len(corpus.train), len(corpus.heldout)) == (11, 1)
    assert corpus.heldout[0].startswith("Section 9 is a page")
    assert corpus.licence == "GPL-2.0-only"


def _archive(pages: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, text in pages.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()


NUMBERS = dict.fromkeys(["I", "IV", "VII", "X"], "") | dict.fromkeys(["II", "III", "V", "VI", "VIII", "IX"], ".")


def test_django_docs_are_read_from_the_checked_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = "This sentence of the documentation is long enough to count as prose. "
    pages = {f"django-5.2.8/docs/topics/p{i:02}.txt": f"Page {i}: {sentence * 4}" for i in range(12)}
    pages |= {"django-5.2.8/docs/releases/1.0.txt": sentence * 9, "django-5.2.8/django/x.txt": sentence * 9}
    data = _archive(pages)
    (tmp_path / "django-5.2.8.tar.gz").write_bytes(data)
    with pytest.raises(RuntimeError, match=r"sha256 .*: delete it and try again"):
        load_corpus("django-docs", tmp_path)
    monkeypatch.setattr(_sources, "_DJANGO_SHA256", hashlib.sha256(data).hexdigest())
    corpus = load_corpus("django-docs", tmp_path)
    assert (len(corpus.train), len(corpus.heldout)) == (11, 1)
    assert corpus.heldout[0].startswith("Page 9: This sentence")


def test_the_novel_is_read_from_the_checked_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = "This line of the novel is so long that its paragraph goes on in the next one, does it not?"
    chapters = [f'CHAPTER {n}{dot}\n{full}\n{full}\nHe stopped.\n"No {n}!"\nToo short.\n' for n, dot in NUMBERS.items()]
    text = (
        "Title\nCHAPTERS by the author.\n" + "".join(chapters) + f"--(THE END)--\n{full}\nEnd of Project Gutenberg's\n"
    )
    data = _archive({"sentencepiece-0.2.1/test/botchan.txt": text})
    (tmp_path / "sentencepiece-0.2.1.tar.gz").write_bytes(data)
    with pytest.raises(RuntimeError, match=r"sha256 .*: delete it and try again"):
        load_corpus("botchan", tmp_path)
    monkeypatch.setattr(_sources, "_SENTENCEPIECE_SHA256", hashlib.sha256(data).hexdigest())
    monkeypatch.setattr(_sources, "_MIN_DOCUMENT", 100)
    corpus = load_corpus("botchan", tmp_path)
    assert (len(corpus.train), len(corpus.heldout)) == (9, 1)
    assert corpus.train == [f"{full} {full} He stopped."] * 9  # passages of a word or two are left out


def test_a_failed_fetch_tells_how_to_use_own_files_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(command, **kwargs):
        (Path(kwargs["cwd"]) / "half").write_text("x")
        return subprocess.CompletedProcess(command, 1, "", "noise\nno route to the index")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(RuntimeError, match=r"no route to the index; give your own text files .*--data\.files"):
        load_corpus("django-docs", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_debian_corpus_elsewhere_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sources.shutil, "which", lambda name: None)
    monkeypatch.setattr(Path, "is_dir", lambda self: False)
    with pytest.raises(RuntimeError, match=r"debian-handbook is not installed .* not a Debian or Ubuntu system"):
        _sources.debian_handbook(tmp_path)


def test_restructured_text_is_reduced_to_its_prose() -> None:
    text = """
=====
Title
=====

.. currentmodule:: django.db

Use :class:`~django.db.models.Model` and :doc:`the guide </topics/db>` with
``code``, *stress*, **force** and a `link <https://example.org>`_. Example::

    code = block(1)

.. note::

    Indented note.

* First point with `term`_.
* Second point.

====  ====
a     b
====  ====
"""
    prose = [p for p in _sources.rst_paragraphs(text) if p.endswith((".", ":"))]
    assert prose == [
        "Use Model and the guide with code, stress, force and a link. Example:",
        "First point with term.",
        "Second point.",
    ]
