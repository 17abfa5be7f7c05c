"""The rollout: a few latent frames at a time, in a few steps, each chunk attending to what was made before.

    for chunk in plan.chunks:
        context.enter(chunk)            a new prompt, a full window
        x = noise                       (over a source clip, for video to video)
        for each step of the list:
            x0 = denoise x, attending to the window
            x = x0 with fresh noise, less of it     (or what another solver makes of x and x0)
        (the sampler: or several chunks at once, see SAMPLERS)
        yield chunk, x0
        context.append(chunk, x0)       keys and values of the clean chunk enter the cache

A generator: the caller decides how far it goes. Stop asking and everything is freed; raise in `on_step` and it ends
there. Training has a loop of its own over the same `Context` and `denoise` (training/methods/self_rollout.py).
Source: arXiv 2506.08009, algorithm 2; numbers as in guandeh17/Self-Forcing, pipeline/causal_inference.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..wan.model import Network
from .context import Context, Reencode, Unfinished
from .noise import Noise
from .plan import Chunk, Plan
from .prompts import PromptSchedule
from .schedule import Step, add_noise
from .unipc import UniPC


@dataclass(frozen=True)
class Progress:
    """Step `step` of `steps` of a chunk is done; `total` steps are in the whole rollout.

    `x0` is the newest guess [B, C, frames, H, W] in model space.
    """

    chunk: Chunk
    step: int
    steps: int
    total: int
    x0: Tensor


OnStep = Callable[[Progress], None]


def rollout(
    network: Network,
    plan: Plan,
    prompts: PromptSchedule,
    noise: Noise,
    *,
    prefix: Tensor | None = None,
    source: Tensor | None = None,
    reencode: Reencode | None = None,
    on_step: OnStep | None = None,
) -> Iterator[tuple[Chunk, Tensor]]:
    """Generates a video's latents and yields them chunk by chunk, those of the prefix first: (chunk, x0).

    x0 is [B, C, frames, H, W] in model space, float32, on the device of the prompts' embeddings.

    noise     `SeededNoise(seed)`, or noise from elsewhere
    prefix    clean latents [B, C, plan.prefix, H, W] in model space to start from
    source    latents [B, C, plan.frames, H, W] in model space of a video to make another of, as far as plan.strength
    reencode  first-frame re-encode: renews the memory of long videos
    on_step   called after every denoising step; what it raises ends the rollout

    Raises ValueError for shapes that do not fit, at the call and not at the first chunk.
    """
    _check(network, plan, prompts, prefix, source)
    return _generate(network, plan, prompts, noise, prefix, source, reencode, on_step)


@torch.inference_mode()
def _generate(
    network: Network,
    plan: Plan,
    prompts: PromptSchedule,
    noise: Noise,
    prefix: Tensor | None,
    source: Tensor | None,
    reencode: Reencode | None,
    on_step: OnStep | None,
) -> Iterator[tuple[Chunk, Tensor]]:
    context, sample = Context(network, plan, prompts, reencode), SAMPLERS[plan.sampling.sampler]
    for chunk in plan.chunks:
        context.enter(chunk, prefix)
        x0 = context.part(prefix, chunk) if chunk.given else sample(context, noise, source, on_step)
        yield chunk, x0
        context.append(chunk, x0)


def sample_chunk(context: Context, noise: Noise, source: Tensor | None, on_step: OnStep | None) -> Tensor:
    """One chunk after the other: clean latents of the one under way, all its steps at once."""
    chunk = context.chunk
    steps, begin = context.plan.steps(chunk), context.part(source, chunk)
    return denoise(context, steps, context.noise(noise, chunk), begin, on_step)


def sample_rolling(context: Context, noise: Noise, source: Tensor | None, on_step: OnStep | None) -> Tensor:
    """Rolling Forcing: chunks are denoised together, each one step further than the next; one forward finishes one.

    Clean latents of the oldest chunk under way. Source: arXiv 2509.25161.
    """
    ahead, chunks = context.ahead, context.plan.chunks
    while True:
        newest = ahead[-1].chunk.index if ahead else context.chunk.index - 1
        if newest + 1 < len(chunks):
            ahead.append(begin_chunk(context, chunks[newest + 1], noise, source))
        x0s = context.predict_ahead()
        for part, x0 in zip(ahead, x0s):
            part.done += 1
            if part.done < len(part.steps):
                part.x = add_noise(x0, part.noise(part.done), part.step.sigma)
        oldest = ahead[0]
        if on_step is not None:
            total = context.plan.total_steps
            on_step(Progress(oldest.chunk, oldest.done, len(oldest.steps), total, x0s[0]))
        if oldest.done == len(oldest.steps):
            ahead.pop(0)
            return x0s[0]


def begin_chunk(context: Context, chunk: Chunk, noise: Noise, source: Tensor | None) -> Unfinished:
    """A chunk at its first step, from noise or a noised source."""
    steps, draw, begin = context.plan.steps(chunk), context.noise(noise, chunk), context.part(source, chunk)
    return Unfinished(chunk, steps, draw, draw(0) if begin is None else add_noise(begin, draw(0), steps[0].sigma))


SAMPLERS = {"chunks": sample_chunk, "rolling": sample_rolling}


def denoise(
    context: Context,
    steps: tuple[Step, ...],
    noise: Callable[[int], Tensor],
    source: Tensor | None = None,
    on_step: OnStep | None = None,
    gradient: bool = False,
) -> Tensor:
    """Clean latents [B, C, frames, H, W] of the chunk under way, from noise or a noised `source`.

    gradient  whether the last step carries gradient, as training wants it; the cache is then left alone
    """
    x = noise(0) if source is None else add_noise(source, noise(0), steps[0].sigma)
    solve = SOLVERS[context.plan.sampling.solver](steps, noise)
    for i, step in enumerate(steps):
        learns = gradient and i + 1 == len(steps)
        with torch.set_grad_enabled(learns):
            x0 = context.predict(x, step, write=not learns)
        if on_step is not None:
            on_step(Progress(context.chunk, i + 1, len(steps), context.plan.total_steps, x0))
        if i + 1 < len(steps):
            x = solve(i, x, x0)
    return x0


def renoise(steps: tuple[Step, ...], noise: Callable[[int], Tensor]) -> Solver:
    """The few-step sampler: the guess of the clean latents, with fresh noise of the next level."""
    return lambda i, x, x0: add_noise(x0, noise(i + 1), steps[i + 1].sigma)


def unipc(steps: tuple[Step, ...], noise: Callable[[int], Tensor]) -> Solver:
    """UniPC, which draws no noise but the first."""
    return UniPC(steps)


Solver = Callable[[int, Tensor, Tensor], Tensor]
"""(i, x_t, guess of the clean latents) at step i -> x_t at step i + 1."""

SOLVERS = {"renoise": renoise, "unipc": unipc}


def _check(network: Network, plan: Plan, prompts: PromptSchedule, prefix: Tensor | None, source: Tensor | None) -> None:
    """Raises ValueError for prompts and latents of another shape than planned."""
    channels, size = network.config.channels, f"{plan.height}, {plan.width}"
    if prompts.batch != plan.batch:
        raise ValueError(
            f"Got prompts for {prompts.batch} videos; {plan.batch} are planned. Give each video its prompt."
        )
    needed = (plan.batch, channels, plan.prefix, plan.height, plan.width)
    if plan.prefix and (prefix is None or prefix.shape != needed) or prefix is not None and not plan.prefix:
        got = "no prefix" if prefix is None else f"a prefix of shape {list(prefix.shape)}"
        raise ValueError(
            f"Got {got}; this rollout needs [{plan.batch}, {channels}, {plan.prefix} frames, {size}]. Encode the image "
            "or clip at the video's size and batch."
        )
    needed = (plan.batch, channels, plan.frames, plan.height, plan.width)
    if source is not None and source.shape != needed:
        raise ValueError(
            f"Got a source of shape {list(source.shape)}; this rollout needs {list(needed)}. Encode the clip at the "
            "video's size, length and batch."
        )
    if source is None and plan.strength < 1:
        raise ValueError(
            f"Got strength {plan.strength:g} without a source; below 1 there must be a video to make another of. Give "
            "its latents, or set strength to 1."
        )
