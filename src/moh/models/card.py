"""The model card (README.md) of a model that this package writes, and pushing a model's directory to the hub.

A card has a mark (`CARD_MARK`); without it, here or on the hub, it is somebody's own and stays.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moh._extras import require
from moh._files import CARD_MARK, write_text
from moh.config import MoHConfig
from moh.models.heads import mean_share, use_of_heads, varies_by_token
from moh.models.kinds import Kind, kind_of, looks_local, saved_config
from moh.models.transformers.families import family_of
from moh.routing import Router

TAG = "mixture-of-heads"
"""The tag of our models on the hub."""

PLACE = "PATH OR NAME"
"""What stands for the model's name in a card's code until it is pushed."""

_LOADED = re.compile(r'((?:from_pretrained|create_model|load_image_model)\("(?:hf-hub:)?)[^"]*"')
"""The model's name in a card's code."""

_TASKS = {"images": "image-classification", "diffusion": "unconditional-image-generation"}
_INTRODUCTION = (
    "{what} with [Mixture-of-Head attention](https://arxiv.org/abs/2410.11842): {use}. "
    "It needs the package `mixture-of-heads`{why}."
)


def describe(
    model: Any,
    *,
    base: str | Path | None = None,
    revision: str | None = None,
    facts: Mapping[str, str] | None = None,
) -> None:
    """Say what `save_pretrained` writes into the model's card; adds to what was said before.

    Args:
        model: a MoH model.
        base: the dense model that it was made from.
        revision: of that model, if it is named on the hub.
        facts: as in `write_card`.
    """
    before = card_of(model)
    merged = {**before.get("facts", {}), **(facts or {})}
    origin = {name: before[name] for name in ("base", "revision") if name in before}
    if base is not None:
        origin = {"base": base, "revision": revision}
    model.moh_card = {**origin, "facts": merged}


def card_of(model: Any) -> dict[str, Any]:
    """What `describe` was given for a model, as arguments of `write_card`."""
    return dict(vars(model).get("moh_card", {}))


def write_card(
    directory: str | Path,
    layers: Sequence[MoHConfig],
    *,
    base: str | Path | None = None,
    revision: str | None = None,
    facts: Mapping[str, str] | None = None,
    results: Sequence[tuple[str, str, str]] = (),
) -> bool:
    """Write a saved model's card, unless there is one that is not ours.

    Args:
        directory: the model, saved in the format of transformers, timm or diffusers.
        layers: the heads of each layer; empty for a dense model.
        base: the dense model that it was made from, a hub name or a path; its card, if it has one, gives the licence.
        revision: branch, tag or commit of a base that is a hub name.
        facts: further rows for the table, such as `{"calibrated on": "49,152 tokens of botchan"}`.
        results: rows (what was measured, this model, the control).

    Returns:
        whether the card was written.

    Raises:
        ValueError: there is no such model.
    """
    file = Path(directory, "README.md")
    if file.exists() and CARD_MARK not in file.read_text(encoding="utf-8", errors="replace"):
        return False
    kind = kind_of(directory)
    front: dict[str, Any] = {"library_name": kind.library, "tags": [TAG]}
    if kind.task in _TASKS:
        front["pipeline_tag"] = _TASKS[kind.task]
    elif (saved_config(directory).get("architectures") or [""])[0].endswith(("ForCausalLM", "LMHeadModel")):
        front["pipeline_tag"] = "text-generation"
    if base is not None:
        front |= _licence(base, revision)
        if not _is_local(base):
            front["base_model"] = str(base).removeprefix("hf-hub:")
    table = dict(_heads(layers)) | dict(facts or {})
    if base is not None:
        at = f", revision `{revision}`" if revision is not None else ""
        table = {"base model": f"`{Path(base).expanduser().absolute().name if _is_local(base) else base}`{at}"} | table
    write_text(file, _text(kind, directory, front, layers, table, results))
    return True


def layers_of(model: Any) -> list[MoHConfig]:
    """The heads of each MoH layer of a model; empty for a dense one."""
    return [module.config for module in model.modules() if isinstance(module, Router)]


def _text(
    kind: Kind,
    directory: str | Path,
    front: Mapping[str, Any],
    layers: Sequence[MoHConfig],
    table: Mapping[str, str],
    results: Sequence[tuple[str, str, str]],
) -> str:
    yaml = require("huggingface_hub", extra="hf").ModelCardData(**front).to_yaml()
    what = {"language": "A language model", "images": "An image classifier", "diffusion": "A diffusion model"}[
        kind.task
    ]
    why = ""
    if kind.library == "transformers":
        what = "A transformer"
        why = f": unless `moh` is imported, transformers doesn't recognize the model type `{kind.name}`"
    use = use_of_heads(layers, mean_share(layers) if layers else 1.0, "attention heads")
    extra = {"transformers": "hf", "timm": "vision", "diffusers": "diffusion"}[kind.library]
    parts = [
        f"---\n{yaml}\n---\n{CARD_MARK}",
        _INTRODUCTION.format(what=what, use=use, why=why),
        f'```console\n$ pip install "mixture-of-heads[{extra}]"\n```',
        f"```python\n{_usage(kind, directory)}\n```",
    ]
    if table:
        parts.append("| | |\n| --- | --- |\n" + "\n".join(f"| {name} | {value} |" for name, value in table.items()))
    if results:
        head = "| measured | this model | control |\n| --- | --- | --- |\n"
        parts.append(head + "\n".join(f"| {what} | {ours} | {control} |" for what, ours, control in results))
    return "\n\n".join(parts) + "\n"


def _usage(kind: Kind, directory: str | Path) -> str:
    if kind.library == "timm":
        return f'import moh\nimport timm\n\nmodel = timm.create_model("hf-hub:{PLACE}", pretrained=True)'
    if kind.library == "diffusers":
        if Path(directory, "model_index.json").is_file():
            return f'from moh.sampling import load_image_model\n\nmodel = load_image_model("{PLACE}")'
        return (
            "from moh.models.diffusers import MoHDiTTransformer2DModel\n\n"
            f'model = MoHDiTTransformer2DModel.from_pretrained("{PLACE}")'
        )
    family, made = family_of(kind.name), (saved_config(directory).get("architectures") or [""])[0]
    auto = "AutoModel" if family is None else family.auto_class([made.removeprefix("MoH")])
    return f'import moh\nfrom transformers import {auto}\n\nmodel = {auto}.from_pretrained("{PLACE}")'


def _heads(layers: Sequence[MoHConfig]) -> Mapping[str, str]:
    if not layers:
        return {}
    first = layers[0]
    chosen = "chosen by a token on average" if varies_by_token(layers) else "chosen by each token"
    rows = {
        "heads per layer": _numbers(layer.num_heads for layer in layers),
        "shared by all tokens": _numbers(layer.num_shared for layer in layers),
        chosen: _numbers(layer.active_heads for layer in layers),
        "router": _numbers(f"`{layer.router}`" for layer in layers),
    }
    return rows if first.routing_unit == "head" else rows | {"routing unit": f"`{first.routing_unit}`"}


def _numbers(values: Any) -> str:
    """One number if all layers have the same, else all of them."""
    numbers = [str(value) for value in values]
    return numbers[0] if len(set(numbers)) == 1 else ", ".join(numbers)


def _is_local(path: str | Path) -> bool:
    return looks_local(path) or Path(path).expanduser().exists()


def _licence(base: str | Path, revision: str | None) -> dict[str, Any]:
    """The licence that a model's card states; empty if it has no card or none can be had."""
    from huggingface_hub import ModelCard, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    try:
        if not _is_local(base):
            name = str(base).removeprefix("hf-hub:")
            data = ModelCard.load(hf_hub_download(name, "README.md", revision=revision)).data
        elif (card := Path(base).expanduser() / "README.md").is_file():
            data = ModelCard.load(card).data
        else:
            return {}
    except (
        OSError,
        ValueError,
        EntryNotFoundError,
        HfHubHTTPError,
    ):  # no network, no such repository, no readable card
        return {}
    names = ("license", "license_name", "license_link")
    return {name: value for name in names if (value := getattr(data, name, None)) is not None}


