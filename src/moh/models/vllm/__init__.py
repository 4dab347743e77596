"""vLLM serves our causal language models: the plugin that it finds by the entry point `vllm.general_plugins`.

The model is vLLM's for any model of transformers, with the gates in front of W_O (`model`): all heads are computed.
"""

from __future__ import annotations

from logging import getLogger

from packaging.version import InvalidVersion, Version

from moh.models.transformers.families import FAMILIES

OLDEST = "0.32.0"
"""Oldest version of vLLM that is supported: before it, vLLM builds models of transformers in another way."""

MODEL = "moh.models.vllm.model:MoHForCausalLM"


def register() -> None:
    """Tell vLLM which class serves our models; called by vLLM in each of its processes.

    With a vLLM that is too old nothing is registered, and the log says so: its other models still work. Whether a newer one
    builds models as it should shows where one is built (`model`).
    """
    import vllm
    from vllm import ModelRegistry

    if is_too_old(vllm.__version__):
        getLogger(__name__).warning(
            "MoH models need vLLM %s or newer, and %s is installed: they are not registered", OLDEST, vllm.__version__
        )
        return
    known = ModelRegistry.get_supported_archs()
    for family in FAMILIES:
        name = family.moh_models.get("AutoModelForCausalLM")
        if name is not None and name not in known:
            ModelRegistry.register_model(name, MODEL)  # by name: imported only where such a model is served


def is_too_old(version: str) -> bool:
    """Whether a version is before `OLDEST`; one without numbers, such as "dev", is a build of somebody's own, and new."""
    try:
        return Version(version) < Version(OLDEST)
    except InvalidVersion:
        return False
