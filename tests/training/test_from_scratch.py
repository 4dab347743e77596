"""A model from scratch: the paper's sizes, its own tokenizer, a saved result; wrong sizes are named before training."""

from __future__ import annotations

import math
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, TrainingArguments

import moh  # noqa: F401 (makes the Auto classes know our models)
from moh.models.transformers import MoHLlamaForCausalLM
from moh.routing import record_routing
from moh.training import load_recipe, train
from moh.training.language import run
from moh.training.language.model import new_config

RECIPES = Path(__file__).parents[2] / "recipes" / "llm"
SIZES = ["num_hidden_layers=2", "hidden_size=32", "intermediate_size=48", "num_attention_heads=4"]
SIZES += ["max_position_embeddings=32", "vocab_size=300"]


@pytest.fixture
def options(text_file: Path, tmp_path: Path) -> list[str]:
    """A complete recipe of a tiny model from scratch, with two shared heads and one active routed head."""
    return [
        *(f"--model.from_scratch.{size}" for size in SIZES),
        "--model.from_scratch.moh={shared_heads: 2, active_heads: 1}",
        f"--data.sources=[{{path: {text_file}, split: train}}]",
        f"--data.heldout_sources=[{{path: {text_file}, split: heldout}}]",
        f"--data.cache_dir={tmp_path / 'cache'}",
        "--data.seq_len=16",
        f"--training.output_dir={tmp_path / 'out'}",
        "--training.max_steps=4",
        "--training.per_device_train_batch_size=2",
        "--training.learning_rate=0.01",
        "--training.balance_loss_coef=0.01",
        "--training.precision=fp32",
        "--training.extra={'disable_tqdm': true, 'report_to': []}",
    ]


def _model(path: Path, tokenizer):
    recipe = load_recipe(path)
    with torch.device("meta"):
        return recipe, AutoModelForCausalLM.from_config(new_config(recipe.model.from_scratch, tokenizer))


@pytest.mark.parametrize(
    ("size", "percent", "millions", "shared", "active"),
    [
        ("s", 100, 186, 12, 0),
        ("s", 75, 186, 3, 6),
        ("s", 50, 186, 3, 3),
        ("b", 100, 881, 16, 0),
        ("b", 75, 882, 4, 8),  # figure 3: the loads of twelve routed heads sum to 8
        ("b", 50, 882, 4, 4),
    ],
)
def test_the_papers_models_have_the_papers_parameters_and_heads(
    size, percent, millions, shared, active, tokenizer
) -> None:
    recipe, model = _model(RECIPES / f"moh_llm_{size}_{percent}.yaml", tokenizer)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == millions
    assert model.config.head_dim == {"s": 64, "b": 96}[size]
    if percent == 100:
        assert type(model) is LlamaForCausalLM
    else:
        assert isinstance(model, MoHLlamaForCausalLM)
        assert model.config.share == percent / 100
        layers = {(c.router, c.num_shared, c.active_heads) for c in model.config.layer_configs()}
        assert layers == {("two_stage", shared, active)}
    assert recipe.training.max_steps * recipe.training.tokens_per_batch == pytest.approx(100e9, rel=1e-4)


@pytest.mark.parametrize("size", ["s", "b", "tiny"])
def test_a_family_differs_in_the_heads_alone(size: str) -> None:
    recipes = [vars(load_recipe(RECIPES / f"moh_llm_{size}_{percent}.yaml")) for percent in (100, 75, 50)]
    for recipe in recipes:
        recipe["training"] = {**vars(recipe["training"]), "output_dir": "", "balance_loss_coef": 0}
        recipe["model"] = {**vars(recipe["model"].from_scratch), "moh": None}
    assert recipes[0] == recipes[1] == recipes[2]


def test_a_model_is_trained_saved_and_loaded_with_a_tokenizer_made_from_the_text(options, tmp_path: Path) -> None:
    extra = "--training.extra={'disable_tqdm': true, 'report_to': [], 'eval_strategy': 'steps', 'eval_steps': 2}"
    result = train(load_recipe(None, [*options, extra]))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    assert isinstance(loaded, MoHLlamaForCausalLM)
    assert len(tokenizer) == loaded.config.vocab_size == 300
    assert loaded.config.eos_token_id == tokenizer.eos_token_id
    text = "the head reads, ünicode and\n\n all"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    ids = tokenizer("the head reads", return_tensors="pt")["input_ids"]
    assert torch.equal(loaded(ids).logits, result.model(ids).logits)
    with record_routing(loaded) as routing:
        loaded(ids)
    assert routing.share() == 0.75
    assert [entry["step"] for entry in result.log_history if "eval_loss" in entry] == [2, 4]
    assert result.losses[0][1] == pytest.approx(math.log(300), abs=0.3)


