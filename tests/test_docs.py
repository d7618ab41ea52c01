"""The guides say what is true of the program: their links, commands, options, configurations and messages are checked.

A fenced block says after its language what it is: `json config` is a configuration, `json datasets` a list of datasets,
`json prompts` a prompt library, `json lycoris` a LyCORIS configuration, `json event` a line of the journal; `text`
blocks are output. The two languages of a guide have the same outline, commands and configurations.
"""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import pytest

from simpletuner.catalog.families import FLAVOURS
from simpletuner.catalog.optimizers import OPTIMIZER_SPELLINGS, OPTIMIZERS, REFUSED_OPTIMIZERS
from simpletuner.cli import convert, dataset, dataset_data, extract, generate, inspect, merge, plot, resize, runs
from simpletuner.cli.help import explain
from simpletuner.cli.main import COMMANDS
from simpletuner.config.argv import parse_arguments
from simpletuner.config.datasets import every_dataset_key
from simpletuner.config.load import load_run_config
from simpletuner.config.lycoris import LYCORIS_KEYS, read_lycoris
from simpletuner.config.names import meaning_of
from simpletuner.config.root import options
from simpletuner.config.search import example_names
from simpletuner.events import types as event_types
from simpletuner.generate.request import parse_adapter, parse_axis
from simpletuner.i18n import catalog
from simpletuner.problems import ConfigError, ExitCode

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
GUIDES = [ROOT / "README.md", *(ROOT / "docs" / name for name in ("INSTALL.md", "TUTORIAL.md", "RUNS.md", "README.md"))]
GUIDES = [
    *GUIDES,
    ROOT / "docs" / "quickstart" / "ZIMAGE.md",
    ROOT / "docs" / "DATASETS.md",
    ROOT / "docs" / "OPTIMIZERS.md",
    ROOT / "docs" / "MEMORY.md",
    ROOT / "docs" / "FLOW.md",
    ROOT / "docs" / "MASKS.md",
    ROOT / "docs" / "STORAGES.md",
    ROOT / "docs" / "FILES.md",
    ROOT / "docs" / "GENERATE.md",
]
VARIABLES = {"BUCKET_KEY": "a", "BUCKET_SECRET": "b"}
"""What examples refer to by {env:NAME}."""
TRANSLATIONS = [page.with_suffix(".es.md") for page in GUIDES]
WRITTEN = [*GUIDES, *TRANSLATIONS]

FILE_COMMANDS = {
    module.__name__.rpartition(".")[2]: module.parse for module in (convert, extract, inspect, merge, resize)
}

_FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n]*)\n(?P<body>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^(#{1,6}) +(.+?)\s*$", re.MULTILINE)
_NAME = re.compile(r"[a-z][a-z0-9]*(?:_[a-z0-9]+)+")


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block: `info` is what follows the fence, `body` its lines without the fence's indent."""

    info: str
    body: str


@cache
def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path) -> list[Block]:
    return [
        Block(info=found["info"].strip(), body=re.sub(rf"^{found['indent']}", "", found["body"], flags=re.MULTILINE))
        for found in _FENCE.finditer(read(page))
    ]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return _FENCE.sub("", read(page))


def shell_lines(page: Path) -> list[str]:
    """The commands of the page's bash and PowerShell blocks, without comments."""
    bodies = (block.body for block in blocks(page) if block.info in ("bash", "powershell"))
    lines = (line.split(" #")[0].strip() for body in bodies for line in body.replace("\\\n", " ").split("\n"))
    return [line for line in lines if line and not line.startswith("#")]


def our_commands(page: Path) -> list[list[str]]:
    """The words after `simpletuner` of every command line in blocks and in the text, `./train.sh` included."""
    found = []
    for line in [*shell_lines(page), *_INLINE.findall(prose(page))]:
        words = shlex.split(line) if line.startswith(("simpletuner ", "./train.sh")) or " ./train.sh" in line else []
        words = words[next((i for i, word in enumerate(words) if "=" not in word), 0) :]
        if words and words[0] in ("simpletuner", "./train.sh"):
            found.append(["train", *words[1:]] if words[0] == "./train.sh" else words[1:])
    return found


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the page's headings, and those that the page sets itself."""
    taken: dict[str, int] = dict.fromkeys(re.findall(r'<a id="([^"]+)">', read(page)), 1)
    for _, heading in _HEADING.findall(prose(page)):
        text = _LINK.sub(lambda link: link[0].split("]")[0].lstrip("!["), heading)
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        count = taken.get(slug, 0)
        taken[slug] = count + 1
        if count:
            taken[f"{slug}-{count}"] = 1
    return set(taken)


def shown(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


each_page = pytest.mark.parametrize("page", PAGES, ids=shown)
each_written = pytest.mark.parametrize("page", WRITTEN, ids=shown)
each_pair = pytest.mark.parametrize(("english", "spanish"), list(zip(GUIDES, TRANSLATIONS, strict=True)), ids=shown)


@each_page
def test_every_relative_link_leads_somewhere(page: Path):
    broken = []
    for target in _LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        if not place.exists() or (anchor and anchor not in anchors(place)):
            broken.append(target)
    assert not broken


@each_written
def test_commands_are_understood(page: Path, tmp_path: Path):
    for words in our_commands(page):
        check_command(words)


def check_command(words: list[str]) -> None:
    command, *rest = [word for word in words if word != "--debug"]
    if command in ("--help", "--version"):
        return
    if "--lang" in rest:
        at = rest.index("--lang")
        assert rest[at + 1] in ("en", "es")
        rest = rest[:at] + rest[at + 2 :]
    assert command in COMMANDS, words
    if command == "runs" and rest:
        action, *rest = rest
        assert action in runs.COMMANDS, words
        runs._parse(action, rest)
    elif command == "examples" and rest:
        assert rest[0] in ("list", "copy"), words
        assert rest[1:2] == [] or rest[1] in example_names(), words
        assert rest[2:3] in ([], ["--dest"]), words
    elif command in FILE_COMMANDS:
        assert rest == [] or FILE_COMMANDS[command](rest), words
    elif command == "config" and rest[:1] == ["explain"]:
        assert all(explain(word, "en") for word in rest[1:]), words
    elif rest and rest != ["--help"]:
        if command == "plot":
            assert rest[0] == "schedule", words
            _, _, rest = plot.own_words(rest[1:])
        if command == "dataset":
            assert rest[0] in dataset.ACTIONS, words
            rest = list(dataset.sort_words(rest[1:], cwd=ROOT).words)
        if command == "train":
            rest = [word for word in rest if word != "--cache-only"]
        if command == "estimate":
            rest = [word for word in rest if word != "--json"]
        if command == "generate":
            rest = check_generate(rest)
        check_options(check_config_action(rest) if command == "config" else rest)


def check_generate(words: list[str]) -> list[str]:
    """The words that mean options of a run, after those of `simpletuner generate`."""
    own, rest = generate._parser().parse_known_args(words)
    for axis in own.grid:
        parse_axis(axis)
    for adapter in own.lora:
        parse_adapter(adapter)
    return [generate._long_flag(word) for word in rest]


def check_config_action(words: list[str]) -> list[str]:
    """The words that mean options, after those that `simpletuner config ACTION` takes for itself."""
    action, *rest = words
    assert action in ("validate", "show", "schema"), words
    own = {"--json"} if action == "validate" else {"--json", "--origin", "--changed"}
    return [word for word in rest if word not in own]


def check_options(words: list[str]) -> None:
    if "--log-format" in words:
        at = words.index("--log-format")
        assert words[at + 1] in ("auto", "rich", "plain", "json")
        words = words[:at] + words[at + 2 :]
    line = parse_arguments(words)
    assert not line.problems, words
    assert line.example is None or line.example in example_names(), words
    unknown = [setting.key for setting in line.settings if meaning_of(setting.key).what != "option"]
    assert not unknown, words


@each_written
def test_configurations_are_free_of_errors(page: Path, tmp_path: Path):
    for block in blocks(page):
        if block.info == "json config":
            check_configuration(block.body, '[{"id": "a", "instance_data_dir": "images"}]', tmp_path)
        elif block.info == "json datasets":
            check_configuration(
                '{"output_dir": "out", "max_train_steps": 1, "validation_disable": true}', block.body, tmp_path
            )
        elif block.info == "json prompts":
            prompts = json.loads(block.body)
            assert prompts and all(isinstance(prompt, str) and prompt for prompt in prompts.values())
        elif block.info == "json lycoris":
            (tmp_path / "lycoris_config.json").write_text(block.body, encoding="utf-8")
            assert read_lycoris(tmp_path / "lycoris_config.json")
        elif block.info == "json event":
            event = event_types.from_json(json.loads(block.body))
            assert not isinstance(event, event_types.UnknownEvent)
        else:
            assert not block.info.startswith(("json", "toml")), f"say what this block is: {block.body[:60]}"


def check_configuration(config: str, datasets: str, folder: Path) -> None:
    """Warnings are mistakes here too: nobody should start from a configuration that is warned of."""
    library = json.loads(config).get("user_prompt_library")
    if library:
        (folder / library).parent.mkdir(parents=True, exist_ok=True)
        (folder / library).write_text('{"a": "b"}', encoding="utf-8")
    if "validation_prompt" not in json.loads(config):
        config = json.dumps({**json.loads(config), "validation_disable": True})
    (folder / "config.json").write_text(config, encoding="utf-8")
    (folder / "multidatabackend.json").write_text(datasets, encoding="utf-8")
    try:
        loaded = load_run_config([], environ=VARIABLES, cwd=folder, check_folders=False)
    except ConfigError as error:
        pytest.fail(f"{error}\n{config}\n{datasets}")
    assert not loaded.warnings, config


@each_written
def test_names_in_the_text_are_options_or_keys(page: Path):
    """A name with underscores in backquotes is an option, a key of a dataset, or one of the few others."""
    others = {"lora_rnk", "validation_images", "demo_dataset", "guidance_scale", "by_model", "load_lora_weights"}
    others |= {field.name for event in event_types.EVENTS.values() for field in fields(event)}
    others |= {"dora_scale", "save_to_disk", *LYCORIS_KEYS}
    others |= {key.rpartition(".")[2] for key in every_dataset_key()}  # those in an object of keys
    others |= set(re.findall(r'"([a-z_]+)":', Path(dataset_data.__file__).read_text(encoding="utf-8")))
    arguments = {argument.name for row in OPTIMIZERS.values() for argument in row.arguments}
    known = {*options(), *every_dataset_key(), *OPTIMIZERS, *arguments, *others}
    known |= {spelling for spelling, _ in OPTIMIZER_SPELLINGS}
    known |= {choice for option in options().values() for choice in option.choices}
    aliases = {alias for option in options().values() for alias in option.opt.aliases}
    names = {word for word in _INLINE.findall(prose(page)) if _NAME.fullmatch(word)}
    assert names <= known | aliases


@each_written
def test_messages_are_the_programs(page: Path):
    """Every message that is quoted with its code has the words of the catalog of the page's language."""
    texts = catalog("es" if page.name.endswith(".es.md") else "en")
    for block in blocks(page):
        lines = block.body.split("\n") if block.info == "text" else []
        for line, after in pairwise(lines):
            mark = re.match(r"(?:[✗⚠·]|\S+Z (?:ERROR|WARNING|INFO))\s+([EWI]-[A-Z-]+)", line)
            if mark:
                title = texts[f"problem.{mark[1]}.title"]
                words = re.sub(r"^\S+Z (?:ERROR|WARNING|INFO)", "", after).strip()
                assert as_pattern(title).fullmatch(words), f"{words!r} is not {title!r}"


def as_pattern(template: str) -> re.Pattern[str]:
    """What `template` can become once its braces are filled; a long message may be cut with an ellipsis."""
    literal = re.split(r"\{[a-z_]+\}", template.replace("{{", "\0").replace("}}", "\1"))
    parts = (re.escape(part.replace("\0", "{").replace("\1", "}")) for part in literal)
    return re.compile(".+".join(parts), re.DOTALL)


@each_written
def test_codes_exist(page: Path):
    texts = catalog("en")
    codes = set(re.findall(r"\b[EWI](?:-[A-Z]{2,})+\b", read(page)))
    assert {code for code in codes if f"problem.{code}.title" not in texts} == set()


@pytest.mark.parametrize("page", [ROOT / "docs" / "RUNS.md", ROOT / "docs" / "RUNS.es.md"], ids=shown)
def test_tables_of_runs_are_complete(page: Path):
    rows = {(int(code), name) for code, name in re.findall(r"^\| (\d+) \| ([A-Z_]+) \|", read(page), re.MULTILINE)}
    assert rows == {(int(code), code.name) for code in ExitCode}
    after_example = read(page).split("```json event")[1]
    events = set(re.findall(r"^\| `([a-z.]+)` \|", after_example, re.MULTILINE))
    assert events == set(event_types.EVENTS)


@pytest.mark.parametrize("page", [ROOT / "docs" / "quickstart" / f"ZIMAGE{end}.md" for end in ("", ".es")], ids=shown)
def test_table_of_flavours_is_complete(page: Path):
    row = re.compile(
        r"^\| `([a-z0-9-]+)`[^|]*\|[^|]*\|[^|]*\| ([\d.]+) \| ([\d.]+), ([\d.]+), ([\d.]+) \|$", re.MULTILINE
    )
    told = {name: tuple(map(float, numbers)) for name, *numbers in row.findall(read(page))}
    assert told == {
        flavour.name: (
            flavour.flow_schedule_shift,
            flavour.validation_num_inference_steps,
            flavour.validation_guidance,
            flavour.validation_sampling_shift,
        )
        for flavour in FLAVOURS.values()
    }


OPTIMIZER_PAGES = [ROOT / "docs" / f"OPTIMIZERS{end}.md" for end in ("", ".es")]


@pytest.mark.parametrize("page", OPTIMIZER_PAGES, ids=shown)
def test_table_of_optimizers_is_the_catalogs(page: Path):
    row = re.compile(r"^\| `([^`]+)` \| [^|]+ \| ([\d.]+) \| ([\d.e-]+) \| ([^|]+) \|$", re.MULTILINE)
    told = {name: (float(size), float(rate), needs) for name, size, rate, needs in row.findall(read(page))}
    wanted = {}
    for optimizer in OPTIMIZERS.values():
        needs = [optimizer.library.distribution] if optimizer.library else []
        needs += ["CUDA"] if optimizer.needs_cuda else []
        size = float(f"{optimizer.state_bytes:.4g}")
        wanted[optimizer.name] = (size, optimizer.rates.usual, ", ".join(needs) or "-")
    assert told == wanted


@pytest.mark.parametrize("page", OPTIMIZER_PAGES, ids=shown)
def test_arguments_and_refused_optimizers_are_the_catalogs(page: Path):
    rows = re.findall(r"^\| (`[^|]+) \| ([^|]+) \|$", read(page), re.MULTILINE)
    told = {
        (name, argument)
        for pattern, cell in rows
        for argument in _INLINE.findall(cell)
        for name in fnmatch.filter(OPTIMIZERS, pattern.strip("`"))
    }
    assert told == {(row.name, argument.name) for row in OPTIMIZERS.values() for argument in row.arguments}
    names = {name for cell, _ in rows for name in _INLINE.findall(cell)}
    assert set(REFUSED_OPTIMIZERS) == {name for name in names if not fnmatch.filter(OPTIMIZERS, name)}


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "README.es.md"], ids=shown)
def test_ratios_are_the_measured_ones(page: Path):
    row = re.compile(r"^\| (?:tiny|mid)[^|]*\| (1 x|4 mixed)[^|]*\|.*\*\*(\d\.\d\d)\*\* \|", re.MULTILINE)
    ratios = row.findall(read(ROOT / "docs" / "performance.md"))
    one, four = ([ratio for batch, ratio in ratios if batch == wanted] for wanted in ("1 x", "4 mixed"))
    told = re.findall(r"(0\.\d\d) (?:to|a) (0\.\d\d)", prose(page))
    assert told == [(min(one), max(one)), (min(four), max(four))]


