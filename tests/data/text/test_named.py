"""Calibration text by name: files, corpora and data sets of texts or conversations, mixed in equal parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from moh.data.text import named
from moh.data.text.corpora import Corpus
from moh.data.text.named import calibration_and_heldout, calibration_texts, parse_name, wikitext2_blocks

TEXTS = [f"the head number {i}" for i in range(12)]
CHAT = [{"role": "user", "content": "some question"}, {"role": "assistant", "content": "the answer"}]
SHAREGPT = [{"from": "human", "value": "some question"}, {"from": "gpt", "value": "the answer"}]
TEMPLATE = "{{ bos_token or '' }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def jsonl(file: Path, rows: list[dict]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A directory that stands for a data set on the hub: two configurations, one with two splits."""
    folder = tmp_path / "data_set"
    jsonl(folder / "plain" / "train.jsonl", [{"text": text} for text in TEXTS])
    jsonl(folder / "chats" / "sft.jsonl", [{"prompt": "x", "messages": CHAT}])
    jsonl(folder / "chats" / "gen.jsonl", [{"prompt": "x", "messages": CHAT[:1]}])
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: plain\n  data_files: plain/train.jsonl\n  default: true\n- config_name: chats\n"
        "  data_files:\n  - {split: sft, path: chats/sft.jsonl}\n  - {split: gen, path: chats/gen.jsonl}\n---\n"
    )
    return folder


@pytest.mark.parametrize(
    ("name", "expected"),
    [(":plain", TEXTS), ("::train", TEXTS), (":train", TEXTS), (":plain:train", TEXTS),
     (":chats:sft", ["some question\n\nthe answer"]), (":chats:gen", ["some question"])],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_data_set_is_read_by_configuration_and_split(hub: Path, name: str, expected: list[str]) -> None:
    assert calibration_texts([f"{hub}{name}"]) == expected


@pytest.mark.parametrize(("column", "value"), [("messages", CHAT), ("conversations", SHAREGPT)])
def test_conversations_have_the_models_chat_template(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, bos_tokenizer: PreTrainedTokenizerBase, column: str, value
) -> None:
    file = jsonl(tmp_path / "chat.jsonl", [{"id": "1", column: value}])
    tokenizer.chat_template = None
    assert calibration_texts([str(file)], tokenizer=tokenizer) == ["some question\n\nthe answer"]
    for each in (tokenizer, bos_tokenizer):  # of which the second begins every block with <bos>, so texts must not
        each.chat_template = TEMPLATE
        expected = ["<user>some question<assistant>the answer"]
        assert calibration_texts([str(file)], tokenizer=each) == expected


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "folder", "saved"])
@pytest.mark.parametrize("column", ["text", "content", "instruction"])
def test_texts_come_from_every_kind_of_file(tmp_path: Path, ending: str, column: str) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"id": i, column: text} for i, text in enumerate(TEXTS)]
    path = tmp_path / f"rows.{ending}"
    if ending == "jsonl":
        jsonl(path, rows)
    elif ending == "folder":
        jsonl(path / "a.jsonl", rows[:5]), jsonl(path / "b.jsonl", rows[5:])
    elif ending == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(path)
    assert calibration_texts([str(path)]) == TEXTS


