"""Files and directories that appear whole or not at all, early checks that they can be written, and what a directory holds."""

from __future__ import annotations

import functools
import json
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path

from filelock import FileLock, Timeout

_logger = logging.getLogger(__name__)
_written: set[Path] = set()  # directories that this process made with `replacing_directory`


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; the file written there replaces `path` if the block succeeds."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        file = Path(scratch) / path.name
        yield file
        os.replace(file, path)


class LockedError(ValueError):
    """Another process holds the lock of a file or directory."""


@contextmanager
def locked(path: Path, *, waits: bool = True) -> Iterator[None]:
    """Hold the lock of a file or directory that is written in the block: one process at a time, on this machine.

    Args:
        path: its directory is made if it is missing. The lock is a file next to it, deleted afterwards.
        waits: False raises if another process holds it; by default that is logged, and waited for.

    Raises:
        LockedError: another process holds the lock, and `waits` is False.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.writing"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not waits:
            raise LockedError(f"another process is writing {path}: wait for it, or choose another place") from None
        _logger.warning("waiting for another process that is writing %s", path)
        lock.acquire()
    try:
        yield
    finally:
        with suppress(OSError):
            os.unlink(lock.lock_file)  # while it is held: whoever waits for this file takes the lock of a new one
        lock.release()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 under a temporary name next to `path`, then move it into place."""
    with replacing_file(path) as file:
        file.write_text(text, encoding="utf-8")


def check_writable(directory: str | Path, *, name: str) -> None:
    """Check that files can be created in `directory` or its nearest existing parent; leaves nothing behind.

    Raises:
        ValueError: the directory can't be written; the message begins with `name`.
    """
    existing = Path(directory).absolute()
    try:
        while not existing.exists():
            existing = existing.parent
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(f"{name} {directory} can't be written: {error.strerror} ({existing})") from None


REPORT = "conversion_report"
"""What the files of a conversion's report are called, next to the model."""

MODEL_FILES = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    "modeling_moh.py",
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    *("diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.*", "merges.txt", "*.model", "*.tiktoken", "chat_template.*", "additional_chat_templates/*.jinja"),
    *(f"{REPORT}.{kind}" for kind in ("md", "html", "json")),
    f"{REPORT}_*.png",
)
"""Files of a model and its tokenizer, as patterns; the first is the one that every model has."""

SENTENCE_FILES = (
    *("modules.json", "sentence_*_config.json", "config_sentence_transformers.json"),
    *("[0-9]_*/*.json", "[0-9]_*/model.safetensors", "[0-9]_*/pytorch_model.bin", "[0-9]_Normalize"),
)
"""Those of sentence-transformers around a transformer; a part without settings may be an empty directory."""

CARD_MARK = "<!-- Without this line, the file is kept: its directory is then not replaced by another model. -->"
"""In a README.md of ours, which is replaced together with the model as long as nobody has made it their own."""

PIPELINE_FILES = (
    *("model_index.json", "scheduler/scheduler_config.json"),
    *(f"{part}/{kind}" for part in ("transformer", "vae") for kind in ("config.json", "diffusion_pytorch_model*")),
)
"""Those of a pipeline of diffusers."""


