"""Programs in interpreters of their own, without each of them importing PyTorch again: forks of one that has."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

PRELOADED = "torch torch._dynamo torch.utils.checkpoint numpy"
"""Imported before the forks: what `import moh` needs, and nothing whose order of import a test is about."""

_SERVER = f"""
def serve():
    import atexit, importlib, json, os, sys
    for name in "{PRELOADED}".split():
        importlib.import_module(name)
    while line := sys.stdin.readline():
        job = json.loads(line)
        child = os.fork()
        if child:
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
            continue
        for number, file in enumerate((os.devnull, job["out"], job["err"])):
            os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), number)
        os.environ.clear()
        os.environ.update(job["environment"])
        os.chdir(job["folder"])
        sys.argv = ["-c", *job["arguments"]]
        main = vars(sys.modules["__main__"])
        del main["serve"]
        status = 1
        try:
            exec(compile(job["code"], "<program>", "exec"), main)
            status = 0
        except SystemExit as end:
            status = 0 if end.code is None else end.code
            if not isinstance(status, int):
                print(status, file=sys.stderr)
                status = 1
        except BaseException:
            sys.excepthook(*sys.exc_info())
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
serve()
"""


class Forks:
    """An interpreter that has imported `PRELOADED` alone, started with the first program."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None
        self._environment = dict(os.environ)  # without the changes of the test that happens to start it

    def run(self, code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Runs a program and returns its exit code and what it wrote.

        As `python -c` does, in the environment and directory of now, with two differences. What an interpreter or PyTorch
        reads once when it starts, such as `PYTHONPATH`, is that of the time when this object was made. And after the functions
        of `atexit` a program ends at once: freeing PyTorch's modules would take a second.

        Raises:
            RuntimeError: the interpreter has ended; the next program starts another.
        """
        words = [str(argument) for argument in arguments]
        with tempfile.TemporaryDirectory() as folder:
            files = {name: str(Path(folder, name)) for name in ("out", "err")}
            job = dict(files, code=textwrap.dedent(code), arguments=words)
            job |= dict(environment=dict(os.environ), folder=str(Path.cwd()))
            try:
                status = int(self._answer(json.dumps(job)))
            except BaseException:  # a timeout of the test too: the next answer would be this program's
                self._kill()
                raise
            out, err = (Path(file).read_text(encoding="utf-8") for file in files.values())
        return subprocess.CompletedProcess(words, status, out, err)

    def close(self) -> None:
        """Ends the interpreter."""
        if self._server is not None:
            self._server.communicate()

    def _answer(self, job: str) -> str:
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, "-c", _SERVER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=self._environment,
                start_new_session=True,  # one signal then ends the programs too
            )
        assert self._server.stdin is not None and self._server.stdout is not None
        try:
            print(job, file=self._server.stdin, flush=True)
            answer = self._server.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise RuntimeError(f"the interpreter of the forks has ended with exit code {self._server.wait()}")
        return answer

    def _kill(self) -> None:
        if self._server is not None:
            server, self._server = self._server, None
            with contextlib.suppress(ProcessLookupError):  # all have ended
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()
