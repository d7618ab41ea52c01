"""`simpletuner estimate`: every example, in both languages, without torch, network, images or model."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from simpletuner.cli import estimate as command
from simpletuner.cli.main import main
from simpletuner.config.search import example_names
from simpletuner.hardware.space import Space
from simpletuner.i18n import LANGUAGES, text
from simpletuner.planner.estimate import Verdict, estimate, judge
from simpletuner.planner.from_config import Machine, find_machine, plan_input
from simpletuner.planner.inputs import Offload
from simpletuner.planner.memory import estimate_memory, streamed_bytes
from simpletuner.planner.records import Measurement, PhasePeak, append_measurement, plan_key, plan_kin
from simpletuner.planner.remedies import remedies

GB = 10**9
SPACE = Space(total_bytes=24 * GB, free_bytes=23 * GB)
CARD = Machine(
    kind="cuda", name="NVIDIA GeForce RTX 4090", device=SPACE, host=Space(total_bytes=64 * GB, free_bytes=None)
)
SMALL = replace(CARD, device=Space(total_bytes=8 * GB, free_bytes=7 * GB))


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", example_names())
def test_every_example_is_estimated(tmp_path, monkeypatch, capsys, name, language):
    monkeypatch.chdir(tmp_path)
    assert main(["estimate", "--example", name, "--lang", language]) == 0
    out = capsys.readouterr().out
    for key in ("estimate.ram", "estimate.disk", "estimate.time", "estimate.source.computed", "estimate.part.weights"):
        assert text(key, language) in out
    assert list(tmp_path.iterdir()) == []


def test_it_answers_at_once_and_without_torch(tmp_path):
    code = (
        "import sys\nfrom simpletuner.cli.main import main\n"
        "code = main(['estimate', '--example', 'z-image-turbo.lora-24gb', '--json'])\n"
        "print(code, sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    begun = time.process_time(), time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
    assert time.monotonic() - begun[1] < 5  # 0.5 s on a machine that does nothing else


def test_as_data(capsys, load_example):
    assert main(["estimate", "--example", "demo", "--json", "--lora_rank=32"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["assumed"]["model"] == "read"
    assert {phase["name"] for phase in found["phases"]} == {"prompts", "latents", "training", "validation"}
    for phase in found["phases"]:
        assert phase["host_bytes"] == sum(part["bytes"] for part in phase["host"])
    assert found["host"]["source"] in ("computed", "corrected", "measured")


@pytest.mark.parametrize("language", LANGUAGES)
def test_help(capsys, language):
    assert main(["estimate", "--help", "--lang", language]) == 0
    assert "--fit 10GB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "low_gb", "high_gb"),
    [("z-image-turbo.lora-24gb", 13, 18), ("z-image-turbo.lora-16gb", 8, 16), ("z-image-turbo.lora-10-12gb", 4, 11)],
)
def test_the_examples_fit_the_cards_they_are_named_after(load_example, name, low_gb, high_gb):
    loaded = load_example(name)
    found = estimate(loaded.config, loaded.datasets, CARD)
    assert low_gb * GB < found.deciding.num_bytes < high_gb * GB
    assert found.time.source == "sheet"
    assert 0.2 < found.time.step_s < 5


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_does_not_fit_is_said_with_what_would_help(monkeypatch, capsys, language):
    monkeypatch.setattr(command, "find_machine", lambda requested: SMALL)
    assert main(["estimate", "--example", "z-image-turbo.lora-24gb", "--lang", language]) == 0
    out = capsys.readouterr().out
    assert "✗" in out
    assert "base_model_precision=int8-torchao" in out
    monkeypatch.setattr(command, "find_machine", lambda requested: replace(CARD, device=None))
    assert main(["estimate", "--example", "z-image-turbo.lora-24gb", "--lang", language]) == 0
    out = capsys.readouterr().out
    assert text("estimate.verdict.unknown", language) in out
    assert text("estimate.device.unknown", language, name=CARD.name) in out


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize(("budget", "verdict"), [("10GB", "fits"), ("2GB", "does_not_fit")])
def test_fit_is_what_it_must_fit_into_whatever_is_here(capsys, language, budget, verdict):
    words = ["--example", "z-image-turbo.lora-16gb", "--device=cuda", "--fit", budget]
    assert main(["estimate", *words, "--lang", language]) == 0
    out = capsys.readouterr().out
    assert text("estimate.device.fit", language, budget="").split(",")[0].strip() in out
    assert text(f"estimate.verdict.{verdict}", language, needed="", free="").split(":")[0] in out


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_is_close_is_said(monkeypatch, capsys, load_example, language):
    loaded = load_example("z-image-turbo.lora-24gb")
    needed = estimate(loaded.config, loaded.datasets, CARD).deciding.num_bytes
    room = Space(total_bytes=needed, free_bytes=round(needed * 1.02))
    monkeypatch.setattr(command, "find_machine", lambda requested: replace(CARD, device=room))
    assert main(["estimate", "--example", "z-image-turbo.lora-24gb", "--lang", language]) == 0
    assert text("estimate.verdict.close", language, needed="", free="").split(":")[0] in capsys.readouterr().out


def test_verdicts():
    assert judge(50, 100) is Verdict.FITS
    assert judge(95, 100) is Verdict.CLOSE
    assert judge(101, 100) is Verdict.DOES_NOT_FIT


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_measured_run_is_taken_at_its_word_and_corrects_its_like(
    tmp_path, monkeypatch, capsys, load_example, language
):
    monkeypatch.setenv("SIMPLETUNER_STATE_DIR", str(tmp_path))
    loaded = load_example("demo")
    machine = find_machine("auto")
    plan = plan_input(loaded.config, loaded.datasets, machine)
    computed = estimate_memory(plan).host_peak
    measured = Measurement(
        key=plan_key(plan, machine.name),
        kin=plan_kin(plan, machine.name),
        device=machine.name,
        phases={
            computed.name: PhasePeak(num_bytes=777_000_000, host_bytes=777_000_000, computed_bytes=700_000_000),
        },
        step_s=0.5,
        step_flops=1e10,
    )
    append_measurement(tmp_path / "measurements.jsonl", measured)
    assert main(["estimate", "--example", "demo", "--lang", language]) == 0
    out = capsys.readouterr().out
    assert "777 MB" in out
    assert text("estimate.source.measured", language) in out
    assert main(["estimate", "--example", "demo", "--lora_rank=32", "--lang", language]) == 0
    out = capsys.readouterr().out
    assert text("estimate.source.corrected", language, n=1) in out
    records = [measured]
    near = estimate(loaded.config, loaded.datasets, machine, records=records)
    assert near.time.source == "measured"
    assert near.time.step_s == 0.5


def test_remedies_save_what_they_say(load_example):
    loaded = load_example("z-image-turbo.lora-24gb", "--gradient_checkpointing=false", "--train_batch_size=2")
    plan = plan_input(loaded.config, loaded.datasets, CARD)
    found = remedies(plan)
    assert found[0].fix.key == "gradient_checkpointing"
    assert {"resolution", "train_batch_size"} <= {remedy.fix.key for remedy in found}
    assert [r.saving_bytes for r in found] == sorted((r.saving_bytes for r in found), reverse=True)
    assert all(remedy.saving_bytes > 0 for remedy in found)


def test_streaming_keeps_two_groups_on_the_device(load_example):
    loaded = load_example("z-image-turbo.lora-24gb")
    plan = plan_input(loaded.config, loaded.datasets, CARD)
    block = plan.sizes.transformer.block_bytes(plan.precision, default_bytes=2)
    assert streamed_bytes(plan) == (0, 0, 0)
    streamed = replace(plan, offload=Offload(blocks=30, group=2, overlap=True))
    assert streamed_bytes(streamed) == (4 * block, 30 * block, 0)
    assert streamed_bytes(replace(plan, offload=Offload(blocks=30, on_disk=True))) == (block, 0, 30 * block)
    saved = (
        estimate_memory(plan).phase("training").device_bytes - estimate_memory(streamed).phase("training").device_bytes
    )
    assert saved == 26 * block


def test_automatic_recomputation_and_inputs_on_the_host(load_example):
    def training(*words):
        loaded = load_example("z-image-base.lora", *words)
        return estimate_memory(plan_input(loaded.config, loaded.datasets, CARD)).phase("training")

    whole, auto = training(), training("--gradient_checkpointing_interval=auto")
    assert auto == whole
    roomy = training("--gradient_checkpointing_interval=auto", "--gradient_checkpointing_budget=6")
    assert 3 * GB < roomy.device_bytes - whole.device_bytes < 6.5 * GB
    moved = training("--gradient_checkpointing_offload=true")
    saved = whole.device_bytes - moved.device_bytes
    assert 0.6 * GB < saved < 1.0 * GB  # gradients come in their place
    assert moved.host_bytes - whole.host_bytes > saved


@pytest.mark.parametrize("place", ["cpu", "accelerator"])
def test_an_average_of_the_weights_is_counted_where_it_is(load_example, place):
    found = []
    for words in ((), ("--use_ema=true", f"--ema_device={place}")):
        loaded = load_example("z-image-turbo.lora-24gb", *words)
        found.append(estimate(loaded.config, loaded.datasets, CARD))
    plain, averaged = found
    size = plain.num_params * 4
    on_device, on_host = (size, 0) if place == "accelerator" else (0, size)
    for name, device, host in (("training", on_device, on_host), ("validation", on_device + size, on_host)):
        before, after = plain.memory.phase(name), averaged.memory.phase(name)
        assert after.device_bytes - before.device_bytes == device
        assert after.host_bytes - before.host_bytes == host
    assert averaged.disk["result"] - plain.disk["result"] == size


def test_the_assistant_counts_with_its_own_rank_and_where_it_is(tmp_path, load_example):
    path = tmp_path / "assistant.safetensors"

    def adapter_bytes(rank, mode, phase):
        header = {"layers.0.attention.to_q.lora_A.weight": {"dtype": "F32", "shape": [rank, 8], "data_offsets": [0, 0]}}
        raw = json.dumps(header).encode()
        path.write_bytes(len(raw).to_bytes(8, "little") + raw)
        words = ("--assistant_lora_path", str(path), "--assistant_lora_mode", mode)
        loaded = load_example("z-image-turbo.lora-24gb", *words)
        found = estimate_memory(plan_input(loaded.config, loaded.datasets, CARD)).phase(phase)
        return next(part.num_bytes for part in found.device if part.name == "adapter")

    own = adapter_bytes(8, "merged", "training")
    one, two = adapter_bytes(8, "live", "training") - own, adapter_bytes(16, "live", "training") - own
    assert 0 < one == two - one
    assert adapter_bytes(16, "merged", "training") == own
    assert adapter_bytes(16, "merged", "validation") == own + two