def push_directory(directory: str | Path, name: str | None = None, *, private: bool | None = None) -> str:
    """Push a saved model to the hub, with its tokenizer, code and card; a card there that is not ours stays.

    Args:
        directory: the model; in a card of ours the code gets the model's name on the hub, here too.
        name: "NAME" or "OWNER/NAME"; None takes the directory's.
        private: whether a new repository is private; None is the account's default.

    Returns:
        the model's name on the hub, with its owner.
    """
    require("huggingface_hub", extra="hf")
    import huggingface_hub

    folder, api = Path(directory).expanduser().resolve(), huggingface_hub.HfApi()
    place = api.create_repo(name or folder.name, private=private, exist_ok=True).repo_id
    ignored = []
    card = folder / "README.md"
    if card.is_file():
        text = card.read_text(encoding="utf-8")
        if CARD_MARK in text:
            write_text(card, _renamed(text, place))
        if api.file_exists(place, "README.md"):
            there = Path(api.hf_hub_download(place, "README.md")).read_text(encoding="utf-8", errors="replace")
            ignored = [] if CARD_MARK in there else ["README.md"]
    api.upload_folder(repo_id=place, folder_path=folder, ignore_patterns=ignored, commit_message="Add the model")
    return str(place)


def _renamed(card: str, name: str) -> str:
    """A card of ours whose code loads the model by this name, whatever it was called before."""
    return _LOADED.sub(lambda found: found[1] + name + '"', card)


def push_card(name: str, directory: str | Path, **options: Any) -> None:
    """Give a repository on the hub the card of a saved model unless it has one, before the libraries write theirs.

    Args:
        name: of the repository, which is made if there is none.
        directory: the saved model.
        options: `private` and `token` as in the libraries' `push_to_hub`.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi(token=options.get("token"))
    place = api.create_repo(name, private=options.get("private"), exist_ok=True).repo_id
    if not api.file_exists(place, "README.md"):
        text = _renamed(Path(directory, "README.md").read_text(encoding="utf-8"), place)
        api.upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id=place)


class PushedWithCard:
    """Mixed into model classes whose library pushes them to the hub with a card of its own: ours is there first."""

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """As in the library; a new repository gets the card that `save_pretrained` writes."""
        with tempfile.TemporaryDirectory() as folder:
            model: Any = self
            if hasattr(model, "config") and hasattr(model.config, "architectures"):
                model.config.architectures = [type(model).__name__]  # as transformers does when it saves
            model.save_config(folder) if hasattr(model, "save_config") else model.config.save_pretrained(folder)
            write_card(folder, layers_of(model), **card_of(model))
            if not kwargs.get("create_pr") and not kwargs.get("revision"):  # the card would go to the main branch
                push_card(repo_id, folder, **{name: kwargs.get(name) for name in ("private", "token")})
        return super().push_to_hub(repo_id, **kwargs)  # type: ignore[misc]
