"""The rollout: a few latent frames at a time, in a few steps, each chunk attending to what was made before.

    for chunk in chunks:
        at a new prompt: renew what was remembered
        x = noise                       (over a source clip, for video to video)
        for each step of the list:
            x0 = denoise x, seeing the window
            x = x0 with fresh noise, less of it
        yield x0
        commit x0 to the cache          (the last chunk's keys would never be read)

A generator: the caller decides how far it goes. Stop asking and everything is freed; raise in `on_step` and it ends
there.

Training rolls out by the same loop. A `Course` per chunk says how many steps are taken, which of them carries gradient,
and how noisy the context is; gradients never pass from one chunk to another.
Source: arXiv 2506.08009, algorithm 2; numbers as in guandeh17/Self-Forcing, pipeline/causal_inference.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ..device import upload
from ..wan.attention import Attention, sdpa
from ..wan.cache import ChunkAttention, RollingCache
from ..wan.model import EAGER, Stages, Text, Wan, encode_text, velocity
from .config import Sampling
from .noise import Noise
from .prompts import REREADING, Cue, Script, padded_alike
from .schedule import Step, add_noise, x0_from_velocity


@dataclass(frozen=True)
class Span:
    """Frames start .. start + frames - 1, generated or `given` by a prefix; only what is `read` enters the cache."""

    index: int
    start: int
    frames: int
    given: bool
    is_last: bool
    read: bool = True

    @property
    def end(self) -> int:
        return self.start + self.frames


@dataclass(frozen=True)
class Chunk:
    """A finished chunk: clean latents [B, C, frames, H, W] in model space, float32."""

    span: Span
    latents: Tensor


@dataclass(frozen=True)
class Progress:
    """One step is done: number 1..steps of its chunk, of `total` in the whole rollout (commits are not counted).

    `x0` is the newest guess [B, C, frames, H, W].
    """

    span: Span
    step: int
    steps: int
    total: int
    x0: Tensor


@dataclass(frozen=True)
class Course:
    """How a chunk is gone through.

    steps          steps of its list that are taken; None: all
    gradient       whether the last of them carries gradient
    context_sigma  noise level 0..1 of the latents that enter the cache
    context        latents [B, C, frames, H, W] that enter it in the place of what was made (teacher forcing)
    """

    steps: int | None = None
    gradient: bool = False
    context_sigma: float = 0.0
    context: Tensor | None = None


def every_step(span: Span) -> Course:
    """The course of a rollout that is not trained."""
    return Course()


def plan_spans(frames: int, sampling: Sampling, prefix: int = 0, whole_prefix: bool = False) -> list[Span]:
    """Cuts `frames` latent frames, of which the first `prefix` are given, into the chunks of a rollout.

    A prefix is fed in chunks too, the odd one first (one image: 1, n, n, ...). Where it is longer than the window only
    what the first new chunk will see is read, or all of it with `whole_prefix`. The last chunk may be shorter. Raises
    ValueError when nothing is left to generate.
    """
    _check_length(frames, prefix)
    n = sampling.chunk
    sizes = [size for size in (prefix % n, *[n] * (prefix // n)) if size]
    given = len(sizes)
    left = frames - prefix
    while left:
        first = sampling.first_chunk if not sizes and sampling.first_chunk else n
        sizes.append(min(first, left))
        left -= sizes[-1]
    seen = 0 if whole_prefix else _first_seen(prefix, sampling)
    last = len(sizes) - 1
    return [
        Span(i, start, size, i < given, i == last, start + size > seen or start < sampling.sink)
        for i, (start, size) in enumerate(zip(accumulate(sizes, initial=0), sizes))
    ]


def _first_seen(prefix: int, sampling: Sampling) -> int:
    """The oldest frame of a prefix, sinks aside, that the first new chunk sees; 0 where the window holds the prefix."""
    if sampling.window is None or prefix <= sampling.window:
        return 0
    return prefix - (sampling.window - sampling.sink - sampling.chunk)


def whole_chunks(frames: int, sampling: Sampling, prefix: int = 0) -> int:
    """Latent frames rounded up so that the last chunk is a full one, as the model was trained."""
    _check_length(frames, prefix)
    first = sampling.chunk if prefix else sampling.first_chunk or sampling.chunk
    beyond = max(0, frames - prefix - first)
    return prefix + first + -(-beyond // sampling.chunk) * sampling.chunk


def _check_length(frames: int, prefix: int) -> None:
    if not 0 <= prefix < frames:
        raise ValueError(
            f"Got {frames} latent frames in all with a prefix of {prefix}; at least one frame must be left to make. "
            f"Ask for {prefix + 1} latent frames ({4 * prefix + 1} frames of video) or more, or give a shorter prefix."
        )


@dataclass(frozen=True)
class Denoiser:
    """A model with the prompt it follows and the numbers it computes in: x_t -> x0.

    With guidance other than 1 `text` holds the prompts of the batch and then the negative ones; both run side by side,
    each with its own half of the cache: v = negative + guidance (positive - negative).
    """

    wan: Wan
    text: Text
    dtype: torch.dtype
    guidance: float = 1.0
    stages: Stages = EAGER

    def x0(self, x: Tensor, timestep: float, sigma: float, attend: ChunkAttention) -> Tensor:
        v = self._velocity(x, timestep, attend).float()
        if self.guidance != 1:
            positive, negative = v.chunk(2)
            v = torch.lerp(negative, positive, self.guidance)
        return x0_from_velocity(x, v, sigma)

    @torch.no_grad()
    def commit(self, x0: Tensor, timestep: float, attend: ChunkAttention) -> None:
        """Overwrites the keys and values of frames with those of their clean latents."""
        self._velocity(x0, timestep, attend)

    def _velocity(self, x: Tensor, timestep: float, attend: ChunkAttention) -> Tensor:
        x = x.to(self.dtype)
        both = x if self.guidance == 1 else torch.cat((x, x))
        return self.stages.enter(velocity, self.wan, both, timestep, self.text, attend, self.stages)


def rollout(
    wan: Wan,
    sampling: Sampling,
    prompt: Tensor | Sequence[Cue],
    noise: Noise,
    frames: int,
    height: int,
    width: int,
    prefix: Tensor | None = None,
    whole_prefix: bool = False,
    source: Tensor | None = None,
    strength: float = 1.0,
    negative: Tensor | None = None,
    guidance: float = 1.0,
    reencode: Reencode | None = None,
    dtype: torch.dtype | None = None,
    cache_dtype: torch.dtype | None = None,
    attention: Attention = sdpa,
    stages: Stages = EAGER,
    on_step: Callable[[Progress], None] | None = None,
    course: Callable[[Span], Course] | None = None,
) -> Iterator[Chunk]:
    """Generates `frames` latent frames and yields them chunk by chunk, those of the prefix first.

    prompt         embeddings [B, <= text_len, text_dim] on the device to compute on, or cues that follow each other
    noise          `SeededNoise(seed)`, or recorded noise
    height, width  latent size, even (8 latent pixels are 64 pixels)
    prefix         clean latents [B, C, P, H, W] in model space to start from; P < frames
    whole_prefix   the prefix is a video that was generated, and goes on as if it had never stopped: all of it is read,
                   however long, at the context noise of generated frames
    source         latents [B, C, frames, H, W] in model space of a video to make another of
    strength       how much of the source gives way to noise before it is denoised, in (0, 1]; 1: all of it
    negative       embeddings [B, tokens, text_dim] to steer away from, where `guidance` (CFG) is not 1; that doubles
                   the work and the cache
    reencode       see `Reencode`: renews the memory of long videos
    dtype          dtype to compute in; that of the prompt by default. Latents stay float32 between steps
    cache_dtype    dtype of the cache; `dtype` by default, torch.float8_e4m3fn for half the memory of bfloat16
    attention      the attention kernel; `stages` from `compile_stages` for compiled blocks
    on_step        called after every forward of a step; what it raises ends the rollout
    course         for training: how each chunk is gone through. With it, and only then, latents may carry gradient

    Raises ValueError for sizes that do not fit, at the call and not at the first chunk.
    """
    script = Script.of(prompt)
    first, config = script.cues[0].embeds, wan.config
    batch, device, dtype = len(first), first.device, dtype or first.dtype
    _check_size(height, width)
    if prefix is not None:
        _check_prefix(prefix, (batch, config.channels, height, width))
    if source is not None:
        _check_source(source, (batch, config.channels, frames, height, width))
    if not 0 < strength <= 1:
        raise ValueError(f"Got strength {strength:g}; it is above 0 and at most 1, which replaces all of the source.")
    _check_guidance(guidance, negative, batch)
    spans = plan_spans(frames, sampling, 0 if prefix is None else prefix.shape[2], whole_prefix)
    level = 1.0 if source is None else strength

    def generate() -> Iterator[Chunk]:
        prompted = Prompted(wan, script, negative, guidance, dtype, stages)
        size = {"batch": batch * prompted.branches, "height": height, "width": width}
        size |= {"dtype": cache_dtype or dtype, "device": device, "keep": stages.again}
        cache = RollingCache.for_rollout(config, sampling, frames, **size)
        shape = (batch, config.channels, height, width)
        generated = [span for span in spans if not span.given]
        opening = 0 if whole_prefix else generated[0].start  # where the first chunk's own steps are taken
        total = sum(len(sampling.steps_of(span.start == opening, level)) for span in generated)
        made = Made(cache.slots if script.rereads or reencode else 0)
        for span in spans:
            model, transition = prompted.at(span.start)
            if not span.read:
                x0 = _piece(prefix, span, device)
                yield Chunk(span, x0)
                made.add(x0)
                cache.cut(span.end)
                continue
            if transition:
                switch(model, cache, transition, span.start, made, sampling, attention)
            if reencode and span.end > cache.first + cache.slots:
                refresh(model, cache, span.start, made, sampling, attention, reencode)
            attend = cache.chunk(span.start, span.frames, attention)
            going = (course or every_step)(span)
            draw = _drawing(noise, span, shape, device)
            if span.given:
                x0 = _piece(prefix, span, device)
            else:
                steps, report = sampling.steps_of(span.start == opening, level), _reporter(on_step, span, total)
                begun = None if source is None else _piece(source, span, device)
                x0 = denoise(model, steps, draw, attend, going, report, begun)
            yield Chunk(span, x0)
            made.add(x0)
            if not span.is_last:
                context = x0.detach() if going.context is None else going.context
                if going.context_sigma and not span.given:
                    step = len(sampling.steps_of(span.start == opening))  # a number that no step has
                    context = add_noise(context, draw(step), going.context_sigma)
                as_it_is = span.given and not whole_prefix
                model.commit(context, 0.0 if as_it_is else sampling.context_noise, attend)

    return generate() if course else torch.inference_mode()(generate)()


class Prompted:
    """The model under the prompt that a chunk follows; the prompt is read once, and again only when it changes."""

    def __init__(
        self, wan: Wan, script: Script, negative: Tensor | None, guidance: float, dtype: torch.dtype, stages: Stages
    ) -> None:
        self.wan, self.script, self.negative, self.guidance = wan, script, negative, guidance
        self.dtype, self.stages = dtype, stages
        self.branches = 1 if guidance == 1 else 2
        self.following: tuple[int, float] | None = None
        self.model: Denoiser | None = None

    def at(self, frame: int) -> tuple[Denoiser, str | None]:
        """The model for a chunk from `frame` on, and the transition to make first where another prompt begins."""
        now, embeds = self.script.embeds_at(frame)
        before, self.following = self.following, now
        if now != before:
            self.model = Denoiser(self.wan, self._read(embeds), self.dtype, self.guidance, self.stages)
        begins = before is not None and now[0] != before[0]
        return self.model, self.script.cues[now[0]].transition if begins else None

    def _read(self, embeds: Tensor) -> Text:
        both = embeds if self.branches == 1 else torch.cat(padded_alike(embeds, self.negative))
        return self.stages.enter(encode_text, self.wan, both.to(self.dtype), self.stages)


class Made:
    """The newest finished latents [B, C, <= most, H, W], for whatever has to read them again."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.latents: Tensor | None = None

    def add(self, x0: Tensor) -> None:
        if self.most:
            joined = x0 if self.latents is None else torch.cat((self.latents, x0), dim=2)
            self.latents = joined[:, :, -self.most :]


