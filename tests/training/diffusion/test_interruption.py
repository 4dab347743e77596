"""A killed run resumes exactly: losses, weights, their average and the pictures."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from moh.training import load_recipe, train
from moh.training.checkpoints import last_complete_checkpoint


def test_a_killed_run_resumes_and_ends_like_an_uninterrupted_one(
    team, options: list[str], vae_dir: Path, tmp_path: Path
) -> None:
    options += [
        f"--data.vae={vae_dir}",
        f"--data.latents={tmp_path / 'latents'}",
        "--training.save_steps=2",
        "--training.gradient_accumulation_steps=2",
        "--training.samples.every=3",
        "--training.samples.steps=2",
    ]
    killed = [*options, f"--training.output_dir={tmp_path / 'killed'}"]
    team("losses", 1, runs=[killed], kill_at=5, killed=True)
    assert last_complete_checkpoint(tmp_path / "killed").name == "checkpoint-4"

    resumed, whole = train(load_recipe(None, killed)), train(load_recipe(None, options))
    assert resumed.resumed_from.name == "checkpoint-4"
    assert [step for step, _ in whole.losses] == [1, 2, 3, 4, 5, 6] and len({loss for _, loss in whole.losses}) == 6
    assert resumed.losses == whole.losses
    for file in ("checkpoint-6/model.safetensors", "model/transformer/diffusion_pytorch_model.safetensors"):
        ours, theirs = load_file(tmp_path / "killed" / file), load_file(tmp_path / "out" / file)
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert value.equal(ours[name]), (file, name)
    for grid in ("step-0000003.png", "step-0000006.png"):
        pictures = [(tmp_path / run / "samples" / grid).read_bytes() for run in ("killed", "out")]
        assert pictures[0] == pictures[1]


def test_a_finished_run_is_not_trained_again(options: list[str], tmp_path: Path) -> None:
    first = train(load_recipe(None, [*options, "--training.logging_steps=4", "--training.save_steps=100"]))
    assert [step for step, _ in first.losses] == [4, 6]
    shutil.rmtree(tmp_path / "out" / "model")
    again = train(load_recipe(tmp_path / "out" / "recipe.yaml"))
    assert again.losses == first.losses and not list((tmp_path / "out").glob("checkpoint-7"))
    for (name, a), (_, b) in zip(
        first.model.transformer.named_parameters(), again.model.transformer.named_parameters(), strict=True
    ):
        assert a.equal(b), name


def test_a_checkpoint_without_its_average_is_told(options: list[str], tmp_path: Path) -> None:
    train(load_recipe(None, options))
    shutil.rmtree(tmp_path / "out" / "checkpoint-6" / "transformer")
    with pytest.raises(ValueError, match=r"the averaged weights of .*checkpoint-6 can't be read"):
        train(load_recipe(None, options))


def test_another_recipe_is_not_continued_but_other_pictures_are(options: list[str]) -> None:
    train(load_recipe(None, options))
    with pytest.raises(ValueError, match=r"holds checkpoints of another recipe \(data was .*flip=True"):
        train(load_recipe(None, [*options, "--data.flip=false"]))
    train(load_recipe(None, [*options, "--training.samples.every=1", "--training.workers=1"]))


@pytest.mark.parametrize("latents", [False, True], ids=["pixels", "latents"])
def test_a_run_whose_images_have_changed_is_not_continued(
    options: list[str], image_dir: Path, vae_dir: Path, tmp_path: Path, latents: bool
) -> None:
    shutil.copytree(image_dir, tmp_path / "images")
    options += [f"--data.dataset={tmp_path / 'images'}", f"--data.cache_dir={tmp_path}"]
    options += [f"--data.vae={vae_dir}"] if latents else []
    train(load_recipe(None, [*options, "--training.max_steps=1", "--training.save_steps=1"]))
    more = [*options, "--training.max_steps=2", "--training.save_steps=1"]
    train(load_recipe(None, more))
    (tmp_path / "images" / "train" / "cat" / "03.png").rename(tmp_path / "images" / "train" / "cat" / "new.png")
    with pytest.raises(ValueError, match=r"data\.dataset: the images have changed since the run in .*out began"):
        train(load_recipe(None, more))
