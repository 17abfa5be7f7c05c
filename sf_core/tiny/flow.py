"""Stages 2 and 3: a bidirectional teacher by flow matching, then the same network made causal by teacher forcing.

The teacher sees whole clips of latents at one noise level. The causal model sees every clip twice, side by side:
clean, and noisy with a level per chunk; a noisy chunk may look at itself and at the clean chunks before it, which is
what the cache holds when it generates. Both predict the velocity noise - x0 (arXiv 2506.08009, section 3.1).
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..config import WanConfig
from ..model import Attend, Sequence, WanModel, block_causal_mask, encode_text, velocity
from ..schedule import add_noise
from .autoencoder import CHANNELS, SPACE, TIME, TinyAutoencoder
from .data import SIZE, Clips, caption, draw, render, vocabulary
from .loop import Run, average_gradients, steps
from .optim import Average, Optimizer
from .text import TEXT_DIM, TEXT_LEN, TinyTextEncoder

CONFIG = WanConfig(dim=160, ffn_dim=640, heads=5, layers=6, channels=CHANNELS, text_dim=TEXT_DIM, text_len=TEXT_LEN)
CHUNK, FRAMES = 3, 9  # latent frames
LATENT = SIZE // SPACE
SHIFT = 3.0
DROPPED_CAPTIONS = 0.1
POOL = 16384  # clips drawn and encoded once

Velocity = Callable[[Tensor, Tensor, Tensor, Attend], Tensor]


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention [B, N, L, D] in three steps: backwards it is several times faster on a CPU than the fused kernel."""
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1).to(v.dtype) @ v


def predict(wan: WanModel, x: Tensor, t: Tensor, embeds: Tensor, attend: Attend) -> Tensor:
    """Velocity in bfloat16 arithmetic; x [B, C, F, H, W], t [B, F] timesteps, embeds [B, text_len, text_dim]."""
    with torch.autocast(x.device.type, torch.bfloat16):
        return velocity(wan, x, t, encode_text(wan, embeds), attend).float()


def clip_pool(run: Run, vae: TinyAutoencoder) -> tuple[Clips, Tensor]:
    """Random clips and their latents [n, C, FRAMES + 1, H, W] (bfloat16), the same in every stage and process."""
    drawn = draw(POOL, torch.Generator().manual_seed(run.seed + 1))
    if run.rank == 0 and not run.path("latents").exists():
        run.report(f"drawing and encoding {POOL} clips")
        with torch.no_grad():
            pieces = [vae.encode(render(drawn[i : i + 64], 1 + TIME * FRAMES)).bfloat16() for i in range(0, POOL, 64)]
        run.save("latents", {"latents": torch.cat(pieces)})
    run.wait()
    return drawn, run.load("latents")["latents"]


def draw_batch(pool: tuple[Clips, Tensor], size: int, generator: torch.Generator) -> tuple[Tensor, list[str]]:
    """Random clips: latents [B, C, FRAMES + 1, H, W] float32 and captions, "" where the caption is dropped."""
    clips, latents = pool
    rows = torch.randint(len(clips), (size,), generator=generator)
    dropped = (torch.rand(size, generator=generator) < DROPPED_CAPTIONS).tolist()
    captions = caption(clips[rows], generator)
    return latents[rows].float(), ["" if d else c for d, c in zip(dropped, captions, strict=True)]


def embed(text: TinyTextEncoder, captions: list[str]) -> Tensor:
    """Captions -> embeddings with gradient [B, text_len, text_dim]; "" becomes the null embedding."""
    rows = torch.full((len(captions), TEXT_LEN), -1)
    named = [i for i, c in enumerate(captions) if c]
    rows[named] = text.batch([captions[i] for i in named])
    return text(rows)


