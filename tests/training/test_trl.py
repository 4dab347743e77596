"""Promises to users of TRL: its trainers train and report the load-balance loss as that of any MoE model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="the test extra is not installed")

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from moh.models.transformers import MoHLlamaConfig, MoHLlamaForCausalLM

WORDS = [f"w{i}" for i in range(60)]


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
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    heads = dict(router=router, shared_heads=1, active_heads=2, router_aux_loss_coef=coefficient)
    made = MoHLlamaForCausalLM(MoHLlamaConfig(**sizes, **heads, pad_token_id=0, bos_token_id=1, eos_token_id=2))
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


@pytest.mark.parametrize("loss", [dict(loss_type="nll"), dict(loss_type="dft"), dict(label_smoothing_factor=0.1)])
@pytest.mark.parametrize("router", ["two_stage", "linear"])
def test_sft_trains_and_reports_the_balance_loss(tokenizer, tmp_path, loss, router) -> None:
    logs, grads = [], []
    for coefficient in (0.0, 1.0):
        data = Dataset.from_dict({"text": sentences(4, 0)})
        trainer = SFTTrainer(
            model(coefficient, router), args=SFTConfig(**options(tmp_path, **loss)), train_dataset=data,
            processing_class=tokenizer,
        )  # fmt: skip
        log, grad = one_step(trainer)
        logs.append(log)
        grads.append(grad)
    if "loss_type" in loss:  # with label smoothing TRL reports the cross-entropy alone, whatever the model
        assert logs[1]["loss"] == pytest.approx(logs[0]["loss"] + logs[1]["aux_loss"], abs=2e-3)
        assert 1.9 < logs[1]["aux_loss"] < 3
    difference = [(grads[1][name] - grads[0].get(name, 0)).norm() for name in grads[1]]
    assert max(difference) > 1e-3


def test_dpo_trains_and_reports_the_balance_loss(tokenizer, tmp_path) -> None:
    data = {"prompt": sentences(4, 0), "chosen": sentences(4, 1), "rejected": sentences(4, 2)}
    logs, grads = [], []
    for coefficient in (0.0, 1.0):
        trainer = DPOTrainer(
            model(coefficient), model(0.0), args=DPOConfig(**options(tmp_path)), train_dataset=Dataset.from_dict(data),
            processing_class=tokenizer,
        )  # fmt: skip
        log, grad = one_step(trainer)
        logs.append(log)
        grads.append(grad)
    assert logs[1]["loss"] == pytest.approx(logs[0]["loss"] + logs[1]["aux_loss"], abs=2e-3)
    assert max((grads[1][name] - grads[0].get(name, 0)).norm() for name in grads[1]) > 1e-3
