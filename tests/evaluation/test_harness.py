"""Promise: `moh eval lm` compares dense and MoH models through the harness, and computes nothing twice."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from harness_cases import save_moh, write_tasks

from moh.cli import main
from moh.evaluation.harness import HarnessTask, LoadedModel, evaluate_tasks, runner
from moh.models.transformers.loading import load_causal_lm, load_tokenizer

TASKS = ["tiny_choice:2", "tiny_last", "tiny_write:1"]


@pytest.fixture(scope="module")
def moh_dir(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_moh(base_dir, tmp_path_factory.mktemp("harness") / "converted")


@pytest.fixture(scope="module")
def tasks_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.fixture(scope="module")
def result(base_dir: Path, moh_dir: Path, tasks_dir: Path):
    models = {"dense": base_dir, "MoH": moh_dir}
    return evaluate_tasks(models, TASKS, include_paths=[tasks_dir], batch_size=4, progress=False)


def test_scores_are_those_that_a_direct_computation_gives(result, base_dir: Path, tasks_dir: Path) -> None:
    model, tokenizer = load_causal_lm(base_dir), load_tokenizer(base_dir)
    right = []
    for line in (tasks_dir / "tiny_last.jsonl").read_text().splitlines():
        ids = tokenizer(json.loads(line)["text"], return_tensors="pt").input_ids
        with torch.no_grad():
            best = int(model(ids).logits[0, -1].argmax())
        right.append(float(tokenizer.convert_ids_to_tokens(best) == json.loads(line)["word"]))
    score = result.models[0].scores[1]
    assert (score.task, score.metric, score.questions) == ("tiny_last", "acc", 12)
    assert score.value == pytest.approx(sum(right) / 12)
    assert list(score.parts[0].values) == right


def test_shots_and_metrics_are_those_that_were_asked_for(result) -> None:
    rows = [(score.task, score.shots, score.metric) for score in result.models[0].scores]
    assert rows == [("tiny_choice", 2, "acc_norm"), ("tiny_last", 0, "acc"), ("tiny_write", 1, "exact_match")]


def test_each_model_shows_its_share_of_heads(result) -> None:
    assert [model.share for model in result.models] == [1.0, 0.5]
    assert "| heads used |  |  | 100.0 % | 50.0 % |  |" in result.to_markdown()


def test_differences_are_paired_over_the_questions(result) -> None:
    first, second = (torch.tensor(model.scores[0].parts[0].values) for model in result.models)
    delta = second - first
    estimate = result.difference(1, 0)
    assert estimate.value == pytest.approx(float(delta.mean()), abs=1e-6)
    assert estimate.stderr == pytest.approx(float(delta.std()) / math.sqrt(12), abs=1e-6)
    average = result.average_difference(1)
    parts = [result.difference(1, task) for task in range(3)]
    assert average.value == pytest.approx(sum(part.value for part in parts) / 3)
    assert average.stderr == pytest.approx(math.sqrt(sum(part.stderr**2 for part in parts)) / 3)


def test_the_table_holds_a_row_a_task_and_the_average(result) -> None:
    lines = result.to_markdown().splitlines()
    assert lines[0] == "| task | shots | score | dense | MoH | MoH − dense |"
    assert [line.split(" | ")[0] for line in lines[3:7]] == [
        "| tiny_choice",
        "| tiny_last",
        "| tiny_write",
        "| average",
    ]
    frame = result.to_frame()
    assert list(frame.task) == ["tiny_choice"] * 2 + ["tiny_last"] * 2 + ["tiny_write"] * 2
    assert frame.difference.isna().sum() == 3


def test_a_model_in_memory_gives_the_scores_of_its_files(result, moh_dir: Path, tasks_dir: Path) -> None:
    models = {"memory": LoadedModel(load_causal_lm(moh_dir), load_tokenizer(moh_dir))}
    again = evaluate_tasks(models, TASKS[:1], include_paths=[tasks_dir], batch_size=4, progress=False)
    assert again.models[0].scores[0].parts == result.models[1].scores[0].parts


def test_a_group_has_one_score_weighted_by_size(base_dir: Path, tasks_dir: Path) -> None:
    models, options = [base_dir], {"include_paths": [tasks_dir], "progress": False}
    group = evaluate_tasks(models, ["tiny_group"], **options).models[0].scores
    listed = evaluate_tasks(models, [HarnessTask("tiny_list", metric="acc")], **options).models[0].scores
    assert [score.task for score in listed] == ["tiny_choice", "tiny_fixed"]
    assert [(score.task, score.questions) for score in group] == [("tiny_group", 17)]
    assert group[0].value == pytest.approx((12 * listed[0].value + 5 * listed[1].value) / 17)
    assert [len(part.values) for part in group[0].parts] == [12, 5]


def test_perplexities_are_shown_but_not_averaged(base_dir: Path, tasks_dir: Path) -> None:
    tasks = [HarnessTask("tiny_last", metric="perplexity"), HarnessTask("tiny_choice")]
    result = evaluate_tasks([base_dir], tasks, include_paths=[tasks_dir], limit=4, progress=False)
    score = result.models[0].scores[0]
    assert score.value > 1 and score.parts == () and math.isnan(result.difference(0, 0).stderr)
    assert result.average(0) is None and "average" not in result.to_markdown()


class TestCommand:
    """The command line."""

    @pytest.fixture
    def argv(self, base_dir: Path, moh_dir: Path, tasks_dir: Path, tmp_path: Path) -> list[str]:
        options = ["--include-path", str(tasks_dir), "--output", str(tmp_path / "out"), "--limit", "5"]
        return ["eval", "lm", str(moh_dir), "--dense", str(base_dir), "--tasks", *TASKS[:2], *options]

    def test_it_prints_the_table_and_writes_all_files(self, argv: list[str], tmp_path: Path, capsys) -> None:
        assert main(argv) == 0
        out = tmp_path / "out"
        assert capsys.readouterr().out in (out / "table.md").read_text()
        rows = list(csv.DictReader((out / "table.csv").open()))
        assert [row["task"] for row in rows] == ["tiny_choice"] * 2 + ["tiny_last"] * 2
        written = json.loads((out / "results.json").read_text())
        assert [model["share_of_heads"] for model in written["models"]] == [1.0, 0.5]
        full = written["models"][1]["tasks"]["tiny_choice"]
        assert full["results"]["tiny_choice"]["sample_len"] == 5 and full["n-shot"] == {"tiny_choice": 2}

    def test_what_is_finished_is_not_computed_again(self, argv: list[str], capsys, monkeypatch) -> None:
        asked = []
        original = runner.Runner._ask
        monkeypatch.setattr(runner.Runner, "_ask", lambda *a: asked.append((a[2], a[3].spec.name)) or original(*a))
        assert main(argv) == 0
        first = capsys.readouterr().out
        assert len(asked) == 4
        assert main(argv) == 0
        assert capsys.readouterr().out == first and len(asked) == 4
        assert main([*argv, "--seed", "2"]) == 0  # another setting
        assert len(asked) == 8

    def test_after_an_interruption_the_rest_is_computed(self, argv: list[str], capsys, monkeypatch) -> None:
        asked = []
        original = runner.Runner._ask

        def ask(*a):
            asked.append(a[3].spec.name)
            if len(asked) == 2:
                raise KeyboardInterrupt
            return original(*a)

        monkeypatch.setattr(runner.Runner, "_ask", ask)
        assert main(argv) == 130
        assert main(argv) == 0
        assert asked == ["tiny_choice", "tiny_last", "tiny_last", "tiny_choice", "tiny_last"]

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            (["--tasks", "tiny_choise"], "there is no task 'tiny_choise'; did you mean tiny_choice"),
            (["--tasks", "tiny_choice:x"], "tasks must be NAME or NAME:SHOTS with shots of at least 0, got 'tiny_choice:x'"),
            (["--tasks", "tiny_fixed:3"], "task 'tiny_fixed' has no place for solved examples"),
            (["--tasks", "tiny_last:0", "tiny_last:2"], "tasks must name each task once, but tiny_last is given with"),
            (["--suite", "paper41"], "suite must be one of paper14, scratch6, or a group's .yaml file, got 'paper41'"),
            (["--tasks", "tiny_last", "--limit", "0"], "limit must be at least 1, got 0"),
            (["--tasks", "tiny_last", "--batch-size", "x"], "--batch-size must be a number or auto, got 'x'"),
            (["--tasks", "tiny_last", "--batch-size", "auto"], "batch_size 'auto' fits requests to a GPU's memory"),
            (["--tasks", "tiny_last", "--max-length", "65"], "max_length must be at most the model's 64 positions, got 65"),
            (["--tasks", "tiny_choice:9"], "task 'tiny_choice': a request has "),
            (["--tasks", "tiny_glued"], "the answer 's' has no token of its own after "),
            (["--tasks", "tiny_last", "--include-path", "nowhere"], "there is no 'nowhere'"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )  # fmt: skip
    def test_what_cannot_be_is_told_in_one_line(
        self, base_dir, tasks_dir, capsys, monkeypatch, changed: list[str], message: str
    ) -> None:
        _without_the_harness_tasks(monkeypatch)
        assert main(["eval", "lm", str(base_dir), "--include-path", str(tasks_dir), *changed]) == 2
        out, err = capsys.readouterr()
        assert not out and message in err.splitlines()[-1]

    def test_one_of_suite_and_tasks_must_be_given(self, base_dir: Path, capsys) -> None:
        with pytest.raises(SystemExit):
            main(["eval", "lm", str(base_dir)])
        assert "one of the arguments --suite --tasks is required" in capsys.readouterr().err


def _without_the_harness_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hides the harness's own task files: reading them all takes a minute."""
    from moh.evaluation.harness import registry

    original = registry.TaskManager
    monkeypatch.setattr(
        registry,
        "TaskManager",
        lambda *, include_path, **_: original(include_defaults=False, include_path=include_path),
    )


