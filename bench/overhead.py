"""What of a step is not the model: a real run in this process, with clocks around forward, backward and optimizer.

A step lasts from the start of one forward pass to the start of the next, so everything between counts: waiting for
data, drawing noise, the loss, clipping, events, the journal, control files. The clock is the CPU time of the main
thread, which other processes on the machine do not disturb; the wall clock is reported beside it.

    python bench/overhead.py [--steps 100] [--threads N]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from common import save_result
from start import NUM_IMAGES, write_project

from simpletuner.cli.main import main as simpletuner
from simpletuner.models.z_image.transformer import ZImageTransformer
from simpletuner.optim.bucketed import BucketedOptimizer

AIM = 0.03
_WARM_UP = NUM_IMAGES + 8  # in the first pass over the images captions are refined, which later steps reuse


class Clocks:
    """Seconds spent in each part, and when each forward pass began; on the thread's clock and on the wall's."""

    def __init__(self) -> None:
        self.parts: dict[str, list[tuple[float, float]]] = {}
        self.begun: list[tuple[float, float]] = []

    def around(self, name: str, function: Callable[..., Any], *, begins_step: bool = False) -> Callable[..., Any]:
        """`function`, timed."""

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            cpu, wall = time.thread_time(), time.perf_counter()
            if begins_step:
                self.begun.append((cpu, wall))
            try:
                return function(*args, **kwargs)
            finally:
                self.parts.setdefault(name, []).append((time.thread_time() - cpu, time.perf_counter() - wall))

        return timed


def measure(size_name: str, steps: int, threads: int) -> dict[str, object]:
    """Train `steps` steps of a model in a temporary project; return the shares. Runs in a process of its own."""
    torch.set_num_threads(threads)
    clocks = Clocks()
    ZImageTransformer.forward = clocks.around("forward", ZImageTransformer.forward, begins_step=True)  # type: ignore[method-assign]
    torch.Tensor.backward = clocks.around("backward", torch.Tensor.backward)  # type: ignore[method-assign]
    BucketedOptimizer.step = clocks.around("optimizer", BucketedOptimizer.step)  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_project(root, size_name)
        os.chdir(root)
        arguments = ["train", "--log-format", "json", "--max_train_steps", str(steps), "--output_dir", "output"]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert simpletuner(arguments) == 0
        os.chdir("/")
    # The last begun step has no successor that would end it.
    count = steps - 1 - _WARM_UP
    shares = {}
    for index, clock in enumerate(("cpu", "wall")):
        total = clocks.begun[-1][index] - clocks.begun[_WARM_UP][index]
        parts = {name: sum(t[index] for t in times[_WARM_UP : steps - 1]) for name, times in clocks.parts.items()}
        shares[clock] = {
            "step_s": total / count,
            **{f"{name}_share": seconds / total for name, seconds in parts.items()},
            "not_the_model_share": 1 - (parts["forward"] + parts["backward"]) / total,
            "neither_model_nor_optimizer_share": 1 - sum(parts.values()) / total,
        }
    return {"size": size_name, "steps": count, **shares}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sizes", nargs="+", default=["tiny", "mid"])
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)  # what the result says of the machine
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        rows = [pool.apply(measure, (size, args.steps, args.threads)) for size in args.sizes]
    result = {"aim": AIM, "rows": rows}
    print(json.dumps(result, indent=2))
    if not args.no_save:
        print(save_result("overhead", result))


if __name__ == "__main__":
    main()
