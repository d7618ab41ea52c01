"""Where a run writes, how long it is, how often it saves."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Le

from simpletuner.config.fields import Opt, Section


class RunSection(Section):
    output_dir: Annotated[str, Opt(level="basic", holds="path")] = "simpletuner-results"
    """Folder of the run: checkpoints, validation images, log and the result. A full path is a good idea."""

    max_train_steps: Annotated[int, Ge(0), Opt(level="basic", unit="steps")] = 0
    """Length of the run in optimizer updates. Give this or num_train_epochs; the other one then counts as 0."""

    num_train_epochs: Annotated[int, Ge(0), Opt(level="basic", unit="epochs")] = 0
    """Length of the run in passes over the data, repeats included. If neither length is given, one epoch is trained."""

    resume_from_checkpoint: Annotated[str, Opt(level="basic", aliases=("resume",), keeps_empty=True)] = "latest"
    """What to go on from: "latest" (start afresh if there is none), "none", or the name or path of a checkpoint."""

    checkpoint_step_interval: Annotated[
        int, Ge(0), Opt(level="basic", unit="steps", aliases=("checkpointing_steps",))
    ] = 500
    """Save a checkpoint every so many updates. 0 saves only at the end."""

    checkpoints_total_limit: Annotated[int, Ge(0), Opt(aliases=("save_total_limit",))] = 5
    """How many checkpoints to keep; the oldest go first. 0 keeps all."""

    seed: Annotated[int, Ge(-1), Le(2**31 - 1), Opt(level="basic")] = 42
    """Decides order, crops, noise and dropout; the same seed gives the same run. -1 draws one and says which."""

    device: Annotated[str, Opt()] = "auto"
    """Where to train: auto (the best that is there), cpu, cuda, cuda:<number> or mps."""

    debug: Annotated[bool, Opt()] = False
    """Show the Python traceback of an error and write more detail to the log."""
