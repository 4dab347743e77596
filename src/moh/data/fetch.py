"""The built-in texts, fetched from source releases (pip) and Debian packages.

Each text's function takes the cache directory and returns the documents and a description of their source.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moh._files import locked
from moh.data.text.files import decode_utf8, html_paragraphs

_DJANGO = "5.2.8"
_DJANGO_SHA256 = "23254866a5bb9a2cfa6004e8b809ec6246eba4b58a7589bc2772f1bcc8456c7f"
_SENTENCEPIECE = "0.2.1"
_SENTENCEPIECE_SHA256 = "8138cec27c2f2282f4a34d9a016e3374cd40e5c6e9cb335063db66a0a3b71fad"
_OWN_FILES = "give your own text files instead (--data.files FILE in a recipe, else --files, or a directory)"
_MIN_DOCUMENT = 200  # characters; shorter pages are lists of links


def django_docs(cache_dir: Path) -> tuple[list[str], str]:
    """Prose of Django's documentation (reStructuredText in its source release), without the release notes."""
    archive = _release("django", _DJANGO, _DJANGO_SHA256, cache_dir)
    pages: dict[str, str] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.partition("/docs/")[2]
            file = tar.extractfile(member) if name.endswith(".txt") and not name.startswith("releases/") else None
            if file is not None:
                pages[name] = decode_utf8(file.read(), name=f"{archive}:{member.name}")
    documents = [_document(rst_paragraphs(pages[name])) for name in sorted(pages)]
    return [text for text in documents if text], f"documentation of Django {_DJANGO}"


def botchan(cache_dir: Path) -> tuple[list[str], str]:
    """Natsume Soseki's novel Botchan in English (Project Gutenberg 8868), one document per chapter.

    It is test data in SentencePiece's source release: hard-wrapped lines, with nothing between paragraphs.
    """
    archive = _release("sentencepiece", _SENTENCEPIECE, _SENTENCEPIECE_SHA256, cache_dir)
    member = f"sentencepiece-{_SENTENCEPIECE}/test/botchan.txt"
    with tarfile.open(archive) as tar:
        file = tar.extractfile(member)
        assert file is not None  # the digest is checked, so the member exists
        text = decode_utf8(file.read(), name=f"{archive}:{member}").replace("\r\n", "\n")
    novel = text.partition("--(THE END)--")[0]
    chapters = re.split(r"\nCHAPTER [IVX]+\.?\n", novel)[1:]  # before the first: title and notes
    documents = [_document(_wrapped_paragraphs(chapter)) for chapter in chapters]
    return [text for text in documents if text], f"Botchan, in the source release of sentencepiece {_SENTENCEPIECE}"


def debian_handbook(cache_dir: Path) -> tuple[list[str], str]:
    """The Debian Administrator's Handbook in English, one document per page."""
    return _debian_pages("debian-handbook", "html/en-US", cache_dir)


def anarchism(cache_dir: Path) -> tuple[list[str], str]:
    """An Anarchist FAQ, one document per section."""
    return _debian_pages("anarchism", "html", cache_dir)


def postgresql_doc(cache_dir: Path) -> tuple[list[str], str]:
    """The manual of PostgreSQL 15, one document per page."""
    return _debian_pages("postgresql-doc-15", "html", cache_dir, "**/*.html")


def python_doc(cache_dir: Path) -> tuple[list[str], str]:
    """The documentation of Python 3.11, one document per page."""
    return _debian_pages("python3.11-doc", "html", cache_dir, "**/*.html")


def linux_doc(cache_dir: Path) -> tuple[list[str], str]:
    """The documentation of Linux 6.1 in English, one document per page."""
    return _debian_pages("linux-doc-6.1", "html", cache_dir, "**/*.html", without="translations")


def rst_paragraphs(text: str) -> list[str]:
    """The running text of a reStructuredText page: unindented paragraphs and list items, without the markup.

    Directives, code and tables are left out. It is a filter for prose, not a parser.
    """
    found = []
    for block in paragraphs_unstripped(text):
        if block[0].isspace() or block.startswith((".. ", "..\n", "==", "--", "+-", "+=", "|", ":", "#")):
            continue
        for item in re.split(r"\n(?=[*-] )", block):  # a list without blank lines between its items
            line = " ".join(item.removeprefix("* ").removeprefix("- ").split())
            line = re.sub(r":[\w:+-]+:`([^`<]*?)\s*(?:<[^`>]*>)?`", _role_text, line)
            line = re.sub(r"`([^`<]+?)\s*<[^`>]*>`__?", r"\1", line)  # `text <url>`_
            line = re.sub(r"``([^`]+)``", r"\1", line)
            line = re.sub(r"`([^`]+)`_{0,2}", r"\1", line)
            line = re.sub(r"\*\*(\w[^*]*)\*\*", r"\1", line)
            line = re.sub(r"(?<![\w*])\*(\w[^*]*)\*(?![\w*])", r"\1", line)
            found.append(re.sub(r"::$", ":", line))
    return found


def _wrapped_paragraphs(text: str) -> list[str]:
    """Paragraphs of hard-wrapped text without blank lines: one ends where a sentence ends on a short line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    width = max(map(len, lines), default=0)
    found: list[list[str]] = [[]]
    for line in lines:
        found[-1].append(line)
        if len(line) < 0.8 * width and line.rstrip("\"'").endswith((".", "!", "?")):
            found.append([])
    return [" ".join(part) for part in found if part]


def paragraphs_unstripped(text: str) -> list[str]:
    """As `moh.data.text.files.paragraphs`, keeping the indentation of each paragraph's first line."""
    return [part for part in re.split(r"\n[ \t]*\n", text.replace("\r\n", "\n").strip("\n")) if part.strip()]


