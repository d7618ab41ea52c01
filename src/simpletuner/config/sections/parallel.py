"""More than one process."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Le

from simpletuner.config.fields import Opt, Section


class ParallelSection(Section):
    num_processes: Annotated[int, Ge(1), Le(1024), Opt()] = 1
    """Training processes, one per GPU."""
