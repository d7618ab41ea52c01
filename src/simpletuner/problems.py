"""Problems as data: what is wrong, where it came from, what to do. Standard library only.

A `Problem` carries a code and parameters, never a sentence. `i18n.render_problem` makes the sentence in the
reader's language, so the console, the web interface and a webhook say the same thing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum


class Severity(str, Enum):
    """How bad a problem is. Only an error stops a run."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"


class ExitCode(IntEnum):
    """Exit status of every command; part of the public interface."""

    OK = 0
    FAILED = 1
    USAGE = 2
    ENVIRONMENT = 3
    OUT_OF_MEMORY = 4
    DATASET = 5
    HUB = 6
    STOPPED = 75
    INTERRUPTED = 130


@dataclass(frozen=True, kw_only=True)
class Fix:
    """One change that solves a problem: set the option `key` to `value` (None: remove it)."""

    key: str
    value: object


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong.

    `code` names the texts `problem.<code>.title` and `problem.<code>.hint` of the message catalogs; `params` fill
    their braces. `origin` says where the value came from ("config/config.json:14", "--lora_rank", "environment ENV").
    `path` is a JSON pointer into the document that has the problem ("/lora_rank", "/0/resolution").
    """

    code: str
    severity: Severity = Severity.ERROR
    params: Mapping[str, object] = field(default_factory=dict)
    origin: str | None = None
    path: str | None = None
    fixes: Sequence[Fix] = ()


class SimpletunerError(Exception):
    """Something a user can cause or mend. The command line prints `problems` and exits with `exit_code`."""

    def __init__(self, problems: Problem | Sequence[Problem], exit_code: ExitCode = ExitCode.FAILED) -> None:
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        self.exit_code = exit_code
        assert self.problems, "an error without a problem says nothing"
        super().__init__("; ".join(f"{p.code} {dict(p.params)}" for p in self.problems))


class ConfigError(SimpletunerError):
    """Every problem of a configuration, all at once."""

    def __init__(self, problems: Problem | Sequence[Problem]) -> None:
        super().__init__(problems, ExitCode.USAGE)


class DatasetError(SimpletunerError):
    """The images, captions or caches cannot be used."""

    def __init__(self, problems: Problem | Sequence[Problem]) -> None:
        super().__init__(problems, ExitCode.DATASET)


class ModelError(SimpletunerError):
    """Model files are missing, damaged or of another kind."""

    def __init__(self, problems: Problem | Sequence[Problem], exit_code: ExitCode = ExitCode.ENVIRONMENT) -> None:
        super().__init__(problems, exit_code)
