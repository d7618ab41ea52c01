"""Scans of large folders, cold and warm, their memory, and the caching of latents beside a plain loop.

Folders of generated JPEGs with captions; every scan is a process of its own, measured with its children. Photographs of
12 megapixels are cached; the plain loop is what a script would do: PIL, resize, crop, `AutoencoderKL.encode`, one image
after the other.

    python bench/data.py [--images 20000] [--many 100000] [--encode 48] [--repeats 3] [--threads N]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SOURCE_SIZES = ((640, 480), (480, 640), (512, 512), (768, 512))
PHOTO_SIZES = ((4000, 3000), (3000, 4000))
NUM_SOURCES = 64
RESOLUTION_PX = 256
AIMS = {"scan_5000_cpu_s": 5.0, "warm_speedup": 50.0, "peak_bytes_above_imports": 1 << 30}
ROLES = ("scan", "cache", "plain")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--many", type=int, default=100_000)
    parser.add_argument("--encode", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--role", choices=ROLES, help=argparse.SUPPRESS)
    parser.add_argument("paths", nargs="*", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        print(json.dumps({"scan": scan, "cache": cache, "plain": plain}[options.role](*options.paths)))
        return
    if options.threads:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
    with tempfile.TemporaryDirectory() as name:
        results = measure(Path(name), options)
    from common import save_result

    save_result("data", results)


def measure(place: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All figures, the sides of a comparison in turns."""
    results: dict[str, Any] = {"aims": AIMS, "scans": {}}
    for count in sorted({5000, options.images, options.many}):
        folder = place / f"images {count}"
        write_images(folder, count)
        cold: list[dict[str, float]] = []
        warm: list[dict[str, float]] = []
        for repeat in range(options.repeats):
            cache_dir = place / f"cache {count} {repeat}"
            cold.append(run("scan", folder, cache_dir))
            warm.append(run("scan", folder, cache_dir))
        found = {"cold": summary(cold), "warm": summary(warm)}
        found["listing_speedup"] = found["cold"]["discovery_s"] / found["warm"]["discovery_s"]
        found["plan_speedup"] = found["cold"]["wall_s"] / found["warm"]["wall_s"]
        results["scans"][str(count)] = found
        for kind, figures in (("cold", found["cold"]), ("warm", found["warm"])):
            print(
                f"{count:>7} images, {kind}: {count / figures['discovery_s']:8.0f} images/s found, "
                f"{count / figures['wall_s']:8.0f} planned, {figures['cpu_s']:6.2f} CPU-s, "
                f"{figures['peak_bytes'] / 2**20:5.0f} MiB above the imports",
                flush=True,
            )
        print(
            f"        warm is {found['listing_speedup']:.0f} times as fast ({found['plan_speedup']:.0f} with the plan)"
        )
    folder = place / "encode"
    write_images(folder, options.encode, PHOTO_SIZES)
    ours: list[dict[str, float]] = []
    plain_loop: list[dict[str, float]] = []
    for repeat in range(options.repeats):
        plain_loop.append(run("plain", folder, place / "unused"))
        ours.append(run("cache", folder, place / f"latents {repeat}"))
    results["caching"] = {"ours": summary(ours), "plain": summary(plain_loop), "num_images": options.encode}
    ratio = results["caching"]["plain"]["wall_s"] / results["caching"]["ours"]["wall_s"]
    results["caching"]["speedup"] = ratio
    rates = [options.encode / results["caching"][side]["wall_s"] for side in ("ours", "plain")]
    print(f"caching: {rates[0]:.1f} images/s, plain loop {rates[1]:.1f}: {ratio:.2f} times as fast")
    return results


def run(role: str, *paths: Path) -> dict[str, float]:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "--role", role, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def summary(runs: list[dict[str, float]]) -> dict[str, float]:
    """The median of each figure."""
    return {name: statistics.median(figures[name] for figures in runs) for name in runs[0]}


