"""Masks, flows and adversaries: what the baselines and the discriminator see."""

from contextlib import nullcontext

import pytest
import torch

from benchmarks.recompute import block_causal_mask
from sf_core.sampling.config import Sampling
from sf_core.sampling.schedule import add_noise
from sf_core.training.config import GanConfig, LoraConfig
from sf_core.training.lora import add_adapters, merge_adapters
from sf_core.training.methods.consistency import Consistency
from sf_core.training.methods.diffusion import (
    block_mask,
    build_mask,
    chunk_attention,
    chunk_indices,
    chunk_rule,
    compile_flex,
    masked_mean,
)
from sf_core.training.methods.discriminator import Discriminator
from sf_core.training.methods.dmd import GeneratedClips
from sf_core.training.methods.gan import GAN
from sf_core.training.methods.losses import Level, Levels, Prompts, gradient_penalty
from sf_core.training.methods.ode import ODE
from sf_core.training.network import clip_attention, plain_attention, predict_velocity, training_network
from sf_core.training.step_random import StepRandom
from sf_core.wan.attention import FullAttention
from tests.core.test_self_rollout import CHUNK, CONFIG, HEIGHT, PROMPT, WIDTH, new_model

CPU = torch.device("cpu")
SIZE = (HEIGHT, WIDTH)
TOKENS = CONFIG.tokens_per_frame(*SIZE)
SAMPLING = Sampling(chunk=CHUNK)


def test_noisy_chunks_see_clean_chunks_before_them_and_themselves():
    sees = chunk_attention(CONFIG, chunk_indices(6, SAMPLING), SIZE, True, CPU).mask[::TOKENS, ::TOKENS]
    clean, noisy = sees[:6], sees[6:]  # one token of each frame
    assert clean[:2, :2].all() and not clean[:2, 2:].any()
    assert clean[4:, :6].all() and not clean[:, 6:].any()
    assert not noisy[:2, :6].any() and noisy[:2, 6:8].all() and not noisy[:2, 8:].any()
    assert noisy[4:, :4].all() and not noisy[4:, 4:10].any() and noisy[4:, 10:].all()


def test_diffusion_forcing_is_block_causal():
    mask = chunk_attention(CONFIG, chunk_indices(6, SAMPLING), SIZE, False, CPU).mask
    assert torch.equal(mask, block_causal_mask([CHUNK] * 3, TOKENS))


@pytest.mark.parametrize("tokens", [16, 40, 64, 150])
@pytest.mark.parametrize("copies", [1, 2])
def test_flex_attention_follows_the_same_rule(tokens, copies):
    """What a GPU computes, uncompiled on the CPU; blocks are those that torch finds from the dense mask."""
    from torch.nn.attention.flex_attention import create_block_mask

    chunk = torch.tensor([0, 0, 1, 1, 2]).repeat(copies).repeat_interleave(tokens)
    length = len(chunk)
    noisy = torch.arange(length) >= 5 * tokens
    rule, blocks = chunk_rule(chunk, noisy), block_mask(chunk, noisy)
    theirs = create_block_mask(lambda b, h, q, k: rule(q, k), None, None, length, length, device="cpu")
    assert torch.equal(blocks.to_dense(), theirs.to_dense()) and blocks.shape == theirs.shape
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(blocks, name), getattr(theirs, name)), name
    q, k, v = torch.randn(3, 1, 2, length, 16).unbind(0)
    mask, attention = build_mask(chunk, noisy, CPU)
    torch.testing.assert_close(
        compile_flex("cpu")(q, k, v, block_mask=blocks), attention(q, k, v, mask), rtol=0, atol=1e-5
    )


def test_a_block_mask_takes_little_memory_at_full_size():
    """21 frames of 832 x 480 beside themselves: 65520 tokens, whose dense mask would be 4 GiB."""
    chunk = torch.arange(7).repeat_interleave(3 * 1560).repeat(2)
    blocks = block_mask(chunk, torch.arange(65520) >= 32760)
    assert blocks.shape == (1, 1, 65520, 65520) and blocks.kv_indices.shape == (1, 1, 512, 512)
    assert 60 < blocks.sparsity() < 75


@torch.no_grad()
def test_teacher_forcing_sees_what_the_cache_holds():
    """A noisy chunk beside clean ones is denoised as in a rollout whose cache holds the clean ones."""
    from sf_core.training.methods.diffusion import velocity_given_context
    from sf_core.wan.cache import CacheShape, RollingCache
    from sf_core.wan.model import encode_prompt, velocity

    wan = new_model()
    clean, noisy = torch.randn(2, len(PROMPT), CONFIG.channels, 4, *SIZE).unbind(0)
    sigma, zero = torch.full((len(PROMPT), 4), 0.7), torch.zeros(len(PROMPT), 4)
    attend = chunk_attention(CONFIG, chunk_indices(4, SAMPLING), SIZE, True, CPU)
    beside = velocity_given_context(training_network(wan), clean, zero, noisy, sigma, PROMPT, attend)
    cache, text = RollingCache(CONFIG, CacheShape(len(PROMPT), *SIZE, slots=4)), encode_prompt(wan, PROMPT)
    velocity(wan, clean[:, :, :2], 0.0, text, cache.chunk(0, 2))
    cached = velocity(wan, noisy[:, :, 2:], 700.0, text, cache.chunk(2, 2))
    torch.testing.assert_close(beside[:, :, 2:], cached, rtol=0, atol=2e-5)


