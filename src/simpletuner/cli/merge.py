"""`simpletuner merge`: adapters into one, or into a model's own weights."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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
from simpletuner.i18n import text

if TYPE_CHECKING:
    from simpletuner.adapters.formats.convert import Weighted


def run(argv: Sequence[str], language: str) -> int:
    """Merge; return the exit status."""
    if wants_help("merge", argv, language):
        return 0
    args = parse(argv)
    named = [(input_file(word), strength) for word, strength in map(file_and_strength, args.files)]
    target = Path(args.output)
    check_target(target, force=args.force)
    from simpletuner.adapters.formats.convert import merge

    adapters = [_read(path, strength) for path, strength in named]
    if args.into is None:
        made = merge(
            adapters,
            LAYOUTS[args.format],
            reduction=reduction_of(args),
            dtype=dtype_of(args),
            on_progress=progress("files.modules", language),
        )
        write_made(made, target, language)
        return 0
    return _into(args.into, adapters, target, language)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command's words."""
    parser = Parser("merge")
    parser.add_argument("files", nargs="+", metavar="FILE[@STRENGTH]")
    parser.add_argument("--into", metavar="MODEL")
    parser.add_output()
    parser.add_format()
    parser.add_reduction()
    args = parser.parse_args(list(argv))
    unused = [flag for flag in ("rank", "energy", "dtype") if getattr(args, flag) is not None]
    if args.into is not None and unused:
        parser.error(f"--into / --{unused[0]}")
    return args


def file_and_strength(word: str) -> tuple[str, float]:
    """ "a.safetensors@0.8" -> (a.safetensors, 0.8); a file that really has such a name is taken as it is."""
    name, at, strength = word.rpartition("@")
    if not at or Path(word).exists():
        return word, 1.0
    try:
        return name, float(strength)
    except ValueError:
        return word, 1.0


def _read(path: Path, strength: float) -> Weighted:
    from simpletuner.adapters.files import read_adapter
    from simpletuner.adapters.formats.convert import Weighted

    return Weighted(name=path.name, adapter=read_adapter(path), strength=strength)


def _into(model: str, adapters: Sequence[Weighted], target: Path, language: str) -> int:
    from simpletuner.models.weights import resolve_transformer
    from simpletuner.models.z_image.spec import Z_IMAGE
    from simpletuner.tools.merge_into import merge_into, writes_folder

    shards = resolve_transformer(model, spec=Z_IMAGE, option="--into")
    changed = merge_into(shards, adapters, target, on_progress=progress("files.tensors", language))
    key = "merge.into.folder" if writes_folder(shards) else "merge.into.file"
    print(text(key, language, path=str(target), layers=changed))
    return 0
