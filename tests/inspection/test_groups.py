"""Promise: load, mean gate and mean contribution equal a direct count from gates and heads, for all families."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch
from group_cases import CLASSES, SEEN, classifier, dense_classifier, diffusion_model, images, normalised
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import moh
from moh import MoHAttention, convert
from moh.inspection import (
    GroupBatch,
    GroupedInputs,
    HeadUse,
    diffusion_groups,
    image_groups,
    inspect_groups,
    text_groups,
    token_groups,
)
from moh.routing import Router

LABELS = [0, 0, 0, 1, 1, 0, 1]  # no cow


class DirectCount:
    """Counts gates by hooks on the routers, and contributions head by head from the inputs of the output projections."""

    def __init__(self, model: nn.Module) -> None:
        self.gates: list[torch.Tensor] = []
        self.norms: list[torch.Tensor] = []
        for module in model.modules():
            if not isinstance(vars(module).get("_modules", {}).get("router"), Router):
                continue
            module.router.register_forward_hook(lambda module, given, info: self.gates.append(info.gates))
            projection = module.o_proj if hasattr(module, "o_proj") else module.proj
            projection.register_forward_pre_hook(self._norms)

    def _norms(self, projection: nn.Linear, given: tuple[torch.Tensor, ...]) -> None:
        width = projection.in_features // self.gates[-1].shape[-1]
        parts = [
            given[0][..., i : i + width] @ projection.weight[:, i : i + width].T
            for i in range(0, given[0].shape[-1], width)
        ]
        self.norms.append(torch.stack([part.norm(dim=-1) for part in parts], dim=-1))

    def check(self, use: HeadUse, groups: list[int]) -> None:
        assert len(self.gates) == len(self.norms) == len(use.layers)
        for layer, (gates, norms) in enumerate(zip(self.gates, self.norms, strict=True)):
            for group in set(groups):
                chosen = torch.tensor(groups) == group
                for values, found in ((gates != 0, use.load), (gates, use.gate), (norms, use.contribution)):
                    expected = values[chosen].double().mean((0, 1))
                    torch.testing.assert_close(found[layer][group], expected, rtol=1e-5, atol=1e-7)


@pytest.fixture
def language_model(base_dir: Path):
    """The tiny Llama, converted with different heads in its two layers."""
    blocks = torch.randint(20, (5, 12), generator=torch.Generator().manual_seed(0))
    dense = AutoModelForCausalLM.from_pretrained(base_dir)
    return convert(dense, router="linear", shared_heads=1, active_heads=[1, 2], calibration=blocks, progress=False)


@torch.no_grad()
def test_texts_are_counted_as_by_hand(language_model) -> None:
    blocks = torch.randint(20, (7, 12))
    groups = {"a": blocks[:2], "b": blocks[2:]}
    use = inspect_groups(language_model, token_groups(language_model, groups, batch_size=3), progress=False)
    count = DirectCount(language_model)
    language_model(blocks)
    count.check(use, [0, 0, 1, 1, 1, 1, 1])
    assert use.inputs.tolist() == [2, 5] and use.tokens.tolist() == [[24, 24], [60, 60]]
    assert use.share() == pytest.approx([2 / 4, 3 / 4])
    assert use.configs == language_model.config.layer_configs()
    assert (use.load[1][0] - use.load[1][1]).abs().max() > 0  # the groups differ


@torch.no_grad()
def test_images_are_counted_as_by_hand() -> None:
    model, source = classifier(), images(LABELS)
    use = inspect_groups(model, image_groups(model, source, wanted=SEEN, batch_size=3), progress=False)
    count = DirectCount(model.eval())
    model(normalised(source))
    count.check(use, LABELS)
    assert use.groups == CLASSES and use.inputs.tolist() == [4, 3, 0]
    assert all(x[2].isnan().all() for x in (*use.load, *use.gate, *use.contribution))
    torch.testing.assert_close(use.mean_load()[0], use.load[0][:2].mean(0))
    assert ((use.gate[0] - use.load[0])[:2].abs() > 0.01).any()  # gates of this router are not 1


@torch.no_grad()
@pytest.mark.parametrize("by", ["timestep", "class"])
def test_noisy_images_are_counted_as_by_hand(by) -> None:
    model, labels = diffusion_model(), [0, 1, 2] * 4
    source = images(labels)
    inputs = diffusion_groups(model, source, by=by, bins=2, batch_size=5)
    use = inspect_groups(model.transformer, inputs, progress=False)
    seen = []
    model.transformer.register_forward_pre_hook(
        lambda module, given, named: seen.append((given[0], named["timestep"], named["class_labels"])), with_kwargs=True
    )
    for batch in inputs.batches():
        batch.run()
    noisy, t, classes = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert classes.tolist() == labels
    count = DirectCount(model.transformer)
    model.transformer(noisy, timestep=t, class_labels=classes)
    count.check(use, (t >= 500).long().tolist() if by == "timestep" else labels)
    assert use.groups == (("t 0-499", "t 500-999") if by == "timestep" else CLASSES)
    assert use.inputs.tolist() == ([6, 6] if by == "timestep" else [4, 4, 4])
    for label in range(3):  # time steps are spread within each class
        assert (t[classes == label] >= 500).sum() == 2


def test_noise_does_not_depend_on_the_batch_size() -> None:
    model, source = diffusion_model(), images(LABELS)
    uses = [
        inspect_groups(model.transformer, diffusion_groups(model, source, bins=2, batch_size=size), progress=False)
        for size in (2, 7)
    ]
    for a, b in zip(uses[0].contribution, uses[1].contribution, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", ["language", "images", "diffusion"])
def test_a_dense_model_is_shown_as_what_it_is(family, base_dir: Path) -> None:
    if family == "language":
        model = AutoModelForCausalLM.from_pretrained(base_dir)
        inputs = token_groups(model, {"a": torch.arange(6)[None]})
    elif family == "images":
        model = dense_classifier()
        inputs = image_groups(model, images(LABELS), wanted=SEEN)
    else:
        diffusion = diffusion_model(dense=True)
        model, inputs = diffusion.transformer, diffusion_groups(diffusion, images(LABELS), bins=1)
    use = inspect_groups(model, inputs, progress=False)
    assert use.configs == [None, None] and {row["kind"] for row in use.rows()} == {"dense"}
    assert all(row["load"] == row["gate"] == 1 and row["contribution"] > 0 for row in use.rows())


def test_a_dense_layer_among_others_is_shown_as_what_it_is() -> None:
    model = classifier()
    model.blocks[0].attn = dense_classifier().blocks[0].attn
    use = inspect_groups(model, image_groups(model, images(LABELS), wanted=SEEN), progress=False)
    assert use.configs[0] is None and use.configs[1] is not None
    assert (use.load[0][:2] == 1).all() and use.share() == pytest.approx([1, 3 / 4])


def test_texts_of_other_lengths_are_padded_and_padding_does_not_count(language_model, base_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    texts = {
        "short": ["the head sees", "a gate"],
        "long": ["the value skips a key or a token in the layer of heads"] * 2,
    }
    use = inspect_groups(language_model, text_groups(language_model, tokenizer, texts, seq_len=16, max_tokens=64))
    assert use.tokens[:, 0].tolist() == [5, 26]
    for group, members in enumerate(texts.values()):
        alone = [
            inspect_groups(
                language_model, token_groups(language_model, {"x": torch.tensor([tokenizer(t)["input_ids"]])})
            )
            for t in members
        ]
        lengths = torch.tensor([u.tokens[0, 0] for u in alone])
        for layer in range(2):
            for name in ("load", "contribution"):
                each = torch.stack([getattr(u, name)[layer][0] for u in alone])
                expected = (each * lengths[:, None]).sum(0) / lengths.sum()
                torch.testing.assert_close(getattr(use, name)[layer][group], expected, rtol=1e-5, atol=1e-7)


def test_middle_passages_of_spread_texts_are_read_and_a_texts_passages_are_one_unit(language_model, base_dir) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    words = "the a head token gate router layer value key query".split()
    texts = {"many": [" ".join([word] * 5) for word in words], "two": ["the " * 4 + "gate " * 4 + "key " * 3, "a " * 8]}
    inputs = text_groups(language_model, tokenizer, texts, seq_len=4, max_tokens=16)
    read: dict[int, list[tuple[int, list[int]]]] = {0: [], 1: []}
    seen = []
    language_model.model.register_forward_pre_hook(
        lambda module, given, named: seen.append(named["input_ids"]), with_kwargs=True
    )
    for batch in inputs.batches():
        batch.run()
        for group, unit, ids in zip(batch.groups.tolist(), batch.units.tolist(), seen[-1].tolist(), strict=True):
            read[group].append((unit, ids))
    ids = {word: tokenizer(word)["input_ids"][0] for word in words}
    assert [row for _, row in read[0]] == [[ids[word]] * 4 for word in ("a", "token", "layer", "key")]
    assert [row for _, row in read[1]] == [[ids["the"]] * 4, [ids["gate"]] * 4, [ids["a"]] * 4, [ids["a"]] * 4]
    assert [unit for unit, _ in read[1]] == [4, 4, 5, 5] and len({unit for unit, _ in read[0]}) == 4


def test_every_passage_begins_as_the_tokenizer_begins_a_text(language_model, bos_tokenizer) -> None:
    language_model.resize_token_embeddings(len(bos_tokenizer))
    seen = []
    language_model.model.register_forward_pre_hook(
        lambda module, given, named: seen.append(named["input_ids"]), with_kwargs=True
    )
    texts = {"long": ["the " * 6 + "gate " * 5], "short": ["a key"]}
    for batch in text_groups(language_model, bos_tokenizer, texts, seq_len=4, max_tokens=12).batches():
        batch.run()
    bos, the, gate, a, key = bos_tokenizer("the gate a key").input_ids
    rows = [[bos, the, the, the], [bos, a, key, 0], [bos, the, the, the], [bos, gate, gate, gate]]
    assert torch.cat(seen).tolist() == rows


def test_passages_of_a_single_text_are_units(language_model, base_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    inputs = text_groups(language_model, tokenizer, {"one": ["the head " * 8]}, seq_len=4, max_tokens=16)
    use = inspect_groups(language_model, inputs, progress=False)
    assert use.inputs.tolist() == [4] and len(use.sample.groups) == 4


def attention_inputs(layer: MoHAttention, count: int, *, size: int = 2) -> GroupedInputs:
    def batches():
        for number in range(count):
            x = torch.randn(size, 6, 16, generator=torch.Generator().manual_seed(number))
            units = torch.arange(size) + number * size
            yield GroupBatch(units % 2, units, lambda x=x: layer(x), lambda: torch.zeros(size))

    return GroupedInputs(("even", "odd"), batches, count)


def test_what_is_kept_does_not_grow_with_the_number_of_inputs() -> None:
    layer = nn.Sequential(MoHAttention(16, 4, shared_heads=1, active_heads=1))
    short, long = (inspect_groups(layer, attention_inputs(layer[0], n), keep=3, progress=False) for n in (4, 40))
    assert long.inputs.tolist() == [40, 40] and long.sample.groups.tolist() == [0, 0, 0, 1, 1, 1]
    for name in ("load", "gate", "contribution"):
        assert [x.shape for x in getattr(short, name)] == [x.shape for x in getattr(long, name)]
    assert [x.shape for x in short.sample.active] == [x.shape for x in long.sample.active]


def test_the_kept_inputs_are_whole_and_the_same_whatever_the_batch_size() -> None:
    layer = nn.Sequential(MoHAttention(16, 4, shared_heads=1, active_heads=1))
    whole = inspect_groups(layer, attention_inputs(layer[0], 12), keep=99, progress=False)
    some = inspect_groups(layer, attention_inputs(layer[0], 12), keep=4, progress=False)

    def in_pieces():
        """The inputs in reverse order, two at a time, each in two batches that count three of its tokens."""
        for number in reversed(range(12)):
            x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(number))
            units = torch.arange(2) + number * 2
            # two passes over all tokens; each counts one half
            for half in (slice(0, 3), slice(3, 6)):
                counted = torch.zeros(2, 6, dtype=torch.bool)
                counted[:, half] = True
                yield GroupBatch(units % 2, units, lambda x=x: layer(x), lambda: torch.zeros(2), counted)

    pieces = inspect_groups(layer, GroupedInputs(("even", "odd"), in_pieces, 24), keep=4, progress=False)
    assert torch.equal(some.sample.active[0], pieces.sample.active[0]) and (some.sample.tokens == 6).all()
    rows = {tuple(row) for row in whole.sample.active[0].tolist()}
    assert all(tuple(row) in rows for row in some.sample.active[0].tolist())
    torch.testing.assert_close(whole.load[0], pieces.load[0])
    other = inspect_groups(layer, attention_inputs(layer[0], 12), keep=4, seed=1, progress=False)
    assert not torch.equal(some.sample.active[0], other.sample.active[0])


def test_the_table_is_the_same_in_memory_and_on_disk(tmp_path: Path) -> None:
    import pandas

    model = classifier()
    use = inspect_groups(model, image_groups(model, images(LABELS), wanted=SEEN), progress=False)
    frame = use.to_pandas()
    assert list(frame) == ["group", "layer", "head", "kind", "load", "gate", "contribution"]
    assert len(frame) == 2 * 2 * 4  # no rows for the class without images
    use.save_csv(tmp_path / "heads.csv")
    use.save_parquet(tmp_path / "heads.parquet")
    pandas.testing.assert_frame_equal(pandas.read_parquet(tmp_path / "heads.parquet"), frame)
    with open(tmp_path / "heads.csv", newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert [float(row["load"]) for row in read] == frame["load"].tolist()
    for row in use.rows():
        group = CLASSES.index(row["group"])
        assert row["contribution"] == float(use.contribution[row["layer"]][group, row["head"]])
        assert row["kind"] == ("shared" if row["head"] == 0 else "routed")
    assert {path.name for path in tmp_path.iterdir()} == {"heads.csv", "heads.parquet"}


def test_a_table_that_cannot_take_its_place_leaves_nothing_behind(tmp_path: Path) -> None:
    model = classifier()
    use = inspect_groups(model, image_groups(model, images(LABELS), wanted=SEEN), progress=False)
    (tmp_path / "heads").mkdir()
    for save in (use.save_csv, use.save_parquet):
        with pytest.raises(OSError):
            save(tmp_path / "heads")
    assert [path.name for path in tmp_path.iterdir()] == ["heads"]


def test_selecting_takes_the_groups_inputs_along() -> None:
    model = classifier()
    use = inspect_groups(model, image_groups(model, images(LABELS), wanted=SEEN), progress=False)
    chosen = use.select(["bee", "ant"])
    assert chosen.inputs.tolist() == [3, 4] and sorted(chosen.sample.groups.tolist()) == [0] * 3 + [1] * 4
    torch.testing.assert_close(chosen.load[0], use.load[0][[1, 0]])
    bees = chosen.sample.active[0][chosen.sample.groups == 0].sum(0).double() / (3 * 5)
    torch.testing.assert_close(bees, use.load[0][1], check_dtype=False)
    with pytest.raises(ValueError, match="groups must be among ant, bee, cow, got 'yak'"):
        use.select(["yak"])


def test_counting_leaves_the_model_in_its_mode_and_without_hooks() -> None:
    model = classifier().train()
    inspect_groups(model, image_groups(model, images(LABELS), wanted=SEEN), progress=False)
    assert model.training and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with moh.record_routing(model) as routing:
        pass
    assert len(routing) == 0


def test_what_does_not_fit_is_told(language_model, base_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    model = classifier()
    for call, message in [
        (
            lambda: token_groups(language_model, {"a": torch.zeros(3, 0).long()}),
            "blocks of group 'a' must be token ids",
        ),
        (lambda: token_groups(language_model, {}), "at least one group is needed"),
        (lambda: text_groups(language_model, tokenizer, {"a": []}), "group 'a' must hold at least one text"),
        (lambda: text_groups(language_model, tokenizer, {"a": ["the"]}), "group 'a' must have at least 2 tokens"),
        (lambda: text_groups(language_model, tokenizer, {"a": ["x y"]}, seq_len=1), "seq_len must be at least 2"),
        (lambda: image_groups(model, images([]), wanted=SEEN), "dataset must hold at least one image"),
        (lambda: diffusion_groups(diffusion_model(), images(LABELS), by="colour"), "by must be 'timestep' or 'class'"),
        (lambda: diffusion_groups(diffusion_model(), images(LABELS), bins=0), "bins must be between 1 and the 1000"),
        (
            lambda: inspect_groups(model, image_groups(model, images([0]), wanted=SEEN), keep=0),
            "keep must be at least 1",
        ),
        (lambda: inspect_groups(model, GroupedInputs(("a",), lambda: iter(()), 0)), "no input could be read"),
        (lambda: GroupedInputs(("a", "a"), lambda: iter(()), 0), "different names, got 'a' twice"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_a_group_with_one_input_has_its_numbers(language_model) -> None:
    use = inspect_groups(language_model, token_groups(language_model, {"one": torch.arange(2)[None]}), progress=False)
    assert use.inputs.tolist() == [1] and not any(math.isnan(row["load"]) for row in use.rows())
