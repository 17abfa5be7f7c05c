"""The samplers of newer families against their published code's outputs (tests/golden/families.*).

The repository carries a part of each output; inputs follow from their names. With SELF_FORCING_GOLDENS=DIRECTORY the
full files there are read, whichever there are: each is replayed by what its manifest tells.
"""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sf_core.sampling.config import Sampling
from sf_core.sampling.context import Context
from sf_core.sampling.plan import Plan
from sf_core.sampling.prompts import PromptSchedule, TimedPrompt
from sf_core.sampling.rollout import SAMPLERS
from sf_core.wan.bank import Bank
from sf_core.wan.model import Network
from sf_core.wan.rope import Rope
from tests.core.goldens import CONFIG, FOLDER, HEIGHT, TOKENS, WIDTH, RecordedNoise, frames_second, model
from tests.core.regenerate import normal, prompt
from tests.golden.derive import family_facts, family_part

TOLERANCE = 2e-5
MEMORY = 4  # seed of SGF+'s memory network
FULL = FOLDER / "families"
IS_FULL = FULL.is_dir()
FACTS = (
    family_facts(json.loads((FULL / "manifest.json").read_text()))
    if IS_FULL
    else json.loads((FOLDER / "families.json").read_text())
)
PARTS = {} if IS_FULL else load_file(FOLDER / "families.safetensors")
GOOD = [case for case, facts in FACTS.items() if not facts.get("do_not_reproduce")]


def expected_of(case: str) -> dict[str, Tensor]:
    """What the published code gave: whole tensors, or the part that is kept (`family_part`)."""
    if IS_FULL:
        return load_file(FULL / f"{case}.safetensors")
    return {name.removeprefix(f"{case}."): t for name, t in PARTS.items() if name.startswith(f"{case}.")}


def close(name: str, got: Tensor, expected: Tensor) -> None:
    got = got if IS_FULL else family_part(name, got)
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE, msg=lambda text: f"{name}: {text}")


# --- Inputs ----------------------------------------------------------------------------------------------------------


def size_of(case: str) -> tuple[int, int]:
    told = FACTS[case]["case"]
    return told.get("B", 1), told["frames"]


def label(case: str) -> str:
    return "g9." + case.split("_", 1)[1]