def _role_text(match: re.Match[str]) -> str:
    """The visible text of a role: Model for :class:`~django.db.models.Model`."""
    shown = match[1].lstrip("!")
    return shown.rpartition(".")[2] if shown.startswith("~") else shown


def _document(found: list[str]) -> str:
    """The paragraphs that are prose, joined by blank lines; empty if there is too little to be a document."""
    text = "\n\n".join(part for part in found if _is_prose(part))
    return text if len(text) >= _MIN_DOCUMENT else ""


def _is_prose(paragraph: str) -> bool:
    """Long, or ending like a sentence: titles, menus and captions are neither."""
    ends = paragraph.rstrip("\"')]\u201d\u2019").endswith((".", "!", "?", ":", ";", "\u2026"))
    return len(paragraph) >= 200 or (ends and len(paragraph) >= 40)


def _debian_pages(
    package: str, folder: str, cache_dir: Path, pattern: str = "*.html", *, without: str | None = None
) -> tuple[list[str], str]:
    """The pages of a package, except those below a folder named `without`."""
    below = Path("usr/share/doc") / package / folder
    root = Path("/")
    if not (root / below).is_dir():  # not installed, or installed without its documentation
        root = cache_dir / package
        if not (root / below).is_dir():
            apt_download(package, root, advice=f"{_OWN_FILES}, or use django-docs")
    pages = sorted(page for page in (root / below).glob(pattern) if without not in page.parts)
    documents = [_document(html_paragraphs(decode_utf8(page.read_bytes(), name=page))) for page in pages]
    documents = [text for text in documents if text]
    if not documents:
        raise RuntimeError(f"no English text in {root / below}, where the Debian package {package} should have it")
    return documents, f"Debian package {package}, {root / below}"


def _release(name: str, version: str, sha256: str, cache_dir: Path) -> Path:
    """The source release of a package, cached or fetched with pip.

    pip checks the digest and runs the package's build backend (setuptools) to learn its name.
    """
    archive = cache_dir / f"{name}-{version}.tar.gz"
    if not archive.exists():
        pip_download(f"{name}=={version}", sha256, archive)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != sha256:
        raise RuntimeError(f"{archive} has sha256 {digest}, not {sha256}: delete it and try again")
    return archive


def pip_download(requirement: str, sha256: str, target: Path, *, wheel: bool = False) -> None:
    """Fetch one release with pip, which checks the digest before opening it; the file is moved into place at the end.

    Args:
        requirement: name==version.
        sha256: digest of the file.
        target: path of the file, with the index's file name.
        wheel: fetch the wheel instead of the source release.

    Raises:
        RuntimeError: pip could not fetch it, or there is none.
    """
    with _scratch(target.parent) as scratch:
        (scratch / "requirements.txt").write_text(f"{requirement} --hash=sha256:{sha256}\n")
        options = [
            "--no-deps",
            "--only-binary" if wheel else "--no-binary",
            ":all:",
            "--require-hashes",
            "--disable-pip-version-check",
            "--quiet",
        ]
        command = [*_pip(), "download", *options, "-r", "requirements.txt"]
        _run(command, scratch, f"can't fetch {requirement} with pip")
        os.replace(scratch / target.name, target)


def _pip() -> list[str]:
    """The command that runs pip: this environment's, else the one that comes with Python or through uv, not installed.

    Environments that `uv venv` makes have none.

    Raises:
        RuntimeError: there is none.
    """
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    bundled = importlib.util.find_spec("ensurepip")
    folder = Path(bundled.origin).parent / "_bundled" if bundled is not None and bundled.origin else Path()
    if bundled is not None and (wheels := sorted(folder.glob("pip-*.whl"))):
        return [sys.executable, str(wheels[-1] / "pip")]  # a wheel is an archive that Python can run
    if (uv := shutil.which("uv")) is not None:
        return [uv, "tool", "run", "--python", sys.executable, "pip"]
    raise RuntimeError(f"{sys.prefix} has no pip to fetch files with: run `{sys.executable} -m ensurepip`")


def apt_download(package: str, target: Path, *, advice: str) -> None:
    """Fetch a Debian package without installing it, and unpack it to `target`.

    Args:
        package: its name.
        target: directory for its files, replaced if it exists.
        advice: what to do instead, for error messages.

    Raises:
        RuntimeError: this is not a Debian system, or its package archive can't be reached.
    """
    failure = f"the Debian package {package} is not installed (apt-get install {package}) and can't be fetched"
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise RuntimeError(f"{failure}: this is not a Debian or Ubuntu system; {advice}")
    before = target.exists()
    with locked(target), _scratch(target.parent) as scratch:
        if target.exists() and not before:
            return  # another process has fetched it meanwhile
        _run(["apt-get", "download", package], scratch, failure, advice)
        (archive,) = scratch.glob("*.deb")
        _run(["dpkg-deb", "-x", str(archive), "unpacked"], scratch, failure, advice)
        if target.exists():
            os.replace(target, scratch / "old")
        os.replace(scratch / "unpacked", target)


@contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".fetch-") as name:
        yield Path(name)


def _run(command: list[str], folder: Path, failure: str, advice: str = _OWN_FILES) -> None:
    print(f"fetching: {' '.join(command)}", file=sys.stderr)
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"{failure}: {error}; {advice}") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise RuntimeError(f"{failure}: {lines[-1] if lines else f'exit code {done.returncode}'}; {advice}")
