"""Promises of exported code: every family and router gives the same outputs in a process that can't import our package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the llm extra is not installed")

import transformers

from moh import convert
from moh.config import ROUTERS, ROUTING_UNITS
from moh.models.transformers.remote_code import CODE_FILE, code_for, export_remote_code

sys.path.insert(0, str(Path(__file__).parent))  # lets the tests import the helpers of this folder

from family_cases import (
    ALL,
    BY_TYPE,
    DECODERS,
    IMAGES,
    NO_DROPOUT,
    TRAINED_HEAD,
    dense_model,
    images,
    inputs_of,
    token_ids,
)

UNEVEN = [1, 2]
OWN_QUERIES = [t for t, family in BY_TYPE.items() if not family.query_norm or t == "phi"]  # not normalised


def case(name: str, model_type: str, auto: str | None = None, *, train: bool = False, **options: Any) -> Any:
    return pytest.param(name, model_type, auto or TRAINED_HEAD[model_type], train, options, id=name)


CASES = [
    *(case(t, t, shared_heads=1, active_heads=1 if t == "lfm3" else UNEVEN) for t in ALL),
    *(case(f"{t}-query_norm", t, router="query_norm", shared_heads=1, active_heads=2) for t in OWN_QUERIES),
    *(case(f"llama-{r}-trained", "llama", router=r, shared_heads=2, active_heads=1, train=True) for r in ROUTERS),
    *(
        case(f"qwen2-{unit}-{router}", "qwen2", router=router, routing_unit=unit, shared_heads=0, active_heads=2)
        for unit in ROUTING_UNITS
        for router in ("linear", "two_stage")
    ),
    case("qwen2-group_balanced-shared", "qwen2", routing_unit="group_balanced", shared_heads=2, active_heads=2),
    case("llama-shares", "llama", shared_heads=1, active_heads=2, shares=[0.5, 0.75]),
    case("mistral-none-shared", "mistral", router="two_stage", shared_heads=0, active_heads=1),
    case("mistral-all-shared", "mistral", router="two_stage", shared_heads=3, active_heads=0),
    *(case(f"{t}-bare", t, "AutoModel", shared_heads=1, active_heads=2) for t in ("llama", "bert", "gpt2")),
    case("deit-teacher", "deit", shared_heads=1, active_heads=2, dense="DeiTForImageClassificationWithTeacher"),
    case("phi3-classifier", "phi3", "AutoModelForSequenceClassification", shared_heads=1, active_heads=2),
]


def converted(model_type: str, auto: str, options: dict[str, Any]) -> Any:
    dense = dense_model(model_type, auto, **NO_DROPOUT.get(model_type, {}))
    options = dict(router="linear", allocation="even", progress=False) | options
    if other := options.pop("dense", None):
        dense = getattr(transformers, other)(dense.config).eval()
    return convert(dense, calibration=images() if model_type in IMAGES else token_ids(), **options)


def inputs_for(model_type: str) -> dict[str, torch.Tensor]:
    return inputs_of(model_type, padded=model_type in DECODERS)


def process(script: str | Path, *arguments: object, modules: Path) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ, HF_MODULES_CACHE=str(modules), OMP_NUM_THREADS="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
    command = [sys.executable, *(["-c"] if isinstance(script, str) else []), str(script), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases, saved, exported and run by one process without our package."""
    root = tmp_path_factory.mktemp("remote")
    for param in CASES:
        name, model_type, auto, train, options = param.values
        torch.manual_seed(0)
        model = converted(model_type, auto, options)
        model.save_pretrained(root / name / "model")
        export_remote_code(root / name / "model")
        generate = model_type in DECODERS and auto == "AutoModelForCausalLM"
        inputs = inputs_for(model_type)
        torch.save(dict(auto=auto, inputs=inputs, generate=generate, train=train), root / name / "case.pt")
    done = process(Path(__file__).with_name("run_remote_code.py"), root, modules=root / "modules")
    assert done.returncode == 0, done.stderr[-3000:]
    return root


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("name", "model_type", "auto", "train", "options"), CASES)
def test_the_code_gives_the_packages_outputs_without_the_package(ran, name, model_type, auto, train, options) -> None:
    error = ran / name / "error.txt"
    assert not error.exists(), error.read_text()
    got = torch.load(ran / name / "got.pt")
    inputs = inputs_for(model_type)
    real = inputs.get("attention_mask", torch.ones(1)).bool() if auto in ("AutoModel", "AutoModelForCausalLM") else None
    for folder in ("model", "again"):  # what was saved without the package is a model of it too
        model = getattr(transformers, auto).from_pretrained(ran / name / folder)
        assert type(model).__module__ == "moh.models.transformers"
        with torch.no_grad():
            expected = model(**inputs)[0]
        for output in (got["output"], got["again"]):
            kept = real is not None and real.shape == output.shape[:2]
            assert_same(output[real] if kept else output, expected[real] if kept else expected)
    if "generated" in got:
        assert torch.equal(got["generated"], model.generate(**inputs, max_new_tokens=6, do_sample=False))
    if train:
        model.train()(**inputs)[0].square().mean().backward()
        expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert expected.keys() == got["gradients"].keys()
        largest = max(gradient.abs().max() for gradient in expected.values())
        for key, gradient in expected.items():
            assert (got["gradients"][key] - gradient).abs().max() <= 1e-5 * largest, key


