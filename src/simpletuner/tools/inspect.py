"""What an adapter file is, from its header and its alphas. Loads no torch."""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from simpletuner.adapters.formats.names import (
    HASH_KEY,
    LOHA_PARTS,
    Key,
    Part,
    group_keys,
    is_known,
    looks_like_model,
    missing_parts,
    near_names,
    unread_problem,
)
from simpletuner.adapters.formats.programs import Verdict, who_loads
from simpletuner.events.oserrors import os_errors_as_problems
from simpletuner.models.files import Header, StoredTensor, read_header
from simpletuner.problems import ModelError, Problem, Severity

Z_IMAGE_WIDTH = 3840

_NUM_NAMED = 3
_ALPHA_FORMATS: Mapping[str, str] = {"F64": "<d", "F32": "<f", "F16": "<e"}
_RANK_PARTS = (Part.DOWN, Part.LOKR_W2_B, Part.LOKR_W1_B, Part.HADA_W1_B)


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What is known of a file.

    `layouts` are the prefixes in use with the way names are written; `ranks` and `alphas` count the modules that have
    each value; the alpha None stands for "none in the file", which means alpha = rank.
    """

    path: Path
    size_bytes: int
    kinds: Mapping[str, int]
    layout: str
    num_modules: int
    num_params: int
    ranks: Mapping[int, int]
    alphas: Mapping[float | None, int]
    dtypes: Mapping[str, int]
    width: int | None
    metadata: Mapping[str, str]
    verdicts: Sequence[Verdict]
    problems: Sequence[Problem]


def inspect_file(path: Path) -> Inspection:
    """Look at an adapter file.

    Raises:
        ModelError: E-LORA-DAMAGED, it is no safetensors file or not whole; E-LORA-IS-MODEL; E-LORA-KIND, no adapter.
        FileSystemError: it cannot be read.
    """
    with os_errors_as_problems(path):
        path.open("rb").close()
        header = _header(path)
        stored = {tensor.name: tensor for tensor in header.tensors}
        modules, rest = group_keys(stored)
        if not modules:
            if looks_like_model(rest):
                raise ModelError(Problem(code="E-LORA-IS-MODEL", params={"path": str(path)}))
            raise ModelError(unread_problem(rest, str(path)))
        alphas = Counter(_alpha(path, stored, keys) for keys in modules.values())
        broken = _hash_problem(path, header)
    kinds = Counter(_kind(keys) for keys in modules.values())
    width = _width(modules, stored)
    return Inspection(
        path=path,
        size_bytes=header.size_bytes,
        kinds=kinds,
        layout=_layout(modules),
        num_modules=len(modules),
        num_params=sum(_count(tensor) for tensor in header.tensors),
        ranks=dict(sorted(Counter(_rank(keys, stored) for keys in modules.values()).items())),
        alphas=alphas,
        dtypes=Counter(
            stored[key.text].dtype for keys in modules.values() for key in keys.values() if key.part is not Part.ALPHA
        ),
        width=width,
        metadata=header.metadata,
        verdicts=who_loads(tuple(stored), header.metadata),
        problems=[*broken, *_problems(path, modules, rest, width)],
    )


def _header(path: Path) -> Header:
    try:
        return read_header(path)
    except ModelError as error:
        code = error.problems[0].code.removeprefix("E-MODEL-").lower()
        raise ModelError(Problem(code="E-LORA-DAMAGED", params={"path": str(path), "reason": code})) from error


def _kind(keys: Mapping[Part, Key]) -> str:
    lycoris = "LoHa" if set(keys) & set(LOHA_PARTS) else "LoKr"
    kind = "LoRA" if Part.DOWN in keys or Part.UP in keys else lycoris
    return f"{kind} + DoRA" if Part.MAGNITUDE in keys else kind


def _layout(modules: Mapping[str, Mapping[Part, Key]]) -> str:
    """How the keys of each prefix are written, by the first: "diffusion_model.*.lora_A.weight"."""
    shown: dict[str, str] = {}
    for keys in modules.values():
        first = min(keys.values(), key=lambda key: (key.part is Part.ALPHA, key.text))
        shown.setdefault(first.prefix, f"{first.prefix}*{first.suffix}")
    return ", ".join(shown.values())


def _rank(keys: Mapping[Part, Key], stored: Mapping[str, StoredTensor]) -> int:
    """0 for a module without a rank: two full matrices of LoKr."""
    part = next((part for part in _RANK_PARTS if part in keys), None)
    return stored[keys[part].text].shape[0] if part is not None and stored[keys[part].text].shape else 0


def _alpha(path: Path, stored: Mapping[str, StoredTensor], keys: Mapping[Part, Key]) -> float | None:
    key = keys.get(Part.ALPHA)
    if key is None:
        return None
    tensor = stored[key.text]
    with path.open("rb") as file:
        file.seek(tensor.start)
        raw = file.read(tensor.stop - tensor.start)
    if tensor.dtype == "BF16" and len(raw) == 2:
        raw, layout = b"\0\0" + raw, "<f"
    else:
        layout = _ALPHA_FORMATS.get(tensor.dtype, "")
    return float(struct.unpack(layout, raw)[0]) if layout and len(raw) == struct.calcsize(layout) else None


def _width(modules: Mapping[str, Mapping[Part, Key]], stored: Mapping[str, StoredTensor]) -> int | None:
    """Features that go into the attention, from its adapters."""
    for name, keys in modules.items():
        if name.endswith(("attention.to_q", "attention.qkv")) and Part.DOWN in keys:
            shape = stored[keys[Part.DOWN].text].shape
            return shape[1] if len(shape) == 2 else None
    return None


def _problems(
    path: Path, modules: Mapping[str, Mapping[Part, Key]], rest: Sequence[str], width: int | None
) -> list[Problem]:
    problems = []
    if rest:
        problems.append(unread_problem(rest, str(path)))
    foreign = [name for name in modules if not is_known(name)]
    if foreign:
        params: dict[str, object] = {"path": str(path), "count": len(foreign), "total": len(modules)}
        params |= {"names": ", ".join(foreign[:_NUM_NAMED]), "near": ", ".join(near_names(foreign[0])) or "-"}
        problems.append(Problem(code="E-LORA-OTHER-MODEL", params=params))
    for keys in modules.values():
        missing = missing_parts(keys)
        if missing and len(problems) < _NUM_NAMED:
            params = {"path": str(path), "module": next(iter(keys.values())).stem}
            params |= {"missing": ", ".join(part.value for part in missing)}
            params |= {"present": ", ".join(key.suffix.removeprefix(".") for key in keys.values())}
            problems.append(Problem(code="E-LORA-INCOMPLETE", params=params))
    if width not in (None, Z_IMAGE_WIDTH) and not foreign:
        params = {"width": width, "expected": Z_IMAGE_WIDTH}
        problems.append(Problem(code="W-LORA-WIDTH", severity=Severity.WARNING, params=params))
    return problems


def _hash_problem(path: Path, header: Header) -> list[Problem]:
    """The tensors must be those that the file was written with, if it says so."""
    told = header.metadata.get(HASH_KEY, "").removeprefix("0x")
    start = min(tensor.start for tensor in header.tensors)
    digest = hashlib.sha256()
    if told:
        with path.open("rb") as file:
            file.seek(start)
            while piece := file.read(1 << 20):
                digest.update(piece)
    if not told or digest.hexdigest() == told.lower():
        return []
    return [Problem(code="W-LORA-HASH", severity=Severity.WARNING, params={"path": str(path)})]


def _count(tensor: StoredTensor) -> int:
    count = 1
    for side in tensor.shape:
        count *= side
    return count
