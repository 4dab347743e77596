"""Heads split over processes: every slice has shared and routed heads, and loss and gradients are those of one process."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

import moh
from moh.models.transformers import (
    MoHGPT2Config,
    MoHGPT2LMHeadModel,
    MoHLlamaConfig,
    MoHLlamaForCausalLM,
    models,
    tensor_parallel,
)
from moh.models.transformers.families import FAMILIES
from moh.models.transformers.tensor_parallel import interleave_shared_heads

SMALL = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
GROUPED = {"num_attention_heads": 8, "num_key_value_heads": 4}
BALANCED = {"routing_unit": "group_balanced", "shared_heads": 4, "active_heads": 4}


def _model(**fields) -> MoHLlamaForCausalLM:
    model = MoHLlamaForCausalLM(MoHLlamaConfig(**SMALL, **fields)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize(
    ("fields", "ranks", "expected"),
    [
        pytest.param({"num_attention_heads": 8, "shared_heads": 4, "active_heads": 2}, 2, [2, 2], id="two_stage"),
        pytest.param(
            {"num_attention_heads": 8, "shared_heads": [[0, 1, 2], 4], "active_heads": [2, 3], "router": "linear"},
            4,
            None,
            id="linear_layers_differ",
        ),
        pytest.param({**GROUPED, "shared_heads": 4, "active_heads": 2}, 2, [2, 2], id="grouped"),
        pytest.param(
            {**GROUPED, "shared_heads": [[0, 5], [1, 3]], "active_heads": 2, "router": "query_norm"},
            2,
            [1, 1],
            id="grouped_query_norm",
        ),
        pytest.param({**GROUPED, **BALANCED, "attention_bias": True}, 4, [1, 1, 1, 1], id="group_balanced_with_biases"),
        pytest.param({**GROUPED, "shared_heads": 2, "active_heads": 2}, 2, [2, 0], id="too_few_groups_to_share_out"),
    ],
)
def test_reordered_heads_compute_the_same(fields, ranks: int, expected: list[int] | None) -> None:
    model, tokens = _model(**fields), torch.randint(30, (2, 9))
    before = copy.deepcopy(model)
    counts = interleave_shared_heads(model, ranks)
    torch.testing.assert_close(model(tokens).logits, before(tokens).logits, rtol=1e-4, atol=1e-5)
    for own, config, was in zip(counts, model.config.layer_configs(), before.config.layer_configs(), strict=True):
        assert sum(own) == config.num_shared == was.num_shared
        assert max(own) - min(own) <= 1 if expected is None else own == expected
    for layer, config in zip(model.model.layers, model.config.layer_configs(), strict=True):
        assert layer.self_attn.router.config.shared_indices == config.shared_indices
    again = MoHLlamaForCausalLM(model.config)
    again.load_state_dict(model.state_dict())  # as when loading a saved model
    assert again.eval()(tokens).logits.equal(model(tokens).logits)


def test_heads_of_a_family_with_another_attention_are_not_split() -> None:
    config = MoHGPT2Config(vocab_size=30, n_embd=16, n_layer=1, n_head=4, shared_heads=2, active_heads=1)
    with pytest.raises(ValueError, match=r"type among moh_llama, moh_mistral, .* to split its heads, got 'moh_gpt2'"):
        interleave_shared_heads(MoHGPT2LMHeadModel(config), 2)


def test_heads_that_can_not_be_divided_are_refused() -> None:
    with pytest.raises(ValueError, match="ranks must divide num_key_value_heads = 4, got 8"):
        interleave_shared_heads(_model(**GROUPED, shared_heads=4, active_heads=2), 8)


def _compare(team, size: int, fields, **tolerances) -> None:
    ((loss, balance, expected),) = team("tensor_parallel", 1, ways=1, **fields)
    results = team("tensor_parallel", size, ways=2, **fields)
    torch.testing.assert_close(torch.stack([own for own, _, _ in results]).mean(), loss)
    for _, own, gradients in results:
        torch.testing.assert_close(own, balance)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("family", "router"),
    [
        ("Llama", "two_stage"),
        ("Llama", "linear"),
        ("Llama", "query_norm"),
        ("Qwen2", "linear"),
        ("Starcoder2", "linear"),
    ],
)
def test_two_processes_that_split_the_heads_have_loss_and_gradients_of_one(team, family: str, router: str) -> None:
    _compare(team, 2, {"family": family, "router": router, "shared_heads": 4})


@pytest.mark.parametrize("router", ["query_norm", "query_norm_rounded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_router_of_queries_chooses_by_gathered_norms_what_it_chooses_by_the_queries(
    router: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, split = (moh.routing.build_router(moh.MoHConfig(16, 2, 6, router), 8) for _ in range(2))
    monkeypatch.setattr(tensor_parallel._Gathered, "apply", lambda x, group: x)  # one process has all heads
    mesh = SimpleNamespace(get_group=lambda: None, get_local_rank=lambda: 0, size=lambda: 1)
    tensor_parallel._GatesOfSlice(split, mesh)
    q = torch.randn(2, 50, 16, 8, dtype=dtype)
    expected, found = (r(q=q).gates for r in (whole, split))
    assert torch.equal(found, expected) and found.dtype == dtype


@pytest.mark.slow
def test_four_processes_split_heads_in_pairs_and_shard_over_the_pairs(team) -> None:
    _compare(team, 4, {"router": "two_stage", "shared_heads": 4})


PLANNED = {
    "llama": ("Llama", {"router": "two_stage", "shared_heads": 4}),
    "llama_uneven": ("Llama", {"router": "linear", "shared_heads": [[0, 1, 2], 4], "tie_word_embeddings": True}),
    "llama_query_norm": ("Llama", {"router": "query_norm", "shared_heads": 4}),
    "llama_balanced": ("Llama", {**BALANCED, "router": "linear"}),
    "qwen2": ("Qwen2", {"router": "linear", "shared_heads": 4}),
    "qwen3": ("Qwen3", {"router": "linear", "shared_heads": 4, "head_dim": 4}),
    "mistral": ("Mistral", {"router": "linear", "shared_heads": 4}),
    "gemma": ("Gemma", {"router": "linear", "shared_heads": 4, "head_dim": 4}),
    "gemma2": ("Gemma2", {"router": "linear", "shared_heads": 4, "head_dim": 4}),
    "gemma3": ("Gemma3", {"router": "linear", "shared_heads": 4, "head_dim": 4}),
    "phi": ("Phi", {"router": "linear", "shared_heads": 4}),
    "phi3": ("Phi3", {"router": "linear", "shared_heads": 4}),
    "olmo2": ("Olmo2", {"router": "linear", "shared_heads": 4}),
    "granite": ("Granite", {"router": "linear", "shared_heads": 4}),
    "cohere": ("Cohere", {"router": "linear", "shared_heads": 4, "bos_token_id": 1, "eos_token_id": 2}),
    "cohere2": ("Cohere2", {"router": "linear", "shared_heads": 4, "bos_token_id": 1, "eos_token_id": 2}),
    "starcoder2": ("Starcoder2", {"router": "linear", "shared_heads": 4}),
}
"""Name -> family and fields of models whose heads transformers splits by our configuration's plan."""

