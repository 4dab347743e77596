"""Promise: language models and encoders of every kind of attention show their heads, in the application and by inspection."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the llm extra is not installed")

sys.path.insert(0, str(Path(__file__).parents[1] / "conversion"))  # has a tiny model of every family

from family_cases import dense_model  # noqa: E402

import moh  # noqa: E402
from moh.cli import main  # noqa: E402
from moh.explore.subjects import TextSubject, load_subject  # noqa: E402
from moh.explore.texts import read_text, share_curve, time_text  # noqa: E402

TEXT = "the head of the text and the words of another one"
ENCODERS = ["bert", "roberta", "modernbert"]


@pytest.fixture
def directories(request, base_dir: Path, tmp_path: Path) -> dict[str, Path]:
    """The dense model of a family, and the same converted, with the word tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base_dir)
    if request.param in ENCODERS:
        tokenizer.cls_token, tokenizer.sep_token = tokenizer.convert_ids_to_tokens([5, 6])
    dense = dense_model(request.param, vocab_size=len(tokenizer))
    models = {"dense": dense, "MoH": moh.convert(dense, router="query_norm", shared_heads=1, active_heads=1)}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    return {name: tmp_path / name for name in models}


@pytest.mark.parametrize("directories", ["phi", "gpt2", *ENCODERS], indirect=True)
@pytest.mark.parametrize("kind", ["dense", "MoH"])
def test_the_application_shows_which_token_used_which_head(directories: dict[str, Path], kind: str) -> None:
    subject = load_subject(directories[kind], dense=directories["dense"])
    assert isinstance(subject, TextSubject)
    seen = read_text(subject, TEXT, None)
    assert len(seen.layers) == 2 and seen.reference is not None
    for layer in seen.layers:
        assert layer.gates.shape == (1, len(seen.ids), 4)
        assert ((layer.gates > 0).sum(-1) == (4 if kind == "dense" else 2)).all()
        assert torch.equal(layer.gates > 0, layer.contributions > 0)
    assert all(seconds is not None and seconds > 0 for seconds in time_text(subject, seen.ids, None))
    if subject.predicts:
        assert seen.model.perplexity is not None and seen.model.next_tokens
        assert (seen.model.losses == seen.reference.losses) == (kind == "dense")
        return
    assert seen.model.perplexity is None and not seen.model.next_tokens
    with pytest.raises(ValueError, match="predicts no next token"):
        share_curve(subject, TEXT)


@pytest.mark.parametrize("directories", ["roberta"], indirect=True)
def test_the_page_of_an_encoder_has_neither_losses_nor_next_tokens(directories: dict[str, Path]) -> None:
    gradio = pytest.importorskip("gradio", reason="the app extra is not installed")
    from moh.explore.interface import build
    from moh.explore.parts import TIME_ROW
    from moh.explore.text_page import _TextPage

    subject = load_subject(directories["MoH"], dense=directories["dense"])
    assert isinstance(subject, TextSubject) and subject.max_tokens == 65  # positions after that of the padding token
    tabs = {tab.label: tab.visible for tab in build(subject).blocks.values() if isinstance(tab, gradio.Tab)}
    assert tabs == {"Tokens": True, "Next token": False, "All shares": False}
    *_, last = _TextPage(subject).read(TEXT, 1, False, "loss", None)
    _, problem, summary, tokens, heads, *_ = last
    assert not problem and [row[0] for row in summary.value["data"]] == ["tokens read", TIME_ROW]
    assert "background" not in tokens and "the model is an encoder" in tokens and "each head" in heads["title"]


@pytest.mark.parametrize("directories", ["bert", "gpt2"], indirect=True)
def test_the_command_inspects_them(directories: dict[str, Path], tmp_path: Path, capfd) -> None:
    for name in ("one", "other"):
        (tmp_path / name).write_text(" ".join([TEXT] * 20))
    files = ["--files", str(tmp_path / "one"), str(tmp_path / "other"), "--seq-len", "16", "--max-tokens", "64"]
    for kind, directory in directories.items():
        out = tmp_path / f"out {kind}"
        results = ["--output", str(out), "--html", str(tmp_path / "page.html"), "--permutations", "9"]
        assert main(["inspect", str(directory), *files, *results]) == 0
        shown = capfd.readouterr().out
        assert shown.count("100 % of the heads used" if kind == "dense" else " 50 % of the heads used") == 2
        assert (out / "summary.md").is_file()


@pytest.mark.parametrize("directories", ["bert"], indirect=True)
def test_what_needs_a_next_token_is_refused_for_an_encoder(directories: dict[str, Path], tmp_path: Path, capfd) -> None:
    for option in (["--ablate", "2"], ["--curve"]):
        assert main(["inspect", str(directories["MoH"]), "--output", str(tmp_path / "out"), *option]) == 2
        assert "need a model that predicts the next token" in capfd.readouterr().err


def test_passages_of_an_encoder_stand_between_its_special_tokens_and_padding_is_not_seen(base_dir: Path) -> None:
    from moh.inspection import text_groups

    tokenizer = transformers.AutoTokenizer.from_pretrained(base_dir)
    tokenizer.cls_token, tokenizer.sep_token = tokenizer.convert_ids_to_tokens([5, 6])
    model = dense_model("bert", vocab_size=len(tokenizer))
    seen = []
    model.base_model.register_forward_pre_hook(lambda *given: seen.append(given[2]), with_kwargs=True)
    texts = {"long": ["the head of the text"], "short": ["the head"]}
    (batch,) = text_groups(model, tokenizer, texts, seq_len=16, max_tokens=16).batches()
    batch.run()
    (given,) = seen
    for row, real in zip(given["input_ids"], given["attention_mask"].bool(), strict=True):
        assert row[real][0] == 5 and row[real][-1] == 6
    assert torch.equal(given["attention_mask"].bool(), batch.counted)
    with pytest.raises(ValueError, match="a BertForMaskedLM predicts no next token"):
        batch.losses()
    with pytest.raises(ValueError, match="seq_len must leave room for two tokens besides the tokenizer's own, got 3"):
        text_groups(model, tokenizer, texts, seq_len=3, max_tokens=16)
