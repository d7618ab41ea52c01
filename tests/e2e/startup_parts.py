"""A training run that writes down, each time a part of the model is loaded, which parts are there already.

python startup_parts.py FILE ARGUMENTS... ; FILE gets a list of [part, parts that are alive, devices of its tensors].
"""

from __future__ import annotations

import json
import sys
import weakref
from pathlib import Path

from simpletuner.cli.main import main
from simpletuner.train import load, prepare

loaded: list[tuple[str, list[str]]] = []
storages: dict[str, list[weakref.ref[object]]] = {}


def watch(module: object, name: str, part: str) -> None:
    """Count a part as there while any of its tensors' memory is."""
    original = getattr(module, name)

    def watched(*args: object, **kwargs: object) -> object:
        alive = [other for other, refs in storages.items() if any(ref() is not None for ref in refs)]
        loaded.append((part, alive))
        result = original(*args, **kwargs)
        tensors = getattr(result, "model", result).state_dict().values()
        storages[part] = [weakref.ref(tensor.untyped_storage()) for tensor in tensors]
        return result

    setattr(module, name, watched)


watch(prepare, "load_prompt_encoder", "text encoder")
watch(prepare, "load_latent_codec", "vae")
watch(load, "load_transformer", "transformer")
code = main(sys.argv[2:])
Path(sys.argv[1]).write_text(json.dumps(loaded))
sys.exit(code)
