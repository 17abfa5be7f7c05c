"""A rollout of a MODEL: what Self Forcing Sampler, Self Forcing Stream and the SAMPLER have in common."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import comfy.model_management as management
import comfy.sd
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...sf_core.device import console_text
from ...sf_core.memory import MemoryPlan
from ...sf_core.pipeline import Generation
from ...sf_core.sampling.plan import Chunk, Plan, round_up_to_chunks
from ...sf_core.sampling.prompt_text import EncodedPrompt, schedule
from ...sf_core.sampling.prompts import PromptSchedule
from ...sf_core.sampling.rollout import OnStep
from ...sf_core.wan.compile import compile_ops
from ...sf_core.wan.model import Network, WanLayers
from ..inputs import CACHES, RolloutInputs
from .conditioning import read_latents, read_negative, read_prompts, settle_size, still_encoder
from .memory import loaded
from .model import attention_of, family_of, for_compiling, traceable, wan_of
from .patches import (
    cfg_overrides,
    guide_of,
    ignored_conditioning,
    ignored_patches,
    telling_ops,
    transformer_options,
    wants_negative,
)
from .progress import Notes, check_cancelled

REMEDY = "Set cache to fp8 or a smaller window, load the model in fp8, or make a smaller video."

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HostGeneration:
    """A MODEL and all that decides the video it makes.

    model           the MODEL, ready to run: compiled parts need `for_compiling` of it
    plan            size and chunks, in whole chunks; of the last one what is beyond `length` is cut afterwards
    length          latent frames asked for
    prompts         positive prompts with their start times
    negative        embeddings [B, tokens, width] to lead away from; None where nothing does
    prefix, source  latents [B, C, F, H, W] in model space; see `rollout`
    unheard         what is in the prompts and has no effect, in lines for people
    """

    model: ModelPatcher
    plan: Plan
    length: int
    prompts: list[EncodedPrompt]
    seed: int
    negative: Tensor | None = None
    guidance: float = 1.0
    prefix: Tensor | None = None
    source: Tensor | None = None
    compile: str = "off"
    unheard: tuple[str, ...] = ()

    @property
    def wan(self) -> WanLayers:
        """The layers as they are now: loading puts object patches in their places."""
        return wan_of(self.model)

    @cached_property
    def dtype(self) -> torch.dtype:
        return self.model.get_model_object("manual_cast_dtype") or self.model.model.get_dtype()

    @property
    def memory(self) -> MemoryPlan:
        """What it takes of the device, beside the weights."""
        starts = [prompt.start.transition for prompt in self.prompts[1:]]
        rereads = any(map(self.plan.sampling.rereads_at, starts)) or self.reencoder is not None
        return MemoryPlan(
            self.wan.config,
            self.plan,
            self.dtype,
            rereads=rereads,
            guided=self.negative is not None,
            networks=1 if self.memory_model is None else 2,
        )

    @property
    def what(self) -> str:
        """The video, in words for an error."""
        space = self.wan.config.space
        return f"{self.length} latent frames of {space * self.plan.width} x {space * self.plan.height} pixels"

    @property
    def pixels(self) -> int:
        """Pixels of a frame."""
        return self.wan.config.space**2 * self.plan.height * self.plan.width

    @cached_property
    def memory_model(self) -> ModelPatcher | None:
        """The network that writes the cache, where it is another, ready to run like the MODEL."""
        memory = family_of(self.model).memory
        return memory if memory is None or self.compile == "off" else for_compiling(memory)

    @property
    def memory_wan(self) -> WanLayers | None:
        return None if self.memory_model is None else wan_of(self.memory_model)

    @property
    def reencoder(self) -> comfy.sd.VAE | None:
        return family_of(self.model).reencoder

    def chunks(
        self, on_step: OnStep, options: dict | None = None, reserve_bytes: int = 0
    ) -> Iterator[tuple[Chunk, Tensor]]:
        """The rollout, with its model loaded; Cancel is heard at each chunk, those of a prefix too.

        options        model_options in place of the MODEL's own
        reserve_bytes  to keep free for others
        """
        model, compiled = self.model, self.compile != "off"
        options = model.model_options if options is None else options
        prompts = self.schedule(options).to(model.load_device)
        levels = [step.sigma for step in self.plan.steps(self.plan.chunks[-1])]
        sigmas = torch.tensor([*levels, 0.0], device=model.load_device)
        told = transformer_options(options, self.wan.config.layers, sigmas, prompts.is_guided)
        attention, wan, memory = attention_of(told, compiled), self.wan, self.memory_wan
        if compiled:
            wan, memory = traceable(wan), memory and traceable(memory)
        ops = telling_ops(compile_ops(self.compile), attention)
        network = Network(wan, self.dtype, attention, ops, memory=memory)
        use = self.memory.use
        reencode = self.reencoder and still_encoder(model, self.reencoder, use.total - use.cache + reserve_bytes)
        generation = Generation(network, self.plan, prompts, self.seed, self.prefix, self.source, reencode)
        for chunk, x0 in generation.chunks(on_step):
            check_cancelled()
            yield chunk, x0

    def schedule(self, options: dict) -> PromptSchedule:
        """The prompts over time, guided by what functions there are in model_options."""
        timed = schedule(self.prompts, self.plan.chunks, self.negative, self.guidance)
        prompts = [prompt.embeds for prompt in timed.prompts]
        return replace(timed, guide=guide_of(self.model, options, self.guidance, prompts, self.negative))

    def latents(self, on_step: OnStep, options: dict | None = None, first: int = 0) -> Tensor:
        """The whole video from latent frame `first` on, in model space, on ComfyUI's intermediate device."""
        buffer = TailBuffer(self.length, self.length - first, dim=2)
        for _, x0 in self.chunks(on_step, options):
            buffer.append(x0.to(management.intermediate_device()))
        return buffer.tensor

    @property
    def companions(self) -> list[ModelPatcher]:
        """What is loaded beside the MODEL."""
        reencoder = None if self.reencoder is None else self.reencoder.patcher
        return [model for model in (self.memory_model, reencoder) if model is not None]

    @contextmanager
    def loaded(self, reserve_bytes: int = 0, *others: ModelPatcher) -> Iterator[None]:
        """The model on its device, with room for the rollout and `reserve_bytes`, and `others` loaded with it."""
        others = (*others, *self.companions)
        with loaded(self.model, self.memory, reserve_bytes, others):
            yield


