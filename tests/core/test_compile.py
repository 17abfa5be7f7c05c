"""torch.compile: how often, and what happens without a compiler. No kernels are built: a backend only counts graphs."""

import copy
import logging

import pytest
import torch

from sf_core.sampling.config import Sampling
from sf_core.wan import fp8
from sf_core.wan.compile import compile_ops
from sf_core.wan.model import EAGER
from tests.core.test_rollout import WAN, roll


@pytest.fixture(autouse=True)
def forget_compiled_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counting:
    def __init__(self):
        self.graphs = 0

    def __call__(self, module, inputs):
        self.graphs += 1
        return module


def test_each_part_is_compiled_once_while_the_cache_fills_and_rolls():
    count = Counting()
    sampling = Sampling(window=6, sink=1)
    compiled = roll(21, sampling, ops=compile_ops("default", count))
    assert count.graphs == 2  # before and after attention; one graph for all layers, steps and chunks
    torch.testing.assert_close(compiled, roll(21, sampling), rtol=0, atol=2e-5)


def test_a_chunk_of_another_size_is_compiled_once_more():
    count = Counting()
    roll(20, Sampling(first_chunk=2), ops=compile_ops("default", count))
    assert count.graphs == 4


@pytest.mark.parametrize("units", [False, True], ids=["weights only", "float8 products"])
def test_float8_layers_do_not_break_the_graphs(monkeypatch, units):
    monkeypatch.setattr(fp8, "multiplies_float8", lambda device: units)
    count, wan = Counting(), fp8.quantise_model(copy.deepcopy(WAN))
    compiled = roll(9, wan=wan, ops=compile_ops("default", count))
    assert count.graphs == 2
    torch.testing.assert_close(compiled, roll(9, wan=wan), rtol=0, atol=2e-5)


def test_without_a_compiler_one_warning_and_the_same_video(caplog):
    def broken(module, inputs):
        raise RuntimeError("Cannot find a working triton installation")

    with caplog.at_level(logging.WARNING, "sf_core.compile"):
        video = roll(6, ops=compile_ops("default", broken))
    assert torch.equal(video, roll(6))
    assert len(caplog.records) == 1
    assert "does not work here" in caplog.text and "triton" in caplog.text


def test_nine_sizes_of_chunks_are_all_compiled():
    count = Counting()
    for chunk in range(1, 10):
        roll(chunk, Sampling(chunk=chunk), ops=compile_ops("default", count))
    assert count.graphs == 18
    roll(2, Sampling(chunk=2), ops=compile_ops("default", count))
    assert count.graphs == 18  # what was compiled serves later rollouts


def test_a_rollout_that_cannot_be_compiled_leaves_others_alone():
    calls = []

    def once(module, inputs):
        calls.append(module)
        if len(calls) == 1:
            raise RuntimeError("these layers cannot be traced")
        return module

    for _ in range(2):
        roll(3, ops=compile_ops("default", once))
    assert len(calls) == 3  # before, and then both parts


def test_off_is_eager_and_other_modes_are_refused():
    assert compile_ops("off") is EAGER
    with pytest.raises(ValueError, match="Got compile mode 'fast'"):
        compile_ops("fast")
