"""Promises of every family under every way that transformers generates and trains: with all heads the dense model's numbers,
with chosen heads our implementation's are those of `eager`."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="the llm extra is not installed")

from transformers import ContinuousBatchingConfig, GenerationConfig

from moh import convert

sys.path.insert(0, str(Path(__file__).parent))  # lets the tests import the helpers of this folder

from family_cases import (
    ALL,
    DECODERS,
    ENCODERS,
    IMAGES,
    NO_DROPOUT,
    dense_model,
    images,
    inputs_of,
    left_padded,
    token_ids,
    with_labels,
)

IMPLEMENTATIONS = ("moh", "sdpa", "eager")
HEADS = {"all-heads": dict(shared_heads=1, active_heads=3), "chosen-heads": dict(shared_heads=1, active_heads=1)}
WAYS: dict[str, dict[str, Any]] = {
    "left-padding": {},
    "static-cache": dict(cache_implementation="static", disable_compile=True),
    "beams": dict(num_beams=3),
    "prompt-lookup": dict(prompt_lookup_num_tokens=3),
    "draft-model": dict(assistant_model="draft"),
}
"""Name -> options of `generate`; the caches of models with a window slide."""

every_decoder = pytest.mark.parametrize("model_type", DECODERS)
every_choice = pytest.mark.parametrize("heads", HEADS)


@functools.cache
def pair(model_type: str, heads: str) -> tuple[Any, Any]:
    """The dense model and the MoH model made of it; a test leaves them with any implementation."""
    dense = dense_model(model_type, **NO_DROPOUT.get(model_type, {}))
    calibration = images() if model_type in IMAGES else token_ids()
    return dense, convert(dense, router="linear", calibration=calibration, progress=False, **HEADS[heads])


def assert_same(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def references(model_type: str, heads: str) -> tuple[Any, Any]:
    """The MoH model, and what it is compared with: the dense model, or with chosen heads itself with `eager`."""
    dense, model = pair(model_type, heads)
    if heads == "all-heads":
        return model, dense
    model.set_attn_implementation("eager")
    return model, model


def written(model: Any, way: str, draft: Any) -> tuple[list[Any], Tensor]:
    options = dict(WAYS[way], max_new_tokens=6, do_sample=False, pad_token_id=0, return_dict_in_generate=True)
    inputs = left_padded(token_ids(2, 11))
    if way in ("prompt-lookup", "draft-model"):  # one sequence only; its text repeats itself
        inputs = dict(input_ids=token_ids(1, 4).repeat(1, 3), attention_mask=torch.ones(1, 12, dtype=torch.long))
    if way == "draft-model":
        options["assistant_model"] = draft
    result = model.generate(**inputs, **options, output_logits=True)
    return result.sequences.tolist(), torch.stack(result.logits)


@every_decoder
@every_choice
@pytest.mark.parametrize("way", WAYS)
def test_text_and_logits_are_the_same_however_they_are_generated(model_type, heads, way) -> None:
    model, reference = references(model_type, heads)
    draft = pair(model_type, "chosen-heads" if heads == "all-heads" else "all-heads")[heads == "all-heads"]
    text, logits = written(reference, way, draft)
    for implementation in IMPLEMENTATIONS:
        model.set_attn_implementation(implementation)
        got = written(model, way, draft)
        assert got[0] == text, implementation
        assert_same(got[1], logits)


@pytest.mark.parametrize("model_type", [*DECODERS, *ENCODERS])
@every_choice
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_on_either_side_changes_no_real_token(model_type, heads, side) -> None:
    model, reference = references(model_type, heads)
    ids = token_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[0, slice(None, 4) if side == "left" else slice(-4, None)] = 0
    inputs = dict(input_ids=torch.where(mask.bool(), ids, 0), attention_mask=mask)
    expected = reference(**inputs).logits[mask.bool()]
    for implementation in IMPLEMENTATIONS:
        model.set_attn_implementation(implementation)
        assert_same(model(**inputs).logits[mask.bool()], expected)


HYBRID = [name for name in DECODERS if name == "lfm3"]
"""Some layers are convolutions, which transformers' continuous batching doesn't take."""


@pytest.mark.parametrize("model_type", HYBRID)
def test_continuous_batching_refuses_what_it_refuses_in_the_dense_model(model_type) -> None:
    dense, model = pair(model_type, "chosen-heads")
    model.set_attn_implementation("moh")
    for refused in (dense, model):
        implementation = refused.config._attn_implementation
        with pytest.raises(ValueError, match="Invalid layer type: conv"):
            refused.generate_batch([[3, 4, 5]], GenerationConfig(max_new_tokens=2, pad_token_id=0), warmup=False)
        assert refused.config._attn_implementation == implementation


@pytest.mark.parametrize("model_type", [name for name in DECODERS if name not in HYBRID])
def test_continuous_batching_gives_the_tokens_of_generate(model_type) -> None:
    """More implementations and routers: tests/models/test_implementations.py."""
    model, reference = references(model_type, "chosen-heads")
    prompts = [row[:length].tolist() for row, length in zip(token_ids(2, 9), (5, 9), strict=True)]
    options = dict(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    expected = [reference.generate(torch.tensor([p]), **options)[0, len(p) :].tolist() for p in prompts]
    small = ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=64)  # else most of the memory becomes the cache
    model.set_attn_implementation("moh")  # which takes paged|sdpa
    got = model.generate_batch(prompts, GenerationConfig(**options), small, warmup=False).values()
    if errors := [result.error for result in got if result.error]:
        dense = pair(model_type, "chosen-heads")[0]
        of_dense = dense.generate_batch(prompts, GenerationConfig(**options), small, warmup=False).values()
        assert errors == [result.error for result in of_dense]
        pytest.skip(f"the dense model fails too: {errors[0]}")  # GPT-NeoX and OPT with transformers 5.24
    assert [result.generated_tokens for result in got] == expected


@pytest.mark.parametrize("model_type", ALL)
@every_choice
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["not-reentrant", "reentrant"])
def test_gradient_checkpointing_gives_the_same_gradients(model_type, heads, use_reentrant) -> None:
    model, reference = references(model_type, heads)
    inputs = with_labels(inputs_of(model_type, padded=True))
    if model_type in DECODERS:  # what padding predicts is nobody's business
        inputs["labels"][:, 1:][inputs["attention_mask"][:, :-1] == 0] = -100

    def gradients(of: Any) -> dict[str, Tensor]:
        of.train()(**inputs).loss.backward()
        found = {n: p.grad.clone() for n, p in of.named_parameters() if p.grad is not None and ".router." not in n}
        of.zero_grad()
        return found

    expected = gradients(reference)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    try:
        for implementation in IMPLEMENTATIONS:
            model.set_attn_implementation(implementation)
            got = gradients(model)
            assert got.keys() == expected.keys()
            for name, gradient in expected.items():
                atol = 1e-5 + 1e-5 * float(gradient.abs().max())
                torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=atol, msg=f"{name}, {implementation}")
    finally:
        model.gradient_checkpointing_disable()
        model.eval()
        reference.eval()


@pytest.mark.parametrize("model_type", ["llama", "bert"])
@pytest.mark.parametrize("name, package", [("flash_attention_2", "flash_attn"), ("flash_attention_3", "flash_attn")])
def test_an_implementation_whose_package_is_missing_is_refused_by_name(model_type, name, package) -> None:
    import importlib.util

    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    _, model = pair(model_type, "chosen-heads")
    model.set_attn_implementation("moh")
    with pytest.raises(ImportError, match=r"(?i)flash.?att"):
        model.set_attn_implementation(name)
    assert model.config._attn_implementation == "moh"
