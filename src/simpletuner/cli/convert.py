"""`simpletuner convert`: an adapter file in another layout."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from simpletuner.adapters.formats.layouts import LAYOUTS
from simpletuner.cli.files import (
    Parser,
    check_target,
    dtype_of,
    input_file,
    progress,
    reduction_of,
    wants_help,
    write_made,
)


def run(argv: Sequence[str], language: str) -> int:
    """Convert; return the exit status."""
    if wants_help("convert", argv, language):
        return 0
    return write_converted(parse(argv), language)


def write_converted(args: argparse.Namespace, language: str) -> int:
    """Read args.file, write args.out with what the other words ask for."""
    source, target = input_file(args.file), Path(args.out)
    check_target(target, force=args.force)
    from simpletuner.adapters.files import read_adapter
    from simpletuner.adapters.formats.convert import convert

    adapter = read_adapter(source)
    made = convert(
        adapter,
        LAYOUTS[args.format],
        reduction=reduction_of(args),
        dtype=dtype_of(args),
        on_progress=progress("files.modules", language),
    )
    write_made(made, target, language)
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command's words."""
    return parser("convert").parse_args(list(argv))


def parser(command: str) -> Parser:
    """The words IN OUT with what can be asked of the result."""
    parser = Parser(command)
    parser.add_argument("file", metavar="IN")
    parser.add_argument("out", metavar="OUT")
    parser.add_argument("--force", action="store_true")
    parser.add_format()
    parser.add_reduction()
    return parser
