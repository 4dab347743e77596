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


def attached_balance(kind: str, attached: bool):
    """Averaged gradients of a step of a bare loop, under DDP, on this process's part of a batch.

    The balance loss is attached by the model, or added by hand.
    """
    coefficient = 0.3
    options = {"shared_heads": 1, "active_heads": 1, "router_aux_loss_coef": coefficient if attached else 0.0}
    if kind == "timm":
        import timm

        sizes = {"depth": 2, "embed_dim": 32, "num_heads": 4, "num_classes": 4}
        net = timm.create_model("moh_vit_micro_patch4_28_50", **sizes, **options)
        inputs: tuple = (torch.randn(4, 3, 28, 28),)
    else:
        from moh.models.diffusers import MoHDiTTransformer2DModel

        sizes = {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8, "num_classes": 4}
        net = MoHDiTTransformer2DModel(**sizes, class_dropout_prob=0.0, **options)
        inputs = (torch.randn(4, 4, 8, 8), torch.arange(4) * 100, torch.arange(4))
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.5 if "router" in name else 0.2)
    model = nn.parallel.DistributedDataParallel(net.train())
    with moh.record_routing(net) as routing:
        output = model(*(part.chunk(size)[rank] for part in inputs))  # noqa: F821
    loss = (output if kind == "timm" else output.sample).square().mean()
    (loss if attached else loss + coefficient * routing.balance_loss()).backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def foreign_loss(average: bool, by_hand: bool):
    """The routers' gradients of one step of a Trainer with a loss of its own; four rows, each a batch, are accumulated.

    By hand each row's balance loss is weighted by its share of the labels.
    """
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from moh.models.transformers import MoHLlamaConfig, MoHLlamaForCausalLM

    coefficient = 0.3
    sizes = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = MoHLlamaConfig(**sizes, num_attention_heads=4, active_heads=2, shared_heads=1)
    model = MoHLlamaForCausalLM(config).train()
    rows = torch.randint(3, 30, (4, 12))
    labels = rows.clone()
    for row in range(4):
        labels[row, : 2 * row] = -100
    found: dict = {}

    def loss_of(outputs, labels, num_items_in_batch):
        flat = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return nn.functional.cross_entropy(*flat, reduction="sum") / num_items_in_batch

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            found.update({n: p.grad.clone() for n, p in model.named_parameters() if "router" in n})

    if by_hand:
        items = (labels[:, 1:] != -100).sum()
        for row, target in zip(rows.split(1), labels.split(1), strict=True):
            with moh.record_routing(model) as routing:
                loss = loss_of(model(row), target, items)
            (loss + coefficient * (target[:, 1:] != -100).sum() / items * routing.balance_loss()).backward()
        return {n: p.grad for n, p in model.named_parameters() if "router" in n}
    model.config.router_aux_loss_coef = coefficient
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=1, gradient_accumulation_steps=4 // size, max_steps=1, max_grad_norm=0.0,  # noqa: F821
        learning_rate=0.0, use_cpu=True, report_to=[], save_strategy="no", average_tokens_across_devices=average,
        disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": target} for row, target in zip(rows, labels, strict=True)]
    Trainer(model, arguments, train_dataset=data, compute_loss_func=loss_of, callbacks=[Keep()]).train()
    return found


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


def planned(paths: dict[str, str]):
    """Logits, greedy tokens, balance loss and gradients of saved models that transformers splits over all processes.

    For a model that is refused, the error's message instead.
    """
    from torch.distributed.tensor import DTensor
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    split = {"distributed_config": DistributedConfig(tp_plan="auto")} if size > 1 else {}  # noqa: F821
    tokens = torch.randint(3, 30, (2, 40), generator=torch.Generator().manual_seed(5))
    results = {}
    for name, path in paths.items():
        try:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **split)
        except ValueError as error:
            results[name] = str(error)
            continue
        found = {}
        for implementation in ("moh", "eager"):
            model.set_attn_implementation(implementation)
            with torch.no_grad():
                found[f"{implementation} logits"] = model(tokens).logits
                new = model.generate(tokens, max_new_tokens=6, do_sample=False, pad_token_id=0)
            found[f"{implementation} tokens"] = new
        output = model.train()(tokens, labels=tokens)
        output.loss.backward()
        found["balance loss"] = output.aux_loss.detach()
        for parameter_name, parameter in model.named_parameters():
            gradient = parameter.grad
            found[parameter_name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        parts = [isinstance(parameter, DTensor) for parameter in model.model.layers.parameters()]
        found["is split"] = any(parts) or size == 1  # noqa: F821
        results[name] = found
    return results


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
    if work not in (train, losses, refusal, foreign_loss) and size > 1:  # noqa: F821
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)  # noqa: F821
    result = work(**arguments)  # noqa: F821
    torch.save(result, f"{folder}/{rank}.pt")  # noqa: F821
    if dist.is_initialized():
        dist.destroy_process_group()