def write_images(folder: Path, count: int, sizes: Sequence[tuple[int, int]] = SOURCE_SIZES) -> None:
    """`count` JPEGs with captions. Their pixels repeat, their bytes, names and captions do not."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    sources: list[bytes] = []
    for number in range(min(NUM_SOURCES, count)):
        width, height = sizes[number % len(sizes)]
        colours = np.random.default_rng(number).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        path = folder / "source.jpg"
        Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC).save(path, quality=90)
        sources.append(path.read_bytes())
        path.unlink()
    then = time.time() - 60
    for number in range(count):
        directory = folder / f"{number // 1000:03}"
        directory.mkdir(exist_ok=True)
        path = directory / f"photo {number:06}.jpg"
        path.write_bytes(sources[number % len(sources)] + number.to_bytes(4, "little"))
        text = path.with_suffix(".txt")
        text.write_text(f"a photo of number {number}, in colours that nobody would call calm")
        for file in (path, text):
            os.utime(file, (then, then))


@contextmanager
def measured(figures: dict[str, float]) -> Iterator[None]:
    """Wall and CPU seconds of the block, children included, and what its memory peaks at above what was there.

    `worker_bytes`: the peak of its largest child, all of it.
    """
    before_bytes = peak_bytes(resource.RUSAGE_SELF)
    begun_s, begun_cpu_s = time.perf_counter(), cpu_s()
    yield
    figures["wall_s"] = time.perf_counter() - begun_s
    figures["cpu_s"] = cpu_s() - begun_cpu_s
    figures["peak_bytes"] = peak_bytes(resource.RUSAGE_SELF) - before_bytes
    figures["worker_bytes"] = peak_bytes(resource.RUSAGE_CHILDREN)


def cpu_s() -> float:
    """CPU seconds of this process and of those of its children that have ended."""
    return sum(
        resource.getrusage(who).ru_utime + resource.getrusage(who).ru_stime
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )


def peak_bytes(who: int) -> int:
    """The highest resident memory so far, of this process or of the largest child that has ended."""
    return resource.getrusage(who).ru_maxrss * 1024


def spec_of(folder: Path) -> Any:
    """The folder as a dataset with captions beside the images."""
    from simpletuner.data.spec import CaptionSpec, DatasetSpec, ResizeSpec
    from simpletuner.data.storage import LocalStorage

    return DatasetSpec(
        id="photos",
        storage=LocalStorage(folder=folder),
        resize=ResizeSpec(resolution=RESOLUTION_PX, crop_style="center"),
        captions=CaptionSpec(caption_strategy="textfile"),
    )


def plan_of(folder: Path, cache_dir: Path) -> Any:
    """What a run would train on."""
    from simpletuner.data.plan import build_plan

    return build_plan(
        [spec_of(folder)], batch_size=1, seed=1, cache_dir=cache_dir, on_progress=lambda done, total: None
    )


def scan(folder: Path, cache_dir: Path) -> dict[str, float]:
    """List, read what is new, plan. `discovery_s`: without captions and plan, on another index in the same state."""
    from simpletuner.data.collector import collector_paused
    from simpletuner.data.discovery import scan as discover
    from simpletuner.data.image_index import open_index

    figures: dict[str, float] = {}
    with measured(figures):
        plan = plan_of(folder, cache_dir)
    assert plan.datasets[0].num_images
    storage = spec_of(folder).storage
    begun_s = time.perf_counter()
    with collector_paused(), open_index(cache_dir.with_name(cache_dir.name + " discovery")) as index:
        discover(storage, storage.list_files(), index, on_progress=lambda done, total: None)
    figures["discovery_s"] = time.perf_counter() - begun_s
    return figures


def cache(folder: Path, cache_dir: Path) -> dict[str, float]:
    """Fill the cache of latents, from the plan on."""
    import torch

    from simpletuner.data.latents import LatentSource, cache_latents, learn_latent_keys

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    plan = plan_of(folder, cache_dir)
    codec = load_codec()
    nothing = lambda done, total: None  # noqa: E731
    figures: dict[str, float] = {}
    with measured(figures):
        keys = learn_latent_keys(plan, codec.id, cache_dir=cache_dir, on_progress=nothing)
        store = cache_latents(
            plan,
            LatentSource(id=codec.id, open=lambda: codec),
            keys,
            directory_of=lambda _: cache_dir / "vae",
            cache_dir=cache_dir,
            batch_size=4,
            on_progress=nothing,
        )
    assert store.get(plan.samples()[0]) is not None
    return figures


def load_codec() -> Any:
    """The demo base's VAE, as a run has it."""
    import torch

    from simpletuner.models.weights import resolve_pipeline
    from simpletuner.models.z_image.spec import Z_IMAGE
    from simpletuner.models.z_image.vae import codec_id, load_latent_codec

    files = resolve_pipeline(demo_base(), spec=Z_IMAGE, on_download=lambda download: None)
    codec = load_latent_codec(files.vae, dtype=torch.float32, device="cpu")

    class Codec:
        id = codec_id(files.vae, dtype=torch.float32, tiling=False)
        encode = staticmethod(codec.encode)

    return Codec()


def demo_base() -> str:
    """Where the demo base is."""
    import simpletuner

    return str(Path(simpletuner.__file__).parent / "assets" / "demo_base")


def plain(folder: Path, _unused: Path) -> dict[str, float]:
    """The loop of a script: one image after the other, saved one by one."""
    import numpy as np
    import torch
    from diffusers import AutoencoderKL
    from PIL import Image, ImageOps

    from simpletuner.data.geometry import fit
    from simpletuner.data.spec import ResizeSpec

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    vae = AutoencoderKL.from_pretrained(demo_base(), subfolder="vae")
    spec = ResizeSpec(resolution=RESOLUTION_PX, crop_style="center")
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as place, measured(figures), torch.no_grad():
        for number, path in enumerate(sorted(folder.rglob("*.jpg"))):
            image = ImageOps.exif_transpose(Image.open(path).convert("RGB"))
            geometry = fit(image.size, spec, seed=1, key=path.name)
            (left, top), (width, height) = geometry.crop, geometry.target
            image = image.resize(geometry.intermediary, Image.Resampling.LANCZOS)
            image = image.crop((left, top, left + width, top + height))
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
            mean = vae.encode(pixels).latent_dist.mean
            torch.save((mean - vae.config.shift_factor) * vae.config.scaling_factor, Path(place) / f"{number}.pt")
    return figures


if __name__ == "__main__":
    main()
