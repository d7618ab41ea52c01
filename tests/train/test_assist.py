"""The assistant on the demo base: training sees it and images do not, merged or live, plain or quantised."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from simpletuner.adapters.assistant import ASSISTANT_NAME
from simpletuner.adapters.files import LoraInfo, save_lora
from simpletuner.adapters.layer import LoraLinear
from simpletuner.adapters.lora import adapter_state, disabled, trainable_parameters
from simpletuner.config.paths import PACKAGE_DIR
from simpletuner.config.root import Config
from simpletuner.events.progress import SinkReporter
from simpletuner.models.weights import resolve_pipeline
from simpletuner.models.z_image.load import empty_transformer
from simpletuner.models.z_image.spec import Z_IMAGE
from simpletuner.problems import ModelError
from simpletuner.quant.linear import FrozenLinear
from simpletuner.train.assist import read_assistant
from simpletuner.train.build import build_training, trained_weights
from simpletuner.train.device import Compute

COMPUTE = Compute(device=torch.device("cpu"), weights=torch.float32, autocast=None)
TARGETS = (
    "layers.0.attention.to_q",
    "layers.1.attention.to_out.0",
    "layers.2.feed_forward.w1",
    "layers.2.feed_forward.w2",
)


class Prompts:
    """Stands in the place of cached embeddings."""

    def get(self, prompt: str) -> torch.Tensor:
        return torch.randn(7, 192, generator=torch.Generator().manual_seed(len(prompt)))


@pytest.fixture(scope="module")
def files():
    return resolve_pipeline(str(PACKAGE_DIR / "assets" / "demo_base"), spec=Z_IMAGE)


@pytest.fixture(scope="module")
def assistant_file(files, tmp_path_factory):
    """See `write_assistant`."""
    return write_assistant(files, tmp_path_factory.mktemp("assistant") / "assistant.safetensors")


def write_assistant(files, path):
    """Random factors of rank 3 for some layers; large enough to matter, scale 2."""
    model, draws, state = empty_transformer(files.transformer), torch.Generator().manual_seed(3), {}
    for name in TARGETS:
        layer = model.get_submodule(name)
        state[f"{name}.lora_A.weight"] = torch.randn(3, layer.in_features, generator=draws) / layer.in_features**0.5
        state[f"{name}.lora_B.weight"] = torch.randn(layer.out_features, 3, generator=draws) * 0.3
    save_lora(path, state, LoraInfo(rank=3, alpha=6.0))
    return path


def build(files, file=None, *, randomise=False, **options):
    """A training on the demo base with an adapter of its own."""
    config = Config()
    adapter = {"lora_rank": 2, **{k: v for k, v in options.items() if k.startswith("assistant")}}
    memory = {k: v for k, v in options.items() if not k.startswith("assistant")}
    config = config.model_copy(
        update={
            "adapter": config.adapter.model_copy(update=adapter),
            "memory": config.memory.model_copy(update={"mixed_precision": "no", **memory}),
        }
    )
    training = build_training(
        config,
        files=files,
        assistant=read_assistant(config, file, files.transformer),
        prompts=Prompts(),
        trained=trained_weights(config, config_hash=""),
        compute=COMPUTE,
        run=SinkReporter([]),
    )
    if randomise:
        draws = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in trainable_parameters(training.transformer):
                parameter.copy_(torch.randn(parameter.shape, generator=draws) * 0.1)
    return training


@torch.no_grad()
def answer(training, *, inside=nullcontext, contexts=None):
    latent = torch.randn(16, 8, 8, generator=torch.Generator().manual_seed(1))
    with inside():
        context = (contexts or training.contexts).get(["a prompt"])
        return training.velocity([latent], torch.tensor([0.6]), context)[0]


def shown(training, strength=1.0):
    """What a validation image is made of."""
    return answer(training, inside=lambda: training.sampling(strength), contexts=training.sampling_contexts)


@pytest.mark.parametrize("mode", ["live", "merged"])
def test_training_and_regularisation_see_it_and_images_do_not(files, assistant_file, mode):
    plain, helped = build(files, randomise=True), build(files, assistant_file, randomise=True, assistant_lora_mode=mode)
    close = torch.equal if mode == "live" else lambda a, b: torch.allclose(a, b, rtol=0, atol=2e-5 * a.abs().max())
    assert close(shown(plain), shown(helped))
    assert close(shown(plain, 0.0), shown(helped, 0.0))
    difference = (answer(helped) - answer(plain)).abs().max()
    assert difference > 0.05 * answer(plain).abs().max()
    parent = answer(helped, inside=lambda: disabled(helped.transformer))
    without = answer(plain, inside=lambda: disabled(plain.transformer))
    assert (parent - without).abs().max() > 0.05 * without.abs().max()
    assert adapter_state(helped.transformer).keys() == adapter_state(plain.transformer).keys()
    assert len(helped.params) == len(plain.params)


@pytest.mark.parametrize("options", [{}, {"enable_group_offload": True}, {"base_model_precision": "int8-torchao"}])
def test_merged_and_live_train_the_same_to_rounding(files, assistant_file, options):
    live, merged = (
        build(files, assistant_file, randomise=True, assistant_lora_mode=mode, assistant_lora_strength=0.7, **options)
        for mode in ("live", "merged")
    )
    tolerance = 0.05 if options.get("base_model_precision") else 2e-5
    assert torch.allclose(answer(live), answer(merged), rtol=0, atol=tolerance * answer(live).abs().max())
    assert torch.allclose(shown(live), shown(merged), rtol=0, atol=tolerance * shown(live).abs().max())


def test_a_strength_for_images_is_kept(files, assistant_file):
    options = {"assistant_lora_strength": 0.5, "assistant_lora_inference_strength": 0.5}
    for mode in ("live", "merged"):
        helped = build(files, assistant_file, assistant_lora_mode=mode, **options)
        assert torch.allclose(shown(helped), answer(helped), atol=1e-5)


def test_the_program_merges_where_weights_are_quantised(files, assistant_file):
    assert build(files, assistant_file, base_model_precision="int8-torchao").assistant.is_merged
    assert not build(files, assistant_file).assistant.is_merged


@pytest.mark.parametrize(("precision", "step"), [("int8-torchao", 1 / 127), ("int4-torchao", 1 / 7)])
def test_what_images_have_of_a_merged_assistant_is_half_a_step_of_the_format(files, assistant_file, precision, step):
    """The bound: every weight of an image differs from the model's by the rounding of its format at most."""
    plain, helped = build(files), build(files, assistant_file, base_model_precision=precision)
    with helped.sampling(1.0):
        for name in TARGETS:
            layer, original = helped.transformer.get_submodule(name), plain.transformer.get_submodule(name)
            assert isinstance(layer, LoraLinear) and isinstance(layer.base_layer, FrozenLinear)
            down, up = layer.pair(ASSISTANT_NAME)
            assert layer.strengths[ASSISTANT_NAME] == -1.0
            change = layer.scales[ASSISTANT_NAME] * (up @ down)
            in_images = layer.base_layer.unpacked() - change
            largest = (original.weight + change).abs().amax(dim=1, keepdim=True)
            error = (in_images - original.weight).abs()
            assert (error <= 0.51 * step * largest + 1e-6).all(), name
            if precision == "int8-torchao":
                assert change.abs().max() > 4 * error.max()


