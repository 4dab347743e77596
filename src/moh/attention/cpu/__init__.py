"""Backend `cpu`: routed attention in C++, compiled for this machine on first use; `csrc/` holds the kernels."""

from moh.attention.cpu.aggregated import MAX_WINDOW
from moh.attention.cpu.build import BuildError
from moh.attention.cpu.operators import (
    MAX_WIDTH,
    cpu_attention,
    instruction_set,
    instruction_sets,
    unavailable,
    unsupported,
    use_instruction_set,
)

__all__ = [
    "MAX_WIDTH",
    "MAX_WINDOW",
    "BuildError",
    "cpu_attention",
    "instruction_set",
    "instruction_sets",
    "unavailable",
    "unsupported",
    "use_instruction_set",
]
