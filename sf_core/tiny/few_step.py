"""Stage 4: four steps instead of many, by Self Forcing with distribution matching (arXiv 2506.08009, algorithm 1; DMD2,
arXiv 2405.14867).

The generator makes whole clips as it does in production, each chunk attending to its own earlier output through the
rolling cache. One exit step is drawn per rollout: every chunk stops there, and only that forward carries gradient.
The clip is then noised, and two bidirectional networks say what they think the clean clip was: the frozen teacher,
with guidance, and a critic that is trained on the generator's clips all along. The difference is the gradient with
respect to the clip.

A third of the rollouts begin with chunks that are not trained on, so that the generator also learns from windows
later in a video. The two networks know only clips that begin with a still, so the first frame of such a window is
turned into one.
"""

import copy
from functools import partial

import torch
from torch import Tensor

from ..cache import RollingCache
from ..config import PRESETS, Sampling
from ..model import Sequence, WanModel
from ..schedule import add_noise, x0_from_velocity
from .autoencoder import TIME, TinyAutoencoder
from .data import caption, draw
from .flow import (
    CHUNK,
    CONFIG,
    FRAMES,
    LATENT,
    Velocity,
    bidirectional,
    load_autoencoder,
    load_models,
    plain_attention,
    predict,
    random_sigmas,
)
from .loop import Run, average_gradients, steps
from .optim import Average, Optimizer

GUIDANCE = 2.0
CRITIC_UPDATES = 3  # per rollout
EXTRA_CHUNKS = 4  # at most, before the trained ones
LEAST_NOISE, MOST_NOISE = 0.02, 0.98  # noise levels at which the clips are judged


def self_rollout(
    wan: WanModel, sampling: Sampling, embeds: Tensor, exit_step: int, extra: int, generator: torch.Generator
) -> Tensor:
    """The last FRAMES frames [B, C, FRAMES, H, W] of extra + FRAMES / CHUNK chunks, generated as in production.

    Their chunks take steps 0..exit_step, the last one with gradient; the `extra` ones before take every step, without.
    """
    shape = (len(embeds), CONFIG.channels, CHUNK, LATENT, LATENT)
    chunks = extra + FRAMES // CHUNK
    size = {"batch": len(embeds), "height": LATENT, "width": LATENT, "dtype": torch.bfloat16}
    cache = RollingCache.for_rollout(CONFIG, sampling, chunks * CHUNK, **size)
    levels = sampling.steps_of(True)
    made = []
    for chunk in range(chunks):
        attend = cache.chunk(chunk * CHUNK, CHUNK, plain_attention)
        trained = chunk >= extra
        last = exit_step if trained else len(levels) - 1
        x = torch.randn(shape, generator=generator)
        for step in range(last + 1):
            with torch.set_grad_enabled(trained and step == last):
                x0 = denoise(wan, x, levels[step].sigma, embeds, attend)
            if step < last:
                x = add_noise(x0, torch.randn(shape, generator=generator), levels[step + 1].sigma)
        made.append(x0)
        if chunk < chunks - 1:
            with torch.no_grad():
                denoise(wan, x0, 0.0, embeds, attend)  # keeps the clean chunk's keys and values
    return torch.cat(made[extra:], 2)


def denoise(wan: WanModel, x: Tensor, sigma: float, embeds: Tensor, attend) -> Tensor:
    """The clean latents that the model sees in x [B, C, F, H, W], noisy at the level `sigma`."""
    return x0_from_velocity(x, predict(wan, x, torch.full((1, 1), 1000 * sigma), embeds, attend), sigma)


def as_still(vae: TinyAutoencoder, latents: Tensor) -> Tensor:
    """Latents [B, C, 1, H, W] -> those of a still of their last frame, as far as the linear autoencoder sees it."""
    blocks = vae.decoder[0].linear(latents.movedim(1, -1))  # [B, 1, H, W, block]
    last = blocks.unflatten(-1, (TIME, -1))[..., -1, :]
    return vae.encoder(last.repeat(1, 1, 1, 1, TIME)).movedim(-1, 1)


