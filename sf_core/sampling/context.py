"""What a rollout remembers: KV cache, prompt and newest latents. All that lives across chunks is here, and only here.

context = Context(network, plan, prompts)
context.enter(chunk)              a new prompt takes over; a full window is made room in
context.predict(x, step)          x_t -> x0, attending to the window
context.append(chunk, x0)         what later chunks attend to
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..device import upload
from ..wan.bank import Bank, MemoryBank
from ..wan.cache import CachedAttention, CacheShape, RollingCache
from ..wan.config import WanConfig
from ..wan.model import Network, PromptKV
from ..wan.shot_cache import ShotCache
from .noise import Noise
from .plan import Chunk, Plan
from .prompts import PromptSchedule, pad_to_longer
from .schedule import Step, x0_from_velocity

Reencode = Callable[[Tensor], Tensor]
"""First-frame re-encode: latents [B, C, F, H, W] -> the latent [B, C, 1, H, W] of a still of their last picture.

A model trained on short clips has always seen a still, one frame and not four, at the beginning of its window. With
this, whenever the window is full, its newest half is read again as a clip of its own that begins with a still, as the
long-video script of CausVid (tianweiy/CausVid) does.
"""


class Context:
    """KV cache, prompt and history of one rollout. `device` is that of the prompts; latents are float32 there."""

    def __init__(self, network: Network, plan: Plan, prompts: PromptSchedule, reencode: Reencode | None = None) -> None:
        self.network, self.plan, self.prompts, self.reencode = network, plan, prompts, reencode
        self.device = prompts.device
        self.cache = allocate_cache(
            network.config, plan, plan.cache_dtype or network.dtype, self.device, prompts.branches,
            keeps_all=network.ops.recomputes,
        )  # fmt: skip
        rereads = any(plan.sampling.rereads_at(prompt.transition) for prompt in prompts.prompts[1:])
        self.history = History(self.cache.slots if rereads or reencode else 0)
        self.bank = make_bank(self.cache, plan.sampling.bank, prompts)
        self.prompt: PromptKV | None = None
        self.written_prompt: PromptKV | None = None  # the same, of the network that writes the cache
        self.ahead: list[Unfinished] = []  # chunks under way, the oldest first, where several are denoised together
        self.chunk: Chunk | None = None  # the one under way
        self.attend: CachedAttention | None = None  # its self-attention
        self.held: Tensor | None = None  # its first frames [B, C, held, H, W], where a prefix gives them
        self._followed: tuple[int, float] | None = None

    def enter(self, chunk: Chunk, prefix: Tensor | None = None) -> None:
        """Begins a chunk: its prompt is encoded where it is a new one, and the cache brought in line with it.

        prefix  latents [B, C, F, H, W] of which the chunk may hold some
        """
        self.chunk = chunk
        self.held = self.part(prefix, chunk)[:, :, : chunk.held] if chunk.held else None
        transition = self._follow_prompt(chunk.start)
        if not chunk.cached:
            return
        if self.bank:
            self.bank.admit(self.prompt.keys)
        if transition:
            self.apply_transition(transition, chunk.start)
        if self.reencode and chunk.end > self.cache.first + self.cache.slots:
            self.reencode_window(chunk.start)
        self.attend = None if self.plan.is_rolling else self._attention(chunk.start, chunk.frames)

    def predict(self, x: Tensor, step: Step, write: bool = True) -> Tensor:
        """Clean latents x0 [B, C, frames, H, W] that the model sees in x at a step, with guidance.

        write  whether the chunk's keys and values go into the cache; not where they carry gradient
        """
        timestep, attend = step.timestep, self.attend if write else self.attend.read_only()
        if self.held is not None:
            x, timestep = self.hold(x), self.hold_timestep(timestep)
        x0 = self._guided_x0(x, self._velocity(self.network, x, timestep, self.prompt, attend), step)
        return x0 if self.held is None else self.hold(x0)

    def hold(self, x: Tensor) -> Tensor:
        """Latents of the chunk under way with the frames in place that a prefix gives."""
        return torch.cat((self.held, x[:, :, self.chunk.held :]), dim=2)

    def hold_timestep(self, timestep: float) -> Tensor:
        """A timestep for each frame, [1, F]: 0 for those that are held."""
        held = self.chunk.held
        return torch.tensor([[0.0] * held + [timestep] * (self.chunk.frames - held)], dtype=torch.float64)

    def predict_ahead(self) -> list[Tensor]:
        """Clean latents x0 of all chunks under way, seen in one forward in which each has its own timestep."""
        x, steps = torch.cat([part.x for part in self.ahead], 2), [part.step for part in self.ahead]
        sizes = [part.chunk.frames for part in self.ahead]
        times = [step.timestep for step, frames in zip(steps, sizes) for _ in range(frames)]
        timesteps = torch.tensor([times], dtype=torch.float64)  # [1, F]
        attend = self.cache.ahead(self.chunk.start, sum(sizes), self.network.attention)
        v = self._velocity(self.network, x, timesteps, self.prompt, attend)
        return [
            self._guided_x0(part.x, velocity, part.step) for part, velocity in zip(self.ahead, v.split(sizes, dim=2))
        ]

    def _guided_x0(self, x: Tensor, v: Tensor, step: Step) -> Tensor:
        """x0 [B, C, frames, H, W] of latents and the velocities of all branches, with guidance."""
        positive, negative = v.chunk(2) if self.prompts.is_guided else (v, None)
        if self.prompts.guide is not None:
            of_negative = None if negative is None else x0_from_velocity(x, negative, step.sigma)
            return self.prompts.guide(x, x0_from_velocity(x, positive, step.sigma), of_negative, step)
        if negative is not None:
            v = torch.lerp(negative, positive, self.prompts.guidance)
        return x0_from_velocity(x, v, step.sigma)

    def append(self, chunk: Chunk, x0: Tensor) -> None:
        """Ends a chunk: its clean latents are what later chunks attend to.

        The last chunk's keys and values would never be read, and those of a prefix beyond the window are not.
        """
        self.history.append(x0)
        if not chunk.cached:
            self.cache.cut(chunk.end)
        elif not chunk.is_last:
            is_clean = chunk.given and not self.plan.full_history
            attend = self.cache.finish(self.attend or self._attention(chunk.start, chunk.frames))
            self._commit(x0, 0.0 if is_clean else self.plan.sampling.context_noise, attend)
            if self.bank:
                self.bank.record(chunk.index, chunk.start)

    def noise(self, noise: Noise, chunk: Chunk) -> Callable[[int], Tensor]:
        """step -> noise [B, C, frames, H, W] of a chunk, on the device."""
        shape = (self.plan.batch, self.network.config.channels, self.plan.height, self.plan.width)
        return lambda step: upload(noise(chunk.start, chunk.frames, step, shape).float(), self.device)

    def part(self, latents: Tensor | None, chunk: Chunk) -> Tensor | None:
        """The frames of a chunk out of latents [B, C, F, H, W] of the whole video; None of None."""
        return None if latents is None else upload(latents[:, :, chunk.start : chunk.end].float(), self.device)

    def apply_transition(self, transition: str, frame: int) -> None:
        """Brings the cache in line with a prompt that starts at `frame`; see prompts.py."""
        sampling = self.plan.sampling
        if transition == "cut" and self.plan.sink > sampling.chunk and not sampling.shots:
            self.cache.restart(frame)  # a deep sink is half of what the model sees: the new scene makes its own
        elif transition == "cut":
            self.cache.begin_shot(frame)
        if not sampling.rereads_at(transition):
            return
        latents, cache = self.history.latents, self.cache
        if transition == "renew":
            cache.restart(frame - latents.shape[2])
        elif frame - latents.shape[2] > cache.first:
            latents = latents[:, :, -cache.ring :]  # sinks stay: what they hold is older, and no slot is left for more
        self._reread(latents, frame)

    def reencode_window(self, frame: int) -> None:
        """Makes a clip of its own of the newest frames before `frame`: about half of the window, in whole chunks."""
        latents, chunk = self.history.latents, self.plan.sampling.chunk
        half = chunk * max(1, (self.cache.slots - chunk) // (2 * chunk))
        kept = min(half, latents.shape[2])
        still = self.reencode(latents[:, :, : latents.shape[2] - kept + 1])
        self.cache.restart(frame - kept)
        self._reread(torch.cat((still, latents[:, :, -kept:][:, :, 1:]), dim=2), frame)

    def _follow_prompt(self, frame: int) -> str | None:
        """Encodes the prompt of a chunk that starts at `frame`; the transition where another prompt begins."""
        before = self._followed
        begins = before is not None and self.prompts.number_at(frame) != before[0]
        followed, embeds = self.prompts.embeds_at(frame, begins)
        self._followed = followed
        if followed != before:
            branches = pad_to_longer(embeds, self.prompts.negative) if self.prompts.is_guided else (embeds,)
            embeds = torch.cat(branches) if len(branches) > 1 else embeds
            self.prompt = self.written_prompt = self.network.encode_prompt(embeds)
            if self.network.memory is not None:
                self.written_prompt = self.network.writer.encode_prompt(embeds)
        return self.prompts.prompts[followed[0]].transition if begins else None

    def _reread(self, latents: Tensor, frame: int) -> None:
        """Writes the frames before `frame` into the cache anew, in one forward."""
        frames = latents.shape[2]
        self._commit(latents, self.plan.sampling.context_noise, self._attention(frame - frames, frames))

    @torch.no_grad()
    def _commit(self, x0: Tensor, timestep: float, attend: CachedAttention) -> None:
        """Overwrites the keys and values of frames with those of their clean latents."""
        self._velocity(self.network.writer, x0, timestep, self.written_prompt, attend)

    def _velocity(
        self, network: Network, x: Tensor, timestep: float | Tensor, prompt: PromptKV, attend: CachedAttention
    ) -> Tensor:
        branches = torch.cat((x, x)) if self.prompts.is_guided else x
        return network.velocity(branches, timestep, prompt, attend)

    def _attention(self, start: int, frames: int) -> CachedAttention:
        view = self.cache.newest if self.plan.is_rolling else self.cache.chunk
        return view(start, frames, self.network.attention)


@dataclass
class Unfinished:
    """A chunk under way, one of several that are denoised together.

    steps  all that it takes; `done` of them are
    noise  step -> noise [B, C, frames, H, W]
    x      latents [B, C, frames, H, W] at the noise level of its next step
    """

    chunk: Chunk
    steps: tuple[Step, ...]
    noise: Callable[[int], Tensor]
    x: Tensor
    done: int = 0

    @property
    def step(self) -> Step:
        return self.steps[self.done]


class History:
    """The newest finished latents [B, C, <= most, H, W], for whatever has to read them again."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.latents: Tensor | None = None

    def append(self, x0: Tensor) -> None:
        if self.most:
            joined = x0 if self.latents is None else torch.cat((self.latents, x0), dim=2)
            self.latents = joined[:, :, -self.most :]


