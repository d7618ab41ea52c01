"""What the commands about adapter files share: their words, their output, what they say of a result."""

from __future__ import annotations

import argparse
import difflib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from simpletuner.adapters.formats.layouts import LAYOUTS
from simpletuner.events import formats
from simpletuner.i18n import text
from simpletuner.problems import ExitCode, Problem, SimpletunerError

if TYPE_CHECKING:
    import torch

    from simpletuner.adapters.formats.convert import Made
    from simpletuner.adapters.formats.lowrank import Reduction

DTYPES = ("float32", "bfloat16", "float16")
_SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_HELP_FLAGS = ("-h", "--help", "help")
_TENTHS = 10
_NUM_NEAR = 4
_PATIENCE_S = 2.0


class Parser(argparse.ArgumentParser):
    """Raises instead of printing, so that every problem of a command line looks the same."""

    def __init__(self, command: str) -> None:
        super().__init__(prog=f"simpletuner {command}", add_help=False, allow_abbrev=False)
        self._command = command

    def error(self, message: str) -> NoReturn:
        params = {"command": self._command, "message": message}
        raise SimpletunerError(Problem(code="E-FILES-USAGE", params=params), ExitCode.USAGE)

    def add_output(self) -> None:
        """-o FILE and --force, of a command that takes several inputs."""
        self.add_argument("-o", "--output", required=True, metavar="OUT")
        self.add_argument("--force", action="store_true")

    def add_format(self) -> None:
        """--format and --dtype of the file that is written."""
        self.add_argument("--format", choices=tuple(LAYOUTS), default="comfyui")
        self.add_argument("--dtype", type=_dtype_name, choices=DTYPES)

    def add_reduction(self) -> None:
        """--rank and --energy."""
        self.add_argument("--rank", type=_rank, metavar="N")
        self.add_argument("--energy", type=_energy, metavar="SHARE")


def wants_help(command: str, argv: Sequence[str], language: str) -> bool:
    """Print the command's page if it is asked for, or if there are no words at all."""
    if argv and not any(word in _HELP_FLAGS for word in argv):
        return False
    print(text(f"{command}.help", language))
    return True


def input_file(word: str) -> Path:
    """The file that a word names: itself, or the only safetensors file of a folder, such as a run's.

    Raises:
        SimpletunerError: E-INPUT-MISSING, with names in that folder that look alike.
    """
    path = Path(word)
    if path.is_dir():
        inside = list(path.glob("*.safetensors"))
        if len(inside) == 1:
            return inside[0]
    if path.is_file():
        return path
    folder = path if path.is_dir() else path.parent
    names = sorted(entry.name for entry in folder.glob("*.safetensors")) if folder.is_dir() else []
    near = names if path.is_dir() else difflib.get_close_matches(path.name, names, n=_NUM_NEAR, cutoff=0.4)
    params = {"path": word, "folder": str(folder), "near": ", ".join(near[:_NUM_NEAR]) or "-"}
    raise SimpletunerError(Problem(code="E-INPUT-MISSING", params=params), ExitCode.ENVIRONMENT)


def check_target(target: Path, *, force: bool) -> None:
    """Raises SimpletunerError: something is there already and `force` is off, or its folder is missing."""
    if target.exists() and not force:
        raise SimpletunerError(Problem(code="E-OUTPUT-EXISTS", params={"path": str(target)}), ExitCode.USAGE)
    if not target.parent.is_dir():
        params = {"path": str(target), "folder": str(target.parent)}
        raise SimpletunerError(Problem(code="E-OUTPUT-FOLDER", params=params), ExitCode.USAGE)


def reduction_of(args: argparse.Namespace) -> Reduction | None:
    """What --rank and --energy ask for."""
    from simpletuner.adapters.formats.lowrank import Reduction

    if args.rank is None and args.energy is None:
        return None
    return Reduction(rank=args.rank, energy=args.energy)


def dtype_of(args: argparse.Namespace) -> torch.dtype | None:
    """What --dtype asks for."""
    import torch

    return None if args.dtype is None else getattr(torch, args.dtype)


def write_made(made: Made, target: Path, language: str, *, tells_loss: bool = True) -> None:
    """Write the file and say what it is and, unless the caller does, what was lost."""
    from simpletuner.adapters.files import write_safetensors

    write_safetensors(target, made.tensors, made.metadata)
    low, high = made.ranks
    told = {
        "path": str(target),
        "kinds": ", ".join(made.kinds),
        "modules": made.num_modules,
        "ranks": low if low == high else f"{low}-{high}",
        "size": formats.size(target.stat().st_size, language),
    }
    print(text("files.written", language, **told))
    loss = made.loss
    if not tells_loss:
        return
    if loss.largest == 0:
        print(text("files.exact", language))
    else:
        total, largest = (formats.significant(value, language) for value in (loss.total, loss.largest))
        print(text("files.error", language, total=total, largest=largest, worst=loss.worst))


def progress(key: str, language: str) -> Callable[[int, int], None]:
    """A counter on standard error, once it takes seconds: one line that changes on a terminal, else one a tenth."""
    begun, shown = time.monotonic(), -1

    def show(done: int, total: int) -> None:
        nonlocal shown
        is_terminal = sys.stderr.isatty()
        tenth = done * _TENTHS // total
        if time.monotonic() - begun < _PATIENCE_S or (tenth == shown and not is_terminal):
            return
        shown = tenth
        end = "\r" if is_terminal and done < total else "\n"
        print(text(key, language, done=done, total=total), end=end, file=sys.stderr, flush=True)

    return show


def _dtype_name(word: str) -> str:
    return _SHORT_DTYPES.get(word, word)


def _rank(word: str) -> int:
    value = int(word)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{word} < 1")
    return value


def _energy(word: str) -> float:
    value = float(word)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{word}: 0 < SHARE <= 1")
    return value
