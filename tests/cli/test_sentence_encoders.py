"""Promise: a converted directory of sentence-transformers is still one, with its pooling, normalisation and prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the llm extra is not installed")

ALL = ["--shared-heads", 1, "--active-heads", 3, "--router", "query_norm"]
SOME = ["--shared-heads", 1, "--active-heads", 1, "--router", "query_norm"]
CLASS = "sentence_transformers.models"
MODULES = ("Transformer", ""), ("Pooling", "1_Pooling"), ("Dense", "2_Dense"), ("Normalize", "3_Normalize")
PARTS: dict[str, Any] = {
    "modules.json": [dict(idx=i, name=str(i), path=path, type=f"{CLASS}.{kind}") for i, (kind, path) in enumerate(MODULES)],
    "sentence_bert_config.json": {"max_seq_length": 16, "do_lower_case": False},
    "config_sentence_transformers.json": {"prompts": {"query": "query: "}, "default_prompt_name": None},
    "1_Pooling/config.json": {"word_embedding_dimension": 32, "pooling_mode_cls_token": True},
    "2_Dense/config.json": {"in_features": 32, "out_features": 8},
    "2_Dense/model.safetensors": "weights",
}  # fmt: skip


@pytest.fixture
def encoder(base_dir: Path, tmp_path: Path) -> Path:
    """A tiny BERT with its tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base_dir)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.convert_ids_to_tokens([0])[0]
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=len(tokenizer)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def write(folder: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize("normalisation", ["a file", "an empty directory", "nothing, as git leaves it"])
def test_the_files_around_the_transformer_are_kept(
    moh, encoder: Path, tmp_path: Path, normalisation, monkeypatch
) -> None:
    files = PARTS | ({"3_Normalize/config.json": {}} if normalisation == "a file" else {})
    write(encoder, files | {"README.md": "theirs", "onnx/model.onnx": "other weights", "notes.txt": "words"})
    if normalisation == "an empty directory":
        (encoder / "3_Normalize").mkdir()
    target = tmp_path / "moh"
    for _ in range(2):  # the second time it replaces the first result
        result = moh("convert", encoder, target, *SOME)
        assert result.code == 0, result.err
        monkeypatch.setattr("moh._files._written", set())  # as in another process
    for name in files:
        assert (target / name).read_bytes() == (encoder / name).read_bytes()
    assert (target / "3_Normalize").is_dir() == (normalisation != "nothing, as git leaves it")
    assert json.loads((target / "config.json").read_text())["model_type"] == "moh_bert"
    assert not (target / "onnx").exists() and not (target / "notes.txt").exists()
    assert (target / "README.md").read_text() != "theirs"


def test_any_other_encoder_gets_no_such_files(moh, encoder: Path, tmp_path: Path) -> None:
    write(encoder, {"1_Pooling/config.json": {}})
    assert moh("convert", encoder, tmp_path / "moh", *SOME).code == 0
    assert not (tmp_path / "moh" / "1_Pooling").exists()


def modules(*paths: str) -> list[dict[str, Any]]:
    return [dict(idx=i, name=str(i), path=path, type=f"{CLASS}.X") for i, path in enumerate(paths)]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"modules.json": "["}, "modules.json can't be read as the modules of a sentence encoder"),
        ({"modules.json": []}, "modules.json can't be read as the modules of a sentence encoder"),
        ({"modules.json": modules("0_Transformer")}, "must have the transformer at the top of its directory"),
        ({"modules.json": modules("", "../secret")}, "must name folders next to it, got '../secret'"),
        ({"modules.json": modules("", "/etc")}, "must name folders next to it, got '/etc'"),
        (
            {"modules.json": modules("", "1_WordWeights"), "1_WordWeights/code.py": "x"},
            "names the part 1_WordWeights, whose file 1_WordWeights/code.py can't be taken over",
        ),
    ],
    ids=["damaged", "empty", "transformer-below", "outside", "absolute", "code"],
)
def test_what_cannot_be_kept_is_refused_before_the_model_is_converted(
    moh, encoder: Path, tmp_path: Path, files: dict[str, Any], message: str
) -> None:
    write(encoder, files)
    result = moh("convert", encoder, tmp_path / "moh", *SOME)
    assert result.code == 2 and message in result.err[-1]
    assert not (tmp_path / "moh").exists()


def test_the_files_of_a_hub_name_are_fetched(encoder: Path, monkeypatch) -> None:
    import huggingface_hub

    from moh.models.transformers.sentences import sentence_parts

    write(encoder, PARTS)
    asked: list[Any] = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **how: asked.append((name, how)) or str(encoder)
    )
    assert sentence_parts("owner/encoder").keys() == PARTS.keys()
    assert asked[0][0] == "owner/encoder" and "model.safetensors" not in asked[0][1]["allow_patterns"]
    assert sentence_parts("some/model.gguf") == {}


def test_the_library_gives_the_embeddings_of_the_dense_encoder(moh, encoder: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers import models

    torch.manual_seed(0)
    parts = [models.Transformer(str(encoder)), models.Pooling(32, "cls"), models.Dense(32, 8), models.Normalize()]
    parts[0].max_seq_length = 16
    dense = library.SentenceTransformer(modules=parts, prompts={"query": "the head "}, device="cpu")
    dense.save(str(tmp_path / "saved"))
    texts = ["the head", "a text of words that is longer than what is read " * 3]
    expected = dense.encode(texts, prompt_name="query", convert_to_tensor=True)
    found = {}
    for name, heads in (("all", ALL), ("some", SOME)):
        result = moh("convert", tmp_path / "saved", tmp_path / name, *heads)
        assert result.code == 0, result.err
        model = library.SentenceTransformer(str(tmp_path / name), device="cpu")
        assert type(model[0].auto_model).__name__ == "MoHBertModel" and len(model) == 4
        found[name] = model.encode(texts, prompt_name="query", convert_to_tensor=True)
        assert torch.allclose(found[name].norm(dim=-1), torch.ones(2))
    torch.testing.assert_close(found["all"], expected, rtol=0, atol=1e-5)
    assert not torch.allclose(found["some"], expected, atol=1e-3)
