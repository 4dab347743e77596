"""Promise: a head's worth is the loss with its gate forced to 0, minus the loss, for all families."""

from __future__ import annotations

import math
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from group_cases import SEEN, classifier, dense_classifier, diffusion_model, images, normalised
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from moh import convert
from moh.inspection import ablate_heads, diffusion_groups, image_groups, text_groups, token_groups
from moh.inspection.group_plots import plot_ablation
from moh.inspection.plots import save_with_data
from moh.routing import RoutingInfo

LABELS = [0, 1, 2, 1, 0]


@contextmanager
def gate_at_zero(router, head: int):
    def close(module, given, info: RoutingInfo) -> RoutingInfo:
        gates = info.gates.clone()
        gates[..., head] = 0
        return RoutingInfo(info.config, gates, info.probs)

    handle = router.register_forward_hook(close)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def check(ablation, routers, losses) -> None:
    """Compares with the same loss after setting the gate itself to 0."""
    whole = losses()
    assert ablation.loss == pytest.approx(float(whole.mean()), rel=1e-5) and ablation.units == len(whole)
    for place, router in enumerate(routers):
        for head in range(router.config.num_heads):
            with gate_at_zero(router, head):
                rise = (losses() - whole).double()
            assert float(ablation.increase[place][head]) == pytest.approx(float(rise.mean()), rel=1e-3, abs=1e-6)
            expected = float(rise.std()) / math.sqrt(len(rise))
            assert float(ablation.stderr[place][head]) == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert max(row.abs().max() for row in ablation.increase) > 1e-4


def test_of_a_language_model(base_dir: Path) -> None:
    blocks = torch.randint(20, (5, 12), generator=torch.Generator().manual_seed(0))
    dense = AutoModelForCausalLM.from_pretrained(base_dir)
    model = convert(dense, shared_heads=1, active_heads=[1, 2], calibration=blocks, progress=False)
    model.train()
    ablation = ablate_heads(
        model, token_groups(model, {"a": blocks[:2], "b": blocks[2:]}, batch_size=2), progress=False
    )
    assert model.training
    model.eval()
    check(
        ablation,
        [layer.self_attn.router for layer in model.model.layers],
        lambda: torch.stack([F.cross_entropy(model(row[None]).logits[0, :-1], row[1:]) for row in blocks]),
    )


def test_of_an_image_classifier() -> None:
    model, source = classifier().eval(), images(LABELS)
    check(
        ablate_heads(model, image_groups(model, source, wanted=SEEN, batch_size=2), progress=False),
        [block.attn.router for block in model.blocks],
        lambda: F.cross_entropy(model(normalised(source)), source.labels, reduction="none"),
    )


def test_of_a_diffusion_model() -> None:
    from moh.training.diffusion.loss import hybrid_loss

    model = diffusion_model()
    inputs = diffusion_groups(model, images(LABELS), bins=2, batch_size=9)
    seen = []
    handle = model.transformer.register_forward_pre_hook(
        lambda module, given, named: seen.append((given[0], named)), with_kwargs=True
    )
    (batch,) = inputs.batches()
    batch.run()
    handle.remove()
    noisy, named = seen[0]
    clean = images(LABELS).pixels.float() / 127.5 - 1
    kept = model.scheduler.alphas_cumprod[named["timestep"]][:, None, None, None]
    noise = (noisy - kept.sqrt() * clean) / (1 - kept).sqrt()

    def losses() -> torch.Tensor:
        output = model.transformer(noisy, **named).sample
        return hybrid_loss(output, clean, noisy, noise, named["timestep"], model.scheduler).loss

    ablation = ablate_heads(model.transformer, inputs, progress=False)
    check(ablation, [block.attn.router for block in model.transformer.transformer_blocks], losses)


