"""The families' classes give what the classes of their own that Llama and ViT had gave, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the llm extra is not installed")

import moh.models.llama
import moh.models.transformers
import moh.models.transformers_vit

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
TEXT = dict(vocab_size=64, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=None)
IMAGE = dict(image_size=16, patch_size=4, num_labels=5)
HEADS = {
    "linear": dict(router="linear", shared_heads=[[1], [0, 3]], active_heads=[2, 1]),
    "two_stage": dict(router="two_stage", shared_heads=1, active_heads=2),
    "query_norm": dict(router="query_norm", shared_heads=1, active_heads=1),
    "group_balanced": dict(router="linear", routing_unit="group_balanced", shared_heads=0, active_heads=2),
}
# family -> what its own configuration has, and what the Llama had to imitate it
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Llama": ({}, {}),
    "Llama-biases-own-width": (dict(attention_bias=True, head_dim=6),) * 2,
    "Mistral": (dict(sliding_window=5), dict(sliding_window=5)),
    "Mistral-no-window": (dict(sliding_window=None), {}),
    "Qwen2": ({}, dict(attention_bias=True, attention_out_bias=False)),
    "Qwen2-window": (
        dict(use_sliding_window=True, sliding_window=5, max_window_layers=0),
        dict(attention_bias=True, attention_out_bias=False, sliding_window=5),
    ),
}


def stir(model: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 or "bias" in name:
                parameter.copy_((0.5 if "router" in name else 0.2) * torch.randn(parameter.shape, generator=generator))


def text_models(family: str, **options: Any) -> tuple[Any, Any]:
    name = family.partition("-")[0]
    own, imitating = FAMILIES[family]
    new_config = getattr(moh.models.transformers, f"MoH{name}Config")(**SIZES, **TEXT, **own, **options)
    rope = dict(rope_parameters=new_config.rope_parameters, rms_norm_eps=new_config.rms_norm_eps)
    old_config = moh.models.llama.MoHLlamaConfig(**SIZES, **TEXT, **imitating, **rope, **options)
    old = moh.models.llama.MoHLlamaForCausalLM(old_config).eval()
    new = getattr(moh.models.transformers, f"MoH{name}ForCausalLM")(new_config).eval()
    stir(old)
    new.load_state_dict(old.state_dict())
    return old, new


def image_models(**options: Any) -> tuple[Any, Any]:
    found = []
    for package in (moh.models.transformers_vit, moh.models.transformers):
        config = package.MoHViTConfig(**SIZES, **IMAGE, **options)
        found.append(package.MoHViTForImageClassification(config).eval())
    stir(found[0])
    found[1].load_state_dict(found[0].state_dict())
    return found[0], found[1]


def assert_equal_steps(old: Any, new: Any, **inputs: Any) -> None:
    outputs = [model(**inputs) for model in (old, new)]
    for name in ("loss", "aux_loss", "logits"):
        assert torch.equal(*(getattr(output, name) for output in outputs)), name
    for model, output in zip((old, new), outputs, strict=True):
        model.zero_grad()
        output.loss.backward()
    gradients = [{n: p.grad for n, p in model.named_parameters()} for model in (old, new)]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        other = gradients[1][name]
        assert (gradient is None and other is None) or torch.equal(gradient, other), name


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_language_models(family: str, heads: str, implementation: str) -> None:
    old, new = text_models(family, **HEADS[heads], router_aux_loss_coef=0.3, attn_implementation=implementation)
    ids = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    labels = ids.masked_fill(mask == 0, -100)
    assert_equal_steps(old, new, input_ids=ids, labels=ids)
    assert_equal_steps(old, new, input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=40)
    for training in (old, new):
        training.train()
        training.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_equal_steps(old, new, input_ids=ids, attention_mask=mask, labels=labels)
    for model in (old, new):
        model.eval()
    for options in ({}, {"cache_implementation": "static", "disable_compile": True}, {"num_beams": 2}):
        kept = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_logits=True)
        got = [m.generate(ids, attention_mask=mask, **kept, **options) for m in (old, new)]
        assert torch.equal(got[0].sequences, got[1].sequences)
        assert all(torch.equal(a, b) for a, b in zip(got[0].logits, got[1].logits, strict=True))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("heads", [name for name in HEADS if name != "group_balanced"])
def test_image_models(heads: str, implementation: str) -> None:
    old, new = image_models(**HEADS[heads], router_aux_loss_coef=0.3, attn_implementation=implementation)
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 3, 4])
    assert_equal_steps(old, new, pixel_values=images, labels=labels)
    old.train(), new.train()
    assert_equal_steps(old, new, pixel_values=images, labels=labels, num_items_in_batch=5)
