"""Promises to users of TRL: its trainers train and report the load-balance loss as that of any MoE model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="the test extra is not installed")

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import (
    DistillationConfig,
    DistillationTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

import moh
from moh.models.transformers import MoHLlamaConfig, MoHLlamaForCausalLM

WORDS = [f"w{i}" for i in range(60)]
SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
NAMES = ("input_ids", "attention_mask", "position_ids")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def model(coefficient: float, router: str = "two_stage") -> MoHLlamaForCausalLM:
    torch.manual_seed(0)
    heads = dict(router=router, shared_heads=1, active_heads=2, router_aux_loss_coef=coefficient)
    made = MoHLlamaForCausalLM(MoHLlamaConfig(**SIZES, **heads, **SPECIAL))
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "router" in name:
                p.normal_(std=0.5)
    return made


def sentences(count: int, seed: int) -> list[str]:
    ids = torch.randint(0, 60, (count, 12), generator=torch.Generator().manual_seed(seed))
    return [" ".join(WORDS[i] for i in row) for row in ids.tolist()]


def options(folder: Path, **more: Any) -> dict[str, Any]:
    fixed = dict(
        per_device_train_batch_size=4, max_steps=1, learning_rate=0.0, logging_steps=1, use_cpu=True, bf16=False
    )
    return dict(output_dir=str(folder), report_to=[], save_strategy="no", gradient_checkpointing=False, **fixed) | more


def one_step(trainer: Any) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """The logged numbers and the gradients of one step, whose learning rate is 0."""
    seen: dict[str, torch.Tensor] = {}
    original = trainer.training_step

    def noted(model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = original(model, *args, **kwargs)
        seen.update({n: p.grad.clone() for n, p in model.named_parameters() if "router" in n and p.grad is not None})
        return loss

    trainer.training_step = noted
    trainer.train()
    return next(entry for entry in trainer.state.log_history if "loss" in entry), seen


def by_hand(made: MoHLlamaForCausalLM, calls: list[dict[str, Any]]) -> torch.Tensor:
    """The balance loss of the last call, from the paper's definition: the mean over the layers of h_r * sum_i f_i P_i.

    TRL's losses average over the layers before they multiply, which differs by less than 2 % here.
    """
    given = {name: calls[-1][name] for name in NAMES if calls[-1].get(name) is not None}
    seen = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
    with moh.record_routing(made) as routing:
        made.model(**given, use_cache=False)
    losses = []
    for _, info in routing:
        probs = info.probs[seen]  # [T, h_r]
        chosen = torch.zeros_like(probs).scatter(1, probs.topk(2, 1).indices, 1.0)
        losses.append(3 * (chosen.mean(0) * probs.mean(0)).sum())
    return torch.stack(losses).mean()


def calls_of(made: MoHLlamaForCausalLM) -> list[dict[str, Any]]:
    """What the layers are called with while they are trained; filled by the calls."""
    calls: list[dict[str, Any]] = []

    def note(module: torch.nn.Module, args: Any, given: dict[str, Any]) -> None:
        if module.training and torch.is_grad_enabled():
            calls.append(given)

    made.model.register_forward_pre_hook(note, with_kwargs=True)
    return calls


@pytest.mark.parametrize("loss", [dict(loss_type="nll"), dict(loss_type="dft"), dict(label_smoothing_factor=0.1)])
@pytest.mark.parametrize("router", ["two_stage", "linear"])
def test_sft_trains_and_reports_the_balance_loss(tokenizer, tmp_path, loss, router) -> None:
    logs, grads = [], []
    for coefficient in (0.0, 1.0):
        data = Dataset.from_dict({"text": sentences(4, 0)})
        made = model(coefficient, router)
        calls = calls_of(made)
        trainer = SFTTrainer(
            made, args=SFTConfig(**options(tmp_path, **loss)), train_dataset=data,
            processing_class=tokenizer,
        )  # fmt: skip
        log, grad = one_step(trainer)
        logs.append(log)
        grads.append(grad)
    if "loss_type" in loss:  # with label smoothing TRL reports the cross-entropy alone, whatever the model
        assert logs[1]["loss"] == pytest.approx(logs[0]["loss"] + logs[1]["aux_loss"], abs=2e-3)
        assert logs[1]["aux_loss"] == pytest.approx(by_hand(made, calls).item(), rel=0.02)
    difference = [(grads[1][name] - grads[0].get(name, 0)).norm() for name in grads[1]]
    assert max(difference) > 1e-3


def test_dpo_trains_and_reports_the_balance_loss(tokenizer, tmp_path) -> None:
    data = {"prompt": sentences(4, 0), "chosen": sentences(4, 1), "rejected": sentences(4, 2)}
    logs, grads = [], []
    for coefficient in (0.0, 1.0):
        made = model(coefficient)
        calls = calls_of(made)
        trainer = DPOTrainer(
            made, model(0.0), args=DPOConfig(**options(tmp_path)), train_dataset=Dataset.from_dict(data),
            processing_class=tokenizer,
        )  # fmt: skip
        log, grad = one_step(trainer)
        logs.append(log)
        grads.append(grad)
    assert logs[1]["loss"] == pytest.approx(logs[0]["loss"] + logs[1]["aux_loss"], abs=2e-3)
    assert logs[1]["aux_loss"] == pytest.approx(by_hand(made, calls).item(), rel=0.02)
    assert max((grads[1][name] - grads[0].get(name, 0)).norm() for name in grads[1]) > 1e-3


def router_gradients(made: MoHLlamaForCausalLM, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {name: p for name, p in made.named_parameters() if "router" in name and p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text) % 7) for text in completions]


@pytest.mark.parametrize(("kind", "config"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
def test_rewards_train_and_report_the_balance_loss(tokenizer, tmp_path, kind, config) -> None:
    logs, grads, expected = [], [], []
    for coefficient in (0.0, 1.0):
        made = model(coefficient)
        calls = calls_of(made)
        trainer = kind(
            made, reward_funcs=reward, train_dataset=Dataset.from_dict({"prompt": sentences(4, 0)}),
            args=config(**options(tmp_path), num_generations=4, max_completion_length=4, beta=0.0),
            processing_class=tokenizer,
        )  # fmt: skip
        log, grad = one_step(trainer)
        logs.append(log)
        grads.append(grad)
        expected.append(by_hand(made, calls).item())
    assert logs[1]["aux_loss"] == pytest.approx(expected[1], rel=0.02)
    assert logs[1]["loss"] == pytest.approx(logs[0]["loss"] + expected[1], rel=0.02)
    assert max((grads[1][name] - grads[0].get(name, 0)).norm() for name in grads[1]) > 1e-3


def test_distillation_from_a_dense_teacher_has_the_gradient_of_the_balance_loss(tokenizer, tmp_path) -> None:
    grads = []
    for coefficient in (0.0, 1.0):
        made = model(coefficient)
        calls = calls_of(made)
        torch.manual_seed(1)
        trainer = DistillationTrainer(
            made, LlamaForCausalLM(LlamaConfig(**SIZES, **SPECIAL)), processing_class=tokenizer,
            args=DistillationConfig(**options(tmp_path), max_completion_length=4),
            train_dataset=Dataset.from_dict({"prompt": sentences(4, 0)}),
        )  # fmt: skip
        log, grad = one_step(trainer)
        assert "aux_loss" not in log
        grads.append(grad)
    expected = router_gradients(made, by_hand(made, calls))
    assert expected and max(g.norm() for g in expected.values()) > 1e-3
    for name, gradient in expected.items():
        torch.testing.assert_close(grads[1][name] - grads[0].get(name, 0), gradient, atol=1e-4, rtol=0.02)


def test_a_lora_of_trl_is_merged_dialled_saved_and_loaded(tokenizer, tmp_path) -> None:
    lora = pytest.importorskip("peft").LoraConfig(r=4, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model(0.0), args=SFTConfig(**options(tmp_path, learning_rate=0.05, max_steps=2)), peft_config=lora,
        train_dataset=Dataset.from_dict({"text": sentences(8, 0)}), processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        adapted = trainer.model.eval()(input_ids=ids).logits
        merged = trainer.model.merge_and_unload().eval()
        assert type(merged) is MoHLlamaForCausalLM
        torch.testing.assert_close(merged(input_ids=ids).logits, adapted, atol=1e-4, rtol=1e-3)
        assert not torch.allclose(adapted, model(0.0).eval()(input_ids=ids).logits, atol=1e-2)
        assert moh.set_active_heads(merged, 0.5) == 0.5
        expected = merged(input_ids=ids).logits
        merged.save_pretrained(tmp_path / "merged")
        loaded = MoHLlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
        assert loaded.config.active_heads == 1
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-4)
