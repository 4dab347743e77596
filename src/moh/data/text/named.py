"""Texts by name, `NAME[:config][:split]` or a path, as `moh convert --calibration` takes them, and WikiText-2.

A name is a file, a directory, a built-in corpus or a Hugging Face data set, whose rows may hold texts or conversations.
Only the beginning of a data set is read; what training reads, to the sample, is in `moh.data.text.sources`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from moh._extras import require
from moh.data.text.blocks import start_tokens
from moh.data.text.corpora import (
    CALIBRATION_CORPORA,
    CORPORA,
    Corpus,
    corpus_from_files,
    equal_parts,
    load_corpus,
    split_documents,
)
from moh.data.text.readers import SourceRecipe, load_rows
from moh.data.text.sources import source_files, source_kind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT_COLUMNS = ("text", "content")
"""Columns that are read as texts, in this order of preference; otherwise the only column of strings is."""

CHAT_COLUMNS = ("messages", "conversations")
"""Columns of conversations: lists of `{role, content}`, or of ShareGPT's `{from, value}`."""

CHARACTERS = 2_000_000
"""Characters read from the beginning of a data set: some 500,000 tokens, of which a conversion takes some 50,000."""

WIKITEXT_2 = "Salesforce/wikitext:wikitext-2-raw-v1:test"
"""The text of most published perplexities."""

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system", "tool": "tool"}


class TextName(NamedTuple):
    """A parsed name: a path, a corpus or a data set, and the data set's configuration and split."""

    path: str
    config: str | None = None
    split: str | None = None


def parse_name(name: str) -> TextName:
    """`NAME[:config][:split]`; one word after the name is the configuration if the data set has it, else the split.

    A path that exists is taken whole, colons included. `NAME::split` leaves out the configuration.

    Raises:
        ValueError: the name is empty, has more than two colons, or there is no such data set.
        RuntimeError: the data set's configurations can't be fetched.
    """
    if name and (Path(name).exists() or name in CORPORA):
        return TextName(name)
    path, *rest = name.split(":")
    if not path or len(rest) > 2 or (rest and not rest[-1]):
        raise ValueError(f"calibration must be NAME[:config][:split] or a path, got {name!r}")
    if len(rest) == 2:
        return TextName(path, rest[0] or None, rest[1])
    if not rest:
        return TextName(path)
    return TextName(path, rest[0]) if rest[0] in _configurations(path) else TextName(path, None, rest[0])


def calibration_texts(
    names: Sequence[str] = CALIBRATION_CORPORA,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    cache_dir: str | Path | None = None,
) -> list[str]:
    """Texts to calibrate on, such as `moh.convert(calibration=calibration_texts(["HuggingFaceH4/ultrachat_200k::train_sft"]))`.

    Several names are mixed in equal parts. Of built-in corpora and of text files the held-out tenth is left out, so that
    `moh eval` measures on text that the conversion has not seen. Data sets, also as JSONL and Parquet files, are read from
    their beginning, up to `CHARACTERS`, from the hub while they are downloaded.

    Args:
        names: each as in `parse_name`.
        tokenizer: the model's, whose chat template is applied to conversations; without one their messages are separated
            by blank lines.
        cache_dir: where built-in corpora are kept (default ~/.cache/moh).

    Raises:
        FileNotFoundError, ValueError: there is no such file, data set, configuration, split or column, or no text in it.
        RuntimeError: a corpus or a data set can't be fetched.
    """
    return equal_parts([corpus.train for corpus in _corpora(names, tokenizer, cache_dir)])


def calibration_and_heldout(
    names: Sequence[str] = CALIBRATION_CORPORA,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    cache_dir: str | Path | None = None,
) -> tuple[list[str], dict[str, list[str]]]:
    """`calibration_texts`, and by name the documents of each text that are not among them; of data sets every tenth.

    Raises:
        FileNotFoundError, ValueError, RuntimeError: as in `calibration_texts`; or a text has too few documents to hold out
            any.
    """
    parts: list[list[str]] = []
    heldout: dict[str, list[str]] = {}
    for name, corpus in zip(names, _corpora(names, tokenizer, cache_dir), strict=True):
        train, held = (corpus.train, corpus.heldout) if corpus.heldout else split_documents(corpus.train)
        parts.append(train)
        heldout[name] = held
    return equal_parts(parts), heldout


def wikitext2_blocks(tokenizer: PreTrainedTokenizerBase, seq_len: int) -> Tensor:
    """The test part of WikiText-2 as published perplexities read it, such as those of GPTQ, SparseGPT and Wanda.

    All rows, joined by blank lines, are one text with the tokenizer's own special tokens, cut into blocks; an incomplete
    last one is dropped.

    Args:
        tokenizer: the model's.
        seq_len: tokens per block: publications use 2,048, or 4,096 for Llama 2.

    Returns:
        `[n, seq_len]` int64.

    Raises:
        ValueError: `seq_len` is below 2 or larger than the text.
        RuntimeError: the data set can't be fetched.
    """
    if seq_len < 2:
        raise ValueError(f"seq_len must be at least 2, got {seq_len}")
    path, config, split = parse_name(WIKITEXT_2)
    try:
        rows = load_rows(path, config, split, streaming=False, where="wikitext-2")
    except RuntimeError as error:
        raise RuntimeError(f"{error}; without the hub use a built-in corpus, such as --corpus django-docs") from error
    text = "\n\n".join(row["text"] for row in rows)
    # verbose=False: the text is longer than the model's context
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    count = len(ids) // seq_len
    if not count:
        raise ValueError(f"seq_len must be at most the {len(ids)} tokens of wikitext-2, got {seq_len}")
    blocks: Tensor = ids[: count * seq_len].view(count, seq_len)
    return blocks


