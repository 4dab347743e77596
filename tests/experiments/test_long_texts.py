"""Promise: a needle is found if and only if the model knows it, losses are those of their positions, and a run resumes."""

from __future__ import annotations

import argparse
import json
import math
import random
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", reason="the llm extra is not installed")

import long_texts
import long_texts_needles
import long_texts_report
import transformers
from does_routing_pay_models import DROPPED_LINEAR, FIXED_HEADS, ROUTED, Compared, cell_file
from long_texts_needles import DEPTHS, ask, haystacks
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F

from moh.evaluation import perplexity

FILLER = "a head token gate router layer value key query sees skips picks weighs reads and or not in".split()
NAMES = [*long_texts_needles._CITIES, *long_texts_needles._WORDS]
WORDS = ["<eos>", ".", "The", "secret", "word", "of", "is", *FILLER, *NAMES]
FULL_STOP = WORDS.index(".")
SIZES = dict(vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=1024, bos_token_id=None, eos_token_id=0, pad_token_id=0)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")


@pytest.fixture(scope="module")
def documents() -> list[str]:
    draw = random.Random(0)
    return [" ".join(" ".join(draw.choices(FILLER, k=draw.randint(4, 9))) + "." for _ in range(100)) for _ in range(3)]


@pytest.fixture(scope="module")
def llama() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_hidden_layers=3)).eval()


@pytest.fixture(scope="module")
def fitted(llama) -> Compared:
    return Compared(llama, torch.randint(len(WORDS), (24, 16)), router="linear")


@pytest.mark.parametrize("length", [128, 500])
def test_needles_are_at_their_depths_in_a_run_of_real_text(tokenizer, documents, length) -> None:
    running = [token for text in documents for token in tokenizer(text)["input_ids"]]
    made = haystacks(documents, tokenizer, length=length, count=3)
    for haystack in made:
        ids = haystack.ids[0].tolist()
        assert len(ids) + len(haystack.questions[0][0]) + 1 == length
        places = []
        for question, answer in zip(haystack.questions, haystack.answers.tolist(), strict=True):
            needle = [*question[0].tolist(), answer, FULL_STOP]
            (place,) = [i for i in range(len(ids)) if ids[i : i + len(needle)] == needle]
            assert ids[place - 1] == FULL_STOP or place == len(ids) - len(
                needle
            )  # only the last one may cut a sentence
            ids[place : place + len(needle)] = []
            places.append(place)
        assert any(running[i : i + len(ids)] == ids for i in range(len(running)))
        assert all(abs(place - depth * len(ids)) <= len(ids) / 8 for place, depth in zip(places, DEPTHS, strict=True))
    assert len({tuple(haystack.ids[0].tolist()[:40]) for haystack in made}) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(length=50), "length must leave room for text between 5 needles, got 50"),
        (dict(length=9_000), "the documents hold .* tokens, too few for one text of"),
        (dict(words=["apple"]), "at least 5 of the cities and of the words as single tokens, got 28 and 1"),
    ],
)
def test_haystacks_that_cannot_be_made_are_refused(tokenizer, documents, monkeypatch, change, message) -> None:
    monkeypatch.setattr(long_texts_needles, "_WORDS", change.get("words", long_texts_needles._WORDS))
    with pytest.raises(ValueError, match=message):
        haystacks(documents, tokenizer, length=change.get("length", 128), count=1)


class Reader:
    """In place of a model: its cache is what it has read, its logits what `says` gives for it."""

    def __init__(self, says) -> None:
        self.says = says

    def __call__(self, input_ids, past_key_values=None, **_):
        read = [] if past_key_values is None else past_key_values
        read.append(input_ids[0].tolist())
        logits = torch.zeros(1, 1, len(WORDS))
        if len(read) > 1:
            assert len(read) == 2, "the question before is still in the cache"
            for token, value in self.says(*read).items():
                logits[0, 0, token] = value
        return SimpleNamespace(logits=logits, past_key_values=read)


def _looked_up(text: list[int], question: list[int]) -> int:
    n = len(question)
    return next(text[i + n] for i in range(len(text)) if text[i : i + n] == question)


@pytest.mark.parametrize(
    ("says", "chosen", "written"),
    [
        (lambda text, question: {_looked_up(text, question): 9.0}, [True] * 5, [True] * 5),
        (lambda text, question: {text[-2]: 9.0}, [False] * 4 + [True], [False] * 4 + [True]),
        (lambda text, question: {_looked_up(text, question): 1.0, FULL_STOP: 2.0}, [True] * 5, [False] * 5),
        (lambda text, question: {}, [False] * 5, [False] * 5),
    ],
    ids=["knows", "repeats the last needle", "writes something else", "knows nothing"],
)
def test_only_what_a_model_knows_counts(tokenizer, documents, says, chosen, written) -> None:
    (haystack,) = haystacks(documents, tokenizer, length=200, count=1)
    answers = ask(Reader(says), haystack)
    assert (answers.chosen, answers.written) == (chosen, written)
    assert [margin > 0 for margin in answers.margins] == chosen


