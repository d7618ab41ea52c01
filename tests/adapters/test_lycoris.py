"""LyCORIS on the transformer: what is chosen, trained, saved, and read back here, in lycoris-lora and in diffusers."""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from simpletuner.adapters.files import LORA_FILE_NAME
from simpletuner.adapters.lora import LoraSettings, activate_, apply_lora, disabled, set_scale, trainable_parameters
from simpletuner.adapters.lycoris import (
    LYCORIS_CONFIG_NAME,
    LycorisFile,
    apply_lycoris,
    attach_lycoris,
    is_lycoris,
    load_lycoris,
    load_lycoris_,
    lycoris_layers,
    lycoris_state,
    save_lycoris,
    set_lycoris_,
)
from simpletuner.adapters.targets import linear_names
from simpletuner.catalog.lycoris import CLASSES, LycorisSettings, Update, chosen_updates
from simpletuner.i18n import LANGUAGES, render_problem
from simpletuner.memory.checkpointing import apply_checkpointing
from simpletuner.models.z_image.transformer import KEPT_PRODUCTS, ZImageTransformer, ZImageTransformerConfig
from simpletuner.problems import ConfigError, ModelError

from .conftest import TINY, randomise_, tiny_transformer
from .test_files import diffusers_log, diffusers_pipeline  # noqa: F401 - fixtures

LOKR = LycorisSettings(update=Update(algo="lokr", dim=10000, factor=4, full_matrix=True))
LOW = LycorisSettings(update=Update(algo="lokr", dim=2, alpha=1.0, factor=4))
EVERY = {
    "lokr": LOKR,
    "lokr-low": LOW,
    "loha": LycorisSettings(update=Update(algo="loha", dim=2)),
    "lora": LycorisSettings(update=Update(algo="lora", dim=2)),
    "glora": LycorisSettings(update=Update(algo="glora", dim=2)),
    "ia3": LycorisSettings(update=Update(algo="ia3")),
    "diag-oft": LycorisSettings(update=Update(algo="diag-oft", dim=4)),
    "boft": LycorisSettings(update=Update(algo="boft", dim=6)),
    "full": LycorisSettings(update=Update(algo="full")),
}


def adapted(settings: LycorisSettings, **options: object) -> nn.Module:
    model = tiny_transformer()
    apply_lycoris(model, settings, **{"seed": 7, **options})
    return model


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def close(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(first, second, strict=True))


def problem_of(error: pytest.ExceptionInfo[ModelError] | pytest.ExceptionInfo[ConfigError]) -> str:
    for language in LANGUAGES:
        for problem in error.value.problems:
            assert all(render_problem(problem, language))
    (problem, *_) = error.value.problems
    return " | ".join(str(part) for part in (problem.code, *render_problem(problem, "en")))


def test_the_table_of_classes_is_the_models(transformer):
    linears = linear_names(transformer)
    for known, parts in CLASSES.items():
        ours = "Block" if known == "ZImageTransformerBlock" else known
        owners = [name for name, module in transformer.named_modules() if type(module).__name__ == ours]
        inside = {n for n in linears if any(n == owner or n.startswith(f"{owner}.") for owner in owners)}
        assert inside == {name for name in linears if any(part in f".{name}" for part in parts)}, known


@pytest.mark.parametrize("names", [{}, {"exclude_name": ["layers.0.*"], "use_fnmatch": True}])
def test_it_chooses_what_the_library_chooses(names):
    lycoris = pytest.importorskip("lycoris")
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    overrides = {"Attention": {"factor": 4}, "FeedForward": {"factor": 2}}
    preset = {"target_module": ["Attention", "FeedForward"], "module_algo_map": overrides, **names}
    before = dict(vars(lycoris.LycorisNetwork))
    try:
        lycoris.LycorisNetwork.apply_preset(preset)
        network = lycoris.wrapper.LycorisNetwork(
            tiny_transformer(), lora_dim=10000, alpha=1, network_module="lokr", full_matrix=True
        )
    finally:  # its presets are the class's own state
        for key in ("TARGET_REPLACE_MODULE", "MODULE_ALGO_MAP", "TARGET_EXCLUDE_NAME", "USE_FNMATCH"):
            setattr(lycoris.LycorisNetwork, key, before[key])
    theirs = {
        lora.lora_name: {key: tuple(t.shape) for key, t in lora.state_dict().items() if key != "alpha"}
        for lora in network.loras
    }
    settings = LycorisSettings(
        update=LOKR.update,
        by_class={name: replace(LOKR.update, **change) for name, change in overrides.items()},
        excluded=tuple(names.get("exclude_name", ())),
        wildcards=bool(names),
    )
    ours = {
        "lycoris_" + name.replace(".", "_"): {key: tuple(t.shape) for key, t in layer.tensors.items()}
        for name, layer in lycoris_layers(adapted(settings))
    }
    assert len(ours) == (28 if not names else 21)
    assert ours == theirs


