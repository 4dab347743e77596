"""Teams of processes on the CPU, over gloo; started from a server that has imported what they need."""

from __future__ import annotations

import multiprocessing
import runpy
import socket
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

WORKERS = Path(__file__).with_name("workers.py")
ACCELERATE = Path(__file__).parents[2] / "recipes" / "accelerate"


class Team:
    """Runs a function of workers.py on several processes at once; gives what each has returned."""

    def __init__(self, folder: Path) -> None:
        self.server = multiprocessing.get_context("forkserver")
        self.server.set_forkserver_preload(
            ["moh.training.run", "moh.models.llama.modeling", "jsonargparse", "tokenizers"]
        )
        self.folders = (folder / str(number) for number in count())

    def __call__(self, job: str, size: int, *, accelerate: str | None = None, timeout: float = 90, **arguments: Any):
        """`accelerate` names a configuration, handed on as `accelerate launch` does."""
        folder = next(self.folders)
        folder.mkdir(parents=True)
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        shared = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        shared |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
        if accelerate is not None:
            shared |= self.fsdp_environment(accelerate)
        workers = []
        for rank in range(size):
            environment = shared | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if size > 1 else {})
            given = {"job": job, "arguments": arguments, "folder": str(folder), "rank": rank, "size": size}
            kwargs = {"init_globals": given | {"environment": environment}}
            workers.append(self.server.Process(target=runpy.run_path, args=(str(WORKERS),), kwargs=kwargs))
        for worker in workers:
            worker.start()
        try:
            for worker in workers:
                worker.join(timeout)
            assert [worker.exitcode for worker in workers] == [0] * size
        finally:
            for worker in workers:
                worker.kill()
        return [torch.load(folder / f"{rank}.pt") for rank in range(size)]

    @staticmethod
    def fsdp_environment(name: str) -> dict[str, str]:
        """What `accelerate launch --config_file NAME` sets for FSDP."""
        settings = yaml.safe_load((ACCELERATE / name).read_text())["fsdp_config"]
        return {"ACCELERATE_USE_FSDP": "true"} | {key.upper(): str(value) for key, value in settings.items()}


@pytest.fixture(scope="session")
def team(tmp_path_factory: pytest.TempPathFactory) -> Team:
    return Team(tmp_path_factory.mktemp("team"))


@pytest.fixture
def options(base_dir: Path, text_file: Path, tmp_path: Path) -> list[str]:
    """A converted model with a balance loss, trained for four steps in `tmp_path / "out"`; twelve samples a step."""
    return [
        f"--model.path={base_dir}",
        f"--data.files=['{text_file}']",
        "--data.seq_len=16",
        "--conversion={shared_heads: 1, active_heads: 2, router: query_norm}",
        "--training.tokens_per_batch=192",
        "--training.max_steps=4",
        "--training.learning_rate=0.01",
        "--training.lr_scheduler_type=constant",
        "--training.warmup_steps=0",
        "--training.balance_loss_coef=0.5",
        "--training.balance_loss_scope=global",
        "--training.precision=fp32",
        "--training.extra={disable_tqdm: true, report_to: []}",
        f"--training.output_dir={tmp_path / 'out'}",
    ]
