"""The code of a page of the documents, and a program that runs it block after block as a reader would type it.

    python install/pages.py PAGE REPORT [STEPS]    # in the environment and the directory that the reader has

Python runs in one session, files are written, and the lines `$ ...` of consoles go to the shell. `moh serve` keeps running
beside the commands after it. REPORT, a JSON file, gets the seconds of each step, and the threads that it might use. If it is
there already, its commands are not run again: an interrupted run resumes, with a new session of Python. With STEPS only the
first ones run. Needs nothing but Python.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BLOCK = re.compile(r'^```(python|console|yaml title="([^"]+)")\n(.*?)^```', re.MULTILINE | re.DOTALL)
INSTALLERS = ("pip", "uv")
SERVER = "moh serve"
SERVER_SECONDS = 300


def commands(text: str) -> list[str]:
    """The commands of consoles, lines `$ ...`; other lines are output."""
    return re.findall(r"^\$ (.+)", text.replace("\\\n", " "), re.MULTILINE)


def requirements(text: str) -> list[str]:
    """What the page's first `pip install` of this package names, in a console or in a sentence."""
    line = re.search(r'pip install\s+("mixture-of-heads[^`\n]*)', text)
    return shlex.split(line[1]) if line else []


def run_page(page: Path, report: Path, most: int = sys.maxsize) -> None:
    """Run the page, or the `most` first steps, in the current directory; `report` gets each one's name and seconds as it ends.

    Raises:
        subprocess.CalledProcessError: a command failed.
        Exception: what a block of Python raised.
    """
    text = page.read_text(encoding="utf-8")
    names: dict[str, object] = {"__name__": "__main__"}
    steps = json.loads(report.read_text(encoding="utf-8")) if report.exists() else []
    done = [step["step"] for step in steps]
    servers: list[subprocess.Popen[bytes]] = []
    try:
        for block in BLOCK.finditer(text):
            kind, title, content = block.groups()
            line = text.count("\n", 0, block.start(3))
            if len(steps) >= most:
                break
            if title:
                Path(title).write_text(content, encoding="utf-8")
            elif kind == "python":
                with timed(f"Python, line {line + 1}", steps, report):
                    exec(compile("\n" * line + content, str(page), "exec"), names)
            else:
                for command in commands(content):
                    is_over = command in done and not command.startswith(SERVER)
                    if not is_over and not command.startswith(INSTALLERS) and len(steps) < most:
                        with timed(command, steps, report):
                            servers += run_command(command)
    finally:
        for server in servers:
            server.terminate()
            server.wait()


def run_command(command: str) -> list[subprocess.Popen[bytes]]:
    """Run a command to its end, or, if it is a server, until it answers: then returns its process.

    Raises:
        subprocess.CalledProcessError: it failed, or does not answer.
    """
    words = shlex.split(command, comments=True)
    if not command.startswith(SERVER):
        subprocess.run(command, shell=True, check=True)
        return []
    server = subprocess.Popen(words)
    address = "localhost", int(words[words.index("--port") + 1])
    end = time.monotonic() + SERVER_SECONDS
    while server.poll() is None and time.monotonic() < end:
        try:
            socket.create_connection(address, timeout=1).close()
            return [server]
        except OSError:
            time.sleep(0.2)
    server.terminate()
    raise subprocess.CalledProcessError(server.wait(), command)


@contextmanager
def timed(name: str, steps: list[dict[str, object]], report: Path) -> Iterator[None]:
    """Add a step with its wall and CPU seconds to the report, unless it has it."""
    print(f"\n$ {name}", flush=True)
    wall, cpu = time.perf_counter(), cpu_seconds()
    yield
    if all(name != step["step"] for step in steps):
        threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
        steps.append(dict(step=name, wall=time.perf_counter() - wall, cpu=cpu_seconds() - cpu, threads=threads))
        written = report.with_suffix(".part")  # moved into place, as a run that stops here resumes
        written.write_text(json.dumps(steps), encoding="utf-8")
        written.replace(report)


def cpu_seconds() -> float:
    """Processor time of this process and of its children that have ended."""
    uses = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in uses)


if __name__ == "__main__":
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    sys.path[0] = ""  # as in a session of the reader's: the current directory, not this file's
    run_page(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
