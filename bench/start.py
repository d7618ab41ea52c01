"""From the command to the first step, with cold and with warm caches; a misspelt option; memory.

Whole runs of `simpletuner train` on 24 images of 256 px and a random model of 6.7 M parameters, beside a plain script
over diffusers (peer_diffusers.py) with the same model, images and adapter, both float32.

    python bench/start.py [--repeats 3] [--threads N]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from common import save_result
from pipeline import save_images, save_pipeline

NUM_IMAGES = 24
NUM_STEPS = 30
AIMS = {"cold_s": 10.0, "warm_s": 6.0, "typo_s": 1.0, "memory_ratio": 1.2}
_POLL_S = 0.02


@dataclass(kw_only=True)
class Run:
    """What was seen of a process and its children."""

    first_step_s: float = 0.0
    first_step_cpu_s: float = 0.0  # what the first step would take on a machine of one core that does nothing else
    total_s: float = 0.0
    cpu_s: float = 0.0
    peak_bytes: int = 0
    exit_code: int = 0
    losses: list[float] = field(default_factory=list)


def watch(command: Sequence[str], cwd: Path, threads: int) -> Run:
    """Run `command`; its JSON lines tell of the steps, polling tells of the memory."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": ""}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    run = Run()
    begun = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    poller = threading.Thread(target=_poll_memory, args=(process.pid, run))
    poller.start()
    assert process.stdout is not None
    for line in process.stdout:
        if not line.startswith("{"):
            continue
        event = json.loads(line)
        if event.get("event") == "step.finished":
            if not run.losses:
                run.first_step_s = time.perf_counter() - begun
                run.first_step_cpu_s = _cpu_seconds(psutil.Process(process.pid))
            run.losses.append(event["loss"])
    run.exit_code = process.wait()
    run.total_s = time.perf_counter() - begun
    poller.join()
    return run


def _poll_memory(pid: int, run: Run) -> None:
    try:
        root = psutil.Process(pid)
        while root.is_running() and root.status() != psutil.STATUS_ZOMBIE:
            tree = [root, *root.children(recursive=True)]
            run.peak_bytes = max(run.peak_bytes, sum(p.memory_info().rss for p in tree))
            run.cpu_s = _cpu_seconds(root)
            time.sleep(_POLL_S)
    except psutil.Error:
        pass


def _cpu_seconds(process: psutil.Process) -> float:
    return sum(sum(p.cpu_times()[:2]) for p in (process, *process.children(recursive=True)))


def write_project(root: Path, size_name: str = "tiny") -> None:
    """A model, a folder of images and a configuration, as a user has them."""
    save_pipeline(root / "model", size_name)
    save_images(root / "images", NUM_IMAGES)
    (root / "config").mkdir()
    config = {
        "model_family": "z-image",
        "model_flavour": "base",
        "model_type": "lora",
        "pretrained_model_name_or_path": str(root / "model"),
        "data_backend_config": "config/multidatabackend.json",
        "lora_rank": 16,
        "train_batch_size": 1,
        "max_train_steps": NUM_STEPS,
        "resume_from_checkpoint": "none",
        "validation_disable": True,
        "mixed_precision": "no",
        "seed": 7,
    }
    (root / "config" / "config.json").write_text(json.dumps(config, indent=2))
    (root / "config" / "typo.json").write_text(json.dumps({**config, "lora_rnk": 8}, indent=2))
    datasets = [
        {
            "id": "images",
            "type": "local",
            "instance_data_dir": str(root / "images"),
            "caption_strategy": "textfile",
            "resolution": 256,
            "resolution_type": "pixel",
        },
        {"id": "text-embeds", "type": "local", "dataset_type": "text_embeds", "default": True},
    ]
    (root / "config" / "multidatabackend.json").write_text(json.dumps(datasets, indent=2))


def measure(root: Path, repeats: int, threads: int) -> dict[str, object]:
    train = [sys.executable, "-m", "simpletuner.cli.main", "train", "--log-format", "json"]
    peer_script = str(Path(__file__).with_name("peer_diffusers.py"))
    peer_command = [sys.executable, peer_script, str(root / "model"), str(root / "images"), "--steps", str(NUM_STEPS)]
    cold, warm, peer, typo, typo_cpu = [], [], [], [], []
    for repeat in range(repeats):
        caches = ["--cache_dir", f"caches-{repeat}"]
        cold.append(watch([*train, *caches, "--output_dir", f"cold-{repeat}"], root, threads))
        warm.append(watch([*train, *caches, "--output_dir", f"warm-{repeat}"], root, threads))
        peer.append(watch(peer_command, root, threads))
        environment = {"CONFIG_PATH": "config/typo.json", **os.environ}
        begun, before = time.perf_counter(), os.times()
        done = subprocess.run(train, cwd=root, env=environment, capture_output=True, text=True, check=False)
        after = os.times()
        typo.append(time.perf_counter() - begun)
        typo_cpu.append(sum(after[2:4]) - sum(before[2:4]))  # of children
        assert done.returncode == 2, done
        assert "lora_rank" in done.stdout + done.stderr, done
    runs = {"cold": cold, "warm": warm, "diffusers": peer}
    for run in (*cold, *warm, *peer):
        assert run.exit_code == 0, run
        assert len(run.losses) == NUM_STEPS, run
    peak = _medians(runs, lambda run: float(run.peak_bytes))
    return {
        "aims": AIMS,
        "repeats": repeats,
        "first_step_s": _medians(runs, lambda run: run.first_step_s),
        "first_step_cpu_s": _medians(runs, lambda run: run.first_step_cpu_s),
        "cpu_s": _medians(runs, lambda run: run.cpu_s),
        "typo_s": statistics.median(typo),
        "typo_cpu_s": statistics.median(typo_cpu),
        "peak_bytes": peak,
        "memory_ratio": {name: peak[name] / peak["diffusers"] for name in ("cold", "warm")},
        "cold_and_warm_losses_are_equal": all(c.losses == w.losses for c, w in zip(cold, warm, strict=True)),
    }


def _medians(runs: Mapping[str, Sequence[Run]], value: Callable[[Run], float]) -> dict[str, float]:
    return {name: statistics.median(value(run) for run in several) for name, several in runs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_project(root)
        result = measure(root, args.repeats, args.threads)
    print(json.dumps(result, indent=2))
    if not args.no_save:
        print(save_result("start", result))


if __name__ == "__main__":
    main()
