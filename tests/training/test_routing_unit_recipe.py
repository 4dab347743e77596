"""Promises of recipes with groups of heads: their settings reach the trained model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("transformers", reason="the llm extra is not installed")

from moh.training.language.model import new_config
from moh.training.language.recipe import ConversionRecipe, FromScratchRecipe, HeadsRecipe

SIZES = dict(num_hidden_layers=2, hidden_size=48, intermediate_size=64, num_attention_heads=6, num_key_value_heads=3)
TOKENIZER = SimpleNamespace(bos_token_id=None, eos_token_id=0, pad_token_id=0)


def recipe_of(unit: str, active: int) -> FromScratchRecipe:
    return FromScratchRecipe(**SIZES, vocab_size=32, moh=HeadsRecipe(0, active, routing_unit=unit))


@pytest.mark.parametrize("unit, active", [("head", 4), ("group_balanced", 3), ("kv_group", 2)])
def test_a_new_model_has_the_unit_of_its_recipe(unit, active):
    config = new_config(recipe_of(unit, active), TOKENIZER)
    assert {(c.routing_unit, c.active_heads) for c in config.layer_configs()} == {(unit, active)}


def test_heads_that_the_unit_does_not_allow_are_refused():
    with pytest.raises(ValueError, match="layer 0: active_heads must be a multiple of kv_heads = 3"):
        new_config(recipe_of("group_balanced", 4), TOKENIZER)


def test_recipes_choose_single_heads_unless_they_say_otherwise():
    assert HeadsRecipe(1, 1).routing_unit == ConversionRecipe(share=0.5).routing_unit == "head"
