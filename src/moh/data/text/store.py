"""Token stores: a source tokenised once, on disk, mapped into memory; made again when the source or tokenizer changes.

A directory with `tokens.bin` (concatenated ids of all documents, uint16 or uint32, little-endian), `documents.npy` (the
offset of each, and the end) and `store.json` (what the store was made from).
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from array import array
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from moh._files import replacing_directory, write_text
from moh.data.text.blocks import packed_block
from moh.data.text.sources import Source
from moh.data.text.tokenising import DocumentTokenizer

_FORMAT = 2
_logger = logging.getLogger(__name__)


class TokenStore:
    """A store on disk, open for reading. Cheap to open and to send to other processes: it is mapped, not loaded.

    Args:
        directory: as made by `open_store`.

    Attributes:
        name: the source's, for messages.
        digest: hash of the tokens and of the documents' offsets.
        start: the token ids that every document begins with; often none.
    """

    def __init__(self, directory: Path) -> None:
        about = json.loads((directory / "store.json").read_text(encoding="utf-8"))
        self.directory = directory
        self.name: str = about["name"]
        self.digest: str = about["digest"]
        self.start: list[int] = about["start"]
        self._dtype = np.dtype(about["dtype"])
        self._map()

    def _map(self) -> None:
        self.tokens: NDArray[Any] = np.memmap(self.directory / "tokens.bin", dtype=self._dtype, mode="r")  # [T]
        self.offsets: NDArray[Any] = np.load(self.directory / "documents.npy", mmap_mode="r")  # [documents + 1]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("tokens", "offsets")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()

    @property
    def documents(self) -> int:
        return len(self.offsets) - 1


class StoredBlocks(Dataset[dict[str, Tensor]]):
    """The blocks of `seq_len` tokens of a store, in order; an incomplete last block is dropped.

    Each begins as a document does, also where it resumes one (`packed_block`).

    Raises:
        ValueError: the store has too few tokens for one block.
    """

    def __init__(self, store: TokenStore, seq_len: int) -> None:
        self._room = seq_len - len(store.start)
        if len(store.tokens) < self._room:
            raise too_short(store.name, len(store.tokens), seq_len)
        self.store = store
        self.seq_len = seq_len

    def __len__(self) -> int:
        return len(self.store.tokens) // self._room

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        begin = index * self._room
        offsets = self.store.offsets
        first, last = np.searchsorted(offsets[:-1], [begin, begin + self._room])
        starts = np.asarray(offsets[first:last]) - begin
        return packed_block(np.asarray(self.store.tokens[begin : begin + self._room]), starts, self.store.start)


_FILES = ("store.json", "tokens.bin", "documents.npy")


def open_store(source: Source, tokenizer: DocumentTokenizer, cache_dir: Path, *, progress: bool = True) -> TokenStore:
    """The store of a source, made now if it is missing or if the source or the tokenizer has changed.

    Several processes may call it at once: one makes the store, the others wait for it.

    Args:
        source: the documents.
        tokenizer: for the token ids.
        cache_dir: stores are kept in `tokens` below it.
        progress: show a progress bar (only on a terminal).

    Raises:
        ValueError: a document can't be read, or the source holds none.
    """
    made_of = {"format": _FORMAT, "tokenizer": tokenizer.identity, "source": source.identity()}
    where = json.dumps([source.key, tokenizer.identity])
    words = re.sub(r"[^\w.-]+", "-", Path(source.name).name)[:40] or "source"
    directory = cache_dir / "tokens" / f"{words}-{hashlib.sha256(where.encode()).hexdigest()[:16]}"
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(directory.with_name(f".{directory.name}.lock")):
        if (old := _made_of(directory)) != made_of:
            if old is not None:
                _logger.warning("%s has changed: it is tokenised again", source.name)
            with replacing_directory(directory, kinds=_FILES, known=True) as scratch:
                about = _write(source, tokenizer, scratch, progress)
                write_text(scratch / "store.json", json.dumps({"made_of": made_of, "name": source.name, **about}))
    return TokenStore(directory)


def too_short(name: str, tokens: int, seq_len: int) -> ValueError:
    """The error for a source without a single block."""
    return ValueError(f"{name} holds {tokens} tokens, too few for one sequence of data.seq_len = {seq_len}")


def _made_of(directory: Path) -> Any:
    try:
        return json.loads((directory / "store.json").read_text(encoding="utf-8"))["made_of"]
    except FileNotFoundError:
        return None


def _write(source: Source, tokenizer: DocumentTokenizer, directory: Path, progress: bool) -> dict[str, Any]:
    """Write tokens and the documents' offsets; returns their entries for `store.json`."""
    from tqdm.auto import tqdm

    offsets, digest = array("q", [0]), hashlib.sha256()
    with (
        open(directory / "tokens.bin", "wb") as file,
        tqdm(
            desc=f"tokenising {source.name}", unit=" tokens", unit_scale=True, disable=None if progress else True
        ) as bar,
    ):
        for _, ids in tokenizer.tokenise(source.documents()):
            data = ids.astype(ids.dtype.newbyteorder("<")).tobytes()
            file.write(data)
            digest.update(data)
            offsets.append(offsets[-1] + len(ids))
            bar.update(len(ids))
    if len(offsets) == 1:
        raise ValueError(f"{source.name} holds no text")
    places = np.array(offsets, dtype="<i8")
    digest.update(places.tobytes())
    np.save(directory / "documents.npy", places)
    return {"dtype": ids.dtype.newbyteorder("<").str, "digest": digest.hexdigest(), "start": tokenizer.start}
