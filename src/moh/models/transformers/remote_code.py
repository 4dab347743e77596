"""Give a saved model of transformers the code to run where our package is not installed, with `trust_remote_code=True`.

The code is `modeling_moh`, copied into the model's directory with the paths of the model's family; config.json names it.
"""

from __future__ import annotations

import json
import pprint
import shutil
from pathlib import Path
from typing import Any

from moh._files import CARD_MARK, check_replaceable, replacing_directory, write_text
from moh.config import ROUTERS
from moh.models.card import PLACE
from moh.models.kinds import saved_config
from moh.models.transformers.families import family_of
from moh.models.transformers.family import Family

CODE_FILE = "modeling_moh.py"
"""Name of the file with the code, in a model's directory."""

_CARD = """
## Without the package

```python
from transformers import {auto}

model = {auto}.from_pretrained("{name}", trust_remote_code=True)
```

This runs `modeling_moh.py`, which computes all heads and weights them: the same outputs, without the time saved.
"""


def export_remote_code(directory: str | Path, output: str | Path | None = None) -> Path:
    """Add the code to a saved model, so that the Auto classes load it anywhere with `trust_remote_code=True`.

    Without our package all heads are computed and then weighted by their gates: the same outputs, to 1e-5. Where it is
    installed its classes are used. Saving such a model again keeps the code.

    Args:
        directory: of a MoH model of transformers, as `save_pretrained` writes it.
        output: directory for a copy with the code; None adds it to `directory`.

    Returns:
        the directory with the code.

    Raises:
        ValueError: there is no such model, its layers don't have all heads, or `output` holds something else; names it.
    """
    source = Path(directory).expanduser()
    config = saved_config(source)
    model_type = str(config.get("model_type", ""))
    family = family_of(model_type)
    if family is None or not model_type.startswith("moh_"):
        raise ValueError(
            f"directory must hold a MoH model of transformers, saved by moh convert, moh train or save_pretrained; the "
            f"config.json of {str(directory)!r} " + (f"has model_type {model_type!r}" if config else "is missing")
        )
    routers = config["router"] if isinstance(config["router"], list) else [config["router"]]
    if other := sorted(set(routers) - set(ROUTERS)):
        raise ValueError(
            f"router must be one of {', '.join(map(repr, ROUTERS))} in every layer, got {', '.join(map(repr, other))}: such "
            f"layers don't have all heads, which the {family.config.removesuffix('Config')} of transformers needs"
        )
    if output is None or Path(output).resolve() == source.resolve():
        _add(source, config, family)
        return source
    check_replaceable(output, name="output")
    with replacing_directory(Path(output)) as scratch:
        shutil.copytree(source, scratch, dirs_exist_ok=True)
        _add(scratch, config, family)
    return Path(output)


def _add(directory: Path, config: dict[str, Any], family: Family) -> None:
    for name in ("attn_implementation", "_attn_implementation"):  # ours are unknown without the package
        if str(config.get(name)).startswith("moh"):
            del config[name]
    made = str((config.get("architectures") or [""])[0]).removeprefix("MoH")
    auto, config["auto_map"] = _auto_map(family, made)
    write_text(directory / CODE_FILE, code_for(family, made))
    write_text(directory / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    card = directory / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    if CARD_MARK in text and "## Without the package" not in text:
        write_text(card, text + _CARD.format(auto=auto, name=PLACE))


def _auto_map(family: Family, made: str) -> tuple[str, dict[str, str]]:
    """The Auto class that loads a model of the dense class `made`, and config.json's entry that names the classes in the code."""
    auto = family.auto_class([made])
    classes = {"AutoConfig": family.config} | dict(family.models)
    if made in family.dense_models:
        classes[auto] = made
    return auto, {auto: f"{Path(CODE_FILE).stem}.MoH{name}" for auto, name in classes.items()}


def code_for(family: Family, made: str) -> str:
    """The text of the code for a model of the dense class `made`."""
    code = Path(__file__).with_name(CODE_FILE).read_text(encoding="utf-8")
    before, _, rest = code.partition("FAMILY: dict[str, Any] = {")
    _, _, after = rest.partition("\n}\n")
    core = [family.core] if family.core else []
    paths = {
        "package": family.package,
        "config": family.config,
        "attention": family.attention,
        "saved_as": made,
        "models": sorted(
            family.dense_models, key=lambda name: name != family.models["AutoModel"]
        ),  # the backbone first
        "layers": family.layers,
        "attention_of_layer": family.attention_of_layer,
        "queries": ".".join([*core, family.fused or family.queries]),
        "output": family.output,
        "fused": ("heads" if family.fused_by_head else "parts") if family.fused else "",
    }
    return f"{before}FAMILY: dict[str, Any] = {pprint.pformat(paths, sort_dicts=False, width=118)}\n{after}"


def keep_remote_code(model: Any, directory: Path) -> None:
    """If a model has been loaded from a directory or repository with the code, give a new directory of it the code too."""
    names = (getattr(model.config, "auto_map", None) or {}).values()
    if any(str(name).rpartition("--")[2].startswith(f"{Path(CODE_FILE).stem}.") for name in names):
        family = family_of(model.config.model_type)
        if family is not None:
            _add(directory, saved_config(directory), family)