def test_the_mean_does_not_depend_on_how_a_batch_is_cut():
    error, counts = torch.rand(4, 6), torch.rand(4, 6) > 0.4
    halves = [masked_mean(error[i : i + 2], counts[i : i + 2]) for i in (0, 2)]
    assert masked_mean(error, counts) == pytest.approx(sum(halves).item() / 2)


class Stub:
    """Anything with these attributes."""

    def __init__(self, **attributes):
        vars(self).update(attributes)


def test_a_consistency_step_leads_along_the_teachers_way():
    """With the true velocity, the nearer point is the clip with the same noise at the next, lower level."""
    random, clips = StepRandom(0, 0, (0, 1)), torch.randn(2, 4, 4, *SIZE)
    noise, jumps = random.normal("flow noise", *clips.shape[1:]), {}

    class Straight(Consistency):
        def __init__(self):
            self.flow, self.chunks, self.student = Stub(teacher_steps=8, shift=3.0), chunk_indices(4, SAMPLING), None
            self.averages = {"target": Stub(swap_in=nullcontext)}

        def guided_velocity(self, clips, noisy, sigma, embeds):
            return noise - clips

        def predict_x0(self, network, clips, noisy, sigma, embeds):
            jumps[torch.is_grad_enabled()] = (noisy, sigma)
            return noisy

    loss = Straight().clip_loss(clips, PROMPT, random)
    for noisy, sigma in jumps.values():
        torch.testing.assert_close(noisy, add_noise(clips, noise, sigma[:, None, :, None, None]))
    (start, high), (target, low) = jumps[True], jumps[False]
    assert (low < high).all() and loss == pytest.approx((start - target).square().mean().item())


def test_an_ode_student_jumps_to_the_trajectorys_end():
    random, clips = StepRandom(0, 0, (0, 1)), torch.zeros(2, 4, 4, *SIZE)
    end = random.normal("trajectory", *clips.shape[1:]) - 1  # of a velocity of 1 everywhere

    class Straight(ODE):
        def __init__(self, off):
            self.flow, self.chunks, self.student = Stub(teacher_steps=2, shift=1.0), chunk_indices(4, SAMPLING), None
            self.config, self.device, self.off = Stub(sampling=SAMPLING), CPU, off

        def guided_velocity(self, clips, noisy, sigma, embeds):
            return torch.ones_like(noisy)

        def predict_x0(self, network, clips, noisy, sigma, embeds):
            torch.testing.assert_close(noisy, end + sigma[:, None, :, None, None])
            return end + self.off

    assert Straight(0.0).clip_loss(clips, PROMPT, random).item() == pytest.approx(0, abs=1e-10)
    assert Straight(0.5).clip_loss(clips, PROMPT, random).item() == pytest.approx(0.25, rel=1e-4)


@pytest.mark.parametrize("relativistic", [False, True])
def test_each_penalty_is_the_slope_at_its_own_clips(relativistic):
    """Logits with a slope of 2 on real clips and of 5 on generated ones."""
    gan = GanConfig(relativistic=relativistic, critic_weight=0.5, r1=0.3, r2=0.7, score_weight=0.0)
    real, fake = torch.full((2, 4, 2, *SIZE), 1.0), torch.full((2, 4, 2, *SIZE), -1.0)
    random, level = StepRandom(0, 0, (0, 1)), Level(torch.zeros(2), torch.zeros(2), torch.zeros_like(real))

    class Linear(GAN):
        def __init__(self):
            self.gan = gan

        def discriminate(self, noisy, level, embeds):
            total = noisy.flatten(1).double().sum(1)
            return torch.where(noisy.mean((1, 2, 3, 4)) > 0, 2 * total, 5 * total), noisy

    told = Linear().critic_losses(GeneratedClips(fake, Prompts(PROMPT, PROMPT), real), level, random, "critic")
    along = {name: random.normal(f"critic {name}", *real.shape[1:]).flatten(1).sum(1) for name in ("r1", "r2")}
    assert told["r1"].item() == pytest.approx((2 * along["r1"]).square().mean().item(), rel=1e-3)
    assert told["r2"].item() == pytest.approx((5 * along["r2"]).square().mean().item(), rel=1e-3)
    sum_of = 0.5 * told["discriminator"] + 0.15 * told["r1"] + 0.35 * told["r2"]
    assert told["critic"].item() == pytest.approx(sum_of.item())


