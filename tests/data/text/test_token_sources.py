"""Every format gives its documents in order, starting anywhere; errors name what is damaged or missing."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moh.data.text.readers import SourceRecipe, check_sources
from moh.data.text.sources import open_source

TEXTS = [f"text number {i}, with ünicode" for i in range(23)]


def _text(folder: Path) -> None:
    for index, text in enumerate(TEXTS):
        (folder / f"{index:02}.txt").write_text(text, encoding="utf-8")


def _jsonl(folder: Path) -> None:
    lines = [json.dumps({"id": i, "text": text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(TEXTS)]
    (folder / "a.jsonl").write_text("\n".join(lines[:10]) + "\n\n", encoding="utf-8")
    with gzip.open(folder / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(lines[10:]))


def _parquet(folder: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    for name, part in (("a", TEXTS[:10]), ("b", TEXTS[10:])):
        table = pyarrow.table({"id": list(range(len(part))), "text": part})
        parquet.write_table(table, folder / f"{name}.parquet", row_group_size=4)


def _data_set(folder: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": TEXTS, "id": list(range(len(TEXTS)))}).save_to_disk(folder)


FORMATS = {"text": _text, "jsonl": _jsonl, "parquet": _parquet, "data_set": _data_set}


@pytest.fixture
def source(tmp_path: Path, request: pytest.FixtureRequest):
    folder = tmp_path / "source"
    folder.mkdir()
    FORMATS[request.param](folder)
    return open_source(SourceRecipe(str(folder)), name="data.sources[0]")


each_format = pytest.mark.parametrize("source", FORMATS, indirect=True)


@each_format
def test_documents_come_in_order_and_from_any_position_on(source) -> None:
    documents = list(source.documents())
    assert [text for _, text in documents] == TEXTS
    for index in (0, 1, 9, 10, 13, 22):
        assert list(source.documents(documents[index][0])) == documents[index:]


@each_format
def test_the_identity_stays_until_something_changes(source, tmp_path: Path) -> None:
    again = open_source(source.recipe, name="x")
    assert again.identity() == source.identity()
    assert len(source.identity()) == len(source.parts) > 0


def test_a_changed_file_changes_the_identity(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n')
    before = open_source(SourceRecipe(str(file)), name="x").identity()
    file.write_text('{"text": "b"}\n')
    assert open_source(SourceRecipe(str(file)), name="x").identity() != before


@pytest.mark.parametrize("format", [_jsonl, _parquet], ids=["jsonl", "parquet"])
def test_every_tenth_document_is_held_out(tmp_path: Path, format: Callable[[Path], None]) -> None:
    format(tmp_path)
    parts = {
        split: list(open_source(SourceRecipe(str(tmp_path), split=split), name="x").documents())
        for split in ("train", "heldout")
    }
    assert [text for _, text in parts["heldout"]] == [TEXTS[9], TEXTS[19]]
    assert [text for _, text in parts["train"]] == [t for i, t in enumerate(TEXTS) if i not in (9, 19)]
    source = open_source(SourceRecipe(str(tmp_path), split="train"), name="x")
    assert list(source.documents(parts["train"][15][0])) == parts["train"][15:]


def test_paragraphs_of_text_files_are_held_out_not_files(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("\n\n".join(TEXTS), encoding="utf-8")
    train, heldout = (
        [text for _, text in open_source(SourceRecipe(str(tmp_path), split=split), name="x").documents()]
        for split in ("train", "heldout")
    )
    assert sorted("\n\n".join(train + heldout).split("\n\n")) == sorted(TEXTS)
    assert heldout


@pytest.mark.parametrize("split", [None, "train"])
def test_hidden_and_empty_files_of_a_directory_are_left_out(tmp_path: Path, split: str | None) -> None:
    for name in (".ipynb_checkpoints/a.txt", ".venv/b.jsonl", "node_modules/c.md"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("hidden")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "d.txt").write_text("\n\n".join(f"part {n}" for n in range(20)))
    found = open_source(SourceRecipe(str(tmp_path), split=split), name="x").documents()
    text = " ".join(text for _, text in found)
    assert "part 0" in text and "hidden" not in text


def test_a_split_of_a_data_set_is_its_own(tmp_path: Path) -> None:
    import datasets

    splits = {"train": ["a", "b"], "test": ["c"]}
    datasets.DatasetDict({k: datasets.Dataset.from_dict({"text": v}) for k, v in splits.items()}).save_to_disk(tmp_path)
    for split, texts in ((None, ["a", "b"]), ("test", ["c"])):
        source = open_source(SourceRecipe(str(tmp_path), split=split), name="x")
        assert [text for _, text in source.documents()] == texts
    with pytest.raises(ValueError, match=r"data\.sources\[0\]\.path .*split .*'valid' is not among its splits"):
        open_source(SourceRecipe(str(tmp_path), split="valid"), name="data.sources[0]")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": ', r"a\.jsonl, byte 14: not a line of JSON"),
        ('{"words": "a", "id": 1}\n', r"byte 0: no text_field 'text'; there is 'words', 'id'"),
        ('{"text": 3}\n', r"byte 0: 'text' must hold text, got int"),
        ("[1]\n", "byte 0: must hold an object, got list"),
    ],
    ids=["cut_off", "no_field", "no_text", "no_object"],
)
def test_what_is_wrong_with_a_line_is_said_with_its_place(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        list(open_source(SourceRecipe(str(tmp_path / "a.jsonl")), name="x").documents())


def test_a_damaged_parquet_file_and_a_missing_column_are_named(tmp_path: Path) -> None:
    _parquet(tmp_path)
    with pytest.raises(ValueError, match=r"a\.parquet: no text_field 'content'; there is 'id', 'text'"):
        list(open_source(SourceRecipe(str(tmp_path), text_field="content"), name="x").documents())
    (tmp_path / "b.parquet").write_bytes((tmp_path / "b.parquet").read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"b\.parquet is not a readable Parquet file"):
        list(open_source(SourceRecipe(str(tmp_path)), name="x").documents())


def test_a_data_set_that_cannot_be_fetched_says_that_a_new_start_goes_on() -> None:
    with pytest.raises(RuntimeError, match=r"x\.path org/none can't be downloaded .*start again"):
        open_source(SourceRecipe("org/none"), name="x")


def test_a_download_that_stops_midway_says_that_a_new_start_goes_on(tmp_path: Path, monkeypatch) -> None:
    import datasets

    def rows():
        yield {"text": "a"}
        raise ConnectionError("peer closed the connection")

    stream = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: stream)
    documents = open_source(SourceRecipe("org/name"), name="x", streaming=True).documents()
    assert next(documents)[1] == "a"
    with pytest.raises(RuntimeError, match=r"org/name: reading stopped before the end .peer closed .*start again"):
        next(documents)


@pytest.mark.parametrize(
    ("recipe", "error", "message"),
    [
        (SourceRecipe("/nowhere/a.txt"), FileNotFoundError, "x.path: no such file or directory: /nowhere/a.txt"),
        (SourceRecipe("{tmp}"), ValueError, r"several kinds \(text, jsonl\): give kind"),
        (SourceRecipe("{tmp}", kind="parquet"), FileNotFoundError, "no directory with parquet files"),
        (SourceRecipe("{tmp}/empty"), FileNotFoundError, r"no file that ends in \.txt, .*\.parquet in the directory"),
        (SourceRecipe("{tmp}/a.txt", split="test"), ValueError, "x.split must be 'train', 'heldout' or null"),
        (SourceRecipe("{tmp}/a.txt", subset="en"), ValueError, "x.subset is for Hugging Face data sets"),
    ],
    ids=["missing", "several_kinds", "no_such_kind", "empty_directory", "split", "subset"],
)
def test_a_source_that_cannot_be_opened_is_an_error(tmp_path: Path, recipe: SourceRecipe, error, message) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.jsonl").write_text('{"text": "b"}')
    (tmp_path / "empty").mkdir()
    recipe = SourceRecipe(**{**vars(recipe), "path": recipe.path.format(tmp=tmp_path)})
    with pytest.raises(error, match=message):
        open_source(recipe, name="x")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.0], r"s\[0\]\.weight must be a number above 0, got 0.0 for p"),
        ([1.0, -1.0], r"s\[1\]\.weight must be a number above 0, got -1.0"),
        ([float("nan")], r"s\[0\]\.weight must be a number above 0, got nan"),
        ([1.0, 1e-6], r"s\[1\]\.weight must be at least 0\.0001 of the sum of all weights"),
    ],
)
def test_wrong_weights_are_an_error(weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_sources([SourceRecipe("p", weight=weight) for weight in weights], name="s")
