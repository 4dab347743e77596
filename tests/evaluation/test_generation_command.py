"""Promise: `moh eval fid` prints the scores of its functions under true names; `moh eval MODEL` stays as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from generation_cases import random_images, save_tiny_classifier, write_npz, write_pngs

from moh.cli import main
from moh.cli.main import build_parser
from moh.data.images import datasets
from moh.data.images.sources import TensorImages
from moh.evaluation.generation import load_classifier, score_images


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return {
        "samples": write_npz(tmp_path / "samples.npz", random_images(30, seed=1, bright=200)),
        "reference": write_pngs(tmp_path / "reference", random_images(40, seed=2)),
        "classifier": save_tiny_classifier(tmp_path / "classifier"),
    }


def moh(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, list[str], list[str]]:
    capsys.readouterr()
    try:
        code = main([str(part) for part in argv])
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out.splitlines(), err.splitlines()


def test_it_prints_the_scores_on_a_named_classifier_and_says_so(capsys, files: dict[str, Path]) -> None:
    argv = ["eval", "fid", files["samples"], "--reference", files["reference"], "--features", files["classifier"]]
    expected = score_images(files["samples"], files["reference"], load_classifier(files["classifier"]))
    code, out, _ = moh(capsys, *argv)
    assert code == 0 and out == expected.lines()
    assert f"Frechet distance on features of {files['classifier']}, not comparable with FID: " in out[0]
    code, out, _ = moh(capsys, *argv, "--json", "--batch-size", 7)
    assert code == 0 and len(out) == 1
    read = json.loads(out[0])
    assert read["label"] == expected.label and "fid" not in read
    assert read["frechet_distance"] == pytest.approx(expected.frechet_distance, rel=1e-4)


def test_the_reference_may_be_a_data_set_by_name(
    capsys, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = random_images(40, seed=3, channels=1)
    held_out = TensorImages(pixels, torch.zeros(40), ("a",))
    asked = []
    monkeypatch.setattr(datasets, "load_evaluation_images", lambda name: asked.append(name) or held_out)
    monkeypatch.chdir(tmp_path)
    classifier = save_tiny_classifier(tmp_path / "grey", channels=1)
    argv = ["eval", "fid", files["samples"], "--reference", "fashion-mnist", "--features", classifier, "--json"]
    code, out, err = moh(capsys, *argv)
    assert code == 0 and asked == ["fashion-mnist"], err
    expected = score_images(files["samples"], pixels, load_classifier(classifier))
    assert json.loads(out[0])["frechet_distance"] == pytest.approx(expected.frechet_distance, rel=1e-6)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("./nowhere", "--reference must be 'fashion-mnist', a directory, a .tar file or a data set's name"),
        ("no.npz", "is not there"),
    ],
)
def test_a_reference_that_is_not_there_is_told(capsys, files: dict[str, Path], reference: str, message: str) -> None:
    argv = ["eval", "fid", files["samples"], "--reference", reference, "--features", files["classifier"]]
    code, out, err = moh(capsys, *argv)
    assert code == 2 and not out and len(err) == 1 and message in err[0]


def test_the_references_statistics_are_saved_and_serve_in_its_place(
    capsys, files: dict[str, Path], tmp_path: Path
) -> None:
    common = ["--features", files["classifier"], "--size", 8, "--json"]
    target = tmp_path / "new" / "reference.safetensors"
    argv = ["eval", "fid", files["samples"], "--reference", files["reference"], *common, "--save-reference", target]
    code, first, _ = moh(capsys, *argv)
    assert code == 0 and target.is_file()
    code, second, _ = moh(capsys, "--debug", "eval", "fid", files["samples"], "--reference", target, *common)
    assert code == 0 and second == first


def test_the_weights_that_are_missing_are_told_in_one_line(capsys, files, tmp_path: Path, monkeypatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    code, out, err = moh(capsys, "eval", "fid", files["samples"], "--reference", files["reference"])
    assert code == 2 and not out and len(err) == 1
    assert err[0].startswith("moh eval fid: the Inception weights that FID needs are not at ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--features", "nowhere/at/all"], "there is no 'nowhere/at/all'"),
        (["--inception", "nowhere.pth"], "there is no file with Inception weights at nowhere.pth"),
        (["--save-reference", "statistics.npz"], "--save-reference must be a file that ends in .safetensors"),
        (["--size", "0"], "size must be at least 1, got 0"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_options_that_cannot_be_are_told_in_one_line(capsys, files: dict[str, Path], options, message: str) -> None:
    code, out, err = moh(capsys, "eval", "fid", files["samples"], "--reference", files["reference"], *options)
    assert code == 2 and not out and len(err) == 1 and message in err[0]


def test_samples_that_are_not_there_are_told_before_the_reference_is_read(capsys, files: dict[str, Path]) -> None:
    code, _, err = moh(capsys, "eval", "fid", "nowhere", "--reference", files["reference"])
    assert code == 2 and err == [
        "moh eval fid: images must be a directory, an .npz file or a Dataset, but 'nowhere' is not there"
    ]


@pytest.mark.parametrize(
    "argv", [["eval", "fid"], ["eval", "fid", "x"], ["eval", "fid", "x", "--reference", "y", "--corpus", "z"],
             ["eval", "fid", "x", "--reference", "y", "--features", "a", "--inception", "b"]],
    ids=" ".join,
)  # fmt: skip
def test_what_the_parser_does_not_know_ends_with_code_2(capsys, argv: list[str]) -> None:
    code, out, err = moh(capsys, *argv)
    assert code == 2 and not out and "error: " in err[-1]


@pytest.mark.parametrize(
    ("argv", "command", "named"),
    [
        ("eval fid a --reference b", "eval fid", {"samples": "a"}),
        ("--debug eval fid a --reference b", "eval fid", {"samples": "a", "debug": True}),
        ("eval lm a --suite b", "eval lm", {"checkpoint": ["a"]}),
        ("eval ./fid", "eval", {"model": "./fid"}),
        ("eval --json fid", "eval", {"model": "fid", "json": True}),
        ("generate eval fid", "generate", {"model": "eval", "prompt": "fid"}),
    ],
)
def test_only_the_first_word_makes_a_longer_command(argv: str, command: str, named: dict[str, object]) -> None:
    read = vars(build_parser().parse_args(argv.split()))
    assert read["command"] == command and named.items() <= read.items()
