"""Promise: the dense model runs once over the calibration data, whatever is summed up, and a pass of the file gives the same."""

from __future__ import annotations

import shutil
from collections import namedtuple

import pytest
import torch

from moh import MoHConfig, convert
from moh._modes import evaluating
from moh.conversion.passes import collect_several_outputs
from moh.conversion.recording import Playback, Recording, replaced_forwards, run
from moh.conversion.transformers import DenseTextModel
from moh.routing import build_router

OPTIONS = dict(shared_heads=1, active_heads=1, progress=False)


def seen_by(dense, source):
    seen = []
    run(dense, source, lambda layer, x, z: seen.append((layer, x.clone(), z.clone())))
    return seen


def assert_equal(got, expected):
    assert [layer for layer, *_ in got] == [layer for layer, *_ in expected]
    for (_, *a), (_, *b) in zip(got, expected, strict=True):
        assert all(torch.equal(one, other) and one.dtype == other.dtype for one, other in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_second_pass_reads_what_the_first_one_saw(make_dense, tokens, dtype) -> None:
    dense = DenseTextModel(make_dense().to(dtype), "linear", copied=True)
    batches = tokens[:10].split(4)
    expected = seen_by(dense, iter(batches))
    recording = Recording(batches)
    for _ in range(2):
        assert_equal(seen_by(dense, Playback(recording, range(3))), expected)
        dense.model.forward = None  # it isn't run again
        dense.run = None
    sizes = dense.model.config  # the file is as large as docs/conversion.md says
    numbers = sizes.hidden_size + sizes.num_attention_heads * sizes.head_dim
    size = tokens[:10].numel() * sizes.num_hidden_layers * numbers * dtype.itemsize
    assert recording._file.size == size


@pytest.mark.parametrize("runs_before", [0, 1])
def test_a_pass_may_be_over_some_samples(make_dense, tokens, runs_before) -> None:
    dense = DenseTextModel(make_dense(), "linear", copied=True)
    recording = Recording(tokens[:10].split(4))
    for _ in range(runs_before):
        seen_by(dense, Playback(recording, range(3)))
    got = seen_by(dense, Playback(recording, [2, 0], {0: [1, 3], 2: [0]}))
    expected = seen_by(dense, iter([tokens[8:9], tokens[[1, 3]]]))
    for (layer, x, z), (same, *others) in zip(got, expected, strict=True):
        assert layer == same
        for one, other in zip((x, z), others, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "options", [dict(), dict(router="fixed", shared_heads=None), dict(layers="mix"), dict(shares=[0.5])]
)
def test_a_conversion_runs_the_model_once_and_needs_no_disk(make_dense, tokens, monkeypatch, options) -> None:
    runs = []
    forward = DenseTextModel.run
    monkeypatch.setattr(DenseTextModel, "run", lambda self, batch: runs.append(len(batch)) or forward(self, batch))
    models = []
    for free in (1 << 60, 0):
        usage = namedtuple("usage", "free")(free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        models.append(convert(make_dense(), calibration=tokens, **OPTIONS | options).state_dict())
        if free:
            assert sum(runs) == len(tokens)
    assert sum(runs) >= 2 * len(tokens)
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_room_is_that_of_the_batches_that_are_left(make_dense, tokens, monkeypatch) -> None:
    dense = DenseTextModel(make_dense(), "linear", copied=True)
    recording = Recording([tokens[:1, :4], tokens[:1, :16]])
    seen_by(dense, Playback(recording, [0]))
    runs = []
    forward = DenseTextModel.run
    monkeypatch.setattr(DenseTextModel, "run", lambda self, batch: runs.append(batch.shape[1]) or forward(self, batch))
    free = 3 * recording._file.size  # the long batch takes 4 times what is written
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("usage", "free")(free))
    for _ in range(2):
        seen_by(dense, Playback(recording, range(2)))
    assert runs == [16, 16]


@pytest.mark.parametrize("runs_before", [0, 1])
def test_sums_keep_no_graph_of_the_routers(make_dense, tokens, runs_before) -> None:
    dense = DenseTextModel(make_dense(), "linear", copied=True)
    recording = Recording(tokens[:10].split(4))
    for _ in range(runs_before):
        seen_by(dense, Playback(recording, range(3)))
    layers = range(len(dense.attentions))
    routers = {
        index: [build_router(MoHConfig(dense.num_heads, 1, 1, "linear"), dense.attentions[index].width)]
        for index in layers
    }
    found = collect_several_outputs(dense, routers, Playback(recording, range(3)))
    assert found and not any(
        tensor.requires_grad for sums in found.values() for layer in sums for tensor in vars(layer).values()
    )


def test_modules_get_their_own_modes_back() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(2, 2)))
    model.train()[1][0].eval()  # a frozen part
    before = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError, match="inside"), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError("inside")
    assert [module.training for module in model.modules()] == before and len(set(before)) == 2


def test_forwards_that_are_replaced_come_back_with_their_hooks() -> None:
    hooked, plain = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    hooked.forward = own = lambda x: x + 1  # as accelerate does
    with replaced_forwards([hooked, plain, hooked], lambda forward: lambda x: 2 * forward(x)):
        assert hooked(torch.zeros(1)) == 2  # once
    assert vars(hooked)["forward"] is own and "forward" not in vars(plain)