def test_the_dial_of_several_shares_survives_saving_without_the_package(ran) -> None:
    models = [transformers.AutoModelForCausalLM.from_pretrained(ran / "llama-shares" / f) for f in ("model", "again")]
    outputs = []
    for model in models:
        model.set_active_heads(0.5)
        outputs.append(model(**inputs_for("llama")).logits)
    assert torch.equal(*outputs)


LOAD = """
import sys, torch, transformers
config = transformers.AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__ == "moh.models.transformers" == type(config).__module__, type(model)
model.save_pretrained(sys.argv[2])
"""


def test_where_the_package_is_installed_its_classes_are_used_and_the_code_is_kept(ran, tmp_path) -> None:
    done = process(LOAD, ran / "llama" / "model", tmp_path / "again", modules=tmp_path / "modules")
    assert done.returncode == 0, done.stderr[-3000:]
    for file in (CODE_FILE, "config.json"):
        before, after = ((folder / file).read_text() for folder in (ran / "llama" / "model", tmp_path / "again"))
        assert before == after if file == CODE_FILE else json.loads(before)["auto_map"] == json.loads(after)["auto_map"]
    assert sorted(p.name for p in (tmp_path / "again").glob("*.py")) == [CODE_FILE]


def test_without_the_package_transformers_asks_for_trust_and_not_for_a_newer_version(ran, tmp_path) -> None:
    script = "import sys; sys.modules['moh'] = None; import transformers; transformers.AutoConfig.from_pretrained(sys.argv[1])"
    done = process(script, ran / "llama" / "model", modules=tmp_path)
    assert done.returncode and "trust_remote_code=True" in done.stderr and "pgrade" not in done.stderr


def test_the_card_of_ours_says_how_to_load_without_the_package_and_another_stays(ran, tmp_path) -> None:
    model = converted("llama", "AutoModelForCausalLM", dict(shared_heads=1, active_heads=1))
    model.save_pretrained(tmp_path / "model")
    export_remote_code(tmp_path / "model", tmp_path / "copy")
    assert not (tmp_path / "model" / CODE_FILE).exists()
    assert "trust_remote_code=True" in (tmp_path / "copy" / "README.md").read_text()
    (tmp_path / "model" / "README.md").write_text("Our own words.")
    export_remote_code(tmp_path / "model")
    assert (tmp_path / "model" / "README.md").read_text() == "Our own words."


@pytest.mark.parametrize("config", [None, {"model_type": "llama"}, {"architecture": "moh_vit"}], ids=str)
def test_another_model_than_ours_is_refused(tmp_path, config) -> None:
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="directory must hold a MoH model of transformers"):
        export_remote_code(tmp_path)
    assert not (tmp_path / CODE_FILE).exists()


@pytest.mark.parametrize("router", ["fixed", ["linear", "fixed"]], ids=str)
def test_layers_without_all_heads_are_refused(tmp_path, router) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "moh_llama", "router": router}))
    with pytest.raises(ValueError, match=r"router must be one of .* in every layer, got 'fixed'"):
        export_remote_code(tmp_path)


@pytest.mark.parametrize("model_type", ALL)
def test_the_code_compiles_and_names_every_class_of_the_family(model_type) -> None:
    family, found = BY_TYPE[model_type], {"__name__": "code"}
    exec(compile(code_for(family, family.models["AutoModel"]), CODE_FILE, "exec"), found)
    assert {family.moh_config, *family.moh_models.values()} <= found.keys()
