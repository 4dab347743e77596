"""Programs in new interpreters, without each of them importing PyTorch again: forks of one that has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

PRELOADED = "torch torch._dynamo torch.utils.checkpoint numpy"
"""Imported before the forks: what `import moh` needs, and nothing whose order of import a test is about."""

_SERVER = f"""
import importlib, json, os, sys, traceback
for name in "{PRELOADED}".split():
    importlib.import_module(name)
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        code = 0
        try:
            for number, file in enumerate((os.devnull, job["out"], job["err"])):
                os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), number)
            sys.stdin = open(os.devnull)
            os.environ.clear()
            os.environ.update(job["environment"])
            os.chdir(job["folder"])
            sys.argv = ["-c", *job["arguments"]]
            exec(compile(job["code"], "<program>", "exec"), {{"__name__": "__main__"}})
        except SystemExit as exit:
            code = exit.code or 0
            if not isinstance(code, int):
                print(code, file=sys.stderr)
                code = 1
        except BaseException:
            code = 1
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Forks:
    """An interpreter that has imported `PRELOADED` alone, started with the first program."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None

    def run(self, code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Runs a program, as `python -c` does, and returns its exit code and what it wrote."""
        if self._server is None:
            command = [sys.executable, "-c", _SERVER]
            self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._server.stdin is not None and self._server.stdout is not None
        words = [str(argument) for argument in arguments]
        with tempfile.TemporaryDirectory() as folder:
            files = {name: str(Path(folder, name)) for name in ("out", "err")}
            job = dict(files, code=textwrap.dedent(code), arguments=words)
            job |= dict(environment=dict(os.environ), folder=str(Path.cwd()))
            print(json.dumps(job), file=self._server.stdin, flush=True)
            try:
                status = int(self._server.stdout.readline())
            except BaseException:  # a timeout of the test: the next answer would be this program's
                self._server.kill()
                self._server = None
                raise
            out, err = (Path(file).read_text(encoding="utf-8") for file in files.values())
        return subprocess.CompletedProcess(words, status, out, err)

    def close(self) -> None:
        """Ends the interpreter."""
        if self._server is not None:
            self._server.communicate()
