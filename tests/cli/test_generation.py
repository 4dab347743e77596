"""`moh generate` and `moh chat`: streams, batches, conversations, and the dial on the command line."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moh.cli.chat import Conversation
from moh.cli.generation import continuations
from moh.models.transformers.loading import load_causal_lm, load_tokenizer

PROMPT = "the head"


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`typed("hello", "/quit")` sets standard input, which is not a terminal."""
    return lambda *lines: monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_more_heads_on_the_command_line_are_more_heads_in_the_model(moh: Any, moh_dir: Path) -> None:
    written = {
        k: moh("generate", moh_dir, "the head reads", "--max-new-tokens", "12", "--active-heads", k).out
        for k in ("0", "3", "1.0", "3,3")
    }
    assert all(len(out) == 1 and out[0].startswith("the head reads") for out in written.values())
    assert written["3"] == written["1.0"] == written["3,3"]


@pytest.mark.parametrize("k", ["", "x", "1,", "1.5.2"])
def test_what_is_no_number_of_heads_is_refused(moh: Any, moh_dir: Path, k: str) -> None:
    result = moh("generate", moh_dir, "the head", "--active-heads", k)
    assert result.code == 2
    assert f"must be like 3, 0.75 or 3,2,4 (one per layer), got {k!r}" in result.err[-1]


def test_too_many_heads_are_refused_in_one_line(moh: Any, moh_dir: Path) -> None:
    result = moh("generate", moh_dir, "the head", "--active-heads", "9")
    assert (result.code, len(result.err)) == (2, 1)
    assert "active_heads must be between 0 and num_heads - shared_heads = 3, got 9" in result.err[0]


def test_prompts_of_a_file_are_continued_as_each_is_alone(moh: Any, moh_dir: Path, tmp_path: Path) -> None:
    prompts = ["the head", "a token reads the key and the value", "router", "not a gate of the layer"]
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join([prompts[0], "", *prompts[1:]]) + "\n", encoding="utf-8")
    result = moh("generate", moh_dir, "--prompts", file, "--batch-size", "3", "--max-new-tokens", "8")
    rows = [json.loads(line) for line in result.out]
    assert [row["prompt"] for row in rows] == prompts
    for prompt, row in zip(prompts, rows, strict=True):
        alone = moh("generate", moh_dir, prompt, "--max-new-tokens", "8").out
        assert " ".join(alone) == f"{prompt} {row['text']}".strip()


def test_a_batch_needs_a_token_to_pad_with(moh_dir: Path) -> None:
    model, tokenizer = load_causal_lm(moh_dir), load_tokenizer(moh_dir)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"padding or an end-of-text token .*--batch-size 1"):
        list(continuations(model, tokenizer, ["the head", "a"], max_new_tokens=2))


@pytest.mark.parametrize(
    "options", [[PROMPT, "--json"], ["--prompts", "FILE"], ["--prompts", "FILES", "--batch-size", "1"]], ids=str
)
def test_one_prompt_at_a_time_needs_no_token_to_pad_with(
    moh: Any, moh_dir: Path, tmp_path: Path, options: list[str]
) -> None:
    files = {name: tmp_path / name for name in ("FILE", "FILES")}
    files["FILE"].write_text(PROMPT)
    files["FILES"].write_text(f"{PROMPT}\na token reads\n")
    model, tokenizer = load_causal_lm(moh_dir), load_tokenizer(moh_dir)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    tokenizer.eos_token = tokenizer.pad_token = None
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert load_tokenizer(tmp_path / "model").pad_token_id is load_tokenizer(tmp_path / "model").eos_token_id is None
    words = [str(files.get(word, word)) for word in options]
    written = [moh("generate", place, *words, "--max-new-tokens", "8") for place in (tmp_path / "model", moh_dir)]
    assert [result.code for result in written] == [0, 0]
    assert written[0].out == written[1].out and json.loads(written[0].out[0])["prompt"] == PROMPT


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give either a prompt, or --prompts FILE"),
        (["the head", "--prompts", "FILE"], "give either a prompt, or --prompts FILE"),
        (["--prompts", "FILE"], "--prompts must hold at least one line"),
        (["the head", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        (["the head", "--temperature", "-1"], "--temperature at least 0"),
    ],
)
def test_generate_refuses_what_makes_no_sense(
    moh: Any, moh_dir: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n", encoding="utf-8")
    result = moh("generate", moh_dir, *(str(empty) if o == "FILE" else o for o in options))
    assert result.code == 2
    assert message in result.err[-1]


def test_a_conversation_from_a_pipe_is_answered_line_by_line(moh: Any, moh_dir: Path, typed: Any) -> None:
    typed("the head reads", "", "/heads 0.5", "/heads 3", "a token", "/reset", "the head reads", "/quit", "not read")
    result = moh("chat", moh_dir, "--temperature", "0", "--max-new-tokens", "5")
    assert result.code == 0
    assert result.err == ["50.0 % of the heads", "100.0 % of the heads"]
    assert len(result.out) == 3


def test_what_is_wrong_with_a_line_does_not_end_the_conversation(moh: Any, moh_dir: Path, typed: Any) -> None:
    typed("/heads 9", "/heads", "/head 1", "the head")  # no /quit: the end of the input ends the chat
    result = moh("chat", moh_dir, "--temperature", "0", "--max-new-tokens", "3")
    assert result.code == 0
    assert len(result.out) == 1
    for line, message in zip(
        result.err, ["between 0 and num_heads", "must be like 3, 0.75", "must be /heads K, /reset"], strict=True
    ):
        assert line.startswith("moh chat: ")
        assert message in line


def test_turns_are_remembered_in_the_chat_template_until_reset(moh_dir: Path, capsys: Any) -> None:
    model, tokenizer = load_causal_lm(moh_dir), load_tokenizer(moh_dir)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} . {% endfor %}the "
    chat = Conversation(model, tokenizer, {"max_new_tokens": 4, "do_sample": False}, system="a router")
    reply = chat.say("the head")
    assert capsys.readouterr().out.strip() == reply
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant"]
    ids = chat._inputs([*chat.messages, {"role": "user", "content": "a key"}])["input_ids"][0]
    assert tokenizer.decode(ids) == f"a router . the head . {reply} . a key . the"
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "a router"}]


