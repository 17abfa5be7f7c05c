"""What a chunk computes at full size, held against budgets: a kernel or a pass over memory more would show here."""

import pytest

from benchmarks import roofline
from sf_core.sampling.config import Sampling
from sf_core.wan.config import WAN_1_3B


@pytest.fixture(scope="module")
def forwards():
    plans = {window: roofline.plan_of(window, 832, 480, Sampling(window=window)) for window in (12, 21)}
    return {window: roofline.forward_counts(WAN_1_3B, plan) for window, plan in plans.items()}


def test_products_and_attention_are_what_the_shapes_say(forwards):
    tokens, c = 3 * 30 * 52, WAN_1_3B
    linear = c.layers * (6 * c.dim**2 + 2 * c.dim * c.ffn_dim)  # q, k, v, o, and q, o of cross-attention; feed-forward
    for window, counts in forwards.items():
        attended = window * 30 * 52 + c.text_len
        assert counts.flops["attention"] == 4 * c.layers * tokens * attended * c.dim
        assert counts.flops["product"] == pytest.approx(2 * tokens * linear, rel=1e-3)
    assert forwards[12].bytes == forwards[21].bytes, "nothing but attention grows with the window"


def test_a_forward_stays_within_its_budget(forwards):
    assert forwards[21].kernels <= 1050 and forwards[21].bytes <= 26.5e9


@pytest.mark.parametrize(
    "name, kernels, gigabytes, teraflops", (("Wan VAE", 570, 78.5, 40.5), ("TAEHV", 305, 6.9, 1.64))
)
def test_decoding_stays_within_its_budget(name, kernels, gigabytes, teraflops):
    counts = roofline.decoder_counts(name, roofline.plan_of(3, 832, 480))
    assert counts.kernels <= kernels and counts.bytes <= gigabytes * 1e9
    assert counts.flops["convolution"] == pytest.approx(teraflops * 1e12, rel=0.01)


def test_speed_goes_by_the_slower_of_work_and_launches():
    gpu = roofline.Gpu(product=100, attention=50, convolution=20, memory=1.0, launch=1e-6)
    work = {"product": 1e12, "attention": 1e12, "convolution": 1e12}
    assert gpu.seconds(roofline.Counts(10, work, 1e9)) == pytest.approx(0.01 + 0.02 + 0.05 + 0.001)
    assert gpu.seconds(roofline.Counts(1_000_000, work, 1e9)) == pytest.approx(1.0)
