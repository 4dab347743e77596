"""Promise: an engine that `make test-engines` has installed and that can't be imported fails; elsewhere its tests are skipped."""

from __future__ import annotations

import pytest

from engines_on_cpu import PROMISED, needs


@pytest.mark.parametrize(
    ("promised", "error"), [("onnx", ModuleNotFoundError), ("vllm", pytest.skip.Exception), ("", pytest.skip.Exception)]
)
def test_only_a_promised_engine_must_be_there(
    monkeypatch: pytest.MonkeyPatch, promised: str, error: type[BaseException]
) -> None:
    monkeypatch.setenv(PROMISED, promised)
    with pytest.raises(error, match="no_such_module"):
        needs("onnx", ["json", "no_such_module"])
