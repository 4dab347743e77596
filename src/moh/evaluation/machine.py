"""What a measurement ran on: the CPU's name, and the GPU's.

Not for choosing anything by it.
"""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def cpu_name() -> str:
    """The processor's name, such as "AMD EPYC 9B45"; with family, model and stepping where a virtual machine hides it."""
    fields = _cpuinfo()
    name = fields.get("model name") or platform.processor() or platform.machine()
    if fields.get("vendor_id") and not any(character.isdigit() for character in name):
        numbers = ", ".join(f"{key} {fields[key]}" for key in ("cpu family", "model", "stepping") if key in fields)
        name = f"{name} ({numbers})"
    return " ".join(name.split())


def device_name(device: torch.device) -> str:
    """Name of the device on which a model runs."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def _cpuinfo() -> dict[str, str]:
    """The first processor's entries in /proc/cpuinfo (Linux)."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
