"""Promise: what several commands have in common is called the same everywhere, and earlier names still work."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM

from moh.cli.main import _GROUPS, build_parser
from moh.cli.options import output_of

SUB = next(action for action in build_parser()._actions if action.dest == "command")
PARSERS = {name: parser for name, parser in SUB.choices.items() if name != "eval"}
KINDS = next(action for action in SUB.choices["eval"]._actions if action.dest == "eval_command").choices
PARSERS |= {f"eval {name}": parser for name, parser in KINDS.items()}
EXPORTS = next(action for action in SUB.choices["export"]._actions if action.dest == "kind").choices
PARSERS |= {f"export {name}": parser for name, parser in EXPORTS.items()}
NO_JSON = {
    "chat": "a conversation",
    "explore": "an application",
    "serve": "a server, whose answers are JSON",
    "export": "its sub-commands have it",
    "lm-eval": "another program's own options",
    "run": "another program's own options",
}
"""Commands without `--json`, and why."""
OUTPUT = ("demo", "convert", "eval lm", "sample", "inspect", "curve", "extend-vocabulary", "convert-published")


def options(name: str) -> set[str]:
    return {option for action in PARSERS[name]._actions for option in action.option_strings}


def test_every_command_is_in_one_group_of_the_overview() -> None:
    grouped = [name for names in _GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(SUB.choices)


@pytest.mark.parametrize("name", PARSERS)
def test_every_command_takes_debug(name: str) -> None:
    assert "--debug" in options(name)


@pytest.mark.parametrize("name", PARSERS)
def test_commands_that_end_with_a_result_print_it_as_json(name: str) -> None:
    assert ("--json" in options(name)) == (name not in NO_JSON)


@pytest.mark.parametrize("name", OUTPUT)
def test_the_output_has_one_name(name: str) -> None:
    assert {"--output", "-o"} <= options(name)
    shown = {
        option for action in PARSERS[name]._actions if action.help != "==SUPPRESS==" for option in action.option_strings
    }
    assert not {"--out", "--output-dir"} & shown


@pytest.mark.parametrize(
    ("command", "old"),
    [
        (["demo"], "--output-dir"),
        (["curve", "x"], "--out"),
        (["sample", "x"], "--out"),
        (["inspect", "x"], "--out"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else value,
)
def test_an_earlier_name_of_the_output_works_and_names_the_new_one(capsys, command, old) -> None:
    for option in ("-o", "--output", old):
        assert build_parser().parse_args([*command, option, "place"]).output == "place"
    err = capsys.readouterr().err.splitlines()
    assert err == [f"moh {command[0]}: {old} is now --output, or -o; the old name will be removed"]


@pytest.mark.parametrize("place", [["{out}"], ["--output", "{out}"], ["-o", "{out}"]], ids=str)
def test_convert_takes_its_output_by_place_and_by_name(moh, base_dir: Path, tmp_path: Path, place) -> None:
    where = [part.replace("{out}", str(tmp_path / "out")) for part in place]
    assert moh("convert", base_dir, *where, "--share", 0.5, "--router", "query_norm").code == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.share == 0.5


@pytest.mark.parametrize("place", [[], ["a", "-o", "b"]], ids=str)
def test_an_output_that_is_missing_or_given_twice_is_wrong_usage(moh, base_dir: Path, place) -> None:
    result = moh("convert", base_dir, *place, "--share", 0.5, "--router", "query_norm")
    assert result.code == 2
    assert result.err[-1].startswith(
        "moh convert: the output must be given once, as OUTPUT or as --output DIR (-o), got "
    )


def test_convert_prints_json_and_three_quarters_are_the_default(moh, base_dir, text_file, tmp_path) -> None:
    options = ["--files", text_file, "--calibration-tokens", 1024, "--json"]
    result = moh("convert", base_dir, "-o", tmp_path / "out", *options)
    assert result.code == 0, result.err
    assert json.loads(result.out[0]) == {"output": str(tmp_path / "out"), "share_of_heads": 0.75}
    result = moh("convert", base_dir, tmp_path / "no", "--share", 0.5, "--active-heads", 1, *options)
    assert result.code == 2 and "share must be left out where shared_heads or active_heads is given" in result.err[-1]


@pytest.mark.parametrize(
    "device", [["--device", "cpu"], ["--device-map", "cpu"], ["--device-map", '{"": "cpu"}']], ids=str
)
def test_a_model_is_placed_and_rounded_as_requested(moh, base_dir: Path, text_file: Path, device) -> None:
    command = ["eval", "text", base_dir, "--files", text_file, "--seq-len", 32, "--max-tokens", 96, "--json"]
    exact, rounded = (json.loads(moh(*command, "--dtype", d, *device).out[0]) for d in ("float32", "bfloat16"))
    assert exact["loss"] != rounded["loss"] == pytest.approx(exact["loss"], rel=0.02)
    assert (
        json.loads(moh(*command[:1], *command[2:], *device).out[0]) == exact
    )  # moh eval MODEL, the checkpoint's dtype


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--device", "gpu"], "--device must be a device that works here, got 'gpu'"),
        (["--device", f"cuda:{torch.cuda.device_count()}"], "--device must be a device that works here, got 'cuda:"),
        (["--device", "cpu", "--device-map", "auto"], "--device must be left out with --device-map, got 'cpu'"),
        (["--device-map", '{"": '], "--device-map must be a name or a JSON object"),
        (["--revision", "main"], "--revision is for a model that is named on the hub, and "),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_place_that_is_not_there_is_told(moh, base_dir: Path, given, message) -> None:
    result = moh("generate", base_dir, "the head", *given)
    assert result.code == 2 and message in result.err[-1]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["eval", "images", "{text}"], "model must be an image classifier, and "),
        (["eval", "text", "{images}"], "model must be a language model, and "),
        (["eval", "images", "{images}"], "--images must be given, because "),
        (
            ["eval", "{images}", "--images", "{folder}", "--dtype", "bfloat16"],
            "--dtype must be float32 for a network that reads images",
        ),
        (
            ["eval", "{images}", "--images", "{folder}", "--device-map", "auto"],
            "--device-map is for language models of transf",
        ),
    ],
    ids=" ".join,
)
def test_eval_names_what_does_not_fit_the_kind_of_model(moh, base_dir, classifiers, folder, command, message) -> None:
    places = {"text": str(base_dir), "images": str(classifiers["75"]), "folder": str(folder)}
    result = moh(*[part.format(**places) for part in command])
    assert result.code == 2 and message in result.err[-1]


def test_eval_images_is_eval_for_a_classifier(moh, classifiers, folder: Path) -> None:
    results = [moh(*words, classifiers["75"], "--images", folder, "--json") for words in (["eval", "images"], ["eval"])]
    first, second = (json.loads(result.out[0]) for result in results)
    assert first["top1"] == second["top1"] and first["images"] == 12


@pytest.mark.parametrize("name", ["MODEL", "text", "lm"])
def test_a_directory_with_the_name_of_a_sub_command_can_be_evaluated(name: str) -> None:
    assert build_parser().parse_args(["eval", f"./{name}"]).model == f"./{name}"
    if name == "MODEL":
        assert build_parser().parse_args(["eval", name]).model == name


@pytest.mark.parametrize(
    "extra", [[], ["--shape", 1, 4, 2, 128, 32], ["--shape", 1, 4, 2, 128, 32, "--share", 0.5]], ids=str
)
def test_info_prints_json(moh, extra) -> None:
    result = moh("info", *extra, "--json")
    read = json.loads(result.out[0])
    assert result.code == 0 and len(result.out) == 1
    assert read["backend"] in read["reasons"] if extra else read["backends"]["reference"] is None
    assert ("projections" in read) == ("--share" in extra)


def test_info_describes_a_model_in_json(moh, moh_dir: Path, base_dir: Path) -> None:
    read = json.loads(moh("info", moh_dir, "--json").out[0])
    assert (read["model_type"], read["share_of_heads"], read["layers"], read["runs"]) == ("moh_llama", 0.5, 2, "moh")
    assert json.loads(moh("info", base_dir, "--json").out[0])["share_of_heads"] is None


def test_the_list_of_recipes_is_json_too(moh) -> None:
    read, shown = json.loads(moh("train", "--list", "--json").out[0]), moh("train", "--list").out
    assert [f"{name} {about}" for name, about in read["recipes"].items()] == [
        " ".join(row.split()) for row in shown[:-1]
    ]
    assert read["directory"] in shown[-1]


def test_the_demo_prints_its_report_as_json_alone(moh, base_dir, text_file, tmp_path, monkeypatch) -> None:
    import moh.demo as demo

    short = partial(demo.DemoSettings, seq_len=32, calibration_tokens=512, heldout_tokens=160)
    monkeypatch.setattr(demo, "DemoSettings", short)
    result = moh("demo", "--base", base_dir, "--files", text_file, "--steps", 1, "--json", "-o", tmp_path / "demo")
    assert result.code == 0, result.err
    read = json.loads(result.out[0])
    assert len(result.out) == 1 and read.pop("output") == str(tmp_path / "demo")
    assert read == json.loads((tmp_path / "demo" / "report.json").read_text())


def test_a_vocabulary_is_extended_in_the_requested_dtype(moh, base_dir: Path, tmp_path: Path) -> None:
    for options, dtype in (([], torch.float32), (["--dtype", "bfloat16", "--device", "cpu"], torch.bfloat16)):
        assert moh("extend-vocabulary", base_dir, base_dir, tmp_path / "new", *options).code == 0
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "new").dtype == dtype


@pytest.mark.parametrize(
    ("place", "handed"),
    [
        ([], []),
        (["--device", "cpu", "--dtype", "bfloat16"], ["--dtype", "bfloat16", "--device", "cpu"]),
        (["--device-map", '{"": "cpu"}', "--active-heads", 3], []),
    ],
    ids=str,
)
def test_a_server_takes_the_place_before_the_model(moh, moh_dir: Path, monkeypatch, place, handed) -> None:
    pytest.importorskip("uvicorn", reason="the serve extra is not installed")
    seen: list[list[str]] = []
    monkeypatch.setattr("transformers.cli.transformers.app", seen.append)
    assert moh("serve", *place, moh_dir, "--port", 8123).code == 0
    assert seen == [["serve", str(moh_dir), *handed, "--port", "8123"]]
    import transformers

    kind = vars(transformers).pop("MoHLlamaForCausalLM")
    model = kind.from_pretrained(moh_dir, device_map="meta")  # the server's own, unless a device map is given
    assert model.device.type == ("cpu" if "--device-map" in place else "meta")
    assert model.config.share == (1.0 if "--active-heads" in place else 0.5)


@pytest.mark.parametrize("options", [["--dtype", "float16"], ["--device-map", "auto"], ["--revision", "v2"]], ids=str)
def test_what_fids_network_can_not_take_is_refused(moh, folder: Path, options) -> None:
    pytest.importorskip("torch_fidelity", reason="the diffusion extra is not installed")
    result = moh("eval", "fid", folder / "ant", "--reference", folder / "bee", *options)
    assert result.code == 2 and options[0] in result.err[-1]


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_every_command(moh, shell: str) -> None:
    pytest.importorskip("shtab", reason="the extra `completion` is not installed")
    result = moh("--print-completion", shell)
    script = "\n".join(result.out)
    assert result.code == 0 and not result.err
    assert all(name in script for name in (*SUB.choices, "--share", "--print-completion", "images"))


def test_completion_without_shtab_names_the_extra(moh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    result = moh("--print-completion", "bash")
    assert (
        result.code == 2
        and "shtab, which is not installed: pip install 'mixture-of-heads[completion]'" in result.err[-1]
    )


def test_completion_comes_from_shtab(moh, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("shtab")
    module.complete = lambda parser, shell: f"{parser.prog} in {shell}"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "shtab", module)
    assert moh("--print-completion", "zsh").out == ["moh in zsh"]


@pytest.mark.parametrize(
    "words",
    ["convert M OUT --share 0.5", "convert M --share 0.5 OUT", "convert --share 0.5 M OUT", "convert M --share 0.5 -o OUT",
     "extend-vocabulary A B --multiple-of 8 OUT", "extend-vocabulary A B OUT --multiple-of 8"],
)  # fmt: skip
def test_the_output_may_come_before_or_after_the_options(words: str) -> None:
    arguments, rest = build_parser().parse_known_args(words.split())
    assert output_of(arguments) == "OUT" and rest == []


def test_a_word_too_many_is_not_taken_for_the_output() -> None:
    _, rest = build_parser().parse_known_args(["convert", "M", "OUT", "--share", "0.5", "MORE"])
    assert rest == ["MORE"]
