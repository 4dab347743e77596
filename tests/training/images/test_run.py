"""A recipe becomes a saved classifier that timm loads; impossible requests are refused before training."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import timm
import torch
from image_cases import CLASSES, pictures
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.scheduler import CosineLRScheduler
from torchvision.datasets import FashionMNIST
from transformers import TrainerCallback

from moh.data.images.batches import ImageBatches
from moh.data.images.recipe import ImageInput
from moh.data.images.sources import TensorImages
from moh.models.timm.loading import class_names, image_input, load_image_classifier
from moh.training import load_recipe, train
from moh.training.images.model import build_model
from moh.training.images.recipe import ImageModelRecipe

MOH = [
    "--model.name=moh_vit_micro_patch4_28_75",
    "--model.kwargs={'img_size': 8, 'in_chans': 1, 'embed_dim': 20, 'depth': 2, 'num_heads': 5}",
    "--training.balance_loss_coef=0.01",
]


def run(options: list[str], *extra: str, **objects):
    return train(load_recipe(None, [*options, *extra]), **objects)


@pytest.mark.parametrize(
    "extra",
    [[], ["--training.ema_decay=0.5"], ["--model.name=moh_vit_micro_patch4_28_dense", *MOH[1:2]], MOH],
    ids=["last-weights", "averaged", "our-dense-control", "moh"],
)
def test_the_saved_model_is_the_trained_one_for_us_and_for_timm(options: list[str], tmp_path: Path, extra) -> None:
    result = run(options, *extra)
    assert result.model_dir == tmp_path / "out" / "model" and not result.model.training
    assert [step for step, _ in result.losses] == [1, 2, 3, 4, 5, 6]
    assert result.classes == tuple(FashionMNIST.classes) and result.resumed_from is None
    card = {"README.md"} if extra == MOH else set()
    assert {path.name for path in result.model_dir.iterdir()} == {"config.json", "model.safetensors"} | card
    if card:
        text = (result.model_dir / "README.md").read_text()
        assert "| optimiser steps | 6 |" in text and "| held-out top-1, step 6 |" in text

    images = torch.randn(2, 1, 8, 8)
    loaded = load_image_classifier(result.model_dir)
    for model in (loaded, timm.create_model(f"local-dir:{result.model_dir}", pretrained=True).eval()):
        assert torch.equal(model(images), result.model(images))
    assert class_names(loaded) == result.classes
    assert image_input(loaded) == ImageInput((1, 8, 8), (0.286,), (0.353,), 1.0, "bicubic")
    assert json.loads((result.model_dir / "config.json").read_text())["label_names"][3] == "Dress"


def test_a_model_learns_and_its_top1_is_logged(options: list[str], tensors: TensorImages, tmp_path: Path) -> None:
    heldout = TensorImages(pictures(tensors.labels, seed=1), tensors.labels, CLASSES)
    extra = ["--training.max_steps=70", "--training.learning_rate=0.01", "--training.warmup_steps=5"]
    extra += ["--augmentation.hflip=0", "--training.eval_steps=30"]
    result = run(options, *extra, train_dataset=tensors, eval_dataset=heldout)
    assert result.losses[-1][1] < result.losses[0][1] / 2
    assert [step for step, _ in result.top1] == [30, 60, 70]  # also at the end, although 70 is not a multiple of 30
    assert result.top1[-1][1] > 90
    (events,) = (tmp_path / "out" / "runs").iterdir()
    assert {"train/loss", "eval/top1", "eval/top5"} <= set(EventAccumulator(str(events)).Reload().Tags()["scalars"])


def test_all_held_out_images_are_evaluated(options: list[str], tensors: TensorImages) -> None:
    labels = torch.tensor([0, 1, 2] * 3 + [2])  # ten images: three full batches of three, and one more
    heldout = TensorImages(pictures(labels), labels, CLASSES)
    result = run(options, "--training.per_device_eval_batch_size=3", train_dataset=tensors, eval_dataset=heldout)
    inputs = (heldout.pixels.float() / 255 - 0.5) / 0.25
    with torch.no_grad():
        logits = result.model(inputs)
    entry = next(entry for entry in result.log_history if "eval_top1" in entry and entry["step"] == 6)
    assert entry["eval_top1"] == pytest.approx(100 * (logits.argmax(-1) == labels).float().mean().item())
    assert entry["eval_loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert entry["eval_top5"] == 100  # there are only three classes


def test_a_moh_model_logs_its_routing_and_pays_for_imbalance(options: list[str]) -> None:
    pytest.importorskip("moh.models.timm")
    result = run(options, *MOH)
    entry = next(entry for entry in result.log_history if "loss" in entry)
    assert 0.6 <= entry["active_share"] <= 0.9 and entry["balance_loss"] > 0
    without = run(options, *MOH, "--training.balance_loss_coef=0", f"--training.output_dir={result.model_dir}.2")
    assert result.losses[0][1] == pytest.approx(without.losses[0][1] + 0.01 * entry["balance_loss"], abs=1e-5)
    loaded = load_image_classifier(result.model_dir)
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(loaded(images), result.model(images))


@pytest.mark.parametrize("router", ["linear", "query_norm"])
def test_a_pretrained_model_is_converted_trained_and_not_converted_again(
    options: list[str], router, monkeypatch
) -> None:
    pytest.importorskip("moh.models.timm")
    dense = run(options)
    extra = [f"--model.name=local-dir:{dense.model_dir}", "--model.pretrained=true", "--model.kwargs={}"]
    extra += [f"--conversion={{'shared_heads': 1, 'active_heads': 2, 'router': '{router}', 'calibration_images': 20}}"]
    extra += [f"--training.output_dir={dense.model_dir}.2", "--model.drop_path=0.1", "--training.logging_steps=2"]
    first = run(options, *extra, "--training.max_steps=2", "--training.save_steps=2")
    assert first.losses[0][1] < dense.losses[0][1]  # starts from what the dense model learned
    assert first.log_history[0]["active_share"] == pytest.approx(3 / 4)
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(load_image_classifier(first.model_dir)(images), first.model(images))

    monkeypatch.setattr("moh.conversion.convert", None)
    longer = run(options, *extra, "--training.max_steps=4", "--training.save_steps=2")
    assert longer.resumed_from.name == "checkpoint-2" and [step for step, _ in longer.losses] == [2, 4]
    assert longer.model.blocks[1].drop_path1.drop_prob == pytest.approx(0.1)


def test_epochs_become_steps_and_the_rate_follows_the_recipe(options: list[str]) -> None:
    extra = ["--training.max_steps=0", "--training.epochs=2", "--training.warmup_epochs=0.5", "--training.min_lr=2e-5"]
    result = run(options, *extra, "--training.gradient_accumulation_steps=2")
    rates = [entry["learning_rate"] for entry in result.log_history if "loss" in entry]
    steps = 2 * math.ceil(60 // 8 / 2)
    assert len(rates) == steps == 8
    assert rates[0] == pytest.approx(1e-6) and rates[1] == pytest.approx(1e-3) and rates[-1] == pytest.approx(2e-5)
    assert rates[1:] == sorted(rates[1:], reverse=True)


def test_the_rate_may_change_per_epoch_as_published(options: list[str]) -> None:
    extra = ["--training.max_steps=0", "--training.epochs=6", "--training.warmup_epochs=2", "--training.min_lr=2e-5"]
    extra += ["--training.rate_changes=epoch", "--training.per_device_train_batch_size=30"]
    result = run(options, *extra)
    rates = [entry["learning_rate"] for entry in result.log_history if "loss" in entry]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    schedule = CosineLRScheduler(optimizer, t_initial=6, lr_min=2e-5, warmup_t=2, warmup_lr_init=1e-6)
    expected = []
    for epoch in range(6):
        expected += [optimizer.param_groups[0]["lr"]] * (60 // 30)
        schedule.step(epoch)  # after the epoch, with its number: the published script does so
    assert rates == pytest.approx(expected)
    recorded = load_recipe(result.model_dir.parent / "recipe.yaml").training
    assert recorded.rate_changes == "epoch" and recorded.max_steps == 12


def test_the_best_model_is_kept_next_to_the_last(options: list[str], tensors: TensorImages, tmp_path: Path) -> None:
    heldout = TensorImages(pictures(tensors.labels, seed=1), tensors.labels, CLASSES)
    shares, states = iter([30.0, 90.0, 90.0, 60.0]), []

    class Look(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, model, **kwargs):
            states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

    def metrics(prediction):
        return {"top1": next(shares), "top5": 100.0, "loss": 1.0}

    extra = ["--training.keep_best=true", "--training.eval_steps=2", "--training.max_steps=8"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moh.training.images.trainer._metrics", metrics)
        run(options, *extra, train_dataset=tensors, eval_dataset=heldout, callbacks=[Look()])
    best = load_image_classifier(tmp_path / "out" / "best").state_dict()
    assert all(torch.equal(tensor, states[2][name]) for name, tensor in best.items())  # of equal ones the last
    assert not all(torch.equal(tensor, states[3][name]) for name, tensor in best.items())


def test_a_best_model_is_kept_in_the_rest_of_a_run_that_first_kept_none(options: list[str], tmp_path: Path) -> None:
    shares, out = iter([90.0, 60.0, 80.0, 70.0]), tmp_path / "out"

    def metrics(prediction):
        return {"top1": next(shares), "top5": 100.0, "loss": 1.0}

    options += ["--training.eval_steps=2", "--training.save_steps=2", "--training.save_total_limit=9"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moh.training.images.trainer._metrics", metrics)
        run(options, "--training.max_steps=2")
        assert not (out / "best").exists()
        run(options, "--training.max_steps=8", "--training.keep_best=true")
    best = load_image_classifier(out / "best").state_dict()
    expected = load_image_classifier(out / "checkpoint-6").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in best.items())


def test_somebody_elses_best_is_not_replaced(options: list[str], tmp_path: Path) -> None:
    (tmp_path / "out" / "best").mkdir(parents=True)
    (tmp_path / "out" / "best" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"training\.output_dir: its .*best.* holds other files.*notes\.txt"):
        run(options, "--training.keep_best=true")


def test_repeated_augmentation_trains_on_a_part_of_the_images_per_epoch(options: list[str]) -> None:
    read: dict[int, list[int]] = {}
    whole = ImageBatches.__getitems__

    def noted(self, indices):
        if self.training:
            read.setdefault(self.epoch, []).extend(indices)
        return whole(self, indices)

    extra = ["--augmentation.repeats=3", "--augmentation.crop_padding=2", "--training.max_steps=0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageBatches, "__getitems__", noted)
        result = run(options, *extra, "--training.epochs=2", "--training.precision=bf16")
    assert len(result.losses) == 2 * (60 // 8) and all(math.isfinite(loss) for _, loss in result.losses)
    epochs = [{index % 60 for index in indices} for indices in read.values()]
    assert [len(indices) for indices in read.values()] == [56, 56]  # full batches only
    assert [len(images) for images in epochs] == [math.ceil(56 / 3)] * 2 and epochs[0] != epochs[1]


def test_biases_norms_and_named_parameters_are_not_decayed(options: list[str]) -> None:
    groups = {}

    class Look(__import__("transformers").TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer, model, **kwargs):
            names = {id(parameter): name for name, parameter in model.named_parameters()}
            for group in optimizer.param_groups:
                groups.setdefault(group["weight_decay"], set()).update(names[id(p)] for p in group["params"])

    result = run(options, callbacks=[Look()])
    assert groups[0.05] == {n for n, p in result.model.named_parameters() if p.ndim > 1} - {"pos_embed", "cls_token"}
    assert {"pos_embed", "cls_token", "norm.weight", "head.bias"} <= groups[0.0]


@pytest.mark.parametrize(
    "extra",
    [
        ["--augmentation.mixup=0.8", "--augmentation.cutmix=1", "--augmentation.label_smoothing=0.1"],
        ["--augmentation.auto_augment=rand-m9-mstd0.5-inc1", "--augmentation.crop_scale=[0.5, 1]"],
        ["--augmentation.label_smoothing=0.1", "--augmentation.random_erasing=0.3", "--augmentation.crop_padding=1"],
        ["--model.drop_path=0.2", "--training.gradient_checkpointing=true", "--training.precision=bf16"],
    ],
    ids=["mixed", "policy", "smoothed", "drop-path-and-bf16"],
)
def test_what_a_recipe_may_ask_for_trains(options: list[str], extra: list[str]) -> None:
    losses = [loss for _, loss in run(options, *extra).losses]
    assert all(math.isfinite(loss) for loss in losses) and len(set(losses)) == 6


def test_images_in_folders_are_trained_on_and_damaged_ones_reported(
    options: list[str], folders: Path, tmp_path: Path
) -> None:
    broken = folders / "train" / "dog" / "03.png"
    broken.write_bytes(broken.read_bytes()[:50])
    unread = folders / "val" / "dog" / "01.png"
    unread.write_bytes(b"")
    extra = [f"--data.dataset={folders}", "--model.kwargs.in_chans=3", "--augmentation.crop_scale=[0.5, 1]"]
    replaced = r"1 of 36 images can't be read and were replaced by the next one: .*dog/03\.png"
    with (
        pytest.warns(UserWarning, match=replaced),
        pytest.warns(UserWarning, match=r"1 of 12 .* left out of the evaluation: .*dog/01\.png"),
    ):
        result = run(options, *extra)
    assert result.damaged == (str(broken),) and result.classes == CLASSES
    counts = [round(top1 / 100 * 11, 6) for _, top1 in result.top1]  # 11 of 12 held-out images can be read
    assert all(count == round(count) for count in counts)


def test_a_model_may_be_given_as_an_object(options: list[str], tensors: TensorImages) -> None:
    recipe = load_recipe(None, options)
    model = timm.create_model(recipe.model.name, num_classes=3, **recipe.model.kwargs)
    result = train(recipe, model=model, train_dataset=tensors, eval_dataset=tensors)
    assert result.model is model
    assert torch.equal(load_image_classifier(result.model_dir)(torch.ones(1, 1, 8, 8)), model(torch.ones(1, 1, 8, 8)))


def test_training_can_start_from_a_saved_model_with_other_classes(options: list[str], tensors: TensorImages) -> None:
    first = run(options)
    start = load_image_classifier(first.model_dir)
    extra = [f"--model.name=local-dir:{first.model_dir}", "--model.pretrained=true", "--model.kwargs={}"]
    extra += [f"--training.output_dir={first.model_dir}.2", "--training.learning_rate=0", "--training.min_lr=0"]
    result = run(options, *extra, "--training.warmup_lr=0", train_dataset=tensors, eval_dataset=tensors)
    assert torch.equal(result.model.blocks[0].attn.qkv.weight, start.blocks[0].attn.qkv.weight)
    assert result.model.head.weight.shape == (3, 16)
    assert image_input(load_image_classifier(result.model_dir)).mean == pytest.approx((0.286,))  # that of the weights


@pytest.mark.parametrize("classes", [3, 1000])
def test_weights_that_are_not_the_models_are_refused_whatever_the_classes(tmp_path: Path, classes: int) -> None:
    name, arguments = "moh_vit_micro_patch4_28_50", {"img_size": 8, "depth": 2}
    dense = timm.create_model("moh_vit_micro_patch4_28_dense", num_classes=classes, **arguments)
    ours = timm.create_model(name, num_classes=classes, **arguments)
    for file, model in (("dense", dense), ("ours", ours)):
        save_file(model.state_dict(), tmp_path / f"{file}.safetensors")

    def build(file: str) -> torch.nn.Module:
        recipe = ImageModelRecipe(name, weights=str(tmp_path / f"{file}.safetensors"), kwargs=arguments)
        return build_model(recipe, ("ant", "bee", "cow"))

    assert torch.equal(build("ours").blocks[0].attn.router.routed.weight, ours.blocks[0].attn.router.routed.weight)
    with pytest.raises(ValueError, match="router"):
        build("dense")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "--model.name=vit_tiny_patch16_225",
            "model.name 'vit_tiny_patch16_225' is not a model of timm; did you mean .*224",
        ),
        ("--model.kwargs.nonsense=1", "model 'vit_tiny_patch16_224' can't be made: .*nonsense"),
        (
            "--model.weights=/nowhere.safetensors",
            "model.weights must be a file, but there is no '/nowhere.safetensors'",
        ),
        ("--data.image_size=10", r"model can't read images of size \(1, 10, 10\): .*data.image_size"),
        ("--data={'dataset': '/nowhere/at/all'}", "but there is no '/nowhere/at/all'"),
        ("--training.per_device_train_batch_size=500", "there are 60 training images, fewer than the 500"),
        ("--training.extra={'fsdp': true}", "fsdp is not supported for image classifiers"),
        ("--training.extra={'weight_decay': 1}", "extra must not set weight_decay: set training.weight_decay"),
        (
            "--training.extra={'label_smoothing_factor': 0.1}",
            "label_smoothing_factor: set augmentation.label_smoothing",
        ),
        ("--training.lr_scheduler_type=sawtooth", "training: .*sawtooth"),
        ("--augmentation.auto_augment=nonsense", "auto_augment 'nonsense' is not one of timm's"),
    ],
)
def test_what_cannot_be_served_is_said_before_training(
    options: list[str], tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        run(options, override)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").glob("checkpoint-*")) and not (tmp_path / "out" / "model").exists()


def test_given_images_need_held_out_ones_of_the_same_classes(options: list[str], tensors: TensorImages) -> None:
    with pytest.raises(ValueError, match="eval_dataset must be given with train_dataset"):
        run(options, train_dataset=tensors)
    other = TensorImages(tensors.pixels, tensors.labels, ("cat", "dog", "fox"))
    with pytest.raises(ValueError, match="eval_dataset must have the 3 classes of train_dataset, but lacks 'eel'"):
        run(options, train_dataset=tensors, eval_dataset=other)


def test_a_frozen_model_trains_its_classifier_alone(options: list[str], tmp_path: Path) -> None:
    start = run(options, *MOH).model_dir
    frozen = [f"--model.weights={start / 'model.safetensors'}", "--model.frozen=true", "--training.balance_loss_coef=0"]
    result = run(options, *MOH, *frozen, f"--training.output_dir={tmp_path / 'frozen'}")
    before, after = load_image_classifier(start).state_dict(), result.model.state_dict()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"head.weight", "head.bias"}


def test_a_model_without_weights_to_keep_is_not_frozen() -> None:
    with pytest.raises(ValueError, match="frozen needs weights to keep"):
        ImageModelRecipe("moh_vit_micro_patch4_28_75", frozen=True)
