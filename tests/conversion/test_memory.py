"""Promise: a conversion that need not keep the dense model holds its weights once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import moh


def shared_names(dense: nn.Module, model: nn.Module) -> set[str]:
    ours = model.state_dict()
    return {n for n, t in dense.state_dict().items() if n in ours and ours[n].data_ptr() == t.data_ptr()}


@pytest.mark.parametrize("router", ["query_norm", "two_stage", "linear"])
def test_weights_are_shared_on_request_and_copied_by_default(make_dense, router: str) -> None:
    dense = make_dense("Llama", tie_word_embeddings=False)
    options = dict(
        shared_heads=1, active_heads=2, router=router, calibration=torch.randint(64, (8, 16)), progress=False
    )
    names = set(dense.state_dict())
    assert shared_names(dense, moh.convert(dense, **options)) == set()
    model = moh.convert(dense, copy_weights=False, **options)
    refitted = {name for name in names if "o_proj" in name} if router == "linear" else set()
    assert shared_names(dense, model) == names - refitted


def test_sharing_changes_no_number(make_dense) -> None:
    options = dict(shared_heads=1, active_heads=2, calibration=torch.randint(64, (8, 16)), progress=False)
    copied = moh.convert(make_dense(), **options)
    shared = moh.convert(make_dense(), copy_weights=False, **options)
    ids = torch.randint(64, (2, 12))
    with torch.no_grad():
        assert torch.equal(copied(ids).logits, shared(ids).logits)


def test_timm_models_share_too() -> None:
    timm = pytest.importorskip("timm")
    dense = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=2, num_heads=4).eval()
    model = moh.convert(dense, shared_heads=1, active_heads=2, router="query_norm", copy_weights=False)
    assert shared_names(dense, model) == set(dense.state_dict())
    assert shared_names(dense, moh.convert(dense, shared_heads=1, active_heads=2, router="query_norm")) == set()


def test_the_command_does_not_keep_the_dense_model(monkeypatch: pytest.MonkeyPatch, make_dense, tmp_path) -> None:
    import moh.conversion
    from moh.cli import main

    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    vocabulary = tokenizers.models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(vocabulary)).save_pretrained(
        tmp_path / "in"
    )
    make_dense().save_pretrained(tmp_path / "in")
    seen, original = [], moh.conversion.convert

    def convert(dense: nn.Module, **options: Any) -> nn.Module:
        model: nn.Module = original(dense, **options)
        seen.append(shared_names(dense, model) == set(dense.state_dict()))
        return model

    monkeypatch.setattr(moh.conversion, "convert", convert)
    words = [str(tmp_path / "in"), str(tmp_path / "out"), "--shared-heads", "1", "--active-heads", "2"]
    assert main(["convert", *words, "--router", "query_norm"]) == 0
    assert seen == [True]