def _piece(latents: Tensor, span: Span, device: torch.device) -> Tensor:
    """The frames of a chunk out of latents [B, C, F, H, W] of the whole video."""
    return upload(latents[:, :, span.start : span.end].float(), device)


def switch(
    model: Denoiser,
    cache: RollingCache,
    transition: str,
    frame: int,
    made: Made,
    sampling: Sampling,
    attention: Attention,
) -> None:
    """Brings the cache in line with a prompt that starts at `frame`; see prompts.py."""
    if transition == "cut":
        cache.cut(frame)
    if transition not in REREADING:
        return
    latents = made.latents
    if transition == "renew":
        cache.restart(frame - latents.shape[2])
    elif frame - latents.shape[2] > cache.first:
        latents = latents[:, :, -cache.ring :]  # sinks stay: what they hold is older, and there is no slot for more
    start = frame - latents.shape[2]
    model.commit(latents, sampling.context_noise, cache.chunk(start, frame - start, attention))


Reencode = Callable[[Tensor], Tensor]
"""First-frame re-encode: latents [B, C, F, H, W] -> the latent [B, C, 1, H, W] of a still of their last picture.

A model trained on short clips has always seen a still, one frame and not four, at the beginning of its window. With
this, whenever the window is full, its newest half is read again as a clip of its own that begins with a still, as the
long-video script of CausVid (tianweiy/CausVid) does.
"""