def shard_files(index: Path) -> list[Path]:
    """The files that an index of sharded weights (`model.safetensors.index.json`) names, all next to it.

    Raises:
        ValueError: it can't be read, or names a file elsewhere (`../`, an absolute path).
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} can't be read as an index of weights: {error}") from None
    for name in names:
        if not isinstance(name, str) or name in ("", ".", "..") or {"/", "\\"} & set(name):
            raise ValueError(f"{index} must name files next to it, got {name!r}")
    return [index.with_name(name) for name in names]


def check_replaceable(
    directory: str | Path, *, name: str, kinds: Sequence[str] = MODEL_FILES, known: bool = False
) -> None:
    """Check that `directory` may be created or replaced: it is missing, empty, or an earlier result, and nothing else.

    Args:
        directory: the directory.
        name: what the message begins with.
        kinds: patterns of the files that are written there; an earlier result has the first, and no other file.
        known: the caller knows by its place that the directory is an earlier result. By default its configuration must
            name a model of this package, or its README.md have `CARD_MARK`, unless this process wrote it: somebody else's
            model is not replaced.

    Raises:
        ValueError: the directory holds something else (the message names the first such file), or can't be written.
    """
    target = Path(directory).resolve()
    if target.exists() and not target.is_dir():
        raise ValueError(f"{name} {directory} must be a directory, but it is a file")
    found = sorted(_entries(target)) if target.is_dir() else []
    others = [f for f in found if not any(_is_like(f, kind) for kind in kinds) and not _is_our_card(target / f)]
    if found and not others and not known and target not in _written:
        ours = kinds[0] in found and (_is_ours(target / kinds[0]) or _is_our_card(target / "README.md"))
        others = [] if ours else found
    if others:
        raise ValueError(
            f"{name} {directory} must be new, empty or a model's directory that this package wrote; it holds other files, "
            f"which are kept, such as {others[0]}: choose another directory, or move them"
        )
    check_writable(target.parent if target.exists() else target, name=name)


def _entries(directory: Path, within: str = "") -> Iterator[str]:
    """The files below a directory, links and empty directories, relative to it."""
    for entry in os.scandir(directory):
        if entry.is_dir(follow_symlinks=False) and any(os.scandir(entry)):
            yield from _entries(Path(entry), f"{within}{entry.name}/")
        else:
            yield within + entry.name


def _is_like(file: str, pattern: str) -> bool:
    return fnmatchcase(file, pattern) and file.count("/") == pattern.count("/")  # its * would match folders too


def _is_our_card(file: Path) -> bool:
    return (
        file.name == "README.md" and file.is_file() and CARD_MARK in file.read_text(encoding="utf-8", errors="replace")
    )


def _is_ours(file: Path) -> bool:
    """Whether the file that marks an earlier result does: a configuration by the model that it names, another by its name."""
    if file.suffix != ".json":
        return True
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(config, dict):
        return False
    names = [config.get(key) for key in ("model_type", "architecture", "_class_name")]
    if isinstance(config.get("transformer"), list):  # a pipeline's parts: [package, class]
        names += config["transformer"][-1:]
    return any(str(name).lower().startswith("moh") for name in names)


@contextmanager
def replacing_directory(
    target: Path,
    *,
    writes: bool = True,
    kinds: Sequence[str] = MODEL_FILES,
    known: bool = False,
    tag: str | None = None,
) -> Iterator[Path]:
    """Yield a directory next to `target` that replaces it if the block succeeds, and is deleted if it fails.

    A second process that writes the same target waits for the first.

    Args:
        target: the directory to create or replace.
        writes: False on the processes of a distributed run that only take part in gathering: they move nothing.
        kinds: as in `check_replaceable`.
        known: likewise.
        tag: part of a name that no other run has and all processes of a distributed run share; None makes one up.

    Raises:
        ValueError: as `check_replaceable`, before and after the block.
    """
    target = target.resolve()
    work = target.with_name(f".{target.name}.{tag or secrets.token_hex(4)}")
    scratch = work / target.name
    if not writes:
        yield scratch
        return
    check = functools.partial(check_replaceable, target, name="output directory", kinds=kinds, known=known)
    check()
    with locked(target):
        check()  # another process may just have written it
        try:
            scratch.mkdir(parents=True)
            yield scratch
            check()  # it may have got other files
            old = work / "old"
            try:
                if target.exists():
                    os.replace(target, old)  # it can't replace a directory that has files
                os.replace(scratch, target)
            except BaseException:  # an interrupt between the two as well
                if old.exists() and not target.exists():
                    os.replace(old, target)
                raise
            _written.add(target)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def is_hidden(name: str) -> bool:
    """Whether a file or directory is a tool's and no data: `.git`, `.venv`, `.ipynb_checkpoints`, `node_modules`, ..."""
    return name.startswith(".") or name == "node_modules"


def files_below(
    directory: str | Path, suffixes: tuple[str, ...], *, follow_links: bool = False
) -> list[tuple[str, str]]:
    """The files below a directory that end in one of `suffixes`, in any case, as sorted `(folder, name)`.

    What `is_hidden` is left out, and a warning names it, the first time.

    Args:
        directory: where to look.
        suffixes: in lower case.
        follow_links: also look into directories that are links.
    """
    found, hidden = [], []
    for folder, folders, names in os.walk(directory, followlinks=follow_links):
        hidden += [os.path.join(folder, name) for name in folders if is_hidden(name)]
        folders[:] = [name for name in folders if not is_hidden(name)]
        for name in names:
            if name.lower().endswith(suffixes):
                if is_hidden(name):
                    hidden.append(os.path.join(folder, name))
                else:
                    found.append((folder, name))
    _report_hidden(str(directory), tuple(sorted(os.path.relpath(path, directory) for path in hidden)))
    return sorted(found)


@functools.cache  # a directory is looked through several times
def _report_hidden(directory: str, names: Sequence[str]) -> None:
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        _logger.warning("left out of %s: %s%s (hidden, or a tool's)", directory, ", ".join(names[:5]), more)
