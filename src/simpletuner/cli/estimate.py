"""`simpletuner estimate`: what a run will need, before it is started. Loads no torch."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from simpletuner.config.env import state_folder
from simpletuner.config.load import load_run_config
from simpletuner.i18n import text
from simpletuner.planner.choose import planned
from simpletuner.planner.estimate import estimate
from simpletuner.planner.from_config import find_machine
from simpletuner.planner.records import FILE_NAME, read_measurements
from simpletuner.planner.report import as_json
from simpletuner.problems import Problem


def run(argv: Sequence[str], language: str) -> int:
    """Print the estimate; return the exit status. Words are as those of `simpletuner train`."""
    if "-h" in argv or "--help" in argv:
        print(text("estimate.help", language))
        return 0
    words = [word for word in argv if word != "--json"]
    loaded = load_run_config(words, environ=os.environ, cwd=Path.cwd(), must_run=False, check_folders=False)
    machine = find_machine(loaded.config.run.device)
    plan = planned(loaded, machine)
    loaded = plan.loaded
    records = read_measurements(state_folder(os.environ) / FILE_NAME)
    found = estimate(loaded.config, loaded.datasets, machine, records=records)
    if "--json" in argv:
        print(json.dumps(as_json(found, plan.choices), indent=2))
        return 0
    from simpletuner.cli.estimate_table import print_estimate
    from simpletuner.cli.report import print_problems

    print_problems(problems_about_memory(loaded.warnings), language)
    sys.stderr.flush()
    print_estimate(found, plan.choices, language, output_dir=Path(loaded.config.run.output_dir), out=sys.stdout)
    return 0


def problems_about_memory(problems: Sequence[Problem]) -> list[Problem]:
    """Those of the plan; the others are for `simpletuner config validate`."""
    return [problem for problem in problems if problem.code.startswith("W-PLAN-")]
