"""Promises of model cards and of pushing: what they state, whose cards stay, and that every library loads what was pushed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from local_hub import OWNER, stand_in
from moh._files import CARD_MARK
from moh.config import MoHConfig
from moh.models.card import describe, push_directory, write_card
from moh.models.transformers.remote_code import export_remote_code


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    stand_in(tmp_path / "hub", monkeypatch)
    return tmp_path / "hub"


LAYERS = [MoHConfig(4, 1, 2), MoHConfig(4, 2, 1)]


@pytest.fixture
def saved(tiny_model, tmp_path: Path) -> Path:
    target = tmp_path / "tiny-moh"
    tiny_model("Qwen2").save_pretrained(target)
    return target


def test_a_card_states_base_licence_heads_facts_and_results(saved: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: some\nlicense_link: https://a.b\n---\nBase.")
    facts = {"calibrated on": "up to 12,288 tokens of botchan"}
    assert write_card(saved, LAYERS, base=base, facts=facts, results=[("perplexity of botchan", "21.30", "20.90")])
    card = ModelCard.load(saved / "README.md")
    data = card.data
    assert (data.library_name, data.tags, data.pipeline_tag) == (
        "transformers",
        ["mixture-of-heads"],
        "text-generation",
    )
    assert (data.license, data.license_name, data.license_link) == ("other", "some", "https://a.b")
    assert "| base model | `base` |" in card.text and str(tmp_path) not in card.text and data.base_model is None
    assert "| shared by all tokens | 1, 2 |" in card.text and "| chosen by each token | 2, 1 |" in card.text
    assert "| heads per layer | 4 |" in card.text and "each token uses 75 % of the attention heads" in card.text
    assert "12,288 tokens of botchan" in card.text and "| perplexity of botchan | 21.30 | 20.90 |" in card.text


def test_a_card_states_that_heads_above_a_threshold_are_an_average(saved: Path) -> None:
    assert write_card(saved, [MoHConfig(4, 1, 2, "threshold")] * 2)
    text = (saved / "README.md").read_text()
    assert "tokens use 75 % of the attention heads on average." in text and "each token" not in text
    assert "| chosen by a token on average | 2 |" in text


def test_a_base_on_the_hub_is_named_with_its_licence(saved: Path, hub: Path) -> None:
    (hub / "theirs" / "dense").mkdir(parents=True)
    (hub / "theirs" / "dense" / "README.md").write_text("---\nlicense: apache-2.0\n---\nDense.")
    write_card(saved, LAYERS, base="theirs/dense")
    data = ModelCard.load(saved / "README.md").data
    assert (data.base_model, data.license) == ("theirs/dense", "apache-2.0")
    write_card(saved, LAYERS, base="theirs/without-a-card")
    data = ModelCard.load(saved / "README.md").data
    assert (data.base_model, data.license) == ("theirs/without-a-card", None)


def test_another_card_is_never_overwritten(saved: Path, tiny_model) -> None:
    (saved / "README.md").write_text("Our own words.")
    assert not write_card(saved, LAYERS)
    tiny_model("Qwen2").save_pretrained(saved)
    assert (saved / "README.md").read_text() == "Our own words."


def test_what_is_described_is_in_the_card_that_saving_writes(tiny_model, tmp_path: Path) -> None:
    model = tiny_model()
    describe(model, base="theirs/dense", facts={"calibrated on": "much"})
    describe(model, facts={"calibrated on": "12 tokens"})
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "base_model: theirs/dense" in text and "| calibrated on | 12 tokens |" in text and "much" not in text


def test_a_directory_is_pushed_whole_under_its_name_and_its_card_names_it(saved: Path, hub: Path) -> None:
    (saved / "tokenizer.json").write_text("{}")
    assert push_directory(saved) == f"{OWNER}/tiny-moh"
    there = hub / OWNER / "tiny-moh"
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= {p.name for p in there.iterdir()}
    assert f'from_pretrained("{OWNER}/tiny-moh")' in (there / "README.md").read_text()


@pytest.mark.parametrize("kind", ["transformers", "remote code", "timm", "diffusers", "a pipeline"])
def test_a_directory_pushed_again_under_another_name_is_named_so(kind: str, saved: Path, hub: Path, tmp_path) -> None:
    if kind == "remote code":
        export_remote_code(saved)
    elif kind != "transformers":
        saved = tmp_path / "drawing-moh"
        saved.mkdir()
        config = {"timm": {"architecture": "moh_vit_micro_patch4_28_75"}}.get(kind, {"_class_name": "MoHDiT"})
        (saved / "config.json").write_text(json.dumps(config))
        if kind == "a pipeline":
            (saved / "model_index.json").write_text("{}")
        write_card(saved, LAYERS, base="theirs/dense")
    assert f"/{saved.name}" not in (saved / "README.md").read_text()
    push_directory(saved)
    first = (saved / "README.md").read_text()
    push_directory(saved, "other/name")
    for folder in (saved, hub / "other" / "name"):
        text = (folder / "README.md").read_text()
        assert text == first.replace(f"{OWNER}/{saved.name}", "other/name") != first
        assert kind in ("transformers", "remote code") or "base_model: theirs/dense" in text


@pytest.mark.parametrize(("before", "kept"), [("Their card.", True), (f"{CARD_MARK}\nAn older one.", False)])
def test_a_card_on_the_hub_stays_unless_it_is_ours(saved: Path, hub: Path, before: str, kept: bool) -> None:
    there = hub / OWNER / "tiny-moh"
    there.mkdir(parents=True)
    (there / "README.md").write_text(before)
    push_directory(saved)
    assert ((there / "README.md").read_text() == before) == kept
    assert (there / "config.json").is_file()


def assert_our_card(folder: Path) -> None:
    text = (folder / "README.md").read_text()
    assert CARD_MARK in text and f"{folder.parent.name}/{folder.name}" in text and "mixture-of-heads" in text


def test_push_to_hub_of_transformers_keeps_our_card(tiny_model, tokens, hub: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_model()
    model.push_to_hub("mine")
    assert_our_card(hub / OWNER / "mine")
    loaded = AutoModelForCausalLM.from_pretrained(hub / OWNER / "mine")
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    (hub / OWNER / "mine" / "README.md").write_text("---\ntags: [theirs]\n---\nTheirs.")
    model.push_to_hub("mine")
    assert "Theirs." in (hub / OWNER / "mine" / "README.md").read_text()


def test_push_to_hub_of_timm_keeps_our_card(hub: Path) -> None:
    timm = pytest.importorskip("timm")
    from moh.models.timm import push_to_hub

    sizes = dict(img_size=8, patch_size=4, embed_dim=20, depth=1, num_heads=5)
    model = timm.create_model("moh_vit_micro_patch4_28_75", **sizes).eval()
    push_to_hub(model, "mine")
    assert_our_card(hub / OWNER / "mine")
    loaded = timm.create_model(f"local-dir:{hub / OWNER / 'mine'}", pretrained=True).eval()
    image = torch.randn(1, 3, 8, 8)
    assert torch.equal(loaded(image), model(image))


def test_push_to_hub_of_diffusers_keeps_our_card(hub: Path) -> None:
    pytest.importorskip("diffusers")
    from moh.models.diffusers import MoHDiTTransformer2DModel

    sizes = dict(num_attention_heads=4, attention_head_dim=4, num_layers=1, sample_size=4, num_classes=3, in_channels=1)
    model = MoHDiTTransformer2DModel(**sizes, patch_size=2, shared_heads=1, active_heads=2)
    model.push_to_hub("mine")
    assert_our_card(hub / OWNER / "mine")
    loaded = MoHDiTTransformer2DModel.from_pretrained(hub / OWNER / "mine")
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), model.parameters(), strict=True))


def test_a_process_that_is_not_the_main_one_writes_nothing(tiny_model, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model", is_main_process=False)
    assert not (tmp_path / "model").exists() or "README.md" not in {
        path.name for path in (tmp_path / "model").iterdir()
    }


def test_a_push_while_saving_has_the_card(tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pushed = tiny_model(), []
    monkeypatch.setattr(type(model), "push_to_hub", lambda self, name, **options: pushed.append((name, options)))
    asked = dict(private=True, create_pr=True, commit_description="why", max_shard_size="1GB", token="secret")
    model.save_pretrained(tmp_path / "other", is_main_process=False, push_to_hub=True, repo_id="me/model", **asked)
    assert pushed == []
    model.save_pretrained(tmp_path / "model", push_to_hub=True, repo_id="me/model", **asked)
    assert pushed == [("me/model", asked)]
    assert (tmp_path / "model" / "README.md").is_file()


def test_a_card_of_ours_follows_a_model_of_which_something_is_known(tiny_model, tmp_path: Path) -> None:
    for tokens in ("12", "24"):
        model = tiny_model()
        describe(model, facts={"calibrated on": f"{tokens} tokens"})
        model.save_pretrained(tmp_path)
        assert f"| calibrated on | {tokens} tokens |" in (tmp_path / "README.md").read_text()
    tiny_model().save_pretrained(tmp_path)  # loaded again, say: nothing is known of it
    assert "| calibrated on | 24 tokens |" in (tmp_path / "README.md").read_text()
