"""`simpletuner dataset`: what is told of the images and captions, to people and to programs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image

from simpletuner.cli.main import main
from simpletuner.data.records import TOLD, Trait
from simpletuner.i18n import LANGUAGES, text
from simpletuner.models.z_image.tokens import find_tokenizer, token_counter
from simpletuner.problems import ExitCode

DEMO = Path(__file__).parents[2] / "src" / "simpletuner" / "assets" / "demo_base"
BATCH = 2


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SIMPLETUNER_LANG", "en")
    monkeypatch.setenv("NO_COLOR", "1")
    for name in ("ENV", "SIMPLETUNER_ENV", "SIMPLETUNER_ENVIRONMENT", "CONFIG_PATH", "TRAINER_EXTRA_ARGS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """report(action, *words, status=0): the data of the command."""

    def run(action: str, *words: str, status: int = 0) -> Any:
        assert main(["dataset", action, "--json", *words]) == status
        return json.loads(capsys.readouterr().out)

    return run


def save(path: Path, size: tuple[int, int], seed: int, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    colours = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    image = Image.fromarray(colours).resize(size).convert(str(options.pop("mode", "RGB")))
    image.save(path, **options)
    return path


def write_config(folder: Path, *datasets: dict[str, object], **options: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_flavour": "demo",
        "output_dir": str(folder / "output"),
        "train_batch_size": BATCH,
        "max_train_steps": 12,
        "gradient_accumulation_steps": 2,
        "seed": 3,
        **options,
    }
    (folder / "config.json").write_text(json.dumps(config))
    path = folder / "multidatabackend.json"
    path.write_text(json.dumps(datasets))
    return path


def an_image_dataset(folder: Path, **options: object) -> dict[str, object]:
    return {
        "id": "pets",
        "instance_data_dir": str(folder),
        "resolution": 128,
        "caption_strategy": "textfile",
        **options,
    }


def captioned(folder: Path) -> Path:
    """Six captioned images of two shapes in `folder`."""
    for number in range(6):
        path = save(folder / f"{number}.png", (128, 128) if number < 4 else (160, 96), number)
        path.with_suffix(".txt").write_text(f"pet number {number}, on a lawn, in the sun")
    return folder


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Images of every kind of trouble."""
    folder = captioned(tmp_path / "pets")
    save(folder / "small.png", (32, 32), 8)
    save(folder / "inks.jpg", (128, 128), 9, mode="CMYK")
    exif = Image.Exif()
    exif[0x0112] = 6
    save(folder / "turned.jpg", (160, 96), 10, exif=exif)
    save(folder / "glass.png", (128, 128), 11, mode="RGBA")
    (folder / "copy.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "broken.jpg").write_bytes((folder / "inks.jpg").read_bytes()[:900])
    (folder / "empty.png").write_bytes(b"")
    (folder / "film.mp4").write_bytes(b"film")
    (folder / "phone.heic").write_bytes(b"phone")
    for name in ("inks", "turned", "glass", "copy"):
        (folder / f"{name}.txt").write_text(f"a pet: {name}")
    (folder / "glass.txt").write_text(" \n")
    (folder / "turned.txt").write_bytes(b"caf\xe9")
    (folder / "inks.txt").unlink()
    return folder


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in [folder, *folder.rglob("*")]}


