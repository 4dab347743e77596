"""Promise: every command and recipe on the page of the paper's tables exists, with the options that it is given there."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from moh.cli.main import build_parser
from moh.training import load_recipe
from moh.training.shipped import find_recipe

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
CODE = [
    code.strip()
    for code in re.findall(r"`([^`\n]+)`|^\$ (.+?)(?:  +#.*)?$", PAGE, re.MULTILINE)
    for code in code
    if code
]
RECIPES = sorted({name for code in CODE for name in re.findall(r"(?<![\w/])(?:llm|vit|dit)/\w+", code)})
COMMANDS = [code for code in CODE if code.startswith(("moh ", "python "))]


def options(command: str) -> list[str]:
    return [word for word in command.split() if re.fullmatch(r"--[a-z][a-z-]*", word)]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_in_the_package(name: str) -> None:
    assert find_recipe(name).is_file()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_exists_and_has_its_options(command: str) -> None:
    program, *words = command.split()
    if program == "python":
        target = Path(*words[1].split(".")).with_suffix(".py") if words[0] == "-m" else Path(words[0])
        text = (ROOT / target).read_text(encoding="utf-8")
        missing = [option for option in options(command) if not _has(text, option)]
    else:
        parser = build_parser()
        while words and (choices := _commands(parser)) and words[0] in choices:
            parser = choices[words.pop(0)]
        assert parser.prog != "moh", f"{command}: there is no such command"
        missing = [option for option in options(command) if option not in parser._option_string_actions]
    assert not missing, f"{command}: {', '.join(missing)} is no option of it"


def _has(script: str, option: str) -> bool:
    """Whether a script defines the option: quoted, or as claims.py states the sizes that are options too."""
    field = option.removeprefix("--").replace("-", "_")
    return f'"{option}"' in script or re.search(rf"\b{field}=", script) is not None


@pytest.mark.parametrize("code", [code for code in CODE if re.search(r"--\w+\.", code)])
def test_a_recipe_has_the_fields_that_are_overridden(code: str) -> None:
    name = next((name for name in RECIPES if name in code), "dit/xl_2_paper")
    overrides = re.findall(r"(--\w+\.[\w.]+) (\S+)", code)
    assert len(overrides) == len(re.findall(r"--\w+\.", code))
    load_recipe(find_recipe(name), [f"{field}={value}" for field, value in overrides])


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    actions = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return next((dict(action.choices) for action in actions), {})


def test_the_page_has_commands() -> None:
    assert len(COMMANDS) > 12 and len(RECIPES) > 8