def test_contexts_that_are_too_long_are_cut_and_counted_if_one_allows_it(base_dir: Path, tasks_dir: Path) -> None:
    options = {"include_paths": [tasks_dir], "limit": 3, "progress": False}
    result = evaluate_tasks(
        [base_dir], ["tiny_choice:9", "tiny_write:11", "tiny_last"], truncate=True, max_length=30, **options
    )
    assert [score.truncated for score in result.models[0].scores] == [9, 3, 0]
    assert "were cut at the beginning: tiny_choice, tiny_write." in result.to_markdown()
    with pytest.raises(ValueError, match="a request has 7 tokens, 4 of them its answer, but the model takes 3"):
        evaluate_tasks([base_dir], ["tiny_write"], truncate=True, max_length=3, **options)


def test_a_tokenizer_of_another_model_is_refused(base_dir: Path, tasks_dir: Path) -> None:
    tokenizer = load_tokenizer(base_dir)
    tokenizer.add_tokens([f"new{i}" for i in range(3)])
    models = {"mixed": LoadedModel(load_causal_lm(base_dir), tokenizer)}
    with pytest.raises(ValueError, match="model 'mixed': the tokenizer has 26 tokens and the model a vocabulary of"):
        evaluate_tasks(models, ["tiny_last"], include_paths=[tasks_dir])


