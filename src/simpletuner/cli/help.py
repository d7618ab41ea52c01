"""The help pages of `simpletuner train` and the explanation of single options."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Iterator, Sequence

from simpletuner.i18n import text
from simpletuner.problems import ExitCode, Problem, SimpletunerError


def print_train_help(words: Sequence[str], language: str) -> bool:
    """Print the page that `words` ask for: -h, -h GROUP, --help, --help-all. False if they ask for none."""
    page = train_help(words, language)
    if page is not None:
        print(page)
    return page is not None


def train_help(words: Sequence[str], language: str) -> str | None:
    """The page that the words after `train` ask for, or None."""
    if "--help-all" in words:
        return _all_groups(language)
    at = next((i for i, word in enumerate(words) if word in ("-h", "--help")), None)
    if at is None:
        return None
    group = words[at + 1] if at + 1 < len(words) and not words[at + 1].startswith("-") else None
    return _short(language) if group is None else _group(group, language)


def explain(word: str, language: str) -> str | None:
    """What is known about an option or a dataset key, or None if there is none of that name."""
    from simpletuner.catalog.upstream import DATASET_UPSTREAM
    from simpletuner.config.datasets import ENTRY_MODELS, dataset_options
    from simpletuner.config.names import meaning_of
    from simpletuner.config.root import options

    meaning = meaning_of(word)
    pages: list[str] = []
    if meaning.what == "option":
        pages.append(_page(options()[meaning.name], f"--{meaning.name}", language))
    elif meaning.what == "upstream":
        pages.append(text("explain.not_yet", language, key=meaning.name))
    for kind in ENTRY_MODELS:
        key = meaning.name
        if key in dataset_options(kind):
            pages.append(_page(dataset_options(kind)[key], f"multidatabackend.json, {kind}", language))
    if not pages and meaning.name in DATASET_UPSTREAM:
        pages.append(text("explain.not_yet", language, key=meaning.name))
    return "\n\n".join(pages) or None


def _short(language: str) -> str:
    from simpletuner.config.root import options, sections

    basic = (option.name for option in options().values() if option.opt.level == "basic")
    width = max(map(len, sections()))
    groups = (f"  {name:{width}}  {text(f'section.{name}.intro', language)}" for name in sections())
    return text("train.help", language, options=_table(basic, language), groups="\n".join(groups))


def _group(name: str, language: str) -> str:
    from simpletuner.config.names import closest
    from simpletuner.config.root import options, sections

    if name not in sections():
        guess = closest(name, sections())
        params = {"word": name, "groups": ", ".join(sections()), "suggestion": guess}
        raise SimpletunerError(Problem(code="E-HELP-GROUP", params=params), ExitCode.USAGE)
    inside = (option.name for option in options().values() if option.section == name)
    return f"{text(f'section.{name}.title', language)}. {text(f'section.{name}.intro', language)}\n\n" + _table(
        inside, language
    )


def _all_groups(language: str) -> str:
    from simpletuner.config.root import sections

    return "\n\n".join(_group(name, language) for name in sections())


def _table(names: Iterable[str], language: str) -> str:
    return "\n".join(line for name in names for line in _row(name, language))


def _row(name: str, language: str) -> Iterator[str]:
    """The flag, then its help, wrapped to the terminal."""
    from simpletuner.config.docs import default_text, help_text
    from simpletuner.config.root import options

    option = options()[name]
    wide = max(60, min(shutil.get_terminal_size((100, 24)).columns, 120))
    told = f"{help_text(option, language)} [{default_text(option, language)}]"
    yield f"  --{name}"
    yield from textwrap.wrap(told, width=wide, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _page(option: object, title: str, language: str) -> str:
    from simpletuner.config.docs import facts, help_text, part_text
    from simpletuner.config.fields import Option

    assert isinstance(option, Option)
    lines = [f"{option.name}  ({title})", f"  {help_text(option, language)}"]
    lines += [f"  {label}: {fact}" if label else f"  {fact}" for label, fact in facts(option, language)]
    lines += [f"  {part.name}: {part_text(part, language)}" for part in option.parts]
    return "\n".join(lines)
