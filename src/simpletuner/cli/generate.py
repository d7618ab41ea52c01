"""`simpletuner generate`: images from any base model and adapters, one by one or as a grid with a sheet."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from simpletuner.cli.command_console import CommandConsole
from simpletuner.cli.report import print_problems
from simpletuner.config.env import state_folder
from simpletuner.config.load import LoadedConfig, load_run_config
from simpletuner.config.names import closest, meaning_of
from simpletuner.config.paths import shown_path
from simpletuner.config.root import Config, options
from simpletuner.config.settings import OriginKind
from simpletuner.events.paths import MODEL_FOLDER, RunDirectory
from simpletuner.events.progress import SinkReporter
from simpletuner.generate.labels import described
from simpletuner.generate.request import (
    AdapterChoice,
    Axis,
    Setup,
    Shot,
    parse_adapter,
    parse_axis,
    plan_shots,
    read_prompt_file,
    written_prompts,
)
from simpletuner.i18n import text
from simpletuner.models.places import find_place
from simpletuner.problems import ConfigError, Fix, ModelError, Problem, Severity
from simpletuner.validation.requests import Prompt, read_prompts

if TYPE_CHECKING:
    from simpletuner.generate.adapters import FoundAdapter
    from simpletuner.generate.run import Made

_OPTION_FLAGS = {
    "--model": "pretrained_model_name_or_path",
    "--flavour": "model_flavour",
    "--negative": "validation_negative_prompt",
    "--size": "validation_resolution",
    "--steps": "validation_num_inference_steps",
    "--guidance": "validation_guidance",
    "--sampling-shift": "validation_sampling_shift",
    "--num": "num_validation_images",
    "--seed": "validation_seed",
}
"""Flags of this command that are options of a run under a shorter name."""

_OWN_FLAGS = ("--prompt", "--prompt-file", "--lora", "--grid", "--cfg", "--output", "--json")
_SECTIONS = ("model", "memory", "validation")  # whose problems concern images
_NOT_ABOUT_IMAGES = frozenset({"W-NO-PROMPT", "W-PLACEHOLDER"})
_NO_ADAPTER = "none"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(Problem(code="E-GENERATE-USAGE", params={"message": message}))


def run(argv: Sequence[str], language: str) -> int:
    """Make images; return the exit status. Options that are not this command's own are the run's options."""
    if "-h" in argv or "--help" in argv:
        print(text("generate.help", language))
        return 0
    own, rest = _parser().parse_known_args(list(argv))
    axes = [parse_axis(written) for written in own.grid]
    _check_flags(rest)
    loaded = _load(rest, own)
    choices = _choices(own.lora, loaded)
    _check_places(choices)
    config = loaded.config
    prompts = _prompts(own, config)
    # Where it says nothing, a grid over checkpoints waits for what the run has; what else is wrong shows now.
    shots = _plan(prompts, config, [axis for axis in axes if axis.values])
    if not own.json:
        print_problems(_warnings(loaded), language)
    folder = _folder(own.output, loaded)
    from simpletuner.generate.contact import write_sheet

    made, adapters, axes = _make(
        shots, prompts, axes, loaded, choices, folder=folder, language=language, quiet=own.json
    )
    sheet = write_sheet(made, axes, adapters, model=_model(config), language=language) if len(made) > 1 else None
    _print_result(made, sheet, as_json=own.json, language=language)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(add_help=False, allow_abbrev=False, prog="simpletuner generate")
    parser.add_argument("--prompt", "-p", action="append", default=[])
    parser.add_argument("--prompt-file", type=Path)
    parser.add_argument("--lora", action="append", default=[])
    parser.add_argument("--grid", action="append", default=[])
    parser.add_argument("--cfg", type=float)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--json", action="store_true")
    return parser


def _check_flags(words: Sequence[str]) -> None:
    """Raises ConfigError for flags that nobody knows and that look like one of this command."""
    for word in words:
        flag = word.partition("=")[0]
        if not flag.startswith("--") or flag in _OPTION_FLAGS or meaning_of(flag).what != "unknown":
            continue
        own = (*_OPTION_FLAGS, *_OWN_FLAGS)
        guess = closest(flag, (*own, *(f"--{name}" for name in options())))
        if guess in own:
            params = {"key": flag.lstrip("-"), "suggestion": guess.lstrip("-")}
            fix = Fix(key=guess, value="...")
            raise ConfigError(Problem(code="E-KEY-MISSPELT", params=params, origin=flag, fixes=(fix,)))


def _load(words: Sequence[str], own: argparse.Namespace) -> LoadedConfig:
    """The configuration with this command's short flags as the options that they stand for."""
    written = [_long_flag(word) for word in words]
    if own.cfg is not None:
        written.append(f"--validation_guidance={own.cfg - 1:.12g}")
    if own.prompt:
        written.append(f"--validation_prompt={own.prompt[0]}")
    written += ["--validation_disable=false", "--disable_assistant_lora=true"]  # that one is for training
    loaded = load_run_config(
        written, environ=os.environ, cwd=Path.cwd(), must_run=False, check_folders=False, needs_files=False
    )
    beyond = [p for p in loaded.warnings if p.code.startswith("E-") and _is_about_images(p)]
    if beyond:
        raise ConfigError([replace(problem, severity=Severity.ERROR) for problem in beyond])
    return _with_plan(_with_own_model(_with_cache(loaded)))


