"""accelerate reads the configurations in recipes/ and passes on their settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from accelerate import DistributedType
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

ACCELERATE = Path(__file__).parents[2] / "recipes" / "accelerate"
KINDS = {
    "ddp.yaml": DistributedType.MULTI_GPU,
    "deepspeed_zero3.yaml": DistributedType.DEEPSPEED,
    "fsdp2.yaml": DistributedType.FSDP,
    "fsdp2_multi_node.yaml": DistributedType.FSDP,
}


def test_every_configuration_is_looked_at() -> None:
    assert set(KINDS) == {path.name for path in ACCELERATE.glob("*.yaml")}


@pytest.mark.parametrize("name", KINDS)
def test_configurations_are_of_their_kind_and_for_machines_of_eight_gpus(name: str) -> None:
    config = load_config_from_file(str(ACCELERATE / name))
    assert config.distributed_type == KINDS[name]
    assert config.num_processes == 8 * config.num_machines
    assert config.mixed_precision == "no"  # comes from the recipe, which is saved as it was run


@pytest.mark.parametrize("name", [name for name in KINDS if name.startswith("fsdp2")])
def test_fsdp_is_version_2_with_sharded_checkpoints_and_activation_checkpointing(name: str) -> None:
    config = load_config_from_file(str(ACCELERATE / name)).fsdp_config
    assert config["fsdp_version"] == 2
    assert config["fsdp_state_dict_type"] == "SHARDED_STATE_DICT"
    assert config["fsdp_activation_checkpointing"] is True


def test_fsdp_receives_the_configuration(team: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in team.handed_on("fsdp2.yaml", prepare_multi_gpu_env).items():
        monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.activation_checkpointing and plugin.reshard_after_forward


def test_deepspeed_receives_the_configuration(team: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in team.handed_on("deepspeed_zero3.yaml", prepare_deepspeed_cmd_env).items():
        monkeypatch.setenv(key, value)
    config = DeepSpeedPlugin().deepspeed_config
    assert config["zero_optimization"]["stage"] == 3
    assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
    assert config["gradient_accumulation_steps"] == config["gradient_clipping"] == "auto"  # the Trainer fills them in