REFUSED = {
    "heads": (
        {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 18},
        "tp_size must divide num_attention_heads = 9, got 2",
    ),
    "groups": ({"num_key_value_heads": 1}, "tp_size must divide num_key_value_heads = 1, got 2"),
    "unit": ({"routing_unit": "kv_group", "active_heads": 2}, 'routing_unit must be "head" or "group_balanced"'),
}


def _saved(folder, family: str, fields) -> str:
    torch.manual_seed(0)
    heads = {"shared_heads": 4, "active_heads": 2, "router_aux_loss_coef": 0.5}
    options = {**SMALL, **GROUPED, **heads, "pad_token_id": 0, **fields}
    config = models.make_class(f"MoH{family}{'Text' if family == 'Gemma3' else ''}Config")(**options)
    model = models.make_class(f"MoH{family}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(("llama", "llama_query_norm", "qwen2", "qwen3", "gemma"), id="usual"),
        pytest.param(tuple(PLANNED), marks=pytest.mark.slow, id="all"),
    ],
)
def test_transformers_splits_models_by_their_plan_and_they_compute_the_same(team, tmp_path, names) -> None:
    paths = {name: _saved(tmp_path / name, *PLANNED[name]) for name in names}
    refused = {name: _saved(tmp_path / name, "Llama", fields) for name, (fields, _) in REFUSED.items()}
    (expected,) = team("planned", 1, paths=paths)
    for results in team("planned", 2, paths=paths | refused):
        for model, whole in expected.items():
            for name, tensor in whole.items():
                found = results[model][name]
                torch.testing.assert_close(
                    found, tensor, rtol=1e-3, atol=1e-5, msg=lambda s, n=(model, name): f"{n}: {s}"
                )
        for name, (_, message) in REFUSED.items():
            assert message in results[name]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_the_plan_has_a_part_for_routers_exactly_where_heads_are_split(family) -> None:
    config = models.make_class(family.moh_config)
    plan, queries = config.base_model_tp_plan, family.fused or family.queries
    if plan is None:
        return
    names = {name.rpartition(".")[2]: style for name, style in plan.items()}
    assert ("router" in names) is (names[queries] == "colwise")
    assert plan.items() >= config.__mro__[3].base_model_tp_plan.items()
