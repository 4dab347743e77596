"""Promise: `moh run` and `moh lm-eval` run other programs, and the processes that they start, with our models registered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from moh.cli import programs

ROOT = Path(programs.__file__).parents[2]
SHOW = """
import sys
from pathlib import Path
if __name__ == "__main__":
    Path(sys.argv[1]).write_text("|".join(sys.argv[2:]))
"""


@pytest.fixture
def record(tmp_path: Path) -> Path:
    return tmp_path / "record.txt"


def process(*argv: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command line in a process of its own, from the sources."""
    path = os.pathsep.join([str(ROOT), *filter(None, [environment.pop("PYTHONPATH", "")])])
    env = os.environ | {"PYTHONPATH": path} | environment
    command = [sys.executable, "-m", "moh", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=env, check=False)


def test_a_file_runs_as_a_program_with_its_neighbours(moh, tmp_path: Path, record: Path) -> None:
    (tmp_path / "neighbour_of_mine.py").write_text("import sys\nfrom pathlib import Path")
    (tmp_path / "train.py").write_text("from neighbour_of_mine import Path, sys\n" + SHOW)
    before = (list(sys.argv), list(sys.path), os.environ.get("PYTHONPATH"))
    result = moh("run", tmp_path / "train.py", record, "--debug", "-o", "x", "--", "--share=1")
    assert result.code == 0, result.err
    assert record.read_text() == "--debug|-o|x|--|--share=1"  # all that follows the program is its own
    assert (list(sys.argv), list(sys.path), os.environ.get("PYTHONPATH")) == before


def test_a_directory_and_a_module_run_as_programs(moh, tmp_path: Path, record: Path, monkeypatch) -> None:
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__main__.py").write_text(SHOW)
    (tmp_path / "my_module.py").write_text(SHOW)
    monkeypatch.syspath_prepend(tmp_path)
    for name in (tmp_path / "my_package", "my_package", "my_module"):
        record.unlink(missing_ok=True)
        result = moh("run", name, record, "a")
        assert result.code == 0 and record.read_text() == "a", result.err


