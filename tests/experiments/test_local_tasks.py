"""Promise: the local suite comes from a dictionary and running text, is always the same, and runs in the harness.

`wordnet_sample/` holds some entries of WordNet, with its licence.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import local_answers
import local_questions as questions
import local_tasks
import pytest
from does_routing_pay_models import FIXED_HEADS, cell_file
from local_questions import definitions, kinds, last_words, next_sentences, opposites, read_synsets

import moh
from moh.cli import main
from moh.evaluation.harness.results import ModelScores, TaskEvaluation
from moh.evaluation.harness.scores import Part, TaskScore
from moh.models.transformers.loading import load_causal_lm, load_tokenizer

SAMPLE = Path(__file__).parent / "wordnet_sample"
DOCUMENT = "\n\n".join(
    f"The {name} router reads the queries of its layer. It then picks some heads for each of the {name} tokens, as many "
    f"as the budget allows. All other heads of the {name} layer are skipped, and their work is left to the shared heads. "
    f"Nobody else has to know about the {name} heads. What is skipped costs nothing, neither time nor memory of the {name} "
    "router. The sum of the gates tells how much of the work was done."
    for name in ("first", "second", "third", "fourth")
)


@pytest.fixture(scope="module")
def nouns() -> list[questions.Synset]:
    return read_synsets(SAMPLE, "noun")


def test_synsets_are_read_with_all_that_belongs_to_them(nouns: list[questions.Synset]) -> None:
    by_word = {synset.words[0]: synset for synset in nouns}
    male = by_word["male"]
    assert male.definition == "an animal that produces gametes (spermatozoa) that can fertilize female gametes (ova)"
    assert male.field == 5 and male.counts[0] > 0 and male.broader == (15388,)
    assert by_word["natural object"].broader == (by_word["whole"].offset,)


def test_a_definition_is_that_of_the_word_and_the_wrong_ones_are_of_its_field(nouns: list[questions.Synset]) -> None:
    asked = definitions(nouns, count=20)
    assert len(asked) == 20
    for question in asked:
        word = question["question"].split('"')[1]
        right = [synset for synset in nouns if synset.words[0] == word]
        answer = question["choices"][question["answer"]]
        assert answer in [synset.definition for synset in right] and len(set(question["choices"])) == 4
        fields = {synset.field for synset in nouns if synset.definition in question["choices"]}
        assert fields & {synset.field for synset in right}


def test_no_wrong_kind_is_a_broader_term_of_the_word(nouns: list[questions.Synset]) -> None:
    by_offset = {synset.offset: synset for synset in nouns}
    asked = kinds(nouns, count=20)
    assert asked
    for question in asked:
        word = question["question"].removesuffix(" is a kind of").partition(" ")[2]
        (synset, *_) = [
            synset
            for synset in nouns
            if synset.words[0] == word
            and any(
                question["choices"][question["answer"]] in by_offset[b].words for b in synset.broader if b in by_offset
            )
        ]
        wrong = {choice for i, choice in enumerate(question["choices"]) if i != question["answer"]}
        direct = {name for offset in synset.broader if offset in by_offset for name in by_offset[offset].words}
        assert not wrong & direct and len(wrong) == 3


def test_opposites_are_asked_once_a_pair() -> None:
    asked = opposites(read_synsets(SAMPLE, "adj"), count=100)
    words = [question["word"] for question in asked]
    assert len(asked) > 8 and len(set(words)) == len(words)
    assert not {answer for question in asked for answer in question["answers"]} & set(words)


def test_last_words_occur_in_the_text_before_them() -> None:
    asked = last_words([DOCUMENT], count=50)
    assert asked
    for question in asked:
        assert question["word"] in question["text"].split(" ") or question["word"] in question["text"]
        assert f"{question['text']} {question['word']}" in " ".join(DOCUMENT.split())


def test_the_next_sentence_follows_and_the_others_do_not() -> None:
    asked = next_sentences([DOCUMENT], count=50)
    text = " ".join(DOCUMENT.split())
    assert asked
    for question in asked:
        follows = [f"{question['question']} {choice}" in text for choice in question["choices"]]
        assert follows.index(True) == question["answer"] and sum(follows) == 1


def test_the_same_text_gives_the_same_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        local_tasks.make_local_tasks(tmp_path / name, wordnet=SAMPLE, documents=[DOCUMENT], count=10)
    files = sorted(file.name for file in (tmp_path / "a").glob("*.jsonl"))
    assert len(files) == 6
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_solved_examples_are_never_asked(tmp_path: Path) -> None:
    local_tasks.make_local_tasks(tmp_path / "tasks", wordnet=SAMPLE, documents=[DOCUMENT], count=10)
    read = [
        {json.loads(line)["word"] for line in (tmp_path / "tasks" / file).read_text().splitlines()}
        for file in ("moh_opposites.jsonl", "moh_opposites.examples.jsonl")
    ]
    assert all(read) and not read[0] & read[1]


def test_the_suite_runs_from_making_its_tasks_to_the_table(
    base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    import datasets.config

    monkeypatch.setattr(local_tasks, "load_corpus", lambda *a: type("Corpus", (), {"heldout": [DOCUMENT]}))
    monkeypatch.setattr(local_tasks, "wordnet_directory", lambda cache: SAMPLE)
    monkeypatch.setattr("sys.argv", ["local_tasks.py", str(tmp_path / "tasks")])
    local_tasks.main()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    assert main(["eval", "lm", str(base_dir), "--suite", str(tmp_path / "tasks" / "local.yaml"), "--truncate"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[3:8]] == [
        "Definitions",
        "Kinds",
        "Opposites",
        "Last words",
        "Next sentences",
    ]
    assert "| Opposites | 5 | exact_match (word) |" in lines[5]


def test_texts_without_questions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the texts are too short: they give no question for the task moh_last_words"):
        local_tasks.make_local_tasks(tmp_path / "tasks", wordnet=SAMPLE, documents=["Too short."])
    assert not (tmp_path / "tasks").exists()


def test_a_damaged_dictionary_names_the_line(tmp_path: Path) -> None:
    for file in SAMPLE.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "data.adj").write_text("  licence\n00001 00 a zz broken | gloss\n")
    with pytest.raises(ValueError, match=r"data\.adj, line 2 is not a synset: '00001 00 a zz"):
        read_synsets(tmp_path, "adj")


def test_without_the_dictionary_or_its_registry_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions, "_INSTALLED", Path("nowhere/at/all"))
    monkeypatch.setattr("moh.data.fetch.shutil.which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"wordnet-base is not installed .* this is not a Debian or Ubuntu system"):
        questions.wordnet_directory(tmp_path)


def _score(task: str, *values: float) -> TaskScore:
    mean = sum(values) / len(values)
    return TaskScore(task, task, 0, "acc", "none", mean, 0.25, len(values), 0, (Part(task, 1.0, values),), {})


def test_the_page_has_the_paired_differences() -> None:
    dense = ModelScores("dense", "a", 1.0, (_score("A", 1, 1, 0, 0), _score("B", 1, 0, 1, 0)))
    fixed = ModelScores("fixed heads, 78%", "b", 7 / 9, (_score("A", 1, 0, 0, 0), _score("B", 1, 0, 1, 0)))
    page = local_answers.page(
        "tiny", TaskEvaluation("local", (dense, fixed), None, {"lm-eval": "1"}, "a CPU"), "the command"
    )
    assert "| share of heads | model | A (acc) | B (acc) | average |" in page
    assert "| 100% | dense | 50.0 ± 25.0 | 50.0 ± 25.0 | 50.0 ± 17.7 |" in page
    # the differences of A are 0, -1, 0, 0: their mean is -25 points, its standard error 50 / sqrt(4)
    assert "| 78% | fixed heads | -25.0 ± 25.0 | +0.0 ± 0.0 | -12.5 ± 12.5 |" in page


def test_one_command_asks_all_models_and_resumes(base_dir: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    dense = load_causal_lm(base_dir)
    dense.config.max_position_embeddings = 512  # room for the questions
    dense.save_pretrained(tmp_path / "dense")
    load_tokenizer(base_dir).save_pretrained(tmp_path / "dense")
    monkeypatch.setattr(local_answers, "MODELS", {"tiny": lambda: tmp_path / "dense"})
    monkeypatch.setattr(local_answers, "load_corpus", lambda *a: SimpleNamespace(heldout=[DOCUMENT]))
    monkeypatch.setattr(local_answers, "wordnet_directory", lambda cache: SAMPLE)
    work = tmp_path / "work" / "quick"
    options = [
        "--quick",
        "--models",
        str(tmp_path),
        "--model",
        "tiny",
        "--methods",
        FIXED_HEADS,
        "--work",
        str(tmp_path / "work"),
    ]
    monkeypatch.setattr("sys.argv", ["local_answers.py", *options])
    with pytest.raises(FileNotFoundError, match=r"tiny-fixed_heads-0\.556 holds no model: run does_routing_pay"):
        local_answers.main()
    cell = cell_file(tmp_path, "tiny", FIXED_HEADS, 5 / 9)
    converted = moh.convert(dense, calibration=[[1, 2, 3, 4] * 16], router="fixed", share=0.75)
    converted.save_pretrained(cell.with_suffix(""))
    cell.write_text("{}")
    local_answers.main()
    page = (work / "local_answers.md").read_text()
    assert {row["model"] for row in json.loads((work / "local_answers.json").read_text())["rows"]} >= {"dense"}
    assert "| 100% | dense |" in page and "| 75% | fixed heads |" in page
    scores = {file: file.stat().st_mtime_ns for file in (work / "tiny" / "scores").iterdir()}
    assert len(scores) == 10 and len(json.loads((work / "tiny" / "results.json").read_text())["rows"]) == 10
    local_answers.main()
    assert {file: file.stat().st_mtime_ns for file in (work / "tiny" / "scores").iterdir()} == scores