def test_a_merged_adapter_waits_in_main_memory(files, assistant_file, monkeypatch):
    import simpletuner.train.build as module

    moves = []
    monkeypatch.setattr(module, "move_adapter_", lambda model, device, name: moves.append((str(device), name)))
    helped = build(files, assistant_file, assistant_lora_mode="merged")
    shown(helped)
    assert moves == [("cpu", ASSISTANT_NAME)] * 3  # after loading, to the device (here the CPU too), and back


def test_what_is_kept_on_disk_is_never_taken_for_weights_with_another_assistant(files, assistant_file, tmp_path):
    options = {"base_model_precision": "int8-torchao", "quantized_model_dir": str(tmp_path)}
    first = answer(build(files, assistant_file, **options))
    assert torch.equal(answer(build(files, assistant_file, **options)), first)
    for other in ({"file": None}, {"file": assistant_file, "assistant_lora_strength": 0.5}):
        with pytest.raises(ModelError) as caught:
            build(files, **other, **options)
        assert caught.value.problems[0].code == "E-QUANTISED-DIR"


def test_a_spill_is_never_taken_for_weights_with_another_assistant(files, assistant_file, tmp_path):
    options = {"enable_group_offload": True, "group_offload_to_disk_path": str(tmp_path)}
    merged = {"assistant_lora_mode": "merged", **options}
    first = answer(build(files, assistant_file, **merged))
    assert torch.equal(answer(build(files, assistant_file, **merged)), first)
    assert torch.equal(answer(build(files, **options)), answer(build(files)))
