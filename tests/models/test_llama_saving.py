"""Promises of saving: the Auto classes read back exactly what `save_pretrained` wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from moh.models.transformers.loading import load_causal_lm

KINDS = [
    pytest.param(dict(router="two_stage"), id="two_stage"),
    pytest.param(dict(router="query_norm"), id="query_norm"),
    pytest.param(dict(router="linear", shared_heads=[[1], [0, 3]], active_heads=[2, 1]), id="linear-uneven"),
    pytest.param(dict(tie_word_embeddings=True), id="tied-embeddings"),
    pytest.param(dict(family="Qwen2"), id="qwen2"),
    pytest.param(dict(family="Mistral", sliding_window=5), id="mistral"),
]


@pytest.mark.parametrize("max_shard_size", [pytest.param("5GB", id="one-file"), pytest.param("20KB", id="sharded")])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_saved_model_is_loaded_by_the_auto_classes(tiny_model, tokens, tmp_path, kind, max_shard_size):
    model = tiny_model(**kind)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (max_shard_size == "20KB")
    assert not list(tmp_path.glob("*.bin"))

    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(model.config)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is type(model.model)
    assert torch.equal(base(tokens).last_hidden_state, model.model(tokens).last_hidden_state)


def test_a_readme_says_which_package_the_model_needs_and_how_to_load_it(tiny_model, tokens, tmp_path):
    model = tiny_model("Qwen2")
    model.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    assert "`moh_qwen2`" in card.read_text() and 'pip install "mixture-of-heads[hf]"' in card.read_text()
    code = card.read_text().partition("```python\n")[2].partition("```")[0]
    found = {}
    exec(code.replace("PATH OR NAME", str(tmp_path)), found)
    assert torch.equal(found["model"](tokens).logits, model(tokens).logits)

    card.write_text("Our own words.")
    model.save_pretrained(tmp_path)
    assert card.read_text() == "Our own words."


def test_models_are_tagged_each_for_itself(tiny_model):
    tagged, other = tiny_model(), tiny_model()
    tagged.add_model_tags("mine")
    assert tagged.model_tags == ["mixture-of-heads", "mine"] and other.model_tags == ["mixture-of-heads"]


def test_tensor_names_are_those_of_llama_and_the_router(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2))
    routers = {f"model.layers.{i}.self_attn.router.{part}.weight" for i in range(2) for part in ("routed", "stage")}
    assert names == set(llama.state_dict()) | routers  # one head is shared, so there is no W_s


def test_loading_in_bfloat16_keeps_the_routers_working(tiny_model, tokens, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(tokens).logits.isfinite().all()


def test_config_names_the_model_type(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "moh_llama"
    assert saved["architectures"] == ["MoHLlamaForCausalLM"]
    assert (saved["router"], saved["shared_heads"], saved["active_heads"]) == ("two_stage", 1, 2)


def rewrite_config(directory: Path, **fields: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@torch.no_grad()
def test_a_llama_saved_by_an_early_version_still_loads(tiny_model, tokens, tmp_path):
    model = tiny_model(attention_bias=True)
    model.save_pretrained(tmp_path)
    rewrite_config(tmp_path, attention_out_bias=True, sliding_window=None)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert not {"attention_out_bias", "sliding_window"} & loaded.config.to_dict().keys()


@pytest.mark.parametrize(
    "family, was, message",
    [
        pytest.param(
            dict(family="Mistral", sliding_window=5),
            dict(attention_out_bias=False, sliding_window=5),
            "no longer has sliding_window = 5: .* convert the Mistral again, which gives a MoHMistralForCausalLM, or "
            "write model_type 'moh_mistral' and",
            id="mistral",
        ),
        pytest.param(
            dict(family="Qwen2"),
            dict(attention_bias=True, attention_out_bias=False, sliding_window=None),
            "no longer has attention_out_bias = False: .* convert the Qwen2 again, which gives a MoHQwen2ForCausalLM, "
            "or write model_type 'moh_qwen2' and",
            id="qwen2",
        ),
        pytest.param(
            dict(family="Qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=0),
            dict(attention_bias=True, attention_out_bias=False, sliding_window=5),
            "convert the Qwen2 again, which gives a MoHQwen2ForCausalLM$",
            id="qwen2-with-a-window",
        ),
    ],
)
@torch.no_grad()
def test_a_llama_that_imitated_another_family_is_refused_with_what_to_do(
    tiny_model, tokens, tmp_path, family, was, message
):
    model = tiny_model(**family)
    model.save_pretrained(tmp_path)
    now = json.loads((tmp_path / "config.json").read_text())
    rewrite_config(tmp_path, model_type="moh_llama", architectures=["MoHLlamaForCausalLM"], **was)
    for load in (AutoModelForCausalLM.from_pretrained, AutoConfig.from_pretrained, load_causal_lm):
        with pytest.raises(ValueError, match=message) as caught:
            load(tmp_path)
        assert type(caught.value) is ValueError
    if "or write" in message:
        rewrite_config(tmp_path, model_type=now["model_type"], architectures=now["architectures"])
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits, model(tokens).logits)


@torch.no_grad()
def test_resized_embeddings_keep_the_old_tokens(tiny_model, tokens, tmp_path):
    model = tiny_model()
    before = model(tokens).logits
    model.resize_token_embeddings(70, mean_resizing=False)
    after = model(tokens).logits
    assert after.shape == (2, 12, 70)
    assert torch.equal(after[..., :64], before)
    assert model(torch.full((1, 3), 69)).logits.isfinite().all()
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits, after)


LLAMA_2_CHAT = {"temperature": 0.9, "top_p": 0.6, "max_length": 4096, "pad_token_id": 0, "bos_token_id": 1}


def test_a_generation_config_that_can_not_be_saved_is_mended_when_the_model_is_loaded(tiny_model, tokens, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({**LLAMA_2_CHAT, "length_penalty": 2.0}))
    before = AutoModelForCausalLM.from_pretrained(tmp_path).generate(tokens, max_new_tokens=4)
    with pytest.warns(
        UserWarning, match=r"refuses to save length_penalty = 2.0, temperature = 0.9, top_p = 0.6: removed"
    ):
        loaded = load_causal_lm(tmp_path)
    assert torch.equal(loaded.generate(tokens, max_new_tokens=4), before)
    loaded.save_pretrained(tmp_path / "again")
    kept = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert (kept["max_length"], kept["pad_token_id"], kept["bos_token_id"]) == (4096, 0, 1)


def test_a_generation_config_that_samples_is_kept(tiny_model, tmp_path, recwarn):
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({**LLAMA_2_CHAT, "do_sample": True}))
    loaded = load_causal_lm(tmp_path).generation_config
    assert (loaded.temperature, loaded.top_p, loaded.do_sample) == (0.9, 0.6, True)
    assert not [warning for warning in recwarn if "generation_config" in str(warning.message)]


def test_a_card_of_ours_is_replaced_with_its_model_and_a_users_own_is_kept(tiny_model, tmp_path: Path) -> None:
    from moh._files import check_replaceable

    target = tmp_path / "model"
    tiny_model().save_pretrained(target)
    check_replaceable(target, name="out")
    (target / "README.md").write_text("My model card.")
    with pytest.raises(ValueError, match=r"holds other files, which are kept, such as README.md"):
        check_replaceable(target, name="out")
