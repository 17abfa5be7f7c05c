"""Forwards, rollouts, windows and schedules against the published code's outputs (tests/golden)."""

import re

import pytest
import torch

from benchmarks.recompute import block_causal_mask
from sf_core.sampling.config import Sampling
from sf_core.sampling.prompts import TimedPrompt
from sf_core.sampling.schedule import (
    add_noise,
    few_steps,
    shift_sigma,
    sigma_at,
    sigma_table,
    x0_from_velocity,
)
from sf_core.wan.attention import FullAttention
from sf_core.wan.cache import CacheShape, RollingCache
from sf_core.wan.model import encode_prompt, velocity
from tests.core.goldens import CONFIG, HEIGHT, REAL_SCORE, TOKENS, WIDTH, RecordedNoise, frames_second, golden, model
from tests.core.rolling import roll_out

TOLERANCE = 2e-5

FORWARDS = golden("g1_forwards")
ROLLOUTS = golden("g2_rollouts")
WINDOWS = golden("g3_window")
SCHEDULER = golden("g6_scheduler")
LONGLIVE = golden("g8_longlive")

ROLLOUT_SETTINGS = {
    "chunk21": {},
    "chunk21_b2": {},
    "ctxnoise": {"context_noise": 100},
    "nowarp": {"warp": False},
    "frame21": {"chunk": 1},
    "extend_chunk": {},
    "i2v_frame": {"chunk": 1},
    "i2v_chunk_indep": {"first_chunk": 1},
    "indep19": {"first_chunk": 1},
}


def close(got, expected, tolerance=TOLERANCE):
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


def cases(tensors):
    return sorted({name.split(".")[0] for name in tensors})


def frame_mask(case):
    mask = FORWARDS[f"{case}.frame_mask"].bool()
    return mask.repeat_interleave(TOKENS, 0).repeat_interleave(TOKENS, 1)


def replay(tensors, case, sampling, prompt=None):
    """Rolls a recorded case out again, [B, F, C, H, W]; `prompt` where it is not the recorded one."""
    expected = tensors[f"{case}.latents"]
    batch, frames = expected.shape[:2]
    draws = tensors.get(f"{case}.renoise")
    if draws is None:
        count = sum(name.startswith(f"{case}.renoise.") for name in tensors)
        draws = [tensors[f"{case}.renoise.{i}"] for i in range(count)]
    noise = RecordedNoise(
        frames_second(tensors[f"{case}.noise"]), [frames_second(draw.unflatten(0, (batch, -1))) for draw in draws]
    )
    if prompt is None:
        prompt = tensors.get(f"{case}.prompt_embeds", tensors.get(f"{case}.prompt_embeds0"))
    prefix = tensors.get(f"{case}.initial_latent")
    prefix = None if prefix is None else frames_second(prefix)
    return frames_second(roll_out(model(), sampling, prompt, noise, frames, HEIGHT, WIDTH, prefix=prefix)), expected


@torch.no_grad()
def test_cached_forwards_and_what_they_leave_in_the_cache():
    wan = model()
    text = encode_prompt(wan, FORWARDS["kv.context"])
    cache = RollingCache(CONFIG, CacheShape(2, HEIGHT, WIDTH, slots=9))
    for call, start in enumerate((0, 3, 3, 6)):
        out = velocity(wan, FORWARDS[f"kv.x{call}"], FORWARDS[f"kv.t{call}"], text, cache.chunk(start, 3))
        close(out, FORWARDS[f"kv.out{call}"])
    for layer in range(CONFIG.layers):
        keys, values = cache.keys[layer].read(9 * TOKENS), cache.values[layer].read(9 * TOKENS)
        for kept, name in ((keys, "cache_k"), (values, "cache_v"), (text.keys[layer], "cross_k")):
            expected = FORWARDS[f"kv.{name}.{layer}"]
            close(kept.transpose(1, 2)[: len(expected)], expected)


@pytest.mark.skipif("single.x0" not in FORWARDS, reason="only in the full golden set")
@torch.no_grad()
def test_cached_forwards_frame_by_frame():
    wan = model()
    text = encode_prompt(wan, FORWARDS["single.context"])
    cache = RollingCache(CONFIG, CacheShape(1, HEIGHT, WIDTH, slots=4))
    for call in range(4):
        x, t = FORWARDS[f"single.x{call}"], FORWARDS[f"single.t{call}"]
        close(velocity(wan, x, t, text, cache.chunk(call, 1)), FORWARDS[f"single.out{call}"])


@pytest.mark.parametrize(
    ("case", "chunks", "window"),
    [
        ("train_nfb1", [1] * 7, None),
        ("train_nfb3", [3] * 3, None),
        ("train_indep", [1, 3, 3, 3], None),
        ("train_local6", [3] * 4, 6),
        ("train_indep_local5", [1, 4, 4, 4], 5),
    ],
)
@torch.no_grad()
def test_block_causal_forward(case, chunks, window):
    if f"{case}.x" not in FORWARDS:
        pytest.skip("only in the full golden set")
    mask = block_causal_mask(chunks, TOKENS, window)
    assert torch.equal(mask, frame_mask(case))
    wan = model()
    see = FullAttention(CONFIG, range(sum(chunks)), HEIGHT, WIDTH, mask=mask)
    text = encode_prompt(wan, FORWARDS["train.context"])
    close(velocity(wan, FORWARDS[f"{case}.x"], FORWARDS[f"{case}.t"], text, see), FORWARDS[f"{case}.out"])


