"""Promise: bad input ends with exit code 2, a failure with 1, and one line that names what is wrong and where."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moh.models.transformers.loading import load_causal_lm

HEADS = ["--shared-heads", 1, "--active-heads", 1]


def assert_one_line(result, command: str, message: str) -> None:
    assert result.code == 2
    assert len(result.err) == 1, result.err
    assert result.err[0].startswith(f"moh {command}: ")
    assert re.search(message, result.err[0])


@pytest.fixture
def in_the_way(tmp_path: Path) -> Path:
    """A path that even root can't write: its parent is a file."""
    (tmp_path / "file").write_text("in the way")
    return tmp_path / "file" / "out"


@pytest.fixture
def latin1(tmp_path: Path) -> Path:
    file = tmp_path / "latin1.txt"
    file.write_bytes("na\u00efve".encode("latin-1"))
    return file


def test_a_missing_model_is_named(moh, text_file: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    message = f"there is no '{re.escape(str(nowhere))}'"
    text = ["--files", text_file]
    assert_one_line(moh("eval", nowhere, *text), "eval", message)
    assert_one_line(moh("generate", nowhere, "the"), "generate", message)
    assert_one_line(moh("convert", nowhere, tmp_path / "out", *HEADS, *text), "convert", message)
    assert_one_line(moh("inspect", nowhere, "--output", tmp_path / "out", *text), "inspect", message)
    assert_one_line(moh("eval", f"{nowhere}.gguf", *text), "eval", r"existing \.gguf file, got .*nowhere\.gguf")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damaged", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("left", [-100, 0, None], ids=["cut", "empty", "missing"])
def test_a_damaged_model_is_named_not_traced(
    moh, base_dir: Path, text_file: Path, tmp_path: Path, damaged: str, left: int | None
) -> None:
    for file in base_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    file = tmp_path / damaged
    file.unlink() if left is None else file.write_bytes(file.read_bytes()[:left])
    result = moh("eval", tmp_path, "--files", text_file, "--seq-len", 16)
    assert_one_line(result, "eval", re.escape(str(tmp_path)))
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        load_causal_lm(tmp_path)


def test_text_that_is_not_utf8_names_the_file_and_the_byte(moh, base_dir: Path, latin1: Path, tmp_path: Path) -> None:
    message = f"{re.escape(str(latin1))} is not UTF-8 text: byte 0xef at offset 2"
    assert_one_line(moh("eval", base_dir, "--files", latin1), "eval", message)
    assert_one_line(moh("convert", base_dir, tmp_path / "out", *HEADS, "--files", latin1), "convert", message)
    assert not (tmp_path / "out").exists()


def test_missing_text_is_named(moh, base_dir: Path) -> None:
    message = r"no such text file or directory: /nowhere\.txt"
    assert_one_line(moh("eval", base_dir, "--files", "/nowhere.txt"), "eval", message)


def test_output_that_cannot_be_written_is_refused_before_anything_runs(moh, in_the_way: Path, text_file: Path) -> None:
    message = f"{re.escape(str(in_the_way))} can't be written: Not a directory"
    text = ["--files", text_file]
    assert_one_line(moh("convert", "/nowhere/at/all", in_the_way, *HEADS, *text), "convert", message)
    assert_one_line(moh("inspect", "/nowhere/at/all", "--output", in_the_way, *text), "inspect", message)
    assert_one_line(moh("demo", "--base", "/nowhere/at/all", "--output", in_the_way, *text), "demo", message)


@pytest.mark.parametrize(
    ("shared", "active", "message"),
    [
        (3, 2, "active_heads must be between 0 and .* = 1, got 2"),
        (5, 0, "shared_heads must be between 0 and num_heads = 4, got 5"),
        (0, 0, "active_heads must be at least 1"),
    ],
)
def test_heads_that_do_not_add_up_are_told(moh, base_dir: Path, text_file, tmp_path, shared, active, message) -> None:
    heads = ["--shared-heads", shared, "--active-heads", active]
    result = moh("convert", base_dir, tmp_path / "out", *heads, "--files", text_file)
    assert_one_line(result, "convert", message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["eval", "--all-text"], "--all-text needs --files"),
        (["eval", "--seq-len", 1], "--seq-len must be at least 2"),
        (["eval", "--seq-len", 64, "--max-tokens", 63], "--max-tokens at least --seq-len, got 64, 63"),
        (["generate", "the", "--max-new-tokens", 0], "--max-new-tokens must be at least 1"),
        (["generate", "the", "--temperature", -1], "--temperature at least 0"),
        (["generate", ""], "prompt"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_an_option_out_of_range_is_told(moh, base_dir: Path, text_file: Path, argv, message) -> None:
    command, *rest = argv
    files = ["--files", text_file] if command == "eval" and "--all-text" not in rest else []
    assert_one_line(moh(command, base_dir, *rest, *files), command, message)


@pytest.mark.parametrize("content", [None, "model: {path: /nowhere/at/all}\ntraining: {max_step: 3}", "a: [b"])
def test_a_recipe_that_cannot_be_read_is_named(moh, tmp_path: Path, content) -> None:
    recipe = tmp_path / "recipe.yaml"
    if content is not None:
        recipe.write_text(content)
    assert_one_line(moh("train", recipe), "train", "recipe.yaml")


def test_a_recipe_with_an_unknown_override_tells_it(moh, tmp_path: Path, base_dir: Path, text_file: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {{path: {base_dir}}}\ntraining: {{output_dir: {tmp_path / 'out'}, max_steps: 1}}\n")
    assert_one_line(moh("train", recipe, "--training.max_step=3"), "train", "max_step")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "argv",
    [
        ["eval", "x", "--seqlen", "3"],
        ["eval", "text", "x", "--images", "y"],
        ["eval"],
        ["info", "--jason"],
        ["convert", "x", "y", "--shared-heads", "some", "--active-heads", "1"],
        ["curve", "x"],
        ["curve", "x", "--output", "y", "--out", "z"],
        ["generate", "x", "y", "--max-new", "3"],
        ["fly"],
        [],
    ],
    ids=" ".join,
)
def test_what_the_parser_does_not_know_ends_with_code_2(moh, argv) -> None:
    result = moh(*argv)
    assert result.code == 2 and not result.out
    assert result.err[0].startswith("usage: moh") and "error: " in result.err[-1]


@pytest.mark.parametrize("argv", [["--debug", "generate"], ["generate", "--debug"], ["eval", "text", "--debug"]])
def test_debug_shows_the_traceback_before_and_after_the_command(moh, tmp_path: Path, argv) -> None:
    with pytest.raises(ValueError, match="there is no"):
        moh(*argv, tmp_path / "nowhere", *(["the"] if "generate" in argv else []))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("shape must be B H"), 2),
        (FileNotFoundError("no such recipe"), 2),
        (RuntimeError("CUDA out of memory"), 1),
        (OSError(28, "No space left on device"), 1),
        (ImportError("needs timm"), 1),
        (BrokenPipeError(32, "Broken pipe"), 1),  # a worker's, say
        (PermissionError(13, "Permission denied"), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_a_failure_is_not_wrong_usage(moh, monkeypatch: pytest.MonkeyPatch, error, code) -> None:
    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("moh.demo.run_demo", fail)
    result = moh("demo")
    assert result.code == code and len(result.err) == 1 and result.err[0].startswith("moh demo: ")


def test_an_interrupted_command_ends_like_a_shell_expects(moh, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moh.demo.run_demo", interrupt)
    result = moh("demo")
    assert result.code == 130 and result.err == ["moh demo: interrupted"]


def test_a_command_whose_reader_has_ended_ends_in_silence() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    argv = [sys.executable, "-m", "moh", "train", "--list"]
    done = subprocess.run(argv, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writing)
    assert done.returncode == 141 and done.stderr == ""


def test_a_process_of_its_own_prints_one_line_even_after_a_model_was_loaded(base_dir: Path) -> None:
    argv = [sys.executable, "-m", "moh", "generate", str(base_dir), ""]
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_PROGRESS_BARS"}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 2 and done.stdout == ""
    # torchao, where it is installed, makes PyTorch warn when transformers imports it
    lines = [line for line in done.stderr.splitlines() if not ("torch/utils/_pytree.py" in line and line[0] == "W")]
    assert lines == ["moh generate: prompt must hold at least one token, got ''"]


def test_a_project_with_a_configuration_is_not_emptied(
    moh, base_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {name: tmp_path / name for name in (".git/HEAD", "config.json", "thesis.tex")}
    for file in files.values():
        file.parent.mkdir(exist_ok=True)
        file.write_text("{}")
    monkeypatch.chdir(tmp_path)
    message = "it holds other files, which are kept, such as .git/HEAD: choose another directory"
    for target in (".", tmp_path):
        assert_one_line(moh("convert", base_dir, target, *HEADS, "--files", text_file), "convert", message)
    assert_one_line(moh("extend-vocabulary", base_dir, base_dir, "."), "extend-vocabulary", message)
    assert all(file.is_file() for file in files.values())


def test_an_earlier_conversion_is_replaced_and_a_dense_model_kept(
    moh, base_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    for _ in range(2):
        assert moh("convert", base_dir, tmp_path / "out", *HEADS, "--router", "query_norm").code == 0
    shutil.copytree(base_dir, tmp_path / "mine")
    result = moh("convert", base_dir, tmp_path / "mine", *HEADS, "--router", "query_norm")
    assert_one_line(result, "convert", "a model's directory that this package wrote")
    assert (tmp_path / "mine" / "model.safetensors").read_bytes() == (base_dir / "model.safetensors").read_bytes()


def test_the_dense_model_and_other_files_are_not_overwritten(
    moh, base_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    text = ["--files", text_file]
    assert_one_line(
        moh("convert", base_dir, base_dir, *HEADS, *text), "convert", "must not be the directory of the dense model"
    )
    (tmp_path / "letter.txt").write_text("keep me")
    assert_one_line(
        moh("convert", base_dir, tmp_path, *HEADS, *text), "convert", "it holds other files, which are kept"
    )
    assert (base_dir / "model.safetensors").exists() and (tmp_path / "letter.txt").read_text() == "keep me"