def test_the_most_special_wins():
    one, two, three = (Update(algo="lora", dim=dim) for dim in (1, 2, 3))
    settings = LycorisSettings(
        update=one, names=("t_embedder.mlp.0",), by_class={"Attention": two}, by_name={"layers.0.attention.to_q": three}
    )
    layers = ("t_embedder.mlp.0", "t_embedder.mlp.2", "layers.0.attention.to_q", "layers.1.attention.to_q")
    assert chosen_updates(settings, layers) == {layers[0]: one, layers[2]: three, layers[3]: two}


@pytest.mark.parametrize("name", EVERY)
def test_it_starts_as_the_base_and_can_be_switched_off_bit_for_bit(name, predict):
    base = tiny_transformer()
    before = predict(base)
    model = adapted(EVERY[name])
    assert close(predict(model), before)
    assert len(trainable_parameters(model)) == len(lycoris_state(model))
    randomise_(model)
    changed = predict(model)
    assert not close(changed, before)
    with disabled(model):
        assert equal(predict(model), before)
    set_scale(model, 0.0)
    assert close(predict(model), before)
    set_scale(model, 1.0)
    assert equal(predict(model), changed)


@pytest.mark.parametrize("name", EVERY)
def test_recomputed_blocks_have_the_same_gradients_bit_for_bit(name, predict):
    found = []
    for recomputes in (False, True):
        model = adapted(EVERY[name])
        randomise_(model)
        if recomputes:
            apply_checkpointing(model.layers, every=1, products=KEPT_PRODUCTS)
            for stack in (model.noise_refiner, model.context_refiner):
                assert apply_checkpointing(stack, every=1, ends_pass=False) == len(stack)
        sum(out.square().mean() for out in predict(model)).backward()
        found.append([p.grad for p in trainable_parameters(model)])
    assert equal(*found)


@pytest.mark.parametrize("name", EVERY)
def test_a_few_updates_lower_the_loss(name, predict):
    model = adapted(EVERY[name])
    wanted = [torch.randn(out.shape, generator=torch.Generator().manual_seed(3)) for out in predict(model)]
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=0.02)
    losses = []
    for _ in range(12):
        loss = sum((a - b).square().mean() for a, b in zip(predict(model), wanted, strict=True))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.97 * losses[0]


def test_the_start_depends_on_the_seed_and_the_name_alone():
    first, second = adapted(LOKR), adapted(replace(LOKR, classes=("Attention",)))
    other = adapted(LOKR, seed=8)
    key = "layers.0.attention.to_q.lokr_w1"
    assert torch.equal(lycoris_state(first)[key], lycoris_state(second)[key])
    assert not torch.equal(lycoris_state(first)[key], lycoris_state(other)[key])


@pytest.mark.parametrize("settings", [LOKR, LOW, LycorisSettings(update=replace(LOW.update, decompose_both=True))])
def test_a_random_start_has_the_norm_that_was_asked_for(settings):
    model = adapted(settings, first_norm=0.01)
    for _, layer in lycoris_layers(model):
        unit = torch.eye(layer.in_features)
        added = (layer(unit) - layer.base_layer(unit)).t()
        share = added.norm() / layer.base_layer.weight.norm()
        assert share.item() == pytest.approx(0.01, rel=0.02)


def save(model: nn.Module, folder: Path) -> Path:
    path = folder / LORA_FILE_NAME
    save_lycoris(path, model, config=json.dumps({"algo": "lokr"}), metadata={"global_step": "3"})
    return path


