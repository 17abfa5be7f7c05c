"""Self-rollout: the inference loop with gradient through the exit step, and nowhere else."""

import pytest
import torch
from torch import Tensor

from sf_core.sampling.config import Sampling
from sf_core.sampling.noise import SeededNoise
from sf_core.sampling.schedule import add_noise
from sf_core.training.methods.self_rollout import ExitSchedule, RolloutConfig, self_rollout
from sf_core.training.network import training_network, training_ops
from sf_core.training.step_random import StepRandom
from sf_core.wan.attention import sdpa
from sf_core.wan.config import WanConfig
from sf_core.wan.model import EAGER, WanModel, encode_prompt, velocity
from sf_core.wan.rope import Rope
from tests.core.rolling import roll_out

CONFIG = WanConfig(dim=24, heads=2, layers=2, ffn_dim=32, channels=4, freq_dim=16, text_dim=8, text_len=6)
HEIGHT, WIDTH, CHUNK, BATCH = 4, 6, 2, 2
PROMPT = torch.randn(BATCH, 5, CONFIG.text_dim, generator=torch.Generator().manual_seed(1))


def new_model():
    torch.manual_seed(0)
    wan = WanModel(CONFIG)
    torch.nn.init.normal_(wan.head.head.weight, std=0.2)
    return wan


def roll(
    wan,
    sampling,
    schedule,
    frames=6,
    noise=SeededNoise(0),
    recompute=False,
    training=True,
    precision=torch.float32,
    forced=None,
):
    network = training_network(wan, precision, recompute=recompute)
    return self_rollout(network, sampling, PROMPT, noise, (frames, HEIGHT, WIDTH), schedule, training, forced)


def gradients(wan, clip):
    wan.zero_grad()
    clip.square().mean().backward()
    return torch.cat([p.grad.flatten() for p in wan.parameters() if p.grad is not None])


class Listed:
    """Self-attention over lists of the frames seen so far: the rollout as one would first write it."""

    def __init__(self, start: int, before: list[list[tuple[Tensor, Tensor]]]):
        self.rope = Rope.at(CONFIG.head_dim, range(start, start + CHUNK), HEIGHT, WIDTH, "cpu")
        self.attention, self.before, self.own = sdpa, before, []

    def __call__(self, layer, q, k, v):
        self.own.append((k.detach(), v.detach()))
        keys, values = zip(*(chunk[layer] for chunk in self.before), (k, v))
        return sdpa(q, torch.cat(keys, 2), torch.cat(values, 2))


def written_out(wan, sampling, exits, chunks, context=None):
    steps, noise, shape = sampling.steps_of(False), SeededNoise(0), (BATCH, CONFIG.channels, HEIGHT, WIDTH)
    before, made = [], []
    for chunk in range(chunks):
        start, window = chunk * CHUNK, before[-2:] if sampling.window else before
        x = noise(start, CHUNK, 0, shape)
        for i in range(exits[chunk] + 1):
            x0 = x - steps[i].sigma * velocity(
                wan, x, steps[i].timestep, encode_prompt(wan, PROMPT), Listed(start, window)
            )
            if i < exits[chunk]:
                x = add_noise(x0.detach(), noise(start, CHUNK, i + 1, shape), steps[i + 1].sigma)
        clean = Listed(start, window)
        seen = x0.detach() if context is None else context[:, :, start : start + CHUNK]
        velocity(wan, seen, 0.0, encode_prompt(wan, PROMPT), clean)
        before.append(clean.own)
        made.append(x0)
    return torch.cat(made, 2)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("exits", [(1, 1, 1, 1), (0, 2, 3, 1)])
def test_the_gradient_is_that_of_a_rollout_written_out(exits, window, recompute):
    sampling, wan = Sampling(chunk=CHUNK, window=window), new_model()
    expected = written_out(wan, sampling, exits, 4)
    made = roll(wan, sampling, ExitSchedule(exits, gradient=8), frames=8, recompute=recompute)
    torch.testing.assert_close(made, expected, rtol=0, atol=2e-5)
    wanted = gradients(wan, expected)
    assert (gradients(wan, made) - wanted).norm() < 1e-5 * wanted.norm()


def test_forced_context_is_what_later_chunks_see():
    sampling, wan, exits = Sampling(chunk=CHUNK), new_model(), (1, 2, 0)
    context = torch.randn(BATCH, CONFIG.channels, 6, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(2))
    made = roll(wan, sampling, ExitSchedule(exits, gradient=6), forced=context)
    expected = written_out(wan, sampling, exits, 3, context)
    torch.testing.assert_close(made, expected, rtol=0, atol=2e-5)
    own = roll(wan, sampling, ExitSchedule(exits, gradient=6))
    assert torch.equal(made[:, :, :CHUNK], own[:, :, :CHUNK])
    assert all((made - own)[:, :, start : start + CHUNK].abs().max() > 1e-2 for start in (2, 4))
    wanted = gradients(wan, expected)
    assert (gradients(wan, made) - wanted).norm() < 1e-5 * wanted.norm()


def test_bfloat16_has_the_gradient_of_float32_after_steps_without():
    norms = {}
    for precision in (torch.float32, torch.bfloat16):
        wan = new_model()
        made = roll(wan, Sampling(chunk=CHUNK), ExitSchedule((2, 2, 2), gradient=6), precision=precision)
        made.square().mean().backward()
        norms[precision] = {name: p.grad.norm() for name, p in wan.named_parameters()}
    exact, near = (torch.stack(list(one.values())) for one in norms.values())
    assert 1e-4 < (near - exact).norm() / exact.norm() < 0.05
    assert (near[exact > 1e-3] / exact[exact > 1e-3] - 1).abs().max() < 0.25


