"""What a directory of sentence-transformers holds around its transformer: pooling, normalisation, prompts.

Plain files, copied as they are, so the library itself is not needed.
"""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from moh._files import SENTENCE_FILES
from moh.models.kinds import looks_local

_MODULES = "modules.json"


def sentence_parts(source: str | Path, *, revision: str | None = None) -> dict[str, Path]:
    """The files of a sentence encoder besides its transformer and tokenizer; empty for any other model.

    Args:
        source: a local directory or a hub name.
        revision: branch, tag or commit of a hub name.

    Returns:
        path relative to the directory -> file, or an empty directory, which a part without settings may have.

    Raises:
        ValueError: modules.json can't be read, its transformer is not at the top, or a part lies elsewhere or has files of
            unknown kinds; names it.
    """
    root = Path(source).expanduser()
    if root.suffix == ".gguf":
        return {}
    if not root.is_dir():
        if looks_local(source):
            return {}
        from huggingface_hub import snapshot_download

        root = Path(snapshot_download(str(source), revision=revision, allow_patterns=list(SENTENCE_FILES)))
    if not (root / _MODULES).is_file():
        return {}
    found = {file.name: file for file in root.iterdir() if file.is_file() and _is_known(file.name)}
    for part in _parts(root / _MODULES):
        folder = root / part
        if not folder.is_dir():  # git keeps no empty directories, which normalisation has
            continue
        files = [file for file in folder.rglob("*") if file.is_file()] or [folder]
        for file in files:
            name = file.relative_to(root).as_posix()
            if file is not folder and not _is_known(name):
                raise ValueError(
                    f"{root / _MODULES} names the part {part}, whose file {name} can't be taken over: only parts with JSON and "
                    "weights can (pooling, dense layers, normalisation)"
                )
            found[name] = file
    return found


def copy_parts(parts: dict[str, Path], target: Path) -> None:
    """Copy what `sentence_parts` found into a model's directory."""
    for name, file in parts.items():
        place = target / name
        if file.is_dir():
            place.mkdir()
            continue
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, place)


def _parts(modules: Path) -> list[str]:
    """The folders of all modules but the transformer, which is the first and lies in the directory itself."""
    try:
        first, *others = [str(module["path"]) for module in json.loads(modules.read_text(encoding="utf-8"))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{modules} can't be read as the modules of a sentence encoder: {error}") from None
    if first:
        raise ValueError(
            f"{modules} must have the transformer at the top of its directory, got {first!r}: load it with "
            "sentence-transformers and save it again"
        )
    for path in others:
        if len(PurePosixPath(path).parts) != 1 or path in ("", ".", "..") or "\\" in path or path.startswith("/"):
            raise ValueError(f"{modules} must name folders next to it, got {path!r}")
    return others


def _is_known(name: str) -> bool:
    return any(fnmatchcase(name, kind) and name.count("/") == kind.count("/") for kind in SENTENCE_FILES)