def judged_noise(x0: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise and levels [B, F] (one a clip) at which clips are judged."""
    sigma = random_sigmas((len(x0), 1), generator).clamp(LEAST_NOISE, MOST_NOISE)
    return torch.randn(x0.shape, generator=generator), sigma.expand(-1, x0.shape[2])


def distribution_loss(
    x0: Tensor, embeds: Tensor, real: Velocity, fake: Velocity, attend: Sequence, generator: torch.Generator
) -> Tensor:
    """DMD: half the squared distance to where real and fake score push the clip; its gradient is their difference.

    real = unconditional + GUIDANCE (conditional - unconditional); normalised per clip by mean |x0 - real|.
    """
    with torch.no_grad():
        noise, sigma = judged_noise(x0, generator)
        level = sigma[:, None, :, None, None]
        noisy = add_noise(x0, noise, level)
        both = torch.cat([embeds, torch.zeros_like(embeds)])
        v, v_null = real(noisy.repeat(2, 1, 1, 1, 1), 1000 * sigma.repeat(2, 1), both, attend).chunk(2)
        wanted = x0_from_velocity(noisy, v_null + GUIDANCE * (v - v_null), level)
        guessed = x0_from_velocity(noisy, fake(noisy, 1000 * sigma, embeds, attend), level)
        scale = (x0 - wanted).abs().mean((1, 2, 3, 4), keepdim=True)
        gradient = (guessed - wanted) / scale.clamp(min=1e-4)
    return 0.5 * (x0 - (x0 - gradient).detach()).square().mean()


def critic_loss(x0: Tensor, embeds: Tensor, fake: Velocity, attend: Sequence, generator: torch.Generator) -> Tensor:
    """Flow matching on the generator's clips."""
    noise, sigma = judged_noise(x0, generator)
    noisy = add_noise(x0, noise, sigma[:, None, :, None, None])
    return (fake(noisy, 1000 * sigma, embeds, attend) - (noise - x0)).square().mean()


class Distiller:
    """Generator, teacher and critic, stepped, saved and restored together."""

    def __init__(self, run: Run):
        self.run = run
        self.generator = run.generator("few-step")
        self.teacher, self.text = load_models(run.load("teacher"))
        self.critic = copy.deepcopy(self.teacher)
        self.wan, _ = load_models(run.load("causal"))
        for frozen in (self.teacher, self.text):
            frozen.requires_grad_(False)
        self.vae = load_autoencoder(run)
        self.optimizer = Optimizer([self.wan], 1.5e-4, 4e-4, betas=(0.0, 0.98), decay_from=0.5)
        self.critic_optimizer = Optimizer([self.critic], 3e-4, 1e-3, betas=(0.0, 0.98), decay_from=0.5)
        self.average = Average(self.wan, 0.98)
        self.sampling, self.attend = PRESETS["tiny"], bidirectional(CONFIG, FRAMES)
        self.first = 0
        if run.path("few-step").exists():
            self.restore(run.load("few-step"))

    def step(self, batch: int, progress: float) -> dict[str, Tensor]:
        """One rollout: one update of the generator, CRITIC_UPDATES of the critic. Returns both losses."""
        embeds = self.text.encode(caption(draw(batch, self.generator), self.generator))
        exit_step, extra = self.choose()
        x0 = self_rollout(self.wan, self.sampling, embeds, exit_step, extra, self.generator)
        if extra:
            with torch.no_grad():
                still = as_still(self.vae, x0[:, :, :1])
            x0 = torch.cat([still, x0[:, :, 1:]], 2)
        judge = partial(predict, self.teacher), partial(predict, self.critic)
        loss = distribution_loss(x0, embeds, *judge, self.attend, self.generator)
        self.update(loss, self.optimizer, progress)
        self.average.update(self.wan)
        for _ in range(CRITIC_UPDATES):
            doubt = critic_loss(x0.detach(), embeds, judge[1], self.attend, self.generator)
            self.update(doubt, self.critic_optimizer, progress)
        return {"generator": loss, "critic": doubt}

    def choose(self) -> tuple[int, int]:
        """Exit step and number of extra chunks of one rollout."""
        levels = len(self.sampling.steps_of(True))
        exit_step, late, extra = (
            int(torch.randint(n, (1,), generator=self.generator)) for n in (levels, 3, EXTRA_CHUNKS)
        )
        return exit_step, 1 + extra if late == 0 else 0

    def update(self, loss: Tensor, optimizer: Optimizer, progress: float) -> None:
        loss.backward()
        average_gradients(optimizer.params)
        optimizer.step(progress)

    def save(self, done: int) -> None:
        live = [self.wan.state_dict(), self.critic.state_dict()]
        optimizers = [self.optimizer.state_dict(), self.critic_optimizer.state_dict()]
        state = {"model": self.average.values, "text": self.text.state_dict(), "live": live, "optimizers": optimizers}
        self.run.save("few-step", {**state, "generator": self.generator.get_state(), "step": done})

    def restore(self, saved: dict) -> None:
        for model, live in zip((self.wan, self.critic), saved["live"], strict=True):
            model.load_state_dict(live)
        for optimizer, state in zip((self.optimizer, self.critic_optimizer), saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.average.values, self.average.steps, self.first = saved["model"], saved["step"], saved["step"]
        self.run.resume(self.generator, saved)


def fit_few_step(run: Run, total: int, batch: int) -> None:
    """Stage 4, from teacher.pt and causal.pt to few-step.pt."""
    distiller = Distiller(run)
    losses = {}
    for step in steps(run, "few-step", distiller.first, total, losses, distiller.save):
        losses.update(distiller.step(batch, step / total))
