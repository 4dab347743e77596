"""Promise: the tutorials' commands are run as they stand on the pages, and docs/install.md has what was measured."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "install"))

import first_hour  # noqa: E402
import pages  # noqa: E402

PAGE = """
```console
$ pip install "mixture-of-heads[plot]"
$ echo one > one.txt
```

```yaml title="two.yaml"
two: 2
```

```python
values = [open(name).read() for name in ("one.txt", "two.yaml")]
```

```python
assert __name__ == "__main__" and values == ["one\\n", "two: 2\\n"]
open("python.txt", "w").write("three")
```
"""
SERVER = f"""#!{sys.executable}
import os, pathlib, socketserver, sys
pathlib.Path("server.txt").write_text(str(os.getpid()))
socketserver.TCPServer(("localhost", int(sys.argv[-1])), socketserver.BaseRequestHandler).serve_forever()
"""


def text_of(tutorial: str) -> str:
    return (ROOT / "docs" / "tutorials" / f"{tutorial}.md").read_text(encoding="utf-8")


def page_of(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    (folder / "page.md").write_text(text, encoding="utf-8")
    return folder / "page.md"


def test_a_page_runs_as_one_session_and_its_steps_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, report = page_of(PAGE, tmp_path, monkeypatch), tmp_path / "steps.json"
    pages.run_page(page, report)
    steps = json.loads(report.read_text())
    assert [step["step"] for step in steps] == ["echo one > one.txt", "Python, line 12", "Python, line 16"]
    assert all(step["wall"] >= 0 and step["cpu"] >= 0 for step in steps) and Path("python.txt").exists()
    (tmp_path / "one.txt").write_text("one\n# as the first run left it")
    with pytest.raises(AssertionError):  # Python starts again, with the files of commands that are not run again
        pages.run_page(page, report)
    assert json.loads(report.read_text()) == steps


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("```console\n$ exit 3\n```\n", subprocess.CalledProcessError),
        ("```console\n$ moh serve --no-such-option --port 1\n```\n", subprocess.CalledProcessError),
        ("```python\n1 / 0\n```\n", ZeroDivisionError),
    ],
    ids=["command", "server", "Python"],
)
def test_the_first_failure_ends_a_page(code: str, error: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "moh").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "moh").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(error):
        pages.run_page(
            page_of(f"{code}\n```console\n$ touch later\n```\n", tmp_path, monkeypatch), tmp_path / "steps.json"
        )
    assert not Path("later").exists()


def test_a_server_answers_the_commands_after_it_and_ends_with_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    (tmp_path / "moh").write_text(SERVER)
    (tmp_path / "moh").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    asks = f"""```python\nimport socket\nsocket.create_connection(("localhost", {port})).close()\n```\n"""
    text = f"```console\n$ moh serve model --port {port}\n```\n{asks}"
    pages.run_page(page_of(text, tmp_path, monkeypatch), tmp_path / "steps.json")
    with pytest.raises(ProcessLookupError):
        os.kill(int(Path("server.txt").read_text()), 0)


@pytest.mark.parametrize("tutorial", first_hour.TUTORIALS)
def test_a_tutorial_says_what_to_install_and_can_be_run_without_the_hub(tutorial: str) -> None:
    text = text_of(tutorial)
    assert pages.requirements(text)[0].startswith("mixture-of-heads[")
    assert all(text.count(command) == 1 for command in first_hour.REPLACED.get(tutorial, {}))
    named = set(re.findall(r"\b(?:HuggingFaceTB|facebook|Chat-UniVi)/[\w.-]+", text))
    assert named <= set(first_hour.HUB)


def run_three_steps(folder: Path, monkeypatch: pytest.MonkeyPatch, *options: object, failing: str = "") -> dict:
    """Run first_hour.py with this Python on a page of three steps, of which one may fail; what it has measured so far."""
    step = "```console\n$ echo {0} >> log.txt{1}\n```\n"
    text = "".join(step.format(name, " && exit 1" if name == failing else "") for name in ("one", "two", "three"))
    for name, stand_in in {"text_of": lambda _: text, "make_hub": lambda _: None, "prepare": lambda *_: None}.items():
        monkeypatch.setattr(first_hour, name, stand_in)
    argv = ["first_hour.py", "run", "--only", "heads", "--tools", "uv", "--work", folder, "--python", sys.executable]
    monkeypatch.setattr(sys, "argv", [str(word) for word in (*argv, *options)])
    try:
        first_hour.main()
    except subprocess.CalledProcessError:
        assert failing
    return first_hour.collect(folder, "heads-uv")


def test_a_page_of_few_steps_runs_on_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    first = run_three_steps(tmp_path, monkeypatch, "--steps", 1)
    log = tmp_path / "heads-uv" / "empty" / "log.txt"
    assert (len(first["steps"]), first["whole"], log.read_text()) == (1, False, "one\n")
    assert run_three_steps(tmp_path, monkeypatch, "--steps", 1) == first
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    whole = run_three_steps(tmp_path, monkeypatch)
    assert whole["steps"][:1] == first["steps"] and whole["whole"] and whole["files"] and not log.exists()
    assert "| 1 and 2 |" in first_hour.table({"heads-uv": whole})
    assert run_three_steps(tmp_path, monkeypatch) == whole and not log.exists()


def test_an_interrupted_page_is_noted_with_its_machine_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = run_three_steps(tmp_path, monkeypatch, failing="two")
    assert [len(cut["steps"]), cut["whole"], cut["own_environment"]] == [1, False, False]
    assert cut["machine"] and cut["steps"][0]["threads"] >= 1
    whole = run_three_steps(tmp_path, monkeypatch)
    assert whole["steps"][0] == cut["steps"][0] and len(whole["steps"]) == 3 and whole["whole"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["install", "--python", sys.executable], "--python must not be given for install"),
        (["run", "--python", "/no/such/python"], "--python must be a program, got /no/such/python"),
        (["run"], "--wheel must be a file for run"),
    ],
    ids=["install with a Python", "no such Python", "no wheel"],
)
def test_wrong_usage_of_first_hour_is_one_error(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(sys, "argv", ["first_hour.py", *options])
    with pytest.raises(SystemExit) as ended:
        first_hour.main()
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_every_tutorial_is_tried() -> None:
    assert {page.stem for page in (ROOT / "docs" / "tutorials").glob("*.md")} == set(first_hour.TUTORIALS)


def test_the_install_page_has_what_was_measured() -> None:
    text = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    cells = json.loads(first_hour.RESULTS.read_text(encoding="utf-8"))
    assert first_hour.table(cells) in text
    assert {name.partition("-")[0] for name in cells} == set(first_hour.TUTORIALS)
    assert all(stands in " ".join(text.split()) for stands in first_hour.HUB.values())


def test_the_way_without_the_hub_writes_a_model(
    base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    (code,) = (content for kind, _, content in pages.BLOCK.findall(text) if kind == "python")
    monkeypatch.setattr("moh.demo.base_model.default_base_model", lambda: base_dir)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in Path("smollm2").iterdir()}


def test_a_file_with_two_names_is_counted_once(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(bytes(100_000))
    os.link(tmp_path / "one", tmp_path / "two")
    assert 100_000 <= first_hour.allocated(tmp_path) < 150_000
