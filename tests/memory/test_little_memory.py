"""With the weights on disk a model trains in far less memory than it has weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from simpletuner.models.tensors import write_tensors
from simpletuner.models.z_image.transformer import ZImageTransformer, ZImageTransformerConfig

ROOT = Path(__file__).parents[2]
SIZES = {"dim": 448, "n_layers": 15, "n_refiner_layers": 1, "n_heads": 7, "cap_feat_dim": 64}
AXES = (16, 24, 24)
ALLOWED_MIB = 64

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model of 150 MiB on disk."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = ZImageTransformer(ZImageTransformerConfig(axes_dims=AXES, **SIZES))
    config = {**SIZES, "axes_dims": AXES, "in_channels": 16, "n_kv_heads": SIZES["n_heads"]}
    (path / "config.json").write_text(json.dumps(config))
    write_tensors(path / "w.safetensors", dict(model.state_dict()), {})
    return path


def train(folder: Path, spill: Path | None, allowed_mib: int) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-m", "tests.memory.train_in_little_memory", str(folder), str(spill or "")]
    # As for the tensors of a large model, which glibc gives back to the system when they are freed.
    malloc = {"MALLOC_MMAP_THRESHOLD_": "262144"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **malloc}
    return subprocess.run(
        [*arguments, str(allowed_mib)], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_the_disk_path_works_with_64_mib(folder, tmp_path, record_property):
    """Loading included, and again when the spill is there; in main memory the same step needs all of the weights."""
    plenty = train(folder, None, 4096)
    assert plenty.returncode == 0, plenty.stderr
    loss, weight_bytes, ram_growth = plenty.stdout.split()
    assert int(weight_bytes) > 2 * (ALLOWED_MIB << 20) and int(ram_growth) > int(weight_bytes)
    for _ in ("spill", "read"):
        little = train(folder, tmp_path / "spill", ALLOWED_MIB)
        assert little.returncode == 0, little.stderr
        assert little.stdout.split()[0] == loss
        growth = int(little.stdout.split()[2])
        record_property("growth_mib", growth >> 20)
        assert growth < int(weight_bytes) // 2  # code of torch that is used for the first time included
    refused = train(folder, None, ALLOWED_MIB)
    assert refused.returncode != 0 and "memory" in refused.stderr.lower(), refused.stdout