def make_bank(cache: RollingCache, bank: Bank | None, prompts: PromptSchedule) -> MemoryBank | None:
    """The memory bank in a cache, where there is to be one."""
    if bank is None:
        return None
    every_chunk = len(prompts.prompts) == 1 if bank.every_chunk is None else bank.every_chunk
    return MemoryBank(cache, bank, every_chunk)


def allocate_cache(
    config: WanConfig,
    plan: Plan,
    dtype: torch.dtype,
    device: torch.device | str,
    branches: int = 1,
    keeps_all: bool = False,
) -> RollingCache:
    """The KV cache that a plan needs; never larger than the video.

    branches   2 with guidance
    keeps_all  nothing is overwritten, so that a chunk's forward can be run again after later chunks. Raises ValueError
               for that with pinned sinks, whose keys move.
    """
    sampling = plan.sampling
    if keeps_all and (sampling.bank or sampling.sink_decay < 1 or plan.is_rolling):
        raise ValueError(
            "Got a memory bank, a sink decay or the rolling sampler with gradient checkpointing; what they keep "
            "changes before the backward pass reads it again. Turn off one of the two."
        )
    if keeps_all and sampling.pinned and sampling.sink:
        raise ValueError(
            "Got pinned sinks with gradient checkpointing; their keys move on before the backward pass reads them "
            "again. Turn off one of the two."
        )
    if keeps_all and sampling.shots:
        raise ValueError(
            "Got a model of several shots with gradient checkpointing; what its window holds changes before the "
            "backward pass reads it again. Turn off gradient checkpointing."
        )
    slots = plan.frames if keeps_all else plan.slots
    banked, chosen = (sampling.bank.frames, sampling.bank.selected) if sampling.bank else (0, None)
    shape = CacheShape(
        plan.batch * branches, plan.height, plan.width, slots, plan.sink, sampling.pinned, plan.window,
        plan.gap, sampling.sink_decay, banked, chosen, sampling.rope_jitter,
    )  # fmt: skip
    if sampling.shots:
        return ShotCache(config, shape, sampling.shots, dtype, device)
    return RollingCache(config, shape, dtype, device)
