"""Promise: we and diffusers load a saved model unchanged, with its classes; errors name what can't be loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, DiTPipeline, DiTTransformer2DModel

from moh.models.diffusers import MoHDiTTransformer2DModel
from moh.sampling import SamplingSettings, load_image_model, sample, save_image_model

SETTINGS = SamplingSettings(steps=3, guidance=1.5)
NAMES = ("tench, Tinca tinca", "goldfish", "3", "stingray", "cock")


def test_a_model_of_pixels_is_read_back_as_it_was(tiny, tmp_path: Path) -> None:
    model = tiny(class_names=NAMES)
    save_image_model(model, tmp_path)
    loaded = load_image_model(tmp_path)
    assert type(loaded.transformer) is MoHDiTTransformer2DModel and not loaded.transformer.training
    assert loaded.class_names == NAMES and loaded.vae is None and loaded.sample_shape == (1, 8, 8)
    assert loaded.digest() == model.digest()
    assert torch.equal(sample(loaded, [1, 2], SETTINGS), sample(model, [1, 2], SETTINGS))
    assert MoHDiTTransformer2DModel.from_pretrained(tmp_path, subfolder="transformer").share == model.transformer.share


def test_the_digest_tells_models_apart(tiny, vae) -> None:
    model, other = tiny(), tiny()
    assert model.digest() == other.digest()
    with torch.no_grad():
        other.transformer.proj_out.bias[0] += 1
    assert model.digest() != other.digest()
    latent = tiny(in_channels=4, vae=vae)
    before = latent.digest()
    with torch.no_grad():
        vae.decoder.conv_out.bias[0] += 1
    assert latent.digest() != before


def test_diffusers_pipeline_reads_a_model_of_latents(tiny, vae, tmp_path: Path) -> None:
    model = tiny(in_channels=4, vae=vae, class_names=NAMES)
    save_image_model(model, tmp_path)
    pipe = DiTPipeline.from_pretrained(tmp_path)
    assert type(pipe.transformer) is MoHDiTTransformer2DModel
    assert pipe.labels["Tinca tinca"] == 0 and pipe.labels["goldfish"] == 1
    loaded = load_image_model(tmp_path)
    assert torch.equal(sample(loaded, [4], SETTINGS), sample(model, [4], SETTINGS))


def test_a_vae_can_be_named_where_there_is_none(tiny, vae, tmp_path: Path) -> None:
    model = tiny(in_channels=4, vae=vae)
    save_image_model(model, tmp_path, with_vae=False)
    vae.save_pretrained(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="works on latents of 4 channels: name the VAE that decodes them"):
        load_image_model(tmp_path)
    loaded = load_image_model(tmp_path, vae=tmp_path / "elsewhere")
    assert torch.equal(sample(loaded, [4], SETTINGS), sample(model, [4], SETTINGS))


def test_a_model_of_latents_without_its_vae_is_not_taken_for_one_of_pixels(tiny, vae, tmp_path: Path) -> None:
    save_image_model(tiny(in_channels=3, vae=vae), tmp_path, with_vae=False)
    with pytest.raises(ValueError, match="works on latents of 3 channels: name the VAE that decodes them"):
        load_image_model(tmp_path)


def test_a_transformer_alone_is_taken_to_be_trained_as_in_the_paper(tiny, tmp_path: Path) -> None:
    model = tiny()
    model.transformer.save_pretrained(tmp_path)
    assert torch.equal(sample(load_image_model(tmp_path), [1], SETTINGS), sample(model, [1], SETTINGS))


def test_a_dense_model_of_diffusers_draws_too(vae, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, out_channels=8, num_layers=1, sample_size=8, num_embeds_ada_norm=10
    )
    pipe = DiTPipeline(transformer=dense, vae=vae, scheduler=DDPMScheduler(beta_end=0.03))
    pipe.save_pretrained(tmp_path)
    model = load_image_model(tmp_path)
    assert model.num_classes == 10 and model.class_names == ()
    config = model.scheduler.config
    assert config.beta_end == 0.03 and not config.clip_sample  # latents are not clipped, whatever is in the file
    assert sample(model, [9], SETTINGS).shape == (1, 3, 16, 16)


def test_classes_are_named_or_numbered(tiny) -> None:
    model = tiny(class_names=NAMES)
    # "3" is the name of class 2
    assert model.class_ids(["goldfish", "Tinca tinca", "tench, Tinca tinca", "4", "3"]) == [1, 0, 0, 4, 2]
    assert tiny().class_ids(["3"]) == [3]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dog", r"class must be an id between 0 and 4 or a name \(tench, Tinca tinca, goldfish, .*\), got 'dog'"),
        ("5", "class must be between 0 and 4, got 5"),
        ("-1", "class must be between 0 and 4, got -1"),
        ("1.5", "got '1.5'"),
    ],
)
def test_an_unknown_class_is_told(tiny, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(class_names=NAMES).class_ids(["goldfish", name])


def test_without_names_only_ids_will_do(tiny) -> None:
    with pytest.raises(ValueError, match=r"between 0 and 4 \(the model has no class names\), got 'dog'"):
        tiny().class_ids(["dog"])


def test_what_cannot_be_read_is_told(tiny, vae, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="checkpoint must be a directory or a hub name, but there is no directory '/nowhere'"
    ):
        load_image_model("/nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty' has no configuration that can be read"):
        load_image_model(tmp_path / "empty")
    with pytest.raises(ValueError, match=f"vae '{tmp_path}/empty' can't be loaded"):
        tiny().transformer.save_pretrained(tmp_path / "model")
        load_image_model(tmp_path / "model", vae=tmp_path / "empty")
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="vae must have the 1 latent channels of the model, got 4"):
        load_image_model(tmp_path / "model", vae=tmp_path / "vae")
    weights = tmp_path / "model" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model can't be loaded"):
        load_image_model(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(
        ValueError, match="must hold one of MoHDiTTransformer2DModel, DiTTransformer2DModel, got 'UNet2D"
    ):
        load_image_model(tmp_path / "model")


def test_a_model_that_does_not_predict_noise_is_refused(tiny, tmp_path: Path) -> None:
    save_image_model(tiny(), tmp_path)
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "v_prediction"}))
    with pytest.raises(ValueError, match="must have prediction_type 'epsilon', got 'v_prediction'"):
        load_image_model(tmp_path)
