"""Promises of exported models: each runtime gives PyTorch's numbers, and a program of static shapes keeps the saving.

The runtimes' tests are run by `make test-engines`, some of those of `torch.export` by default, all of them by `make test-all`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")
exporters = pytest.importorskip("transformers.exporters", reason="this transformers has no exporters")
if not hasattr(exporters, "ExportedModel"):
    pytest.skip("this transformers can't load what it exports", allow_module_level=True)

import moh  # noqa: E402
import moh.models.transformers  # noqa: E402
from engines_on_cpu import needs  # noqa: E402
from moh.cli import main  # noqa: E402
from moh.models.exported import export_model, load_exported  # noqa: E402
from moh.models.runtimes import RUNTIMES  # noqa: E402

GROUPED = dict(routing_unit="group_balanced", num_attention_heads=6, num_key_value_heads=2, shared_heads=2)
TINY = dict(vocab_size=64, hidden_size=48, intermediate_size=48, num_hidden_layers=2, active_heads=2)
VIT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16)


def made(name: str, config: Any) -> Any:
    torch.manual_seed(0)
    return stirred(getattr(moh.models.transformers, name)(config).eval())


@torch.no_grad()
def stirred(model: Any) -> Any:
    """The model with weights that matter."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            parameter.normal_(std=0.5 if "router" in name else 0.2)
    return model


def tiny_model(router: str = "linear", **options: Any) -> Any:
    config = moh.models.transformers.MoHLlamaConfig(**TINY | GROUPED | dict(head_dim=8, router=router) | options)
    return made("MoHLlamaForCausalLM", config)


def ids(batch: int, tokens: int, *, left: bool = True) -> dict[str, Tensor]:
    """Random tokens, the first two of the first text padding; with `left=False` the last two."""
    chosen = torch.randint(3, 64, (batch, tokens), generator=torch.Generator().manual_seed(tokens))
    mask = torch.ones_like(chosen)
    mask[0, slice(0, 2) if left else slice(-2, None)] = 0
    return dict(input_ids=chosen, attention_mask=mask)


def encoder() -> tuple[Any, dict[str, Tensor]]:
    config = moh.models.transformers.MoHBertConfig(**TINY | dict(num_attention_heads=4, shared_heads=1))
    return made("MoHBertModel", config), ids(2, 12, left=False)


def vit(**options: Any) -> tuple[Any, dict[str, Tensor]]:
    heads = dict(shared_heads=1, active_heads=2, router="two_stage") | options
    config = moh.models.transformers.MoHViTConfig(**VIT, patch_size=8, num_labels=3, **heads)
    return made("MoHViTForImageClassification", config), dict(pixel_values=torch.randn(2, 3, 16, 16))


def timm_vit(**options: Any) -> tuple[Any, dict[str, Tensor]]:
    timm = pytest.importorskip("timm", reason="the vision extra is not installed")
    torch.manual_seed(0)
    sizes = dict(depth=2, embed_dim=32, num_heads=4, num_classes=3)
    model = timm.create_model("moh_vit_micro_patch4_28_50", **sizes | options).eval()
    return stirred(model), dict(x=torch.randn(2, 3, 28, 28))


def transnext() -> tuple[Any, dict[str, Tensor]]:
    """The published MoH-ViT's architecture: windows, pooled keys and plain attention."""
    pytest.importorskip("timm", reason="the vision extra is not installed")
    from moh.models.timm.transnext import MoHTransNeXt

    torch.manual_seed(0)
    stages = dict(
        embed_dims=(8, 16, 32), num_heads=(2, 4, 4), depths=(1, 1, 1), mlp_ratios=(2, 2, 2), sr_ratios=(4, 2, 1)
    )
    heads = dict(shared_heads=(2, 1, 1), active_heads=(0, 1, 2))
    model = MoHTransNeXt(img_size=32, patch_size=2, num_classes=5, **stages, **heads).eval()
    return stirred(model), dict(x=torch.randn(2, 3, 32, 32))


def dit() -> tuple[Any, dict[str, Any]]:
    pytest.importorskip("diffusers", reason="the diffusion extra is not installed")
    from moh.models.diffusers import MoHDiTTransformer2DModel

    torch.manual_seed(0)
    sizes = dict(num_attention_heads=4, attention_head_dim=8, num_layers=2, sample_size=8, num_classes=5, in_channels=3)
    model = MoHDiTTransformer2DModel(**sizes, shared_heads=[4, 1], active_heads=[0, 2]).eval()
    inputs = dict(
        hidden_states=torch.randn(2, 3, 8, 8), timestep=torch.tensor([3, 900]), class_labels=torch.tensor([1, 5])
    )
    return stirred(model), inputs


