"""The code of tutorials and of self-contained guides runs, block after block, as a reader would type it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import moh

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [*sorted((DOCS / "tutorials").glob("*.md")), DOCS / "backbone.md"]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


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


def heads(folder: Path) -> None:
    """A MoH model in `smollm2-moh`, whose tokens are bytes."""
    pytest.importorskip("transformers", reason="the llm extra is not installed")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    dense = LlamaForCausalLM(LlamaConfig(vocab_size=len(letters), **sizes, max_position_embeddings=256))
    model = moh.convert(dense, shared_heads=1, active_heads=1, router="query_norm")
    model.save_pretrained(folder / "smollm2-moh")
    PreTrainedTokenizerFast(tokenizer_object=tokens).save_pretrained(folder / "smollm2-moh")


MODELS: dict[str, Callable[[Path], None]] = {"diffusion": diffusion, "heads": heads}
"""Name of a tutorial -> the function that makes tiny models in its directory."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if page.stem in MODELS:
        MODELS[page.stem](tmp_path)
    text = page.read_text(encoding="utf-8")
    names: dict[str, object] = {"__name__": "tutorial"}
    blocks = list(BLOCK.finditer(text))
    assert blocks
    for block in blocks:
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], str(page), "exec"), names)