def _configurations(path: str) -> list[str]:
    if any(Path(path, file).is_file() for file in ("state.json", "dataset_dict.json")):
        return []  # written by `save_to_disk`, which keeps splits alone
    datasets = require("datasets", extra="train")
    try:
        found: list[str] = datasets.get_dataset_config_names(path)
    except (FileNotFoundError, ValueError) as error:  # DatasetNotFoundError is a FileNotFoundError
        raise ValueError(f"calibration {path}: {' '.join(str(error).split())}") from None
    except OSError as error:
        raise RuntimeError(f"calibration {path} can't be fetched ({' '.join(str(error).split())})") from error
    return found


def _corpora(
    names: Sequence[str], tokenizer: PreTrainedTokenizerBase | None, cache_dir: str | Path | None
) -> list[Corpus]:
    if isinstance(names, str) or not names:
        raise ValueError(f"calibration must be a list of at least one name, got {names!r}")
    return [_corpus(name, tokenizer, cache_dir) for name in names]


def _corpus(name: str, tokenizer: PreTrainedTokenizerBase | None, cache_dir: str | Path | None) -> Corpus:
    """The text of this name; of a data set nothing is held out."""
    where = f"calibration {name}"
    path, config, split = parse_name(name)
    kind = "dataset" if config or split else source_kind(SourceRecipe(path), "calibration")
    if kind == "corpus":
        return load_corpus(path, cache_dir)
    if kind == "text":
        return corpus_from_files([path])
    if kind == "dataset":
        rows = load_rows(path, config, split, streaming=True, where=where)
    else:
        files = [str(file) for file in source_files(Path(path), kind, "calibration")]
        reader = {"jsonl": "json"}.get(kind, kind)
        datasets = require("datasets", extra="train")
        rows = datasets.load_dataset(reader, data_files=files, split="train", streaming=True)
    found = list(_beginning(_documents(rows, where, tokenizer)))
    if not found:
        raise ValueError(f"{where} holds no text")
    return Corpus(name, "unknown", path, found, [])


def _documents(
    rows: Iterable[Mapping[str, Any]], where: str, tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[str]:
    """The text of each row; those without are left out."""
    reading = iter(rows)
    column, number = None, 0
    while True:
        try:
            row = next(reading, None)
        except Exception as error:  # every reader and network library below raises its own
            raise RuntimeError(f"{where}: reading stopped at row {number} ({' '.join(str(error).split())})") from error
        if row is None:
            return
        column = column or _column(row, where)
        value = row[column]
        text = (
            value if isinstance(value, str) else _conversation(value, tokenizer, f"{where}, row {number}, {column!r}")
        )
        if text.strip():
            yield text
        number += 1


def _column(row: Mapping[str, Any], where: str) -> str:
    strings = [column for column, value in row.items() if isinstance(value, str)]
    for column in (*TEXT_COLUMNS, *CHAT_COLUMNS):
        if column in row:
            return column
    if len(strings) == 1:
        return strings[0]
    raise ValueError(
        f"{where} must have one column of text, or one named {', '.join((*TEXT_COLUMNS, *CHAT_COLUMNS))}; "
        f"it has {', '.join(map(repr, row))}: write the texts to a JSONL file with the field 'text' and name that"
    )


def _conversation(value: Any, tokenizer: PreTrainedTokenizerBase | None, where: str) -> str:
    """A list of messages as one text, without a beginning of text, which blocks get anyway."""
    if value is None:
        return ""
    try:
        messages = [
            {"role": _SHAREGPT_ROLES[message["from"]], "content": message["value"]} if "from" in message else message
            for message in value
        ]
        text = "\n\n".join(message["content"] for message in messages)
    except (TypeError, KeyError):  # not messages, of an unknown role, or of something that is not text
        raise ValueError(
            f"{where} must hold text or a list of messages with role and content, got {str(value)[:80]}"
        ) from None
    if tokenizer is None or not tokenizer.chat_template:
        return text
    from jinja2 import TemplateError

    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except TemplateError as error:  # templates refuse, for instance, messages in an order that they don't know
        raise ValueError(f"{where} does not fit the model's chat template: {error}") from None
    return text.removeprefix(str(tokenizer.bos_token)) if start_tokens(tokenizer) else text


def _beginning(documents: Iterable[str]) -> Iterator[str]:
    """Documents up to the one that reaches `CHARACTERS`."""
    read = 0
    for text in documents:
        yield text
        read += len(text)
        if read >= CHARACTERS:
            return
