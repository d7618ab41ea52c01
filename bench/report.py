"""Put the tables of bench/results/*.json into docs/performance.md and docs/performance.es.md, between their markers.

python bench/report.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
BEGIN, END = "<!-- results: written by bench/report.py -->", "<!-- end of results -->"
# language -> page; English texts are the keys of the other languages' catalogs.
PAGES = {"en": DOCS / "performance.md", "es": DOCS / "performance.es.md"}
SPANISH: Mapping[str, str] = json.loads((HERE / "report.es.json").read_text(encoding="utf-8"))

Say = Callable[[str], str]


def main() -> None:
    for language, path in PAGES.items():
        page = path.read_text(encoding="utf-8")
        before, rest = page.split(BEGIN)
        after = rest.split(END)[1]
        say: Say = SPANISH.__getitem__ if language == "es" else str
        path.write_text(f"{before}{BEGIN}\n\n" + "\n\n".join(sections(say)) + f"\n\n{END}{after}", encoding="utf-8")


def sections(say: Say) -> Iterator[str]:
    """The generated part of the page, in the language of `say`."""
    yield _machine(say)
    yield _steps(say)
    yield _start(say)
    yield _data(say)
    yield _overhead(say)
    yield _full_size(say)
    yield from _accelerators(say)


def _machine(say: Say) -> str:
    machine = _load("step")["machine"]
    return say(
        "Machine: {cores} cores ({features}), {threads} thread used, Python {python}, torch {torch}. Load average "
        "{load_average:.0f}: other work ran beside the benchmark, so the times are CPU seconds; ratios are medians of "
        "steps taken in turn."
    ).format(**{**machine, "features": ", ".join(machine["features"])})


def _steps(say: Say) -> str:
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
    head = ("model", "batch", "format", "ours, s", "diffusers, s", "ratio", "aim at most")
    return say("### A training step") + "\n\n" + _table([say(cell) for cell in head], rows)


def _start(say: Say) -> str:
    result = _load("start")
    cpu, wall, peak, aims = (result[key] for key in ("first_step_cpu_s", "first_step_s", "peak_bytes", "aims"))
    rows = [
        (say(name), f"**{cpu[key]:.1f}**", f"{wall[key]:.1f}", aim, f"{peak[key] / 2**20:.0f}")
        for name, key, aim in (
            ("ours, cold caches", "cold", f"{aims['cold_s']:.0f} s"),
            ("ours, warm caches", "warm", f"{aims['warm_s']:.0f} s"),
            ("diffusers script", "diffusers", ""),
        )
    ]
    head = ("", "CPU s", "wall s", "aim", "peak memory, MiB")
    equal = "bit for bit equal" if result["cold_and_warm_losses_are_equal"] else "DIFFERENT"
    text = say(
        "A misspelt option is reported after {typo:.2f} CPU seconds (aim: under {typo_aim:.0f} s). Peak memory is "
        "{cold:.2f} (cold) and {warm:.2f} (warm) of the diffusers script's; the aim is at most {memory_aim:.1f}. "
        "Losses of the run with cold caches and of the run with warm caches: {equal}."
    ).format(
        typo=result["typo_cpu_s"],
        typo_aim=aims["typo_s"],
        cold=result["memory_ratio"]["cold"],
        warm=result["memory_ratio"]["warm"],
        memory_aim=aims["memory_ratio"],
        equal=say(equal),
    )
    table = _table([say(cell) if cell else "" for cell in head], rows)
    return say("### From the command to the first step") + f"\n\n{table}\n\n{text}"


def _data(say: Say) -> str:
    result = _load("data")
    aims = result["aims"]
    rows = []
    for count, found in result["scans"].items():
        for name, key in (("nothing known", "cold"), ("nothing changed", "warm")):
            figures = found[key]
            rates = [f"{int(count) / figures[which]:,.0f}" for which in ("discovery_s", "wall_s")]
            memory = f"{figures['peak_bytes'] / 2**20:.0f}"
            rows.append((f"{int(count):,}", say(name), *rates, f"**{figures['cpu_s']:.2f}**", memory))
    head = ("images", "at the start", "found per second", "planned per second", "CPU s", "memory, MiB")
    caching = result["caching"]
    text = say(
        "JPEGs of 0.2 to 0.4 megapixels with a caption file each. *Found*: listed and known from their headers; "
        "*planned*: with captions, crops and buckets. Memory is what a scan needs beyond its imports (aim: under "
        "{memory_aim:.0f} MiB); 5,000 images may take {cpu_aim:.0f} CPU seconds. With nothing changed, finding is "
        "{speedup:.0f} times as fast (aim: {speedup_aim:.0f}); what is left is the listing of two files per image. "
        "Latents of 256 px of photographs of 12 megapixels are cached {caching:.2f} times as fast as by a plain loop "
        "of PIL and `AutoencoderKL.encode`, with one thread for products each."
    ).format(
        memory_aim=aims["peak_bytes_above_imports"] / 2**20,
        cpu_aim=aims["scan_5000_cpu_s"],
        speedup=result["scans"]["20000"]["listing_speedup"],
        speedup_aim=aims["warm_speedup"],
        caching=caching["speedup"],
    )
    table = _table([say(cell) for cell in head], rows)
    return say("### Scans of large folders, and caching") + f"\n\n{table}\n\n{text}"


def _overhead(say: Say) -> str:
    result = _load("overhead")
    rows = []
    for row in result["rows"]:
        cpu = row["cpu"]
        shares = [f"{100 * cpu[f'{name}_share']:.1f} %" for name in ("forward", "backward", "optimizer")]
        rest = f"**{100 * cpu['neither_model_nor_optimizer_share']:.1f} %**"
        together = f"**{100 * cpu['not_the_model_share']:.1f} %**"
        rows.append((row["size"], f"{1000 * cpu['step_s']:.0f}", *shares, rest, together))
    head = ("model", "step, CPU ms", "forward", "backward", "optimizer", "everything else", "optimizer and else")
    text = say(
        "256 px, batch 1, float32, one thread; the aim is under {aim:.0f} %. The tiny model is the hardest case, "
        "because the rest does not grow with the model."
    ).format(aim=100 * result["aim"])
    table = _table([say(cell) for cell in head], rows)
    return say("### What of a step is not the model") + f"\n\n{table}\n\n{text}"


def _full_size(say: Say) -> str:
    result = _load("full_size")
    gib = 2**30
    rows = [
        (
            row["precision"],
            f"{row['model_bytes'] / gib:.2f}",
            f"**{row['load_peak_bytes'] / gib:.2f}**",
            f"{row['load_aim_bytes'] / gib:.2f}",
            f"{row['load_s']:.0f}",
            f"**{row['step_peak_bytes'] / gib:.2f}**",
            f"{row['aim_bytes'] / gib:.0f}",
            f"{min(row['steps_s']):.0f}",
        )
        for row in result["rows"]
    ]
    head = (
        "format",
        "model, GiB",
        "peak of loading",
        "aim",
        "loading, s",
        "peak of two steps",
        "aim",
        "faster step, s",
    )
    text = say(
        "{params:.2f} billion parameters with random weights, read from three bf16 shards; rank-16 LoRA, 256 px, "
        "batch 1, every block recomputed, {compute} products on a CPU without matrix units for bf16. Peaks are "
        "resident memory of the whole process in GiB, Python and torch included; other work ran beside it (load "
        "average {load:.0f})."
    ).format(
        params=result["num_params"] / 1e9,
        compute=result["rows"][0]["compute"],
        load=result["machine"]["load_average"],
    )
    table = _table([say(cell) for cell in head], rows)
    return say("### The full size in few bits, on a CPU") + f"\n\n{table}\n\n{text}"


def _accelerators(say: Say) -> Iterator[str]:
    """One section for each result of gpu.py."""
    for path in sorted((HERE / "results").glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if "matrix_tflops" not in result:
            continue
        rows = [
            (
                row["name"],
                row["failed"] if "failed" in row else f"**{row['step_s']:.3f}**",
                f"{row['allocated_gib']:.1f}" if "allocated_gib" in row else "",
                f"{row['reserved_gib']:.1f}" if "reserved_gib" in row else "",
                f"{100 * row['tflop'] / row['step_s'] / result['matrix_tflops']:.0f} %" if "tflop" in row else "",
            )
            for row in result["rows"]
        ]
        head = ("case", "step, s", "allocated, GiB", "reserved, GiB", "of the card's rate")
        yield f"### {result['device']}, {result['date']}\n\n" + _table([say(cell) for cell in head], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _load(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return document


if __name__ == "__main__":
    main()