def test_the_weights_and_the_tokenizer_depend_on_the_seed_and_the_text_alone(options, tmp_path: Path) -> None:
    options += ["--training.max_steps=1"]
    results = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        out = [f"--training.output_dir={tmp_path / name}", f"--data.cache_dir={tmp_path / name / 'cache'}"]
        results.append(train(load_recipe(None, [*options, *out, f"--training.seed={seed}"])))
    a, b, c = (result.model.state_dict() for result in results)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)
    assert results[0].tokenizer.get_vocab() == results[1].tokenizer.get_vocab()


def test_the_first_process_makes_the_tokenizer_and_fetches_its_text_before_the_others(options, monkeypatch) -> None:
    first: list[bool] = []
    load = run.load_tokenizer

    @contextmanager
    def main_process_first(self, local=True, desc=""):
        first.append(True)
        yield
        first.pop()

    def load_tokenizer(recipe):
        assert first
        return load(recipe)

    monkeypatch.setattr(TrainingArguments, "main_process_first", main_process_first)
    monkeypatch.setattr(run, "load_tokenizer", load_tokenizer)
    train(load_recipe(None, [*options, "--training.max_steps=1"]))


def test_layers_may_differ_in_their_heads(options, tokenizer) -> None:
    moh_heads = "--model.from_scratch.moh={shared_heads: [1, 2], active_heads: [1, 2], router: single_stage}"
    config = new_config(load_recipe(None, [*options, moh_heads]).model.from_scratch, tokenizer)
    assert [(c.num_shared, c.active_heads, c.router) for c in config.layer_configs()] == [
        (1, 1, "single_stage"),
        (2, 2, "single_stage"),
    ]


def test_the_learning_rate_ends_where_the_recipe_says(options) -> None:
    schedule = ["--training.lr_scheduler_type=cosine_with_min_lr", "--training.lr_scheduler_kwargs={min_lr_rate: 0.1}"]
    schedule += ["--training.warmup_steps=2", "--training.max_steps=30", "--training.adam_beta2=0.95"]
    history = train(load_recipe(None, [*options, *schedule])).log_history
    rates = [entry["learning_rate"] for entry in history if "learning_rate" in entry]
    assert max(rates) == pytest.approx(0.01) == rates[2]
    assert rates[-1] == pytest.approx(0.001, rel=0.05)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--model.from_scratch.moh={shared_heads: 2, active_heads: 3}", "from_scratch: .*active_heads must be between"),
        ("--model.from_scratch.moh={shared_heads: [2], active_heads: 1}", "one entry per layer .2., got 1 entries"),
        ("--model.from_scratch.extra={rope_tetha: 1}", "MoHLlamaConfig has no argument 'rope_tetha'"),
        ("--model.from_scratch.extra={hidden_size: 1}", "extra must not set hidden_size"),
        ("--model.from_scratch.vocab_size=200", "vocab_size must be at least 257 without a tokenizer, got 200"),
        ("--model.from_scratch.vocab_size=9000", r"has only \d+ different tokens, fewer than .*vocab_size = 9000"),
        ("--model.from_scratch.tokenizer=/nowhere/at/all", "from_scratch.tokenizer '/nowhere/at/all' can't be loaded"),
        ("--data.seq_len=33", "data.seq_len must be at most the model's max_position_embeddings = 32, got 33"),
        ("--training.distillation_weight=0.5", "distillation_weight must be 0 with model.from_scratch"),
        ("--training.tokens_per_batch=100", "must be a multiple of 32 = data.seq_len 16 x .*2 x 1 processes, got 100"),
        (
            "--data.streaming=true --training.extra={'dataloader_num_workers': 2}",
            "dataloader_num_workers must be 0 or 1",
        ),
    ],
)
def test_what_cannot_be_served_is_said_before_training(options, tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        train(load_recipe(None, [*options, *(f"--{part}" for part in override.removeprefix("--").split(" --"))]))
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").glob("checkpoint-*")) and not (tmp_path / "out" / "model").exists()


@pytest.mark.parametrize("rows", [22, 23 + 2049], ids=["too_few", "too_many"])
def test_a_tokenizer_of_another_vocabulary_is_refused(options, base_dir: Path, rows: int) -> None:
    options += [f"--model.from_scratch.tokenizer={base_dir}", f"--model.from_scratch.vocab_size={rows}"]
    with pytest.raises(ValueError, match=f"tokenizer has 23 tokens and the model a vocabulary of {rows}: .*2048 more"):
        train(load_recipe(None, options))
