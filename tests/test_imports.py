"""Promises of `import moh`: it loads no extra, and the Auto classes find our models whichever package comes first."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable

import pytest

from moh._extras import require
from moh.models.registration import when_imported

TINY = dict(vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)


needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="the llm extra is not installed"
)


def in_new_interpreter(code: str, *arguments: str) -> None:
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr


@pytest.fixture
def with_torch(forks) -> Callable[..., str]:
    """Runs a program in an interpreter that has imported PyTorch and NumPy; returns what it prints."""

    def run(code: str, *arguments: str) -> str:
        result = forks.run(code, *arguments)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


MODEL_LOADS = """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
tiny = json.loads(sys.argv[1])
config = AutoConfig.for_model("moh_llama", **tiny)
model = AutoModelForCausalLM.from_config(config)
assert type(config).__name__ == "MoHLlamaConfig", type(config)
assert type(model).__name__ == "MoHLlamaForCausalLM", type(model)
assert type(AutoModel.from_config(config)).__name__ == "MoHLlamaModel"
model.save_pretrained(sys.argv[2])
assert type(AutoModelForCausalLM.from_pretrained(sys.argv[2])) is type(model)
"""


@needs_transformers
def test_moh_first_loads_no_extra_and_registers_with_transformers_later(tmp_path):
    code = """
    import json, sys
    import moh
    extras = "transformers huggingface_hub accelerate matplotlib rich peft gguf timm torchvision diffusers"
    loaded = [name for name in extras.split() if name in sys.modules]
    assert not loaded, f"import moh also imported {loaded}"
    """
    in_new_interpreter(textwrap.dedent(code) + MODEL_LOADS, json.dumps(TINY), str(tmp_path))


@needs_transformers
@pytest.mark.parametrize(
    "order", ["import moh\nimport transformers", "import transformers\nimport moh"], ids=["first", "last"]
)
@pytest.mark.parametrize("then", ["", "import transformers.processing_utils\n"], ids=["plain", "reimported"])
def test_our_classes_are_attributes_of_transformers(with_torch, order, then):
    """processing_utils puts another module `transformers` in its place, where the names must be too."""
    code = f"{order}\nfrom transformers import AutoConfig\n{then}import transformers\n"
    code += (
        "import sys\nassert sys.modules['transformers'].MoHLlamaForCausalLM.config_class.__name__ == 'MoHLlamaConfig'"
    )
    with_torch(code)


def test_torch_is_imported_when_a_name_is_first_used():
    code = """
    import sys
    import moh
    assert "torch" not in sys.modules and {*moh.__all__, "attention", "routing"} <= set(dir(moh))
    from moh import MoHAttention, moh_attention
    assert "torch" in sys.modules and moh.attention.moh_attention is moh_attention is vars(moh)["moh_attention"]
    assert moh.MoHAttention is MoHAttention and moh.routing.record_routing is moh.record_routing
    """
    in_new_interpreter(code)


@needs_transformers
@pytest.mark.parametrize(
    "name",
    [
        "checkpoints.load_published",
        "evaluation.perplexity",
        "evaluation.evaluate_images",
        "inspection.inspect_groups",
        "training.load_recipe",
        "training.MoHTrainer",
    ],
)
def test_a_package_is_imported_when_it_is_first_used(with_torch, name):
    package, function = name.split(".")
    code = f"""
    import sys
    import moh
    assert "moh.{package}" not in sys.modules and "{package}" in dir(moh)
    assert callable(moh.{package}.{function}) and vars(moh)["{package}"] is sys.modules["moh.{package}"]
    """
    with_torch(code)


@needs_transformers
@pytest.mark.parametrize(
    "first",
    [
        pytest.param("from transformers import AutoConfig, AutoModelForCausalLM", id="auto-classes-loaded"),
        pytest.param("from transformers import AutoConfig", id="only-the-configurations-loaded"),
    ],
)
def test_transformers_first_is_registered_with_at_once(with_torch, tmp_path, first):
    code = f"import json, sys\n{first}\nAutoConfig.for_model('llama')\nimport moh\n"
    with_torch(code + MODEL_LOADS, json.dumps(TINY), str(tmp_path))


needs_diffusers = pytest.mark.skipif(
    importlib.util.find_spec("diffusers") is None, reason="the diffusion extra is not installed"
)

SAVE_PIPELINE = """
import sys
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline
from moh.models.diffusers import MoHDiTTransformer2DModel
sizes = dict(num_layers=1, sample_size=4, patch_size=2, num_classes=3, shared_heads=1, active_heads=1)
vae = AutoencoderKL(
    block_out_channels=(8,), norm_num_groups=2, latent_channels=4, layers_per_block=1,
    down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
)
pipeline = DiTPipeline(MoHDiTTransformer2DModel(2, 8, **sizes), vae, DDIMScheduler())
pipeline.save_pretrained(sys.argv[1])
"""

LOAD_PIPELINE = """
import sys
{imports}
from diffusers import {pipeline} as Pipeline
pipeline = Pipeline.from_pretrained(sys.argv[1])
assert type(pipeline.transformer).__name__ == "MoHDiTTransformer2DModel", type(pipeline.transformer)
assert pipeline.transformer.share == 1.0
"""


@needs_diffusers
def test_a_pipeline_of_diffusers_is_read_after_import_moh_alone(with_torch, tmp_path):
    with_torch(SAVE_PIPELINE, str(tmp_path))
    for imports, pipeline in (
        ("import moh", "DiffusionPipeline"),
        ("from diffusers import DiTPipeline\nimport moh", "DiTPipeline"),
    ):
        with_torch(LOAD_PIPELINE.format(imports=imports, pipeline=pipeline), str(tmp_path))


def test_missing_extra_is_named():
    with pytest.raises(ImportError, match=r"needs not_there_at_all.*pip install 'mixture-of-heads\[llm\]'"):
        require("not_there_at_all.sub", extra="llm")


@pytest.mark.parametrize(
    ("missing", "statement", "extra"),
    [
        ("diffusers", "import moh.sampling", "diffusion"),
        ("timm", "import moh.training.images.run", "vision"),
        ("timm", "from moh.evaluation import evaluate_images", "vision"),
        ("transformers", "from moh.training import MoHTrainer", "train"),
        ("transformers", "import moh.conversion", "hf"),
        ("yaml", "from moh.training.parsing import read_yaml; read_yaml('a: 1')", "train"),
        ("matplotlib", "from moh.inspection.plots import new_figure; new_figure(1, 1)", "plot"),
    ],
)
def test_a_package_names_the_extra_that_it_needs(with_torch, missing, statement, extra):
    code = f"""
    import sys
    sys.modules["{missing}"] = None
    try:
        {statement}
    except ImportError as error:
        print(error)
    """
    assert f"this needs {missing}, which is not installed" in (told := with_torch(code))
    assert f"pip install 'mixture-of-heads[{extra}]'" in told


@pytest.mark.parametrize(
    "module",
    "moh.conversion moh.demo moh.evaluation moh.inspection moh.training moh.training.language.run moh.data.text.blocks".split(),
)
@needs_transformers
def test_what_the_llm_extra_is_enough_for_needs_no_other(with_torch, module):
    others = ["timm", "torchvision", "diffusers", "torch_fidelity", "lm_eval", "gradio"]
    with_torch(
        "import importlib, sys\nsys.modules.update(dict.fromkeys(sys.argv[2:]))\nimportlib.import_module(sys.argv[1])",
        module,
        *others,
    )


def test_present_module_is_returned_without_talk_of_extras():
    assert require("json.decoder", extra="llm") is sys.modules["json.decoder"]


def test_broken_package_is_not_mistaken_for_a_missing_one(tmp_path, monkeypatch):
    (tmp_path / "moh_test_broken.py").write_text("import moh_test_lost\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="moh_test_lost"):
        require("moh_test_broken", extra="llm")


@pytest.fixture
def module_on_disk(tmp_path, monkeypatch):
    name = "moh_test_watched"
    (tmp_path / f"{name}.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    finders = list(sys.meta_path)
    yield name
    sys.modules.pop(name, None)
    sys.meta_path[:] = finders


def test_callback_runs_once_after_the_module_is_there(module_on_disk):
    seen = []
    when_imported(module_on_disk, lambda: seen.append(sys.modules[module_on_disk].value))
    assert seen == []
    importlib.import_module(module_on_disk)
    importlib.import_module(module_on_disk)
    assert seen == [1]


def test_callback_runs_at_once_for_a_module_already_there(module_on_disk):
    importlib.import_module(module_on_disk)
    seen = []
    when_imported(module_on_disk, lambda: seen.append(1))
    assert seen == [1]


def test_two_callbacks_for_one_module_both_run(module_on_disk):
    seen = []
    when_imported(module_on_disk, lambda: seen.append("a"))
    when_imported(module_on_disk, lambda: seen.append("b"))
    importlib.import_module(module_on_disk)
    assert sorted(seen) == ["a", "b"]


def test_looking_for_a_module_without_importing_it_does_not_use_the_callback_up(module_on_disk):
    seen = []
    when_imported(module_on_disk, lambda: seen.append(1))
    assert importlib.util.find_spec(module_on_disk) is not None
    importlib.import_module(module_on_disk)
    assert seen == [1]


def test_unknown_attribute_of_the_package_is_an_attribute_error():
    import moh

    with pytest.raises(AttributeError, match="module 'moh' has no attribute 'nonsense'"):
        _ = moh.nonsense