class Own(nn.Module):
    """A model of nobody's library: one layer that can gather active heads, one that can't."""

    def __init__(self) -> None:
        super().__init__()
        heads = dict(num_kv_heads=2, shared_heads=2, active_heads=2, router="linear")
        self.first = moh.MoHAttention(24, 6, routing_unit="group_balanced", **heads)
        self.second = moh.MoHAttention(24, 6, **heads)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.first(x, is_causal=True)
        return x + self.second(x, key_padding_mask=mask)


def own_layers() -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 5:] = False
    return stirred(Own().eval()), dict(x=torch.randn(2, 7, 24), mask=mask)


THRESHOLDS = dict(router="threshold", routing_unit="head", thresholds=[[9.0, 0.5, 0.0, -0.5, -9.0]] * 2)
MODELS: dict[str, Callable[[], tuple[Any, dict[str, Tensor]]]] = {
    "group_balanced": lambda: (tiny_model(), ids(2, 12)),
    "threshold": lambda: (tiny_model(**THRESHOLDS), ids(2, 12)),
    "fixed": lambda: (tiny_model("fixed", routing_unit="head", active_heads=0, shared_heads=[[0, 1, 3], [4]]), ids(2, 12)),
    "encoder": encoder,
    "vit": vit,
    "timm_vit": timm_vit,
    "timm_vit_query_norm": lambda: timm_vit(router="query_norm"),
    "transnext": transnext,
    "dit": dit,
    "own": own_layers,
}  # fmt: skip
FOREIGN = [pytest.param(name, marks=pytest.mark.slow) for name in RUNTIMES if name != "torch"]


def outputs(found: Any, inputs: dict[str, Tensor]) -> Tensor:
    """What a model gives for everything but padding."""
    if isinstance(found, Tensor):
        return found
    (name,) = {"logits", "last_hidden_state", "sample"} & set(found)
    values: Tensor = found[name]
    return values[inputs["attention_mask"].bool()] if "attention_mask" in inputs else values


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


def by_definition(model: Any) -> None:
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("moh_reference")
    for module in model.modules():
        if hasattr(module, "static_backend"):
            module.backend = "reference"


@torch.no_grad()
def assert_equal(model: Any, program: Any, *given: dict[str, Tensor]) -> None:
    by_definition(model)
    for inputs in given:
        assert_close(outputs(program(**inputs), inputs), outputs(model(**inputs), inputs))


@pytest.mark.parametrize(
    ("router", "unit"),
    [
        ("linear", "group_balanced"),
        pytest.param("query_norm", "group_balanced", marks=pytest.mark.slow),
        pytest.param("two_stage", "head", marks=pytest.mark.slow),
        pytest.param("query_norm", "head", marks=pytest.mark.slow),
    ],
)
def test_a_program_of_torch_export_gives_the_same(tmp_path: Path, router: str, unit: str) -> None:
    model, inputs = tiny_model(router, routing_unit=unit), ids(2, 12)
    assert_equal(model, load_exported(export_model(model, inputs, "torch", tmp_path / "out")), inputs)


BY_DEFAULT = ("encoder", "timm_vit", "own")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in BY_DEFAULT else pytest.mark.slow) for n in MODELS if n != "group_balanced"],
)
def test_other_models_are_programs_of_torch_export_too(tmp_path: Path, name: str) -> None:
    model, inputs = MODELS[name]()
    program = load_exported(export_model(model, inputs, "torch", tmp_path / "out"))
    assert_equal(model, program, inputs)
    if name == "timm_vit":  # PyTorch's own attention in both layers, which runtimes have kernels for
        called = [str(node.target) for node in program.program.graph.nodes]
        assert called.count("aten.scaled_dot_product_attention.default") == 2


