"""Promises of the fixture `forks`: a program runs as with `python -c`, and a failure leaves nothing behind."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

import forks


def test_a_program_runs_as_by_python(forks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OF_THIS_TEST", "1")
    code = """
    import atexit, os, sys
    atexit.register(print, "at exit")
    class Kind: pass
    assert sys.modules["__main__"].Kind is Kind and __name__ == "__main__" and "serve" not in globals()
    print(os.environ["OF_THIS_TEST"], os.getcwd(), *sys.argv, sys.stdin.read(), "moh" in sys.modules)
    sys.exit("no data")
    """
    done = forks.run(code, "a", 1)
    assert (done.returncode, done.stderr) == (1, "no data\n")
    assert done.stdout == f"1 {tmp_path} -c a 1  False\nat exit\n"


@pytest.mark.parametrize(
    ("code", "status", "last"),
    [("import sys; sys.exit(3)", 3, ""), ("1 / 0", 1, "ZeroDivisionError: division by zero"), ("", 0, "")],
)
def test_the_exit_code_is_the_programs(forks, code: str, status: int, last: str) -> None:
    done = forks.run(code)
    assert (done.returncode, "".join(done.stderr.splitlines()[-1:])) == (status, last)
    assert forks.run("import os, signal; os.kill(os.getpid(), signal.SIGTERM)").returncode == -signal.SIGTERM


def _is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_after_a_failure_another_interpreter_runs_the_next_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without PyTorch: it is started four times here
    monkeypatch.setattr("forks._SERVER", forks._SERVER.replace(f'"{forks.PRELOADED}"', '""'))
    made = forks.Forks()
    monkeypatch.setenv("PYTHONPATH", "of-this-test")  # not of the interpreter, which outlives the test
    assert made.run("import sys; assert not any('of-this-test' in p for p in sys.path)").returncode == 0

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    with pytest.raises(TimeoutError):
        made.run(
            "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)", tmp_path / "id"
        )
    signal.signal(signal.SIGALRM, before)
    program, end = int((tmp_path / "id").read_text()), time.monotonic() + 10
    while _is_alive(program) and time.monotonic() < end:
        time.sleep(0.01)
    assert not _is_alive(program)

    for _ in range(2):
        assert made.run("print('again')").stdout == "again\n"
        assert made._server is not None
        os.kill(made._server.pid, signal.SIGKILL)
        made._server.wait()
        with pytest.raises(RuntimeError, match="the interpreter of the forks has ended with exit code -9"):
            made.run("")
    made.close()