@pytest.mark.parametrize("page", [ROOT / "docs" / f"FLOW{end}.md" for end in ("", ".es")], ids=shown)
def test_the_table_of_ways_to_train_is_the_measured_one(page: Path):
    rows = json.loads((ROOT / "bench" / "results" / "flow.json").read_text())
    measured = set()
    for way in {row["way"] for row in rows}:
        runs = [row for row in rows if row["way"] == way]
        levels = [fmean(errors) for errors in zip(*(run["held_out"] for run in runs), strict=True)]
        drifted = fmean(fmean(run["rolled"]) for run in runs)
        values = (*levels, fmean(levels), drifted, fmean(run["kept"] for run in runs))
        measured.add(tuple(f"{value:.3f}" for value in values))
    told = [
        tuple(cells.split(" | "))
        for cells in re.findall(r"^\| [^|]+ \| ((?:\d\.\d{3}(?: \| )?){8}) \|$", read(page), re.M)
    ]
    assert len(told) == 8 and set(told) <= measured


@each_pair
def test_both_languages_have_the_same_outline(english: Path, spanish: Path):
    assert [level for level, _ in _HEADING.findall(prose(english))] == [
        level for level, _ in _HEADING.findall(prose(spanish))
    ]
    assert [block.info for block in blocks(english)] == [block.info for block in blocks(spanish)]


