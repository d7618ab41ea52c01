"""The layers of the package: a folder imports only what lies below it, and light parts import nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import simpletuner

PACKAGE = Path(simpletuner.__file__).parent
BASE = {"problems", "i18n", "__init__"}
LAYERS: dict[str, set[str]] = {
    "problems": set(),
    "i18n": {"problems"},
    "__init__": set(),
    "events": BASE,
    "catalog": BASE,
    "hardware": BASE,
    "config": BASE | {"events", "catalog", "hardware"},
    "planner": BASE | {"events", "catalog", "hardware", "config"},
}
L2 = ("data", "models", "adapters", "optim", "memory", "quant")
LAYERS |= {folder: BASE | {"events", "catalog"} for folder in L2}
LAYERS["experimental"] = BASE | {"events", "catalog"}
LAYERS["validation"] = BASE | {"events", "catalog", "hardware", "config", *L2}
LAYERS["train"] = LAYERS["validation"] | {"validation", "planner", "experimental"}
LAYERS["tools"] = BASE | {"events", "catalog", "adapters", "models"}
LAYERS["generate"] = LAYERS["train"] | {"train"}
LAYERS["cli"] = LAYERS["generate"] | {"generate", "tools"}
HEAVY = {"torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "PIL"}
HEAVY |= {"pyarrow", "datasets", "fsspec", "s3fs", "botocore", "aiohttp"}
NO_HEAVY_IMPORTS = ("problems", "i18n", "__init__", "events", "catalog", "hardware", "config", "planner")
STDLIB_ONLY = ("problems", "i18n", "__init__", "events", "catalog", "hardware")


def sources() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        part = path.relative_to(PACKAGE).parts[0]
        yield part.removesuffix(".py"), path


def imports(path: Path, *, only_top_level: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if only_top_level else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("layer", sorted({layer for layer, _ in sources()}))
def test_a_layer_imports_only_layers_below(layer):
    assert layer in LAYERS, f"give {layer} a row in LAYERS"
    allowed = LAYERS[layer] | {layer}
    for part, path in sources():
        if part != layer:
            continue
        used = {name.split(".")[1] for name in imports(path) if name.startswith("simpletuner.")}
        assert used <= allowed, f"{path.relative_to(PACKAGE)} imports {sorted(used - allowed)}"


@pytest.mark.parametrize("layer", NO_HEAVY_IMPORTS)
def test_light_layers_never_import_heavy_packages(layer):
    for part, path in sources():
        if part == layer:
            used = {name.split(".")[0] for name in imports(path)}
            assert not used & HEAVY, f"{path.relative_to(PACKAGE)} imports {used & HEAVY}"
            if layer in STDLIB_ONLY:
                foreign = {
                    name.split(".")[0]
                    for name in imports(path, only_top_level=True)
                    if name.split(".")[0] not in sys.stdlib_module_names | {"simpletuner"}
                }
                assert not foreign, f"{path.relative_to(PACKAGE)} imports {foreign}"


def test_what_a_run_settles_first_needs_no_torch():
    """The data layer's numpy and Pillow are quick to import; torch takes seconds, and errors should not wait for it."""
    heavy = HEAVY - {"numpy", "PIL"}
    code = f"import sys, simpletuner.cli.train, simpletuner.train.start\nprint(sorted({heavy!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_help_needs_no_heavy_package():
    code = (
        "import sys, contextlib, io\nfrom simpletuner.cli.main import main\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n    main(['--help'])\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
