"""Promises of loading: each checkpoint is loaded as its own kind; models that can't be compared are refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from moh.explore.subjects import ImageSubject, load_subject


def test_a_classifier_of_transformers_is_explored_too(tmp_path: Path) -> None:
    pytest.importorskip("torchvision", reason="the vision extra is not installed")
    from PIL import Image
    from transformers import ViTImageProcessor

    from moh.explore.images import read_image
    from moh.models.transformers import MoHViTConfig, MoHViTForImageClassification

    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=16, image_size=8)
    config = MoHViTConfig(
        **sizes,
        patch_size=4,
        num_labels=3,
        shared_heads=1,
        active_heads=1,
        router="query_norm",
        id2label={0: "a", 1: "b", 2: "c"},
    )
    MoHViTForImageClassification(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    subject = load_subject(tmp_path)
    assert isinstance(subject, ImageSubject)
    assert subject.classes == ("a", "b", "c") and subject.dial.values == (0, 1, 2, 3)
    seen = read_image(subject, Image.new("RGB", (20, 10), "red"), 3)
    assert seen.reference_classes is not None
    assert dict(seen.classes) == pytest.approx(dict(seen.reference_classes), rel=1e-5)
    assert torch.isfinite(seen.pixels).all()


def test_a_dense_model_of_another_vocabulary_is_refused(converted_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    AutoConfig.from_pretrained(converted_dir).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(converted_dir)
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"--dense must have the vocabulary of"):
        load_subject(converted_dir, dense=tmp_path)


def test_models_of_two_kinds_are_not_compared(converted_dir: Path, classifier_dirs: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"--dense must be a language model"):
        load_subject(converted_dir, dense=classifier_dirs["dense"])
    with pytest.raises(ValueError, match=r"--dense must be an image classifier"):
        load_subject(classifier_dirs["75"], dense=converted_dir)


@pytest.mark.parametrize(
    ("options", "got"),
    [
        ({"device_map": "auto"}, "'auto' and auto"),
        ({"dtype": torch.bfloat16}, "None and bfloat16"),
        ({"device_map": {"": "cpu"}, "dtype": torch.float16}, "{'': 'cpu'} and float16"),
    ],
    ids=str,
)
def test_a_classifier_is_loaded_whole_in_float32(classifier_dirs: dict[str, Path], options, got: str) -> None:
    with pytest.raises(
        ValueError, match=rf"--device-map must be left out and --dtype be float32 .*, got {re.escape(got)}$"
    ):
        load_subject(classifier_dirs["75"], **options)


def test_a_diffusion_model_is_named_as_no_subject(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "MoHDiTTransformer2DModel"}))
    with pytest.raises(ValueError, match=r"shows language models and image classifiers"):
        load_subject(tmp_path)


def test_uploads_and_comparisons_are_forgotten_after_an_hour(text_subject, image_subject, monkeypatch) -> None:
    gradio = pytest.importorskip("gradio", reason="the app extra is not installed")
    from moh.explore.interface import build, serve

    for subject in (text_subject, image_subject):
        app = build(subject)
        states = [block for block in app.blocks.values() if isinstance(block, gradio.State)]
        assert app.delete_cache == (600, 3600) and [state.time_to_live for state in states] == [3600]
    launched: dict[str, object] = {}
    monkeypatch.setattr(gradio.Blocks, "launch", lambda _, **how: launched.update(how) or (None, "here", None))
    assert serve(app) == "here" and launched["state_session_capacity"] == 100