def test_an_installed_program_runs_by_its_name(moh, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def main() -> int:
        seen.append(list(sys.argv))
        return 3

    monkeypatch.setattr(programs, "SEEN", main, raising=False)
    scripts = [EntryPoint("my-trl", "moh.cli.programs:SEEN", "console_scripts")]
    monkeypatch.setattr(programs, "entry_points", lambda group, name: [s for s in scripts if s.name == name])
    assert moh("run", "my-trl", "sft", "--lr", 1).code == 3
    assert seen == [["my-trl", "sft", "--lr", "1"]]


@pytest.mark.parametrize(
    ("text", "code", "err"),
    [
        ("raise SystemExit", 0, []),
        ("import sys; sys.exit(4)", 4, []),
        ("import sys; sys.exit('no data')", 1, ["no data"]),
    ],
)
def test_the_exit_code_is_the_programs(moh, tmp_path: Path, text: str, code: int, err: list[str]) -> None:
    (tmp_path / "program.py").write_text(text)
    result = moh("run", tmp_path / "program.py")
    assert (result.code, result.err) == (code, err)


def test_an_error_of_the_program_is_shown_as_python_shows_it(moh, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("def mine():\n    raise ValueError('its own error')\nmine()")
    result = moh("run", tmp_path / "program.py")
    assert result.code == 1 and result.err[-1] == "ValueError: its own error"
    assert any("in mine" in line for line in result.err)


@pytest.mark.parametrize("name", ["nowhere.py", "no_such_module_here", "no.such.module", "a b"])
def test_what_is_no_program_is_named(moh, name: str) -> None:
    result = moh("run", name)
    assert result.code == 2
    assert result.err == [
        "moh run: PROGRAM must be a Python file, a program that an installed package brings, or a module, got "
        + repr(name)
    ]


READ = """
import sys
from transformers import AutoConfig
print(type(AutoConfig.from_pretrained(sys.argv[1])).__name__)
"""


def test_a_program_and_what_it_starts_know_our_models(moh_dir: Path, tmp_path: Path) -> None:
    """Not in the program's text: `import moh`. Its child is another Python process, as with `accelerate launch`."""
    (tmp_path / "read.py").write_text(READ)
    start = "import subprocess, sys\nprint(subprocess.check_output([sys.executable, *sys.argv[1:]], text=True), end='')"
    (tmp_path / "start.py").write_text(start)
    hidden = tmp_path / "site"  # a sitecustomize of the user's, which must still run
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text("import builtins\nbuiltins.of_the_user = 1")
    (tmp_path / "both.py").write_text(READ + "print(of_the_user)")
    results = [
        process("run", tmp_path / "read.py", moh_dir),
        process("run", tmp_path / "start.py", tmp_path / "both.py", moh_dir, PYTHONPATH=str(hidden)),
    ]
    assert [result.returncode for result in results] == [0, 0], [result.stderr[-500:] for result in results]
    assert results[0].stdout.split() == ["MoHLlamaConfig"]
    assert results[1].stdout.split() == ["MoHLlamaConfig", "1"]


def test_a_python_without_our_package_still_starts(tmp_path: Path) -> None:
    # -S: no site-packages, so no sitecustomize is run by itself and no `moh` is found
    text = f"import runpy; runpy.run_path({str(programs.SITE / 'sitecustomize.py')!r}); print('started')"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-S", "-c", text]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "started\n" and not done.stderr, done.stderr


def test_the_harness_gets_its_own_command_line(moh, monkeypatch: pytest.MonkeyPatch) -> None:
    main = pytest.importorskip("lm_eval.__main__", reason="the extra `eval` is not installed")
    from moh.evaluation.harness.registry import SUITE_FILES

    seen = []
    monkeypatch.setattr(main, "cli_evaluate", lambda: seen.append(list(sys.argv)))
    assert moh("lm-eval", "run", "--model", "hf", "--tasks", "x", "--help").code == 0
    assert moh("lm-eval", "--model", "hf", "--debug").code == 0
    assert seen == [
        ["lm-eval", "run", "--model", "hf", "--tasks", "x", "--help"],
        ["lm-eval", "--model", "hf", "--debug", "--include_path", str(SUITE_FILES)],
    ]


@pytest.mark.slow
def test_the_harness_evaluates_a_moh_model(moh_dir: Path, tmp_path: Path) -> None:
    """A task from a file here, through the harness's own command line, in float32 on the CPU."""
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"q": "the head", "a": " the"}) + "\n" for _ in range(4)))
    (tmp_path / "heads.yaml").write_text(
        "task: heads\ndataset_path: json\noutput_type: multiple_choice\ntest_split: train\n"
        f"dataset_kwargs: {{data_files: {tmp_path / 'data.jsonl'}}}\n"
        'doc_to_text: "{{q}}"\ndoc_to_choice: ["the", "token"]\ndoc_to_target: 0\nmetric_list: [{metric: acc}]\n'
    )
    result = process(
        "lm-eval", "run", "--model", "hf", "--model_args", f"pretrained={moh_dir},dtype=float32", "--tasks", "heads",
        "--include_path", tmp_path, "--device", "cpu", "--output_path", tmp_path / "out",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    (file,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(file.read_text())["results"]["heads"]["acc,none"] in (0.0, 1.0)


@pytest.mark.slow
def test_trl_tunes_a_moh_model_from_its_own_command_line(moh_dir: Path, tmp_path: Path) -> None:
    """`trl sft` starts the training in another process, through accelerate's launcher."""
    pytest.importorskip("trl", reason="trl is not installed")
    (tmp_path / "texts").mkdir()
    rows = [json.dumps({"text": "the head reads the value of the router ."}) for _ in range(16)]
    (tmp_path / "texts" / "train.jsonl").write_text("\n".join(rows))
    result = process(
        "run", "trl", "sft", "--model_name_or_path", moh_dir, "--dataset_name", tmp_path / "texts", "--output_dir",
        tmp_path / "out", "--max_steps", 2, "--per_device_train_batch_size", 2, "--use_cpu", "--report_to", "none",
        "--max_length", 16, "--bf16", "false", "--gradient_checkpointing", "false", "--dtype", "float32",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "moh_llama"
