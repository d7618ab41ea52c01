"""Find the files of a pipeline: in a folder of the diffusers layout, in a repository of the hub, or in single files.

Of a repository only what is used is fetched: no part that another source gives, no other format or variant, and of
a sharded text encoder only the shards that hold a tensor in use. What the local cache has is used without asking
the hub, so a run starts offline and does not change under its user; name a `revision` to move on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from simpletuner.models.family import FamilySpec
from simpletuner.models.files import WeightFiles, read_json
from simpletuner.models.hub import Hub, OnDownload, cached_snapshot, fetch, fetch_large, file_names
from simpletuner.models.parts import (
    Part,
    complete_weights,
    read_part_config,
    text_encoder_part,
    transformer_part,
    vae_part,
    wanted_names,
)
from simpletuner.models.places import OTHER_SUFFIXES, WEIGHTS_SUFFIX, Place, find_place
from simpletuner.problems import ExitCode, Fix, ModelError, Problem

MODEL_OPTION = "pretrained_model_name_or_path"
TRANSFORMER_OPTION = "pretrained_transformer_model_name_or_path"
SUBFOLDER_OPTION = "pretrained_transformer_subfolder"
VAE_OPTION = "pretrained_vae_model_name_or_path"
TEXT_ENCODER_OPTION = "qwen_text_encoder_model_name_or_path"

_CONFIG_PATTERNS = ("config.json", "*/config.json", f"*{WEIGHTS_SUFFIX}.index*.json")
_PIPELINE_PATTERNS = (*_CONFIG_PATTERNS, "scheduler/*.json", "tokenizer/*")


@dataclass(frozen=True, kw_only=True)
class PipelineFiles:
    """Where every part of a pipeline lies on disk. `source` is the folder, or "owner/name@commit"."""

    source: str
    transformer: WeightFiles
    vae: WeightFiles
    text_encoder: WeightFiles
    tokenizer_dir: Path
    scheduler_config: Path | None


@dataclass(frozen=True, kw_only=True)
class Access:
    """How files are reached, the same for every source."""

    variant: str | None
    hub: Hub
    on_download: OnDownload | None


def resolve_pipeline(
    name_or_path: str,
    *,
    spec: FamilySpec,
    revision: str | None = None,
    variant: str | None = None,
    transformer: str | None = None,
    transformer_subfolder: str | None = "transformer",
    vae: str | None = None,
    text_encoder: str | None = None,
    companion: str | None = None,
    hub: Hub | None = None,
    on_download: OnDownload | None = None,
) -> PipelineFiles:
    """Find, and where necessary download, the files of a pipeline.

    Args:
        name_or_path: a folder in the diffusers layout, a repository, or a single transformer file.
        revision: branch, tag or commit of the repository `name_or_path`.
        variant: "fp16" for `diffusion_pytorch_model.fp16.safetensors`; a part without it uses the plain file.
        transformer: take the transformer from this folder, repository or file instead.
        transformer_subfolder: its folder there; None, "" and "none" mean the root.
        vae: take the VAE from this folder, repository or file instead; from its folder `vae` or its root.
        text_encoder: take the text encoder from this folder, repository or file instead; from its folder
            `text_encoder` or its root. The tokenizer stays the pipeline's.
        companion: the pipeline that gives all other parts when `name_or_path` is a single file.
        on_download: told of every download of weights, see `Download`.
    Raises:
        ModelError: E-MODEL-... if something here is missing or of another kind, E-HUB-... (exit code HUB).
    """
    access = Access(variant=variant, hub=hub or Hub(), on_download=on_download)
    main = find_place(name_or_path, option=MODEL_OPTION, revision=revision)
    transformer_place = find_place(transformer, option=TRANSFORMER_OPTION) if transformer else None
    vae_place = find_place(vae, option=VAE_OPTION) if vae else None
    text_place = find_place(text_encoder, option=TEXT_ENCODER_OPTION) if text_encoder else None
    if main.is_single_file:
        if transformer_place is not None:
            params = {"path": name_or_path, "other": transformer}
            raise _model_error("E-MODEL-TWO-TRANSFORMERS", MODEL_OPTION, params)
        if companion is None:
            raise _model_error("E-MODEL-NO-COMPANION", MODEL_OPTION, {"path": name_or_path})
        main, transformer_place = find_place(companion, option=MODEL_OPTION), main

    own_transformer, own_vae = transformer_part(spec, "transformer"), vae_part(spec, "vae")
    own_text = text_encoder_part(spec)
    overridden = {own_transformer: transformer_place, own_vae: vae_place, own_text: text_place}
    from_main = [part for part in (own_text, own_transformer, own_vae) if overridden.get(part) is None]
    root = _open(main, from_main, _PIPELINE_PATTERNS, access)
    found = {part: _weights(main, root, part, access) for part in from_main}
    if transformer_place is not None:
        subfolder = "" if transformer_subfolder in (None, "none") else str(transformer_subfolder)
        candidates = [transformer_part(spec, subfolder)]
        found[own_transformer] = _elsewhere(transformer_place, candidates, root, own_transformer, access)
    if vae_place is not None:
        found[own_vae] = _elsewhere(vae_place, [own_vae, vae_part(spec, "")], root, own_vae, access)
    if text_place is not None:
        found[own_text] = _elsewhere(text_place, [own_text, text_encoder_part(spec, "")], root, own_text, access)
    scheduler_config = root / "scheduler" / "scheduler_config.json"
    files = PipelineFiles(
        source=f"{main.repo.name}@{root.name}" if main.repo else str(root),
        transformer=found[own_transformer],
        vae=found[own_vae],
        text_encoder=found[own_text],
        tokenizer_dir=_tokenizer_dir(main, root),
        scheduler_config=scheduler_config if scheduler_config.is_file() else None,
    )
    shards = (*files.transformer.shards, *files.vae.shards, *files.text_encoder.shards)
    if variant and not any(f".{variant}" in shard.name for shard in shards):
        raise _model_error("E-MODEL-VARIANT", "variant", {"place": files.source, "variant": variant})
    return files


def resolve_transformer(
    name_or_path: str, *, spec: FamilySpec, option: str, hub: Hub | None = None, on_download: OnDownload | None = None
) -> tuple[Path, ...]:
    """The safetensors files of a transformer alone: a single file, or a folder or repository that has it.

    In a folder or repository it is what `transformer/` holds, else the root.

    Raises:
        ModelError: as `resolve_pipeline`.
    """
    access = Access(variant=None, hub=hub or Hub(), on_download=on_download)
    place = find_place(name_or_path, option=option)
    if place.is_single_file:
        return (_single_file(place, "transformer", access),)
    candidates = [transformer_part(spec, "transformer"), transformer_part(spec, "")]
    root = _open(place, candidates, _CONFIG_PATTERNS, access, alternatives=True)
    present = _present(root, candidates, alternatives=True)
    return _weights(place, root, present[0] if present else candidates[0], access).shards


def resolve_file(
    name_or_path: str,
    *,
    file_name: str,
    part: str,
    option: str,
    hub: Hub | None = None,
    on_download: OnDownload | None = None,
) -> Path:
    """Find, and where necessary download, one safetensors file, such as an adapter.

    Args:
        name_or_path: the file itself (a path, or "owner/name/file.safetensors"), or the folder or repository that
            has `file_name`.
        part: what the file is, for messages.
        option: the option that `name_or_path` comes from.
    Raises:
        ModelError: as `resolve_pipeline`.
    """
    access = Access(variant=None, hub=hub or Hub(), on_download=on_download)
    place = find_place(name_or_path, option=option)
    if place.is_single_file:
        return _single_file(place, part, access)
    if place.repo is not None:
        return _single_file(replace(place, file=file_name), part, access)
    assert place.path is not None
    if not (place.path / file_name).is_file():
        raise _no_such_weights(place, place.path, {"part": part, "looked_for": file_name}, access)
    return place.path / file_name


def _open(
    place: Place, parts: Sequence[Part], patterns: Sequence[str], access: Access, *, alternatives: bool = False
) -> Path:
    """A folder here with the place's files that match `patterns` and, as far as they exist, the weights of `parts`.

    All parts are wanted, or with `alternatives` the first that the place has.
    """
    if place.repo is None:
        assert place.path is not None
        return place.path
    cached = cached_snapshot(access.hub, place.repo, patterns)
    if cached is not None:
        present = _present(cached, parts, alternatives)
        complete = all(complete_weights(cached, part, access.variant) for part in present)
        if present and complete and (alternatives or len(present) == len(parts)):
            return cached
    root = fetch(access.hub, place.repo, patterns)
    commit = replace(place.repo, revision=root.name)
    for variant in dict.fromkeys((access.variant, None)):
        lacking = [p for p in _present(root, parts, alternatives) if not complete_weights(root, p, access.variant)]
        names = [name for part in lacking for name in wanted_names(root, part, variant)]
        if names:
            fetch_large(access.hub, commit, names, access.on_download)
    return root


def _present(root: Path, parts: Sequence[Part], alternatives: bool) -> list[Part]:
    present = [part for part in parts if (root / part.inside("config.json")).is_file()]
    return present[:1] if alternatives else present


def _weights(place: Place, root: Path, part: Part, access: Access) -> WeightFiles:
    """The part's files in an opened place; its config must be of the right kind."""
    if not (root / part.inside("config.json")).is_file():
        raise _no_part(place, root, part)
    read_part_config(root, part)
    files = complete_weights(root, part, access.variant)
    if files is None:
        raise _no_weights(place, root, part, access)
    return files