def test_a_trajectory_with_one_even_step_is_eulers():
    """Between stops the points of a constant velocity lie on a line."""

    class Straight(ODE):
        def __init__(self):
            self.flow = type("Flow", (), {"teacher_steps": 2, "shift": 1.0})()

        def guided_velocity(self, clips, noisy, sigma, embeds):
            return torch.ones_like(noisy)

    random, clips = StepRandom(0, 0, (0,)), torch.zeros(1, 4, 2, 4, 6)
    points, end = Straight().trajectory(clips, PROMPT, random, [1.0, 0.75, 0.25])
    noise = random.normal("trajectory", 4, 2, 4, 6)
    for point, sigma in zip(points, (1.0, 0.75, 0.25)):
        torch.testing.assert_close(point, noise - (1 - sigma))
    torch.testing.assert_close(end, noise - 1)


def test_the_discriminator_reads_the_critics_own_tokens():
    torch.manual_seed(0)
    network, judge = training_network(new_model()), Discriminator(CONFIG, (0.5, 1.0))
    clips = torch.randn(2, CONFIG.channels, 2, *SIZE, requires_grad=True)
    t = torch.full((2, 1), 500.0)
    features, v = judge.features(network, clips, t, PROMPT)
    torch.testing.assert_close(v, predict_velocity(network, clips, t, PROMPT, clip_attention(network, clips)))
    assert [tuple(tokens.shape) for tokens in features] == [(2, 2 * TOKENS, CONFIG.dim)] * 2
    logits = judge(features)
    assert logits.shape == (2,)
    logits[0].backward()
    assert clips.grad[0].abs().sum() > 0 and clips.grad[1].abs().sum() == 0
    again, _ = judge.features(training_network(new_model(), recompute=True), clips, t, PROMPT)
    torch.testing.assert_close(judge(again), logits)


def test_the_slope_of_a_linear_logit_is_its_squared_weight():
    x, nudge = torch.randn(5), torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0])
    assert gradient_penalty(3 * x, 3 * (x + 0.01 * nudge), 0.01).item() == pytest.approx(9, rel=1e-3)


def test_levels_lie_between_their_bounds():
    level = Levels(shift=5, lowest=100, highest=900).draw(
        torch.zeros(64, 1, 1, 1, 1), StepRandom(0, 0, tuple(range(64))), ""
    )
    assert level.timestep.min() >= 100 and level.timestep.max() == 900
    assert (1000 * level.sigma - level.timestep).abs().max() < 2
    with pytest.raises(ValueError, match="Got noise levels from timestep 900 to 20"):
        Levels(lowest=900, highest=20)


def test_plain_attention_is_attention():
    q, k, v = torch.randn(3, 2, 2, 10, 8).unbind(0)
    mask = torch.rand(10, 10) > 0.3
    mask |= torch.eye(10, dtype=torch.bool)
    for m in (None, mask):
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=m)
        torch.testing.assert_close(plain_attention(q, k, v, m), expected)


def test_merged_adapters_compute_the_same():
    config = LoraConfig(rank=3, alpha=6.0, layers=("q", "ffn.2"))
    wan = add_adapters(new_model(), config, seed=0)
    trained = {name for name, p in wan.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 3 * CONFIG.layers and all(name.endswith((".up", ".down")) for name in trained)
    plain = new_model()
    x, see = torch.randn(1, CONFIG.channels, 2, *SIZE), FullAttention(CONFIG, range(2), *SIZE)
    t, prompt = torch.full((1, 1), 500.0), PROMPT[:1]

    def forward(wan):
        return predict_velocity(training_network(wan), x, t, prompt, see)

    with torch.no_grad():
        torch.testing.assert_close(forward(wan), forward(plain))
        for name, p in wan.named_parameters():
            if name.endswith(".up"):
                p.normal_()
        adapted = forward(wan)
        plain.load_state_dict(merge_adapters(wan.state_dict(), config))
        torch.testing.assert_close(forward(plain), adapted, rtol=0, atol=1e-5)
    assert (adapted - forward(new_model())).abs().max() > 1e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_flex_attention_on_a_gpu_has_the_dense_masks_gradient():
    device = torch.device("cuda")
    chunk = torch.tensor([0, 0, 1, 1]).repeat(2).repeat_interleave(64).to(device)
    noisy = torch.arange(512, device=device) >= 256
    q, k, v = (x.requires_grad_(True) for x in torch.randn(3, 1, 2, 512, 64, device=device).unbind(0))
    mask, attention = build_mask(chunk, noisy, device)
    tokens = torch.arange(512, device=device)
    dense = plain_attention(q, k, v, chunk_rule(chunk, noisy)(tokens[:, None], tokens[None, :]))
    flexed = attention(q, k, v, mask)
    torch.testing.assert_close(flexed, dense, rtol=0, atol=2e-2)
    ours, theirs = (torch.autograd.grad(out.square().sum(), q)[0] for out in (flexed, dense))
    assert (ours - theirs).norm() < 2e-2 * theirs.norm()
