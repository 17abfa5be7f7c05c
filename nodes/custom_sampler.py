"""For SamplerCustomAdvanced: the rollout as a SAMPLER, and its steps as SIGMAS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from comfy.samplers import CFGGuider, Sampler
from comfy_api.latest import io
from torch import Tensor

from ..sf_core.sampling.config import Sampling
from ..sf_core.sampling.plan import Plan, round_up_to_chunks
from ..sf_core.sampling.rollout import Progress
from . import inputs
from .host.conditioning import read_latents, read_prompts
from .host.generation import (
    REMEDY,
    HostGeneration,
    begin_notes,
    negative_for,
    pad_to_length,
    refuse_mask,
    repeat_to_batch,
    require_content,
)
from .host.memory import load, threads_for, within_memory
from .host.model import family_of, for_compiling, wan_of
from .host.patches import ignored_conditioning
from .host.progress import StepProgress

SIGMAS_FROM_1 = "use sigmas that begin at 1"


class SelfForcingSigmas(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SelfForcingSigmas",
            display_name="Self Forcing Sigmas",
            category=inputs.CATEGORY,
            description="The noise levels of a model's few steps, for SamplerCustomAdvanced.",
            search_aliases=["scheduler", "sigmas", "few step", "schedule"],
            inputs=[
                io.Model.Input("model", tooltip="Model to be sampled; it knows its own steps."),
                inputs.preset(),
                inputs.steps(),
                inputs.denoise(),
            ],
            outputs=[io.Sigmas.Output(tooltip="Sigmas for SamplerCustomAdvanced, with Self Forcing Sampler Select.")],
        )

    @classmethod
    @inputs.check_numbers
    def execute(cls, model, preset, steps, denoise=1.0) -> io.NodeOutput:
        sampling = inputs.change_sampling(family_of(model).sampling, preset, steps)
        levels = [step.sigma for step in sampling.steps_of(False, denoise)]
        return io.NodeOutput(torch.tensor([*levels, 0.0]))


class SelfForcingSamplerSelect(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SelfForcingSamplerSelect",
            display_name="Self Forcing Sampler Select",
            category=inputs.CATEGORY,
            description="The rollout as a SAMPLER, for SamplerCustomAdvanced with RandomNoise, BasicGuider or "
            "CFGGuider, and Self Forcing Sigmas.",
            search_aliases=["ksampler select", "custom sampler", "sampler ar video", "autoregressive sampler"],
            inputs=[
                inputs.chunk(), inputs.window(), inputs.sink(), inputs.prefix(), inputs.cache(),
                inputs.compiled(), inputs.history(),
            ],
            outputs=[io.Sampler.Output(tooltip="Sampler for SamplerCustomAdvanced.")],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    @inputs.check_numbers
    def execute(
        cls, chunk, window, sink, prefix=None, cache=inputs.AUTO, compile="off", history="window"
    ) -> io.NodeOutput:
        return io.NodeOutput(RolloutSampler(chunk, window, sink, prefix, cache, compile, history, cls))


@dataclass(frozen=True)
class RolloutSampler(Sampler):
    """ComfyUI's SAMPLER: the settings of the node that made it, and `sample`."""

    chunk: int
    window: int
    sink: int
    prefix: dict | None
    cache: str
    compile: str
    history: str
    node: type[io.ComfyNode]

    def sample(
        self,
        guider: CFGGuider,
        sigmas: Tensor,
        extra_args: dict,
        callback: Callable | None,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """Latents [B, C, F, H, W] in model space, as a guider asks for them; it has loaded the model.

        Of the noise the seed counts: each latent frame and step has its own, so that the frames are those of Self
        Forcing Sampler.
        """
        refuse_mask(denoise_mask)
        seed = extra_args.get("seed") or 0
        generation = self.prepare(guider, sigmas, seed, noise.shape, latent_image)
        options = extra_args["model_options"]
        begin_notes(generation, self.node, own_steps=False)
        progress = CallbackProgress(None if disable_pbar else callback)

        def sample() -> Tensor:
            load(generation.model, generation.memory, others=generation.companions)
            with threads_for(generation.model, generation.pixels):
                return generation.latents(progress, options)

        latents = within_memory(sample, generation.what, REMEDY)
        if callback is not None:  # ComfyUI's denoised output is what the callback has seen last
            callback(len(sigmas) - 2, latents, latents, len(sigmas) - 1)
        return latents.to(noise.device)

    def prepare(
        self, guider: CFGGuider, sigmas: Tensor, seed: int, shape: torch.Size, latent_image: Tensor | None
    ) -> HostGeneration:
        """The rollout that a guider asks for. Raises ValueError for what it cannot be."""
        sigmas = torch.where(torch.isclose(sigmas, torch.ones_like(sigmas)), 1.0, sigmas)  # schedulers round
        _check_guider(guider)
        model = guider.model_patcher
        model = model if self.compile == "off" else for_compiling(model)
        own = inputs.change_sampling(family_of(model).sampling, chunk=self.chunk, window=self.window, sink=self.sink)
        sampling, wan = at_sigmas(own, sigmas), wan_of(model)
        prefix = None if self.prefix is None else read_latents(self.prefix, wan, "prefix")
        prefix = None if prefix is None else model.model.process_latent_in(prefix)
        source = None
        if sigmas[0] < (own.steps_of(True)[0].sigma if own.solver == "unipc" else 1):  # it begins a little below 1
            source = require_content(latent_image, f"sigmas from {sigmas[0]:g} on", SIGMAS_FROM_1)
        batch, _, length, height, width = shape
        begun = 0 if prefix is None else prefix.shape[2]
        frames = round_up_to_chunks(length, sampling, begun)
        full_history, cache_dtype = self.history == "all", inputs.CACHES[self.cache]
        plan = Plan(sampling, frames, height, width, batch, begun, full_history, cache_dtype=cache_dtype)
        conds, given = (as_conditioning(conds) for conds in (guider.conds, guider.original_conds))
        negative = negative_for(model, guider.model_options, guider.cfg, conds.get("negative"), batch)
        return HostGeneration(
            model, plan, length,
            read_prompts(conds["positive"], batch, sampling.shots is not None),
            seed, negative, guider.cfg,
            prefix=repeat_to_batch(prefix, batch),
            source=pad_to_length(repeat_to_batch(source, batch), frames),
            compile=self.compile,
            unheard=tuple(ignored_conditioning(**given)),
        )  # fmt: skip


def as_conditioning(conds: dict[str, list[dict]]) -> dict[str, list]:
    """A guider's prompts as CONDITIONING."""
    return {name: [[entry["cross_attn"], entry] for entry in entries] for name, entries in conds.items()}


def at_sigmas(sampling: Sampling, sigmas: Tensor) -> Sampling:
    """A sampling with the steps of SIGMAS, which end at 0. Raises ValueError for others."""
    levels = sigmas.tolist()
    if len(levels) < 2 or levels[-1] != 0 or any(a <= b for a, b in zip(levels, levels[1:])) or levels[0] > 1:
        shown = ", ".join(f"{level:g}" for level in levels[:8])
        raise ValueError(
            f"Got sigmas {shown}; a rollout finishes each chunk before the next, so they fall from at most 1 to 0. "
            "Connect Self Forcing Sigmas, or a whole schedule of a flow model."
        )
    return sampling.at_levels(levels[:-1])


def _check_guider(guider: CFGGuider) -> None:
    if type(guider).predict_noise is not CFGGuider.predict_noise:
        raise ValueError(
            f"Got the guider {type(guider).__name__}; the rollout combines positive and negative prompts itself. Use "
            "BasicGuider or CFGGuider."
        )


class CallbackProgress(StepProgress):
    """Steps of the rollout, as the callback of ComfyUI's samplers hears of them."""

    def __init__(self, callback: Callable | None) -> None:
        super().__init__()
        self.callback = callback

    def show(self, progress: Progress) -> None:
        if self.callback is not None:
            newest = progress.x0[:, :, -1:]
            self.callback(self.done - 1, newest, newest, progress.total)


NODES = [SelfForcingSamplerSelect, SelfForcingSigmas]
