"""One adapter in every layout: what is exact stays exact, and what a program reads is what was meant."""

from __future__ import annotations

from itertools import product

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from simpletuner.adapters.files import read_adapter, write_safetensors
from simpletuner.adapters.formats.convert import Weighted, convert, measure, merge
from simpletuner.adapters.formats.fuse import fuse, split
from simpletuner.adapters.formats.layouts import LAYOUTS
from simpletuner.adapters.formats.lowrank import Reduction
from simpletuner.adapters.formats.read import parse_adapter
from simpletuner.adapters.formats.weights import Adapter, LohaWeights, LokrWeights, LoraWeights, ModuleWeights
from simpletuner.adapters.formats.write import fits, to_tensors
from simpletuner.i18n import LANGUAGES, render_problem
from simpletuner.problems import ModelError

from .comfyui import comfyui_deltas

DIM, HIDDEN = 12, 20
SHAPES = {
    "attention.to_q": (DIM, DIM),
    "attention.to_k": (DIM, DIM),
    "attention.to_v": (DIM, DIM),
    "attention.to_out.0": (DIM, DIM),
    "feed_forward.w1": (HIDDEN, DIM),
    "feed_forward.w2": (DIM, HIDDEN),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EXACT_LAYOUTS = [name for name, layout in LAYOUTS.items() if layout.alpha_keys]


def weights(
    kind: str, shape: tuple[int, int], rank: int, alpha: float | None, seed: int, dtype: torch.dtype
) -> ModuleWeights:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    magnitude = draw(rows).abs() if kind.endswith("DoRA") else None
    if kind.startswith("LoRA"):
        return LoraWeights(down=draw(rank, columns), up=draw(rows, rank), alpha=alpha, magnitude=magnitude)
    if kind == "LoHa":
        pairs = [(draw(rows, rank), draw(rank, columns)) for _ in range(2)]
        return LohaWeights(w1=pairs[0], w2=pairs[1], alpha=alpha)
    if kind == "LoKr":
        return LokrWeights(w1=(draw(2, 2),), w2=(draw(rows // 2, rank), draw(rank, columns // 2)), alpha=alpha)
    assert kind == "LoKr full"
    return LokrWeights(w1=(draw(rows // 4, columns // 4),), w2=(draw(4, 4),), alpha=alpha)


def adapter_of(kind: str, rank: int, alpha: float | None, seed: int, dtype: torch.dtype, names=SHAPES) -> Adapter:
    modules = {
        f"layers.{block}.{name}": weights(kind, SHAPES[name], rank, alpha, seed * 1000 + block * 100 + index, dtype)
        for block in range(2)
        for index, name in enumerate(names)
    }
    return Adapter(modules=modules, metadata={})


def reread(adapter: Adapter, layout: str) -> Adapter:
    return split(parse_adapter(to_tensors(adapter, LAYOUTS[layout]), {}, path=layout))


def assert_equal(first: Adapter, second: Adapter) -> None:
    assert first.modules.keys() == second.modules.keys()
    for name, one in first.modules.items():
        other = second.modules[name]
        assert one.kind == other.kind and one.scale == other.scale, name
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(one.tensors, other.tensors, strict=True))
        assert (one.magnitude is None) == (other.magnitude is None)
        assert one.magnitude is None or torch.equal(one.magnitude, other.magnitude)


adapters = st.builds(
    adapter_of,
    st.sampled_from(["LoRA", "LoRA DoRA", "LoHa"]),
    st.integers(1, 5),
    st.sampled_from([None, 0.5, 1.0, 4.0, 6.5, 16.0]),
    st.integers(0, 9),
    st.sampled_from(DTYPES),
)


@settings(max_examples=40, deadline=None)
@given(adapter=adapters, layout=st.sampled_from(EXACT_LAYOUTS))
def test_every_layout_is_read_back_bit_for_bit(adapter, layout):
    assert_equal(adapter, reread(adapter, layout))


@pytest.mark.parametrize(("first", "second"), list(product(LAYOUTS, LAYOUTS)))
@pytest.mark.parametrize("kind", ["LoRA", "LoRA DoRA"])
def test_from_every_layout_to_every_layout_the_updates_are_the_same(first, second, kind):
    adapter = adapter_of(kind, 3, 6.5, 1, torch.float32)
    there = reread(adapter, first)
    back = reread(there, second)
    loss = measure(adapter.modules, back)
    assert loss.largest < 1e-7 * ("diffusers" in (first, second)) + 1e-30
    assert all(
        torch.equal(back.modules[n].magnitude, w.magnitude)
        for n, w in adapter.modules.items()
        if w.magnitude is not None
    )


@settings(max_examples=30, deadline=None)
@given(
    rank=st.integers(1, 6), alpha=st.sampled_from([None, 1.0, 6.5]), dtype=st.sampled_from(DTYPES), zero=st.booleans()
)
def test_split_of_fused_is_the_identity_both_ways(rank, alpha, dtype, zero):
    fused = {"layers.0.attention.qkv": weights("LoRA", (3 * DIM, DIM), rank, alpha, 3, dtype)}
    adapter = Adapter(modules=fused, metadata={})
    parts = split(adapter)
    rows = torch.cat([parts.modules[f"layers.0.attention.to_{n}"].delta(torch.float64) for n in "qkv"])
    assert torch.equal(rows, fused["layers.0.attention.qkv"].delta(torch.float64))
    assert_equal(adapter, fuse(parts))
    own = adapter_of("LoRA", rank, alpha, 4, dtype)
    if zero:  # as an untrained adapter: every up is zero
        own = Adapter(
            modules={n: LoraWeights(down=w.down, up=w.up * 0, alpha=w.alpha) for n, w in own.modules.items()},
            metadata={},
        )
    assert_equal(own, split(fuse(own)))


def test_fusing_follows_the_rules():
    """Downs stacked, ups in a block diagonal, three times the alpha."""
    adapter = adapter_of("LoRA", 2, 5.0, 1, torch.float32, names=("attention.to_q", "attention.to_k", "attention.to_v"))
    fused = fuse(adapter).modules["layers.1.attention.qkv"]
    parts = [adapter.modules[f"layers.1.attention.to_{n}"] for n in "qkv"]
    assert fused.alpha == 15.0 and fused.rank == 6
    assert torch.equal(fused.down, torch.cat([part.down for part in parts]))
    assert torch.equal(fused.up, torch.block_diag(*(part.up for part in parts)))


def test_ranks_and_scales_may_differ_between_q_k_and_v():
    modules = {
        "layers.0.attention.to_q": weights("LoRA", (DIM, DIM), 4, 2.0, 1, torch.float32),
        "layers.0.attention.to_v": weights("LoRA", (DIM, DIM), 2, 7.0, 2, torch.float32),
    }
    adapter = Adapter(modules=modules, metadata={})
    back = reread(adapter, "kohya")
    assert back.modules.keys() == modules.keys()
    assert measure(adapter.modules, back).largest < 1e-6


@pytest.mark.parametrize("layout", ["comfyui", "kohya-split"])
@pytest.mark.parametrize("kind", ["LoKr", "LoKr full", "LoHa"])
def test_lycoris_is_kept_where_the_layout_has_a_place_for_it(kind, layout):
    adapter = adapter_of(kind, 2, 3.0, 1, torch.float32)
    made = convert(adapter, LAYOUTS[layout])
    assert made.loss.largest == 0
    assert_equal(adapter, split(parse_adapter(made.tensors, {}, path="")))


@pytest.mark.parametrize("layout", ["diffusers", "comfyui-fused", "kohya"])
@pytest.mark.parametrize("kind", ["LoKr", "LoKr full", "LoHa"])
def test_lycoris_becomes_lora_with_the_energy_that_was_promised(kind, layout):
    adapter = adapter_of(kind, 2, 3.0, 1, torch.float32)
    made = convert(adapter, LAYOUTS[layout])
    back = split(parse_adapter(made.tensors, {}, path=""))
    for name, wanted in adapter.modules.items():
        delta = wanted.delta(torch.float64)
        error = (back.modules[name].delta(torch.float64) - delta).norm() / delta.norm()
        assert error <= 0.01 + 1e-6  # 0.9999 of the squared norm
        assert error <= made.loss.largest + 1e-7


def test_a_fused_lokr_is_split_exactly_where_its_rows_allow_it():
    generator = torch.Generator().manual_seed(1)
    w1, w2 = torch.randn(6, 3, generator=generator), torch.randn(DIM // 2, DIM // 3, generator=generator)
    lokr = LokrWeights(w1=(w1,), w2=(w2,), alpha=None)
    parts = split(Adapter(modules={"layers.0.attention.qkv": lokr}, metadata={}))
    rows = torch.cat([parts.modules[f"layers.0.attention.to_{n}"].delta() for n in "qkv"])
    assert torch.equal(rows, lokr.delta())


def test_a_fused_lokr_that_cannot_be_split_becomes_lora_by_its_rows():
    generator = torch.Generator().manual_seed(1)
    w1, w2 = torch.randn(4, 3, generator=generator), torch.randn(9, DIM // 3, generator=generator)
    lokr = LokrWeights(w1=(w1,), w2=(w2,), alpha=None)
    adapter = Adapter(modules={"layers.0.attention.qkv": lokr}, metadata={})
    made = convert(adapter, LAYOUTS["diffusers"], reduction=Reduction(energy=1.0))
    back = split(parse_adapter(made.tensors, {}, path=""))
    rows = torch.cat([back.modules[f"layers.0.attention.to_{n}"].delta() for n in "qkv"])
    assert torch.allclose(rows, lokr.delta(), atol=1e-5)
    assert made.loss.largest < 1e-5
    assert next(iter(convert(adapter, LAYOUTS["comfyui"]).tensors)).startswith(
        "diffusion_model.layers.0.attention.qkv.lokr"
    )


@pytest.mark.parametrize("kind", ["LoRA", "LoHa", "LoKr"])
@pytest.mark.parametrize("layout", ["comfyui", "diffusers", "comfyui-fused", "kohya"])
def test_comfyui_computes_the_same_updates(kind, layout):
    """By its own rules, with no key left over."""
    adapter = adapter_of(kind, 2, 3.0, 1, torch.float32)
    reduction = None if all(fits(n, w, LAYOUTS[layout]) for n, w in adapter.modules.items()) else Reduction(energy=1.0)
    made = convert(adapter, LAYOUTS[layout], reduction=reduction)
    deltas, unused = comfyui_deltas(made.tensors, dim=DIM)
    assert not unused
    for block in range(2):
        rows = [adapter.modules[f"layers.{block}.attention.to_{n}"].delta() for n in "qkv"]
        assert torch.allclose(deltas[f"layers.{block}.attention.qkv"], torch.cat(rows), atol=1e-5)
        for native, own in (("attention.out", "attention.to_out.0"), ("feed_forward.w1", "feed_forward.w1")):
            expected = adapter.modules[f"layers.{block}.{own}"].delta()
            assert torch.allclose(deltas[f"layers.{block}.{native}"], expected, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(
    first=st.sampled_from(["LoRA", "LoHa", "LoKr"]),
    strengths=st.tuples(st.sampled_from([0.8, -1.5, 0.0, 2.0]), st.sampled_from([0.5, 1.0, -0.3])),
    dtype=st.sampled_from(DTYPES),
    rank=st.sampled_from([None, 3]),
)
def test_merged_is_the_sum_of_the_updates_and_the_error_is_the_stated_one(first, strengths, dtype, rank):
    one, other = adapter_of(first, 2, 3.0, 1, dtype), adapter_of("LoRA", 3, 1.0, 2, torch.float32)
    del other.modules["layers.0.feed_forward.w1"]  # type: ignore[attr-defined]
    parts = [Weighted(name=n, adapter=a, strength=s) for n, a, s in zip("ab", (one, other), strengths, strict=True)]
    made = merge(parts, LAYOUTS["comfyui"], reduction=Reduction(rank=rank) if rank else None)
    found = parse_adapter(made.tensors, {}, path="")
    squares, total = 0.0, 0.0
    for name, wanted in one.modules.items():
        expected = wanted.delta(torch.float64) * strengths[0]
        if name in other.modules:
            expected = expected + other.modules[name].delta(torch.float64) * strengths[1]
        error = float((found.modules[name].delta(torch.float64) - expected).norm())
        squares, total = squares + error**2, total + float(expected.norm()) ** 2
        if rank is None and first != "LoKr":
            assert error <= 1e-6 * (1 + expected.norm())
        assert found.modules[name].rank <= (rank or 99)
    assert made.loss.total == pytest.approx((squares / total) ** 0.5, rel=1e-3, abs=1e-6)


def test_a_merged_file_names_its_parts():
    one, other = (
        Adapter(
            modules=adapter_of("LoRA", 2, 2.0, seed, torch.float32).modules,
            metadata={"modelspec.trigger_phrase": words},
        )
        for seed, words in ((1, "sks, cat"), (2, "cat, blue style"))
    )
    parts = [Weighted(name="a", adapter=one, strength=0.8), Weighted(name="b", adapter=other, strength=0.5)]
    metadata = merge(parts, LAYOUTS["comfyui"]).metadata
    assert metadata["modelspec.merged_from"] == "a@0.8, b@0.5"
    assert metadata["modelspec.trigger_phrase"] == "sks, cat, blue style"
    assert metadata["ss_network_dim"] == "4"


def refused(action) -> str:
    with pytest.raises(ModelError) as error:
        action()
    for problem in error.value.problems:
        assert len({render_problem(problem, language)[0] for language in LANGUAGES}) == len(LANGUAGES)
    problem = error.value.problems[0]
    return " | ".join(map(str, (problem.code, *render_problem(problem, "en"))))


def test_dora_and_sizes_that_differ_are_not_merged():
    dora, plain = adapter_of("LoRA DoRA", 2, 2.0, 1, torch.float32), adapter_of("LoRA", 2, 2.0, 1, torch.float32)
    parts = [Weighted(name=n, adapter=a, strength=1.0) for n, a in (("a", plain), ("b", dora))]
    assert "E-MERGE-DORA" in refused(lambda: merge(parts, LAYOUTS["comfyui"]))
    wide = Adapter(
        modules={"layers.0.attention.to_q": weights("LoRA", (DIM, 2 * DIM), 2, 1.0, 1, torch.float32)}, metadata={}
    )
    parts = [Weighted(name=n, adapter=a, strength=1.0) for n, a in (("a", plain), ("b", wide))]
    assert "layers.0.attention.to_q is 12x12, 12x24" in refused(lambda: merge(parts, LAYOUTS["comfyui"]))


@pytest.mark.parametrize("lost", ["lokr_w1", "lokr_w2_a", "lokr_w2_b"])
def test_a_lycoris_file_with_missing_keys_is_refused(tmp_path, lost):
    tensors = to_tensors(adapter_of("LoKr", 2, 3.0, 1, torch.float32), LAYOUTS["comfyui"])
    del tensors[f"diffusion_model.layers.1.attention.to_k.{lost}"]
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    message = refused(lambda: read_adapter(tmp_path / "a.safetensors"))
    assert "diffusion_model.layers.1.attention.to_k has" in message
    assert f"but not {lost}" in message
    assert "a.safetensors lacks keys" in message


PLAIN = {"lora_A.weight": (2, 4), "lora_B.weight": (4, 2)}


@pytest.mark.parametrize(
    ("module", "parts", "words"),
    [
        ("lora_unet_down_blocks_0_attn1_to_q", {"lora_down.weight": (2, 4), "lora_up.weight": (4, 2)}, "OTHER-MODEL"),
        ("transformer_blocks.0.attn.to_q", PLAIN, "E-LORA-OTHER-MODEL"),
        ("layers.0.attention.to_q", {**PLAIN, "lora_B.weight": (4, 3)}, "do not go together"),
        ("layers.0.attention.to_q", {**PLAIN, "dora_scale": (1, 4)}, "do not go together"),
        ("layers.0.attention.to_q", {**PLAIN, "lokr_w1": (2, 2), "lokr_w2": (2, 2)}, "do not go together"),
        ("layers.0.attention.qkv", PLAIN, "do not go together"),
        ("layers.0.attention.to_q", {"weight": (4, 4)}, "holds the weights of a model"),
    ],
)
def test_what_is_no_adapter_of_this_model_is_refused(tmp_path, module, parts, words):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({f"{module}.{part}": torch.zeros(shape) for part, shape in parts.items()}, path)
    assert words in refused(lambda: read_adapter(path))


@pytest.mark.parametrize("second", ["transformer.layers.0.attention.qkv", "transformer.layers.0.attention.to_q"])
def test_a_module_that_is_adapted_twice_is_refused(tmp_path, second):
    tensors = {f"diffusion_model.layers.0.attention.to_q.{part}": torch.zeros(shape) for part, shape in PLAIN.items()}
    shapes = {"lora_A.weight": (2, 4), "lora_B.weight": (12 if "qkv" in second else 4, 2)}
    tensors |= {f"{second}.{part}": torch.zeros(shape) for part, shape in shapes.items()}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    assert "E-LORA-TWICE" in refused(lambda: read_adapter(tmp_path / "a.safetensors"))


def test_a_file_that_is_no_safetensors_is_refused(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"PK\x03\x04 a zip archive")
    assert "is damaged or not a safetensors file" in refused(lambda: read_adapter(tmp_path / "a.safetensors"))


def test_a_written_file_is_read_back(tmp_path):
    adapter = adapter_of("LoKr", 2, 3.0, 1, torch.bfloat16)
    made = convert(adapter, LAYOUTS["comfyui"])
    write_safetensors(tmp_path / "a.safetensors", made.tensors, made.metadata)
    assert_equal(adapter, read_adapter(tmp_path / "a.safetensors"))
