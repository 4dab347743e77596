"""What the processes of a `Team` run, by `runpy`.

Gets `job`, the name of a function here, its `arguments`, `folder`, `rank`, `size` and `environment` as globals; saves
the result in `folder`.
"""

from __future__ import annotations

import gc
import os

os.environ.update(environment)  # noqa: F821 (given by runpy)

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

import moh

if "DS_ACCELERATOR" in environment:  # noqa: F821
    import deepspeed.ops

    # DeepSpeed would compile a collective for inference when it starts: half a minute, and unused here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

torch.set_num_threads(1)
gc.freeze()  # garbage collection skips what the server imported


class Net(nn.Module):
    """Two MoH layers with residual connections."""

    def __init__(self, router: str) -> None:
        super().__init__()
        heads = {"shared_heads": 1, "active_heads": 2, "router": router}
        self.layers = nn.ModuleList(moh.MoHAttention(16, 4, **heads) for _ in range(2))

    def forward(self, x, checkpointed: bool):
        for layer in self.layers:
            x = x + (checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x))
        return x


def balance(router: str, inside: bool, checkpointed: bool):
    """Loss and averaged gradients of a step on this process's part of a batch; parts differ in size."""
    net = Net(router)
    whole, mask = torch.randn(4, 6, 16), torch.rand(4, 6) > 0.3
    mask[0] = False  # one sequence is all padding
    mask[0, 0] = True
    x, own = whole.chunk(size)[rank], mask.chunk(size)[rank]  # noqa: F821
    model = nn.parallel.DistributedDataParallel(net) if size > 1 else net  # noqa: F821
    group = dist.group.WORLD if size > 1 else None  # noqa: F821
    with moh.record_routing(net) as routing:
        output = model(x, checkpointed)
    if inside:
        with moh.balance_over_processes():
            loss = routing.balance_loss(own)
    else:
        loss = routing.balance_loss(own, group=group)
    (loss + output.square().mean()).backward()
    return loss.detach(), {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def tensor_parallel(ways: int, family: str = "Llama", **fields):
    """Loss, balance loss and gradients of a model whose heads `ways` processes split, on this process's part of a batch.

    With more processes the model is also sharded over the groups of `ways`.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    import moh.models.transformers as models
    from moh.models.transformers.tensor_parallel import interleave_shared_heads, split_heads

    small = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "active_heads": 2, "router_aux_loss_coef": 0.5}
    config = getattr(models, f"MoH{family}Config")(**small, **heads, **fields)
    model = getattr(models, f"MoH{family}ForCausalLM")(config).train()
    interleave_shared_heads(model, 2)
    tokens = torch.randint(30, (4, 70))  # enough for the sparse projections to be chosen, if they were allowed
    group, number = None, 0
    if size > 1:  # noqa: F821
        mesh = dist.device_mesh.init_device_mesh("cpu", (size // ways, ways), mesh_dim_names=("data", "heads"))  # noqa: F821
        split_heads(model, mesh["heads"])
        if size > ways:  # noqa: F821
            for part in (*model.model.layers, model):
                fully_shard(part, mesh=mesh["data"])
        group, number = mesh.get_group("data"), mesh.get_local_rank("data")
        tokens = tokens.chunk(size // ways)[number]  # noqa: F821
    with moh.balance_over_processes(group):
        output = model(tokens, labels=tokens)
    output.loss.backward()
    if size > 1:  # noqa: F821
        assert model.model.layers[0].self_attn.q_proj.weight.to_local().shape[0] == 16 // size  # noqa: F821
    gradients = {name: p.grad for name, p in model.named_parameters()}
    whole = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in gradients.items()}
    return output.loss.detach(), output.aux_loss.detach(), whole


def train(options: list[str]):
    """The logged entries of a run."""
    from moh.training import load_recipe, train

    return train(load_recipe(None, options)).log_history


def losses(runs: list[list[str]], kill_at: int = 0):
    """The logged losses of each run in turn; with `kill_at` the process is killed at the end of that step."""
    import signal

    from transformers import TrainerCallback

    from moh.training import load_recipe, train

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    results = [train(load_recipe(None, options), callbacks=[Kill()]) for options in runs]
    return [[loss for _, loss in result.losses] for result in results]


def refusal(options: list[str]):
    """The message of a run that is refused."""
    from moh.training import load_recipe, train

    try:
        train(load_recipe(None, options))
    except ValueError as error:
        return str(error)


if __name__ == "<run_path>":
    torch.manual_seed(0)
    work = globals()[job]  # noqa: F821
    if work not in (train, losses, refusal) and size > 1:  # noqa: F821
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)  # noqa: F821
    result = work(**arguments)  # noqa: F821
    torch.save(result, f"{folder}/{rank}.pt")  # noqa: F821
    if dist.is_initialized():
        dist.destroy_process_group()