@each_pair
def test_both_languages_have_the_same_commands_and_code(english: Path, spanish: Path):
    assert shell_lines(english) == shell_lines(spanish)
    for kind in ("json config", "json datasets", "json prompts", "json lycoris", "json event"):
        assert [json.loads(block.body) for block in blocks(english) if block.info == kind] == [
            json.loads(block.body) for block in blocks(spanish) if block.info == kind
        ]
    assert [block.body for block in blocks(english) if block.info == "python"] == [
        block.body for block in blocks(spanish) if block.info == "python"
    ]
    assert our_commands(english) == our_commands(spanish)


@each_pair
def test_both_languages_link_to_the_same_pages(english: Path, spanish: Path):
    assert list(link_targets(spanish)) == list(link_targets(english))


def link_targets(page: Path) -> Iterator[str]:
    """Where the page's links lead, without language and anchor; the one to the other language left out."""
    for target in _LINK.findall(prose(page)):
        path = target.partition("#")[0].replace(".es.md", ".md") if not target.startswith("http") else target
        if not path or (page.parent / path).resolve() != page.with_name(page.name.replace(".es.md", ".md")):
            yield path


@pytest.mark.parametrize("page", [page for page in WRITTEN if "README" not in page.name], ids=shown)
def test_each_guide_names_its_translation(page: Path):
    other = page.name.replace(".es.md", ".md") if page.name.endswith(".es.md") else page.with_suffix(".es.md").name
    assert f"]({other})" in read(page)
