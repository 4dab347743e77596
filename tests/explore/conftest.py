"""Tiny models to explore: a language model and classifiers, each also dense."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "inspection"))  # has the browser

from moh.explore.subjects import (  # noqa: E402
    ImageSubject,
    TextSubject,
    load_subject,
)

CLASSES = ("ant", "<b>bee</b>", "cow", "dog", "emu", "fly")


@pytest.fixture(scope="session")
def converted_dir(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with the paper's parameter-free router: one of four heads shared, one more active."""
    pytest.importorskip("transformers", reason="the llm extra is not installed")
    from transformers import AutoTokenizer, LlamaForCausalLM

    from moh.models.transformers import MoHLlamaConfig, MoHLlamaForCausalLM

    dense = LlamaForCausalLM.from_pretrained(base_dir)
    for parameter in dense.parameters():  # large enough for heads to matter
        torch.nn.init.normal_(parameter, std=0.3)
    dense.save_pretrained(folder := tmp_path_factory.mktemp("explore") / "dense")
    AutoTokenizer.from_pretrained(base_dir).save_pretrained(folder)
    fields = {k: v for k, v in dense.config.to_dict().items() if k not in ("model_type", "architectures")}
    config = MoHLlamaConfig(**fields, router="query_norm", shared_heads=1, active_heads=1)
    model = MoHLlamaForCausalLM(config)
    model.load_state_dict(dense.state_dict())
    model.save_pretrained(target := folder.parent / "moh")
    AutoTokenizer.from_pretrained(base_dir).save_pretrained(target)
    return target


@pytest.fixture(scope="session")
def dense_dir(converted_dir: Path) -> Path:
    """The model that `converted_dir` was converted from."""
    return converted_dir.parent / "dense"


@pytest.fixture
def text_subject(converted_dir: Path) -> TextSubject:
    subject = load_subject(converted_dir)
    assert isinstance(subject, TextSubject)
    return subject


@pytest.fixture(scope="session")
def classifier_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A MoH classifier with learned routers and a dense one with the same classes; 16 patches in images of 8 x 8."""
    timm = pytest.importorskip("timm", reason="the vision extra is not installed")

    from moh.data.images.recipe import ImageInput
    from moh.models.timm.loading import describe, save_image_classifier

    arguments = {"img_size": 8, "patch_size": 2, "in_chans": 3, "embed_dim": 20, "depth": 2, "num_heads": 5}
    found = {}
    for kind in ("75", "dense"):
        model = timm.create_model(f"moh_vit_micro_patch4_28_{kind}", num_classes=len(CLASSES), **arguments)
        torch.manual_seed(0)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        describe(model, ImageInput((3, 8, 8), (0.5,) * 3, (0.2,) * 3), CLASSES)
        found[kind] = tmp_path_factory.mktemp("classifier") / kind
        save_image_classifier(model, found[kind], model_args=arguments)
    return found


@pytest.fixture
def image_subject(classifier_dirs: dict[str, Path]) -> ImageSubject:
    subject = load_subject(classifier_dirs["75"], dense=classifier_dirs["dense"])
    assert isinstance(subject, ImageSubject)
    return subject