def random_sigmas(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Noise levels spread as sampling visits them: uniform, then shifted towards noise."""
    u = torch.rand(shape, generator=generator)
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def teacher_loss(predict: Velocity, x0: Tensor, embeds: Tensor, attend: Attend, generator: torch.Generator) -> Tensor:
    """Flow matching on whole clips [B, C, F, H, W], one noise level a clip."""
    sigma = random_sigmas((len(x0), 1), generator).expand(-1, x0.shape[2])  # [B, F]
    noise = torch.randn(x0.shape, generator=generator)
    noisy = add_noise(x0, noise, sigma[:, None, :, None, None])
    return (predict(noisy, 1000 * sigma, embeds, attend) - (noise - x0)).square().mean()


def causal_loss(predict: Velocity, clips: Tensor, embeds: Tensor, attend: Attend, generator: torch.Generator) -> Tensor:
    """Teacher forcing on clips [B, C, FRAMES + 1, H, W]: clean and noisy frames side by side, one noise level a chunk.

    `attend` has `teacher_forcing`'s mask. Half the clips lose their first frame, the still, and look like a window
    later in a video; their first chunk does not count, because a first chunk always begins with a still.
    """
    late = torch.rand(len(clips), generator=generator) < 0.5
    x0 = torch.where(late[:, None, None, None, None], clips[:, :, 1:], clips[:, :, :-1])
    sigma = random_sigmas((len(x0), FRAMES // CHUNK), generator).repeat_interleave(CHUNK, 1)  # [B, F]
    noise = torch.randn(x0.shape, generator=generator)
    noisy = add_noise(x0, noise, sigma[:, None, :, None, None])
    t = torch.cat([torch.zeros_like(sigma), 1000 * sigma], 1)
    guess = predict(torch.cat([x0, noisy], 2), t, embeds, attend)[:, :, FRAMES:]
    error = (guess - (noise - x0)).square().mean((1, 3, 4))  # [B, F]
    counts = (~late[:, None] | (torch.arange(FRAMES) >= CHUNK)).float()
    return (error * counts).sum() / counts.sum()


def bidirectional(config: WanConfig, frames: int) -> Sequence:
    return Sequence(config, range(frames), LATENT, LATENT, attention=plain_attention)


def teacher_forcing(config: WanConfig, frames: int) -> Sequence:
    """Attention over [clean frames, noisy frames], both at positions 0..frames-1."""
    causal = block_causal_mask([CHUNK] * (frames // CHUNK), config.tokens_per_frame(LATENT, LATENT))
    own = torch.block_diag(*torch.ones(frames // CHUNK, CHUNK, CHUNK)).bool()
    own = own.repeat_interleave(causal.shape[0] // frames, 0).repeat_interleave(causal.shape[0] // frames, 1)
    mask = torch.cat([torch.cat([causal, torch.zeros_like(causal)], 1), torch.cat([causal & ~own, own], 1)])
    return Sequence(config, [*range(frames), *range(frames)], LATENT, LATENT, mask=mask, attention=plain_attention)


def new_models(seed: int) -> tuple[WanModel, TinyTextEncoder]:
    torch.manual_seed(seed)
    return WanModel(CONFIG).initialise(), TinyTextEncoder(vocabulary())


def load_models(saved: dict) -> tuple[WanModel, TinyTextEncoder]:
    """The DiT and the text encoder out of a stage's checkpoint."""
    models = new_models(0)
    for model, name in zip(models, ("model", "text"), strict=True):
        model.load_state_dict(saved[name])
    return models


class Trainer:
    """A DiT with its text encoder, optimizer, average and random state, as one thing to step, save and restore."""

    def __init__(
        self,
        run: Run,
        stage: str,
        models: tuple[WanModel, TinyTextEncoder],
        rates: tuple[float, float],
        with_text: bool,
    ):
        self.run, self.stage = run, stage
        self.wan, self.text = models
        self.text.requires_grad_(with_text)
        self.optimizer = Optimizer(models, *rates)
        self.averages = [Average(model, 0.998) for model in models]
        self.generator = run.generator(stage)
        self.predict = partial(predict, self.wan)
        self.first = 0
        if run.path(stage).exists():
            self.restore(run.load(stage))

    def step(self, loss: Tensor, progress: float) -> None:
        loss.backward()
        average_gradients(self.optimizer.params)
        self.optimizer.step(progress)
        for average, model in zip(self.averages, (self.wan, self.text), strict=True):
            average.update(model)

    def save(self, done: int) -> None:
        wan, text = self.averages
        live = [self.wan.state_dict(), self.text.state_dict()]
        state = {"model": wan.values, "text": text.values, "live": live, "optimizer": self.optimizer.state_dict()}
        self.run.save(self.stage, {**state, "generator": self.generator.get_state(), "step": done})

    def restore(self, saved: dict) -> None:
        self.first = saved["step"]
        for model, average, live, name in zip(
            (self.wan, self.text), self.averages, saved["live"], ("model", "text"), strict=True
        ):
            model.load_state_dict(live)
            average.values, average.steps = saved[name], self.first
        self.optimizer.load_state_dict(saved["optimizer"])
        self.run.resume(self.generator, saved)


def load_autoencoder(run: Run) -> TinyAutoencoder:
    vae = TinyAutoencoder()
    vae.load_state_dict(run.load("autoencoder")["model"])
    return vae.requires_grad_(False)


def fit_teacher(run: Run, total: int, batch: int, short: float = 0.35) -> None:
    """Stage 2, written to teacher.pt. The first `short` of the steps see the first chunk only, of more clips."""
    pool = clip_pool(run, load_autoencoder(run))
    trainer = Trainer(run, "teacher", new_models(run.seed), (1e-3, 3e-3), with_text=True)
    losses = {}
    for step in steps(run, "teacher", trainer.first, total, losses, trainer.save):
        frames = CHUNK if step < short * total else FRAMES
        x0, captions = draw_batch(pool, batch * FRAMES // frames, trainer.generator)
        attend = bidirectional(CONFIG, frames)
        loss = teacher_loss(
            trainer.predict, x0[:, :, :frames], embed(trainer.text, captions), attend, trainer.generator
        )
        trainer.step(loss, step / total)
        losses["loss"] = loss


def fit_causal(run: Run, total: int, batch: int) -> None:
    """Stage 3, from teacher.pt to causal.pt. A few hundred steps: more lowers this loss and spoils the video."""
    pool = clip_pool(run, load_autoencoder(run))
    trainer = Trainer(run, "causal", load_models(run.load("teacher")), (3e-4, 1e-3), with_text=False)
    attend = teacher_forcing(CONFIG, FRAMES)
    losses = {}
    for step in steps(run, "causal", trainer.first, total, losses, trainer.save):
        clips, captions = draw_batch(pool, batch, trainer.generator)
        loss = causal_loss(trainer.predict, clips, embed(trainer.text, captions), attend, trainer.generator)
        trainer.step(loss, step / total)
        losses["loss"] = loss
