"""The code of tutorials and of self-contained guides runs, block after block, as a reader would type it.

Python is executed, files are written, and the `moh` commands of consoles run in this process. Models that a tutorial takes
from the hub are tiny local ones: a directory of the name for transformers, smaller sizes for timm. Data sets are small too, and
a recipe that comes with the package runs a few steps.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import moh
import moh.training
from local_hub import stand_in
from moh.cli import main

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "install"))

from pages import BLOCK, commands  # noqa: E402

DOCS = ROOT / "docs"
TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))
PAGES = [*TUTORIALS, DOCS / "backbone.md", DOCS / "tune.md"]
OWN_TESTS = {"serve": "tests/cli/test_serving.py"}
"""Commands that don't end by themselves -> where they are tested."""
OTHERS = {"pip": "installs what is here already", "curl": "asks the server", "python": "in a test of its own"}
"""Programs of consoles that are not run with the page, and why."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_runs(page: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = request.getfixturevalue("tmp_path")
    monkeypatch.chdir(folder)
    if page.stem in STAND_INS:
        STAND_INS[page.stem](request, folder, monkeypatch)
    text = page.read_text(encoding="utf-8")
    names: dict[str, object] = {"__name__": "tutorial"}
    assert any(kind == "python" for kind, _, _ in BLOCK.findall(text))
    for block in BLOCK.finditer(text):
        kind, title, content = block.groups()
        if title:
            Path(title).write_text(content, encoding="utf-8")
        elif kind == "console":
            run_commands(content)
        elif "BitsAndBytesConfig" in content and find_spec("bitsandbytes") is None:
            continue  # it is for Linux alone
        else:
            line = text.count("\n", 0, block.start(3))
            exec(compile("\n" * line + content, str(page), "exec"), names)


def run_commands(console: str) -> None:
    """Run the lines `$ moh ...`; a line without `$` is output."""
    for line in commands(console):
        program, *words = shlex.split(line, comments=True)
        assert program == "moh" or program in OTHERS, line
        if program == "moh" and words[0] not in OWN_TESTS:
            assert main(words) == 0, line


def test_tutorials_have_their_commands_in_consoles() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"^```(bash|sh|shell)", text, re.MULTILINE)
        assert len(commands(text)) == sum(
            len(commands(part)) for kind, _, part in BLOCK.findall(text) if kind == "console"
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    [line for page in PAGES for line in commands(page.read_text(encoding="utf-8")) if line.startswith("python ")],
)
def test_a_program_of_a_tutorial_runs(line: str, tmp_path: Path) -> None:
    program = shlex.split(line)[1]
    (tmp_path / program).symlink_to(DOCS / "tutorials" / program)  # a link of the page
    result = subprocess.run(
        [sys.executable, *shlex.split(line)[1:]], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("held-out loss") == 2 and (tmp_path / "nanogpt_moh.png").is_file()


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_commands_that_are_not_run_have_tests_of_their_own(page: Path) -> None:
    commands = re.findall(r"^\$ moh (\S+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    for command in set(commands) & set(OWN_TESTS):
        assert f'moh("{command}"' in (Path(__file__).parents[1] / OWN_TESTS[command]).read_text(encoding="utf-8")


def _language_model(request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Llama and text of 20 words in place of SmolLM2 and its reader's text; a directory in place of the hub."""
    import shutil

    stand_in(folder / "hub", monkeypatch)
    shutil.copytree(request.getfixturevalue("base_dir"), folder / "HuggingFaceTB" / "SmolLM2-135M-Instruct")
    text = request.getfixturevalue("text_file").read_text(encoding="utf-8")
    (folder / "texts").mkdir()
    for number in range(8):
        (folder / "texts" / f"{number}.txt").write_text(text, encoding="utf-8")


