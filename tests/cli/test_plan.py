"""Promise: `moh convert --plan` states what fewer heads save, counted from shapes, before anything is loaded or written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from moh.conversion.plan import NEXT_TO_NOTHING, Layer, Plan, plan

SMOLLM2 = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
    num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192, vocab_size=49152, dtype="bfloat16",
)  # fmt: skip


@pytest.fixture
def smollm2(tmp_path: Path) -> Path:
    """A directory with SmolLM2-135M's configuration and no weights."""
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
    return tmp_path


def of_definition(model: nn.Module, tokens: int, *, causal: bool) -> float:
    """Multiplications per token of a model with eager attention, as PyTorch counts them, without the output layer."""
    ids = torch.zeros(1, tokens, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    total = counter.get_total_flops() / 2 / tokens
    # eager attention computes what a causal mask hides
    c = model.config
    hidden = c.num_hidden_layers * 2 * c.hidden_size * (tokens - 1) / 2 if causal else 0
    return total - hidden


@pytest.mark.parametrize("tokens", [7, 48])
@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "GPT2", "Phi3", "Bert"])
def test_the_work_is_what_pytorch_counts(tmp_path: Path, kind: str, tokens: int) -> None:
    sizes = dict(vocab_size=64, num_hidden_layers=2, num_attention_heads=4, hidden_size=32, max_position_embeddings=64)
    sizes |= {} if kind == "GPT2" else dict(intermediate_size=48)
    sizes |= dict(num_key_value_heads=2) if kind in ("Llama", "Qwen2", "Phi3") else {}
    config = getattr(transformers, f"{kind}Config")(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    options = dict(add_pooling_layer=False) if kind == "Bert" else {}
    model = getattr(transformers, f"{kind}Model")._from_config(config, attn_implementation="eager", **options)
    config.architectures = [
        f"{kind}Model" if kind == "Bert" else f"{kind}ForCausalLM" if kind != "GPT2" else "GPT2LMHeadModel"
    ]
    config.save_pretrained(tmp_path)
    found = plan(tmp_path)
    work = found.work(tokens)
    core = sum(layer.core(tokens, causal=found.causal) for layer in found.layers)
    assert core / work.core == pytest.approx(of_definition(model.eval(), tokens, causal=found.causal), rel=1e-6)
    assert work.core + work.projections + work.rest == pytest.approx(1)


def test_a_window_bounds_what_a_token_sees_and_what_is_kept() -> None:
    layer = Layer(width=8, num_heads=2, kv_heads=1, head_width=4, window=4)
    whole = Layer(width=8, num_heads=2, kv_heads=1, head_width=4)
    seen = [min(position, 4) for position in range(1, 11)]
    assert layer.core(10, causal=True) == pytest.approx(2 * 2 * 4 * sum(seen) / 10)
    assert whole.core(10, causal=True) == pytest.approx(2 * 2 * 4 * 5.5)
    assert (layer.cache(10), whole.cache(10)) == (2 * 4 * 4, 2 * 4 * 10)


def test_layers_with_and_without_a_window_are_told_apart(tmp_path: Path) -> None:
    config = transformers.Gemma3TextConfig(num_hidden_layers=6, sliding_window=16, hidden_size=64, vocab_size=64)
    config.architectures = ["Gemma3ForCausalLM"]
    config.save_pretrained(tmp_path)
    assert [layer.window for layer in plan(tmp_path).layers] == [16] * 5 + [None]


def test_savings_grow_with_length_and_fewer_heads(smollm2: Path) -> None:
    found = plan(smollm2)
    assert found.lengths == (512, 4_096, 8_192)  # the model's positions stand for 32,768 tokens
    at = {share: [found.saved(share, n) for n in found.lengths] for share in (1, 0.9, 0.75, 0.5)}
    assert at[1] == [0, 0, 0]
    assert all(parts == sorted(parts) for parts in at.values())
    for fewer, more in ((0.5, 0.75), (0.75, 0.9), (0.9, 1)):
        assert all(a > b for a, b in zip(at[fewer], at[more], strict=True))
    work = found.work(512)
    assert at[0.5][0] < 0.5 * (work.core + work.projections)  # the router's own cost
    assert found.saved(0.5, 512, router="query_norm") < at[0.5][0]  # all queries are needed
    assert work.cache_bytes == 30 * 2 * 3 * 64 * 512 * 2


def test_the_plan_is_printed_without_weights_and_nothing_is_written(moh, smollm2: Path) -> None:
    before = sorted(smollm2.iterdir())
    result = moh("convert", "--plan", smollm2)
    assert result.code == 0, result.err
    assert result.out[0] == "llama: 30 attention layers of 9 heads, 3 of keys and values, each 64 wide"
    assert "512 tokens" in result.out[1] and "8,192 tokens" in result.out[1]
    for share in ("0.9", "0.75", "0.5"):
        assert any(line.split()[:2] == ["--share", share] for line in result.out)
    assert any("cache of keys and values, bfloat16" in line and "11.8 MB" in line for line in result.out)
    assert any(
        line.startswith("Of the multiplications a share of 0.75 saves up to 6 % at 512 tokens") for line in result.out
    )
    assert sorted(smollm2.iterdir()) == before


def test_the_page_shows_what_is_printed(moh, smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(smollm2)  # away from this machine's measured times
    page = (Path(__file__).parents[2] / "docs" / "conversion.md").read_text(encoding="utf-8")
    assert "\n".join(moh("convert", "--plan", smollm2).out).strip() in page


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ([], 0.75),
        (["--share", 0.6], 0.6),
        (["--active-heads", 5], 7 / 9),
        (["--shared-heads", 1, "--active-heads", 2], 1 / 3),
    ],
    ids=str,
)
def test_the_plan_is_for_the_requested_share_and_prints_json(moh, smollm2: Path, options, share) -> None:
    result = moh("convert", "--plan", smollm2, *options, "--json")
    read = json.loads(result.out[0])
    assert read["share"] == pytest.approx(share)
    found = plan(smollm2)
    assert {(round(s["share"], 6), s["tokens"]): s["part"] for s in read["saved"]}[(round(share, 6), 512)] == (
        pytest.approx(found.saved(share, 512))
    )


