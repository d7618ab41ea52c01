"""The process environment and config.env files: which variables mean which options, and a small shell reader."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

from simpletuner.config.paths import expand_home
from simpletuner.problems import ConfigError, Problem

EXTRA_ARGUMENTS = "TRAINER_EXTRA_ARGS"

VARIABLES: Mapping[str, str] = MappingProxyType(
    {
        "MODEL_TYPE": "model_type",
        "MODEL_FAMILY": "model_family",
        "MODEL_FLAVOUR": "model_flavour",
        "MODEL_NAME": "pretrained_model_name_or_path",
        "OUTPUT_DIR": "output_dir",
        "DATALOADER_CONFIG": "data_backend_config",
        "RESUME_CHECKPOINT": "resume_from_checkpoint",
        "CHECKPOINTING_STEPS": "checkpoint_step_interval",
        "CHECKPOINTING_LIMIT": "checkpoints_total_limit",
        "MAX_NUM_STEPS": "max_train_steps",
        "NUM_EPOCHS": "num_train_epochs",
        "TRAINING_SEED": "seed",
        "LORA_TYPE": "lora_type",
        "LORA_RANK": "lora_rank",
        "LEARNING_RATE": "learning_rate",
        "LR_SCHEDULE": "lr_scheduler",
        "LR_WARMUP_STEPS": "lr_warmup_steps",
        "OPTIMIZER": "optimizer",
        "TRAIN_BATCH_SIZE": "train_batch_size",
        "GRADIENT_ACCUMULATION_STEPS": "gradient_accumulation_steps",
        "USE_GRADIENT_CHECKPOINTING": "gradient_checkpointing",
        "MIXED_PRECISION": "mixed_precision",
        "RESOLUTION": "resolution",
        "RESOLUTION_TYPE": "resolution_type",
        "MINIMUM_RESOLUTION": "minimum_image_size",
        "ASPECT_BUCKET_ROUNDING": "aspect_bucket_rounding",
        "CAPTION_DROPOUT_PROBABILITY": "caption_dropout_probability",
        "INSTANCE_PROMPT": "instance_prompt",
        "USER_PROMPT_LIBRARY": "user_prompt_library",
        "VALIDATION_PROMPT": "validation_prompt",
        "VALIDATION_NEGATIVE_PROMPT": "validation_negative_prompt",
        "VALIDATION_STEPS": "validation_step_interval",
        "VALIDATION_RESOLUTION": "validation_resolution",
        "VALIDATION_GUIDANCE": "validation_guidance",
        "VALIDATION_NUM_INFERENCE_STEPS": "validation_num_inference_steps",
        "VALIDATION_SEED": "validation_seed",
        "NUM_VALIDATION_IMAGES": "num_validation_images",
        "TRACKER_PROJECT_NAME": "tracker_project_name",
        "TRACKER_RUN_NAME": "tracker_run_name",
        "REPORT_TO": "report_to",
        "PUSH_TO_HUB": "push_to_hub",
        "HUB_MODEL_ID": "hub_model_id",
        "TRAINING_NUM_PROCESSES": "num_processes",
        "TRAINING_NUM_MACHINES": "num_machines",
        "TRAINING_DYNAMO_BACKEND": "dynamo_backend",
        "USE_EMA": "use_ema",
    }
)
"""Variable -> option, in the process environment and in config.env alike."""

ENVIRONMENT_NAMES = ("SIMPLETUNER_ENVIRONMENT", "SIMPLETUNER_ENV", "ENV")
BACKEND_NAMES = ("SIMPLETUNER_CONFIG_BACKEND", "CONFIG_BACKEND", "CONFIG_TYPE")
CONFIG_PATH_NAME = "CONFIG_PATH"

STATE_DIR_NAME = "SIMPLETUNER_STATE_DIR"

_ASSIGNMENT = re.compile(r"(?:export[ \t]+)?([A-Za-z_][A-Za-z0-9_]*)(\+?=)")
_REFERENCE = re.compile(r"\$(?:\{([A-Za-z_][A-Za-z0-9_]*)\}|([A-Za-z_][A-Za-z0-9_]*))")


def state_folder(environ: Mapping[str, str]) -> Path:
    """Where the program keeps what it learns about this machine: SIMPLETUNER_STATE_DIR, or the system's usual place."""
    for name, below in ((STATE_DIR_NAME, ""), ("XDG_STATE_HOME", "simpletuner"), ("LOCALAPPDATA", "simpletuner")):
        if environ.get(name):
            return Path(environ[name]) / below
    return expand_home("~/.local/state/simpletuner")


@dataclass(frozen=True, kw_only=True)
class Variable:
    """One variable of a config.env file after all its assignments; `line` is the last one's, counted from 1."""

    name: str
    value: str
    line: int


