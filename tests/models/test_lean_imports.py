"""What is merely installed is not imported with diffusers and transformers."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

from simpletuner.models.lean_imports import lean_imports


def test_loading_the_models_imports_no_library_of_number_formats():
    code = """
import sys, torch
import simpletuner
from pathlib import Path
from simpletuner.models.weights import resolve_pipeline
from simpletuner.models.z_image.spec import Z_IMAGE
from simpletuner.models.z_image.text import load_prompt_encoder
from simpletuner.models.z_image.vae import load_latent_codec
files = resolve_pipeline(str(Path(simpletuner.__file__).parent / "assets" / "demo_base"), spec=Z_IMAGE)
load_latent_codec(files.vae, dtype=torch.float32)
load_prompt_encoder(files.text_encoder, files.tokenizer_dir, dtype=torch.float32).encode(["a cat"])
print(sorted({"bitsandbytes", "torchao"} & set(sys.modules)))
import bitsandbytes, torchao.optim
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "[]", result.stderr
    assert result.returncode == 0, "what was hidden can be imported afterwards"


def test_what_is_imported_already_stays_and_the_rest_is_hidden(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", sys)
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    with lean_imports():
        assert sys.modules["torchao"] is sys
        assert find_spec("bitsandbytes") is None
    assert sys.modules["torchao"] is sys
    assert "bitsandbytes" not in sys.modules
