"""Promise: `moh convert` converts every kind of model and keeps the class that it was saved as."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import moh as moh_package
from moh import set_active_heads
from moh.config import ROUTERS
from moh.training import Corpus

HEADS = ["--shared-heads", 1, "--active-heads", 1, "--calibration-tokens", 1024]
ALL_HEADS = ["--shared-heads", 4, "--active-heads", 0]
SIZES = dict(vocab_size=64, num_hidden_layers=2, num_attention_heads=4, hidden_size=32, max_position_embeddings=64)


def dense_dir(kind: str, base_dir: Path, folder: Path) -> Path:
    """A tiny random model of a transformers class, with the word tokenizer."""
    torch.manual_seed(0)
    model_class = getattr(transformers, kind)
    sizes = SIZES | ({} if "GPT2" in kind else dict(intermediate_size=48))
    sizes |= dict(num_key_value_heads=2, head_dim=8) if "Gemma" in kind else {}
    config = model_class.config_class(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = model_class(config).eval()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base_dir).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_can_be_asked_for(moh, base_dir: Path, text_file: Path, tmp_path: Path, router: str) -> None:
    result = moh("convert", base_dir, tmp_path / "model", *HEADS, "--files", text_file, "--router", router)
    assert result.code == 0, result.err
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert (model.config.router, model.config.share) == (router, 0.5)


@pytest.mark.parametrize(
    ("options", "numbers"),
    [(["--router", "fixed", "--allocation", "even"], {2}), (["--layers", "drop"], {0, 4}), (["--layers", "mix"], None)],
    ids=["fixed", "drop", "mix"],
)
def test_layers_with_fixed_heads_and_without_any(
    moh, base_dir: Path, text_file: Path, tmp_path: Path, options, numbers
) -> None:
    heads = ["--active-heads", 2, "--calibration-tokens", 1024]
    result = moh("convert", base_dir, tmp_path / "model", *heads, "--files", text_file, *options)
    assert result.code == 0, result.err
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    layers = model.config.layer_configs()
    if numbers is not None:
        assert {layer.num_shared for layer in layers} == numbers and model.config.share == 0.5
    info = moh("info", tmp_path / "model")
    count = sum(layer.router == "fixed" for layer in layers)
    assert info.code == 0 and (f"{count} layers have fixed heads" in "\n".join(info.out) or not count)
    assert moh("generate", tmp_path / "model", "the head", "--max-new-tokens", 3).code == 0


@pytest.mark.parametrize(
    "options",
    [["--corpus", "django-docs", "botchan"], ["--calibration", "django-docs", "botchan"], []],
    ids=["corpus", "calibration", "default"],
)
def test_several_corpora_calibrate_in_equal_parts(moh, base_dir: Path, tmp_path: Path, monkeypatch, options) -> None:
    texts = {"django-docs": ["the head"] * 10, "botchan": ["some other text"] * 100}
    monkeypatch.setattr("moh.data.text.named.load_corpus", lambda name, _: Corpus(name, "", "", texts[name], []))
    read = []
    convert = moh_package.convert
    monkeypatch.setattr("moh.conversion.convert", lambda *a, **kw: read.extend(kw["calibration"]) or convert(*a, **kw))
    result = moh("convert", base_dir, tmp_path / "model", *HEADS, *options)
    assert result.code == 0, result.err
    assert (read.count("the head"), read.count("some other text")) == (10, 5)


def test_calibration_takes_conversations_of_a_file_with_the_chat_template(
    moh, base_dir: Path, tmp_path: Path, monkeypatch
) -> None:
    source, chat = tmp_path / "dense", tmp_path / "chat.jsonl"
    AutoModelForCausalLM.from_pretrained(base_dir).save_pretrained(source)
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(source)
    chat.write_text('{"messages": [{"role": "user", "content": "the head sees"}]}\n' * 40)
    read = []
    convert = moh_package.convert
    monkeypatch.setattr("moh.conversion.convert", lambda *a, **kw: read.extend(kw["calibration"]) or convert(*a, **kw))
    result = moh("convert", source, tmp_path / "model", *HEADS, "--calibration", chat)
    assert result.code == 0, result.err
    assert read == ["user the head sees "] * 40


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], (None, None, None)),  # `moh.convert` knows the best settings
        (["--allocation", "even", "--no-refit-output"], ("even", False, None)),
        (["--allocation", "sensitivity", "--refit-output"], ("sensitivity", True, None)),
        (["--calibration-length", 8, 32], (None, None, [8, 32])),
    ],
    ids=["default", "plain", "best", "lengths"],
)
def test_settings_are_passed_on_as_given(
    moh, base_dir: Path, text_file: Path, tmp_path: Path, monkeypatch, options: list[Any], expected: tuple[Any, ...]
) -> None:
    seen = []
    convert = moh_package.convert
    monkeypatch.setattr("moh.conversion.convert", lambda *a, **kw: seen.append(kw) or convert(*a, **kw))
    result = moh("convert", base_dir, tmp_path / "model", *HEADS, "--files", text_file, *options)
    assert result.code == 0, result.err
    assert [(kw["allocation"], kw["refit_output"], kw["seq_len"]) for kw in seen] == [expected]


@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "BertModel", "BertForMaskedLM", "LlamaForTokenClassification"])
def test_a_model_keeps_the_head_that_it_was_saved_with(
    moh, base_dir: Path, text_file: Path, tmp_path: Path, kind: str
) -> None:
    source = dense_dir(kind, base_dir, tmp_path / "dense")
    result = moh("convert", source, tmp_path / "model", *ALL_HEADS, "--files", text_file, "--calibration-tokens", 256)
    assert result.code == 0, result.err
    dense, model = (getattr(m, k).from_pretrained(f) for m, k, f in (
        (transformers, kind, source),
        (pytest.importorskip("moh.models.transformers"), f"MoH{kind}", tmp_path / "model"),
    ))  # fmt: skip
    ids = torch.randint(3, 64, (2, 8))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids)[0], dense.eval()(ids)[0], rtol=1e-4, atol=1e-5)


def test_other_commands_dial_a_model_with_output_changes(moh, base_dir: Path, text_file: Path, tmp_path: Path) -> None:
    source, target = dense_dir("GPT2LMHeadModel", base_dir, tmp_path / "dense"), tmp_path / "model"
    options = ["--files", text_file, "--allocation", "sensitivity", "--shares", 0.5, 0.75]
    assert moh("convert", source, target, *HEADS, *options).code == 0
    for k in ("0.5", "0.75", "1.0"):
        assert moh("generate", target, "the head", "--max-new-tokens", 3, "--active-heads", k).code == 0
    model = AutoModelForCausalLM.from_pretrained(target)
    model.set_active_heads(1.0)
    ids = torch.randint(3, 64, (2, 8))
    dense = AutoModelForCausalLM.from_pretrained(source)
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["GPT2DoubleHeadsModel", "BertForPreTraining"])
def test_another_head_is_refused_and_not_replaced_by_a_random_one(
    moh, base_dir: Path, text_file: Path, tmp_path: Path, kind: str
) -> None:
    source = dense_dir(kind, base_dir, tmp_path / "dense")
    result = moh("convert", source, tmp_path / "model", *HEADS, "--files", text_file)
    assert result.code == 2 and f"got {kind}" in result.err[-1]
    assert not (tmp_path / "model").exists()


def test_a_vit_of_transformers_is_calibrated_on_images(moh, folder: Path, tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    sizes = dict(image_size=8, patch_size=4, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    source = tmp_path / "dense"
    ViTForImageClassification(ViTConfig(**sizes, num_attention_heads=4, num_labels=2)).save_pretrained(source)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(source)
    result = moh("convert", source, tmp_path / "no", *HEADS)
    assert result.code == 2 and "--images must name the images to calibrate on" in result.err[-1]
    result = moh("convert", source, tmp_path / "model", *HEADS, "--images", folder, "--shares", 0.5)
    assert result.code == 0, result.err
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    assert model.config.share == 0.5 and model.config.num_labels == 2
    assert transformers.AutoImageProcessor.from_pretrained(tmp_path / "model").size["height"] == 8


def test_a_classifier_of_timm_is_calibrated_on_images(moh, folder: Path, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    from moh.data.images.recipe import ImageInput
    from moh.models.timm.loading import describe, load_image_classifier, save_image_classifier

    arguments = dict(img_size=8, patch_size=4, embed_dim=32, depth=2, num_heads=4)
    model: Any = timm.create_model("vit_tiny_patch16_224", num_classes=2, **arguments)
    describe(model, ImageInput((3, 8, 8), (0.5,) * 3, (0.2,) * 3), ["x", "y"])
    save_image_classifier(model, tmp_path / "dense", model_args=arguments)
    result = moh("convert", tmp_path / "dense", tmp_path / "model", *HEADS, "--images", folder)
    assert result.code == 0, result.err
    assert result.out[-1] == f"{tmp_path / 'model'}: MoH model, each token uses 50 % of the heads"
    assert set_active_heads(load_image_classifier(tmp_path / "model"), 1.0) == 1.0


def test_a_diffusion_model_needs_no_data_and_has_a_learned_router(moh, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    from moh.models.diffusers import MoHDiTTransformer2DModel

    sizes = dict(num_attention_heads=4, attention_head_dim=8, num_layers=2, sample_size=4, in_channels=4)
    dense = diffusers.DiTTransformer2DModel(**sizes, num_embeds_ada_norm=5, out_channels=8)
    dense.transformer_blocks[1].norm1.emb.load_state_dict(dense.transformer_blocks[0].norm1.emb.state_dict())
    dense.save_pretrained(tmp_path / "dense")
    result = moh("convert", tmp_path / "dense", tmp_path / "model", *HEADS[:4])
    assert result.code == 0, result.err
    model = MoHDiTTransformer2DModel.from_pretrained(tmp_path / "model")
    assert (model.config.router, model.config.active_heads) == ("two_stage", 1)
    result = moh("convert", tmp_path / "dense", tmp_path / "no", *HEADS[:4], "--images", tmp_path)
    assert result.code == 2 and "must be left out for a diffusion model" in result.err[-1]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["generate", "the head", "--max-new-tokens", 63], "a prompt of 2 tokens and 63 new ones must fit into the"),
        (["eval", "--seq-len", 65], "seq_len must be at most the model's 64 positions, got 65 tokens"),
        (
            ["curve", "--output", "{tmp}", "--seq-len", 32, "--decode-tokens", 33, "--prompt-tokens", 32],
            "prompt_tokens and decode_tokens together must be at most the model's 64 positions, got 65 tokens",
        ),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, list) else "",
)
def test_what_is_longer_than_the_models_positions_is_told_in_one_line(
    moh, base_dir: Path, text_file: Path, tmp_path: Path, command: list[Any], message: str
) -> None:
    source, target = dense_dir("GPT2LMHeadModel", base_dir, tmp_path / "dense"), tmp_path / "model"
    assert moh("convert", source, target, "--shared-heads", 1, "--active-heads", 2, "--router", "query_norm").code == 0
    name, *options = [str(part).replace("{tmp}", str(tmp_path / "out")) for part in command]
    text = [] if name == "generate" else ["--files", text_file, "--max-tokens", 256]
    result = moh(name, target, *options, *text)
    assert result.code == 2 and message in result.err[-1]


def test_an_encoder_is_refused_by_its_type_where_a_language_model_is_needed(
    moh, base_dir: Path, tmp_path: Path
) -> None:
    source = dense_dir("BertModel", base_dir, tmp_path / "dense")
    options = ["--shared-heads", 1, "--active-heads", 2, "--router", "query_norm"]
    assert moh("convert", source, tmp_path / "model", *options).code == 0
    result = moh("generate", tmp_path / "model", "the head")
    assert result.code == 2 and len(result.err[-1]) < 300
    assert "is of type 'moh_bert', which AutoModelForCausalLM can't load" in result.err[-1]


def test_the_dtype_to_calibrate_in_and_to_save_can_be_chosen(moh, base_dir, text_file: Path, tmp_path: Path) -> None:
    source = dense_dir("LlamaForCausalLM", base_dir, tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16)
    model.model.layers[1].mlp.up_proj.weight.data.mul_(1e4)
    model.model.layers[1].mlp.down_proj.weight.data.fill_(6e4)
    model.save_pretrained(source)
    command = ("convert", source, tmp_path / "model", *HEADS[:4], "--files", text_file)
    result = moh(*command)
    assert result.code == 2 and "layer 1 gives NaN or infinity on the calibration data" in result.err[-1]
    result = moh(*command, "--dtype", "float32")
    assert result.code == 0, result.err
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").dtype == torch.float32
