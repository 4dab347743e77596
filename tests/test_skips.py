"""The test run ends with the number of skipped tests and their reasons; `.ci/run` brings a browser where it may."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SKIPPING = """
import pytest

@pytest.mark.parametrize("number", range(3))
def test_in_a_browser(number):
    pytest.skip("no Chromium is installed")

@pytest.mark.skipif(True, reason="there is\\n a GPU")
def test_without_a_gpu():
    pass

def test_that_runs():
    pass
"""


@pytest.mark.parametrize("processes", ["0", "2"])
def test_skipped_tests_are_counted_by_their_reason(tmp_path: Path, processes: str) -> None:
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_skipping.py").write_text(SKIPPING)
    command = [sys.executable, "-m", "pytest", "-q", "-n", processes, "-p", "no:cacheprovider", tmp_path]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    assert re.search(r"=+ 4 skipped =+\n +3  no Chromium is installed\n +1  there is a GPU\n", result.stdout)


def run_ci(
    folder: Path, user: str, system: str, *, there: bool, works: bool = True, broken: str = "", **also: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """`.ci/run` with programs that only note their first word; the lines that they noted.

    Args:
        folder: for the programs and the log.
        user: what `id -u` prints.
        system: the ID in /etc/os-release.
        there: whether Chromium is installed.
        works: whether apt does.
        broken: targets of make that fail.
        also: a target of make -> what it does besides.
    """
    programs, root = folder / "bin", folder / "root"
    (root / ".ci").mkdir(parents=True)
    programs.mkdir()
    (folder / "os-release").write_text(f"ID={system}\n")
    script = (ROOT / ".ci" / "run").read_text().replace("/etc/os-release", str(folder / "os-release"))
    (root / ".ci" / "run").write_text(script)
    log = folder / "log"
    result_of_apt = "true" if works else "exit 100"
    fakes = {
        "id": f"echo {user}",
        "apt-get": f'for word; do case $word in update|install) echo "apt $word" >> {log};; esac; done; {result_of_apt}',
        "make": f"echo make $1 >> {log}; echo output of $1\n"
        + "".join(f"[ $1 != {target} ] || {{ {command}; }}\n" for target, command in also.items())
        + f'case " {broken} " in *" $1 "*) exit 1;; esac',
    } | ({"chromium": "true"} if there else {})
    for name, text in fakes.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    for name in ("bash", "cat", "dirname", "env", "mktemp", "rm", "sh", "sleep"):
        (programs / name).symlink_to(next(f for f in (Path("/bin") / name, Path("/usr/bin") / name) if f.exists()))
    environment = {name: value for name, value in os.environ.items() if name != "VENV"} | {"PATH": str(programs)}
    command = [programs / "bash", root / ".ci" / "run"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    return result, log.read_text().splitlines()


@pytest.mark.parametrize(
    ("user", "system", "there", "works", "expected"),
    [
        pytest.param("0", "debian", False, True, ["apt update", "apt install"], id="root-on-debian"),
        pytest.param("0", "debian", False, False, ["apt update"], id="no-network-is-no-failure"),
        pytest.param("0", "debian", True, True, [], id="already-there"),
        pytest.param("1000", "debian", False, True, [], id="not-root"),
        pytest.param("0", "ubuntu", False, True, [], id="ubuntu-has-only-a-snap"),
    ],
)
def test_ci_brings_chromium_where_it_may(
    tmp_path: Path, user: str, system: str, there: bool, works: bool, expected: list[str]
) -> None:
    result, done = run_ci(tmp_path, user, system, there=there, works=works)
    assert result.returncode == 0, result.stderr
    assert done[: len(expected) + 2] == [*expected, "make .venv/.stamp-dev", "make style"]
    assert sorted(done[len(expected) + 2 :]) == ["make test", "make types"]
    assert ("could not be installed" in result.stderr) is (expected != [] and not works)


@pytest.mark.parametrize("broken", ["types", "test", "types test"])
def test_ci_fails_with_either_and_prints_both(tmp_path: Path, broken: str) -> None:
    result, _ = run_ci(tmp_path, "0", "debian", there=True, broken=broken)
    assert result.returncode == 1
    assert result.stdout.splitlines()[-2:] == ["output of test", "output of types"]


def test_ci_fails_at_once_with_the_style(tmp_path: Path) -> None:
    result, done = run_ci(tmp_path, "0", "debian", there=True, broken="style types test")
    assert result.returncode == 1 and done[-1] == "make style"
    assert result.stdout.splitlines()[-1] == "output of style"


def test_an_interrupted_ci_ends_the_check_of_types_and_prints_it(tmp_path: Path) -> None:
    there = tmp_path / "process"
    checking = f"echo $$ > {there}; exec sleep 60"
    interrupting = f"until [ -s {there} ]; do sleep 0.01; done; kill -TERM $PPID"
    result, _ = run_ci(tmp_path, "0", "debian", there=True, types=checking, test=interrupting)
    assert result.returncode == 143
    assert result.stdout.splitlines()[-2:] == ["output of test", "output of types"]
    with pytest.raises(ProcessLookupError):
        os.kill(int(there.read_text()), 0)
