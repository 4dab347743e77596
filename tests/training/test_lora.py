"""A LoRA on a converted model trains, routes as before, and merges into an ordinary MoH model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from moh import convert
from moh.data.text.blocks import TokenBlocks
from moh.routing import record_routing

peft = pytest.importorskip("peft", reason="peft is not installed")


@pytest.fixture(params=["query_norm", "two_stage"])
def converted(request: pytest.FixtureRequest, dense):
    calibration = None if request.param == "query_norm" else torch.randint(3, 23, (8, 16))
    return convert(dense, shared_heads=1, active_heads=2, router=request.param, calibration=calibration)


def test_a_lora_trains_merges_and_loads(converted, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ids = torch.randint(3, 23, (4, 16))
    before = {name: tensor.clone() for name, tensor in converted.state_dict().items()}
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(converted, config)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=8,
        learning_rate=0.02,
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=TokenBlocks(ids))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.05
    model.eval()

    with torch.no_grad(), record_routing(model) as routing:
        adapted = model(input_ids=ids).logits
    assert len(routing) == 2 and routing.share() == pytest.approx(3 / 4)  # it still computes 3 of 4 heads
    assert not torch.allclose(
        adapted, _logits(AutoModelForCausalLM.from_config(converted.config), before, ids), atol=1e-2
    )
    model.save_pretrained(tmp_path / "adapter")
    base = type(converted)(converted.config)
    base.load_state_dict(before)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, adapted)

    merged = model.merge_and_unload()
    assert type(merged) is type(converted)
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, adapted, rtol=1e-4, atol=1e-5)
        merged.save_pretrained(tmp_path / "merged")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        assert type(loaded) is type(converted) and loaded.state_dict().keys() == before.keys()
        torch.testing.assert_close(loaded(input_ids=ids).logits, adapted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def _logits(model, state, ids):
    model.load_state_dict(state)
    return model.eval()(input_ids=ids).logits
