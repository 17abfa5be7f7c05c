"""Blocks that wait in memory: the same frames, and never more than two blocks on the device."""

import weakref

import torch

from sf_core import tiny
from sf_core.memory import TAEHV, MemoryPlan
from sf_core.pipeline import Generation
from sf_core.sampling.config import PRESETS
from sf_core.sampling.families import FAMILIES
from sf_core.sampling.plan import Plan
from sf_core.sampling.prompts import PromptSchedule
from sf_core.wan.config import WanConfig
from sf_core.wan.fp8 import quantise_model
from sf_core.wan.model import EAGER, Network
from sf_core.wan.offload import BlockLoader

KREA = WanConfig(dim=5120, ffn_dim=13824, heads=40, layers=40)


def latents(wan, ops=EAGER):
    embeds = tiny.load_text_encoder().encode(["a red circle moves right"])
    plan = Plan(PRESETS["tiny"], 6, 4, 4)
    return Generation(Network(wan, ops=ops), plan, PromptSchedule.of(embeds)).latents()


def test_offloaded_blocks_compute_the_same_frames():
    wan = tiny.load_transformer()
    expected = latents(wan)
    assert torch.equal(latents(wan, EAGER._replace(call=BlockLoader(wan, torch.device("cpu")))), expected)
    assert torch.equal(latents(wan), expected)  # the weights are back in their places


def test_float8_blocks_are_offloaded_too():
    wan = quantise_model(tiny.load_transformer())
    expected = latents(wan)
    assert torch.equal(latents(wan, EAGER._replace(call=BlockLoader(wan, torch.device("cpu")))), expected)


def test_two_blocks_at_most_are_on_the_device():
    wan, alive, most = tiny.load_transformer(), [], 0
    loader = BlockLoader(wan, torch.device("cpu"))
    send = loader._send

    def watch(number):
        nonlocal most
        copies = send(number)
        alive.append(weakref.ref(copies[0]))
        most = max(most, sum(ref() is not None for ref in alive))
        return copies

    loader._send = watch
    latents(wan, EAGER._replace(call=loader))
    assert len(alive) > len(wan.blocks) and most == 2


def test_a_14b_model_fits_small_cards_by_its_plan():
    plan = Plan(FAMILIES["krea-14b"].sampling, 21, 60, 104)
    every = 2 * 14_288_491_584
    full = MemoryPlan(KREA, plan, torch.bfloat16, every, TAEHV, rereads=True)
    assert full.total > 2**35
    offloaded = MemoryPlan(KREA, plan, torch.bfloat16, every, TAEHV, rereads=True, offload=True)
    assert offloaded.use.weights < every / 10 and offloaded.use.cache == full.use.cache