@pytest.mark.parametrize("prefix", ["diffusion_model.", "transformer.", "lycoris_"])
@pytest.mark.parametrize("name", EVERY)
def test_a_file_comes_back_bit_for_bit_from_every_spelling(tmp_path, name, prefix):
    model, other = adapted(EVERY[name]), adapted(EVERY[name], seed=8)
    randomise_(model)
    path = save(model, tmp_path)
    assert json.loads((tmp_path / LYCORIS_CONFIG_NAME).read_text()) == {"algo": "lokr"}
    entries = {}
    modules = sorted((module for module, _ in lycoris_layers(model)), key=len, reverse=True)
    for key, tensor in safetensors.torch.load_file(path).items():
        own = key.removeprefix("diffusion_model.")
        module = next(m for m in modules if own.startswith(m + "."))
        entry = own.removeprefix(module + ".")
        entries[f"{prefix}{module.replace('.', '_') if prefix == 'lycoris_' else module}.{entry}"] = tensor
    safetensors.torch.save_file(entries, path)
    load_lycoris_(other, load_lycoris(path, linear_names(other)))
    ours, theirs = lycoris_state(model), lycoris_state(other)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", [name for name in EVERY if name not in ("full", "ia3")])  # it cannot read its own ia3
def test_the_library_reads_the_file_and_predicts_the_same(tmp_path, name, predict):
    lycoris = pytest.importorskip("lycoris")
    model = adapted(EVERY[name])
    randomise_(model)
    path = save(model, tmp_path)
    contents = {}
    for key, tensor in safetensors.torch.load_file(path).items():
        own = key.removeprefix("diffusion_model.")
        module = max((m for m, _ in lycoris_layers(model) if own.startswith(m + ".")), key=len)
        contents[f"lycoris_{module.replace('.', '_')}{own.removeprefix(module)}"] = tensor
    other = tiny_transformer()
    network, _ = lycoris.create_lycoris_from_weights(1.0, "", other, weights_sd=contents)
    assert len(network.loras) == len(list(lycoris_layers(model)))
    network.apply_to()
    assert close(predict(model), predict(other))


