"""Promise: a page of some variants has those and no others, with or without the dense control."""

from __future__ import annotations

import re
import sys

import fashion_mnist_classification as classification
import fashion_mnist_diffusion as diffusion
import pytest

SETTINGS = dict(seeds=[0, 1], epochs=15, cpu="a CPU", torch="2", steps=10, samples=5, denoising_steps=3)


def classifier(top1: float) -> dict:
    return dict(share=0.75, parameters=10, top1=top1, top5=99.0, per_class={"Bag": 90.0}, losses=[[5, 1.0]])


@pytest.mark.parametrize(
    "variants",
    [("dense", "gates", "moh_75"), ("gates", "moh_50"), ("dense", "shared_50"), classification.DEFAULT],
    ids=str,
)
def test_the_page_of_classifiers(variants) -> None:
    runs = {name: [classifier(80.0 + place), classifier(81.0 + place)] for place, name in enumerate(variants)}
    page = classification.markdown(runs, SETTINGS, "mine")
    for name, (label, *_) in classification.VARIANTS.items():
        assert (f"| {label} |" in page) is (name in variants)
    assert ("ablation" in page) is set(classification.ABLATION).issubset(variants)
    assert ("mine_heads.png" in page) is ("moh_50" in variants) and "mine.png" in page
    assert bool(re.search(r"\| \+?-?\d\.\d\d ± 0\.00 \|", page)) is ("dense" in variants)
    assert ("The difference to dense" in page) is ("dense" in variants)
    words = "" if variants == classification.DEFAULT else f"--variants {' '.join(variants)} "
    assert f"`python experiments/fashion_mnist_classification.py {words}--seeds 0 1 --epochs 15 --name mine`" in page


@pytest.mark.parametrize(
    "variants", [("dense", "moh_75", "shared_75", "routed_75"), ("moh_75",), diffusion.DEFAULT], ids=str
)
def test_the_page_of_diffusion_models(variants) -> None:
    scores = {
        str(g): dict(frechet_distance=2.0, classifier_precision=0.7, classifier_recall=0.8) for g in diffusion.GUIDANCE
    }
    run = dict(share=0.75, parameters=10, losses=[[5, 1.0]], scores=scores)
    page = diffusion.markdown({name: [run, run] for name in variants}, SETTINGS, "mine")
    for name, (label, *_) in diffusion.VARIANTS.items():
        assert (f"| {label} |" in page) is (name in variants)
    labels = "; ".join(diffusion.VARIANTS[name][0] for name in variants)
    assert f"![Samples by {labels}; guidance off and on](../images/mine.png)" in page
    assert ("the difference to dense is taken" in page) is ("dense" in variants)
    words = "" if variants == diffusion.DEFAULT else f"--variants {' '.join(variants)} "
    given = f"{words}--seeds 0 1 --steps 10 --samples 5 --denoising-steps 3 --name mine"
    assert f"`python experiments/fashion_mnist_diffusion.py {given}`" in page


OPTIONS = {"variants": "dense", "seeds": "0", "epochs": "1", "steps": "10", "samples": "9", "denoising_steps": "3"}
CHANGED = [
    pytest.param(script, [f"--{name.replace('_', '-')}", OPTIONS[name]], id=f"{script.NAME}-{name}")
    for script in (classification, diffusion)
    for name in script.DEFAULTS
]


@pytest.mark.parametrize(("script", "changed"), CHANGED)
def test_other_options_than_those_of_the_committed_results_need_a_name(script, changed, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["script", *changed])
    with pytest.raises(SystemExit):
        script.main()
    assert f"--name must be given with {changed[0]}: without it" in capsys.readouterr().err


@pytest.mark.parametrize("name", diffusion.VARIANTS)
def test_the_ablation_of_diffusion_models_uses_as_many_heads(name) -> None:
    _, preset, heads = diffusion.VARIANTS[name]
    if heads:
        total = sum(heads["shared_heads"]) + sum(heads["active_heads"])
        assert total == (29 if preset.endswith("90") else 24) and heads["shared_heads"][-1] == 8
