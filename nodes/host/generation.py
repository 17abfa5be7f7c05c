"""A rollout of a MODEL: what Self Forcing Sampler, Self Forcing Stream and the SAMPLER have in common."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import comfy.model_management as management
import comfy.sd
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...sf_core.sampling.config import Sampling
from ...sf_core.sampling.noise import SeededNoise
from ...sf_core.sampling.prompt_text import Entrance, cues
from ...sf_core.sampling.prompts import REREADING
from ...sf_core.sampling.rollout import Chunk, Progress, plan_spans, rollout, whole_chunks
from ...sf_core.wan.compile import compile_stages
from ...sf_core.wan.model import WanLayers
from .conditioning import latents_of, negative_of, prompts_of, still_of
from .memory import Rollout, loaded
from .model import attention_of, family_of, for_compiling, wan_of
from .progress import Notes, check_cancelled

REMEDY = "Set cache to fp8 or a smaller window, load the model in fp8, or make a smaller video."

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A MODEL and all that decides the video it makes.

    model         the MODEL, ready to run: compiled parts need `for_compiling` of it
    prompts       positive prompts with their entrances, `negative` embeddings [B, tokens, width] for guidance
    shape         [B, C, F, H, W] of the video asked for
    prefix        latents [B or fewer, C, P, H, W] in model space to start with
    source        latents [B, C, F, H, W] in model space to make another video of, as far as `denoise` says
    whole_prefix  see `rollout`
    """

    model: ModelPatcher
    sampling: Sampling
    prompts: list[tuple[Entrance, Tensor]]
    shape: torch.Size
    seed: int
    prefix: Tensor | None = None
    whole_prefix: bool = False
    source: Tensor | None = None
    denoise: float = 1.0
    negative: Tensor | None = None
    cfg: float = 1.0
    cache_dtype: torch.dtype | None = None
    compile: str = "off"

    @cached_property
    def wan(self) -> WanLayers:
        return wan_of(self.model)

    @cached_property
    def dtype(self) -> torch.dtype:
        return self.model.model.get_dtype_inference()

    @property
    def given(self) -> int:
        """Latent frames of the prefix."""
        return 0 if self.prefix is None else self.prefix.shape[2]

    @property
    def total(self) -> int:
        """Latent frames to generate, prefix included: whole chunks, of which the last may be cut afterwards."""
        return whole_chunks(self.shape[2], self.sampling, self.given)

    @property
    def needed(self) -> Rollout:
        """What of the device's memory it takes."""
        batch, _, _, height, width = self.shape
        rereads = any(entrance.transition in REREADING for entrance, _ in self.prompts[1:])
        return Rollout(
            self.wan.config, self.sampling, batch, self.total, height, width, self.dtype, self.cache_dtype,
            rereads or self.reencoder is not None, self.cfg != 1,
        )  # fmt: skip

    @property
    def what(self) -> str:
        """The video, in words for an error."""
        return f"{self.shape[2]} latent frames of {8 * self.shape[4]} x {8 * self.shape[3]} pixels"

    @property
    def reencoder(self) -> comfy.sd.VAE | None:
        return family_of(self.model).reencoder

    def chunks(
        self, on_step: Callable[[Progress], None], options: dict | None = None, beside: int = 0
    ) -> Iterator[Chunk]:
        """The rollout, with its model loaded; Cancel is heard at each chunk, those of a prefix too.

        options  transformer_options in place of the MODEL's own
        beside   bytes to keep free for others
        """
        model, compiled = self.model, self.compile != "off"
        batch, _, _, height, width = self.shape
        device, total = model.load_device, self.total
        spans = plan_spans(total, self.sampling, self.given)
        prompts = cues([(entrance, embeds.to(device)) for entrance, embeds in self.prompts], spans)
        for chunk in rollout(
            self.wan, self.sampling, prompts, SeededNoise(self.seed), total, height, width,
            prefix=self._for_batch(self.prefix),
            whole_prefix=self.whole_prefix,
            source=None if self.source is None else _lengthened(self._for_batch(self.source), total),
            strength=self.denoise,
            negative=None if self.negative is None else self.negative.to(device),
            guidance=self.cfg,
            reencode=self.reencoder and still_of(model, self.reencoder, self.needed.work + beside),
            dtype=self.dtype,
            cache_dtype=self.cache_dtype,
            attention=attention_of(model, compiled, options),
            stages=compile_stages(self.compile),
            on_step=on_step,
        ):  # fmt: skip
            check_cancelled()
            yield chunk

    def _for_batch(self, latents: Tensor | None) -> Tensor | None:
        return None if latents is None else comfy.utils.repeat_to_batch_size(latents, self.shape[0])

    def latents(self, on_step: Callable[[Progress], None], options: dict | None = None, first: int = 0) -> Tensor:
        """The whole video from latent frame `first` on, in model space, on ComfyUI's intermediate device."""
        kept = Kept(self.shape[2], self.shape[2] - first, dim=2)
        for chunk in self.chunks(on_step, options):
            kept.add(chunk.latents.to(management.intermediate_device()))
        return kept.tensor

    @contextmanager
    def loaded(self, beside: int = 0, *others: ModelPatcher) -> Iterator[None]:
        """The model on its device, with room for the rollout and `beside` bytes, and `others` loaded with it."""
        others = (*others, *([] if self.reencoder is None else [self.reencoder.patcher]))
        with loaded(self.model, self.needed, beside, others):
            yield