class TailBuffer:
    """The last `most` of `total` entries along a dimension, handed in piece by piece, in one tensor made beforehand.

    What comes before these, or after the end, is dropped, so memory is known from the first piece on.
    """

    def __init__(self, total: int, most: int, dim: int) -> None:
        self.first, self.total, self.dim, self.at = total - most, total, dim, 0
        self.tensor: Tensor | None = None

    def append(self, piece: Tensor) -> None:
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


def prepare_generation(given: RolloutInputs, seed: int | None = None) -> HostGeneration:
    """A generation from what a node is given; `seed` in the place of the node's. Raises ValueError for what does not
    go together.
    """
    model = given.model if given.compile == "off" else for_compiling(given.model)
    wan = wan_of(model)
    own, space = family_of(given.model).size, wan.config.space
    samples = read_latents(settle_size(given.latent, given.prefix, own, space), wan)
    refuse_mask(given.latent.get("noise_mask"))
    batch, _, length, height, width = samples.shape
    into = model.model.process_latent_in
    prefix = None if given.prefix is None else into(read_latents(given.prefix, wan, "prefix"))
    source = None
    if given.denoise != 1:
        source = into(require_content(samples, f"denoise {given.denoise:g}", "set denoise to 1"))
    sampling = given.sampling(family_of(given.model).sampling)
    begun = 0 if prefix is None else prefix.shape[2]
    frames = round_up_to_chunks(length, sampling, begun)
    full_history, cache_dtype = given.history == "all", CACHES[given.cache]
    plan = Plan(sampling, frames, height, width, batch, begun, full_history, given.denoise, cache_dtype)
    negative = negative_for(model, model.model_options, given.cfg, given.negative, batch)
    return HostGeneration(
        model, plan, length,
        read_prompts(given.positive, batch, sampling.shots is not None),
        given.seed if seed is None else seed,
        negative, given.cfg,
        prefix=repeat_to_batch(prefix, batch),
        source=pad_to_length(repeat_to_batch(source, batch), frames),
        compile=given.compile,
        unheard=tuple(ignored_conditioning(positive=given.positive, negative=given.negative)),
    )  # fmt: skip