@pytest.mark.parametrize("case", ["train_tf", "train_tf_aug"])
@torch.no_grad()
def test_teacher_forcing_forward(case):
    if f"{case}.x" not in FORWARDS:
        pytest.skip("only in the full golden set")
    wan = model()
    t = FORWARDS[f"{case}.t"]
    x = torch.cat((FORWARDS[f"{case}.clean_x"], FORWARDS[f"{case}.x"]), 2)  # clean frames first, then noisy ones
    t = torch.cat((FORWARDS.get(f"{case}.aug_t", torch.zeros_like(t)), t), 1)
    see = FullAttention(CONFIG, [*range(9), *range(9)], HEIGHT, WIDTH, mask=frame_mask(case))
    out = velocity(wan, x, t, encode_prompt(wan, FORWARDS["train.context"]), see)
    close(out[:, :, 9:], FORWARDS[f"{case}.out"])


@torch.no_grad()
def test_bidirectional_forward():
    wan = model(REAL_SCORE)
    x, t = FORWARDS["bidir.x"], FORWARDS["bidir.t"]
    see = FullAttention(CONFIG, range(x.shape[2]), HEIGHT, WIDTH)
    out = velocity(wan, x, t[:, None], encode_prompt(wan, FORWARDS["train.context"]), see)
    close(out, FORWARDS["bidir.out"])


@pytest.mark.parametrize("case", cases(ROLLOUTS))
def test_rollout(case):
    close(*replay(ROLLOUTS, case, Sampling(**ROLLOUT_SETTINGS[case])))


@pytest.mark.parametrize("case", [case for case in cases(WINDOWS) if not case.endswith("BAD")])
def test_rolling_window(case):
    window, sink = map(int, re.search(r"local(\d)_sink(\d)", case).groups())
    sampling = Sampling(window=window, sink=sink, chunk=1 if case.startswith("frame") else 3)
    close(*replay(WINDOWS, case, sampling))


def test_a_window_too_small_for_sink_and_chunk_is_refused():
    with pytest.raises(ValueError, match="window of 6 latent frames with sink 4 and chunk 3.*at least 7"):
        Sampling(window=6, sink=4)


@pytest.mark.parametrize("case", [case for case in cases(LONGLIVE) if case.startswith(("longlive", "infinity"))])
def test_longlive_window(case):
    window, sink = map(int, re.search(r"local(\d)_sink(\d)", case).groups())
    close(*replay(LONGLIVE, case, Sampling(window=window, sink=sink, pinned=case.startswith("infinity"))))


@pytest.mark.parametrize(
    ("case", "starts", "transition"),
    [
        ("switch_early", (0, 6), "recache"),
        ("switch_globalsink", (0, 12, 21), "recache"),
        ("switch_noglobalsink", (0, 12, 21), "renew"),
    ],
)
def test_longlive_prompt_switch(case, starts, transition):
    prompts = [LONGLIVE[f"{case}.prompt_embeds{i}"] for i in range(len(starts))]
    timed = [TimedPrompt(start, embeds, transition) for start, embeds in zip(starts, prompts)]
    close(*replay(LONGLIVE, case, Sampling(window=9, sink=3), timed))


@pytest.mark.parametrize("shift", [1, 3, 5, 8])
def test_sigma_table_and_warped_steps(shift):
    close(torch.tensor(sigma_table(shift)), SCHEDULER[f"shift{shift}.sigmas"], 2e-7)
    warped = torch.tensor([step.timestep for step in few_steps((1000, 750, 500, 250), shift)])
    close(warped, SCHEDULER[f"shift{shift}.warped_4step"], 1e-4)
    whole = SCHEDULER[f"shift{shift}.warped_0..1000"]  # entry i is timestep i of the list
    every = torch.tensor([few_steps((float(t),), shift)[0].timestep for t in range(1, 1001)])
    ascending = whole if whole[-1] > whole[0] else whole.flip(0)
    close(every, ascending[1:], 1e-3)


def test_noise_is_added_at_the_nearest_entry_of_the_table():
    sigma = torch.tensor([sigma_at(t.item(), 5) for t in SCHEDULER["add_noise.t"]]).view(-1, 1, 1, 1)
    close(add_noise(SCHEDULER["add_noise.x"], SCHEDULER["add_noise.noise"], sigma), SCHEDULER["add_noise.out"])
    x, flow = SCHEDULER["add_noise.out"], SCHEDULER["flow"]
    close(x0_from_velocity(x, flow, sigma), SCHEDULER["x0_from_flow"])


def test_noise_in_bfloat16_is_the_float32_result_rounded():
    sigma = torch.tensor([sigma_at(t.item(), 5) for t in SCHEDULER["add_noise.t"]]).view(-1, 1, 1, 1)
    x, noise, flow, noisy = (
        SCHEDULER[name].bfloat16().float() for name in ("add_noise.x", "add_noise.noise", "flow", "add_noise.out")
    )
    assert torch.equal(add_noise(x, noise, sigma).bfloat16(), SCHEDULER["add_noise.out_bf16"])
    assert torch.equal(x0_from_velocity(noisy, flow, sigma).bfloat16(), SCHEDULER["x0_from_flow_bf16"])


def test_timesteps_of_score_distillation():
    shifted = torch.tensor([min(max(1000 * shift_sigma(k / 1000, 5), 20), 980) for k in range(1000)])
    close(shifted, SCHEDULER["dmd.shifted_clamped"], 2e-4)
    for shift, name in ((5, "dmd.sigma_add_noise(shift5 table)"), (8, "dmd.sigma_score_x0(shift8 table)")):
        sigmas = torch.tensor([sigma_at(t, shift) for t in SCHEDULER["dmd.shifted_clamped"].tolist()])
        close(sigmas, SCHEDULER[name], 1e-6)