def _elsewhere(place: Place, candidates: Sequence[Part], main_root: Path, own: Part, access: Access) -> WeightFiles:
    """A part that another place gives: a single file, or the first of `candidates` that the place has.

    A single file takes its sizes from the config.json beside it, else from the main pipeline's. So does the only file
    of a place that has no config.json where the part should be.
    """
    if not place.is_single_file:
        only = _cached_only_file(place, own, access)
        if only is not None:
            return _elsewhere(only, candidates, main_root, own, access)
        root = _open(place, candidates, _CONFIG_PATTERNS, access, alternatives=True)
        present = _present(root, candidates, alternatives=True)
        only = None if present else _only_file(place, root, own, access)
        if only is not None:
            return _elsewhere(only, candidates, main_root, own, access)
        return _weights(place, root, present[0] if present else candidates[0], access)
    path = _single_file(place, own.name, access)
    beside = path.parent / "config.json"
    if beside.is_file() and read_json(beside).get(own.kind_key) in own.kinds:
        return WeightFiles(part=own.name, config_path=beside, shards=(path,))
    read_part_config(main_root, own)
    return WeightFiles(part=own.name, config_path=main_root / own.inside("config.json"), shards=(path,))


def _cached_only_file(place: Place, own: Part, access: Access) -> Place | None:
    """As `_only_file`, of a repository, by what the local cache has of it."""
    cached = cached_snapshot(access.hub, place.repo, [f"*{WEIGHTS_SUFFIX}"]) if place.repo is not None else None
    return None if cached is None else _lone(place, cached, own, [path.name for path in cached.iterdir()])