def _with_own_model(loaded: LoadedConfig) -> LoadedConfig:
    """Of a run that trained all weights, its own model: the finished one, or else the newest checkpoint's.

    Raises:
        ConfigError: it has saved none yet.
    """
    directory = None if loaded.config_path is None else loaded.config_path.parent
    model = loaded.config.model
    if model.model_type != "full" or directory is None or not RunDirectory(directory).run_json.is_file():
        return loaded
    checkpoints = RunDirectory(directory).checkpoints()
    for place in (directory, *reversed(checkpoints.values())):
        if (place / MODEL_FOLDER / "config.json").is_file():
            update = {
                "pretrained_transformer_model_name_or_path": str(place),
                "pretrained_transformer_subfolder": MODEL_FOLDER,
            }
            config = loaded.config.model_copy(update={"model": model.model_copy(update=update)})
            return replace(loaded, config=config)
    raise ConfigError(Problem(code="E-GENERATE-EMPTY-RUN", params={"path": str(directory)}))


def _with_cache(loaded: LoadedConfig) -> LoadedConfig:
    """With a place for embeddings where no datasets name one: that of the run's cache, or one for all commands."""
    is_own = loaded.config_path is not None or loaded.origins["cache_dir"].kind is not OriginKind.DEFAULT
    embeds = loaded.datasets.text_embeds
    if embeds.cache_dir and is_own:
        return loaded
    folder = Path(loaded.config.data.cache_dir) / "text" if is_own else state_folder(os.environ) / "prompts"
    embeds = embeds.model_copy(update={"cache_dir": str(folder)})
    return replace(loaded, datasets=replace(loaded.datasets, text_embeds=embeds))


def _with_plan(loaded: LoadedConfig) -> LoadedConfig:
    """With the settings that `fit` chooses for the run, whose model is sampled here."""
    if not loaded.datasets.images:
        return loaded
    from simpletuner.planner.choose import planned

    return planned(loaded).loaded


def _long_flag(word: str) -> str:
    flag, equals, value = word.partition("=")
    return f"--{_OPTION_FLAGS[flag]}{equals}{value}" if flag in _OPTION_FLAGS else word


def _is_about_images(problem: Problem) -> bool:
    option = options().get((problem.path or "/")[1:])
    return option is None or option.section in _SECTIONS


def _warnings(loaded: LoadedConfig) -> list[Problem]:
    return [p for p in loaded.warnings if p.path and _is_about_images(p) and p.code not in _NOT_ABOUT_IMAGES]


def _choices(written: Sequence[str], loaded: LoadedConfig) -> list[AdapterChoice]:
    """The adapters that are named; of a run's directory in place of a configuration, its own."""
    if not written and loaded.config_path is not None and loaded.config.model.model_type == "lora":
        directory = loaded.config_path.parent
        return [AdapterChoice(place=str(directory))] if RunDirectory(directory).run_json.is_file() else []
    return [parse_adapter(word) for word in written if word.lower() != _NO_ADAPTER]


