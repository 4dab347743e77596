"""Promise: each command does what its function does, and prints where the result is."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import moh as package
from moh.attention import BACKENDS
from moh.cli.main import build_parser
from moh.evaluation import perplexity
from moh.models.transformers import MoHLlamaForCausalLM
from moh.training import corpus_from_files, pack_tokens, read_texts


def parsers(parser: argparse.ArgumentParser, name: str = "moh") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """The program and all of its commands, with the words that call them."""
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, command in action.choices.items():
                yield from parsers(command, f"{name} {word}")


PARSERS = {" ".join(name.split()[1:]): parser for name, parser in parsers(build_parser())}
COMMANDS = [name for name in PARSERS if name]
HEAVY = "torch transformers timm diffusers numpy matplotlib"


def test_info_tells_versions_and_every_attention_backend(moh) -> None:
    result = moh("info")
    assert result.code == 0
    assert result.out[0].startswith(f"moh {package.__version__}, Python ")
    for name in ("torch", "transformers"):
        assert f"  {name:13s} {version(name)}" in result.out
    for backend in BACKENDS.values():
        assert any(line.split()[:1] == [backend.name] and "work" in line for line in result.out)


def test_convert_writes_a_model_and_its_tokenizer(moh, base_dir: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "model"
    result = moh(
        "convert", base_dir, out, "--shared-heads", 1, "--active-heads", 2, "--files", text_file,
        "--calibration-tokens", 1024, "--allocation", "sensitivity", "--refit-output",
    )  # fmt: skip
    assert result.code == 0
    assert result.out == [f"{out}: MoH model, tokens use 75 % of the heads on average"]
    model = AutoModelForCausalLM.from_pretrained(out)
    assert isinstance(model, MoHLlamaForCausalLM)
    assert model.config.router == "threshold" and model.config.share == 3 / 4
    assert AutoTokenizer.from_pretrained(out)("the head").input_ids == [3, 5]
    assert [path.name for path in out.parent.iterdir()] == ["model"]


def test_convert_the_papers_way_needs_no_text(moh, base_dir: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("moh.training.load_corpus", None)
    heads = ["--shared-heads", 2, "--active-heads", 0, "--router", "query_norm"]
    result = moh("convert", base_dir, tmp_path / "model", *heads)
    assert result.code == 0 and "50 %" in result.out[0]


@pytest.mark.parametrize("kind", ["dense", "MoH"])
def test_eval_measures_the_held_out_text(moh, base_dir: Path, moh_dir: Path, text_file: Path, kind) -> None:
    path = base_dir if kind == "dense" else moh_dir
    options = ["--files", text_file, "--seq-len", 32, "--max-tokens", 96]
    result = moh("eval", path, *options, "--json")
    blocks = pack_tokens(corpus_from_files([text_file]).heldout, AutoTokenizer.from_pretrained(base_dir), seq_len=32)[
        :3
    ]
    expected = perplexity(AutoModelForCausalLM.from_pretrained(path), blocks)
    assert result.code == 0 and len(result.out) == 1
    read = json.loads(result.out[0])
    assert read == {
        "perplexity": pytest.approx(expected.perplexity),
        "loss": pytest.approx(expected.loss),
        "stderr": pytest.approx(expected.stderr),
        "tokens": 3 * 31,
    }
    result = moh("eval", path, *options)
    assert result.out[0].startswith(f"perplexity {expected.perplexity:.3f} (loss {expected.loss:.4f} ")


def test_eval_of_all_text_reads_the_whole_file(moh, base_dir: Path, text_file: Path) -> None:
    result = moh("eval", base_dir, "--files", text_file, "--all-text", "--seq-len", 32, "--json")
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    assert json.loads(result.out[0])["tokens"] == len(pack_tokens(read_texts([text_file]), tokenizer, seq_len=32)) * 31


def test_eval_of_a_single_block_is_still_json(moh, base_dir: Path, text_file: Path) -> None:
    result = moh("eval", base_dir, "--files", text_file, "--seq-len", 32, "--max-tokens", 32, "--json")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert result.code == 0
    assert json.loads(result.out[0], parse_constant=refuse)["stderr"] is None


@pytest.mark.parametrize(
    ("options", "seq_len", "blocks"),
    [([], 64, 15), (["--seq-len", 32], 32, 31), (["--max-tokens", 130], 64, 2)],  # the model has 64 positions
    ids=["default", "seq_len", "max_tokens"],
)
def test_eval_of_wikitext_reads_its_whole_test_part(
    moh, base_dir: Path, tmp_path: Path, monkeypatch, options, seq_len: int, blocks: int
) -> None:
    (tmp_path / "test.jsonl").write_text('{"text": "the head sees the query"}\n' * 200)  # 1000 tokens
    monkeypatch.setattr("moh.data.text.named.WIKITEXT_2", f"{tmp_path}::test")
    result = moh("eval", base_dir, "--corpus", "wikitext-2", "--json", *options)
    assert result.code == 0, result.err
    assert json.loads(result.out[0])["tokens"] == blocks * (seq_len - 1)
    too_few = moh("eval", base_dir, "--corpus", "wikitext-2", "--max-tokens", 63)
    assert too_few.code == 2 and "--max-tokens must be at least --seq-len, got 63, 64" in too_few.err[-1]


@pytest.mark.parametrize("kind", ["dense", "MoH"])
def test_generate_prints_what_the_model_generates(moh, base_dir: Path, moh_dir: Path, kind) -> None:
    path = base_dir if kind == "dense" else moh_dir
    result = moh("generate", path, "the head sees", "--max-new-tokens", 8)
    ids = torch.tensor([AutoTokenizer.from_pretrained(path)("the head sees").input_ids])
    model = AutoModelForCausalLM.from_pretrained(path)
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)[0]
    expected = AutoTokenizer.from_pretrained(path).decode(written, skip_special_tokens=True)
    assert result.code == 0
    assert " ".join(result.out).split() == expected.split()
    assert len(expected.split()) > 3


def test_sampling_is_repeatable_by_its_seed(moh, base_dir: Path) -> None:
    runs = [
        moh("generate", base_dir, "the head", "--max-new-tokens", 12, "--temperature", 5, "--seed", seed).out
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("options", [[], ["--conversion.calibration=[some/texts:part]"]], ids=["own", "calibration"])
def test_train_follows_a_recipe_and_its_overrides(
    moh, base_dir: Path, text_file: Path, tmp_path: Path, monkeypatch, options: list[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
        model: {{path: {base_dir}}}
        conversion: {{shared_heads: 1, active_heads: 1, calibration_tokens: 256}}
        data: {{files: ['{text_file}'], seq_len: 16}}
        training: {{output_dir: {tmp_path / "out"}, max_steps: 9, per_device_train_batch_size: 2, precision: fp32}}
        """
    )
    read = []
    named = "moh.training.language.model.calibration_texts"
    monkeypatch.setattr(named, lambda names, **_: read.append(names) or ["the head sees"] * 99)
    result = moh("train", recipe, "--training.max_steps", 2, *options)
    assert read == ([["some/texts:part"]] if options else [])
    assert result.code == 0, result.err
    assert result.out[-1].startswith(f"{tmp_path / 'out' / 'model'}: step 2, loss ")
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model"), MoHLlamaForCausalLM)