def test_nothing_flows_into_earlier_chunks():
    drawn = {}

    def noise(start, frames, step, shape):
        drawn[start, step] = SeededNoise(0)(start, frames, step, shape).requires_grad_(True)
        return drawn[start, step]

    made = roll(new_model(), Sampling(chunk=CHUNK), ExitSchedule((0, 0, 0), gradient=6), noise=noise)
    made[:, :, -CHUNK:].square().sum().backward()
    assert drawn[4, 0].grad.abs().sum() > 0
    assert drawn[0, 0].grad.abs().sum() == 0 and drawn[2, 0].grad.abs().sum() == 0


def test_only_the_last_frames_carry_gradient():
    wan = new_model()
    made = roll(wan, Sampling(chunk=CHUNK), ExitSchedule((1, 1, 1, 1), gradient=3), frames=8)
    early, late = (
        torch.autograd.grad(part.square().sum(), wan.head.head.weight, retain_graph=True)[0]
        for part in (made[:, :, :4], made[:, :, 4:6])
    )
    assert early.abs().sum() == 0 and late.abs().sum() > 0


def test_extra_chunks_take_every_step():
    sampling, wan = Sampling(chunk=CHUNK), new_model()
    made = roll(wan, sampling, ExitSchedule((3, 3, 3, 3, 3), extra=2, gradient=6), training=False)
    expected = roll_out(wan, sampling, PROMPT, SeededNoise(0), 10, HEIGHT, WIDTH)
    torch.testing.assert_close(made, expected, rtol=0, atol=2e-5)


def test_context_noise_changes_later_chunks_only():
    sampling, wan = Sampling(chunk=CHUNK), new_model()
    schedules = (ExitSchedule((1, 1, 1), context_sigma=sigma) for sigma in (0, 0.3))
    clean, noisy = (roll(wan, sampling, schedule, training=False) for schedule in schedules)
    assert torch.equal(clean[:, :, :CHUNK], noisy[:, :, :CHUNK])
    assert (clean[:, :, CHUNK:] - noisy[:, :, CHUNK:]).abs().max() > 1e-4


def test_a_restricted_window_hides_the_first_chunk_from_the_last():
    config = RolloutConfig(frames=6, window=4)
    assert config.sampling(Sampling(chunk=CHUNK)) == Sampling(chunk=CHUNK, window=4)
    sampling, seen = config.sampling(Sampling(chunk=CHUNK)), []

    def attention(q, k, v, mask):
        seen.append(k.shape[2] // CONFIG.tokens_per_frame(HEIGHT, WIDTH))
        return sdpa(q, k, v)

    roll_out(new_model(), sampling, PROMPT, SeededNoise(0), 6, HEIGHT, WIDTH, attention=attention)
    assert max(n for n in seen if n != CONFIG.text_len) == 4


def test_exit_steps_are_shared_or_one_per_chunk():
    sampling = Sampling(chunk=CHUNK)
    shared = [RolloutConfig(frames=8).draw(sampling, StepRandom(0, step, (0,)), "") for step in range(40)]
    single = [
        RolloutConfig(frames=8, exits="per-chunk").draw(sampling, StepRandom(0, step, (0,)), "") for step in range(40)
    ]
    assert all(len(set(drawn.exits)) == 1 and len(drawn.exits) == 4 for drawn in shared)
    assert {drawn.exits[0] for drawn in shared} == {0, 1, 2, 3}
    assert sum(len(set(drawn.exits)) > 1 for drawn in single) > 30


@pytest.mark.parametrize("exits", ["shared", "per-chunk"])
def test_a_first_chunk_with_steps_of_its_own_exits_at_any_of_them(exits):
    sampling = Sampling(chunk=CHUNK, first_steps=(1000, 800, 600, 400, 300, 200))
    schedules = [
        RolloutConfig(frames=8, exits=exits).draw(sampling, StepRandom(0, step, (0,)), "") for step in range(80)
    ]
    assert {drawn.exits[0] for drawn in schedules} == set(range(6))
    assert {drawn.exits[1] for drawn in schedules} == set(range(4))
    roll(new_model(), sampling, ExitSchedule((5, 3, 3)), training=False)


@pytest.mark.parametrize("first", [1, 2, 3, 5])
def test_whatever_the_first_chunk_all_judged_frames_carry_gradient(first):
    sampling = Sampling(chunk=CHUNK, first_chunk=first)
    frames = first + 2 * CHUNK
    wan = new_model()
    made = roll(wan, sampling, ExitSchedule((1,) * 6, extra=2, gradient=frames), frames=frames)
    for frame in range(2 * CHUNK, frames + 2 * CHUNK):
        gradient = torch.autograd.grad(made[:, :, frame].square().sum(), wan.head.head.weight, retain_graph=True)[0]
        assert gradient.abs().sum() > 0


def test_every_sample_draws_alone_and_every_step_anew():
    together, alone = StepRandom(7, 3, (0, 1, 2)), StepRandom(7, 3, (1,))
    assert torch.equal(together.normal("x", 2, 3)[1:2], alone.normal("x", 2, 3))
    shape = (3, 4, HEIGHT, WIDTH)
    assert torch.equal(together.noise("n")(0, 2, 1, shape)[1:2], alone.noise("n")(0, 2, 1, shape))
    assert not torch.equal(together.normal("x", 4), StepRandom(7, 4, (0, 1, 2)).normal("x", 4))
    assert not torch.equal(together.normal("x", 4), together.normal("y", 4))
    assert together.batch_integers("exit", 1000) == alone.batch_integers("exit", 1000)


def test_an_unknown_kind_of_exit_is_refused():
    with pytest.raises(ValueError, match="Got exits 'random'; there is shared and per-chunk"):
        RolloutConfig(exits="random")
    assert training_ops(False, False).call is EAGER.call
