"""Backend `cpu`: routed attention in C++, compiled for this machine on first use; `csrc/` holds the kernels."""

from moh.attention.cpu.backend import (
    MAX_WIDTH,
    attend,
    instruction_set,
    instruction_sets,
    instruction_sets_left_out,
    unavailable,
    use_instruction_set,
    why_not,
)
from moh.attention.cpu.build import BuildError
from moh.attention.cpu.operators import MAX_WINDOW

__all__ = [
    "MAX_WIDTH",
    "MAX_WINDOW",
    "BuildError",
    "attend",
    "instruction_set",
    "instruction_sets",
    "instruction_sets_left_out",
    "unavailable",
    "use_instruction_set",
    "why_not",
]
