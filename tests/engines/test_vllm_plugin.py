"""Promises of the vLLM plugin that hold without vLLM: what it registers, what vLLM reads in our models, and the gates.

vLLM's modules are stand-ins here; `test_vllm.py` runs the real ones.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
import textwrap
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the hf extra is not installed")

import moh.models.transformers
from moh.models.transformers import FAMILIES
from moh.models.transformers.models import modeling

ROOT = Path(__file__).resolve().parents[2]
TINY = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
DECODERS = [pytest.param(f, id=f.model_type) for f in FAMILIES if "AutoModelForCausalLM" in f.models and not f.since]


class Registry:
    def __init__(self) -> None:
        self.models: dict[str, str] = {"LlamaForCausalLM": "theirs"}

    def get_supported_archs(self) -> set[str]:
        return set(self.models)

    def register_model(self, name: str, kind: str) -> None:
        self.models[name] = kind


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stand-ins for the modules of vLLM that the plugin imports, as of the second of two processes."""
    names = ["vllm", "vllm.config", "vllm.distributed", "vllm.model_executor", "vllm.model_executor.models"]
    transformers_backend = "vllm.model_executor.models.transformers"
    modules = {name: ModuleType(name) for name in (*names, transformers_backend)}
    modules["vllm"].__dict__.update(__version__="0.32.0", ModelRegistry=Registry())
    modules["vllm.config"].__dict__.update(VllmConfig=object)
    modules["vllm.distributed"].__dict__.update(
        get_tensor_model_parallel_rank=lambda: 1, get_tensor_model_parallel_world_size=lambda: 2
    )
    modules[transformers_backend].__dict__.update(
        TransformersForCausalLM=torch.nn.Module,
        vllm_attention_forward=lambda module, q, k, v, mask, **given: (
            v.transpose(1, 2).flatten(0, 1).flatten(1),
            None,
        ),
    )
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "moh.models.vllm.model", raising=False)
    yield SimpleNamespace(vllm=modules["vllm"], model=importlib.import_module("moh.models.vllm.model"))
    sys.modules.pop("moh.models.vllm.model", None)


def register() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ((name, value),) = project["entry-points"]["vllm.general_plugins"].items()
    EntryPoint(name, value, "vllm.general_plugins").load()()


def test_the_entry_point_registers_every_causal_model_and_may_run_again(engine: Any) -> None:
    register()
    register()
    names = {f.moh_models["AutoModelForCausalLM"] for f in FAMILIES if "AutoModelForCausalLM" in f.models}
    registered = engine.vllm.ModelRegistry.models
    assert set(registered) == names | {"LlamaForCausalLM"} and registered["LlamaForCausalLM"] == "theirs"
    (place,) = {registered[name] for name in names}
    module, name = place.split(":")
    assert isinstance(getattr(importlib.import_module(module), name), type)


def test_a_vllm_that_is_too_old_keeps_its_models_and_logs_the_reason(
    engine: Any, caplog: pytest.LogCaptureFixture
) -> None:
    engine.vllm.__version__ = "0.9.1"
    register()
    assert set(engine.vllm.ModelRegistry.models) == {"LlamaForCausalLM"}
    assert "MoH models need vLLM 0.32.0 or newer, and 0.9.1 is installed" in caplog.text


@pytest.mark.parametrize("version", ["0.32.0", "0.33.1rc2", "1.0", "dev"])
def test_a_newer_vllm_or_one_without_a_number_gets_them(engine: Any, version: str) -> None:
    engine.vllm.__version__ = version
    register()
    assert len(engine.vllm.ModelRegistry.models) > 1


def test_a_vllm_without_the_names_that_we_use_is_named(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.vllm.__version__ = "0.99.0"
    monkeypatch.delattr(sys.modules["vllm.model_executor.models.transformers"], "vllm_attention_forward")
    monkeypatch.delitem(sys.modules, "moh.models.vllm.model")
    with pytest.raises(
        ImportError, match=r"not supported by vLLM 0.99.0, .* differently from vLLM 0.32.0, .*vllm_attention_forward"
    ):
        importlib.import_module("moh.models.vllm.model")


@pytest.mark.parametrize(
    ("calls", "chosen", "reason"),
    [
        ((), "vllm", "it has no recursive_replace or _create_attention_instances"),
        (("recursive_replace",), "vllm", "it has no recursive_replace or _create_attention_instances"),
        (("_create_attention_instances",), "vllm", "it has no recursive_replace or _create_attention_instances"),
        (("recursive_replace", "_create_attention_instances"), "another", "its attention is not called 'vllm'"),
        (("recursive_replace", "_create_attention_instances"), "vllm", None),
    ],
)
def test_a_vllm_that_would_leave_out_the_gates_is_refused(
    engine: Any, monkeypatch: pytest.MonkeyPatch, calls: tuple[str, ...], chosen: str, reason: str | None
) -> None:
    class Theirs(torch.nn.Module):
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            super().__init__()
            self.model = moh.models.transformers.MoHLlamaModel(vllm_config.model_config.hf_config)
            self.model.config._attn_implementation = chosen
            for name in calls:
                getattr(self, name)()

        def recursive_replace(self) -> None:
            pass

        def _create_attention_instances(self, prefix: str = "") -> None:
            pass

    monkeypatch.setattr(sys.modules["vllm.model_executor.models.transformers"], "TransformersForCausalLM", Theirs)
    monkeypatch.setattr(sys.modules["vllm.distributed"], "get_tensor_model_parallel_world_size", lambda: 1)
    monkeypatch.delitem(sys.modules, "moh.models.vllm.model")
    model = importlib.import_module("moh.models.vllm.model")
    config = moh.models.transformers.MoHLlamaConfig(**TINY, shared_heads=1, active_heads=1)
    given = SimpleNamespace(model_config=SimpleNamespace(hf_config=config))
    if reason is None:
        model.MoHForCausalLM(vllm_config=given)
    else:
        with pytest.raises(ImportError, match=reason):
            model.MoHForCausalLM(vllm_config=given)


@pytest.mark.parametrize("family", DECODERS)
def test_a_family_calls_the_interface_once_with_its_scale_and_hands_on_our_gates(family: Any) -> None:
    # vLLM reads this source: a family that is written otherwise is refused by it, or would lose the gates
    forward = getattr(modeling(family), family.attention).forward
    tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "attention_interface"]
    assert len(calls) == 1
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in calls[0].keywords}
    assert given["scaling"] in ("self.scaling", "1.0")
    assert given[None] == "kwargs"