def test_demo_hands_its_options_on(moh, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text_file: Path) -> None:
    given = []
    monkeypatch.setattr("moh.demo.run_demo", lambda settings, **_: given.append(settings))
    result = moh("demo", "--output", tmp_path, "--files", text_file, "--steps", 3, "--full", "--minutes", 1.5)
    assert result.code == 0, result.err
    (settings,) = given
    assert settings.output_dir == str(tmp_path) and settings.files == (str(text_file),)
    assert (settings.steps, settings.full, settings.minutes, settings.base) == (3, True, 1.5, None)


def test_the_demos_defaults_are_those_of_its_settings(moh, monkeypatch: pytest.MonkeyPatch) -> None:
    from moh.demo import DemoSettings

    given = []
    monkeypatch.setattr("moh.demo.run_demo", lambda settings, **_: given.append(settings))
    assert moh("demo").code == 0
    assert given == [DemoSettings()]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(moh, command) -> None:
    result = moh(*command.split(), "--help")
    assert result.code == 0 and not result.err
    assert result.out[0].startswith(f"usage: moh {command.removesuffix(' MODEL')}")


@pytest.mark.parametrize("words", ["--version", "--help", *(f"{command} --help" for command in COMMANDS)])
def test_help_and_version_import_nothing_heavy(words) -> None:
    code = f"""
import sys
from moh.cli import main
try:
    main(sys.argv[1:])
finally:
    loaded = [name for name in "{HEAVY}".split() if name in sys.modules]
    assert not loaded, f"also imported {{loaded}}"
"""
    command = [sys.executable, "-c", code, *words.split()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0 and result.stdout and not result.stderr, result.stderr


def test_version_is_the_packages(moh) -> None:
    assert moh("--version").out == [f"moh {package.__version__}"]


def test_the_overview_names_every_command(moh) -> None:
    result = moh("--help")
    first_words = [line.split()[0] for line in result.out if line.startswith("  ")]
    assert result.code == 0
    for command in {command.split()[0] for command in COMMANDS}:
        assert first_words.count(command) == 1, command