def _only_file(place: Place, root: Path, own: Part, access: Access) -> Place | None:
    """The one weight file of a place that is no pipeline and no folder of a part; None if it has several, or none."""
    names = file_names(access.hub, place.repo) if place.repo is not None else [path.name for path in root.iterdir()]
    return _lone(place, root, own, names)


def _lone(place: Place, root: Path, own: Part, names: Sequence[str]) -> Place | None:
    weights = [name for name in names if name.endswith(WEIGHTS_SUFFIX) and "/" not in name]
    if len(weights) != 1 or any((root / folder / "config.json").is_file() for folder in ("", own.name)):
        return None
    return replace(place, file=weights[0]) if place.repo is not None else replace(place, path=root / weights[0])


def _single_file(place: Place, part: str, access: Access) -> Path:
    if place.repo is None:
        assert place.path is not None
        return place.path
    assert place.file is not None
    cached = cached_snapshot(access.hub, place.repo, [place.file])
    if cached is not None and (cached / place.file).is_file():
        return cached / place.file
    config_name = str(PurePosixPath(place.file).with_name("config.json"))
    root = fetch_large(access.hub, place.repo, [place.file, config_name], access.on_download)
    if not (root / place.file).is_file():
        raise _no_such_weights(place, root, {"part": part, "looked_for": place.file}, access)
    return root / place.file