def refresh(
    model: Denoiser,
    cache: RollingCache,
    frame: int,
    made: Made,
    sampling: Sampling,
    attention: Attention,
    reencode: Reencode,
) -> None:
    """Makes a clip of its own of the newest frames before `frame`: about half of the window, in whole chunks."""
    half = sampling.chunk * max(1, (cache.slots - sampling.chunk) // (2 * sampling.chunk))
    kept = min(half, made.latents.shape[2])
    newest = made.latents[:, :, -kept:]
    clip = torch.cat((reencode(made.latents[:, :, : made.latents.shape[2] - kept + 1]), newest[:, :, 1:]), dim=2)
    cache.restart(frame - kept)
    model.commit(clip, sampling.context_noise, cache.chunk(frame - kept, kept, attention))


def denoise(
    model: Denoiser,
    steps: tuple[Step, ...],
    draw: Callable[[int], Tensor],
    attend: ChunkAttention,
    course: Course,
    report: Callable[[int, int, Tensor], None],
    source: Tensor | None = None,
) -> Tensor:
    """Clean latents [B, C, frames, H, W] of one chunk, from noise or a noised `source`, through the few-step list."""
    steps = steps[: course.steps]
    x = draw(0) if source is None else add_noise(source, draw(0), steps[0].sigma)
    for i, (timestep, sigma) in enumerate(steps):
        with torch.set_grad_enabled(course.gradient and i + 1 == len(steps)):
            x0 = model.x0(x, timestep, sigma, attend)
        report(i + 1, len(steps), x0)
        if i + 1 < len(steps):
            x = add_noise(x0, draw(i + 1), steps[i + 1].sigma)
    return x0


def _drawing(
    noise: Noise, span: Span, shape: tuple[int, int, int, int], device: torch.device
) -> Callable[[int], Tensor]:
    """Noise [B, C, frames, H, W] of a chunk's steps, on the device."""

    def draw(step: int) -> Tensor:
        return upload(noise(span.start, span.frames, step, shape).float(), device)

    return draw


def _reporter(on_step: Callable[[Progress], None] | None, span: Span, total: int) -> Callable[[int, int, Tensor], None]:
    def report(step: int, steps: int, x0: Tensor) -> None:
        if on_step is not None:
            on_step(Progress(span, step, steps, total, x0))

    return report


def _check_size(height: int, width: int) -> None:
    if height < 2 or width < 2 or height % 2 or width % 2:
        raise ValueError(
            f"Got latents of {height} x {width}; both must be even and at least 2. "
            "Use a height and width in pixels that are multiples of 16."
        )


def _check_source(source: Tensor, shape: tuple[int, ...]) -> None:
    if source.shape != shape:
        raise ValueError(
            f"Got a source of shape {list(source.shape)}; this rollout needs {list(shape)}. Encode the clip at the "
            "video's size, length and batch."
        )


def _check_guidance(guidance: float, negative: Tensor | None, batch: int) -> None:
    if guidance != 1 and (negative is None or len(negative) != batch):
        got = "no negative prompt" if negative is None else f"negative prompts for {len(negative)} videos"
        raise ValueError(
            f"Got guidance {guidance:g} with {got}; guidance needs one for each of {batch}. Give a negative prompt (an "
            "empty one will do), or set guidance to 1, which step-distilled models are made for."
        )


def _check_prefix(prefix: Tensor, shape: tuple[int, int, int, int]) -> None:
    batch, channels, height, width = shape
    if prefix.ndim != 5 or (*prefix.shape[:2], *prefix.shape[3:]) != shape:
        raise ValueError(
            f"Got a prefix of shape {list(prefix.shape)}; this rollout needs "
            f"[{batch}, {channels}, frames, {height}, {width}]. Encode the image or clip at the video's size and batch."
        )