def test_data_that_cannot_be_had_is_told_for_all_tasks_before_any_question(base_dir: Path, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(runner.Runner, "_ask", lambda *a: asked.append(a))
    with pytest.raises(
        RuntimeError, match=r"the data of 2 of 2 tasks is not available: sciq \(.*\); piqa \(.*--include-path"
    ):
        evaluate_tasks([base_dir], ["sciq", "piqa"])
    assert not asked


def test_an_interrupted_download_names_its_task(base_dir: Path, tasks_dir: Path, monkeypatch) -> None:
    import datasets

    def cut(*args: object, **kwargs: object) -> None:
        raise ConnectionError("Connection broken: IncompleteRead(12 bytes read, 88 more expected)")

    monkeypatch.setattr(datasets, "load_dataset", cut)
    with pytest.raises(RuntimeError, match=r"the data of the task is not available: tiny_last .*IncompleteRead"):
        evaluate_tasks([base_dir], ["tiny_last"], include_paths=[tasks_dir])


@pytest.fixture
def begun(base_dir: Path, moh_dir: Path, bos_tokenizer) -> dict[str, LoadedModel]:
    """The tiny model, dense and converted, with a tokenizer that puts its token before every text, and a chat template."""
    bos_tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}"
        "{{ 'head ' if m.role == 'user' else 'gate ' }}{{ m.content }}{{ ' . ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'gate ' }}{% endif %}"
    )
    models = {name: load_causal_lm(path) for name, path in (("dense", base_dir), ("MoH", moh_dir))}
    for model in models.values():
        model.resize_token_embeddings(len(bos_tokenizer))
    return {name: LoadedModel(model, bos_tokenizer) for name, model in models.items()}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The token ids of all requests, without padding, as the models read them."""
    rows: list[list[int]] = []

    def keep(ids, mask=None) -> None:
        rows.extend(row[row != 0].tolist() for row in ids)

    call, generate = runner.HFLM._model_call, runner.HFLM._model_generate
    monkeypatch.setattr(runner.HFLM, "_model_call", lambda m, ids, **k: keep(ids) or call(m, ids, **k))
    monkeypatch.setattr(
        runner.HFLM, "_model_generate", lambda m, context, **k: keep(context) or generate(m, context=context, **k)
    )
    return rows


@pytest.mark.parametrize("options", [{}, {"truncate": True, "max_length": 12}], ids=["whole", "cut"])
def test_every_request_begins_as_the_tokenizer_begins_a_text(begun, tasks_dir: Path, asked, options) -> None:
    tasks = ["tiny_choice:2", "tiny_write:3", "tiny_last"]
    result = evaluate_tasks(begun, tasks, include_paths=[tasks_dir], limit=3, progress=False, batch_size=2, **options)
    bos = begun["dense"].tokenizer.bos_token_id
    assert asked and all(row[0] == bos and bos not in row[1:] for row in asked)
    assert asked[: len(asked) // 2] == asked[len(asked) // 2 :]  # dense and MoH
    assert any(score.truncated for score in result.models[0].scores) == bool(options)
    assert max(map(len, asked)) <= options.get("max_length", 64)


def test_every_window_of_a_running_text_begins_as_the_tokenizer_begins_a_text(begun, tasks_dir: Path, asked) -> None:
    models, tokenizer = {"dense": begun["dense"]}, begun["dense"].tokenizer
    options = {"include_paths": [tasks_dir], "progress": False, "max_length": 16}
    score = evaluate_tasks(models, ["tiny_running"], **options).models[0].scores[0]
    texts = [json.loads(line)["text"] for line in (tasks_dir / "tiny_running.jsonl").read_text().splitlines()]
    bos = tokenizer.bos_token_id
    assert len(asked) == 4 and all(row[0] == bos and bos not in row[1:] for row in asked)
    total = 0.0
    for ids in (tokenizer(text, add_special_tokens=False).input_ids for text in texts):
        pieces = [ids[:15], ids[15:31], ids[31:]] if len(ids) > 16 else [ids]
        befores = [[], [], ids[31 - (16 - len(ids[31:])) : 31]]
        for before, piece in zip(befores, pieces, strict=False):
            row = torch.tensor([[bos, *before, *piece]])
            with torch.no_grad():
                found = models["dense"].model(row).logits.log_softmax(-1)[0, :-1].gather(-1, row[0, 1:, None])
            total += float(found[-len(piece) :].sum())
    assert score.value == pytest.approx(math.exp(-total / 45), rel=1e-4)


def test_running_text_of_a_model_without_such_a_token(base_dir: Path, tasks_dir: Path) -> None:
    result = evaluate_tasks([base_dir], ["tiny_running"], include_paths=[tasks_dir], progress=False)
    assert result.models[0].scores[0].value > 1


def test_questions_are_asked_in_the_models_chat_template_on_request(begun, base_dir, tasks_dir, asked) -> None:
    options = {"include_paths": [tasks_dir], "limit": 2, "progress": False, "apply_chat_template": True}
    result = evaluate_tasks(begun, ["tiny_write:1"], **options)
    tokenizer = begun["dense"].tokenizer
    line = json.loads((tasks_dir / "tiny_write.jsonl").read_text().splitlines()[0])
    texts = [tokenizer.decode(row) for row in asked]
    assert texts[0].startswith("<bos> head ") and texts[0].endswith(f". head {line['text']} . gate")
    assert texts[0].count("<bos>") == 1 and texts[0].count("gate ") >= 1
    assert "apply_chat_template True" in result.to_markdown()
    with pytest.raises(
        ValueError, match="apply_chat_template needs a chat template, and the model's tokenizer has none"
    ):
        evaluate_tasks([base_dir], ["tiny_write"], **options)