def _tokenizer_dir(place: Place, root: Path) -> Path:
    folder = root / "tokenizer"
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise _model_error("E-MODEL-LAYOUT", place.option, _layout_params(place, root, "tokenizer/tokenizer.json"))
    return folder


def _no_part(place: Place, root: Path, part: Part) -> ModelError:
    """The part has no config.json where it should: say where there is one, if there is."""
    alternatives = [folder for folder in ("", part.name) if (root / folder / "config.json").is_file()]
    params = _layout_params(place, root, part.inside("config.json"))
    if place.option == TRANSFORMER_OPTION and alternatives:
        value = alternatives[0] or "none"
        fix = Fix(key=SUBFOLDER_OPTION, value=value)
        return _model_error("E-MODEL-SUBFOLDER", SUBFOLDER_OPTION, {**params, "value": value}, fixes=[fix])
    if place.option == MODEL_OPTION and "" in alternatives:
        fixes = [Fix(key=TRANSFORMER_OPTION, value=place.text), Fix(key=SUBFOLDER_OPTION, value="none")]
        return _model_error("E-MODEL-ONLY-ONE-PART", MODEL_OPTION, params, fixes=fixes)
    return _model_error("E-MODEL-LAYOUT", place.option, params)


def _no_weights(place: Place, root: Path, part: Part, access: Access) -> ModelError:
    wanted = wanted_names(root, part, None)
    missing = [name for name in wanted if not (root / name).is_file()]
    params = {"part": part.name, "looked_for": ", ".join(missing)}
    if len(wanted) > len(missing):
        return _model_error("E-MODEL-SHARDS", place.option, {**params, "place": place.text})
    return _no_such_weights(place, root / part.folder, params, access)


def _no_such_weights(place: Place, folder: Path, params: Mapping[str, object], access: Access) -> ModelError:
    """Say which weight files there are instead."""
    names: Sequence[str]
    if place.repo is not None:
        names = [name for name in file_names(access.hub, place.repo) if name.endswith(WEIGHTS_SUFFIX)]
    else:
        names = sorted(path.name for path in folder.iterdir() if path.suffix in (WEIGHTS_SUFFIX, *OTHER_SUFFIXES))
    exit_code = ExitCode.HUB if place.repo else ExitCode.ENVIRONMENT
    found = {"place": place.repo.name if place.repo else place.text, "found": ", ".join(names) or "-"}
    return _model_error("E-MODEL-NO-WEIGHTS", place.option, {**params, **found}, exit_code)


def _layout_params(place: Place, root: Path, missing: str) -> dict[str, object]:
    found = ", ".join(sorted(f"{p.name}/" if p.is_dir() else p.name for p in root.iterdir())) or "-"
    return {"place": place.text, "missing": missing, "found": found}


def _model_error(
    code: str,
    option: str,
    params: Mapping[str, object],
    exit_code: ExitCode = ExitCode.ENVIRONMENT,
    fixes: Sequence[Fix] = (),
) -> ModelError:
    return ModelError(Problem(code=code, params=params, path=f"/{option}", fixes=fixes), exit_code)