def first_set(names: tuple[str, ...], environ: Mapping[str, str]) -> tuple[str, str] | None:
    """(variable, value) of the first of `names` that is set and not empty."""
    return next(((name, environ[name].strip()) for name in names if environ.get(name, "").strip()), None)


def parse_env_file(text: str, shown: str, environ: Mapping[str, str]) -> tuple[Variable, ...]:
    """Read assignments: `export NAME=value`, `NAME+=more`, quotes, $NAME, comments. Nothing is executed.

    Raises ConfigError with the line of whatever else stands in the file.
    """
    return tuple(_EnvReader(text, shown, environ).read().values())


def split_words(text: str) -> list[str]:
    """Split TRAINER_EXTRA_ARGS like a shell: quotes, continued lines, comments. A backslash that escapes nothing
    stays, so that Windows paths survive. An unclosed quote ends with the text."""
    return list(_words(text.replace("\\\r\n", " ").replace("\\\n", " ")))


def _words(text: str) -> Iterator[str]:
    at, word = 0, ""
    started = False
    while at < len(text):
        char = text[at]
        if char in " \t\r\n":
            if started:
                yield word
            word, started = "", False
        elif char == "#" and not started:
            end = text.find("\n", at)
            at = len(text) if end < 0 else end
            continue
        elif char in "'\"":
            end = text.find(char, at + 1)
            end = len(text) if end < 0 else end
            word, started = word + text[at + 1 : end], True
            at = end
        elif char == "\\" and text[at + 1 : at + 2] in ("'", '"', " ", "#", "$") and at + 1 < len(text):
            word, started = word + text[at + 1], True
            at += 1
        else:
            word, started = word + char, True
        at += 1
    if started:
        yield word


class _EnvReader:
    def __init__(self, text: str, shown: str, environ: Mapping[str, str]) -> None:
        self._text = text.replace("\r\n", "\n")
        self._shown = shown
        self._environ = environ
        self._at = 0
        self._found: dict[str, Variable] = {}

    def read(self) -> dict[str, Variable]:
        while self._skip_blank():
            start = self._at
            assignment = _ASSIGNMENT.match(self._text, self._at)
            if assignment is None:
                self._fail(start)
            self._at = assignment.end()
            name, line = assignment[1], self._text.count("\n", 0, start) + 1
            value = self._value(start)
            if assignment[2] == "+=":
                value = self._lookup(name) + value
            self._found[name] = Variable(name=name, value=value, line=line)
        return self._found

    def _skip_blank(self) -> bool:
        """Move to the next statement; False at the end of the file."""
        while self._at < len(self._text):
            if self._text[self._at] in " \t\n;":
                self._at += 1
            elif self._text[self._at] == "#":
                end = self._text.find("\n", self._at)
                self._at = len(self._text) if end < 0 else end
            else:
                return True
        return False

    def _value(self, start: int) -> str:
        parts: list[str] = []
        while self._at < len(self._text) and self._text[self._at] not in " \t\n;":
            char = self._text[self._at]
            if char == "'":
                parts.append(self._quoted("'", start))
            elif char == '"':
                parts.append(self._expand(self._quoted('"', start), start))
            else:
                found = re.compile(r"(?:\\\n|\\.|[^\s;'\"\\])+").match(self._text, self._at)
                if found is None:
                    self._fail(start)
                self._at = found.end()
                parts.append(self._expand(found[0].replace("\\\n", ""), start))
        rest = re.compile(r"[ \t]*(?:#[^\n]*)?(?:[\n;]|$)").match(self._text, self._at)
        if rest is None:
            self._fail(start)
        return "".join(parts)

    def _quoted(self, quote: str, start: int) -> str:
        end = self._at + 1
        while end < len(self._text) and self._text[end] != quote:
            end += 2 if quote == '"' and self._text[end] == "\\" else 1
        if end >= len(self._text):
            self._fail(start)
        inside = self._text[self._at + 1 : end]
        self._at = end + 1
        return inside.replace("\\\n", "").replace('\\"', '"') if quote == '"' else inside

    def _expand(self, text: str, start: int) -> str:
        if "$(" in text or "`" in text:
            self._fail(start)
        return _REFERENCE.sub(lambda found: self._lookup(found[1] or found[2]), text)

    def _lookup(self, name: str) -> str:
        variable = self._found.get(name)
        return variable.value if variable else self._environ.get(name, "")

    def _fail(self, at: int) -> NoReturn:
        line = self._text.count("\n", 0, at) + 1
        statement = self._text[at:].split("\n", 1)[0].strip()[:60]
        params = {"file": self._shown, "line": line, "statement": statement}
        raise ConfigError(Problem(code="E-ENV-SYNTAX", params=params, origin=f"{self._shown}:{line}"))
