"""`simpletuner resize`: an adapter as LoRA of a smaller rank."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from simpletuner.cli import convert
from simpletuner.cli.files import wants_help


def run(argv: Sequence[str], language: str) -> int:
    """Resize; return the exit status."""
    if wants_help("resize", argv, language):
        return 0
    return convert.write_converted(parse(argv), language)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command's words; one of --rank and --energy at least."""
    parser = convert.parser("resize")
    args = parser.parse_args(list(argv))
    if args.rank is None and args.energy is None:
        parser.error("--rank N | --energy SHARE")
    return args
