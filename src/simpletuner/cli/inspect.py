"""`simpletuner inspect`: what an adapter file is, and which programs load it. Loads no torch."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence

from simpletuner.adapters.formats.programs import Verdict
from simpletuner.cli.files import Parser, input_file, wants_help
from simpletuner.cli.report import print_problems
from simpletuner.events import formats
from simpletuner.i18n import render_problem, text
from simpletuner.problems import ExitCode, Severity
from simpletuner.tools.inspect import Inspection, inspect_file

_MAX_METADATA = 160
_MAX_RANKS = 4


def run(argv: Sequence[str], language: str) -> int:
    """Inspect; return the exit status: 1 if the file has an error."""
    if wants_help("inspect", argv, language):
        return 0
    args = parse(argv)
    found = inspect_file(input_file(args.file))
    if args.json:
        print(json.dumps(_as_json(found, language), ensure_ascii=False, indent=2))
    else:
        for line in _lines(found, language):
            print(line)
        sys.stdout.flush()
        print_problems(found.problems, language)
    has_errors = any(problem.severity is Severity.ERROR for problem in found.problems)
    return int(ExitCode.FAILED if has_errors else ExitCode.OK)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command's words."""
    parser = Parser("inspect")
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(list(argv))


def _lines(found: Inspection, language: str) -> Iterator[str]:
    def say(key: str, /, **params: object) -> str:
        return text(f"inspect.{key}", language, **params)

    facts = {
        "kind": _counts(found.kinds),
        "layout": found.layout,
        "modules": say("modules_of", modules=found.num_modules, params=formats.parameters(found.num_params, language)),
        "rank": _ranks(found.ranks),
        "alpha": _counts({say("no_alpha") if a is None else f"{a:g}": n for a, n in found.alphas.items()}),
        "dtype": _counts(found.dtypes),
        "size": formats.size(found.size_bytes, language),
    }
    width = max(len(name) for name in (*map(say, facts), *(verdict.program for verdict in found.verdicts)))
    yield str(found.path)
    for name, value in facts.items():
        yield f"  {say(name):{width}}  {value}"
    for verdict in found.verdicts:
        yield f"  {verdict.program:{width}}  {_verdict(verdict, language)}"
    for key, value in sorted(found.metadata.items()):
        shown = value if len(value) <= _MAX_METADATA else value[:_MAX_METADATA] + "…"
        yield f"  {key}: {shown}"


def _verdict(verdict: Verdict, language: str) -> str:
    reasons = "; ".join(text(f"inspect.reason.{reason}", language) for reason in verdict.reasons)
    if verdict.loads:
        return text("inspect.loads_but", language, reasons=reasons) if reasons else text("inspect.loads", language)
    return text("inspect.loads_not", language, reasons=reasons, example=verdict.example or "-")


def _ranks(counts: Mapping[int, int]) -> str:
    """As `_counts`; of many different ones the range. A module without a rank shows a dash."""
    if len(counts) > _MAX_RANKS:
        return f"{min(counts)}-{max(counts)}"
    return _counts({str(rank or "-"): count for rank, count in counts.items()})


def _counts(counts: Mapping[str, int]) -> str:
    """ "16" if all are alike, else "16 (x30), 8 (x2)"."""
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{value} (x{count})" for value, count in counts.items())


def _as_json(found: Inspection, language: str) -> dict[str, object]:
    problems = []
    for problem in found.problems:
        title, hint = render_problem(problem, language)
        problems.append({"code": problem.code, "severity": problem.severity.value, "title": title, "hint": hint})
    return {
        "path": str(found.path),
        "size_bytes": found.size_bytes,
        "kinds": dict(found.kinds),
        "layout": found.layout,
        "modules": found.num_modules,
        "params": found.num_params,
        "ranks": {str(rank): count for rank, count in found.ranks.items()},
        "alphas": {"none" if alpha is None else f"{alpha:g}": count for alpha, count in found.alphas.items()},
        "dtypes": dict(found.dtypes),
        "width": found.width,
        "programs": {
            verdict.program: {"loads": verdict.loads, "reasons": list(verdict.reasons), "example": verdict.example}
            for verdict in found.verdicts
        },
        "metadata": dict(found.metadata),
        "problems": problems,
    }
