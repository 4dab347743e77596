"""Promise: `moh inspect` writes tables and figures with their data for every family, and reports what does not match."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moh.data.images.formats import FolderImages
from moh.evaluation.curve import text_curve
from moh.inspection import image_groups, inspect_groups, text_groups
from moh.models.timm.loading import load_image_classifier
from moh.training import pack_tokens

TABLES = {"heads.csv", "heads.parquet", "layers.csv", "summary.md"}
TESTED = {"tests.csv", "specialised.csv"}


def figures(*names: str) -> set[str]:
    return {f"{name}.{suffix}" for name in names for suffix in ("csv", "png", "svg")}


def rows(file: Path) -> list[dict[str, str]]:
    with open(file, newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


@pytest.fixture
def kinds(tmp_path: Path) -> Path:
    """Two groups of three texts, each with its own file suffix."""
    for number, words in enumerate(("the head sees a gate .", "a key skips the value .", "in the layer of token .")):
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / f"{number}.txt").write_text(f"{words} " * (5 + number))
        (tmp_path / f"{number}.py").write_text(f"{words} query " * (5 + number))
    return tmp_path


def test_groups_of_texts_become_tables_and_figures(moh, moh_dir: Path, kinds: Path) -> None:
    out = kinds / "new" / "heads"
    groups = ["--group", f"a={kinds / 'a'}", "--group", f"code={kinds / '*.py'}"]
    told = moh("inspect", moh_dir, *groups, "--output", out, "--seq-len", 8, "--permutations", 19, "--ablate", 2,
               "--similarity", 2)  # fmt: skip
    assert told.code == 0, told.err
    drawn = figures("head_load", "group_load", "shared_routed", "distances", "ablation")
    asked = {"similarity.csv", "ablation_groups.csv"}
    assert {path.name for path in out.iterdir()} - {"unusual.csv"} == TABLES | TESTED | drawn | asked
    model, tokenizer = AutoModelForCausalLM.from_pretrained(moh_dir), AutoTokenizer.from_pretrained(moh_dir)
    texts = {
        "a": [file.read_text() for file in sorted((kinds / "a").iterdir())],
        "code": [file.read_text() for file in sorted(kinds.glob("*.py"))],
    }
    use = inspect_groups(model, text_groups(model, tokenizer, texts, seq_len=8))
    expected, read = use.rows(), rows(out / "heads.csv")
    assert [float(row["load"]) for row in read] == [row["load"] for row in expected]
    assert len(rows(out / "ablation.csv")) == 2 * 4
    assert [row["group"] for row in rows(out / "ablation_groups.csv")] == ["a"] * 8 + ["code"] * 8
    share = 100 * use.share()[0]  # of these texts: with this router not what was asked for
    assert re.match(rf"layer   0: {share:3.0f} % of the heads used; a group's load of a routed head \d", told.out[0])
    assert re.match(r"the groups' loads differ by \d\.\d{4} bits, p = ", told.out[2])
    summary = (out / "summary.md").read_text(encoding="utf-8")
    assert summary.startswith("# Which head does what: ") and "| code | " in summary
    assert "| layer | attention patterns | outputs, cosine |" in summary and "scores of shared heads" not in summary
    assert f"p = {float(rows(out / 'tests.csv')[-1]['p']):.3g}" in summary


def test_the_trade_off_on_the_same_texts_is_drawn_on_demand(moh, moh_dir: Path, kinds: Path) -> None:
    out, file = kinds / "heads", kinds / "0.py"
    told = moh("inspect", moh_dir, "--files", file, "--output", out, "--seq-len", 8, "--curve")
    assert told.code == 0, told.err
    assert {path.name for path in out.iterdir()} >= {"curve.png", "curve.svg", "curve.csv", "curve.json", "heads.csv"}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(moh_dir), AutoTokenizer.from_pretrained(moh_dir)
    expected = text_curve(model, pack_tokens([file.read_text()], tokenizer, seq_len=8), repeats=0)
    points = [(float(row["share"]), float(row["perplexity"])) for row in rows(out / "curve.csv")]
    assert points == [(point.share, pytest.approx(point.perplexity)) for point in expected.points] and len(points) > 1
    told = moh("inspect", moh_dir, "--files", file, "--html", kinds / "page.html", "--curve")
    assert told.code == 2 and "--curve needs --output DIR" in told.err[0]


def test_files_are_groups_of_their_names_and_single_texts_are_said_to_be_so(moh, moh_dir: Path, kinds: Path) -> None:
    out = kinds / "heads"
    told = moh("inspect", moh_dir, "--files", kinds / "0.py", kinds / "1.py", "--output", out, "--seq-len", 8)
    assert told.code == 0, told.err
    assert {row["group"] for row in rows(out / "heads.csv")} == {"0.py", "1.py"}
    assert "A group has a single text" in (out / "summary.md").read_text(encoding="utf-8")


def test_one_group_is_shown_and_not_tested(moh, moh_dir: Path, text_file: Path, tmp_path: Path) -> None:
    told = moh("inspect", moh_dir, "--files", text_file, "--output", tmp_path / "heads", "--seq-len", 32)
    assert told.code == 0 and "not tested: at least 2 groups with inputs are needed, got 1" in told.out
    names = {path.name for path in (tmp_path / "heads").iterdir()} - {"unusual.csv"}
    assert names == TABLES | figures("head_load", "group_load", "shared_routed")
    assert "Not tested: at least 2 groups" in (tmp_path / "heads" / "summary.md").read_text(encoding="utf-8")


def test_a_dense_model_is_shown_as_what_it_is(moh, base_dir: Path, kinds: Path) -> None:
    groups = ["--group", f"a={kinds / 'a'}", "--group", f"code={kinds / '*.py'}"]
    told = moh("inspect", base_dir, *groups, "--output", kinds / "heads", "--seq-len", 16)
    assert told.code == 0, told.err
    assert told.out[0] == "layer   0: 100 % of the heads used; dense"
    assert "not tested: groups can't differ in their heads" in told.out[2]
    assert {row["kind"] for row in rows(kinds / "heads" / "heads.csv")} == {"dense"}


@pytest.mark.parametrize("kind", ["75", "dense"])
def test_classes_of_images_become_tables_and_figures(moh, classifiers, folder: Path, tmp_path: Path, kind) -> None:
    out = tmp_path / "heads"
    told = moh(
        "inspect",
        classifiers[kind],
        "--images",
        folder,
        "--output",
        out,
        "--classes",
        "cow",
        "ant",
        "--permutations",
        9,
    )
    assert told.code == 0, told.err
    drawn = figures("head_load", "group_load", "shared_routed")
    routed = set() if kind == "dense" else TESTED | {"pairs.csv", "scores.csv"} | figures("distances", "group_scores")
    assert {path.name for path in out.iterdir()} - {"unusual.csv"} == TABLES | drawn | routed
    model = load_image_classifier(classifiers[kind])
    expected = inspect_groups(model, image_groups(model, FolderImages(folder))).rows()
    assert [float(row["load"]) for row in rows(out / "heads.csv")] == [row["load"] for row in expected]
    assert told.out[-1] == f"{out}: summary.md, tables and figures of 3 groups, 12 inputs"


@pytest.mark.parametrize("by", ["timestep", "class"])
def test_a_diffusion_models_time_steps_and_classes_are_groups(moh, folder: Path, tmp_path: Path, by) -> None:
    pytest.importorskip("diffusers")
    from moh.models.diffusers import MoHDiTTransformer2DModel
    from moh.sampling import ImageModel, diffusion_scheduler, save_image_model

    model = MoHDiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, num_layers=1, sample_size=8, num_classes=3, in_channels=3,
        shared_heads=1, active_heads=1,
    )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    (tmp_path / "model").mkdir()
    save_image_model(ImageModel(model, diffusion_scheduler(clip=True), None, ("ant", "bee", "cow")), tmp_path / "model")
    out = tmp_path / "heads"
    options = ["--by", by, "--bins", 2, "--permutations", 9, "--ablate", 3]
    told = moh("inspect", tmp_path / "model", "--images", folder, "--output", out, *options)
    assert told.code == 0, told.err
    expected = {"t 0-499", "t 500-999"} if by == "timestep" else {"ant", "bee", "cow"}
    assert {row["group"] for row in rows(out / "heads.csv")} == expected
    assert "# Which head does what: " in (out / "summary.md").read_text(encoding="utf-8")
    assert "--images must be given, because" in moh("inspect", tmp_path / "model", "--output", out).err[0]
    told = moh("inspect", tmp_path / "model", "--images", folder, "--html", tmp_path / "page.html")
    assert told.code == 2 and "--html shows texts and images of classifiers" in told.err[0]


def test_a_page_of_the_texts_given(moh, moh_dir: Path, text_file: Path, tmp_path: Path) -> None:
    told = moh("inspect", moh_dir, "--files", text_file, "--html", tmp_path / "page.html", "--max-tokens", 600)
    assert told.code == 0 and "1 texts" in told.out[0]
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count('"tokens":[') == 1 and text_file.name in page


@pytest.mark.parametrize("kind", ["75", "dense"])
def test_a_page_of_some_images_of_each_class(moh, classifiers, folder: Path, tmp_path, kind: str) -> None:
    told = moh(
        "inspect", classifiers[kind], "--images", folder, "--html", tmp_path / "page.html", "--classes", "ant", "cow"
    )
    assert told.code == 0 and "4 images" in told.out[0]
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    samples = json.loads(re.findall(r'id="data">(.*?)</script>', page, re.DOTALL)[0])["samples"]
    assert [sample["group"] for sample in samples] == ["ant", "ant", "cow", "cow"]
    assert samples[0]["layers"][0]["grid"] == [0, 2, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_an_unknown_class_or_no_target_is_refused_before_anything_is_written(
    moh, classifiers, folder, tmp_path
) -> None:
    page = tmp_path / "page.html"
    told = moh("inspect", classifiers["75"], "--images", folder, "--html", page, "--classes", "dog")
    assert told.code == 2 and "--classes must be among ant, bee, cow, got dog" in told.err[0]
    told = moh("inspect", classifiers["75"], "--images", folder, "--output", tmp_path / "out", "--classes", "dog")
    assert told.code == 2 and "groups must be among ant, bee, cow, got 'dog'" in told.err[0]
    assert "--output DIR or --html FILE" in moh("inspect", classifiers["75"], "--images", folder).err[0]
    told = moh("inspect", classifiers["75"], "--images", folder, "--html", tmp_path / "no" / "page.html")
    assert "--html must be a file in a directory that exists" in told.err[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--group", "a"], "--group must be NAME=TEXTS, got 'a'"),
        (["--group", "a=/nowhere/*.txt"], "--group: no file matches '/nowhere/*.txt'"),
        (["--group", "a=/nowhere.txt"], "no such text file or directory: /nowhere.txt"),
        (["--permutations", 0], "--permutations must be at least 1, got 0"),
        (["--ablate", -1], "--ablate must be at least 0, got -1"),
        (["--similarity", -1], "--similarity must be at least 0, got -1"),
        (["--seq-len", 1], "seq_len must be at least 2 and max_tokens at least seq_len, got 1, 8192"),
        (["--dead", 0.99], "0 <= dead < overloaded <= 1 must hold, got dead = 0.99 and overloaded = 0.95"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_does_not_fit_is_told_in_one_line(moh, moh_dir, text_file, tmp_path: Path, argv, message) -> None:
    told = moh("inspect", moh_dir, "--files", text_file, "--output", tmp_path / "out", "--max-tokens", 8192, *argv)
    assert told.code == 2 and len(told.err) == 1 and message in told.err[0], told.err
    assert not (tmp_path / "out").exists()