def negative_for(
    model: ModelPatcher, options: dict, cfg: float, conditioning: list | None, batch: int
) -> Tensor | None:
    """Embeddings [B, tokens, width] of the negative prompt; None where neither cfg nor what is on the MODEL, with its
    model_options, asks for one.

    Raises ValueError where cfg does and there is none.
    """
    at_1 = bool(conditioning) and (wants_negative(options) or bool(cfg_overrides(model, options)))
    return read_negative(conditioning, batch) if cfg != 1 or at_1 else None


def repeat_to_batch(latents: Tensor | None, batch: int) -> Tensor | None:
    """Latents [B, C, F, H, W] for so many videos, the first ones again where there are fewer; None of None."""
    return None if latents is None else comfy.utils.repeat_to_batch_size(latents, batch)


def pad_to_length(latents: Tensor | None, frames: int) -> Tensor | None:
    """Latents [B, C, F, H, W] with the last one repeated up to `frames`: a chunk's end that is cut off in the end."""
    missing = 0 if latents is None else frames - latents.shape[2]
    return latents if missing <= 0 else torch.cat((latents, latents[:, :, -1:].expand(-1, -1, missing, -1, -1)), 2)


def require_content(samples: Tensor | None, got: str, otherwise: str) -> Tensor:
    """The clip in a latent. Raises ValueError, with what was `got` and what to do `otherwise`, if there is none."""
    if samples is None or not samples.any():
        raise ValueError(
            f"Got {got} with an empty latent; below 1 there must be a clip in it to make another of. Connect VAE "
            f"Encode, or {otherwise}."
        )
    return samples


def refuse_mask(mask: Tensor | None) -> None:
    """Raises ValueError for a noise mask."""
    if mask is not None:
        raise ValueError(
            "Got a latent with a noise mask; a rollout makes whole frames. Remove the mask, and use prefix to keep "
            "frames at the beginning."
        )


def chunk_warning(generation: HostGeneration) -> str | None:
    """Why the chunk that was asked for will not look good, where it is not the one that the model was trained with."""
    family = family_of(generation.model)
    asked, trained = generation.plan.sampling.chunk, family.trained or family.sampling.chunk
    if asked == trained:
        return None
    reason = (
        "each chunk then lacks the frames beside it that the model has learnt to rely on, and frames flicker"
        if asked < trained
        else "the model has never denoised so many frames at once, and they drift apart"
    )
    return f"chunk {asked}, but this model was trained with chunks of {trained}: {reason}. 0 takes the model's own."


def shift_warning(generation: HostGeneration) -> str | None:
    """Why a node that sets the shift for stock samplers changes nothing, where there is one."""
    if "model_sampling" not in generation.model.object_patches:
        return None
    return "the shift of ModelSamplingSD3 (or its like) does nothing here. Set it in Self Forcing Settings."


def size_warning(generation: HostGeneration) -> str | None:
    """Why the video will not look as hoped for, where the model draws well at one size only and this is another."""
    family, plan, space = family_of(generation.model), generation.plan, generation.wan.config.space
    (width, height), asked = family.size, (space * plan.width, space * plan.height)
    if not family.only_size or width * height / 2 <= asked[0] * asked[1] <= 2 * width * height:
        return None
    return (
        f"{asked[0]} x {asked[1]} pixels, but this model was made for {width} x {height} and draws many small shapes "
        f"on larger pictures. Set width to {width} and height to {height} in Self Forcing Latent."
    )


def reencode_warning(generation: HostGeneration) -> str | None:
    """Why long videos will drift, where a model that is sampled with first-frame re-encode has no VAE for it."""
    if not generation.plan.sampling.reencode or generation.reencoder is not None:
        return None
    return (
        "this model reads its memory again for every chunk, with its first frame re-encoded, and has no VAE for that. "
        "Connect one to reencode_vae of Self Forcing Settings."
    )


def begin_notes(generation: HostGeneration, node: type, own_steps: bool = True) -> Notes:
    """The node's notes, which begin with what will not go as expected; the log has it, too.

    own_steps  whether the steps are not those of a stock scheduler, which knows the MODEL's shift
    """
    notes = Notes(node)
    ignored = ignored_patches(generation.model, in_guider=not own_steps)
    shift = shift_warning(generation) if own_steps else None
    warnings = (size_warning(generation), chunk_warning(generation), shift, reencode_warning(generation))
    for message in (*warnings, *ignored, *generation.unheard):
        if message:
            log.warning("Self Forcing: %s", console_text(message))
            notes.add(message)
    return notes