def test_several_names_mix_in_equal_parts_without_held_out_text(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(named, "load_corpus", lambda name, cache_dir: Corpus(name, "", "", ["a head"] * 10, ["no"]))
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{i:06}" for i in range(30)))
    file = jsonl(tmp_path / "rows.jsonl", [{"text": "a query"[:6]}] * 100)
    found = calibration_texts(["botchan", str(text), str(file)])
    assert found.count("a head") == 10 and found.count("a quer") == 10
    words = [word for part in found if part[0] == "0" for word in part.split()]
    assert 0 < len(words) <= 10 and not {f"{i:06}" for i in (27, 28, 29)} & set(words)  # the last block is held out


def test_only_the_beginning_of_a_data_set_is_read(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(named, "CHARACTERS", 5 * len(TEXTS[0]))
    file = jsonl(tmp_path / "rows.jsonl", [{"text": TEXTS[0]}] * 9 + [{"text": {"not": "text"}}])
    assert calibration_texts([str(file)])[:5] == [TEXTS[0]] * 5
    assert len(calibration_texts([str(file)])) == 5


def test_a_hub_data_set_is_streamed(monkeypatch) -> None:
    seen = {}

    def load_dataset(path: str, config: str | None, **options: object) -> list[dict]:
        seen.update(path=path, config=config, **options)
        return [{"text": "a head"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("datasets.get_dataset_config_names", lambda path: ["default"])
    assert calibration_texts(["someone/texts:validation"]) == ["a head"]
    assert seen == dict(path="someone/texts", config=None, split="validation", streaming=True)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"a": "x", "b": "y"}], "one column of text, or one named text, content, messages, conversations; it has 'a', 'b'"),
        ([{"messages": [{"role": "user"}]}], "row 0, 'messages' must hold text or a list of messages"),
        ([{"conversations": [{"from": "narrator", "value": "x"}]}], "row 0, 'conversations' must hold text"),
        ([{"messages": CHAT[1:]}], "row 0, 'messages' does not fit the model's chat template: user first"),
        ([{"text": 3}], "row 0, 'text' must hold text"),
        ([{"text": " "}], "holds no text"),
    ],
    ids=["columns", "message", "role", "template", "number", "empty"],
)  # fmt: skip
def test_rows_that_hold_no_text_are_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, rows: list[dict], message: str
) -> None:
    tokenizer.chat_template = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    file = jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=f"^calibration {file}") as error:
        calibration_texts([str(file)], tokenizer=tokenizer)
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["", ":x", "a:b:c:d", "a:b:"])
def test_a_name_has_up_to_three_parts(name: str) -> None:
    with pytest.raises(ValueError, match=r"calibration must be NAME\[:config\]\[:split\] or a path"):
        parse_name(name)


@pytest.mark.parametrize("names", [[], "botchan"], ids=["none", "string"])
def test_names_are_a_list(names) -> None:
    with pytest.raises(ValueError, match="calibration must be a list of at least one name"):
        calibration_texts(names)


def test_an_unknown_split_or_path_is_an_error_that_names_it(hub: Path) -> None:
    with pytest.raises(ValueError, match=r"calibration .*:chats:test: .*sft.*gen"):
        calibration_texts([f"{hub}:chats:test"])
    with pytest.raises(FileNotFoundError, match=r"calibration.path: no such file or directory: /no/file"):
        calibration_texts(["/no/file"])


def test_wikitext_is_joined_and_cut_as_in_publications(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch
) -> None:
    rows = ["", " = the head = ", *TEXTS]
    jsonl(tmp_path / "wiki" / "test.jsonl", [{"text": text} for text in rows])
    monkeypatch.setattr(named, "WIKITEXT_2", f"{tmp_path / 'wiki'}::test")
    blocks = wikitext2_blocks(tokenizer, 8)
    ids = tokenizer("\n\n".join(rows))["input_ids"]
    assert torch.equal(blocks.flatten(), torch.tensor(ids[: len(ids) // 8 * 8])) and blocks.shape[1] == 8
    with pytest.raises(ValueError, match=f"seq_len must be at most the {len(ids)} tokens of wikitext-2, got 9999"):
        wikitext2_blocks(tokenizer, 9999)


@pytest.mark.parametrize("kind", ["data set", "corpus", "file"])
def test_what_is_held_out_is_not_calibrated_on(hub: Path, tmp_path: Path, monkeypatch, kind: str) -> None:
    (tmp_path / "own.txt").write_text("\n\n".join(TEXTS))
    monkeypatch.setattr(named, "load_corpus", lambda name, _: Corpus(name, "", "", TEXTS[:9], TEXTS[9:]))
    name = {"data set": f"{hub}:plain", "corpus": "django-docs", "file": str(tmp_path / "own.txt")}[kind]
    texts, heldout = calibration_and_heldout([name])
    assert list(heldout) == [name] and heldout[name] and texts
    assert not set(texts) & set(heldout[name]) and set(texts) | set(heldout[name]) <= set(TEXTS)


def test_too_few_documents_to_hold_any_out_are_refused(hub: Path) -> None:
    with pytest.raises(ValueError, match=r"at least 10 .* needed to hold some out, got 1"):
        calibration_and_heldout([f"{hub}:chats:sft"])
