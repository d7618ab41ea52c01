"""The options that a run really has, as a file: what `<output_dir>/config.json` holds and `config show` prints."""

from __future__ import annotations

import json
from collections.abc import Iterator

from simpletuner.config.load import LoadedConfig
from simpletuner.config.root import options
from simpletuner.config.settings import Origin, OriginKind
from simpletuner.i18n import text

ORIGINS_KEY = "__origins__"
DATASETS_KEY = "__datasets__"


def effective_json(loaded: LoadedConfig) -> str:
    """Every option with its value, then where each comes from and the datasets as they were understood.

    The file is a configuration itself: loading it gives the same options, as keys with two underscores are skipped.
    """
    values: dict[str, object] = {name: loaded.config.option(name) for name in options()}
    values[ORIGINS_KEY] = {name: origin_text(origin, "en") for name, origin in loaded.origins.items()}
    values[DATASETS_KEY] = [entry.model_dump(mode="json") for entry in loaded.datasets.entries]
    return json.dumps(values, ensure_ascii=False, indent=2) + "\n"


def value_lines(loaded: LoadedConfig, language: str, *, with_origin: bool, only_changed: bool) -> Iterator[str]:
    """ "key = value" for every option, by section; `with_origin` adds where it comes from."""
    shown = [name for name in options() if not only_changed or loaded.origins[name].kind is not OriginKind.DEFAULT]
    written = {name: f"{name} = {value_text(loaded.config.option(name))}" for name in shown}
    width = min(max(map(len, written.values()), default=0), 64)
    section = ""
    for name in shown:
        option = options()[name]
        if option.section != section:
            yield from ("",) if section else ()
            section = option.section
            yield f"# {text(f'section.{section}.title', language)}"
        origin = f"  <- {origin_text(loaded.origins[name], language)}" if with_origin else ""
        yield f"{written[name]:{width}}{origin}" if origin else written[name]


def value_text(value: object) -> str:
    """A value as JSON, with numbers as people write them."""
    if isinstance(value, float):
        return f"{value:.12g}"
    return json.dumps(value, ensure_ascii=False)


def origin_text(origin: Origin, language: str) -> str:
    """Where a value comes from, in words."""
    return text(f"option-origin.{origin.kind.value}", language, place=origin.place)
