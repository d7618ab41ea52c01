"""The reference of options, made from the declarations: `python -m simpletuner.config.docs [--check] [FOLDER]`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from simpletuner.config.datasets import ENTRY_MODELS, dataset_options
from simpletuner.config.effective import value_text
from simpletuner.config.fields import Option
from simpletuner.config.root import options, sections
from simpletuner.i18n import catalog, text

FILES = {"en": "OPTIONS.md", "es": "OPTIONS.es.md"}


def help_text(option: Option, language: str) -> str:
    """What an option does, in the reader's language; English is the declaration's own text."""
    is_dataset = option.section.partition(".")[0] in ENTRY_MODELS
    key = f"dataset.{option.section}.{option.name}.help" if is_dataset else f"option.{option.name}.help"
    return catalog(language).get(key, option.help)


def default_text(option: Option, language: str) -> str:
    """The default as the reference shows it."""
    if option.required:
        return text("reference.required", language)
    if option.opt.shown_default is not None:
        return text(f"shown.{option.opt.shown_default}", language)
    if option.default is None:
        return text("reference.none", language)
    if option.default in ("", ()):
        return text("reference.empty", language)
    return option.default if isinstance(option.default, str) else value_text(option.default)


def facts(option: Option, language: str) -> Iterator[tuple[str, str]]:
    """(label, text) of what is known about an option besides its help."""
    kind = text(f"option-kind.{option.kind}", language)
    unit = f", {text(f'measure.{option.opt.unit}', language)}" if option.opt.unit else ""
    yield "", f"{kind}{unit}"
    yield text("reference.default", language), default_text(option, language)
    if option.choices:
        yield text("reference.choices", language), ", ".join(option.choices)
    if option.bounds:
        yield text("reference.bounds", language), ", ".join(option.bounds)
    if option.opt.aliases:
        yield text("reference.aliases", language), ", ".join(option.opt.aliases)


def part_text(part: Option, language: str) -> str:
    """What one key of an object does, and what is known about it."""
    told = (f"{label}: {fact}" if label else fact for label, fact in facts(part, language))
    return f"{help_text(part, language)} ({', '.join(told)})"


def reference(language: str) -> str:
    """The whole page."""
    lines = [
        f"<!-- {text('reference.made_by', language)} -->",
        f"# {text('reference.title', language)}",
        "",
        text("reference.how", language),
    ]
    for section in sections():
        chosen = {name: option for name, option in options().items() if option.section == section}
        lines += _section(f"section.{section}", chosen, language)
    for kind in ENTRY_MODELS:
        lines += _section(f"dataset.{kind}", dataset_options(kind), language)
    return "\n".join(lines) + "\n"


def stale_pages(folder: Path) -> list[Path]:
    """The pages in `folder` that differ from what the declarations say."""
    pages = {folder / name: reference(language) for language, name in FILES.items()}
    return [path for path, page in pages.items() if not path.is_file() or path.read_text(encoding="utf-8") != page]


def main(argv: Sequence[str]) -> int:
    """Write the pages, or with --check only compare: exit status 1 if one is stale."""
    folder = Path(next((word for word in argv if not word.startswith("-")), "docs"))
    stale = stale_pages(folder)
    if "--check" in argv:
        for path in stale:
            sys.stderr.write(f"{path} is stale: run python -m simpletuner.config.docs\n")
        return 1 if stale else 0
    folder.mkdir(parents=True, exist_ok=True)
    for language, name in FILES.items():
        (folder / name).write_text(reference(language), encoding="utf-8", newline="\n")
    return 0


def _section(key: str, chosen: Mapping[str, Option], language: str) -> list[str]:
    lines = ["", f"## {text(f'{key}.title', language)}", "", text(f"{key}.intro", language)]
    for option in chosen.values():
        told = (f"{label}: {fact}" if label else fact for label, fact in facts(option, language))
        level = text(f"option-level.{option.opt.level}", language)
        lines += ["", f"### `{option.name}`", "", help_text(option, language), "", f"*{' · '.join(told)} · {level}*"]
        lines += (
            ["", *(f"- `{part.name}`: {part_text(part, language)}" for part in option.parts)] if option.parts else []
        )
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
