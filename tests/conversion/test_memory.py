"""Promise: a conversion that need not keep the dense model holds its weights once, and takes little memory besides."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import moh
from moh.config import MoHConfig
from moh.conversion.calibrator import Calibrator
from moh.conversion.passes import layer_costs
from moh.conversion.transformers import adapter
from moh.routing import build_router


class Peak(TorchDispatchMode):
    """`most`: the most bytes that tensors made inside the block held at once, those that a graph keeps included."""

    def __init__(self) -> None:
        super().__init__()
        self._held: weakref.WeakSet[Any] = weakref.WeakSet()  # storages
        self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        found = function(*args, **kwargs or {})
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in before:  # else a view
                self._held.add(tensor.untyped_storage())
        self.most = max(self.most, sum(storage.nbytes() for storage in self._held))
        return found


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


def test_costs_take_at_most_twice_the_models_memory(make_dense) -> None:
    # Most of a small model is its vocabulary, and most of what a loss takes its logits
    dense = make_dense(tie_word_embeddings=True, vocab_size=8192)
    samples = torch.randint(8192, (8, 16), generator=torch.Generator().manual_seed(0))
    calibrator = Calibrator(adapter(dense, "linear", copied=False), samples, 4, progress=False)
    routers = [build_router(MoHConfig(4, 1, 1, "linear"), 32) for _ in range(2)]
    with Peak() as peak:
        calibrator.costs(routers)
    assert 0 < peak.most <= 2 * sum(p.numel() * p.element_size() for p in dense.parameters())


def test_costs_do_not_depend_on_how_samples_are_divided(make_dense) -> None:
    dense = adapter(make_dense(), "linear", copied=False)
    samples = torch.randint(64, (8, 16), generator=torch.Generator().manual_seed(0))
    routers = [build_router(MoHConfig(4, 1, 1, "linear"), 32) for _ in range(2)]
    one, four = (layer_costs(dense, routers, iter(samples.split(size))) for size in (1, 4))
    torch.testing.assert_close(one, four, rtol=1e-5, atol=0)
