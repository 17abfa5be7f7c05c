"""Linear layers in float8: how far they are off, what they leave alone, what they weigh."""

import copy

import pytest
import torch

from sf_core.wan.fp8 import E4M3, Fp8Linear, multiplies_float8, quantise_model, quantise_rows
from tests.core.goldens import model
from tests.core.test_rollout import PROMPT, WAN, roll


def error(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


def test_rows_keep_their_own_range():
    x = torch.randn(3, 64) * torch.tensor([[1e-4], [1.0], [1e4]])
    numbers, scale = quantise_rows(x)
    assert numbers.dtype == E4M3
    back = numbers.float() * scale
    for row, expected in zip(back, x):
        assert error(row, expected) < 0.04
    torch.testing.assert_close(back.abs().amax(1), x.abs().amax(1), rtol=1e-6, atol=0)


def test_zeros_stay_zeros():
    numbers, scale = quantise_rows(torch.zeros(2, 16))
    assert (numbers.float() * scale == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("product", [Fp8Linear._product, Fp8Linear._product_in_float8])
def test_a_product_is_near_the_exact_one(product, dtype):
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(128, 96, bias=False), torch.randn(2, 40, 128)
    got = product(Fp8Linear.of(linear), x.to(dtype))
    assert got.shape == (2, 40, 96) and got.dtype == dtype
    assert 0 < error(got.float(), linear(x)) < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matrix_units_are_asked_for_bfloat16_whatever_the_activations_are(monkeypatch, dtype):
    asked, multiply = [], torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", lambda *a, **k: asked.append(k["out_dtype"]) or multiply(*a, **k))
    y = Fp8Linear.of(torch.nn.Linear(32, 16))._product_in_float8(torch.randn(4, 32, dtype=dtype))
    assert asked == [torch.bfloat16] and y.dtype == dtype


@pytest.mark.parametrize("platform, capability, able", [
    ("linux", (8, 9), True), ("linux", (9, 0), True), ("linux", (8, 6), False), ("win32", (9, 0), False),
])  # fmt: skip
def test_which_devices_multiply_float8(monkeypatch, platform, capability, able):
    properties = type("Properties", (), dict(zip(("major", "minor"), capability)))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr("sys.platform", platform)
    assert multiplies_float8(torch.device("cuda")) is able
    assert not multiplies_float8(torch.device("cpu"))


def test_blocks_are_quantised_and_what_touches_latents_is_not():
    wan = quantise_model(model())
    inside = [module for module in wan.blocks.modules() if isinstance(module, (torch.nn.Linear, Fp8Linear))]
    assert len(inside) == 2 * 10 and all(isinstance(module, Fp8Linear) for module in inside)
    outside = (wan.head, wan.text_embedding, wan.time_embedding, wan.time_projection, wan.patch_embedding)
    assert not any(isinstance(module, Fp8Linear) for part in outside for module in part.modules())


def test_a_video_from_float8_weights_is_near_the_exact_one():
    exact, near = roll(9), roll(9, wan=quantise_model(copy.deepcopy(WAN)))
    assert 0 < error(near, exact) < 0.1


def test_block_weights_take_a_quarter_of_float32():
    wan = model().blocks
    before = sum(p.nbytes for p in wan.parameters())
    quantise_model(type("Wan", (), {"blocks": wan}))
    after = sum(t.nbytes for t in (*wan.parameters(), *wan.buffers()))
    assert after < 0.3 * before


def test_prompts_are_read_with_float8_layers_too():
    wan = quantise_model(copy.deepcopy(WAN))
    assert roll(3, wan=wan, prompt=PROMPT.bfloat16(), dtype=torch.float32).isfinite().all()
