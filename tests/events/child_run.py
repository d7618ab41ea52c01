"""A process that records a run and trains nothing. Started by tests: child_run.py OUTPUT_DIR [KEY=VALUE ...].

steps=N (1000)  step=SECONDS (0.01)  mode=train|busy|load|start|fork  look=plain|rich|json  lang=en|es
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from simpletuner.events.console import console_sink
from simpletuner.events.run_directory import RunRecorder
from simpletuner.events.run_status import RunInfo
from simpletuner.events.signals import SAVE, StopRequest
from simpletuner.events.types import CheckpointSaved, RunPlanned, StepFinished, ValidationFinished, ValidationStarted
from simpletuner.problems import ExitCode, SimpletunerError


def main(output_dir: str, *words: str) -> int:
    options = dict(word.split("=") for word in words)
    steps, pause_s, mode = (
        int(options.get("steps", 1000)),
        float(options.get("step", 0.01)),
        options.get("mode", "train"),
    )
    sink = console_sink(
        options.get("look", "plain"), language=options.get("lang", "en"), out=sys.stdout, err=sys.stderr
    )
    stop = StopRequest()
    info = RunInfo(version="0", argv=tuple(sys.argv))
    with (
        stop.installed(),
        RunRecorder.start(output_dir, info=info, effective_config="{}\n", sinks=[sink], stop=stop) as run,
    ):
        if mode == "start":
            return 0
        if mode == "load":
            with stop.interruptible(), run.phase("model"):
                ready(output_dir)
                time.sleep(60)
        if mode == "fork":
            fork_a_worker()
        run.emit(plan(steps))
        for step in range(1, steps + 1):
            if step == 2:
                ready(output_dir)
            time.sleep(pause_s)
            while mode == "busy":
                pass
            run.emit(step_event(step, steps, pause_s))
            if stop.level:
                break
            if run.wants("checkpoint"):
                run.emit(saved(step))
            if run.wants("validate"):
                run.emit(ValidationStarted(step=step, num_images=1))
                run.emit(ValidationFinished(step=step, num_images=1, seconds=0.1, contact_sheet="sheet.png"))
        if stop.level == 0:
            run.finish(output="weights.safetensors")
            return 0
        code = ExitCode.STOPPED if stop.level == SAVE else ExitCode.INTERRUPTED
        if code is ExitCode.STOPPED:
            run.emit(saved(step))
        run.finish(state="stopped", exit_code=code, reason="stop-requested")
        return int(code)


def plan(steps: int) -> RunPlanned:
    return RunPlanned(
        model="z_image demo",
        adapter="LoRA rank 16",
        precision="bf16",
        device="cpu",
        device_name="CPU",
        total_steps=steps,
        num_epochs=2,
        num_datasets=1,
        num_images=24,
        num_buckets=3,
        effective_batch_size=1,
    )


def step_event(step: int, steps: int, seconds: float) -> StepFinished:
    return StepFinished(
        step=step,
        total=steps,
        epoch=1,
        loss=1 / step,
        grad_norm=0.5,
        learning_rate=1e-4,
        step_seconds=seconds,
        samples=1,
    )


def saved(step: int) -> CheckpointSaved:
    return CheckpointSaved(step=step, path=f"checkpoint-{step}", bytes=1000, seconds=0.01)


def ready(output_dir: str) -> None:
    Path(output_dir, "ready").touch()


def fork_a_worker() -> None:
    """A worker of the same process group, as a data loader has; it hears the Ctrl-C as well."""
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)


if __name__ == "__main__":
    if hasattr(signal, "SIGHUP"):  # under nohup it comes ignored, and then stays ignored by design
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        code = main(*sys.argv[1:])
    except SimpletunerError as error:
        print(error.problems[0].code, file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        code = ExitCode.INTERRUPTED
    sys.exit(int(code))