def test_saving_next_to_nothing_is_said_in_a_sentence(moh, tmp_path: Path) -> None:
    sizes = SMOLLM2 | dict(intermediate_size=60_000, max_position_embeddings=512)
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    assert plan(tmp_path).saved(0.75, 512) < NEXT_TO_NOTHING
    text = "\n".join(moh("convert", "--plan", tmp_path).out)
    assert "saves next to nothing at 512 tokens. Fewer heads won't make this model faster." in text


def test_measured_times_of_this_cpu_are_shown(moh, smollm2: Path, tmp_path: Path, monkeypatch) -> None:
    from moh.evaluation.speed import cpu_name

    case = dict(subject="model", mode="prefill", heads=9, kv_heads=3, length=512, width=64, dtype="float32", causal=True,
                routing_unit="head", layers=30)  # fmt: skip
    rows = [dict(contender="ours", share=0.5, ratio=0.8125), dict(contender="dense", share=None, ratio=1.0)]
    other = dict(case=case | dict(heads=32, subject="core", width=128), rows=rows, date="2026-11-26T00:00:00")
    results = [dict(case=case, rows=rows, date="2026-11-26T00:00:00"), other]
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for cpu, shown in ((cpu_name(), True), ("another processor", False)):
        (folder / "one.json").write_text(json.dumps({"machine": {"cpu": cpu}, "results": results}))
        out = moh("convert", "--plan", smollm2).out
        assert ("  512 tokens, 9/3 heads of 64, float32: 0.81 at 0.5" in out) == shown
        assert not any("32/3 heads" in line for line in out)
        assert len(json.loads(moh("convert", "--plan", smollm2, "--json").out[0])["measured"]) == shown


def test_a_classifier_has_its_own_number_of_tokens(moh, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    from moh.models.timm.loading import save_image_classifier

    arguments = dict(img_size=32, patch_size=4, embed_dim=64, depth=2, num_heads=4)
    save_image_classifier(
        timm.create_model("vit_tiny_patch16_224", num_classes=3, **arguments), tmp_path / "vit", model_args=arguments
    )
    (tmp_path / "vit" / "model.safetensors").unlink()
    found = plan(tmp_path / "vit")
    assert (found.lengths, found.causal, found.rest) == ((65,), False, 2 * (2 * 64 * 64 + 2 * 4 * 64 * 64))
    assert moh("convert", "--plan", tmp_path / "vit").out[1].endswith("65 tokens")


def test_a_diffusion_model_has_its_own_number_of_tokens(moh, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    sizes = dict(num_attention_heads=4, attention_head_dim=8, num_layers=2, sample_size=8, in_channels=4)
    dense = diffusers.DiTTransformer2DModel(**sizes, num_embeds_ada_norm=5, out_channels=8)
    dense.save_config(tmp_path)
    found: Plan = plan(tmp_path)
    assert (found.lengths, found.router, found.rest) == ((16,), "two_stage", 2 * (2 * 32 * 32 + 2 * 4 * 32 * 32))
    assert moh("convert", "--plan", tmp_path).out[1].endswith("16 tokens")


def test_what_can_not_be_converted_is_refused_by_the_plan_too(moh, tmp_path: Path) -> None:
    config = transformers.StableLmConfig(num_hidden_layers=1)
    config.architectures = ["StableLmForCausalLM"]
    config.save_pretrained(tmp_path)
    result = moh("convert", "--plan", tmp_path)
    assert result.code == 2 and "model must be of a type among" in result.err[-1]
    result = moh("convert", "--plan", tmp_path, "--share", 2)
    assert result.code == 2 and "share must be a number above 0" in result.err[-1]


def test_files_of_others_beside_the_measured_times_are_passed_over(moh, base_dir, tmp_path, monkeypatch) -> None:
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "mine.json").write_text('{"mine": 1}')
    (results / "text.json").write_text("no JSON")
    monkeypatch.chdir(tmp_path)
    assert moh("convert", "--plan", base_dir).code == 0


@pytest.mark.parametrize(("kind", "tokens"), [("ViT", 17), ("DeiT", 18), ("Dinov2WithRegisters", 21)])
@pytest.mark.parametrize("size", [32, (16, 64)])
def test_the_tokens_of_an_image_are_those_of_the_model(tmp_path: Path, kind: str, tokens: int, size) -> None:
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, patch_size=8)
    config = getattr(transformers, f"{kind}Config")(**sizes, image_size=size)
    config.architectures = [f"{kind}ForImageClassification"]
    config.save_pretrained(tmp_path)
    assert plan(tmp_path).lengths == (tokens,)


def test_learned_positions_after_the_padding_are_no_tokens(tmp_path: Path) -> None:
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    config = transformers.RobertaConfig(**sizes, max_position_embeddings=514, pad_token_id=1)
    config.architectures = ["RobertaForMaskedLM"]
    config.save_pretrained(tmp_path)
    assert plan(tmp_path).lengths == (512,) and plan(tmp_path).positions == 512