def _image_models(request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Narrow models with random weights in place of those with weights on the hub, and small photos of two classes."""
    pytest.importorskip("timm", reason="the vision extra is not installed")
    import timm.models._registry as registry
    from PIL import Image

    import moh.models.timm.transnext  # noqa: F401  registers its models

    narrow = {
        "moh_transnext_base_75": dict(embed_dims=(8, 16, 32, 64), depths=(1, 1, 1, 1), mlp_ratios=(1, 1, 1, 1)),
        "deit_small_patch16_224": dict(embed_dim=48, depth=2),
    }
    for name, sizes in narrow.items():
        make: Any = registry._model_entrypoints[name]

        def small(pretrained: bool = False, *, make: Any = make, sizes: Any = sizes, **options: Any) -> Any:
            options["pretrained_cfg_overlay"] = {"input_size": (3, 64, 64)}
            return make(**dict(img_size=64) | sizes | options)

        small.__module__ = make.__module__
        monkeypatch.setitem(registry._model_entrypoints, name, small)
    generator = torch.Generator().manual_seed(0)
    for kind, shade in ("cat", 0), ("dog", 128):
        (folder / "photos" / kind).mkdir(parents=True)
        for number in range(10):
            pixels = shade + torch.randint(0, 128, (24, 24, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / "photos" / kind / f"{number}.png")


def _drawing(request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small DiT in place of the published one, a few images in place of Fashion-MNIST, and two steps of the recipe."""
    diffusion(folder)
    from moh.data.images import datasets
    from moh.data.images.formats import CLASSES
    from moh.data.images.sources import TensorImages

    pixels = torch.randint(0, 256, (20, 1, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = TensorImages(pixels, torch.arange(20) % len(CLASSES), CLASSES)
    monkeypatch.setattr(datasets, "load_fashion_mnist", lambda cache_dir=None: (images, images))
    load = moh.training.load_recipe
    few = "--training.max_steps 2 --training.warmup_steps 1 --training.per_device_train_batch_size 4"
    few += " --training.samples.every 2 --training.samples.steps 2"
    monkeypatch.setattr(moh.training, "load_recipe", lambda path, words: load(path, [*words, *few.split()]))


def diffusion(folder: Path) -> None:
    """The layout of `facebook/DiT-XL-2-256`, in a directory of that name, which is found before the hub."""
    pytest.importorskip("diffusers", reason="the diffusion extra is not installed")
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=16, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=2, sample_size=8
    )
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    first, second = (block.norm1.emb for block in transformer.transformer_blocks)
    second.load_state_dict(first.state_dict())  # as in the published weights
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    vae = AutoencoderKL(block_out_channels=(8, 8), **blocks, layers_per_block=1, norm_num_groups=4)
    DiTPipeline(transformer, vae, DDIMScheduler()).save_pretrained(folder / "facebook/DiT-XL-2-256")


def _heads(request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Llama of nine heads whose tokens are bytes in place of SmolLM2, and texts of the groups' kinds."""
    pytest.importorskip("transformers", reason="the llm extra is not installed")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    sizes = dict(hidden_size=36, intermediate_size=48, num_hidden_layers=2, num_attention_heads=9)
    torch.manual_seed(0)
    dense = LlamaForCausalLM(LlamaConfig(vocab_size=len(letters), **sizes, max_position_embeddings=512))
    place = folder / "HuggingFaceTB" / "SmolLM2-135M-Instruct"
    dense.save_pretrained(place)
    PreTrainedTokenizerFast(tokenizer_object=tokens).save_pretrained(place)
    story = [f"The keeper lit lamp {number} and waited for the ship.\n\n" for number in range(60)]
    code = [f"def area_{number}(width, height):\n    return width * height\n\n\n" for number in range(60)]
    for name, text in ("story.txt", story), ("code.txt", code):
        (folder / name).write_text("".join(text), encoding="utf-8")
    for kind, suffix, texts in ("stories", "txt", story), ("src", "py", code):
        (folder / kind).mkdir()
        for number in range(4):
            (folder / kind / f"{number}.{suffix}").write_text("".join(texts[number::4]), encoding="utf-8")
    monkeypatch.setattr("moh.data.text.named.calibration_texts", lambda names, **_: ["".join(story), "".join(code)])


def _tune(request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny dense model in `smollm2` and the MoH model converted from it in `smollm2-moh`; their tokens are letters."""
    pytest.importorskip("trl", reason="the test extra is not installed")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = ["<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="</s>")
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(vocab_size=len(letters), **sizes, max_position_embeddings=256, pad_token_id=0, eos_token_id=1)
    dense = LlamaForCausalLM(config)
    made = {"smollm2": dense, "smollm2-moh": moh.convert(dense, shared_heads=1, active_heads=2, router="query_norm")}
    for name, model in made.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


STAND_INS = {"convert": _language_model, "images": _image_models, "diffusion": _drawing, "heads": _heads, "tune": _tune}
"""Name of a page -> what prepares its directory."""
