"""How command lines name a number of active heads. Not the dial itself (`moh.set_active_heads`)."""

from __future__ import annotations

import argparse

HELP = "routed heads per token: 3; one number per layer: 3,2,4; or a share of all heads: 0.75"


def active_heads(text: str) -> int | float | list[int]:
    """What `moh.set_active_heads` takes, from "3", "0.75" or "3,2,4".

    Raises:
        argparse.ArgumentTypeError: it is none of these.
    """
    try:
        if "," in text:
            return [int(part) for part in text.split(",")]
        return float(text) if "." in text else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be like 3, 0.75 or 3,2,4 (one per layer), got {text!r}") from None


def add_option(parser: argparse.ArgumentParser) -> None:
    """`--active-heads K`."""
    parser.add_argument(
        "--active-heads", type=active_heads, metavar="K", help=f"{HELP} (default: as the model was saved)"
    )
