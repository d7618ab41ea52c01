"""Put the tables of bench/results/*.json into docs/performance.md, between its markers.

python bench/report.py
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "performance.md"
BEGIN, END = "<!-- results: written by bench/report.py -->", "<!-- end of results -->"


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    sections = [_machine(), _steps(), _start(), _overhead()]
    PAGE.write_text(f"{before}{BEGIN}\n\n" + "\n\n".join(sections) + f"\n\n{END}{after}", encoding="utf-8")


def _machine() -> str:
    machine = _load("step")["machine"]
    return (
        f"Machine: {machine['cores']} cores ({', '.join(machine['features'])}), {machine['threads']} thread used, "
        f"Python {machine['python']}, torch {machine['torch']}. Other work ran beside the benchmark (load average "
        f"{machine['load_average']:.0f}), so the times are CPU seconds; ratios are medians of steps taken in turn."
    )


def _steps() -> str:
    rows = [
        (
            f"{row['size']}, {row['num_params'] / 1e6:.1f} M",
            row["batch"],
            row["precision"],
            f"{row['ours']['cpu_s']:.3f}",
            f"{row['diffusers']['cpu_s']:.3f}",
            f"**{row['ratio_cpu']:.2f}**",
            f"{row['aim']:.1f}",
        )
        for row in _load("step")["rows"]
    ]
    return "### A training step\n\n" + _table(
        ("model", "batch", "format", "ours, s", "diffusers, s", "ratio", "aim at most"), rows
    )


def _start() -> str:
    result = _load("start")
    cpu, wall, peak, aims = (result[key] for key in ("first_step_cpu_s", "first_step_s", "peak_bytes", "aims"))
    rows = [
        (name, f"**{cpu[key]:.1f}**", f"{wall[key]:.1f}", aim, f"{peak[key] / 2**20:.0f}")
        for name, key, aim in (
            ("ours, cold caches", "cold", f"{aims['cold_s']:.0f} s"),
            ("ours, warm caches", "warm", f"{aims['warm_s']:.0f} s"),
            ("diffusers script", "diffusers", ""),
        )
    ]
    equal = "bit for bit equal" if result["cold_and_warm_losses_are_equal"] else "DIFFERENT"
    return (
        "### From the command to the first step\n\n"
        + _table(("", "CPU s", "wall s on the busy machine", "aim", "peak memory, MiB"), rows)
        + f"\n\nA misspelt option is reported after {result['typo_cpu_s']:.2f} CPU seconds (aim: under "
        + f"{aims['typo_s']:.0f} s). Peak memory is {result['memory_ratio']['cold']:.2f} (cold) and "
        + f"{result['memory_ratio']['warm']:.2f} (warm) of the diffusers script's; the aim is at most "
        + f"{aims['memory_ratio']:.1f}. Losses of the run with cold caches and of the run with warm caches: {equal}."
    )


def _overhead() -> str:
    result = _load("overhead")
    rows = []
    for row in result["rows"]:
        cpu = row["cpu"]
        shares = [f"{100 * cpu[f'{name}_share']:.1f} %" for name in ("forward", "backward", "optimizer")]
        rest = f"**{100 * cpu['neither_model_nor_optimizer_share']:.1f} %**"
        together = f"**{100 * cpu['not_the_model_share']:.1f} %**"
        rows.append((row["size"], f"{1000 * cpu['step_s']:.0f}", *shares, rest, together))
    head = ("model", "step, CPU ms", "forward", "backward", "optimizer", "everything else", "optimizer and else")
    return (
        "### What of a step is not the model\n\n"
        + _table(head, rows)
        + f"\n\n256 px, batch 1, float32, one thread; the aim is under {100 * result['aim']:.0f} %. The tiny model is "
        "the hardest case, because the rest does not grow with the model."
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _load(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return document


if __name__ == "__main__":
    main()
