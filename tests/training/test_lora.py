"""A LoRA on a converted model trains, routes as before, and merges into an ordinary MoH model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from moh import convert, set_active_heads
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


@pytest.mark.parametrize("first", ["moh", "peft"])
def test_the_default_target_modules_are_those_of_the_family(forks, first: str) -> None:
    """In a new process: PEFT and ours may be imported in either order."""
    script = f"""
import {first}, moh, peft
from moh.models.transformers import MoHGPT2Config, MoHGPT2LMHeadModel, MoHLlamaConfig, MoHLlamaForCausalLM
sizes = dict(num_hidden_layers=1, num_attention_heads=4, hidden_size=16, vocab_size=20, shared_heads=1, active_heads=2)
for config, kind, expected in (
    (MoHLlamaConfig(**sizes, intermediate_size=16), MoHLlamaForCausalLM, {{"q_proj", "v_proj"}}),
    (MoHGPT2Config(**sizes), MoHGPT2LMHeadModel, {{"c_attn"}}),
):
    for method in (peft.LoraConfig, peft.AdaLoraConfig, peft.LoKrConfig):
        more = dict(total_step=9) if method is peft.AdaLoraConfig else {{}}
        try:
            model = peft.get_peft_model(kind(config), method(task_type="CAUSAL_LM", **more))
        except (TypeError, ValueError) as error:  # (the latter in PEFT 0.19) can't change GPT-2's layers, ours or not
            assert kind is MoHGPT2LMHeadModel and method is not peft.LoraConfig, error
        else:
            assert set(model.peft_config["default"].target_modules) == expected
"""
    run = forks.run(script)
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.parametrize("router", ["query_norm", "linear"])
def test_prefix_tuning_of_grouped_queries_is_the_dense_models_with_all_heads(dense, router: str) -> None:
    assert dense.config.num_key_value_heads < dense.config.num_attention_heads
    ids, mask = torch.randint(3, 23, (2, 8)), torch.ones(2, 8, dtype=torch.long)
    calibration = None if router == "query_norm" else torch.randint(3, 23, (8, 16))
    options = dict(allocation="even", refit_output=False, calibration=calibration)
    moh_model = convert(dense, shared_heads=1, active_heads=3, router=router, **options)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    models = [peft.get_peft_model(model, config) for model in (dense, moh_model)]
    models[1].prompt_encoder.load_state_dict(models[0].prompt_encoder.state_dict())
    of_dense, of_moh = (model.train()(input_ids=ids, attention_mask=mask, labels=ids) for model in models)
    torch.testing.assert_close(of_moh.logits, of_dense.logits, rtol=1e-3, atol=1e-4)
    of_moh.loss.backward()
    assert (models[1].prompt_encoder.default.embedding.weight.grad.abs().sum(1) > 0).all()
    set_active_heads(moh_model, 1)  # the dial afterwards
    with torch.no_grad(), record_routing(models[1].eval()) as routing:
        models[1](input_ids=ids, attention_mask=mask)
        new = models[1].generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert routing.share() == pytest.approx(2 / 4) and new.shape == (2, 11)


def test_the_router_can_be_trained_with_adapters_merged_and_the_dial_turned(dense) -> None:
    ids = torch.randint(3, 23, (2, 8))
    converted = convert(
        dense, shared_heads=1, active_heads=2, router="two_stage", calibration=torch.randint(3, 23, (8, 16))
    )
    options = dict(modules_to_save=["router"], target_modules="all-linear")
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options)
    model = peft.get_peft_model(converted, config).train()
    model(input_ids=ids, labels=ids).loss.backward()
    of_router = [p.grad for name, p in model.named_parameters() if p.requires_grad and ".router." in name]
    assert of_router and all(grad.abs().sum() > 0 for grad in of_router)
    with torch.no_grad(), record_routing(model.eval()) as routing:
        adapted = model(input_ids=ids).logits
    assert len(routing) == 2 and routing.share() == pytest.approx(3 / 4)
    assert set_active_heads(model, 1) == pytest.approx(2 / 4)
    set_active_heads(model, 2)
    merged = model.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, adapted, rtol=1e-4, atol=1e-5)
    assert type(merged) is type(converted) and set_active_heads(merged, 1) == pytest.approx(2 / 4)
