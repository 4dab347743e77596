"""Promises of `moh convert-published`: each family's published files become a directory that other commands take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

timm = pytest.importorskip("timm", reason="the vision extra is not installed")
diffusers = pytest.importorskip("diffusers", reason="the diffusion extra is not installed")

from moh.models.published import load_published, save_published  # noqa: E402

GOLDEN = Path(__file__).parents[1] / "golden"


def golden(name: str) -> Any:
    """The model of a golden file."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as opened:
        config = json.loads(opened.metadata()["config"])
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    return load_published({k.removeprefix("state."): t for k, t in tensors.items() if k.startswith("state.")}, config)


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    small = diffusers.AutoencoderKL(block_out_channels=(4,), layers_per_block=1, norm_num_groups=1, latent_channels=4)
    small.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


@pytest.mark.parametrize("name", ["transnext_a", "transnext_b"])
@torch.no_grad()
def test_a_classifier_becomes_a_model_of_timm(moh, name: str, tmp_path: Path) -> None:
    model = golden(name)
    save_published(model, tmp_path / "model.pth")
    result = moh("convert-published", tmp_path / "model.pth", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    figures = json.loads(result.out[0])
    assert figures["output"] == str(tmp_path / "out") and figures["notes"] == []
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(image), model(image))
    assert loaded.pretrained_cfg["input_size"] == (3, 64, 64)
    save_published(loaded, tmp_path / "again.pth")  # and back
    first, second = (torch.load(tmp_path / file)["model"] for file in ("model.pth", "again.pth"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert "`model.pth`" in (tmp_path / "out" / "README.md").read_text()


@torch.no_grad()
def test_a_diffusion_model_becomes_a_pipeline(moh, vae: Path, tmp_path: Path) -> None:
    from moh.sampling import load_image_model

    model = golden("dit_a")
    save_published(model, tmp_path / "0000100.pt")
    for options in ((), ("--vae", vae)):
        result = moh(
            "convert-published", tmp_path / "0000100.pt", "-o", tmp_path / "out", *options
        )  # the second replaces
        assert result.code == 0, result.err
        loaded = load_image_model(tmp_path / "out", **({} if options else {"vae": vae}))
        assert all(torch.equal(loaded.transformer.state_dict()[key], t) for key, t in model.state_dict().items())
        assert not loaded.scheduler.config.clip_sample  # latents
        assert (loaded.scheduler.config.beta_schedule, loaded.scheduler.config.beta_end) == ("linear", 0.02)
        assert (tmp_path / "out" / "vae").is_dir() == bool(options)


def test_a_language_model_becomes_an_ordinary_one_with_its_tokenizer(moh, base_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from moh.models.transformers.loading import load_tokenizer

    model = golden("llama_a")
    model.generation_config.max_new_tokens = 7
    save_published(model, tmp_path / "published")
    command = ("convert-published", tmp_path / "published", tmp_path / "out")
    result = moh(*command)
    assert result.code == 0 and result.out[-1].startswith("no tokenizer there: save it in"), result.err
    tokenizer = load_tokenizer(base_dir)
    tokenizer.save_pretrained(tmp_path / "published")
    result = moh(*command, "--json")
    assert json.loads(result.out[0]) == {"output": str(tmp_path / "out"), "share_of_heads": 0.75, "notes": []}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded).__name__ == "MoHLlamaForCausalLM" and loaded.generation_config.max_new_tokens == 7
    assert all(torch.equal(loaded.state_dict()[key], t) for key, t in model.state_dict().items())
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the head") == tokenizer("the head")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("nowhere.pt", "out"), "FILE must be a file or directory, but there is no nowhere.pt"),
        (("model.pth", "out", "--name", "MoH-DiT-M/2-50"), "--name must be one of moh_transnext_small_75, "),
        (("model.pth", "out", "--vae", "vae"), "--vae is for a diffusion model, and model.pth is not one"),
        (("model.pth", "out", "--name", "moh_transnext_base_75"), "does not match the configuration: "),
        ((".", "out", "--name", "moh_transnext_base_75"), "--name must be left out for a directory"),
        ((".", "out"), "config must be given: there is no config.json to read it from"),
        (("broken.pt", "out"), "broken.pt can't be read as tensors: "),
        (
            ("bare.pt", "out"),
            "config must be given (--name of the command): neither the arguments in bare.pt nor its name",
        ),
        (("model.pth", "."), "it holds other files, which are kept, such as "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_clear_line(moh, options, message: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_published(golden("transnext_a"), tmp_path / "model.pth")
    torch.save({"x": torch.zeros(1)}, tmp_path / "bare.pt")
    (tmp_path / "broken.pt").write_bytes(b"no tensors")
    result = moh("convert-published", *options)
    assert result.code == 2
    (line,) = result.err
    assert line.startswith("moh convert-published: ") and message in line
    assert not (tmp_path / "out").exists()
