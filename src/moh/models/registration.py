"""Register our models with transformers' Auto classes, PEFT, timm and diffusers, whichever package is imported first.

transformers keeps its own models as names and imports them on first use; until its Auto classes are imported, ours are
added the same way, afterwards through its public `register`. Our packages for timm register their models with timm's own
decorator when they are imported, and diffusers finds ours once it is; this module only decides when. It imports none of
them by itself. PyTorch finds our operators by name, as a program that was saved with `torch.export` needs them.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from moh.models.transformers.families import FAMILIES, known_families
from moh.models.transformers.family import Family


class _CallbackLoader(Loader):
    """Loads as the original loader does, then calls back."""

    def __init__(self, loader: Loader, callback: Callable[[], None]) -> None:
        self._loader = loader
        self._callback = callback

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._callback()

    def __getattr__(self, name: str) -> object:  # get_source, get_filename, ...: tracebacks need them
        return getattr(self._loader, name)


class _Finder(MetaPathFinder):
    def __init__(self, name: str, callback: Callable[[], None]) -> None:
        self._name = name
        self._callback = callback
        self._searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name or self._searching:
            return None
        self._searching = True  # the search below calls this finder again
        try:
            spec = find_spec(fullname)
        finally:
            self._searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _CallbackLoader(spec.loader, self._imported)
        return spec

    def _imported(self) -> None:
        if self in sys.meta_path:  # only once, and not on finding: a module may be found without being imported
            sys.meta_path.remove(self)
            self._callback()


def when_imported(name: str, callback: Callable[[], None]) -> None:
    """Call `callback()` right after the module `name` is imported; now, if it already is."""
    if name in sys.modules:
        callback()
    else:
        sys.meta_path.insert(0, _Finder(name, callback))  # before the finders that would load it without the callback


def register_with_torch() -> None:
    """Let `torch.ops.moh` find our operators now if torch is imported, else as soon as it is."""
    when_imported("torch", _add_operators)


def _add_operators() -> None:
    torch = sys.modules["torch"]

    class Operators(torch._ops._OpNamespace):  # type: ignore[name-defined,misc]
        """`torch.ops.moh`, which defines an operator that is looked up first: those in C++ by loading the kernels."""

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                if name.startswith("__") or not _defined(name):
                    raise
                return super().__getattr__(name)

    Operators.__module__ = torch._ops._OpNamespace.__module__  # part of an operator's name in saved programs
    torch.ops.moh = Operators("moh")


def _defined(operator: str) -> bool:
    attention = importlib.import_module("moh.attention")
    return attention.cpu.unavailable() is None if operator.startswith("cpu_") else True


_MODEL_NAMES = {
    "AutoModel": "MODEL_MAPPING_NAMES",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "AutoModelForMultipleChoice": "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
}
_AUTO = "transformers.models.auto"
_PACKAGE = "moh.models.transformers"


class _LazyPackage(ModuleType):
    """The module where transformers looks for a model type: every name comes from our package."""

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
    when_imported(
        "transformers.processing_utils", _add_attributes
    )  # it puts another module `transformers` in its place


def _register_classes() -> None:
    auto = importlib.import_module(f"{_AUTO}.modeling_auto")
    mapping = importlib.import_module(f"{_AUTO}.configuration_auto").CONFIG_MAPPING
    package = importlib.import_module(_PACKAGE)
    for family in known_families():
        config = getattr(package, family.moh_config)
        mapping.register(config.model_type, config, exist_ok=True)
        for auto_class, model in _named(family):
            names = (model,) if isinstance(model, str) else model
            kinds = tuple(getattr(package, name) for name in names)
            getattr(auto, auto_class).register(config, kinds if len(kinds) > 1 else kinds[0], exist_ok=True)
    _add_model_names()  # the Trainer looks there whether labels are to be shifted
    _add_attributes()


def _named(family: Family) -> Iterator[tuple[str, str | tuple[str, ...]]]:
    """Auto classes and the names of our classes that they load; several where the checkpoint decides."""
    for auto_class, model in family.moh_models.items():
        more = family.more_models.get(auto_class)
        yield auto_class, (model, f"MoH{more}") if more else model


def _add_config_names() -> None:
    names = sys.modules[f"{_AUTO}.configuration_auto"].CONFIG_MAPPING_NAMES
    for family in known_families():
        module = f"transformers.models.moh_{family.model_type.replace('-', '_')}"  # where transformers looks
        sys.modules[module] = _LazyPackage(module)
        names[f"moh_{family.model_type}"] = family.moh_config
    _add_attributes()


def _add_attributes() -> None:
    """Let `transformers.MoHLlamaForCausalLM` be found: TRL and others look there for the class that a config.json names."""
    transformers: Any = sys.modules["transformers"]
    for family in known_families():
        module = f"models.moh_{family.model_type}"
        sys.modules.setdefault(f"transformers.{module}", _LazyPackage(f"transformers.{module}"))
        models = [name for _, names in _named(family) for name in ([names] if isinstance(names, str) else names)]
        for name in (family.moh_config, *models):
            transformers._class_to_module[name] = module


def _add_model_names() -> None:
    auto = sys.modules[f"{_AUTO}.modeling_auto"]
    for family in known_families():
        for auto_class, model in _named(family):
            getattr(auto, _MODEL_NAMES[auto_class])[f"moh_{family.model_type}"] = model


_PEFT = "peft.utils.constants"


def register_with_peft() -> None:
    """Give PEFT's defaults for each family to our models of it, as soon as PEFT is imported."""
    when_imported(_PEFT, _add_peft_defaults)


def _add_peft_defaults() -> None:
    for name, table in vars(sys.modules[_PEFT]).items():  # a table per method: which modules of a model type it changes
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict):
            for family in FAMILIES:
                if family.model_type in table:
                    table.setdefault(f"moh_{family.model_type}", table[family.model_type])


def register_with_timm() -> None:
    """Register now if timm's models are imported, else as soon as they are."""
    when_imported("timm.models", lambda: _import_for("timm", "moh.models.timm.transnext", "moh.models.timm"))


def register_with_diffusers() -> None:
    """Import our model now if diffusers' pipelines are imported, else as soon as they are.

    A pipeline's directory names the module of each part, and diffusers takes only modules that are already imported.
    """
    when_imported(
        "diffusers.pipelines.pipeline_loading_utils", lambda: _import_for("diffusers", "moh.models.diffusers")
    )


def _import_for(library: str, *packages: str) -> None:
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:  # the library is older than we need: its own models should still work
            warnings.warn(
                f"the models of {package} are not registered with {library}: {error}", RuntimeWarning, stacklevel=2
            )
