"""Which images a validation makes: prompts x sizes x seeds, with names that every file system takes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from simpletuner.problems import ConfigError, Problem

MAIN_PROMPT_ID = "validation"


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A validation prompt. `id` is unique and safe in a file name; `strength` scales the adapter for this prompt."""

    id: str
    text: str
    strength: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ImageRequest:
    """One image to make. `size` is (width, height) px; `index` numbers the images of one prompt and size, from 0."""

    prompt: Prompt
    size: tuple[int, int]
    seed: int
    index: int

    def file_stem(self, step: int) -> str:
        width, height = self.size
        return f"step_{step}_{self.prompt.id}_{self.index}_{width}x{height}"


def read_prompts(main_prompt: str | None, library: Path | None) -> tuple[Prompt, ...]:
    """The main prompt, then those of the library file: nickname -> text, or -> {"prompt": text, "adapter_strength": x}.

    Raises:
        ConfigError: the file is missing, is not JSON, or an entry is not a prompt; all entries' problems at once.
    """
    prompts = [Prompt(id=MAIN_PROMPT_ID, text=main_prompt)] if main_prompt else []
    if library is not None:
        taken = {prompt.id for prompt in prompts}
        problems = []
        for nickname, value in _read_library(library).items():
            prompt = _prompt(nickname, value, taken)
            if prompt is None:
                params = {"nickname": nickname, "path": str(library)}
                problems.append(Problem(code="E-PROMPT-LIBRARY-ENTRY", params=params, path=f"/{nickname}"))
            else:
                prompts.append(prompt)
                taken.add(prompt.id)
        if problems:
            raise ConfigError(problems)
    return tuple(prompts)


def plan_images(
    prompts: Sequence[Prompt], *, sizes: Sequence[tuple[int, int]], seed: int, images_per_prompt: int
) -> tuple[ImageRequest, ...]:
    """Every image of one validation; the n-th of a prompt has seed + n, the same at every step."""
    return tuple(
        ImageRequest(prompt=prompt, size=size, seed=seed + index, index=index)
        for prompt in prompts
        for size in sizes
        for index in range(images_per_prompt)
    )


def safe_name(nickname: str) -> str:
    """A nickname as a part of a file name: letters, digits, "-" and "_", at most 64; never empty."""
    return re.sub(r"(?:[^\w-]|_)+", "_", nickname).strip("_")[:64] or "prompt"


def _read_library(path: Path) -> Mapping[str, object]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            Problem(code="E-PROMPT-LIBRARY-MISSING", params={"path": str(path)}, path="/user_prompt_library")
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        where = f"{path}:{error.lineno}:{error.colno}" if isinstance(error, json.JSONDecodeError) else str(path)
        raise ConfigError(
            Problem(code="E-PROMPT-LIBRARY-JSON", params={"path": str(path), "reason": str(error)}, origin=where)
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(
            Problem(
                code="E-PROMPT-LIBRARY-JSON", params={"path": str(path), "reason": "not an object"}, origin=str(path)
            )
        )
    return content


def _prompt(nickname: str, value: object, taken: set[str]) -> Prompt | None:
    text, strength = value, 1.0
    if isinstance(value, dict):
        text, strength = value.get("prompt"), value.get("adapter_strength", 1.0)
    if not isinstance(text, str) or not text.strip() or not isinstance(strength, int | float):
        return None
    name = base = safe_name(nickname)
    number = 2
    while name in taken:
        name, number = f"{base}_{number}", number + 1
    return Prompt(id=name, text=text, strength=float(strength))