def test_a_scan_names_everything_and_writes_nothing_there(
    tmp_path: Path, pets: Path, report: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    datasets = write_config(tmp_path / "project", an_image_dataset(pets, minimum_image_size=60))
    before = state_of(pets)
    data = report("scan", str(datasets), status=ExitCode.DATASET)
    (found,) = data["datasets"]
    assert (found["files"], found["readable"], found["used"]) == (13, 11, 7)
    assert {item["file"]: bool(item["reason"]) for item in found["unreadable"]} == {
        "broken.jpg": True,
        "empty.png": True,
    }
    assert found["dropped"] == {"too_small": ["small.png"]}
    assert {item["file"]: item["fault"] for item in found["bad_captions"]} == {
        "inks.txt": "missing",
        "glass.txt": "empty",
        "turned.txt": "encoding",
    }
    assert found["traits"] == {"alpha": 1, "cmyk": 1, "rotated": 1}
    assert (found["smallest"], found["largest"]) == ([32, 32], [128, 128])
    assert found["other_files"] == {".txt": 9, ".mp4": 1, ".heic": 1}
    assert sum(step["images"] for step in found["megapixels"]) == 11
    assert data["duplicates"] == [[str(pets / "0.png"), str(pets / "copy.png")]]
    assert data["run"] is None
    codes = {problem["code"] for problem in data["problems"]}
    assert codes == {"E-CAPTION-MISSING", "E-CAPTION-EMPTY", "E-CAPTION-ENCODING"}
    for language in LANGUAGES:
        assert main(["dataset", "scan", "--lang", language, str(datasets)]) == ExitCode.DATASET
        told = capsys.readouterr()
        assert all(name in told.out for name in ("broken.jpg", "empty.png", "small.png", "inks.txt", ".mp4", "CMYK"))
        assert text("data_command.duplicates", language, n=1) in told.out
        assert text("data_command.run.none", language) in told.out
        assert text("data_command.others.convert", language, extensions=".heic") in told.out
        assert "E-CAPTION-MISSING" in told.err
        assert "data_command." not in told.out
    assert state_of(pets) == before


def test_what_a_run_would_do_adds_up(tmp_path: Path, report: Callable[..., Any]) -> None:
    datasets = write_config(tmp_path / "project", an_image_dataset(captioned(tmp_path / "pets"), repeats=2))
    data = report("scan", str(datasets))
    (found,), run = data["datasets"], data["run"]
    assert found["files"] == found["readable"] == found["used"] == sum(b["images"] for b in found["buckets"]) == 6
    assert run["batches_per_epoch"] == found["batches"] == 9
    assert run["samples_per_epoch"] == 9 * BATCH
    assert run["steps_per_epoch"] == 9 / 2
    assert run["effective_batch_size"] == 2 * BATCH
    assert run["total_steps"] == 12 == run["epochs"] * run["steps_per_epoch"]
    assert data["problems"] == []


def test_a_short_bucket_says_what_to_do_and_that_helps(
    tmp_path: Path, report: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = captioned(tmp_path / "pets")
    (folder / "5.png").unlink()

    def look(status: int, changed: dict[str, object] | None = None, **options: object) -> dict[str, int]:
        """The buckets that are not as they should be: state -> minimum_repeats."""
        dataset = an_image_dataset(folder, **(changed or {}))
        write_config(tmp_path / "project", dataset, train_batch_size=4, **options)
        (found,) = report("buckets", "project", status=status)["datasets"]
        odd = [bucket for bucket in found["buckets"] if bucket["state"] != "ok"]
        for language in LANGUAGES if odd else ():
            assert main(["dataset", "buckets", "--lang", language, "project"]) == status
            key = f"data_command.buckets.{odd[0]['state']}"
            assert text(key, language, repeats=odd[0]["minimum_repeats"]) in capsys.readouterr().out
        return {bucket["state"]: bucket["minimum_repeats"] for bucket in odd}

    assert look(ExitCode.DATASET) == {"short": 3}  # one image of its shape
    assert look(ExitCode.DATASET, {"repeats": 2}) == {"short": 3}
    assert look(0, {"repeats": 3}) == {}
    assert look(0, {"batch_mixing": "packed"}) == {}
    assert look(0, allow_dataset_oversubscription=True) == {"filled": 3}
    assert look(0, {"minimum_image_size": 60}) == {"pruned": 3}


def test_held_out_images_and_masks_are_looked_at_too(
    tmp_path: Path, report: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = captioned(tmp_path / "pets")
    masks = {"id": "masks", "dataset_type": "conditioning", "conditioning_type": "mask"}
    masks["instance_data_dir"] = str(tmp_path / "masks")
    for number in range(5):
        save(tmp_path / "masks" / f"{number}.png", (128, 128) if number < 4 else (160, 96), number, mode="L")
    datasets = write_config(
        tmp_path / "project",
        an_image_dataset(folder, conditioning_data="masks"),
        an_image_dataset(folder, id="measured", dataset_type="eval", resolution=64),
        masks,
    )
    data = report("scan", str(datasets), status=ExitCode.DATASET)
    assert [(found["id"], found["purpose"], found["used"]) for found in data["datasets"]] == [
        ("pets", "train", 6),
        ("measured", "eval", 6),
    ]
    assert [(problem["code"], "5.png" in problem["title"]) for problem in data["problems"]] == [
        ("W-EVAL-TRAINED", True),  # the same folder
        ("E-MASK-MISSING", True),
    ]
    assert data["run"] is None
    save(tmp_path / "masks" / "5.png", (160, 96), 5, mode="L")
    assert report("scan", str(datasets))["run"]["samples_per_epoch"] == 6
    for language in LANGUAGES:
        assert main(["dataset", "scan", "--lang", language, str(datasets)]) == 0
        assert text("data_command.held_out", language) in capsys.readouterr().out


def test_a_configuration_that_is_wrong_is_told_as_data_too(tmp_path: Path, report: Callable[..., Any]) -> None:
    datasets = write_config(tmp_path / "project", an_image_dataset(tmp_path / "pets", repeats=-1))
    for action in ("scan", "buckets", "captions", "cache"):
        data = report(action, str(datasets), status=ExitCode.USAGE)
        assert list(data) == ["problems"]
        assert "/0/repeats" in {problem["path"] for problem in data["problems"]}


def test_a_place_that_is_not_there_does_not_hide_the_others(tmp_path: Path, report: Callable[..., Any]) -> None:
    datasets = write_config(
        tmp_path / "project",
        an_image_dataset(captioned(tmp_path / "pets")),
        an_image_dataset(tmp_path / "nowhere", id="gone"),
    )
    data = report("scan", str(datasets), status=ExitCode.DATASET)
    assert [found["id"] for found in data["datasets"]] == ["pets"]
    assert [problem["code"] for problem in data["problems"]] == ["E-DATASET-FOLDER-MISSING"]


def test_the_datasets_file_brings_the_configuration_beside_it_or_none(
    tmp_path: Path, report: Callable[..., Any]
) -> None:
    folder = captioned(tmp_path / "pets")
    datasets = write_config(tmp_path / "project", an_image_dataset(folder), train_batch_size=3)
    for words in ([str(datasets)], [str(datasets.parent)], ["project/multidatabackend.json"]):
        assert report("buckets", *words, status=ExitCode.DATASET)["datasets"][0]["batch_size"] == 3
    assert report("buckets", str(datasets), "--train_batch_size", "2")["datasets"][0]["batch_size"] == 2
    alone = tmp_path / "alone" / "my-datasets.json"
    alone.parent.mkdir()
    alone.write_text(datasets.read_text())
    assert report("buckets", str(alone))["datasets"][0]["batch_size"] == 1
    main_config = tmp_path / "config"
    write_config(main_config, an_image_dataset(folder), train_batch_size=6, disable_bucket_pruning=True)
    assert report("buckets", status=ExitCode.DATASET)["datasets"][0]["batch_size"] == 6  # found as train finds it


def test_captions_are_counted_as_the_text_encoder_sees_them(
    tmp_path: Path, report: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = captioned(tmp_path / "pets")
    (folder / "0.txt").write_text("pet number 1, on a lawn, in the sun")
    (folder / "2.txt").write_text("a very long story of a pet " * 40)
    datasets = write_config(tmp_path / "project", an_image_dataset(folder), tokenizer_max_length=64)
    data = report("captions", str(datasets))
    (found,) = data["datasets"]
    assert (found["images"], found["captions"], found["distinct"]) == (6, 6, 5)
    assert data["max_tokens"] == 64
    assert [caption.split()[:3] for caption in found["too_long"]] == [["a", "very", "long"]]
    assert found["repeated"] == [{"text": "pet number 1, on a lawn, in the sun", "images": 2}]
    assert found["frequent"]["kind"] == "tags"
    assert found["frequent"]["items"][:2] == [
        {"text": "in the sun", "captions": 4},
        {"text": "on a lawn", "captions": 4},
    ]
    tokens = found["tokens"]
    assert sum(step["captions"] for step in tokens["histogram"]) == 5
    assert tokens["least"] <= tokens["median"] <= 64 < tokens["most"]
    for language in LANGUAGES:
        assert main(["dataset", "captions", "--lang", language, str(datasets)]) == 0
        assert text("data_command.captions.too_long", language, n=1, limit=64) in capsys.readouterr().out


def test_tokens_are_those_of_the_text_encoder() -> None:
    from transformers import AutoTokenizer

    file = find_tokenizer(str(DEMO))
    assert file is not None
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent))
    prompts = ["", "a cat", "  spaces\n and lines ", "ñandú 猫 🐙", "<|im_end|> inside", "word " * 700]

    def whole(prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=True)

    assert token_counter(file)(prompts) == [len(tokenizer(whole(prompt))["input_ids"]) for prompt in prompts]


def test_without_a_tokenizer_captions_are_told_without_tokens(
    tmp_path: Path, report: Callable[..., Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    datasets = write_config(tmp_path / "project", an_image_dataset(captioned(tmp_path / "pets")))
    words = (str(datasets), "--pretrained_model_name_or_path", "nobody/nothing-of-this-name", "--model_flavour=turbo")
    (found,) = report("captions", *words)["datasets"]
    assert found["tokens"] is None
    assert found["too_long"] == []
    for language in LANGUAGES:
        assert main(["dataset", "captions", "--lang", language, *words]) == 0
        assert text("data_command.captions.no_tokenizer", language) in capsys.readouterr().out


def test_looking_needs_no_torch(tmp_path: Path) -> None:
    datasets = write_config(tmp_path / "project", an_image_dataset(captioned(tmp_path / "pets")))
    code = (
        "import sys\nfrom simpletuner.cli.main import main\n"
        f"for what in ('scan', 'buckets', 'captions'):\n    assert main(['dataset', what, {str(datasets)!r}]) == 0\n"
        "print('HEAVY', sorted({'torch', 'transformers', 'diffusers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("HEAVY []\n")


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("trait", [*get_args(Trait), TOLD])
def test_every_kind_of_image_has_a_name(trait: str, language: str) -> None:
    assert "data_command" not in text(f"data_command.trait.{trait}", language)


def test_the_help_teaches_and_a_wrong_action_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    for language in LANGUAGES:
        assert main(["dataset", "--help", "--lang", language]) == 0
        page = capsys.readouterr().out
        assert all(word in page for word in ("scan", "buckets", "captions", "cache", "--json", "--cache-only"))
    assert main(["dataset", "scam"]) == ExitCode.USAGE
    assert "scan, buckets, captions, cache" in capsys.readouterr().err


@pytest.mark.parametrize("page", ["DATASETS.md", "DATASETS.es.md"])
def test_the_keys_of_the_data_are_those_that_the_guide_lists(
    page: str, tmp_path: Path, report: Callable[..., Any]
) -> None:
    words = (Path(__file__).parents[2] / "docs" / page).read_text(encoding="utf-8").split("--json")[-2]
    rows = re.findall(r"^\| (.+?) \| (`.+?) \|$", words, flags=re.MULTILINE)
    listed = [(re.findall(r"`(\w+)`", name)[0], re.findall(r"`(\w+)`", keys)) for name, keys in rows]
    datasets = write_config(tmp_path / "project", an_image_dataset(captioned(tmp_path / "pets")))
    scan, buckets, captions = (report(action, str(datasets)) for action in ("scan", "buckets", "captions"))
    assert listed[:-1] == [
        ("scan", list(scan)),
        ("datasets", list(scan["datasets"][0])),
        ("run", list(scan["run"])),
        ("buckets", list(buckets)),
        ("datasets", list(buckets["datasets"][0])),
        ("buckets", list(buckets["datasets"][0]["buckets"][0])),
        ("captions", list(captions)),
        ("datasets", list(captions["datasets"][0])),
    ]
    assert listed[-1][0] == "cache"  # tests/e2e/test_caching.py


def test_masks_and_held_out_images_are_looked_at_too(tmp_path: Path, report: Callable[..., Any]) -> None:
    """What of them would end a run ends its outlook; what is only worth knowing is told beside it."""
    folder = captioned(tmp_path / "pets")
    masks = {"id": "masks", "dataset_type": "conditioning", "conditioning_type": "mask"}
    masks["instance_data_dir"] = str(tmp_path / "masks")
    for number in range(6):
        save(tmp_path / "masks" / f"{number}.png", (128, 128) if number < 4 else (160, 96), number, mode="L")
    held_out = an_image_dataset(folder, id="held-out", dataset_type="eval")
    path = write_config(tmp_path, an_image_dataset(folder, conditioning_data="masks"), masks, held_out)
    data = report("scan", str(path))
    assert data["run"] is not None
    assert [problem["code"] for problem in data["problems"]] == ["W-EVAL-TRAINED"]
    (tmp_path / "masks/5.png").unlink()
    data = report("scan", str(path), status=ExitCode.DATASET)
    assert data["run"] is None
    assert [problem["code"] for problem in data["problems"]] == ["W-EVAL-TRAINED", "E-MASK-MISSING"]
