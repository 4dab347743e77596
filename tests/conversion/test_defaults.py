"""Promise: `moh.convert` uses the best measured settings for a language model, unless others are given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from moh import convert

HEADS = dict(shared_heads=1, active_heads=1)
BEST = dict(allocation="sensitivity", refit_output=True)
PLAIN = dict(allocation="even", refit_output=False)


def states_equal(a: Any, b: Any) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def heads_of(model: Any) -> Any:
    """Includes the estimated costs of the layers, which an uneven allocation stores in the configuration."""
    return model.config.active_heads, model.config.shared_heads, getattr(model.config, "head_costs", None)


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
@pytest.mark.parametrize(
    ("options", "default"),
    [
        ({}, BEST),
        (dict(allocation="even"), BEST | dict(allocation="even")),
        (dict(refit_output=False), BEST | dict(refit_output=False)),
        (dict(active_heads=[1, 2]), BEST | dict(allocation="even")),
        (dict(shared_heads=[1]), BEST | dict(allocation="even")),
        (dict(shares=[0.5]), BEST | dict(refit_output=False)),
        (dict(router="two_stage"), PLAIN),
        (dict(routing_unit="group_balanced", shared_heads=0, active_heads=2), BEST),
    ],
    ids=["nothing-said", "even", "no-refit", "heads-by-layer", "shared-by-index", "shares", "learned", "balanced"],
)
def test_a_language_model_gets_the_best_settings(make_dense, tokens, family, options, default) -> None:
    dense = make_dense(family, num_hidden_layers=2)
    options = dict(calibration=tokens, progress=False) | HEADS | options
    got, expected = convert(dense, **options), convert(dense, **default | options)
    assert heads_of(got) == heads_of(expected)
    assert states_equal(got, expected)


def test_the_best_settings_are_not_the_plain_ones(make_dense, tokens) -> None:
    options = dict(calibration=tokens, progress=False, shared_heads=1, active_heads=4)
    dense = make_dense(num_attention_heads=8, num_hidden_layers=3)
    best, plain = convert(dense, **options), convert(dense, **options, **PLAIN)
    assert not states_equal(best, plain)
    assert best.config.head_costs is not None and plain.config.head_costs is None
    used = [c.num_shared + c.active_heads for c in best.config.layer_configs()]
    assert sum(used) == 15 and len(set(used)) > 1


def test_what_is_unique_counts_in_language_models_with_an_uneven_share_alone(make_dense, tokens) -> None:
    dense = make_dense("Qwen3")
    bare = transformers.Qwen3Model(dense.config).eval()
    for model, allocation, same in ((bare, "even", True), (dense, "even", True), (dense, "sensitivity", False)):
        options = dict(calibration=tokens, progress=False, allocation=allocation) | HEADS
        refitted, plain = (convert(model, **options, refit_output=refit).state_dict() for refit in (True, False))
        names = [name for name in plain if ".router." in name]
        assert names and all(torch.equal(refitted[name], plain[name]) for name in names) is same


def test_other_models_keep_their_weights(make_dense, tokens) -> None:
    bare = transformers.Qwen3Model(make_dense("Qwen3").config).eval()
    options = dict(calibration=tokens, progress=False) | HEADS
    assert states_equal(convert(bare, **options), convert(bare, **options, **PLAIN))
