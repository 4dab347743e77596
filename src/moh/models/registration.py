"""Make transformers' Auto classes know our models without importing either before it is needed.

transformers keeps its own models as names and imports them on first use; while it is still being imported ours are
added the same way. Once it is imported, its public `register` does it. Imports nothing of transformers by itself.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from moh._import_hooks import when_imported
from moh.models.transformers.families import FAMILIES
from moh.models.transformers.published import recognise_published_llama


@dataclass(frozen=True)
class _ModelType:
    """One type of model.

    Attributes:
        name: `config.model_type`.
        package: where its classes are.
        config: name of the configuration's class.
        models: name of the Auto class -> name of the model's class.
    """

    name: str
    package: str
    config: str
    models: Mapping[str, str]


_MODEL_TYPES = (
    _ModelType(
        "moh_llama",
        "moh.models.llama",
        "MoHLlamaConfig",
        {"AutoModel": "MoHLlamaModel", "AutoModelForCausalLM": "MoHLlamaForCausalLM"},
    ),
    _ModelType(
        "moh_vit",
        "moh.models.transformers_vit",
        "MoHViTConfig",
        {"AutoModel": "MoHViTModel", "AutoModelForImageClassification": "MoHViTForImageClassification"},
    ),
    *(
        _ModelType(f"moh_{f.model_type}", "moh.models.transformers", f.moh_config, f.moh_models)
        for f in FAMILIES
        if f.model_type not in ("llama", "vit")
    ),
)
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


class _LazyPackage(ModuleType):
    """Stands where transformers looks for a model type's module, and is our package from the first look on."""

    def __init__(self, name: str, package: str) -> None:
        super().__init__(name)
        self._package = package

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(importlib.import_module(self._package), name)


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
    for kind in _MODEL_TYPES:
        package = importlib.import_module(kind.package)
        config = getattr(package, kind.config)
        mapping.register(kind.name, config, exist_ok=True)
        for auto_class, model in kind.models.items():
            getattr(auto, auto_class).register(config, getattr(package, model), exist_ok=True)


def _add_config_names() -> None:
    names = sys.modules[f"{_AUTO}.configuration_auto"].CONFIG_MAPPING_NAMES
    for kind in _MODEL_TYPES:
        module = f"transformers.models.{kind.name}"
        sys.modules[module] = _LazyPackage(module, kind.package)
        names[kind.name] = kind.config


def _add_model_names() -> None:
    auto = sys.modules[f"{_AUTO}.modeling_auto"]
    for kind in _MODEL_TYPES:
        for auto_class, model in kind.models.items():
            getattr(auto, _MODEL_NAMES[auto_class])[kind.name] = model