def _lengthened(latents: Tensor, frames: int) -> Tensor:
    """Latents [B, C, F, H, W] with the last one repeated up to `frames`: a chunk's end that is cut off in the end."""
    missing = frames - latents.shape[2]
    return latents if missing <= 0 else torch.cat((latents, latents[:, :, -1:].expand(-1, -1, missing, -1, -1)), 2)


class Kept:
    """The last `most` of `total` entries along a dimension, handed in piece by piece, in one tensor made beforehand.

    What comes before these, or after the end, is dropped, so memory is known from the first piece on.
    """

    def __init__(self, total: int, most: int, dim: int) -> None:
        self.first, self.total, self.dim, self.at = total - most, total, dim, 0
        self.tensor: Tensor | None = None

    def add(self, piece: Tensor) -> None:
        size = piece.shape[self.dim]
        if self.tensor is None:
            shape = list(piece.shape)
            shape[self.dim] = self.total - self.first
            self.tensor = piece.new_empty(shape)
        low, high = max(self.at, self.first), min(self.at + size, self.total)
        if low < high:
            part = piece.narrow(self.dim, low - self.at, high - low)
            self.tensor.narrow(self.dim, low - self.first, high - low).copy_(part)
        self.at += size


def job_of(
    model: ModelPatcher,
    sampling: Sampling,
    positive: list,
    latent: dict,
    seed: int,
    prefix: dict | None = None,
    history: str = "window",
    denoise: float = 1.0,
    negative: list | None = None,
    cfg: float = 1.0,
    cache_dtype: torch.dtype | None = None,
    compile: str = "off",
) -> Job:
    """A job from what nodes are given. Raises ValueError for what does not go together."""
    model = model if compile == "off" else for_compiling(model)
    wan = wan_of(model)
    samples = latents_of(latent, wan)
    check_mask(latent.get("noise_mask"))
    into = model.model.process_latent_in
    return Job(
        model, sampling, prompts_of(positive, len(samples)), samples.shape, seed,
        prefix=None if prefix is None else into(latents_of(prefix, wan, "prefix")),
        whole_prefix=history == "all",
        source=None if denoise == 1 else into(content_of(samples, f"denoise {denoise:g}", "set denoise to 1")),
        denoise=denoise,
        negative=None if cfg == 1 else negative_of(negative, len(samples)),
        cfg=cfg,
        cache_dtype=cache_dtype,
        compile=compile,
    )  # fmt: skip


def content_of(samples: Tensor | None, got: str, otherwise: str) -> Tensor:
    """The clip in a latent. Raises ValueError, with what was `got` and what to do `otherwise`, if there is none."""
    if samples is None or not samples.any():
        raise ValueError(
            f"Got {got} with an empty latent; below 1 there must be a clip in it to make another of. Connect VAE "
            f"Encode, or {otherwise}."
        )
    return samples


def check_mask(mask: Tensor | None) -> None:
    """Raises ValueError for a noise mask."""
    if mask is not None:
        raise ValueError(
            "Got a latent with a noise mask; a rollout makes whole frames. Remove the mask, and use prefix to keep "
            "frames at the beginning."
        )


def chunk_warning(job: Job) -> str | None:
    """Why the chunk that was asked for will not look good, where it is not the one that the model was trained with."""
    family = family_of(job.model)
    asked, trained = job.sampling.chunk, family.trained or family.sampling.chunk
    if asked == trained:
        return None
    reason = (
        "each chunk then lacks the frames beside it that the model has learnt to rely on, and frames flicker"
        if asked < trained
        else "the model has never denoised so many frames at once, and they drift apart"
    )
    return f"chunk {asked}, but this model was trained with chunks of {trained}: {reason}. 0 takes the model's own."


def shift_warning(job: Job) -> str | None:
    """Why a node that sets the shift for stock samplers changes nothing, where there is one."""
    if "model_sampling" not in job.model.object_patches:
        return None
    return "the shift of ModelSamplingSD3 (or its like) does nothing here. Set it in Self Forcing Settings."


def notes_of(job: Job, node: type, own_steps: bool = True) -> Notes:
    """The node's notes, which begin with what will not go as expected; the log has it, too.

    own_steps  whether the job's steps are not those of a stock scheduler, which knows the MODEL's shift
    """
    notes = Notes(node)
    for message in (chunk_warning(job), shift_warning(job) if own_steps else None):
        if message:
            log.warning("Self Forcing: %s", message)
            notes.add(message)
    return notes
