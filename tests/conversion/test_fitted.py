"""Promise: what is fitted once makes the same models as `moh.convert`, each with its own calibration."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import moh
from moh.conversion.fitted import DROPPED, DROPPED_LINEAR, FIXED_HEADS, METHODS, MIXED, ROUTED, Fitted

SIZES = dict(num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
ARGUMENTS: dict[str, dict[str, Any]] = {
    ROUTED: {},
    MIXED: dict(layers="mix"),
    FIXED_HEADS: dict(router="fixed"),
    DROPPED_LINEAR: dict(layers="drop"),
    DROPPED: dict(layers="drop", refit_output=False),
}


@pytest.fixture
def fitted(make_dense, tokens: Tensor) -> Fitted:
    return Fitted(make_dense(**SIZES), tokens)


def test_every_method_has_its_arguments() -> None:
    assert set(ARGUMENTS) == set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_models_are_those_of_convert(fitted: Fitted, tokens: Tensor, method: str) -> None:
    fitted.make(MIXED, 9)  # whatever was made before doesn't matter
    made = fitted.make(method, fitted.total(0.75))
    other = moh.convert(fitted.adapter.model, share=0.75, calibration=tokens, progress=False, **ARGUMENTS[method])
    ours, theirs = made.model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6, msg=name)
    assert made.model.config.layer_configs() == other.config.layer_configs()
    assert (made.model.config.head_costs is None) == (other.config.head_costs is None)
    if other.config.head_costs is not None:
        torch.testing.assert_close(torch.tensor(made.model.config.head_costs), torch.tensor(other.config.head_costs))
    assert sum(made.used) == 12


@torch.no_grad()
def test_models_leave_the_dense_one_and_each_other_as_they_are(fitted: Fitted) -> None:
    ids = torch.randint(64, (2, 12))
    dense = fitted.adapter.model
    before = dense(ids).logits
    first = fitted.make(ROUTED, 12).model
    of_first = first(ids).logits
    fitted.make(ROUTED, 8)
    fitted.make(DROPPED, 8)
    assert torch.equal(dense(ids).logits, before) and torch.equal(first(ids).logits, of_first)
    assert first.get_input_embeddings().weight.data_ptr() == dense.get_input_embeddings().weight.data_ptr()


def test_the_cache_holds_what_kept_heads_read(fitted: Fitted) -> None:
    assert fitted.make(ROUTED, 8).cached == [2] * 4
    assert sorted(fitted.make(DROPPED, 8).cached) == [0, 0, 2, 2]


def test_a_method_that_is_unknown_is_refused(fitted: Fitted) -> None:
    with pytest.raises(ValueError, match=r"method must be one of 'routed \(default\)', .*, got 'routed'"):
        fitted.make("routed", 12)


def test_a_model_that_does_not_generate_is_refused(make_dense, tokens: Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be a language model that generates.* got a LlamaModel"):
        Fitted(make_dense().model, tokens)