@pytest.mark.parametrize("kind", ["dense", ROUTED, FIXED_HEADS, DROPPED_LINEAR, "sliding window"])
@torch.no_grad()
def test_answers_from_the_cache_are_those_of_the_whole_text(tokenizer, documents, request, kind) -> None:
    if kind == "sliding window":
        config = transformers.Gemma3TextConfig(**SIZES, num_hidden_layers=2, head_dim=8, sliding_window=16,
                                               layer_types=["sliding_attention", "full_attention"])  # fmt: skip
        model = transformers.Gemma3ForCausalLM(config).eval()
    else:
        model = (
            request.getfixturevalue("llama")
            if kind == "dense"
            else request.getfixturevalue("fitted").make(kind, 8).model
        )
    (haystack,) = haystacks(documents, tokenizer, length=150, count=1)
    found = ask(model, haystack)
    for right, (question, margin) in enumerate(zip(haystack.questions, found.margins, strict=True)):
        scores = model(torch.cat([haystack.ids, question], dim=1)).logits[0, -1]
        wrong = [float(scores[answer]) for i, answer in enumerate(haystack.answers) if i != right]
        assert margin == pytest.approx(float(scores[haystack.answers[right]]) - max(wrong), abs=1e-4)
        assert found.written[right] == (int(scores.argmax()) == int(haystack.answers[right]))


@torch.no_grad()
def test_losses_are_those_of_the_positions(llama, monkeypatch) -> None:
    monkeypatch.setattr(long_texts, "_TOKENS_PER_CALL", 7)
    block = torch.randint(len(WORDS), (40,))
    found = long_texts.position_losses(llama, block, [0, 8, 20, 40])
    single = F.cross_entropy(llama(block[None]).logits[0, :-1], block[1:], reduction="none")  # of positions 1 to 39
    expected = [single[first:last].mean() for first, last in ((0, 7), (7, 19), (19, 39))]
    torch.testing.assert_close(torch.tensor(found), torch.stack(expected))
    assert (7 * found[0] + 12 * found[1] + 20 * found[2]) / 39 == pytest.approx(
        perplexity(llama, block[None]).loss, abs=1e-5
    )


def _cells(**other) -> list[dict]:
    about = dict(model="tiny", cpu="a CPU", threads=1, torch="2", seconds=1.0)
    dense, fixed = (
        dict(about, method="dense", aim=1.0, share=1.0),
        dict(about, method=FIXED_HEADS, aim=0.75, share=0.75),
    )
    positions = dict(kind="positions", text="a text", edges=[0, 8, 16], blocks=2)
    needles = dict(kind="needles", texts=["a text"], length=8, haystacks=2, depths=[0.0, 1.0])
    right, wrong, half = (
        dict(chosen=values, written=values) for values in ([True, True], [False, False], [False, True])
    )
    return [
        dict(dense, **positions, losses=[[1.0, 0.0], [1.0, 2.0]]),
        dict(fixed, **positions, losses=[[1.5, 1.0], [1.5, 2.0]]) | other,
        dict(dense, **needles, answers=[right, right]),
        dict(fixed, **needles, answers=[half, wrong]) | dict(aim=0.7500001),  # as another command line has it
    ]


def test_the_page_has_paired_differences(tmp_path) -> None:
    long_texts_report.write(tmp_path, tmp_path, _cells())
    page = (tmp_path / "long_texts.md").read_text()
    e = math.e
    assert f"| 100% | dense | {e:.2f} | {e:.2f} |" in page
    assert f"| 75% | {FIXED_HEADS} | {100 * (e**0.5 - 1):+.1f} ± 0.0 | {100 * (e**0.5 - 1):+.1f} ± 50.0 |" in page
    assert "| 100% | dense | 100 | 100 | 100 |" in page
    # per text 50 and 100 points below: the mean is -75, and its standard error sqrt(1250 / 2) = 25
    assert f"| 75% | {FIXED_HEADS} | 25 (-75.0 ± 25.0) | 0 | 50 |" in page
    assert (tmp_path / "long_texts.png").stat().st_size > 1000


def test_figures_over_several_lengths_are_of_those_that_all_models_have_read(tmp_path) -> None:
    cells = _cells()
    longer = dict(cells[2], length=16, answers=[dict(chosen=[True, False], written=[True, False])] * 2)
    long_texts_report.write(tmp_path, tmp_path, [*cells, longer])
    page = (tmp_path / "long_texts.md").read_text()
    assert "| share of heads | method | 8 | 16 | depth 0% | depth 100% |" in page
    assert "| 100% | dense | 100 | 50 | 100 | 100 |" in page  # depths: of length 8 alone
    assert f"| 75% | {FIXED_HEADS} | 25 (-75.0 ± 25.0) | not measured | 0 | 50 |" in page


