"""Linear layers in float8: how far they are off, what they leave alone, what they weigh."""

import copy

import pytest
import torch

from sf_core.wan.fp8 import E4M3, Fp8Linear, _try_product, multiplies_float8, quantise_model, quantise_rows
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


class Cuda:
    """A GPU of which only this is true: its capability, and whether torch has the product."""

    def __init__(self, monkeypatch, capability, works):
        self.tries = 0
        _try_product.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.version, "cuda", "12.8")
        for make in ("zeros", "ones"):
            plain = getattr(torch, make)
            monkeypatch.setattr(torch, make, lambda *size, device=None, plain=plain: plain(*size))
        product = torch._scaled_mm

        def tried(*args, **kwargs):
            self.tries += 1
            if not works:
                raise RuntimeError("Rowwise scaling is only supported on\nsome devices")
            return product(*args, **kwargs)

        monkeypatch.setattr(torch, "_scaled_mm", tried)


@pytest.mark.parametrize("capability, works, able, tries", [
    ((8, 9), True, True, 1), ((9, 0), True, True, 1), ((12, 0), False, False, 1), ((8, 6), True, False, 0),
])  # fmt: skip
def test_a_device_is_tried_once_and_remembered(monkeypatch, caplog, capability, works, able, tries):
    gpu, device = Cuda(monkeypatch, capability, works), torch.device("cuda:3")
    assert [multiplies_float8(device) for _ in range(3)] == [able] * 3 and gpu.tries == tries
    assert [("Rowwise" in record.message, "some" in record.message) for record in caplog.records] == (
        [(True, False)] if tries and not works else []
    )
    assert not multiplies_float8(torch.device("cpu"))
    _try_product.cache_clear()


@pytest.mark.parametrize("knows", (True, False))
def test_where_the_compiler_knows_no_float8_it_is_handed_none(monkeypatch, knows):
    """As on Ampere: the weights are turned back by an operation that the compiler does not look into."""
    graphs = []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    layer, x = Fp8Linear.of(torch.nn.Linear(32, 16)), torch.randn(4, 32)
    monkeypatch.setattr("sf_core.wan.fp8.compiles_float8", torch.compiler.assume_constant_result(lambda device: knows))
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(layer, backend=backend, fullgraph=True)(x), layer(x))
    assert len(graphs) == 1 and any("from_float8" in target for target in graphs[0]) is not knows


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