@pytest.mark.parametrize("settings", [LOKR, LOW], ids=["whole", "low rank"])
def test_diffusers_reads_a_lokr_and_predicts_the_same(
    tmp_path,
    diffusers_pipeline,  # noqa: F811
    diffusers_log,  # noqa: F811
    predict,
    settings,
):
    model = adapted(settings)
    randomise_(model)
    pipe = diffusers_pipeline
    save(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.load_lora_weights(tmp_path, adapter_name="style")
    try:
        said = [r.getMessage() for r in diffusers_log.records if r.levelno >= logging.WARNING]
        assert not said, said  # it warns of missing and of unexpected keys
        latents, prompts, t_B = predict.inputs
        theirs = pipe.transformer([x[:, None] for x in latents], t_B, prompts, return_dict=False)[0]
        for ours, other in zip(predict(model), theirs, strict=True):
            assert torch.allclose(ours, other[:, 0], rtol=1e-3, atol=1e-4)
    finally:
        pipe.unload_lora_weights()


def test_beside_another_adapter_only_it_is_trained_and_switched_off(predict):
    model = tiny_transformer()
    apply_lora(model, LoraSettings(rank=2, alpha=2, targets=("to_q",)), adapter_name="assistant")
    randomise_(model)
    with_assistant = predict(model)
    apply_lycoris(model, LOKR, seed=7)
    assert len(trainable_parameters(model)) == len(lycoris_state(model)) == 2 * 28
    assert "layers.0.attention.to_q" in linear_names(model)
    activate_(model, ("assistant", "default"))
    assert close(predict(model), with_assistant)
    randomise_(model, seed=5)
    assert not close(predict(model), with_assistant)
    with disabled(model):
        assert equal(predict(model), with_assistant)


@pytest.mark.parametrize("name", EVERY)
def test_a_file_is_attached_to_another_model_by_what_it_says(tmp_path, name, predict):
    """Beside a LoRA, twice over: each acts, and values of another checkpoint take the place of the first."""
    trained, later = adapted(EVERY[name]), adapted(EVERY[name], seed=8)
    randomise_(trained)
    randomise_(later, seed=3)
    paths = []
    for index, model in enumerate((trained, later)):
        (tmp_path / str(index)).mkdir()
        paths.append(save(model, tmp_path / str(index)))
    assert all(is_lycoris(path) == (name != "lora") for path in paths)
    other = tiny_transformer()
    files = [load_lycoris(path, linear_names(other)) for path in paths]
    modules = attach_lycoris(other, files[0], dtype=torch.float32, adapter_name="one", path="/lora")
    assert len(modules) == 28 and not trainable_parameters(other)
    assert equal(predict(other), predict(trained))
    set_lycoris_(other, files[1], "one")
    assert equal(predict(other), predict(later))
    before = predict(other)
    attach_lycoris(other, files[0], dtype=torch.float32, adapter_name="two", path="/lora")
    apply_lora(other, LoraSettings(rank=2, alpha=2, targets=("to_q",)), adapter_name="three")
    activate_(other, ("one", "two", "three"))
    assert not close(predict(other), before)
    set_scale(other, 0.0, "two")
    assert close(predict(other), before)
    set_lycoris_(other, files[1], "two")
    set_scale(other, 0.0, "one")
    set_scale(other, 1.0, "two")
    assert close(predict(other), before)


def test_a_file_for_another_model_is_not_attached(tmp_path):
    path = save(adapted(LOKR), tmp_path)
    larger = ZImageTransformer(ZImageTransformerConfig(**{**TINY, "dim": 96, "axes_dims": (16, 16, 16)}))
    file = load_lycoris(path, linear_names(larger))
    with pytest.raises(ModelError) as error:
        attach_lycoris(larger, file, dtype=torch.float32, adapter_name="one", path="/lora")
    assert "E-LYCORIS-SHAPE" in problem_of(error) and "[48, 48]" in problem_of(error)
    file = load_lycoris(path, linear_names(larger))
    torn = LycorisFile(modules={"layers.0.attention.to_q": {"lokr_w1": torch.zeros(4, 4)}})
    with pytest.raises(ModelError) as error:
        attach_lycoris(larger, torn, dtype=torch.float32, adapter_name="one", path="/lora")
    assert "layers.0.attention.to_q.lokr_w2_a" in problem_of(error)
    with pytest.raises(ModelError) as error:
        attach_lycoris(nn.Sequential(), file, dtype=torch.float32, adapter_name="one", path="/lora")
    assert "E-LYCORIS-MODULES" in problem_of(error)


def test_a_preset_that_stands_for_nothing_is_named():
    with pytest.raises(ConfigError) as error:
        adapted(replace(LOKR, names=("layers.9.attention.to_q",)))
    assert "E-LYCORIS-TARGET" in problem_of(error) and "layers.9.attention.to_q" in problem_of(error)
    with pytest.raises(ConfigError) as error:
        adapted(LycorisSettings(update=Update(algo="boft", dim=2)))
    assert "E-LYCORIS-SIZE" in problem_of(error) and "feed_forward" in problem_of(error) + "feed_forward"


def test_a_file_that_does_not_fit_is_refused_and_changes_nothing(tmp_path):
    model = adapted(LOKR)
    before = [p.clone() for p in trainable_parameters(model)]
    others = {
        "E-LYCORIS-MODULES": adapted(replace(LOKR, classes=("Attention",))),
        "E-LYCORIS-SHAPE": adapted(replace(LOKR, update=replace(LOKR.update, factor=2))),
    }
    for code, other in others.items():
        with pytest.raises(ModelError) as error:
            load_lycoris_(model, load_lycoris(save(other, tmp_path), linear_names(model)), path="/init_lora")
        assert code in problem_of(error)
        assert equal(before, trainable_parameters(model))
    low, other = adapted(LOW), adapted(replace(LOW, update=replace(LOW.update, alpha=2.0)))
    file = load_lycoris(save(other, tmp_path), linear_names(model))
    with pytest.raises(ModelError) as error:
        load_lycoris_(low, file)
    assert "E-LYCORIS-SCALE" in problem_of(error)
    path = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"x.lora_A.weight": torch.zeros(2)}, path)
    with pytest.raises(ModelError) as error:
        load_lycoris(path, ())
    assert "E-LYCORIS-KIND" in problem_of(error)
    assert TINY["dim"] == 48
