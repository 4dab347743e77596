"""A run that is killed and restarted reads the same sequences in the same order as an uninterrupted one.

Stored and streamed text; one process, two, and from one to two. Each process is forked from a server that has imported
everything, and is killed with SIGKILL.
"""

from __future__ import annotations

import json
import runpy
import shutil
import signal
import socket
from itertools import count
from pathlib import Path

import pytest
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("run_samples.py")
STEPS = 6


Rows = list[list]  # [step, rows of the whole batch in order]


def _sources(folder: Path) -> str:
    words = "head token gate router layer value key query".split()
    for name, first, size in (("a", "the", 90), ("b", "a", 40)):
        lines = [{"text": f"{first} " + " ".join(words[(i * j) % 8] for j in range(i % 13))} for i in range(size)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return f"[{{path: {folder}/a.jsonl, weight: 3}}, {{path: {folder}/b.jsonl}}]"


class Runner:
    """Starts runs of one recipe in a folder; each call returns the rows that each step read."""

    def __init__(self, server, base_dir: Path, folder: Path, streaming: bool) -> None:
        self.server, self.folder, self.numbers = server, folder, count()
        self.options = [
            f"--model.path={base_dir}",
            f"--data.sources={_sources(folder)}",
            f"--data.streaming={str(streaming).lower()}",
            f"--data.cache_dir={folder / 'cache'}",
            "--data.seq_len=16",
            "--data.stream_buffer=3",
            f"--training.max_steps={STEPS}",
            "--training.save_steps=2",
            "--training.tokens_per_batch=128",
            "--training.precision=fp32",
            "--training.extra={disable_tqdm: true, report_to: []}",
        ]

    def __call__(self, name: str, processes: int, *, kill_at: int = 0, batch: int = 2) -> Rows:
        log = self.folder / f"log-{next(self.numbers)}"
        options = [f"--training.output_dir={self.folder / name}", f"--training.per_device_train_batch_size={batch}"]
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        workers = []
        for rank in range(processes):
            environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
            if processes > 1:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
            given = {
                "options": [*self.options, *options],
                "kill_at": kill_at,
                "log": str(log),
                "environment": environment,
            }
            kwargs = {"init_globals": given}
            workers.append(self.server.Process(target=runpy.run_path, args=(str(SCRIPT),), kwargs=kwargs))
        for worker in workers:
            worker.start()
        try:
            for worker in workers:
                worker.join(280)  # the first one waits for the server's imports
                assert worker.exitcode == (-signal.SIGKILL if kill_at else 0)
        finally:
            for worker in workers:
                worker.kill()
        logs = [[json.loads(line) for line in log.with_name(f"{log.name}.{rank}").open()] for rank in range(processes)]
        steps: dict[int, list] = {}
        for entries in zip(*logs, strict=True):  # one forward pass per process
            assert len({step for step, _ in entries}) == 1
            steps.setdefault(entries[0][0], []).extend(row for _, rows in entries for row in rows)
        return [[step, rows] for step, rows in sorted(steps.items())]


@pytest.fixture(scope="module", params=[False, True], ids=["stored", "streaming"])
def run(request: pytest.FixtureRequest, team, base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return Runner(team.server, base_dir, tmp_path_factory.mktemp("runs"), request.param)


@pytest.fixture(scope="module")
def whole(run: Runner) -> Rows:
    """An uninterrupted run of one process."""
    return run("whole", 1)


@pytest.fixture(scope="module")
def killed(run: Runner) -> Rows:
    """A run of one process, killed at the end of its fifth step."""
    return run("killed", 1, kill_at=5)


def _weights(run: Runner, name: str) -> dict:
    return load_file(run.folder / name / "model" / "model.safetensors")


def test_every_step_reads_other_sequences(whole: Rows) -> None:
    assert [step for step, _ in whole] == list(range(STEPS))
    assert len({json.dumps(row) for _, rows in whole for row in rows}) > 0.9 * 8 * STEPS


def test_a_killed_run_reads_on_with_the_sequence_that_comes_next(run: Runner, whole: Rows, killed: Rows) -> None:
    assert killed == whole[:5]
    assert not (run.folder / "killed" / "model").exists()
    shutil.copytree(run.folder / "killed", run.folder / "resumed")
    assert run("resumed", 1) == whole[4:]  # the checkpoint of step 4 is the last complete one
    a, b = _weights(run, "whole"), _weights(run, "resumed")
    assert all(a[name].equal(b[name]) for name in a)


def test_two_processes_read_and_resume_as_one_does(run: Runner, whole: Rows) -> None:
    assert run("two", 2, kill_at=5) == whole[:5]
    assert run("two", 2) == whole[4:]
    a, b = _weights(run, "whole"), _weights(run, "two")
    assert all((a[name] - b[name]).abs().max() < 1e-4 for name in a)


def test_the_number_of_processes_may_change_where_the_batch_stays(run: Runner, whole: Rows, killed: Rows) -> None:
    shutil.copytree(run.folder / "killed", run.folder / "moved")
    assert run("moved", 2, batch=4) == whole[4:]
