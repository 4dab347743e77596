"""Promises of what can't be exported or loaded: one clear error, with any transformers and without the runtimes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")

from moh.models import exported, runtimes  # noqa: E402
from moh.models.exported import export_model, load_exported  # noqa: E402
from moh.models.runtimes import RUNTIMES  # noqa: E402

TINY = dict(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)


def decoder() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)).eval()


def encoder() -> Any:
    return transformers.BertModel(transformers.BertConfig(**TINY)).eval()


def with_buffer(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """Parameters in float32 on the CPU, and a buffer that is not."""
    model = encoder()
    model.embeddings.register_buffer("scale", torch.ones(2, dtype=dtype, device=device))
    return model


class Around(torch.nn.Module):
    """What PEFT and others put around a model."""

    def __init__(self) -> None:
        super().__init__()
        self.base = decoder()

    def forward(self, **inputs: Tensor) -> Any:
        return self.base(**inputs)


def ids(batch: int) -> dict[str, Tensor]:
    return dict(input_ids=torch.ones(batch, 12, dtype=torch.long))


def write_manifest(folder: Path, runtime: str) -> None:
    """An export whose program is no program."""
    (folder / "program.bin").write_bytes(b"")
    manifest = dict(export_format=RUNTIMES[runtime].exporter.lower(), components=dict(model=dict(file="program.bin")))
    (folder / "export.json").write_text(json.dumps(manifest), encoding="utf-8")


@pytest.mark.parametrize(
    ("model", "runtime", "options", "message"),
    [
        (decoder, "tflite", {}, r"runtime must be one of 'onnx', 'openvino', 'executorch', 'torch', got 'tflite'"),
        (dict, "torch", {}, r"model must be a torch.nn.Module, got dict"),
        (
            lambda: Around().eval(),
            "torch",
            {},
            r"itself, got a Around around it: pass model.base, or with adapters .*merge",
        ),
        (lambda: torch.nn.Linear(2, 2).eval(), "torch", {}, r"arguments of Linear.forward by name: missing .* 'input'"),
        (encoder, "torch", dict(decodes=True), r"decodes must be False for a model that writes no text"),
        (lambda: torch.nn.Linear(2, 2).eval(), "onnx", dict(decodes=True), r"writes no text, got a Linear"),
        (decoder, "torch", dict(decodes=True), r"cache_length must be more than the example's 12 tokens .* got None"),
        (decoder, "executorch", dict(decodes=True, cache_length=12), r"for runtime 'executorch', .* got 12"),
        (
            decoder,
            "onnx",
            dict(decodes=True, cache_length=20),
            r"None but with decodes=True for 'executorch' and 'torch'",
        ),
        (decoder, "torch", dict(cache_length=20), r"cache_length must be None but with decodes=True .* got 20"),
        (lambda: decoder().train(), "torch", {}, r"model must be in evaluation mode, .* call model.eval\(\)"),
        (lambda: decoder().bfloat16(), "torch", {}, r"in float32, got \S+ in torch.bfloat16: call model.float\(\)"),
        (lambda: decoder().to("meta"), "torch", {}, r"on the CPU, got \S+ on meta: call model.cpu\(\)"),
        (lambda: with_buffer(torch.bfloat16), "torch", {}, r"in float32, got embeddings.scale in torch.bfloat16"),
        (lambda: with_buffer(torch.float64), "onnx", {}, r"in float32, got embeddings.scale in torch.float64: call"),
        (lambda: with_buffer(device="meta"), "torch", {}, r"on the CPU, got embeddings.scale on meta: call model.cpu"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    tmp_path: Path, model: Callable[[], Any], runtime: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        export_model(model(), ids(2), runtime, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
def test_one_sample_is_refused_where_any_number_should_do(tmp_path: Path, runtime: str, batch: int) -> None:
    message = rf"2 or more samples for runtime '{runtime}', .* got input_ids of shape \({batch}, 12\)"
    with pytest.raises(ValueError, match=message):
        export_model(decoder(), ids(batch), runtime, tmp_path)


class ScaleFirst(torch.nn.Module):
    """A model whose first tensor has no samples."""

    def forward(self, scale: Tensor, x: Tensor) -> Tensor:
        return x * scale


@pytest.mark.parametrize("shape", [(3,), (1, 3), (3, 3)])
def test_samples_behind_a_tensor_of_none_are_not_fixed_in_silence(tmp_path: Path, shape: tuple[int, ...]) -> None:
    inputs = dict(x=torch.ones(2, 3), scale=torch.ones(shape))
    message = (
        rf"as many samples in x as in scale, .* ScaleFirst.forward, got shapes \(2, 3\) and {re.escape(str(shape))}"
    )
    with pytest.raises(ValueError, match=message):
        export_model(ScaleFirst().eval(), inputs, "onnx", tmp_path)


def test_a_runtime_that_is_missing_is_named_with_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exported, "exporters_of", lambda runtime: SimpleNamespace())
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None if name.startswith("onnx") else object())
    with pytest.raises(ImportError, match=r"pip install onnx onnxscript onnxruntime$"):
        export_model(decoder(), ids(2), "onnx", tmp_path)


@pytest.mark.parametrize("version", ["5.17.0", "5.22.0"])
def test_a_transformers_that_is_too_old_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(transformers, "__version__", version)
    write_manifest(tmp_path, "torch")
    for call in (lambda: export_model(decoder(), ids(2), "torch", tmp_path), lambda: load_exported(tmp_path)):
        with pytest.raises(
            ImportError, match=rf"exports need transformers 5.23.0 or newer, and {version} is installed"
        ):
            call()


@pytest.mark.parametrize("name", ["ExportedModel", "OnnxExporter", "OnnxConfig"])
def test_a_transformers_that_is_too_new_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(transformers, "__version__", "6.0.0")
    others = {"ExportedModel", "OnnxExporter", "OnnxConfig"} - {name}
    monkeypatch.setattr(runtimes, "import_module", lambda _: SimpleNamespace(**dict.fromkeys(others)))
    with pytest.raises(ImportError, match=rf"'onnx' needs transformers.exporters.{name}, which transformers 6.0.0"):
        export_model(decoder(), ids(2), "onnx", tmp_path)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (None, r"directory must hold an export, .* but there is no '.*export.json'"),
        ("{", r"export.json' is damaged"),
        ("[]", r"export.json' is damaged"),
        ('{"export_format": "onnx"}', r"export.json' is damaged: 'components'"),
        (
            '{"export_format": "coreml", "components": {}}',
            r"export_format among 'onnx', 'openvino', 'executorch', 'dynamo', got 'coreml'",
        ),
    ],
)
def test_a_directory_that_holds_no_export_is_refused(tmp_path: Path, manifest: str | None, message: str) -> None:
    if manifest is not None:
        (tmp_path / "export.json").write_text(manifest, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_exported(tmp_path)


@pytest.mark.parametrize(
    ("runtime", "threads", "message"),
    [
        ("onnx", 0, r"threads must be 1 or more, or None .* got 0"),
        ("openvino", -1, r"threads must be 1 or more, or None .* got -1"),
        ("onnx", 1.5, r"threads must be 1 or more, or None .* got 1.5"),
        ("torch", 2, r"threads must be None for an export to 'torch', .* got 2; those of 'onnx' or 'openvino' can"),
        ("executorch", 1, r"threads must be None for an export to 'executorch', .* got 1"),
    ],
)
def test_threads_that_a_runtime_cannot_be_given_are_refused(
    tmp_path: Path, runtime: str, threads: Any, message: str
) -> None:
    write_manifest(tmp_path, runtime)
    with pytest.raises(ValueError, match=message):
        load_exported(tmp_path, threads=threads)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ImportError("libonnx.so: no such file"), ImportError, r"^libonnx.so: no such file$"),
        (MemoryError("8 GB"), MemoryError, r"^8 GB$"),
        (TypeError("unexpected keyword"), TypeError, r"^unexpected keyword$"),
        (RuntimeError("bad magic\nand more"), ValueError, r"program.bin is damaged, .* \(torch\): bad magic$"),
    ],
)
def test_only_what_a_file_is_to_blame_for_is_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception], message: str
) -> None:
    def from_pretrained(*args: Any, **options: Any) -> None:
        raise error

    loader = SimpleNamespace(ExportedModel=SimpleNamespace(from_pretrained=from_pretrained))
    monkeypatch.setattr(exported, "exporters_of", lambda runtime: loader)
    write_manifest(tmp_path, "torch")
    with pytest.raises(kind, match=message):
        load_exported(tmp_path)


def test_an_input_that_forward_only_takes_as_one_of_any_others_is_refused(tmp_path: Path) -> None:
    inputs = ids(2) | {"atention_mask": torch.ones(2, 12, dtype=torch.long)}
    with pytest.raises(
        ValueError, match=r"inputs must be .*forward by name: got an unexpected keyword argument 'atention_mask'"
    ):
        export_model(decoder(), inputs, "torch", tmp_path / "out")
    assert not list(tmp_path.iterdir())
