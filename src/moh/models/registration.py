"""Make transformers' Auto classes know our models without importing either before it is needed.

transformers keeps its own models as names and imports them on first use; while it is still being imported ours are
added the same way. Once it is imported, its public `register` does it. Imports nothing of transformers by itself.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

from moh._import_hooks import when_imported
from moh.models.transformers.families import FAMILIES
from moh.models.transformers.published import recognise_published_llama

_MODEL_NAMES = {
    "AutoModel": "MODEL_MAPPING_NAMES",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
}
_AUTO = "transformers.models.auto"
_PACKAGE = "moh.models.transformers"


class _LazyPackage(ModuleType):
    """Stands where transformers looks for a model type's module, and has what our package has."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(importlib.import_module(_PACKAGE), name)


def register_with_transformers() -> None:
    """Register now if transformers' Auto classes are loaded, else as soon as they are."""
    if f"{_AUTO}.modeling_auto" in sys.modules:
        _register_classes()
    else:
        when_imported(f"{_AUTO}.configuration_auto", _add_config_names)
        when_imported(f"{_AUTO}.modeling_auto", _add_model_names)
    when_imported(f"{_AUTO}.configuration_auto", recognise_published_llama)


def _register_classes() -> None:
    auto = importlib.import_module(f"{_AUTO}.modeling_auto")
    mapping = importlib.import_module(f"{_AUTO}.configuration_auto").CONFIG_MAPPING
    package = importlib.import_module(_PACKAGE)
    for family in FAMILIES:
        config = getattr(package, family.moh_config)
        mapping.register(config.model_type, config, exist_ok=True)
        for auto_class, model in family.moh_models.items():
            getattr(auto, auto_class).register(config, getattr(package, model), exist_ok=True)


def _add_config_names() -> None:
    names = sys.modules[f"{_AUTO}.configuration_auto"].CONFIG_MAPPING_NAMES
    for family in FAMILIES:
        module = f"transformers.models.moh_{family.model_type}"
        sys.modules[module] = _LazyPackage(module)
        names[f"moh_{family.model_type}"] = family.moh_config


def _add_model_names() -> None:
    auto = sys.modules[f"{_AUTO}.modeling_auto"]
    for family in FAMILIES:
        for auto_class, model in family.moh_models.items():
            getattr(auto, _MODEL_NAMES[auto_class])[f"moh_{family.model_type}"] = model