def test_a_model_without_positions_has_a_row_that_says_so(tmp_path) -> None:
    dense, _, *needles = _cells()
    long_texts_report.write(tmp_path, tmp_path, [dense, *needles])
    assert f"| 75% | {FIXED_HEADS} | not measured | not measured |" in (tmp_path / "long_texts.md").read_text()


def _cells_of(command: str) -> set[tuple]:
    """What a command line of the page measures."""
    parser = argparse.ArgumentParser()
    for name, value in long_texts_report.DEFAULTS.items():
        kind = type(value[0] if isinstance(value, (list, tuple)) else value) if value is not None else str
        parser.add_argument(
            f"--{name}", default=value, type=kind, nargs="+" if isinstance(value, (list, tuple)) else None
        )
    options = parser.parse_args(shlex.split(command)[2:])
    edges = (0, *options.lengths)
    texts = tuple(options.texts)
    models = [(options.model, round(share, 4), method) for share in options.shares for method in options.methods]
    found = {
        "positions": {(*model, text, edges, options.blocks) for model in models for text in texts},
        "needles": {(*model, n, texts, options.haystacks) for model in models for n in options.lengths},
    }
    return found[options.only] if options.only else found["positions"] | found["needles"]


def _named(cell: dict) -> tuple:
    model = (cell["model"], round(cell["aim"], 4), cell["method"])
    if cell["kind"] == "positions":
        return (*model, cell["text"], tuple(cell["edges"]), cell["blocks"])
    return (*model, cell["length"], tuple(cell["texts"]), cell["haystacks"])


@pytest.mark.parametrize("where", ["made up", "committed"])
def test_the_commands_of_the_page_measure_its_cells_and_no_others(tmp_path, where) -> None:
    cells = [*_cells(), dict(_cells()[3], length=32, haystacks=3)]
    if where == "committed":
        file = Path(long_texts.__file__).parents[1] / "docs" / "results" / "long_texts.json"
        cells = list(json.loads(file.read_text("utf-8")).values())
    *lines, last = long_texts_report.made_by([{**cell, "aim": round(cell["aim"], 4)} for cell in cells])
    assert last == "python experiments/long_texts.py --only page"
    expected = [_named(cell) for cell in cells if cell["method"] != "dense"]
    assert set().union(*map(_cells_of, lines)) == set(expected)
    if where == "committed":
        page = file.with_suffix(".md").read_text("utf-8")
        assert all(f"$ {line}\n" in page for line in lines)


def test_cells_of_other_texts_are_not_compared(tmp_path) -> None:
    with pytest.raises(ValueError, match="fixed heads and dense read other blocks of a text: remove their cells"):
        long_texts_report.write(tmp_path, tmp_path, _cells(losses=[[1.0, 1.0]]))


def _printed(capsys) -> int:
    """Cells that a run has measured."""
    return sum(line.startswith("tiny-") for line in capsys.readouterr().out.splitlines())


def test_a_run_measures_every_cell_once(tokenizer, documents, llama, fitted, tmp_path, monkeypatch, capsys) -> None:
    llama.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    monkeypatch.setattr(long_texts, "MODELS", {"tiny": lambda: tmp_path / "dense"})
    monkeypatch.setattr(long_texts, "load_corpus", lambda name: SimpleNamespace(heldout=documents))
    options = ["--models", str(tmp_path), "--model", "tiny", "--methods", FIXED_HEADS, "--work", str(tmp_path / "work")]
    monkeypatch.setattr("sys.argv", ["long_texts.py", "--quick", "--texts", "a text", *options])
    with pytest.raises(FileNotFoundError, match=r"tiny-fixed_heads-0\.556 holds no model: run does_routing_pay"):
        long_texts.main()
    cell = cell_file(tmp_path, "tiny", FIXED_HEADS, 5 / 9)
    fitted.make(FIXED_HEADS, 9).model.save_pretrained(cell.with_suffix(""))
    cell.write_text("{}")
    long_texts.main()
    files = sorted((tmp_path / "work" / "quick").glob("tiny-*.json"))
    kinds = [json.loads(file.read_text())["kind"] for file in files]
    assert sorted(kinds) == ["needles"] * 4 + ["positions"] * 2  # dense and fixed: two lengths, one text
    assert _printed(capsys) == 6
    files[0].unlink()
    long_texts.main()
    assert files[0].exists() and _printed(capsys) == 1
    options += ["--texts", "a text", "--shares", "0.5556", "--lengths"]
    monkeypatch.setattr("sys.argv", ["long_texts.py", *options, "2048"])
    with pytest.raises(ValueError, match="lengths must be at most the 1024 positions of tiny, got 2048"):
        long_texts.main()
    monkeypatch.setattr(
        "sys.argv", ["long_texts.py", *options, "256", "512", "--work", str(tmp_path / "work" / "quick")]
    )
    with pytest.raises(
        ValueError, match="was measured with blocks 2, not 4: choose another --work, or the same options"
    ):
        long_texts.main()
