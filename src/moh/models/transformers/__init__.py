"""Models of transformers with Mixture-of-Head attention, as ordinary transformers models (extra `hf`).

`MoHLlamaForCausalLM`, `MoHViTForImageClassification` and so on, one for each dense class in `families.FAMILIES`, and their
configurations `MoHLlamaConfig`; each is made on first use. Importing `moh` is enough for the Auto classes to find them.
"""

from __future__ import annotations

from typing import Any

from moh.models.transformers.families import FAMILIES


def __getattr__(name: str) -> Any:
    if not name.startswith("MoH"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from moh._extras import require

    require("transformers", extra="hf")
    from moh.models.transformers.models import make_class

    globals()[name] = made = make_class(name)
    return made


def __dir__() -> list[str]:
    made = {
        name for family in FAMILIES for name in (family.moh_config, *(f"MoH{dense}" for dense in family.dense_models))
    }
    return sorted({*globals(), *made})