@pytest.mark.parametrize("router", ["linear", "two_stage"])
def test_every_process_weights_its_own_heads(engine: Any, router: str) -> None:
    torch.manual_seed(0)
    config = moh.models.transformers.MoHLlamaConfig(**TINY, shared_heads=1, active_heads=1, router=router)
    attention = moh.models.transformers.MoHLlamaModel(config).layers[0].self_attn
    x, heads = torch.randn(1, 5, 32), torch.randn(1, 2, 5, 8)  # 2 of 4 heads in this process
    gates = attention.router(x).gates  # [1, 5, 4]
    args, given = engine.model._with_gates(attention, (x,), {"position_embeddings": None})
    assert args[0] is x and "position_embeddings" in given
    got, _ = engine.model.attend(attention, heads, heads, heads, None, scaling=1.0, moh_gates=given["moh_gates"])
    expected = heads[0].transpose(0, 1) * gates[0, :, 2:, None]  # [5, 2, 8]: of the second process
    assert (gates[..., 2:] == 0).any() and torch.equal(got, expected.flatten(1))


def test_a_router_of_queries_gets_those_of_the_attention(engine: Any) -> None:
    torch.manual_seed(0)
    config = moh.models.transformers.MoHLlamaConfig(**TINY, shared_heads=1, active_heads=1, router="query_norm")
    attention = moh.models.transformers.MoHLlamaModel(config).layers[0].self_attn
    x, q = torch.randn(1, 5, 32), torch.randn(1, 4, 5, 8)
    assert engine.model._with_gates(attention, (x,), {}) == ((x,), {})
    got, _ = engine.model.attend(attention, q, q, q, None)
    gates = attention.router(q=q.transpose(1, 2)).gates
    assert torch.equal(got, (q.transpose(1, 2)[0] * gates[0, ..., None]).flatten(1))


@pytest.mark.parametrize(
    ("family", "router", "processes", "reason"),
    [
        ("Llama", "query_norm", 2, "router='query_norm', .* routers 'linear', 'threshold' or 'two_stage' can be split"),
        ("Qwen3", "query_norm", 1, "router must not read the queries of a Qwen3 in vLLM, got 'query_norm'"),
        ("Llama", "query_norm_rounded", 1, "router must not be 'query_norm_rounded' in vLLM"),
    ],
)
def test_a_router_of_queries_is_refused_where_it_would_get_others(
    engine: Any, family: str, router: str, processes: int, reason: str
) -> None:
    config = getattr(moh.models.transformers, f"MoH{family}Config")(
        **TINY, num_key_value_heads=4, shared_heads=1, active_heads=1, router=router
    )
    attention = getattr(moh.models.transformers, f"MoH{family}Model")(config).layers[0].self_attn
    with pytest.raises(ValueError, match=reason):
        engine.model._check(attention.router, attention.family, attention, processes)


def test_fixed_heads_are_refused(engine: Any) -> None:
    config = moh.models.transformers.MoHLlamaConfig(**TINY, shared_heads=2, router=["fixed", "linear"])
    with pytest.raises(ValueError, match=r"vLLM needs the same heads .* fixed heads .* in 1 of 2 layers"):
        engine.model.MoHForCausalLM(vllm_config=SimpleNamespace(model_config=SimpleNamespace(hf_config=config)))


def test_a_family_whose_tokens_differ_is_refused(engine: Any) -> None:
    config = moh.models.transformers.MoHGPTNeoXConfig(**TINY, shared_heads=2, active_heads=1)
    with pytest.raises(ValueError, match=r"model must be of a type among cohere, .* in vLLM, got 'gpt_neox'"):
        engine.model.MoHForCausalLM(vllm_config=SimpleNamespace(model_config=SimpleNamespace(hf_config=config)))
