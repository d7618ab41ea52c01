"""A run with offload is the run without: same losses, same adapter, validation images and resuming included."""

from __future__ import annotations

import signal
import time

import pytest

from tests.e2e.test_resume import assert_same_weights

pytestmark = pytest.mark.slow(seconds=20)

OFFLOADS = {
    "blocks": {
        "enable_group_offload": True,
        "group_offload_use_stream": True,
        "group_offload_text_encoder": True,
        "group_offload_vae": True,
    },
    "leaves from disk": {
        "enable_group_offload": True,
        "group_offload_type": "leaf_level",
        "group_offload_to_disk_path": "spill",
        "group_offload_text_encoder": True,
    },
    "musubi": {"musubi_blocks_to_swap": 3},
    "ramtorch": {
        "ramtorch": True,
        "ramtorch_text_encoder": True,
        "ramtorch_vae": True,
        "ramtorch_transformer_percent": 60,
    },
}
VALIDATION = {
    "validation_disable": False,
    "validation_prompt": "a red ball",
    "validation_resolution": "64x64",
    "validation_num_inference_steps": 2,
    "validation_step_interval": 3,
}


def flags(options: dict[str, object]) -> list[str]:
    return [f"--{key}={value}" for key, value in options.items()]


def pictures(output) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (output / "validation_images").glob("*.png")}


@pytest.fixture
def run(train):
    """run(folder, *words): a run in a folder of its own."""
    return lambda folder, *words: train(f"--output_dir={folder}/ball", *words)


@pytest.mark.parametrize(
    ("precision", "offloads"), [("no_change", ("blocks", "ramtorch")), ("int8", ("leaves from disk", "musubi"))]
)
def test_runs_with_and_without_are_the_same(project, run, precision, offloads):
    project.set(base_model_precision=precision, lora_dropout=0.1, **VALIDATION)
    run("plain")
    losses, plain = project.losses(project.root / "plain/ball"), project.root / "plain/ball"
    assert len(losses) == 6 and len(pictures(plain)) > 2
    for number, name in enumerate(offloads):
        folder, options = f"offload{number}", OFFLOADS[name]
        run(folder, *flags(options))
        assert project.losses(project.root / folder / "ball") == losses, options
        assert_same_weights(plain, project.root / folder / "ball")
        assert pictures(project.root / folder / "ball") == pictures(plain)
        codes = {e["problem"]["code"] for e in project.events(project.root / folder / "ball") if "problem" in e}
        assert "I-OFFLOAD" in codes


def test_a_run_goes_on_with_another_offload(project, run):
    """Two steps without, two with blocks, two from disk: the six of a run that was left alone."""
    run("plain")
    for steps, options in ((2, {}), (4, OFFLOADS["blocks"]), (6, OFFLOADS["leaves from disk"])):
        run("mixed", f"--max_train_steps={steps}", *flags(options))
    assert_same_weights(project.root / "plain/ball", project.root / "mixed/ball")
    assert project.losses(project.root / "mixed/ball") == project.losses(project.root / "plain/ball")


def test_a_kept_quantised_model_streams(project, run):
    project.set(base_model_precision="int8", quantized_model_dir="kept")
    run("made", *flags({"enable_group_offload": True}))
    made = {path: path.stat().st_mtime_ns for path in (project.root / "kept").iterdir()}
    assert made
    run("read", *flags({"enable_group_offload": True, "group_offload_type": "leaf_level"}))
    run("plain")
    assert {path: path.stat().st_mtime_ns for path in (project.root / "kept").iterdir()} == made
    for folder in ("made", "read"):
        assert_same_weights(project.root / folder / "ball", project.root / "plain/ball")


def test_a_run_that_is_killed_while_it_spills_can_be_started_again(project, run):
    options = flags({"enable_group_offload": True, "group_offload_to_disk_path": "spill"})
    run("plain")
    for delay_s in (0.0, 0.02, 0.05, 0.1):
        process = project.start("train", *options)
        deadline = time.monotonic() + 60
        while not list(project.root.glob("spill/.*.partial-*/group-*")) and time.monotonic() < deadline:
            if process.poll() is not None or list(project.root.glob("spill/*/index.json")):
                break
        time.sleep(delay_s)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        whole = [path for path in (project.root / "spill").iterdir() if not path.name.startswith(".")]
        assert all((path / "index.json").exists() for path in whole)
    done = project.run("train", *options)
    assert done.returncode == 0, done.stderr
    assert_same_weights(project.root / "plain/ball", project.output)
    assert [path.name[0] != "." for path in (project.root / "spill").iterdir()] == [True]