def _check_places(choices: Sequence[AdapterChoice]) -> None:
    """Raises ModelError for adapters that are neither here nor a repository, before anything heavy is loaded."""
    for choice in choices:
        try:
            find_place(choice.place, option="lora")
        except ModelError as error:
            raise ModelError([replace(problem, origin="--lora") for problem in error.problems]) from error


def _prompts(own: argparse.Namespace, config: Config) -> tuple[Prompt, ...]:
    """Those of the command line, or else those of the configuration."""
    prompts = written_prompts(own.prompt)
    if own.prompt_file is not None:
        prompts += read_prompt_file(own.prompt_file)
    if prompts:
        return prompts
    library = config.validation.user_prompt_library
    return read_prompts(config.validation.validation_prompt, Path(library) if library else None)


def _plan(prompts: Sequence[Prompt], config: Config, axes: Sequence[Axis]) -> tuple[Shot, ...]:
    options = config.validation
    setup = Setup(
        steps=options.validation_num_inference_steps,
        guidance=options.validation_guidance,
        shift=options.validation_sampling_shift,
        negative_prompt=options.validation_negative_prompt,
    )
    return plan_shots(
        prompts,
        sizes=options.sizes,
        seed=options.validation_seed,
        num=options.num_validation_images,
        setup=setup,
        axes=axes,
    )


def _folder(written: Path | None, loaded: LoadedConfig) -> Path:
    """Where the images go: as written, beside the run that made the adapter, or output/generated."""
    if written is not None:
        return written
    if loaded.config_path is not None and RunDirectory(loaded.config_path.parent).run_json.is_file():
        return loaded.config_path.parent / "generated"
    return Path("output") / "generated"


def _make(
    shots: tuple[Shot, ...],
    prompts: Sequence[Prompt],
    axes: Sequence[Axis],
    loaded: LoadedConfig,
    choices: Sequence[AdapterChoice],
    *,
    folder: Path,
    language: str,
    quiet: bool,
) -> tuple[list[Made], list[FoundAdapter], list[Axis]]:
    config = loaded.config
    console = CommandConsole(language, sys.stderr)
    run = SinkReporter([] if quiet else [console])
    with run.phase("environment"):
        from simpletuner.generate.adapters import complete_axis, find_adapter
        from simpletuner.generate.run import generate
        from simpletuner.train.device import settle_compute
        from simpletuner.train.find import find_pipeline
    compute = settle_compute(config, run)
    with run.phase("download", unit="bytes") as progress:
        files = find_pipeline(
            config, lambda told: progress.update(told.done_bytes, total=told.size_bytes, detail=told.repo)
        )
        adapters = [
            find_adapter(choice, lambda told: progress.update(told.done_bytes, total=told.size_bytes))
            for choice in choices
        ]
    complete = [complete_axis(axis, adapters) for axis in axes]
    if complete != list(axes):
        shots = _plan(prompts, config, complete)
    if not quiet:
        console.line(" · ".join([_model(config), *described(shots, adapters, language)]))
    made = generate(
        shots,
        config=config,
        datasets=loaded.datasets,
        files=files,
        adapters=adapters,
        folder=folder,
        compute=compute,
        run=run,
        on_image=(lambda _: None) if quiet else (lambda image: console.result(shown_path(image.path, Path.cwd()))),
    )
    return made, adapters, complete


def _model(config: Config) -> str:
    return f"{config.model.model_family} {config.model.model_flavour}"


def _print_result(made: Sequence[Made], sheet: Path | None, *, as_json: bool, language: str) -> None:
    if as_json:
        images = [{"path": str(item.path), **item.about} for item in made]
        print(json.dumps({"images": images, "sheet": str(sheet) if sheet else None}, ensure_ascii=False, indent=2))
        return
    if sheet is not None:
        print(text("generate.sheet", language, path=shown_path(sheet, Path.cwd())))
