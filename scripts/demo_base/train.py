"""Make the whole demo base with one command: autoencoder, text encoder, transformer, classifier, measurements.

    python -m scripts.demo_base.train --work ~/demo_work --base ~/demo_base --budget-minutes 110
    python -m scripts.demo_base.train --work ~/demo_work --base ~/demo_base --device cuda --budget-minutes 40

Run from the repository's root with the package installed (`pip install -e .[dev]`). A run that was stopped goes on
where it was. A third of the budget goes to the autoencoder, the rest to the transformer; drawing, encoding and
measuring come on top. On a CPU one process a core is started, in bf16: AMX or AVX512-bf16 make that quick. On a CUDA
device the batches are larger. What comes out is copied to `src/simpletuner/assets/demo_base` by hand, once
`measured.json` says that it is better than what is there.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch

from scripts.demo_base import text_encoder

VAE_SHARE = 0.33


def main() -> None:
    """Run every stage in a process (or several) of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for pictures, latents and training state")
    parser.add_argument("--base", type=Path, required=True, help="folder for the pipeline")
    parser.add_argument("--budget-minutes", type=float, default=110)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    work, base = options.work.resolve(), options.base.resolve()
    work.mkdir(parents=True, exist_ok=True)
    num_processes = 1 if options.device == "cuda" else os.cpu_count() or 1
    common = ["--work", str(work), "--device", options.device]
    vae_minutes = VAE_SHARE * options.budget_minutes
    if not (base / "vae" / "config.json").exists():
        vae_batch = ["--batch-size", "64" if options.device == "cuda" else "16"]
        minutes = ["--budget-minutes", str(vae_minutes)]
        _run_stage("train_vae", [*common, *vae_batch, *minutes, "--export", str(base / "vae")], num_processes)
    text_encoder.export(base)
    batch = ["--batch-size", "512" if options.device == "cuda" else "32"]
    minutes = ["--budget-minutes", str(options.budget_minutes - vae_minutes)]
    _run_stage("train_transformer", [*common, *batch, *minutes, "--base", str(base)], num_processes)
    _run_stage("measure", [str(base), "--out", str(work / "measured")], 1)


def _run_stage(module: str, arguments: list[str], num_processes: int) -> None:
    """Run a module of this folder, under torchrun if there are to be several processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    launch = launcher if num_processes > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if num_processes > 1 else dict(os.environ)
    subprocess.run(
        [sys.executable, *launch, "-m", f"scripts.demo_base.{module}", *arguments], check=True, env=environment
    )


if __name__ == "__main__":
    main()
