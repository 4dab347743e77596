"""Teams of CPU processes over gloo, forked from a server that has imported what they need.

New processes would spend most of a test on imports. `test_restart.py` and `test_launch.py` test what torchrun and
`accelerate launch` add.
"""

from __future__ import annotations

import multiprocessing
import runpy
import signal
import socket
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch
import yaml

WORKERS = Path(__file__).with_name("workers.py")
ACCELERATE = Path(__file__).parents[2] / "recipes" / "accelerate"
DEEPSPEED_TOY = Path(__file__).with_name("deepspeed_toy.json")
IMPORTED = [  # one server for all tests of a process; it ignores what is not installed
    "moh.training.language.run",
    "moh.models.transformers.models",
    "moh.training.images.run",
    "moh.models.timm",
    "moh.training.diffusion.run",
    "tokenizers",
]


class Team:
    """Runs a function of workers.py on several processes at once; returns one result per process."""

    def __init__(self, folder: Path) -> None:
        self.server = multiprocessing.get_context("forkserver")
        self.server.set_forkserver_preload(IMPORTED)
        self.folders = (folder / str(number) for number in count())

    def __call__(
        self,
        job: str,
        size: int,
        *,
        accelerate: str | None = None,
        killed: bool = False,
        timeout: float = 280,
        environment: dict[str, str] | None = None,
        **arguments: Any,
    ) -> list[Any]:
        """`accelerate` names a configuration, passed as `accelerate launch` does; `killed` processes return nothing.

        `environment` is set last.
        """
        folder = next(self.folders)
        folder.mkdir(parents=True)
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        shared = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        shared |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
        if accelerate is not None:
            shared |= self.launch_environment(accelerate)
        shared |= environment or {}
        workers = []
        for rank in range(size):
            own = shared | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if size > 1 else {})
            given = {"job": job, "arguments": arguments, "folder": str(folder), "rank": rank, "size": size}
            kwargs = {"init_globals": given | {"environment": own}}
            workers.append(self.server.Process(target=runpy.run_path, args=(str(WORKERS),), kwargs=kwargs))
        for worker in workers:
            worker.start()
        try:
            for worker in workers:
                worker.join(timeout)
            assert [worker.exitcode for worker in workers] == [-signal.SIGKILL if killed else 0] * size
        finally:
            for worker in workers:
                worker.kill()
        return [] if killed else [torch.load(folder / f"{rank}.pt") for rank in range(size)]

    @classmethod
    def launch_environment(cls, name: str) -> dict[str, str]:
        """What `accelerate launch --config_file NAME` sets for FSDP or DeepSpeed."""
        settings = yaml.safe_load((ACCELERATE / name).read_text())
        if "deepspeed_config" not in settings:
            fsdp = {key.upper(): str(value) for key, value in settings["fsdp_config"].items()}
            return {"ACCELERATE_USE_FSDP": "true"} | fsdp
        from accelerate.utils.launch import prepare_deepspeed_cmd_env

        environment = cls.handed_on(name, prepare_deepspeed_cmd_env)
        given = {key: value for key, value in environment.items() if key.startswith("ACCELERATE_")}
        # The file's "auto" settings come from these. By default DeepSpeed shards no tensor below 100,000 numbers.
        return given | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(DEEPSPEED_TOY), "DS_ACCELERATOR": "cpu"}

    @staticmethod
    def handed_on(name: str, prepare: Callable[[Any], Any]) -> dict[str, str]:
        """The environment that `accelerate launch --config_file NAME` sets, by accelerate's own function `prepare`."""
        from accelerate.commands.launch import _validate_launch_command, launch_command_parser

        command = ["--config_file", str(ACCELERATE / name), "--main_process_port=0", "script.py"]
        arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
        arguments.deepspeed_fields_from_accelerate_config = ""
        prepared = prepare(arguments)
        environment: dict[str, str] = prepared[1] if isinstance(prepared, tuple) else prepared
        return environment
