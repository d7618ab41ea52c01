"""Offload as a run sets it up: which layers stream, whether there is room, the text encoder and the VAE."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

import simpletuner
from simpletuner.config.sections.memory import MemorySection
from simpletuner.events.types import ProblemReported, SettingOverridden
from simpletuner.i18n import LANGUAGES, render_problem, text
from simpletuner.memory.module_swap import apply_module_swap
from simpletuner.models.weights import PipelineFiles, resolve_pipeline
from simpletuner.models.z_image.load import load_transformer
from simpletuner.models.z_image.spec import Z_IMAGE
from simpletuner.models.z_image.text import load_prompt_encoder
from simpletuner.models.z_image.vae import codec_pieces, load_latent_codec
from simpletuner.problems import ConfigError
from simpletuner.quant.linear import FrozenLinear
from simpletuner.train import offload
from simpletuner.train.device import Compute
from simpletuner.train.offload import (
    TextEncoderStream,
    announce_offload,
    stream_conversion,
    transformer_offload,
    transformer_stream,
)

DEMO_BASE = Path(simpletuner.__file__).parent / "assets" / "demo_base"
CPU = Compute(device=torch.device("cpu"), weights=torch.float32, autocast=None)
CUDA = torch.device("cuda", 0)
GIB = 1 << 30
Usage = namedtuple("Usage", ("total", "used", "free"))


@pytest.fixture(scope="module")
def files() -> PipelineFiles:
    return resolve_pipeline(str(DEMO_BASE), spec=Z_IMAGE)


class Recorder:
    """Keeps what a run would tell."""

    def __init__(self) -> None:
        self.events: list[object] = []

    def emit(self, event: object) -> None:
        self.events.append(event)

    def codes(self) -> list[str]:
        return [e.problem.code for e in self.events if isinstance(e, ProblemReported)]


def assert_told(problem, *words: str) -> None:
    for language in LANGUAGES:
        said = " ".join(part for part in render_problem(problem, language) if part)
        for word in words:
            assert word in said, (language, word, said)


def test_what_the_options_come_to():
    assert transformer_offload(MemorySection(), CUDA) is None
    group = transformer_offload(MemorySection(enable_group_offload=True, group_offload_use_stream=True), CUDA)
    assert group.ahead and group.groups.blocks_per_group == 1 and group.groups.num_blocks is None
    assert not transformer_offload(MemorySection(enable_group_offload=True), CUDA).ahead
    leaf = MemorySection(enable_group_offload=True, group_offload_type="leaf_level", group_offload_to_disk_path="a")
    assert transformer_offload(leaf, CUDA).groups.blocks_per_group is None
    assert transformer_offload(leaf, CUDA).directory == Path("a")


@pytest.mark.parametrize(
    ("options", "same_as"),
    [
        (
            {"musubi_blocks_to_swap": 10},
            {"enable_group_offload": True, "group_offload_blocks": 10, "group_offload_use_stream": True},
        ),
        (
            {"ramtorch": True},
            {"enable_group_offload": True, "group_offload_type": "leaf_level", "group_offload_use_stream": True},
        ),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_other_names_of_the_same_mechanism(options, same_as, device):
    one, other = (transformer_offload(MemorySection(**o), torch.device(device)) for o in (options, same_as))
    assert one == other
    assert one.ahead == (device == "cuda")


def test_streams_are_switched_off_with_a_notice_where_there_is_no_cuda(files):
    run = Recorder()
    memory = MemorySection(enable_group_offload=True, group_offload_use_stream=True)
    announce_offload(memory, files.transformer, CPU, run)
    (override,) = [event for event in run.events if isinstance(event, SettingOverridden)]
    assert (override.option, override.requested, override.used) == ("group_offload_use_stream", True, False)
    assert "CUDA" in text(override.reason, "en") and "CUDA" in text(override.reason, "es")
    assert run.codes() == ["W-OFFLOAD-CPU", "I-OFFLOAD"]
    for event in run.events[1:]:
        assert_told(event.problem, "GPU" if event.problem.code == "W-OFFLOAD-CPU" else "Offload")


def test_nothing_is_said_without_offload_and_no_warning_where_it_helps(files, tmp_path):
    run = Recorder()
    announce_offload(MemorySection(), files.transformer, CPU, run)
    assert run.events == []
    on_disk = MemorySection(enable_group_offload=True, group_offload_to_disk_path=str(tmp_path))
    announce_offload(on_disk, files.transformer, CPU, run)
    assert run.codes() == ["I-OFFLOAD"]


def test_the_plan_is_what_the_model_takes(files):
    """Bytes foretold from the config alone are those of the blocks that are made."""
    for options in ({}, {"base_model_precision": "int8-torchao"}, {"group_offload_type": "leaf_level"}):
        stream = transformer_stream(MemorySection(enable_group_offload=True, **options), files.transformer, CPU)
        builder = stream.builder()
        conversion = stream_conversion(stream, builder, quantise_on_device=True)
        model = load_transformer(files.transformer, dtype=torch.float32, conversion=conversion)
        streamer = builder.attach(model)
        stored = sum(tensor.nbytes for tensor in builder.stored().values())
        assert stored <= stream.plan.ram_bytes <= 1.02 * stored + 256 * len(builder.stored())
        assert abs(streamer.slot_bytes - stream.plan.num_slots * stream.plan.slot_bytes) < 256 * 14


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("precision", ["no_change", "int8-torchao"])
def test_too_little_main_memory_is_refused_before_loading(files, monkeypatch, tmp_path, precision, on_disk):
    monkeypatch.setattr(offload, "available_ram_bytes", lambda: GIB // 10)
    path = str(tmp_path) if on_disk else None
    options = {"base_model_precision": precision, "group_offload_to_disk_path": path}
    with pytest.raises(ConfigError) as caught:
        announce_offload(MemorySection(enable_group_offload=True, **options), files.transformer, CPU, Recorder())
    (problem,) = caught.value.problems
    assert problem.code == ("E-OFFLOAD-RAM-DISK" if on_disk else "E-OFFLOAD-RAM")
    fix = "group_offload_type" if on_disk else "group_offload_to_disk_path"
    assert_told(problem, "0.1 GB", fix, "base_model_precision")
    assert [f.key for f in problem.fixes] == (["base_model_precision"] if precision == "no_change" else [])


def test_too_small_a_disk_is_refused_before_loading(files, monkeypatch, tmp_path):
    folder = tmp_path / "not" / "made" / "yet"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10, 5, 5 << 20))
    memory = MemorySection(enable_group_offload=True, group_offload_to_disk_path=str(folder))
    with pytest.raises(ConfigError) as caught:
        announce_offload(memory, files.transformer, CPU, Recorder())
    (problem,) = caught.value.problems
    assert problem.code == "E-OFFLOAD-DISK"
    assert_told(problem, str(folder), "0.0 GB", "group_offload_to_disk_path")
    assert not folder.exists()


def test_a_spill_that_is_there_needs_no_more_room(files, monkeypatch, tmp_path):
    memory = MemorySection(enable_group_offload=True, group_offload_to_disk_path=str(tmp_path))
    for _ in range(2):
        stream = transformer_stream(memory, files.transformer, CPU)
        stream.check_room()
        builder = stream.builder()
        conversion = stream_conversion(stream, builder, quantise_on_device=True)
        model = load_transformer(files.transformer, dtype=torch.float32, conversion=conversion)
        builder.attach(model)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10, 5, 5))
    assert builder.ready == builder.names


@pytest.mark.parametrize(
    "change", [{"base_model_precision": "int8-torchao"}, {"group_offload_blocks_per_group": 2}, {"quantize_via": "cpu"}]
)
def test_other_weights_have_another_spill(files, change):
    keys = {
        transformer_stream(MemorySection(enable_group_offload=True, **options), files.transformer, compute).key
        for options in ({}, change)
        for compute in (CPU, Compute(device=CPU.device, weights=torch.bfloat16, autocast=None))
    }
    assert len(keys) == (2 if "quantize_via" in change else 4)  # on a CPU quantize_via says nothing


def test_targets_that_no_layer_has_are_refused(files):
    memory = MemorySection(ramtorch=True, ramtorch_target_modules=("to_x",))
    with pytest.raises(ConfigError) as caught:
        transformer_stream(memory, files.transformer, CPU)
    (problem,) = caught.value.problems
    assert problem.code == "E-OFFLOAD-TARGETS"
    assert_told(problem, "to_x", "to_q", "ramtorch_target_modules")


@pytest.mark.parametrize("precision", ["no_change", "int8-torchao"])
@pytest.mark.parametrize(
    "options",
    [
        {"group_offload_text_encoder": True},
        {"group_offload_text_encoder": True, "group_offload_type": "leaf_level"},
        {"ramtorch_text_encoder": True, "ramtorch_text_encoder_percent": 50},
    ],
)
def test_a_streamed_text_encoder_embeds_as_ever(files, options, precision):
    from simpletuner.quant.build import quantiser

    def load(memory):
        stream = TextEncoderStream(memory, files.text_encoder, CPU)
        encoder = load_prompt_encoder(
            files.text_encoder,
            files.tokenizer_dir,
            dtype=torch.float32,
            quantise=quantiser(precision, torch.float32),
            convert=stream.convert,
        )
        stream.attach(encoder.model)
        return encoder

    prompts = ["a photo of a red ball", ""]
    plain = load(MemorySection(text_encoder_precision=precision))
    streamed = load(MemorySection(text_encoder_precision=precision, **options))
    assert any(isinstance(m, FrozenLinear) and m.before_use for m in streamed.model.modules())
    for one, other in zip(plain.encode(prompts), streamed.encode(prompts), strict=True):
        assert torch.equal(one, other)


def test_a_vae_that_is_moved_piece_by_piece_does_what_it_did(files):
    """On the device only while a piece runs: a piece's tensors are copies within its call, and its own after it."""
    plain, moved = (load_latent_codec(files.vae, dtype=torch.float32) for _ in range(2))
    pieces = codec_pieces(moved)
    homes = {id(piece): [p.data_ptr() for p in piece.parameters()] for piece in pieces}
    covered = {id(p) for piece in pieces for p in piece.parameters()}
    assert covered == {id(p) for p in moved.model.parameters()}
    assert apply_module_swap(pieces, device=torch.device("cpu")) == len(pieces)
    seen = []

    def look(piece, args, out):
        if homes[id(piece)]:
            away = [p.data_ptr() for p in piece.parameters()]
            seen.append(all(here != home for here, home in zip(away, homes[id(piece)], strict=True)))
            others = [p for other in pieces if other is not piece for p in other.parameters()]
            assert [p.data_ptr() for p in others] == [h for o in pieces if o is not piece for h in homes[id(o)]]

    for piece in pieces:
        piece.register_forward_hook(look, prepend=True)
    images = torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = moved.encode(images)
    assert torch.equal(latents, plain.encode(images))
    assert torch.equal(moved.decode(latents), plain.decode(latents))
    assert seen and all(seen)
    assert {id(piece): [p.data_ptr() for p in piece.parameters()] for piece in pieces} == homes