@pytest.fixture
def dynamic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of `torch.export` with the shapes that those of ONNX and OpenVINO have."""
    monkeypatch.setitem(RUNTIMES, "torch", replace(RUNTIMES["torch"], is_dynamic=True))


@pytest.mark.usefixtures("dynamic")
@pytest.mark.parametrize("name", ["dit", *(pytest.param(n, marks=pytest.mark.slow) for n in ("own", "timm_vit"))])
def test_models_of_other_libraries_take_any_number_of_samples(tmp_path: Path, name: str) -> None:
    model, inputs = MODELS[name]()
    program = load_exported(export_model(model, inputs, "torch", tmp_path / "out"))
    assert_equal(model, program, inputs, *others(inputs))


class Scaled(nn.Module):
    """A model with inputs that belong to no sample, of other first sizes than the samples' number."""

    def forward(self, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return x * scale + bias


@pytest.mark.usefixtures("dynamic")
def test_inputs_of_no_sample_keep_their_shapes(tmp_path: Path) -> None:
    model, rest = Scaled().eval(), dict(scale=torch.arange(3.0), bias=torch.ones(1, 3))
    inputs = rest | dict(x=torch.randn(2, 3))  # the order is that of forward
    program = load_exported(export_model(model, inputs, "torch", tmp_path / "out"))
    assert_equal(model, program, inputs, rest | dict(x=torch.randn(5, 3)), rest | dict(x=torch.randn(1, 3)))


class Counting(nn.Module):
    """A model whose program would take two samples alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.arange(len(x))[:, None]


@pytest.mark.usefixtures("dynamic")
def test_a_model_that_fixes_the_number_of_samples_is_refused(tmp_path: Path) -> None:
    message = (
        r"any number of samples for runtime 'torch', but Counting makes the first size of x in the example a constant, as "
        r"len\(x\) does: read x.shape\[0\] instead; if not all of them have samples, take an example in which .*"
        r"\. torch.export says: \S.+"
    )
    with pytest.raises(ValueError, match=message):
        export_model(Counting().eval(), dict(x=torch.ones(2, 3)), "torch", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("runtime", FOREIGN)
def test_other_runtimes_give_the_same(tmp_path: Path, runtime: str, name: str) -> None:
    needs(runtime, RUNTIMES[runtime].needs)
    model, inputs = MODELS[name]()
    program = load_exported(export_model(model, inputs, runtime, tmp_path / "out"))
    if runtime == "onnx" and name == "group_balanced":
        kinds = [node.op_type for node in program.program.graph]
        assert "NonZero" not in kinds and kinds.count("GatherElements") >= 2 * 2  # static shapes, active queries alone
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert_equal(model, program, inputs, *(others(inputs) if RUNTIMES[runtime].is_dynamic else ()))


@pytest.mark.parametrize("runtime", [pytest.param("torch", id="spelt"), *FOREIGN])
@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_both_kinds_of_gelu_are_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: str, approximate: str
) -> None:
    """They differ by 4.7e-4 where they differ most; ExecuTorch's XNNPACK takes one for the other."""
    needs(runtime, RUNTIMES[runtime].needs)
    if runtime == "torch":  # as for ExecuTorch
        monkeypatch.setitem(RUNTIMES, "torch", replace(RUNTIMES["torch"], spells_gelu=True))
    model, inputs = nn.GELU(approximate).eval(), dict(input=torch.linspace(-4, 4, 202).reshape(2, 101))
    program = load_exported(export_model(model, inputs, runtime, tmp_path / "out"))
    assert (program(**inputs) - model(**inputs)).abs().max() <= 2e-6
    if runtime == "torch":
        called = {str(node.target) for node in program.program.graph.nodes}
        assert ("aten.gelu.default" in called) == (approximate == "none")


@pytest.mark.parametrize("runtime", [name for name in FOREIGN if RUNTIMES[name.values[0]].is_dynamic])
def test_one_row_of_positions_does_for_all_samples(tmp_path: Path, runtime: str) -> None:
    needs(runtime, RUNTIMES[runtime].needs)
    model = tiny_model()
    given = [
        dict(input_ids=ids(batch, tokens)["input_ids"], position_ids=torch.arange(tokens)[None])
        for batch, tokens in ((2, 12), (3, 7), (1, 30))
    ]
    assert_equal(model, load_exported(export_model(model, given[0], runtime, tmp_path / "out")), *given)


def others(inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """Other inputs that a program of dynamic shapes must take: texts of other lengths, and other numbers of samples."""
    if "input_ids" in inputs:
        return [ids(3, 7), ids(1, 30)]
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    three = {name: torch.cat([value[:1], value]) for name, value in tensors.items()}
    return [inputs | three, inputs | {name: value[:1] for name, value in tensors.items()}]


CACHE = 24


def visible(mask: Tensor, tokens: int) -> Tensor:
    """Which places of a cache of fixed length the last `tokens` tokens see, bool `[B, 1, tokens, CACHE]`."""
    place, own = torch.arange(CACHE), torch.arange(mask.shape[1] - tokens, mask.shape[1])[:, None]
    real = nn.functional.pad(mask, (0, CACHE - mask.shape[1])).bool()[:, None, None]
    return (place <= own) & real | (place == own)  # padding sees itself: nothing to see has no softmax


@pytest.mark.parametrize("kind", ["group_balanced", "threshold"])
@pytest.mark.parametrize("runtime", [pytest.param(name, marks=pytest.mark.slow) for name in RUNTIMES])
@torch.no_grad()
def test_a_text_is_read_and_tokens_are_decoded_with_the_cache(tmp_path: Path, runtime: str, kind: str) -> None:
    needs(runtime, RUNTIMES[runtime].needs)
    grows = RUNTIMES[runtime].is_dynamic
    model, example = MODELS[kind]()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    length = {} if grows else dict(cache_length=CACHE)
    program = load_exported(export_model(model, example, runtime, tmp_path / "out", decodes=True, **length))
    assert example["attention_mask"][1, 0] == 1 and model.generation_config.cache_implementation is None
    model.set_attn_implementation("moh_reference")
    inputs = ids(3, 9) if grows else example | dict(input_ids=example["input_ids"].flip(0))
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = model(**inputs, position_ids=positions, use_cache=True)
    new = transformers.DynamicCache if grows else partial(transformers.StaticCache, max_cache_len=CACHE)
    seen = mask if grows else visible(mask, mask.shape[1])
    given = inputs | dict(attention_mask=seen, position_ids=positions, past_key_values=new(config=program.config))
    got = program.runners["prefill"](**given)
    assert_close(outputs(got, inputs), outputs(expected, inputs))
    for token in (5, 6, 7):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        following = dict(input_ids=torch.full_like(mask[:, :1], token), position_ids=mask.sum(-1, keepdim=True) - 1)
        expected = model(**following, attention_mask=mask, past_key_values=expected.past_key_values)
        seen = mask if grows else visible(mask, 1)
        got = program.runners["decode"](**following, attention_mask=seen, past_key_values=got.past_key_values)
        assert_close(got.logits, expected.logits)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_code_on_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base_dir: Path, text_file: Path, runtime: str
) -> None:
    """The commands and blocks of docs/serving.md's section, on a tiny model; each runtime takes the blocks that it can."""
    needs(runtime, RUNTIMES[runtime].needs)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("moh.data.text.named.calibration_texts", lambda names, **_: [text_file.read_text("utf-8")])
    page = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    section = page[page.index("\n## Export") :]
    (convert,) = re.findall(r"^\$ moh (.+)$", section, re.MULTILINE)
    assert main(convert.replace("BASE", str(base_dir)).split()) == 0
    first, of_timm, loop = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    names: dict[str, Any] = {}
    exec(first.replace('"onnx"', f'"{runtime}"'), names)
    model, inputs = names["model"], names["inputs"]
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        assert_close(names["logits"][real], model(**inputs).logits[real])
    if runtime == "openvino":
        exec(of_timm, names)
        assert names["logits"].shape == (2, 1000)
    if RUNTIMES[runtime].is_dynamic:
        return
    exec(loop.replace('"executorch"', f'"{runtime}"'), names)
    model.generation_config.eos_token_id = None
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(torch.cat(names["written"], 1), expected)


def test_the_model_stays_as_it_was(tmp_path: Path) -> None:
    model = tiny_model()
    export_model(model, ids(2, 12), "torch", tmp_path / "out")
    assert model.config._attn_implementation == "moh"
    with pytest.raises(ValueError, match=r"exactly one of input_ids or inputs_embeds"):
        export_model(model, dict(attention_mask=torch.ones(2, 12)), "torch", tmp_path / "other")
    assert model.config._attn_implementation == "moh" and not (tmp_path / "other").exists()


def test_layers_keep_their_backends_and_gradients_even_if_the_export_fails(tmp_path: Path) -> None:
    model, inputs = own_layers()
    model.first.backend = "sdpa"
    model.second.requires_grad_(False)
    with pytest.raises(ValueError, match="key_padding_mask"):
        export_model(model, inputs | dict(mask=inputs["mask"][:, 1:]), "torch", tmp_path / "out")
    assert (model.first.backend, model.second.backend) == ("sdpa", None) and "forward" not in vars(model)
    assert model.first.proj.weight.requires_grad and not model.second.proj.weight.requires_grad


def damaged(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 3])


@pytest.mark.parametrize("runtime", ["torch", *FOREIGN])
def test_a_damaged_program_is_named(tmp_path: Path, runtime: str) -> None:
    needs(runtime, RUNTIMES[runtime].needs)
    folder = export_model(*vit(), runtime, tmp_path / "out")
    (name,) = (part["file"] for part in json.loads((folder / "export.json").read_text())["components"].values())
    damaged(folder / name)
    with pytest.raises(ValueError, match=rf"export '.*out' can't be loaded: {name} is damaged"):
        load_exported(folder)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"export '.*out' is incomplete: {name} is missing"):
        load_exported(folder)
