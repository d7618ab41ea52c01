"""`simpletuner extract`: a LoRA out of a fine-tune."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from simpletuner.adapters.formats.layouts import LAYOUTS
from simpletuner.cli.files import Parser, check_target, dtype_of, progress, wants_help, write_made
from simpletuner.events import formats
from simpletuner.i18n import text

_NUM_NAMED = 3


def run(argv: Sequence[str], language: str) -> int:
    """Extract; return the exit status."""
    if wants_help("extract", argv, language):
        return 0
    args = parse(argv)
    target = Path(args.output)
    check_target(target, force=args.force)
    import torch

    from simpletuner.adapters.formats.convert import convert
    from simpletuner.models.places import public_name
    from simpletuner.models.weights import resolve_transformer
    from simpletuner.models.z_image.spec import Z_IMAGE
    from simpletuner.tools.extract import extract

    base, tuned = (
        resolve_transformer(name, spec=Z_IMAGE, option="simpletuner extract") for name in (args.base, args.tuned)
    )
    show = progress("files.tensors", language)
    dtype = dtype_of(args) or torch.bfloat16
    found = extract(base, tuned, rank=args.rank, dtype=dtype, on_progress=show)
    described = {"modelspec.title": public_name(args.tuned), "ss_base_model_version": public_name(args.base)}
    made = convert(found.described(described), LAYOUTS[args.format])
    write_made(made, target, language, tells_loss=False)
    energy, smallest = (formats.decimal(100 * share, 2, language) for share in (found.energy, found.smallest))
    error = formats.significant(max(0.0, 1 - found.energy) ** 0.5, language)
    print(text("extract.energy", language, energy=energy, smallest=smallest, error=error, worst=found.worst))
    if found.left_out:
        names = ", ".join(found.left_out[:_NUM_NAMED])
        print(text("extract.left_out", language, count=len(found.left_out), names=names))
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command's words."""
    parser = Parser("extract")
    parser.add_argument("base", metavar="BASE")
    parser.add_argument("tuned", metavar="TUNED")
    parser.add_reduction()
    parser.add_output()
    parser.add_format()
    args = parser.parse_args(list(argv))
    if args.rank is None or args.energy is not None:
        parser.error("--rank N")
    return args
