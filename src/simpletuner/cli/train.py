"""`simpletuner train`: read the options, open the run directory, and only then load what is heavy."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from simpletuner import __version__
from simpletuner.cli.help import print_train_help
from simpletuner.config.effective import effective_json
from simpletuner.config.env import state_folder
from simpletuner.config.load import LoadedConfig, load_run_config
from simpletuner.config.paths import shown_path
from simpletuner.events.console import choose_format, console_sink
from simpletuner.events.run_directory import RunRecorder
from simpletuner.events.run_status import RunInfo
from simpletuner.events.signals import StopRequest
from simpletuner.events.types import SettingOverridden
from simpletuner.i18n import text
from simpletuner.planner.choose import planned
from simpletuner.planner.records import FILE_NAME

_LIBRARIES = ("torch", "diffusers", "transformers", "safetensors")


def run(argv: Sequence[str], language: str) -> int:
    """Train; return the exit code. Options that are not this command's own are the run's options."""
    if print_train_help(argv, language):
        return 0
    own, options = _own_parser().parse_known_args(list(argv))
    plan = planned(load_run_config(options, environ=os.environ, cwd=Path.cwd()))
    loaded = plan.loaded
    log_format = choose_format(own.log_format, is_terminal=sys.stderr.isatty(), environ=os.environ)
    info = RunInfo(
        version=__version__,
        argv=("simpletuner", "train", *argv),
        config_path=shown_path(loaded.config_path, Path.cwd()) if loaded.config_path else None,
        versions={name: version(name) for name in _LIBRARIES},
    )
    stop = StopRequest()
    sink = console_sink(log_format, language=language, out=sys.stdout, err=sys.stderr)
    with (
        stop.installed(),
        RunRecorder.start(
            loaded.config.run.output_dir,
            info=info,
            effective_config=effective_json(loaded),
            sinks=[sink],
            stop=stop,
        ) as recorder,
    ):
        for choice in plan.choices:
            recorder.emit(
                SettingOverridden(
                    option=choice.option,
                    requested=choice.before,
                    used=choice.after,
                    reason="override.memory_plan",
                )
            )
        if own.cache_only:
            return _fill_caches(loaded, recorder, stop, language, as_json=log_format == "json")
        return _train(loaded, recorder, stop, language)


def _fill_caches(
    loaded: LoadedConfig, recorder: RunRecorder, stop: StopRequest, language: str, *, as_json: bool
) -> int:
    """End where the training would begin."""
    from simpletuner.cli.dataset import print_cached

    with stop.interruptible():
        with recorder.phase("environment"):
            from simpletuner.train.caching import fill_caches

        summary = fill_caches(loaded, run=recorder)
    recorder.finish(reason="cache-only")
    print_cached(summary, language, as_json=as_json)
    return 0


def _train(loaded: LoadedConfig, recorder: RunRecorder, stop: StopRequest, language: str) -> int:
    with stop.interruptible():
        from simpletuner.train.start import settle_start

        start = settle_start(loaded, run=recorder)
        with recorder.phase("environment"):
            from simpletuner.train.run import train

    def heading(step: int) -> str:
        return text("sheet.step", language, step=step) if step else text("sheet.base", language)

    measurements = state_folder(os.environ) / FILE_NAME
    outcome = train(loaded, start, run=recorder, stop=stop, headings=heading, measurements=measurements)
    return int(outcome.exit_code)


def _own_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--cache-only", "--cache_only", action="store_true")
    parser.add_argument("--log-format", choices=("auto", "rich", "plain", "json"), default="auto")
    return parser
