"""A recipe becomes a saved model; impossible requests are refused before training."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer, training_args

import moh.conversion
from moh._files import check_replaceable, check_writable, locked, replacing_directory
from moh.models.transformers import MoHLlamaForCausalLM
from moh.training import choose_precision, load_recipe, train
from moh.training import session as precision
from moh.training.language.model import train_only
from moh.training.recipes import TrainingSettings

CONVERSION = ["--conversion.shared_heads=1", "--conversion.active_heads=2", "--conversion.calibration_tokens=256"]


def test_a_converted_model_is_trained_logged_and_saved(options: list[str], tmp_path: Path) -> None:
    options += [*CONVERSION, "--training.balance_loss_coef=0.01", "--training.gradient_checkpointing=true"]
    result = train(load_recipe(None, options))
    out = tmp_path / "out"
    assert result.model_dir == out / "model"
    assert result.resumed_from is None and not result.model.training
    assert [step for step, _ in result.losses] == [1, 2, 3, 4, 5, 6]
    for entry in result.log_history[:-1]:
        assert entry["active_share"] == pytest.approx(3 / 4)
        assert 0 < entry["balance_loss"] <= 3  # h_r = 3
        assert [sum(load) for load in entry["routed_load"]] == pytest.approx([2, 2], abs=1e-3)  # k = 2, two layers
        assert [len(load) for load in entry["routed_load"]] == [3, 3]

    loaded = AutoModelForCausalLM.from_pretrained(out / "model")
    assert isinstance(loaded, MoHLlamaForCausalLM)
    assert loaded.config.router_aux_loss_coef == 0.01
    assert loaded.config.use_cache
    for (name, a), (_, b) in zip(loaded.named_parameters(), result.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert AutoTokenizer.from_pretrained(out / "model").eos_token == "<eos>"
    assert not (out / "model" / "training_args.bin").exists()  # not a pickle

    (events,) = (out / "runs").iterdir()
    logged = EventAccumulator(str(events)).Reload()
    assert {"train/loss", "train/active_share", "train/balance_loss"} <= set(logged.Tags()["scalars"])
    assert len(logged.Scalars("train/loss")) == 6


@pytest.mark.parametrize(
    ("extra", "dtype"),
    [([], "fp32"), (["--training.precision=bf16"], "bf16"), (CONVERSION, "fp32")],
    ids=["dense", "dense_bf16", "converted"],
)
def test_training_lowers_the_loss(options: list[str], extra: list[str], dtype: str) -> None:
    options += [*extra, "--training.max_steps=30", "--training.per_device_train_batch_size=8"]
    result = train(load_recipe(None, options))
    losses = [loss for _, loss in result.losses]
    assert sum(losses[-3:]) / 3 < losses[0] - 0.05
    assert result.precision == dtype
    assert all(p.dtype == torch.float32 for p in result.model.parameters())


def test_a_model_trained_in_bf16_computes_as_the_saved_one_does(options: list[str], tmp_path: Path) -> None:
    options += ["--training.precision=bf16", "--training.max_steps=2"]
    result = train(load_recipe(None, options))
    saved = AutoModelForCausalLM.from_pretrained(result.model_dir).eval()
    ids = torch.arange(3, 19).view(2, 8)
    with torch.no_grad():
        logits, expected = (model(ids, labels=ids, return_dict=True).logits for model in (result.model, saved))
    assert logits.dtype == torch.float32 and torch.equal(logits, expected)


@pytest.mark.parametrize(("precision", "other"), [("fp32", "bf16"), ("bf16", "no")])
def test_the_recipe_decides_the_precision_whatever_accelerate_launch_hands_on(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, other: str
) -> None:
    options += ["--training.max_steps=2", f"--training.precision={precision}"]
    expected = train(load_recipe(None, options)).losses
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", other)
    assert train(load_recipe(None, [*options, f"--training.output_dir={tmp_path / 'other'}"])).losses == expected


@pytest.mark.parametrize("precision_name", ["fp32", "tf32", "fp16"])
def test_a_precision_is_one_switch_of_transformers(monkeypatch: pytest.MonkeyPatch, precision_name: str) -> None:
    turned_on = []
    for module in (precision, training_args):
        monkeypatch.setattr(module, "is_torch_tf32_available", lambda: True)
    monkeypatch.setattr(training_args, "enable_tf32", turned_on.append)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    settings = TrainingSettings("out", 1, precision=precision_name)
    arguments = precision.training_arguments(settings, precision=precision_name)
    on = {name for name in ("tf32", "fp16", "bf16") if getattr(arguments, name)}
    assert on == {precision_name} - {"fp32"}
    # A run in float32 after one in TF32 must not keep the process's switch
    assert turned_on == {"tf32": [True], "fp32": [False], "fp16": []}[precision_name]
    assert precision.Session(None, arguments, None).precision == precision_name


def test_without_such_a_gpu_tf32_is_float32_and_fp16_is_refused(options: list[str]) -> None:
    result = train(load_recipe(None, [*options, "--training.precision=tf32", "--training.max_steps=1"]))
    assert result.precision == "fp32"
    with pytest.raises(ValueError, match=r"training\.precision fp16 needs a GPU.*: set bf16 or fp32"):
        train(load_recipe(None, [*options, "--training.precision=fp16", "--training.output_dir=other"]))


def test_inactive_heads_may_get_the_papers_gradient(options: list[str], tmp_path: Path) -> None:
    options += [*CONVERSION, "--conversion.router=query_norm", "--training.max_steps=1"]
    zero = train(load_recipe(None, options))
    extra = ["--conversion.inactive_gate_gradient=dense", f"--training.output_dir={tmp_path / 'other'}"]
    dense = train(load_recipe(None, [*options, *extra]))
    assert dense.losses[0][1] == pytest.approx(zero.losses[0][1], rel=1e-5)  # the outputs are the same
    norms = [next(entry["grad_norm"] for entry in run.log_history if "grad_norm" in entry) for run in (zero, dense)]
    assert norms[1] != pytest.approx(norms[0], rel=1e-4)
    assert dense.model.config._attn_implementation == zero.model.config._attn_implementation == "moh"


@pytest.mark.parametrize(
    ("extra", "only"),
    [(CONVERSION, ["o_proj", "router"]), ([], ["mlp"]), ([], ["layers.0"])],
    ids=["heads", "dense", "no_part"],
)
def test_only_named_parts_are_trained(options: list[str], tmp_path: Path, extra: list[str], only: list[str]) -> None:
    options += [*extra, f"--training.only={only}", "--training.save_steps=3"]
    recipe = load_recipe(None, options)
    if only == ["layers.0"]:
        with pytest.raises(ValueError, match=r"training\.only must hold parts of .* embed_tokens, .*; got 'layers\.0'"):
            train(recipe)
        return
    before = train(
        load_recipe(None, [*options, "--training.learning_rate=0", f"--training.output_dir={tmp_path / 'b'}"])
    )
    result = train(recipe)
    start = dict(before.model.named_parameters())
    changed = {name for name, p in result.model.named_parameters() if not torch.equal(p, start[name])}
    assert changed == {name for name in start if set(only) & set(name.split("."))} != set()
    with_gradients = {name for name, p in result.model.named_parameters() if p.requires_grad}
    assert with_gradients == changed
    shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    shutil.rmtree(tmp_path / "out" / "model")
    resumed = train(recipe)
    assert resumed.resumed_from is not None and resumed.losses == result.losses


def test_what_the_caller_has_frozen_is_not_trained() -> None:
    model = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    model[0].requires_grad_(False)
    train_only(model, ["weight"])
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["1.weight"]
    with pytest.raises(ValueError, match=r"training\.only must name parameters that are not frozen, got bias"):
        train_only(model, ["bias"])


def test_a_resumed_run_does_not_convert_again(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options += [*CONVERSION, "--training.save_steps=3"]
    whole = train(load_recipe(None, options))
    shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    shutil.rmtree(tmp_path / "out" / "model")
    monkeypatch.setattr(moh.conversion, "convert", None)
    resumed = train(load_recipe(None, options))
    assert resumed.resumed_from == tmp_path / "out" / "checkpoint-3"
    assert resumed.losses == whole.losses
    assert resumed.model.config.shared_heads == whole.model.config.shared_heads
    for (name, a), (_, b) in zip(resumed.model.named_parameters(), whole.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_parts_of_a_run_can_be_given_as_objects(options: list[str], dense, tokenizer, tmp_path: Path) -> None:
    blocks = torch.randint(3, 22, (8, 16))
    recipe = load_recipe(None, [*options, "--model.path=nowhere", "--training.distillation_weight=0.5"])
    start = {name: p.clone() for name, p in dense.named_parameters()}
    teacher = AutoModelForCausalLM.from_pretrained(options[0].partition("=")[2])
    result = train(recipe, model=dense, tokenizer=tokenizer, train_blocks=blocks, teacher=teacher)
    assert result.model is dense
    assert any(not torch.equal(start[name], p) for name, p in dense.named_parameters())
    assert all(torch.equal(start[name], p) for name, p in teacher.named_parameters())
    assert load_file(tmp_path / "out" / "model" / "model.safetensors")


def test_held_out_loss_is_logged_where_the_recipe_asks_for_it(options: list[str]) -> None:
    extra = "--training.extra={'disable_tqdm': true, 'eval_strategy': 'steps', 'eval_steps': 3}"
    history = train(load_recipe(None, [*options, extra])).log_history
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [3, 6]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--model.path=/nowhere/at/all", "model.path '/nowhere/at/all' can't be loaded: .*no '/nowhere/at/all'"),
        ("--data.files=[/nowhere.txt]", "no such text file or directory: /nowhere.txt"),
        ("--training.per_device_train_batch_size=500", r"fills \d+ sequences of 16 tokens, fewer than the 500"),
        ("--training.extra={'learning_rat': 1}", "TrainingArguments has no argument 'learning_rat'"),
        ("--training.extra={'learning_rate': 1}", "extra must not set learning_rate: set training.learning_rate"),
        ("--training.extra={'bf16': true}", "extra must not set bf16: set training.precision"),
        ("--training.extra={'fp16': true}", "extra must not set fp16: set training.precision"),
        ("--training.lr_scheduler_type=sawtooth", "training: .*sawtooth"),
        (
            "--conversion={'shared_heads': 3, 'active_heads': 2}",
            "active_heads must be between 0 and .* = 1, got 2",
        ),
    ],
)
def test_what_cannot_be_served_is_said_before_training(
    options: list[str], tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        train(load_recipe(None, [*options, override]))
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").glob("checkpoint-*")) and not (tmp_path / "out" / "model").exists()


@pytest.mark.parametrize("given", [False, True], ids=["loaded", "given"])
def test_a_generation_config_that_cannot_be_saved_is_mended_before_training(
    options: list[str], base_dir: Path, tmp_path: Path, given: bool
) -> None:
    shutil.copytree(base_dir, tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6}')
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base") if given else None
    run = [*options, f"--model.path={tmp_path / 'base'}", "--training.max_steps=2", "--training.save_steps=1"]
    with pytest.warns(UserWarning, match="refuses to save temperature = 0.9, top_p = 0.6: removed from the model"):
        result = train(load_recipe(None, run), model=model)
    assert AutoModelForCausalLM.from_pretrained(result.model_dir).generation_config.temperature is None


def test_an_output_directory_that_cannot_be_written_is_refused_at_once(options: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    target = tmp_path / "file" / "out"
    with pytest.raises(ValueError, match=rf"training\.output_dir {target} can't be written: Not a directory"):
        train(load_recipe(None, [*options, "--model.path=/nowhere/at/all", f"--training.output_dir={target}"]))


def test_checking_a_directory_leaves_nothing_behind(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b", name="output")
    assert not list(tmp_path.iterdir())


def test_a_directory_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for text in ("first", "second"):
        with replacing_directory(target) as scratch:
            (scratch / "config.json").write_text(text)
        assert (target / "config.json").read_text() == text
    with pytest.raises(KeyboardInterrupt), replacing_directory(target) as scratch:
        (scratch / "config.json").write_text("third")
        raise KeyboardInterrupt
    assert (target / "config.json").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_directory_that_holds_other_files_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "documents"
    target.mkdir()
    (target / "letter.txt").write_text("keep me")
    with pytest.raises(ValueError, match="must be new, empty or a model's directory"), replacing_directory(target):
        pass
    assert (target / "letter.txt").read_text() == "keep me"
    assert [path.name for path in tmp_path.iterdir()] == ["documents"]


@pytest.mark.parametrize(
    ("other", "known"),
    [
        (".git/HEAD", False),
        ("thesis.tex", False),
        ("transformer/config.json", False),
        ("tokenizer.json/notes.txt", False),
        ("README.md", True),
    ],
)
def test_an_earlier_result_with_a_foreign_file_is_kept_and_the_file_named(
    tmp_path: Path, other: str, known: bool
) -> None:
    target = tmp_path / "model"
    with replacing_directory(target) as scratch:
        (scratch / "config.json").write_text('{"model_type": "moh_llama"}')
        (scratch / "model.safetensors").write_text("first")
    (target / other).parent.mkdir(exist_ok=True)
    (target / other).write_text("keep me")
    with pytest.raises(ValueError, match=f"other files, which are kept, such as {other}"):
        check_replaceable(target, name="output", known=known)
    with pytest.raises(ValueError, match=f"such as {other}"), replacing_directory(target, known=known):
        raise AssertionError("the work began")
    assert (target / other).read_text() == "keep me" and (target / "model.safetensors").read_text() == "first"


def test_a_foreign_file_that_appears_during_the_work_is_kept_too(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    with pytest.raises(ValueError, match=r"such as letter\.txt"), replacing_directory(target) as scratch:
        (scratch / "config.json").write_text("{}")
        (target / "letter.txt").write_text("keep me")
    assert [path.name for path in target.iterdir()] == ["letter.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("config", "replaced"),
    [
        ({"model_type": "moh_llama", "architectures": ["MoHLlamaForCausalLM"]}, True),
        ({"architecture": "moh_vit", "model_args": {"base": "vit_tiny_patch16_224"}}, True),
        ({"_class_name": "MoHDiTTransformer2DModel"}, True),
        ({"model_type": "llama", "_name_or_path": "/moh/base"}, False),
        ({"architecture": "vit_tiny_patch16_224"}, False),
        ({"_class_name": "DiTTransformer2DModel"}, False),
        ({"theme": "dark"}, False),
        ([], False),
    ],
)
def test_a_dense_model_is_replaced_only_where_a_run_wrote_it(tmp_path: Path, config: object, replaced: bool) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_text("weights")
    check_replaceable(tmp_path, name="output", known=True)
    if replaced:
        check_replaceable(tmp_path, name="output")
    else:
        with pytest.raises(ValueError, match=r"such as config\.json"):
            check_replaceable(tmp_path, name="output")


def test_only_a_directory_of_the_first_kind_of_file_is_a_model(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"such as tokenizer\.json"):
        check_replaceable(tmp_path, name="output")


def test_the_neighbours_of_an_output_are_not_touched(tmp_path: Path) -> None:
    for name in (".model.partial", ".model.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "letter.txt").write_text("keep me")
    for _ in range(2):
        with replacing_directory(tmp_path / "model") as scratch:
            (scratch / "config.json").write_text("{}")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*") if path.is_file()) == [
        ".model.old/letter.txt",
        ".model.partial/letter.txt",
        "model/config.json",
    ]


def _replace(target: Path, text: str, started: Any, go_on: Any) -> None:
    with replacing_directory(target) as scratch:
        started.set()
        (scratch / "config.json").write_text('{"model_type": "moh_llama"}')
        (scratch / "model.safetensors").write_text(text)
        go_on.wait(20)


def test_two_processes_with_one_output_take_turns(tmp_path: Path) -> None:
    target, spawn = tmp_path / "model", multiprocessing.get_context("fork")
    events = [spawn.Event() for _ in range(4)]
    first = spawn.Process(target=_replace, args=(target, "first", *events[:2]))
    second = spawn.Process(target=_replace, args=(target, "second", *events[2:]))
    first.start()
    assert events[0].wait(20)
    second.start()
    assert not events[2].wait(0.5)  # it waits
    with pytest.raises(ValueError, match=f"another process is writing {target}"), locked(target, waits=False):
        pass
    events[1].set()
    assert events[2].wait(20) and (target / "model.safetensors").read_text() == "first"
    events[3].set()
    for process in (first, second):
        process.join(20)
        assert process.exitcode == 0
    assert (target / "model.safetensors").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_run_whose_directory_another_process_trains_in_is_refused(options: list[str], tmp_path: Path) -> None:
    with (
        locked(tmp_path / "out" / "checkpoints"),
        pytest.raises(
            ValueError, match=r"another process is writing .*out/checkpoints: wait for it, or choose another"
        ),
    ):
        train(load_recipe(None, options))
    assert not list((tmp_path / "out").glob("checkpoint-*")) and not (tmp_path / "out" / "model").exists()
    train(load_recipe(None, options))
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize("name", ["recipe.yaml", "data.json", "checkpoint-7/trainer_state.json", "model/config.json"])
def test_a_run_replaces_nothing_that_was_in_its_output_directory(options: list[str], tmp_path: Path, name: str) -> None:
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text('{"model_type": "llama"}')
    with pytest.raises(
        ValueError, match=rf"training\.output_dir.*{name.partition('/')[2] or name}|checkpoint-7 is not"
    ):
        train(load_recipe(None, [*options, "--model.path=/nowhere/at/all"]))
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [file]


@pytest.mark.parametrize(("bf16_seconds", "choice"), [(0.5, "bf16"), (0.95, "fp32"), (10.0, "fp32")])
def test_bf16_is_chosen_on_a_cpu_only_where_it_is_measured_to_be_faster(monkeypatch, bf16_seconds, choice) -> None:
    monkeypatch.setattr(precision, "_seconds", {torch.bfloat16: bf16_seconds, torch.float32: 1.0}.__getitem__)
    assert choose_precision(torch.device("cpu")) == choice


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupt_between_taking_the_old_directory_away_and_moving_the_new_one_in_loses_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    target, moves, replace = tmp_path / "model", [], os.replace
    with replacing_directory(target) as scratch:
        (scratch / "config.json").write_text("first")

    def interrupted(source, to):
        moves.append(to)
        if len(moves) == 2:
            raise error
        replace(source, to)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(error), replacing_directory(target) as scratch:
        (scratch / "config.json").write_text("second")
    assert len(moves) == 3 and (target / "config.json").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
