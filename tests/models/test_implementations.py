"""Promises of `attn_implementation`: ours is the default, and any other of transformers gives the same numbers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
)
from transformers.generation.continuous_batching import RequestStatus

KINDS = [
    pytest.param(dict(router="linear"), id="linear"),
    pytest.param(dict(router="two_stage"), id="two_stage"),
    pytest.param(dict(router="query_norm"), id="query_norm"),
    pytest.param(dict(family="Mistral", sliding_window=4), id="sliding-window"),
    pytest.param(dict(family="Qwen3", router="linear", head_dim=8), id="qwen3"),
]
every_kind = pytest.mark.parametrize("kind", KINDS)


def assert_close(got, expected) -> None:
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def test_ours_is_the_default_and_another_is_chosen_as_everywhere(tiny_model, tiny_config, tokens, tmp_path):
    model = tiny_model()
    assert model.config._attn_implementation == "moh"
    model.save_pretrained(tmp_path)
    expected = model(tokens).logits
    for name in (None, "moh", "moh_sdpa", "eager", "sdpa"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
        assert loaded.config._attn_implementation == (name or "moh")
        assert_close(loaded(tokens).logits, expected)
    assert AutoModelForCausalLM.from_config(tiny_config()).config._attn_implementation == "moh"


@every_kind
@torch.no_grad()
def test_flex_attention_of_transformers_gives_the_same(tiny_model, tokens, kind):
    model = tiny_model(**kind | (dict(head_dim=16) if "head_dim" not in kind else {}))
    expected = model(tokens).logits
    model.set_attn_implementation("flex_attention")
    assert_close(model(tokens).logits, expected)


@every_kind
@torch.no_grad()
def test_an_engines_own_attention_gets_all_heads_and_may_return_them_flat(tiny_model, tokens, monkeypatch, kind):
    called = []

    def engine(module, query, key, value, attention_mask, scaling=None, engine_state=None, **kwargs):
        called.append(module.layer_idx)
        assert engine_state == "state"
        out = AttentionInterface()["sdpa"](module, query, key, value, attention_mask, scaling=scaling)[0]
        return out.reshape(-1, out.shape[-2] * out.shape[-1]), None

    monkeypatch.setitem(AttentionInterface._global_mapping, "engine", engine)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "engine", AttentionMaskInterface()["sdpa"])
    model = tiny_model(**kind)
    expected = model(tokens[:1]).logits
    model.set_attn_implementation("engine")
    assert_close(model(tokens[:1], engine_state="state").logits, expected)
    assert called == [0, 1]


@every_kind
@pytest.mark.parametrize("implementation", ["moh", "moh_sdpa", "sdpa", "eager", "paged|eager"])
def test_continuous_batching_gives_the_tokens_of_generate(tiny_model, tokens, kind, implementation):
    model = tiny_model(**kind)
    prompts = [tokens[0, :5].tolist(), tokens[1, :9].tolist(), tokens[0, 3:10].tolist()]
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    expected = [model.generate(torch.tensor([p]), **options)[0, len(p) :].tolist() for p in prompts]
    model.set_attn_implementation(implementation)
    small = ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=64)  # else most of the memory becomes the cache
    got = model.generate_batch(prompts, GenerationConfig(**options), small, warmup=False)
    assert [result.generated_tokens for result in got.values()] == expected
    assert model.config._attn_implementation == implementation
    if implementation != "paged|eager":
        assert model.generate(torch.tensor([prompts[0]]), **options)[0, 5:].tolist() == expected[0]


@pytest.mark.parametrize("implementation", ["moh", "sdpa"])
def test_a_request_longer_than_the_cache_fails_with_a_reason_and_leaves_the_model_usable(tiny_model, implementation):
    model = tiny_model(max_position_embeddings=1024, attn_implementation=implementation)
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    expected = model.generate(torch.tensor([[4] * 6]), **options)[0, 6:].tolist()
    small = ContinuousBatchingConfig(num_blocks=2, max_batch_tokens=64)
    long, short = model.generate_batch([[3] * 700, [4] * 6], GenerationConfig(**options), small, warmup=False).values()
    assert long.status == RequestStatus.FAILED and "can be scheduled" in long.error and not long.generated_tokens
    assert short.generated_tokens == expected  # it was done before
    assert model.config._attn_implementation == implementation
    (again,) = model.generate_batch([[4] * 6], GenerationConfig(**options), small, warmup=False).values()
    assert again.generated_tokens == expected


@pytest.mark.parametrize("implementation", ["moh", "sdpa"])
def test_a_cancelled_request_ends_and_the_others_get_their_tokens(tiny_model, tokens, implementation):
    model = tiny_model(max_position_embeddings=1024, attn_implementation=implementation)
    options = dict(do_sample=False, eos_token_id=-1, pad_token_id=0)
    prompt = tokens[0, :6].tolist()
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=8, **options)[0, 6:].tolist()
    small = ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=64)
    with model.continuous_batching_context_manager(
        GenerationConfig(**options), continuous_batching_config=small, warmup=False
    ) as manager:
        cancelled = manager.add_request([3] * 5, max_new_tokens=900)
        manager.add_request(prompt, request_id="kept", max_new_tokens=8)
        manager.cancel_request(cancelled)
        kept = manager.get_result(timeout=60)
        assert kept.request_id == "kept" and kept.generated_tokens == expected
        assert manager.get_result(timeout=0.5) is None  # nothing of the cancelled one
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_beams_and_assisted_decoding_are_those_of_ours(tiny_model, tokens, implementation):
    model, assistant = tiny_model(router="linear"), tiny_model(router="linear", num_hidden_layers=1)
    prompt = dict(input_ids=tokens[:1, :6], attention_mask=torch.ones(1, 6, dtype=torch.long))

    def run() -> list[list[int]]:
        options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None)
        calls = (dict(num_beams=3), dict(assistant_model=assistant), dict(cache_implementation="static"))
        return [model.generate(**prompt, **options, **call)[0].tolist() for call in calls]

    expected = run()
    model.set_attn_implementation(implementation)
    assert run() == expected


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_a_compiled_model_is_one_graph(tiny_model, tokens, implementation):
    torch.compiler.reset()
    model = tiny_model(router="linear", num_hidden_layers=1)
    expected = model(tokens).logits
    model.set_attn_implementation(implementation)
    compiled = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    assert_close(compiled(input_ids=tokens, use_cache=False).logits, expected)


@torch.no_grad()
def test_several_threads_may_call_one_model(tiny_model, tokens):
    model = tiny_model(attn_implementation="eager")
    batches = [tokens.roll(i, dims=1)[: 1 + i % 2] for i in range(16)]
    expected = [model(batch).logits for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda batch: model(batch).logits, batches))
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("implementation", ["moh", "eager", "sdpa"])
def test_gradient_checkpointing_and_dropout_of_attention_weights(tiny_model, tokens, implementation):
    model = tiny_model(router="linear", attn_implementation=implementation, attention_dropout=0.2).train()

    def gradients() -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model(tokens, labels=tokens).loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(gradients(), expected)


@torch.no_grad()
def test_a_layer_without_a_router_may_be_given_our_name(tokens):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    expected = model(tokens).logits
    model.set_attn_implementation("moh")
    assert torch.equal(model(tokens).logits, expected)