def test_a_conversation_that_grows_too_long_is_kept_as_it_was(moh_dir: Path) -> None:
    model, tokenizer = load_causal_lm(moh_dir), load_tokenizer(moh_dir)
    chat = Conversation(model, tokenizer, {"max_new_tokens": 4, "do_sample": False})
    chat.say("the head")
    before = list(chat.messages)
    with pytest.raises(ValueError, match=r"must fit into the model's 64 tokens: /reset"):
        chat.say("the head " * 40)
    assert chat.messages == before


def test_a_compiled_model_with_a_static_cache_writes_what_a_dynamic_one_writes(moh_dir: Path) -> None:
    torch.compiler.reset()
    model = load_causal_lm(moh_dir)
    ids = load_tokenizer(moh_dir)(["the head reads a key"], return_tensors="pt").input_ids
    options = dict(max_new_tokens=10, min_new_tokens=10, do_sample=False)
    expected = model.generate(ids, **options)
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    got = model.generate(ids, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(got, expected)


def test_a_chat_template_that_refuses_a_turn_is_told_and_the_conversation_goes_on(
    moh: Any, moh_dir: Path, tmp_path: Path, typed: Any
) -> None:
    import shutil

    from transformers import AutoTokenizer

    shutil.copytree(moh_dir, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(moh_dir)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('not this') }}{% endif %}"
        "{{ m.content }} {% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path / "model")
    typed("no", "the head")
    result = moh("chat", tmp_path / "model", "--max-new-tokens", 3, "--temperature", 0)
    assert result.code == 0 and result.out
    assert "moh chat: the model's chat template refuses the conversation: not this" in result.err


STEERING = "a\x1b]0;title\x07b\x9b31mc\rd\x7f\n\te"


def test_a_models_text_does_not_steer_the_terminal(moh, moh_dir: Path, monkeypatch, typed) -> None:
    from transformers import PreTrainedTokenizerFast

    monkeypatch.setattr(PreTrainedTokenizerFast, "decode", lambda *_, **__: STEERING)
    shown = ["a␛]0;title␇b\ufffd31mc␍d␡", "\te"]
    assert moh("generate", moh_dir, "the head", "--max-new-tokens", 2).out[:2] == shown
    typed("the head", "/quit")
    assert moh("chat", moh_dir, "--max-new-tokens", 2, "--temperature", 0).out[:2] == shown


def test_one_prompt_as_json_is_the_text_that_is_printed_otherwise(moh, moh_dir: Path) -> None:
    command = ["generate", moh_dir, "the head reads", "--max-new-tokens", 4]
    (line,) = moh(*command, "--json").out
    assert json.loads(line)["prompt"] == "the head reads"
    # the printed text is one stream: the prompt's, then the model's
    assert "\n".join(moh(*command).out).strip() == f"the head reads {json.loads(line)['text'].strip()}"


def test_json_keeps_a_models_text_without_steering_the_terminal(moh, moh_dir: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("moh.cli.generation.continuations", lambda *_, **__: [STEERING])
    (tmp_path / "prompts.txt").write_text("the head\n")
    (line,) = moh("generate", moh_dir, "--prompts", tmp_path / "prompts.txt").out
    assert json.loads(line)["text"] == STEERING and not set("\x1b\x07\x7f\x9b") & set(line)
