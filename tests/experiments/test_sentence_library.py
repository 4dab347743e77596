"""A converted sentence encoder gives the same embeddings in sentence-transformers with our package and with the exported code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sentence_library import encode, save
from transformers import AutoTokenizer, BertConfig, BertModel

import moh


@pytest.mark.slow
def test_the_library_gives_the_same_embeddings_with_and_without_our_package(base_dir: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers import models

    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.convert_ids_to_tokens([0])[0]
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    torch.manual_seed(0)
    dense = BertModel(BertConfig(**sizes, vocab_size=len(tokenizer)))
    for parameter in dense.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    dense.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    parts = [
        models.Transformer(str(tmp_path / "dense")),
        models.Pooling(32),
        models.Normalize(),
    ]
    library.SentenceTransformer(modules=parts, device="cpu").save(str(tmp_path / "source"))

    converted = moh.convert(dense, shared_heads=1, active_heads=1, router="query_norm")
    save(converted, tokenizer, tmp_path / "source", tmp_path / "moh")
    texts = ["the head", "a text of words that is longer than the other"]
    with_package, without = (encode(tmp_path / "moh", texts, with_package=package) for package in (True, False))
    original = encode(tmp_path / "source", texts)
    torch.testing.assert_close(without, with_package, rtol=0, atol=1e-5)
    assert not torch.allclose(original, with_package, atol=1e-3)
    assert torch.allclose(with_package.norm(dim=-1), torch.ones(2))