def test_passages_of_one_text_count_as_one(base_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    model = AutoModelForCausalLM.from_pretrained(base_dir)
    texts = {"x": ["the head sees a gate " * 4, "a value reads the key " * 4]}
    ablation = ablate_heads(model, text_groups(model, tokenizer, texts, seq_len=5, max_tokens=20), progress=False)
    assert ablation.units == 2


def test_a_dense_models_heads_can_be_removed_and_only_those_asked_for_are() -> None:
    model = dense_classifier()
    ablation = ablate_heads(model, image_groups(model, images([0]), wanted=SEEN), layers=[1], progress=False)
    assert [(row["layer"], row["head"], row["kind"]) for row in ablation.rows()] == [(1, h, "dense") for h in range(4)]
    assert ablation.increase[0].isnan().all() and ablation.stderr[1].isnan().all()  # a single image
    with pytest.raises(ValueError, match="layers must be between 0 and 1, got 2"):
        ablate_heads(model, image_groups(model, images([0]), wanted=SEEN), layers=[2])


def test_nothing_stays_in_the_model() -> None:
    model = classifier()
    ablate_heads(model, image_groups(model, images([0, 1]), wanted=SEEN), progress=False)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_the_map_shows_the_rises_and_marks_the_clear_ones(tmp_path: Path) -> None:
    model = classifier()
    ablation = ablate_heads(model, image_groups(model, images(LABELS), wanted=SEEN), progress=False)
    figure = plot_ablation(ablation)
    assert figure.axes[0].images[0].get_array().tolist() == ablation.map().tolist()
    clear = sum(abs(row["increase"]) > 2 * row["stderr"] for row in ablation.rows())
    assert len(figure.axes[0].get_lines()) == clear
    save_with_data(figure, ablation.rows(), tmp_path / "map")
    assert {path.name for path in tmp_path.iterdir()} == {"map.png", "map.svg", "map.csv"}


@pytest.mark.parametrize("freeze", [False, True])
def test_a_groups_rise_is_that_of_its_inputs_alone(freeze) -> None:
    model, source = classifier().eval(), images(LABELS)
    inputs = image_groups(model, source, wanted=SEEN, batch_size=2)
    ablation = ablate_heads(model, inputs, freeze=freeze, progress=False)
    sizes = torch.tensor([LABELS.count(group) for group in range(len(ablation.groups))], dtype=torch.float64)
    for rise, of_groups in zip(ablation.increase, ablation.of_groups, strict=True):
        assert torch.allclose((of_groups.nan_to_num() * sizes[:, None]).sum(0) / sizes.sum(), rise)
    alone = images([label for label in LABELS if label == 2])
    if not freeze:  # a frozen output is the mean of all groups
        alone.pixels[:] = source.pixels[source.labels == 2]
        of_two = ablate_heads(model, image_groups(model, alone, wanted=SEEN), progress=False)
        assert torch.allclose(of_two.increase[0], ablation.of_groups[0][2], atol=1e-6)
    rows = ablation.group_rows()
    assert {row["group"] for row in rows} == {ablation.groups[label] for label in LABELS}
    assert len(rows) == len(set(LABELS)) * len(ablation.rows())


def test_a_frozen_head_says_its_mean_to_the_tokens_that_use_it() -> None:
    model, source = classifier().eval(), images(LABELS)
    inputs = image_groups(model, source, wanted=SEEN, batch_size=2)
    block = model.blocks[0].attn
    config, width = block.router.config, block.proj.in_features // block.router.config.num_heads
    head = config.routed_indices[0]
    seen: list[torch.Tensor] = []
    handle = block.proj.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach().clone()))
    with torch.no_grad():
        whole = F.cross_entropy(model(normalised(source)), source.labels, reduction="none")
    handle.remove()
    own = seen[0][..., head * width : (head + 1) * width]
    used = (own != 0).any(-1)
    assert 0 < used.float().mean() < 1

    def freeze(module, given):
        heads = given[0].clone()
        heads[..., head * width : (head + 1) * width] = torch.where(used[..., None], own[used].mean(0), 0)
        return (heads,)

    handle = block.proj.register_forward_pre_hook(freeze)
    with torch.no_grad():
        frozen = F.cross_entropy(model(normalised(source)), source.labels, reduction="none")
    handle.remove()
    ablation = ablate_heads(model, inputs, heads=[(0, head)], freeze=True, progress=False)
    assert float(ablation.increase[0][head]) == pytest.approx(float((frozen - whole).mean()), rel=1e-3, abs=1e-6)
    assert [(row["layer"], row["head"]) for row in ablation.rows()] == [(0, head)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(heads=[(0, 4)]), "heads of layer 0 must be between 0 and 3, got 4"),
        (dict(heads=[(2, 0)]), r"heads must be of layers between 0 and 1, got \(2, 0\)"),
        (dict(heads=[(0, 0)], layers=[0]), "either layers or heads must be given, got both"),
    ],
    ids=["head", "layer", "both"],
)
def test_heads_that_do_not_exist_are_named(options, message) -> None:
    model = dense_classifier()
    with pytest.raises(ValueError, match=message):
        ablate_heads(model, image_groups(model, images([0]), wanted=SEEN), **options)
