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

_MODEL_TYPE = "moh_llama"
_PACKAGE = "moh.models.llama"
_CONFIG = "MoHLlamaConfig"
_MODELS = {"AutoModel": "MoHLlamaModel", "AutoModelForCausalLM": "MoHLlamaForCausalLM"}
_MODEL_NAMES = {"AutoModel": "MODEL_MAPPING_NAMES", "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"}
_AUTO = "transformers.models.auto"


class _LazyPackage(ModuleType):
    """Stands where transformers looks for a model type's module, and is our package from the first look on."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(importlib.import_module(_PACKAGE), name)


def register_with_transformers() -> None:
    """Register now if transformers' Auto classes are loaded, else as soon as they are."""
    if f"{_AUTO}.modeling_auto" in sys.modules:
        _register_classes()
    else:
        when_imported(f"{_AUTO}.configuration_auto", _add_config_name)
        when_imported(f"{_AUTO}.modeling_auto", _add_model_names)


def _register_classes() -> None:
    auto = importlib.import_module(f"{_AUTO}.modeling_auto")
    mapping = importlib.import_module(f"{_AUTO}.configuration_auto").CONFIG_MAPPING
    package = importlib.import_module(_PACKAGE)
    config = getattr(package, _CONFIG)
    mapping.register(_MODEL_TYPE, config, exist_ok=True)
    for auto_class, model in _MODELS.items():
        getattr(auto, auto_class).register(config, getattr(package, model), exist_ok=True)


def _add_config_name() -> None:
    sys.modules[f"transformers.models.{_MODEL_TYPE}"] = _LazyPackage(f"transformers.models.{_MODEL_TYPE}")
    sys.modules[f"{_AUTO}.configuration_auto"].CONFIG_MAPPING_NAMES[_MODEL_TYPE] = _CONFIG


def _add_model_names() -> None:
    auto = sys.modules[f"{_AUTO}.modeling_auto"]
    for auto_class, names in _MODEL_NAMES.items():
        getattr(auto, names)[_MODEL_TYPE] = _MODELS[auto_class]