def draws_of(case: str) -> list[Tensor]:
    """Renoise draws [B, C, frames, H, W] in call order; of the rolling ones the published code uses a part."""
    batch, frames = size_of(case)
    used = FACTS[case].get("draws")
    if used is None:
        chunk = sampling_of(case).chunk
        used = [[chunk, 0, chunk]] * (frames // chunk * (len(FACTS[case]["steps"]) - 1))
    draws = []
    for i, (count, low, high) in enumerate(used):
        whole = normal(f"{label(case)}:randn_like:{i}", (batch * count, CONFIG.channels, HEIGHT, WIDTH))
        draws.append(frames_second(whole.unflatten(0, (batch, count)))[:, :, low:high])
    return draws


def prompts_of(case: str) -> PromptSchedule:
    told, (batch, _) = FACTS[case]["case"], size_of(case)
    shape = (batch, CONFIG.text_len, CONFIG.text_dim)
    if not case.startswith("memflow"):
        return PromptSchedule.of(prompt(f"{label(case)} prompt ", shape))
    starts = [0, *told.get("switch", [])]
    embeds = [prompt(f"{label(case)} prompt {i}.", shape) for i in range(len(starts))]
    return PromptSchedule(tuple(TimedPrompt(start, e, "recache") for start, e in zip(starts, embeds)))


def sampling_of(case: str) -> Sampling:
    facts = FACTS[case]
    steps = {4: (1000, 750, 500, 250), 5: (1000, 800, 600, 400, 200)}[len(facts["steps"])]
    common = {"steps": steps, "chunk": facts["chunk"], "window": facts["window_frames"]}
    if case.startswith("rolling"):
        return Sampling(**common, sink=3, pinned=True, sampler="rolling", context_noise=facts["case"].get("ctx", 0))
    common |= {"sink": facts["sink_frames"]}
    if case.startswith("reward"):
        return Sampling(**common, pinned=True, sink_decay=facts["decay"])
    if case.startswith("sgf"):
        contiguous = facts["position_mode"] == "contiguous"
        return Sampling(**common, pinned=True, position_range=None if contiguous else facts["train_frames"])
    plain = facts["pipeline"] == "plain"
    selected = 3 if facts["SMA"] else None
    bank = Bank(facts["bank_frames"], facts["record_interval"], plain, selected, repeats=not plain)
    return Sampling(**common, bank=bank)


@torch.inference_mode()
def replay(case: str, sampling: Sampling, after_chunk=lambda context: None) -> tuple[Tensor, Context]:
    """Latents [B, F, C, H, W] of a recorded case, and the context in the end, its last chunk in the cache."""
    batch, frames = size_of(case)
    first = frames_second(normal(f"input:{label(case)}.noise", (batch, frames, CONFIG.channels, HEIGHT, WIDTH)))
    noise = RecordedNoise(first, draws_of(case))
    plan = Plan(sampling, frames, HEIGHT, WIDTH, batch)
    context = Context(Network(model(), memory=model(MEMORY) if "plus" in case else None), plan, prompts_of(case))
    made = []
    for chunk in plan.chunks:
        context.enter(chunk)
        made.append(SAMPLERS[sampling.sampler](context, noise, None, None))
        context.append(replace(chunk, is_last=False), made[-1])  # a last chunk is not cached where nothing reads it
        after_chunk(context)
    return frames_second(torch.cat(made, 2)), context


# --- Caches ----------------------------------------------------------------------------------------------------------


def published_cache(case: str, context: Context) -> dict[str, Tensor]:
    """Our cache as the published code keeps its own, [B, slots * tokens, N, D]: in order, keys turned as there."""
    cache, facts = context.cache, FACTS[case]
    end, sink = size_of(case)[1], cache.sink
    frames = [*range(sink), *range(max(sink, end - cache.ring), end)]
    kept = {}
    for layer in range(CONFIG.layers):
        keys = [turned_back(context, frame, layer, is_roped(case, frame)) for frame in frames]
        values = [cache.frame_of(cache.values[layer], frame) for frame in frames]
        kept |= {f"final_cache_k{layer}": keys, f"final_cache_v{layer}": values}
        if "bank_frames" in facts:
            slots = range(cache.bank_slots - 1, -1, -1)
            for name, buffer in (("k", cache.keys[layer]), ("v", cache.values[layer])):
                kept[f"final_bank_{name}{layer}"] = [buffer.read(TOKENS, slot * TOKENS) for slot in slots]
    return {name: torch.cat(parts, 2).transpose(1, 2) for name, parts in kept.items()}


def is_roped(case: str, frame: int) -> bool:
    return case.startswith("memflow") or (case.startswith("rolling") and frame >= 3)


def turned_back(context: Context, frame: int, layer: int, roped: bool) -> Tensor:
    """Keys [B, N, tokens, D] of a frame at its own position, or at none."""
    cache = context.cache
    keys = cache.frame_of(cache.keys[layer], frame)
    moved = cache._moved if frame < cache.sink else 0
    if roped:
        return Rope.at(CONFIG.head_dim, [-moved], 2, 2, "cpu")(keys) if moved else keys
    turn = Rope.at(CONFIG.head_dim, [frame + moved], HEIGHT, WIDTH, "cpu").turns
    return Rope(turn * torch.tensor([1.0, -1.0]))(keys)


# --- Tests -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOOD)
def test_family_reproduces_the_published_latents_and_cache(case):
    expected = expected_of(case)
    latents, context = replay(case, sampling_of(case))
    close("latents", latents, expected["latents"])
    kept = published_cache(case, context)
    for name in (name for name in expected if name in kept):
        close(name, kept[name], expected[name])


@pytest.mark.skipif(not IS_FULL, reason="only in the full golden set")
@pytest.mark.parametrize("case", [case for case in GOOD if case.startswith("reward")])
def test_blended_sinks_after_every_chunk(case):
    expected, sinks = expected_of(case)["sink_k0_after_block"], []

    def keep(context):
        keys = [turned_back(context, frame, 0, roped=False) for frame in range(context.cache.sink)]
        sinks.append(torch.cat(keys, 2).transpose(1, 2))

    replay(case, sampling_of(case), keep)
    for sink, published in zip(sinks[-len(expected) :], expected, strict=True):
        torch.testing.assert_close(sink, published, rtol=0, atol=TOLERANCE)


@pytest.mark.skipif(not IS_FULL, reason="only in the full golden set")
@pytest.mark.parametrize("case", GOOD)
def test_inputs_follow_from_their_names(case):
    recorded, (batch, frames) = expected_of(case), size_of(case)
    shape = (batch, frames, CONFIG.channels, HEIGHT, WIDTH)
    assert torch.equal(normal(f"input:{label(case)}.noise", shape), recorded["noise"])
    for i, timed in enumerate(prompts_of(case).prompts):
        assert torch.equal(timed.embeds, recorded.get(f"prompt_embeds{i}", recorded.get("prompt_embeds")))
    for i, draw in enumerate(draws_of(case)):
        used = recorded.get(f"renoise_used.{i}")
        used = recorded[f"renoise.{i}"].unflatten(0, (batch, -1)) if used is None else used
        assert torch.equal(frames_second(draw), used)


def test_a_sink_of_another_size_than_a_chunk_is_not_blended():
    with pytest.raises(ValueError, match="sink decay 0.5 with sink 2 and chunk 3.*Use sink 3"):
        Sampling(window=9, sink=2, pinned=True, sink_decay=0.5)


def test_fewer_chunks_than_steps_go_on_as_the_rule_says():
    """Chunk b stands at step w - b; the published code feeds noise again and repeats timesteps."""
    sampling = Sampling(window=21, sink=3, pinned=True, sampler="rolling")
    latents, seen = replay_short(sampling, frames=9)
    assert torch.isfinite(latents).all() and latents.shape[1] == 9
    # Three chunks of 4 steps: 6 forwards, and the oldest chunk is one step further in each until it is done.
    assert [(progress.chunk.index, progress.step) for progress in seen] == [
        (0, 1),
        (0, 2),
        (0, 3),
        (0, 4),
        (1, 4),
        (2, 4),
    ]
    assert {progress.total for progress in seen} == {6}


def replay_short(sampling: Sampling, frames: int) -> tuple[Tensor, list]:
    seen = []
    noise = RecordedNoise(
        frames_second(normal("input:short.noise", (1, frames, CONFIG.channels, HEIGHT, WIDTH))),
        (normal(f"short:{i}", (1, CONFIG.channels, 3, HEIGHT, WIDTH)) for i in range(99)),
    )
    plan = Plan(sampling, frames, HEIGHT, WIDTH)
    embeds = prompt("short prompt ", (1, CONFIG.text_len, CONFIG.text_dim))
    context = Context(Network(model()), plan, PromptSchedule.of(embeds))
    made = []
    with torch.inference_mode():
        for chunk in plan.chunks:
            context.enter(chunk)
            made.append(SAMPLERS[sampling.sampler](context, noise, None, seen.append))
            context.append(chunk, made[-1])
    return frames_second(torch.cat(made, 2)), seen


MISTAKES = {  # what moves the latents, by the kinds of mistakes that are easily made
    "rolling_rf4_w15_f24": {"sampler": "chunks"},
    "reward_ema_w9s3_a90_b2": {"sink_decay": 1.0},
    "sgf_chunk_w12s3_t21": {"position_range": None},
    "memflow_bank_w9s3b3i1": {"bank": None},
}


@pytest.mark.parametrize("case", MISTAKES)
def test_without_its_rule_a_family_is_not_reproduced(case):
    if case not in FACTS:
        pytest.skip("not in this golden set")
    latents, _ = replay(case, replace(sampling_of(case), **MISTAKES[case]))
    expected = expected_of(case)["latents"]
    got = latents if IS_FULL else family_part("latents", latents)
    assert (got - expected).abs().max() > 1e-2
