"""Promises to tools that run a model without its numbers, or with a dimension more: the meta device, `torch.func.vmap`,
`torch.jit.trace`, and programs of `torch.export` in a new process."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moh
from moh.attention import BACKENDS, Call, choose_backend, moh_attention

N, C = 70, 32


def layer(**options: Any) -> moh.MoHAttention:
    torch.manual_seed(0)
    return moh.MoHAttention(C, 4, **dict(shared_heads=1, active_heads=1, router="linear") | options).eval()


def llama() -> nn.Module:
    transformers = pytest.importorskip("moh.models.transformers")
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    heads = dict(router="two_stage", shared_heads=1, active_heads=1, num_key_value_heads=2)
    torch.manual_seed(0)
    return transformers.MoHLlamaForCausalLM(transformers.MoHLlamaConfig(**sizes, **heads, use_cache=False)).eval()


def transformers_vit() -> nn.Module:
    transformers = pytest.importorskip("moh.models.transformers")
    sizes = dict(image_size=16, patch_size=8, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, shared_heads=1, active_heads=1)
    torch.manual_seed(0)
    return transformers.MoHViTForImageClassification(transformers.MoHViTConfig(**sizes, **heads)).eval()


def timm_vit() -> nn.Module:
    timm = pytest.importorskip("timm")
    sizes = dict(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=5)
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(
        "moh_vit", base="vit_tiny_patch16_224", shared_heads=1, active_heads=1, **sizes
    ).eval()
    return model


def transnext() -> nn.Module:
    pytest.importorskip("timm")
    from transnext_cases import tiny_model

    return tiny_model()


def dit() -> nn.Module:
    pytest.importorskip("diffusers")
    from dit_cases import tiny_model

    return tiny_model()


def inputs(family: str, seed: int = 2) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    if family == "layer":
        return (torch.randn(2, N, C, generator=generator),)
    if family == "llama":
        return (torch.randint(64, (2, 10), generator=generator),)
    if family == "dit":
        return torch.randn(2, 3, 8, 8, generator=generator), torch.tensor([3, 700]), torch.tensor([0, 4])
    return (torch.randn(2, 3, *((32, 32) if family == "transnext" else (16, 16)), generator=generator),)


def output(found: Any) -> Tensor:
    found = getattr(found, "logits", None) if hasattr(found, "logits") else getattr(found, "sample", found)
    assert isinstance(found, Tensor)
    return found


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "layer": layer,
    "llama": llama,
    "transformers_vit": transformers_vit,
    "timm_vit": timm_vit,
    "transnext": transnext,
    "dit": dit,
}
every_family = pytest.mark.parametrize("family", FAMILIES)


# ---------------------------------------------------------------------------------------------- the meta device


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"dropout_p": 0.1}, {"scale": 0.5}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_attention_gives_shapes_and_dtypes_on_the_meta_device(dtype: torch.dtype, options: dict[str, Any]) -> None:
    with torch.device("meta"):
        q, k, v = torch.empty(2, 4, 5, 8), torch.empty(2, 2, 6, 8), torch.empty(2, 2, 6, 3)
        q, k, v, gates = (t.to(dtype).requires_grad_() for t in (q, k, v, torch.empty(2, 5, 4)))
        mask = torch.empty(5, 6, dtype=torch.bool)
        out = moh_attention(q, k, v, gates, attn_mask=mask, **options)
    assert (out.shape, out.dtype, out.device.type) == ((2, 5, 4, 3), dtype, "meta")
    out.sum().backward()
    assert all(t.grad is not None and t.grad.shape == t.shape for t in (q, k, v, gates))


@every_family
def test_models_give_shapes_and_dtypes_on_the_meta_device(family: str) -> None:
    model = FAMILIES[family]()
    expected = output(model(*inputs(family)))
    # Without a mask of its own, transformers reads the token positions, for dense models too
    mask = {"attention_mask": torch.ones(2, 1, 10, 10, dtype=torch.bool, device="meta")} if family == "llama" else {}
    found = output(copy.deepcopy(model).to("meta")(*(x.to("meta") for x in inputs(family)), **mask))
    assert (found.shape, found.dtype, found.device.type) == (expected.shape, expected.dtype, "meta")


@pytest.mark.parametrize("router", ["two_stage", "single_stage", "query_norm", "linear"])
@pytest.mark.parametrize("unit", ["head", "group_balanced", "kv_group"])
def test_layers_count_their_work_on_the_meta_device(router: str, unit: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    heads = dict(shared_heads=2, active_heads=2, num_kv_heads=2, router=router, routing_unit=unit)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        module = layer(**heads)
        module(torch.empty(2, 9, C), is_causal=True).sum().backward()
    projections = 2 * (2 * 9) * C * C * 3  # W_Q, W_O and, half as wide, W_K and W_V
    assert counter.get_total_flops() >= 2 * projections  # forward, and gradients of weights backward


# ------------------------------------------------------------------------------------------------ torch.func.vmap


@every_family
def test_vmap_computes_what_a_loop_does(family: str) -> None:
    model = FAMILIES[family]()
    several = [inputs(family, seed) for seed in (2, 3, 4)]
    stacked = tuple(torch.stack(parts) for parts in zip(*several, strict=True))
    with torch.no_grad():
        found = torch.func.vmap(lambda *x: output(model(*x)))(*stacked)
        expected = torch.stack([output(model(*x)) for x in several])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"mask": True}], ids=str)
@pytest.mark.parametrize("unit", ["head", "group_balanced"])
def test_gradients_of_single_samples(unit: str, options: dict[str, Any]) -> None:
    module = layer(shared_heads=2, active_heads=2, num_kv_heads=2, routing_unit=unit, router="two_stage")
    parameters = dict(module.named_parameters())
    mask = torch.rand(9, 9).tril() + torch.eye(9) > 0.3 if options.get("mask") else None
    kwargs = {"is_causal": options.get("is_causal", False), "attn_mask": mask}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, (x[None],), kwargs).square().sum()

    x = torch.randn(3, 9, C)
    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(3):
        module.zero_grad()
        module(x[i : i + 1], **kwargs).square().sum().backward()
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(found[name][i], parameter.grad, rtol=1e-3, atol=1e-4)


def test_an_ensemble_of_layers_is_one_call() -> None:
    modules = [layer(), layer()]
    with torch.no_grad():
        modules[1].q_proj.weight.mul_(2.0)
    parameters, buffers = torch.func.stack_module_state(modules)
    x = torch.randn(2, 9, C)

    def call(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(modules[0], (parameters, buffers), (x,))

    found = torch.func.vmap(call, in_dims=(0, 0, None))(parameters, buffers, x)
    torch.testing.assert_close(found, torch.stack([m(x) for m in modules]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "sdpa"])
def test_a_named_backend_without_a_rule_for_vmap_says_so(backend: str) -> None:
    with pytest.raises(ValueError, match=f"backend '{backend}' can't handle this call: it has no rule"):
        torch.func.vmap(layer(backend=backend))(torch.randn(3, 2, 9, C))


def test_gradients_of_torch_func_alone_still_skip_inactive_heads() -> None:
    names = []

    def loss(q: Tensor) -> Tensor:
        call = Call(q, q, q, torch.ones(1, 5, 2))
        names.append(choose_backend(call).name)
        return BACKENDS[names[0]].attend(call).sum()

    torch.func.grad(loss)(torch.randn(1, 2, 5, 8))
    assert names == ["sdpa"]


# ---------------------------------------------------------------------------------- torch.jit.trace, torch.export


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", [None, "sdpa", "reference"])
@pytest.mark.parametrize("router", ["two_stage", "single_stage", "query_norm", "linear"])
def test_a_traced_layer_routes_other_inputs(router: str, backend: str | None) -> None:
    module = layer(router=router, backend=backend)
    first, second = inputs("layer", 2)[0], inputs("layer", 3)[0]
    with torch.no_grad():
        first[:, :, 1:] = 0  # other tokens route differently, and choose other numbers of heads
        traced = torch.jit.trace(module, (first,))
        torch.testing.assert_close(traced(second), module(second), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("family", ["timm_vit", "transnext", "dit"])
def test_a_traced_model_routes_other_inputs(family: str) -> None:
    model = FAMILIES[family]()
    first, second = inputs(family, 2), inputs(family, 3)

    class AsTensor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *x: Tensor) -> Tensor:
            return output(self.model(*x))

    with torch.no_grad():
        traced = torch.jit.trace(AsTensor(), first)
        torch.testing.assert_close(traced(*second), output(model(*second)), rtol=1e-4, atol=1e-5)


LOAD = """
import sys
{imports}
program, x, expected = (sys.argv[1] + name for name in ("/program.pt2", "/x.pt", "/expected.pt"))
loaded = torch.export.load(program).module()
torch.testing.assert_close(loaded(torch.load(x)), torch.load(expected), rtol=1e-4, atol=1e-5)
assert not [name for name in ("transformers", "timm", "diffusers") if name in sys.modules]
"""


@pytest.mark.parametrize(
    ("backend", "imports"),
    [
        pytest.param(None, "import moh\nassert 'torch' not in sys.modules\nimport torch", id="default-moh-first"),
        pytest.param("sdpa", "import torch\nimport moh", id="sdpa-torch-first"),
    ],
)
def test_an_exported_program_loads_in_a_new_process_after_import_moh(
    forks: Any, tmp_path: Any, backend: str | None, imports: str
) -> None:
    module, x = layer(backend=backend), inputs("layer")[0]
    with torch.no_grad():
        torch.save(module(x), tmp_path / "expected.pt")
        torch.export.save(torch.export.export(module, (x,)), tmp_path / "program.pt2")
    torch.save(x, tmp_path / "x.pt")
    code = LOAD.format(imports=imports)
    if imports.startswith("import torch"):
        result = forks.run(code, tmp_path)
    else:
        result = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=240
        )
    assert result.returncode == 0, result.stderr


def test_an_unknown_operator_is_still_unknown() -> None:
    assert not hasattr(torch.ops.moh, "cpu_nonsense") and not hasattr(torch.ops.moh, "nonsense")
