"""A directory that stands for the Hugging Face hub, `OWNER/NAME/FILE`, behind the calls that libraries make of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError

OWNER = "someone"
"""Who is logged in."""


def stand_in(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub, transformers, timm and diffusers read and write repositories below `root`."""

    def full(name: str) -> str:
        return name if "/" in name else f"{OWNER}/{name}"

    class LocalApi:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def create_repo(self, repo_id: str, **_: Any) -> Any:
            (root / full(repo_id)).mkdir(parents=True, exist_ok=True)
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{full(repo_id)}")

        def file_exists(self, repo_id: str, filename: str, **_: Any) -> bool:
            return (root / repo_id / filename).is_file()

        def hf_hub_download(self, repo_id: str, filename: str, **_: Any) -> str:
            return download(repo_id, filename)

        def upload_folder(self, *, repo_id: str, folder_path: Any, ignore_patterns: Any = (), **_: Any) -> str:
            ignored = shutil.ignore_patterns(*(ignore_patterns or ()))
            shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True, ignore=ignored)
            return repo_id

        def upload_file(self, *, path_or_fileobj: bytes, path_in_repo: str, repo_id: str, **_: Any) -> None:
            (root / repo_id / path_in_repo).write_bytes(path_or_fileobj)

        def create_commit(self, repo_id: str, operations: Any, **_: Any) -> None:
            for add in operations:
                target = root / repo_id / add.path_in_repo
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(Path(add.path_or_fileobj).read_bytes())

    def download(repo_id: str, filename: str, **_: Any) -> str:
        if not (file := root / repo_id / filename).is_file():
            raise EntryNotFoundError(f"{repo_id} has no {filename}")
        return str(file)

    def patch(module: Any, **names: Any) -> None:
        for name, value in names.items():
            monkeypatch.setattr(module, name, value)

    import diffusers.utils.hub_utils as of_diffusers
    import huggingface_hub.repocard as cards
    import timm.models._hub as of_timm
    import transformers.utils.hub as of_transformers

    patch(huggingface_hub, HfApi=LocalApi, hf_hub_download=download)
    patch(cards, hf_hub_download=download)
    patch(of_transformers, hf_api=LocalApi)
    patch(of_timm, HfApi=LocalApi, hf_hub_download=download)
    patch(
        of_diffusers,
        create_repo=LocalApi().create_repo,
        upload_folder=LocalApi().upload_folder,
        load_or_create_model_card=lambda repo, **_: ModelCard.load(repo),  # as diffusers, where there is a card
    )
