"""Promise: heads are compared by pattern and output on the tokens that use both, in any family of transformers."""

from __future__ import annotations

import itertools

import pytest
import torch
from group_cases import classifier, images
from transformers import LlamaConfig, LlamaForCausalLM

from moh import convert
from moh.inspection import head_similarity, image_groups, token_groups
from moh.routing import record_routing

SIZES = dict(vocab_size=32, hidden_size=24, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0,
             num_key_value_heads=2, head_dim=8, bos_token_id=None, eos_token_id=None)  # fmt: skip
BLOCKS = torch.randint(1, 32, (3, 7), generator=torch.Generator().manual_seed(0))


def dense():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.5))


def routed():
    return convert(dense(), shared_heads=1, active_heads=2, calibration=BLOCKS, progress=False)


@pytest.mark.parametrize("make", [dense, routed])
def test_similarities_equal_those_pair_by_pair_and_token_by_token(make) -> None:
    model = make()
    found = head_similarity(model, token_groups(model, {"a": BLOCKS[:1], "b": BLOCKS[1:]}, batch_size=2))
    model.set_attn_implementation("eager")
    heads: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda module, given: heads.append(given[0].unflatten(-1, (4, 8)))
        )
    with torch.no_grad(), record_routing(model) as routing:
        patterns = model(BLOCKS, output_attentions=True).attentions
    active = [info.active for _, info in routing] or [torch.ones(3, 7, 4, dtype=torch.bool)] * 2
    for place in range(2):
        for i, j in itertools.combinations(range(4), 2):
            alike, cosine = [], []
            for b, n in itertools.product(range(3), range(7)):
                if active[place][b, n, i] and active[place][b, n, j]:
                    alike.append(1 - float((patterns[place][b, i, n] - patterns[place][b, j, n]).abs().sum()) / 2)
                    one, other = heads[place][b, n, i], heads[place][b, n, j]
                    cosine.append(float(one @ other / one.norm() / other.norm()))
            assert int(found.tokens[place][i, j]) == len(alike)
            if alike:
                assert float(found.patterns[place][i, j]) == pytest.approx(sum(alike) / len(alike), abs=1e-5)
                assert float(found.outputs[place][j, i]) == pytest.approx(sum(cosine) / len(cosine), abs=1e-5)
    assert any(not layer.all() for layer in active) is (make is routed)


def test_equal_heads_are_alike_and_the_model_stays_as_it_was() -> None:
    model = dense()
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                projection.weight.copy_(projection.weight[:8].repeat(len(projection.weight) // 8, 1))
    model.train()
    before = model.config._attn_implementation
    found = head_similarity(model, token_groups(model, {"a": BLOCKS}))
    assert model.training and model.config._attn_implementation == before
    assert all(row["patterns"] == pytest.approx(1, abs=1e-5) for row in found.means())
    assert all(row["outputs"] == pytest.approx(1, abs=1e-5) for row in found.means())
    assert not model.model.layers[0].self_attn._forward_hooks


def test_means_weigh_pairs_by_their_tokens(tmp_path) -> None:
    model = routed()
    found = head_similarity(model, token_groups(model, {"a": BLOCKS}))
    *layers, whole = found.means()
    for place, row in enumerate(layers):
        own = [r for r in found.rows() if r["layer"] == place]
        expected = sum(r["patterns"] * r["tokens"] for r in own) / sum(r["tokens"] for r in own)
        assert row["patterns"] == pytest.approx(expected)
    assert whole["layer"] == "all" and whole["outputs"] == pytest.approx(sum(r["outputs"] for r in layers) / 2)
    found.save_csv(tmp_path / "similarity.csv")
    assert (tmp_path / "similarity.csv").read_text().startswith("layer,head,other,patterns,outputs,tokens\n")


def test_a_model_that_gives_no_patterns_is_refused() -> None:
    model = classifier()
    with pytest.raises(ValueError, match=r"model must be of transformers, .* got "):
        head_similarity(model, image_groups(model, images([0, 1, 2])))
