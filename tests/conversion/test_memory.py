"""Promise: a conversion that need not keep the dense model holds its weights once, and takes little memory besides."""

from __future__ import annotations

import contextlib
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import moh
from moh.config import MoHConfig
from moh.conversion import recording
from moh.conversion.calibrator import Calibrator
from moh.conversion.passes import layer_costs
from moh.conversion.recording import Kept, TensorFile, checkpointed
from moh.conversion.token_loss import summed_loss
from moh.conversion.transformers import adapter
from moh.data.text.blocks import IGNORED
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_summed_loss_is_pytorchs_with_less_memory(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1200, 8, generator=generator).to(dtype)
    head = torch.randn(8, 2048, generator=generator).to(dtype)
    targets = torch.randint(2048, (1200,), generator=generator)
    targets[::7] = IGNORED
    found = []
    for loss in (summed_loss, lambda z, t: F.cross_entropy(z.float(), t, reduction="sum", ignore_index=IGNORED)):
        x = states.clone().requires_grad_()
        with Peak() as peak:
            value = loss(x @ head, targets)
            (3 * value).backward()
        found.append((value.detach(), x.grad, peak.most))
    (value, gradient, least), (expected, of_pytorch, most) = found
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, of_pytorch, rtol=1e-4 if dtype == torch.float32 else 0.02, atol=1e-3)
    assert least < 0.8 * most


def _costs(dense: nn.Module, blocks: Any = None, samples: int = 2) -> tuple[Tensor, int]:
    """The layers' costs, and the most bytes that they took at once."""
    of_dense = adapter(dense, "linear", copied=False)
    of_dense.blocks = of_dense.blocks if blocks is None else blocks
    ids = torch.randint(64, (samples, 64), generator=torch.Generator().manual_seed(0))
    routers = [build_router(MoHConfig(4, 1, 1, "linear"), 32) for _ in of_dense.attentions]
    with Peak() as peak:
        return layer_costs(of_dense, routers, iter(ids.split(1))), peak.most


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_layers_costs_are_measured_with_the_graph_of_one_layer_at_a_time(make_dense, family: str) -> None:
    dense = make_dense(family)
    forward = [block.__dict__.get("forward") for block in adapter(dense, "linear", copied=False).blocks]
    torch.manual_seed(0)
    light, least = _costs(dense)
    torch.manual_seed(0)
    whole, most = _costs(dense, blocks=())
    assert torch.equal(light, whole) and light[:, 0].min() > 0 and least < most
    assert [block.__dict__.get("forward") for block in adapter(dense, "linear", copied=False).blocks] == forward


@pytest.mark.parametrize("full", [False, True], ids=["room", "full"])
def test_inputs_that_are_kept_in_a_file_change_no_costs(make_dense, monkeypatch, full: bool) -> None:
    dense, written = make_dense(), []
    torch.manual_seed(0)
    expected, _ = _costs(dense)
    write = TensorFile.write

    def counting(file: TensorFile, tensor: Tensor) -> Kept:
        written.append(tensor)
        if full and len(written) % 2:
            raise OSError("No space left on device")
        return write(file, tensor)

    monkeypatch.setattr(TensorFile, "write", counting)
    monkeypatch.setattr(recording, "LARGE_BYTES", 1)
    torch.manual_seed(0)
    assert torch.equal(_costs(dense)[0], expected) and len(written) >= 2 * len(dense.model.layers)


@pytest.mark.parametrize("own", [False, True], ids=["of_the_class", "its_own"])
@pytest.mark.parametrize("fails", [None, "inside", "wrapping"])
def test_a_shared_block_is_run_again_once_and_left_as_it_was(own: bool, fails: str | None) -> None:
    block = nn.Linear(4, 4)
    runs: list[int] = []
    block.register_forward_pre_hook(lambda *_: runs.append(1))
    if own:
        block.forward = lambda x, forward=block.forward: forward(x)
    before = block.__dict__.get("forward")
    blocks: list[Any] = [block, object() if fails == "wrapping" else block]
    expected = RuntimeError if fails == "inside" else AttributeError
    with pytest.raises(expected) if fails else contextlib.nullcontext(), checkpointed(blocks):
        x = torch.randn(2, 4, requires_grad=True)
        block(block(x)).sum().backward()
        if fails == "inside":
            raise RuntimeError
    assert block.__dict__.get("forward") is before
    assert block(torch.ones(1, 4)).shape == (1, 4) and (fails == "wrapping" or len(runs) == 3)


def test_memory_of_the_costs_hardly_grows_with_the_number_of_layers(make_dense) -> None:
    two, eight = (_costs(make_dense(num_hidden_layers=layers))[1] for layers in (2, 8))
    kept = 64 * 32 * 4  # bytes of one state of every token
    assert eight - two <= 6 * 4 * kept  # of a layer more: its input, what its heads gave, and scores of heads


def test_memory_of_the_costs_does_not_grow_with_the_number_of_samples(make_dense) -> None:
    gc.collect()
    gc.disable()  # what circles of references hold would be counted, or not, by chance
    try:
        two, eight = (_costs(make_dense(), samples=samples)[1] for samples in (2, 8))
    finally:
        gc.enable()
    assert eight == two


def test_costs_do_not_depend_on_how_samples_are_divided(make_dense) -> None:
    dense = adapter(make_dense(), "linear", copied=False)
    samples = torch.randint(64, (8, 16), generator=torch.Generator().manual_seed(0))
    routers = [build_router(MoHConfig(4, 1, 1, "linear"), 32) for _ in range(2)]
    one, four = (layer_costs(dense, routers, iter(samples.split(size))) for size in (1, 4))
    torch.testing.assert_close(one, four, rtol=1e-5, atol=0)
