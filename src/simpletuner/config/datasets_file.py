"""Reading the datasets file: every mistake with its line, all at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from simpletuner.catalog.upstream import DATASET_UPSTREAM, Effect, asks_for_something
from simpletuner.config.build import build_section, convert_setting
from simpletuner.config.caption_filters import KEY as FILTERS_KEY
from simpletuner.config.caption_filters import bad_filters, read_filters
from simpletuner.config.dataset_references import broken_references
from simpletuner.config.dataset_rules import broken_dataset_rules
from simpletuner.config.dataset_storages import StorageKeys, build_storage_keys, flattened
from simpletuner.config.datasets import (
    ENTRY_KINDS,
    ENTRY_MODELS,
    DatasetsConfig,
    Entry,
    EntryKind,
    ImageDataset,
    ImageEmbeds,
    TextEmbeds,
    dataset_options,
)
from simpletuner.config.fields import Option
from simpletuner.config.json_text import JsonDocument, parse_json, read_text, repeated_key_warnings
from simpletuner.config.names import closest_key
from simpletuner.config.paths import as_file_name, fill_path, is_file, is_folder, path_exists, shown_path
from simpletuner.config.place_rules import places_in_image_folders
from simpletuner.config.root import Config
from simpletuner.config.schedule_rules import uncovered
from simpletuner.config.settings import Origin, OriginKind, Setting
from simpletuner.config.storage_rules import broken_storage_rules
from simpletuner.config.values import show
from simpletuner.problems import ConfigError, Fix, Problem, Severity

_NOT_INHERITED = frozenset(("cache_dir",))  # another folder than the option of that name


@dataclass(frozen=True, kw_only=True)
class DatasetsResult:
    """`config` is None if there is no usable dataset; then `problems` says why. `refused`: what asks for something
    that this version cannot do and that would change the result. `absent`: folders that are not there. `lines`: JSON
    pointer -> line."""

    config: DatasetsConfig | None
    problems: tuple[Problem, ...] = ()
    refused: tuple[Problem, ...] = ()
    absent: tuple[Problem, ...] = ()
    lines: Mapping[str, int] = field(default_factory=dict)


def load_datasets(config: Config, *, environ: Mapping[str, str], cwd: Path, is_needed: bool = True) -> DatasetsResult:
    """Read the file that `config` names. Never raises for what the file says: problems come back, all at once. One
    that is not there has no datasets where none is needed."""
    path = Path(config.data.data_backend_config)
    shown = shown_path(path, cwd)
    if not is_file(path) and not is_needed:
        return DatasetsResult(config=DatasetsConfig(images=(), text_embeds=TextEmbeds(), path=path))
    if not is_file(path):
        problem = Problem(code="E-DATASETS-MISSING", params={"file": shown}, path="/data_backend_config")
        return DatasetsResult(config=None, problems=(problem,))
    try:
        document = parse_json(read_text(path, shown), shown)
    except ConfigError as error:
        return DatasetsResult(config=None, problems=error.problems)
    reader = _Reader(document, config, shown=shown, environ=environ, cwd=cwd)
    return reader.read(path)


def no_datasets(config: Config) -> DatasetsResult:
    """What stands for the datasets where nothing is trained: only the usual place of cached embeddings."""
    folder = config.data.cache_dir_text or str(Path(config.data.cache_dir) / "text")
    embeds = TextEmbeds(cache_dir=folder, default=True)
    return DatasetsResult(
        config=DatasetsConfig(images=(), text_embeds=embeds, path=Path(config.data.data_backend_config))
    )


class _Reader:
    """Reads one file; collects problems on the way."""

    def __init__(
        self, document: JsonDocument, config: Config, *, shown: str, environ: Mapping[str, str], cwd: Path
    ) -> None:
        self._document = document
        self._config = config
        self._shown = shown
        self._environ = environ
        self._cwd = cwd
        self._problems = repeated_key_warnings(document, shown)
        self._refused: list[Problem] = []
        self._absent: dict[str, Problem] = {}
        self._written: dict[str, frozenset[str]] = {}

    def read(self, path: Path) -> DatasetsResult:
        if not isinstance(self._document.value, list):
            self._add("E-DATASETS-LIST", "", file=self._shown)
            return self._result(None)
        entries: list[Entry] = []
        ids: dict[str, str] = {}
        unread: set[str] = set()
        for index, written in enumerate(self._document.value):
            found = self._entry(written, f"/{index}")
            if found is None:
                unread.add(_id(written, index))
                continue
            if found.id in ids:
                self._add("E-DATASET-ID-TWICE", f"/{index}/id", id=found.id, first=self._place(ids[found.id]))
            ids[found.id] = f"/{index}/id"
            if not found.disabled:
                entries.append(found)
        datasets = [entry for entry in entries if isinstance(entry, ImageDataset)]
        images = [dataset for dataset in datasets if dataset.dataset_type == "image"]
        has_errors = any(problem.severity is Severity.ERROR for problem in self._problems)
        if not images and not has_errors:
            self._add("E-DATASETS-NONE", "", file=self._shown)
        for problem in broken_references(entries, written=self._written, unread=unread):
            self._add_about_entry(problem, ids)
        self._check_schedules(images, ids)
        text_embeds = [entry for entry in entries if isinstance(entry, TextEmbeds)]
        image_embeds = [entry for entry in entries if isinstance(entry, ImageEmbeds)]
        chosen = next(iter([e for e in text_embeds if e.default] or text_embeds), None)
        datasets_config = DatasetsConfig(
            images=tuple(self._with_latents(dataset, image_embeds) for dataset in images),
            evals=tuple(self._with_latents(d, image_embeds) for d in datasets if d.dataset_type == "eval"),
            masks=tuple(dataset for dataset in datasets if dataset.dataset_type == "conditioning"),
            text_embeds=(chosen or self._inherited_embeds()).model_copy(update={"default": True}),
            other_text_embeds=tuple(entry for entry in text_embeds if entry is not chosen),
            image_embeds=tuple(image_embeds),
            path=path,
        )
        for problem in places_in_image_folders(self._config, datasets_config):
            self._add_about_entry(problem, ids)
        return self._result(datasets_config)

    def _add_about_entry(self, problem: Problem, ids: Mapping[str, str]) -> None:
        """A problem whose path is an id and a key."""
        entry, _, key = (problem.path or "").rpartition("/")
        pointer = f"{ids[entry].removesuffix('/id')}/{key}"
        self._problems.append(replace(problem, origin=self._place(pointer), path=pointer))

    def _result(self, config: DatasetsConfig | None) -> DatasetsResult:
        return DatasetsResult(
            config=config if config is not None and config.images else None,
            problems=tuple(self._problems),
            refused=tuple(self._refused),
            absent=tuple(self._absent.values()),
            lines=self._document.lines,
        )

    def _entry(self, entry: object, pointer: str) -> Entry | None:
        if not isinstance(entry, dict):
            self._add("E-DATASET-OBJECT", pointer, value=show(entry))
            return None
        name = _id(entry, int(pointer[1:]))
        if str(entry.get("disabled", entry.get("disable", ""))).lower() in ("true", "1", "yes", "on"):
            return ImageDataset(id=name, instance_data_dir="-", disabled=True)
        kind = self._kind(entry, pointer, name)
        if kind is None:
            return None
        declared = dataset_options(kind)
        settings = {**self._inherited(kind), **self._settings(entry, pointer, name, declared)}
        missing = [o.name for o in declared.values() if o.required and o.name not in settings]
        for key in missing:
            self._add("E-DATASET-KEY-MISSING", pointer, id=name, key=key)
        if missing:
            return None
        if kind == "image":
            return self._image(settings, pointer, name)
        return (
            self._embeds(settings, pointer, name) if kind == "text_embeds" else self._latents(settings, pointer, name)
        )

    def _kind(self, entry: Mapping[str, object], pointer: str, name: str) -> EntryKind | None:
        """What kind of entry it is; None if there is none of that kind or it is kept where none can be."""
        storage, dataset_type = entry.get("type", "local"), entry.get("dataset_type", "image")
        kind = ENTRY_KINDS.get(dataset_type) if isinstance(dataset_type, str) else None
        if kind is None:
            known = ", ".join(dict.fromkeys(word for word in ENTRY_KINDS if not word.endswith("_embed")))
            self._add("E-DATASET-KIND", f"{pointer}/dataset_type", id=name, value=show(dataset_type), known=known)
            return None
        option = dataset_options(kind)["type"]
        if storage in (*option.choices, *(spelling for spelling, _ in option.opt.spellings)):
            return kind
        code = "E-DATASET-STORAGE" if kind == "image" else "E-CACHE-STORAGE"
        self._add(code, f"{pointer}/type", id=name, value=show(storage), choices=", ".join(option.choices))
        return None

    def _inherited(self, kind: EntryKind) -> dict[str, Setting]:
        """What an entry takes from the run's configuration."""
        found: dict[str, Setting] = {}
        origin = Origin(kind=OriginKind.DEFAULT, place="configuration")
        for section in (self._config.data, self._config.optimizer):
            for key in type(section).model_fields:
                value = getattr(section, key)
                if key in ENTRY_MODELS[kind].model_fields and key not in _NOT_INHERITED and value is not None:
                    found[key] = Setting(key=key, value=(value,) if key == "instance_prompt" else value, origin=origin)
        return found

    def _inherited_embeds(self) -> TextEmbeds:
        """The entry that stands for one that nobody wrote."""
        built, _ = build_section(TextEmbeds, self._inherited("text_embeds"), dataset_options("text_embeds"))
        return self._placed(built)

    def _settings(
        self, entry: Mapping[str, object], pointer: str, name: str, declared: Mapping[str, Option]
    ) -> dict[str, Setting]:
        found: dict[str, Setting] = {}
        aliases = {alias: option.name for option in declared.values() for alias in option.opt.aliases}
        for raw_key, below, value in flattened(entry):
            place = f"{pointer}/{below}"
            key = raw_key.strip().lstrip("-").replace("-", "_")
            option = declared.get(aliases.get(key, key))
            if option is None:
                self._foreign(key, value, place, name, declared)
                continue
            if key == "skip_file_discovery" and isinstance(value, bool):
                continue
            if option.name == FILTERS_KEY:
                value = self._filters(value, place, name)
                if not value:
                    continue
            origin = Origin(kind=OriginKind.FILE, place=self._place(place))
            setting, problem = convert_setting(Setting(key=key, value=value, origin=origin), option, self._environ)
            if problem is not None:
                self._problems.append(self._about(problem, place, name))
            elif setting is not None:
                found[option.name] = setting
        return found

    def _filters(self, value: object, place: str, name: str) -> object:
        """The entries of a list, or of the file that a text names."""
        try:
            return read_filters(value, self._cwd) if isinstance(value, str) and value.strip() else value
        except ConfigError as error:
            self._problems += (self._about(problem, place, name) for problem in error.problems)
            return None

    def _foreign(self, key: str, value: object, place: str, name: str, declared: Mapping[str, Option]) -> None:
        """A key that is no option of the entry: known to upstream, a comment, or a mistake."""
        row = DATASET_UPSTREAM.get(key)
        if row is None and (key.startswith("_") or key in dataset_options("image")):
            return
        if row is not None:
            if asks_for_something(row, value):
                refused = row.effect is Effect.RESULT
                code, severity = ("E-DATASET-NOT-YET", Severity.ERROR) if refused else ("W-DATASET-NOT-YET", None)
                problem = self._problem(code, place, severity or Severity.WARNING, (), id=name, key=key)
                (self._refused if refused else self._problems).append(problem)
            return
        guess = closest_key(key, [*declared, *DATASET_UPSTREAM])
        if guess is not None:
            is_secret = guess in declared and declared[guess].opt.holds == "secret"
            fixes = () if is_secret else (Fix(key=guess, value=value),)
            self._add("E-DATASET-KEY", place, id=name, key=key, suggestion=guess, fixes=fixes)
        else:
            self._add("E-DATASET-KEY-UNKNOWN", place, id=name, key=key)

    def _image(self, settings: dict[str, Setting], pointer: str, name: str) -> ImageDataset:
        built, problems = build_section(ImageDataset, settings, dataset_options("image"))
        if built.dataset_type == "conditioning":  # a mask has no caption, whatever the run's images have
            built = built.model_copy(update={"caption_strategy": "instanceprompt"})
        storage, more = build_storage_keys(settings)
        problems += more
        if built.type == "huggingface" and "metadata_backend" not in settings:
            built = built.model_copy(update={"metadata_backend": "huggingface"})
        built = built.model_copy(update={"storage": self._placed_storage(storage, built.id)})
        self._problems.extend(self._about(problem, f"{pointer}{problem.path}", name) for problem in problems)
        written = frozenset(key for key, setting in settings.items() if setting.origin.kind is OriginKind.FILE)
        self._written[built.id] = written
        rules = (*broken_storage_rules(built, written=written), *broken_dataset_rules(built, written=written))
        for problem in () if problems else rules:
            self._problems.append(self._about(problem, f"{pointer}{problem.path}", name))
        is_local = built.type == "local" and built.instance_data_dir
        folder = fill_path(built.instance_data_dir, self._cwd) if is_local else ""
        if is_local and folder not in self._absent and not is_folder(Path(folder)):
            place = f"{pointer}/instance_data_dir"
            params = {"id": name, "folder": folder}
            problem = self._problem("E-DATASET-FOLDER-MISSING", place, Severity.ERROR, **params)
            self._absent[folder] = problem
        return built.model_copy(update={"instance_data_dir": folder})

    def _with_latents(self, dataset: ImageDataset, caches: Sequence[ImageEmbeds]) -> ImageDataset:
        """With the folder of its latents: its own, that of the image_embeds entry it names, or of the default one."""
        named = next((cache for cache in caches if cache.id == dataset.image_embeds), None)
        cache = named or next((cache for cache in caches if cache.default and dataset.image_embeds is None), None)
        usual = cache.cache_dir if cache is not None else f"{self._config.data.cache_dir}/vae/{{id}}"
        folder = self._cache_path(dataset.cache_dir_vae or usual, dataset.id)
        return dataset.model_copy(update={"cache_dir_vae": folder})

    def _latents(self, settings: dict[str, Setting], pointer: str, name: str) -> ImageEmbeds:
        built, problems = build_section(ImageEmbeds, settings, dataset_options("image_embeds"))
        self._problems.extend(self._about(problem, f"{pointer}{problem.path}", name) for problem in problems)
        folder = built.cache_dir or f"{self._config.data.cache_dir}/vae/{{id}}"
        return built.model_copy(update={"cache_dir": self._cache_path(folder, built.id)})

    def _placed_storage(self, keys: StorageKeys, name: str) -> StorageKeys:
        """The keys with absolute paths."""

        def filled(path: str) -> str:
            return fill_path(path, self._cwd) if path else ""

        images = keys.csv.csv_cache_dir or f"{self._config.data.cache_dir}/urls"
        csv = {"csv_file": filled(keys.csv.csv_file), "csv_cache_dir": self._cache_path(images, name)}
        dataset = filled(keys.hub.dataset_name)
        hub = {"dataset_name": dataset if path_exists(Path(dataset)) else keys.hub.dataset_name}
        reading = {"cache_dir": filled(keys.reading.cache_dir) if keys.reading.cache_dir else None}
        return StorageKeys(
            s3=keys.s3,
            csv=keys.csv.model_copy(update=csv),
            hub=keys.hub.model_copy(update=hub),
            reading=keys.reading.model_copy(update=reading),
            parquet=keys.parquet.model_copy(update={"path": filled(keys.parquet.path)}),
        )

    def _embeds(self, settings: dict[str, Setting], pointer: str, name: str) -> TextEmbeds:
        built, problems = build_section(TextEmbeds, settings, dataset_options("text_embeds"))
        problems += bad_filters(built.caption_filter_list)
        self._problems.extend(self._about(problem, f"{pointer}{problem.path}", name) for problem in problems)
        return self._placed(built)

    def _placed(self, embeds: TextEmbeds) -> TextEmbeds:
        cache_dir = embeds.cache_dir or self._config.data.cache_dir_text or f"{self._config.data.cache_dir}/text"
        return embeds.model_copy(update={"cache_dir": self._cache_path(cache_dir, embeds.id)})

    def _cache_path(self, text: str, name: str) -> str:
        filled = text.replace("{output_dir}", self._config.run.output_dir)
        filled = filled.replace("{model_family}", self._config.model.model_family)
        return fill_path(filled.replace("{id}", as_file_name(name)), self._cwd)

    def _check_schedules(self, images: Sequence[ImageDataset], ids: Mapping[str, str]) -> None:
        length = self._config.run
        problem = uncovered(images, epochs=length.num_train_epochs, steps=length.max_train_steps)
        if problem is not None and not any(found.code == "E-DATASET-SCHEDULE" for found in self._problems):
            pointer = ids[images[0].id]
            self._problems.append(replace(problem, origin=self._place(pointer), path=pointer))

    def _about(self, problem: Problem, pointer: str, name: str) -> Problem:
        """A problem of an option, told as one of a dataset."""
        params = dict(problem.params)
        if "key" in params and "id" not in params:
            params["key"] = f"{name}.{params['key']}"
        return replace(problem, params=params, origin=self._place(pointer), path=pointer)

    def _add(self, code: str, pointer: str, *, fixes: tuple[Fix, ...] = (), **params: object) -> None:
        self._problems.append(self._problem(code, pointer, Severity.ERROR, fixes, **params))

    def _warn(self, code: str, pointer: str, **params: object) -> None:
        self._problems.append(self._problem(code, pointer, Severity.WARNING, (), **params))

    def _problem(
        self, code: str, pointer: str, severity: Severity, fixes: tuple[Fix, ...] = (), /, **params: object
    ) -> Problem:
        return Problem(
            code=code, severity=severity, params=params, origin=self._place(pointer), path=pointer or None, fixes=fixes
        )

    def _place(self, pointer: str) -> str:
        """file:line of the nearest thing that has a line."""
        while pointer and pointer not in self._document.lines:
            pointer = pointer.rpartition("/")[0]
        return f"{self._shown}:{self._document.lines[pointer]}" if pointer else self._shown


def _id(entry: object, index: int) -> str:
    """What messages call an entry."""
    return str((entry.get("id") if isinstance(entry, dict) else None) or f"#{index + 1}")
