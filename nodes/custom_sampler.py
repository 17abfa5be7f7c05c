"""For SamplerCustomAdvanced: the rollout as a SAMPLER, and its steps as SIGMAS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from comfy.samplers import CFGGuider, Sampler
from comfy_api.latest import io
from torch import Tensor

from ..sf_core.sampling.config import Sampling
from ..sf_core.sampling.rollout import Progress
from . import inputs
from .host.conditioning import latents_of, negative_of, prompts_of
from .host.generation import REMEDY, Job, check_mask, content_of, notes_of
from .host.memory import load, threads_for, within_memory
from .host.model import family_of, for_compiling, wan_of
from .host.progress import check_cancelled

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
                io.Model.Input("model", tooltip="The model to be sampled; it knows its own steps."),
                inputs.preset(),
                inputs.steps(),
                inputs.denoise(),
            ],
            outputs=[io.Sigmas.Output(tooltip="For SamplerCustomAdvanced, with Self Forcing Sampler Select.")],
        )

    @classmethod
    def execute(cls, model, preset, steps, denoise=1.0) -> io.NodeOutput:
        sampling = inputs.sampling_of(preset, family_of(model).sampling, steps, 0, 0, -1)
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
            outputs=[io.Sampler.Output(tooltip="For SamplerCustomAdvanced.")],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
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
        job = self.job(guider, sigmas, extra_args.get("seed") or 0, noise.shape, latent_image, denoise_mask)
        patches = extra_args["model_options"]["transformer_options"]
        notes_of(job, self.node, own_steps=False)
        report = _report(callback, disable_pbar)

        def sample() -> Tensor:
            load(job.model, job.needed)
            with threads_for(job.model, 64 * job.shape[3] * job.shape[4]):
                return job.latents(report, patches)

        latents = within_memory(sample, job.what, REMEDY)
        if callback is not None:  # ComfyUI's denoised output is what the callback has seen last
            callback(len(sigmas) - 2, latents, latents, len(sigmas) - 1)
        return latents.to(noise.device)

    def job(
        self,
        guider: CFGGuider,
        sigmas: Tensor,
        seed: int,
        shape: torch.Size,
        latent_image: Tensor | None,
        denoise_mask: Tensor | None,
    ) -> Job:
        sigmas = torch.where(torch.isclose(sigmas, torch.ones_like(sigmas)), 1.0, sigmas)  # schedulers round
        _check_guider(guider)
        check_mask(denoise_mask)
        model = guider.model_patcher
        model = model if self.compile == "off" else for_compiling(model)
        own = family_of(model).sampling
        sampling = at_sigmas(inputs.sampling_of(inputs.AUTO, own, 0, self.chunk, self.window, self.sink), sigmas)
        wan = wan_of(model)
        conds = {name: [[entry["cross_attn"], entry] for entry in entries] for name, entries in guider.conds.items()}
        prefix = None if self.prefix is None else latents_of(self.prefix, wan, "prefix")
        return Job(
            model, sampling, prompts_of(conds["positive"], shape[0]), shape, seed,
            prefix=None if prefix is None else model.model.process_latent_in(prefix),
            whole_prefix=self.history == "all",
            source=None if sigmas[0] == 1 else content_of(latent_image, f"sigmas from {sigmas[0]:g} on", SIGMAS_FROM_1),
            negative=None if guider.cfg == 1 else negative_of(conds.get("negative"), shape[0]),
            cfg=guider.cfg,
            cache_dtype=inputs.CACHES[self.cache],
            compile=self.compile,
        )  # fmt: skip


def at_sigmas(sampling: Sampling, sigmas: Tensor) -> Sampling:
    """A sampling with the steps of SIGMAS, which end at 0. Raises ValueError for others."""
    levels = sigmas.tolist()
    if len(levels) < 2 or levels[-1] != 0 or any(a <= b for a, b in zip(levels, levels[1:])) or levels[0] > 1:
        shown = ", ".join(f"{level:g}" for level in levels[:8])
        raise ValueError(
            f"Got sigmas {shown}; a rollout finishes each chunk before the next, so they fall from at most 1 to 0. "
            "Connect Self Forcing Sigmas, or a whole schedule of a flow model."
        )
    return replace(sampling, steps=tuple(1000 * level for level in levels[:-1]), shift=1.0, warp=True, first_steps=None)


def _check_guider(guider: CFGGuider) -> None:
    if type(guider).predict_noise is not CFGGuider.predict_noise:
        raise ValueError(
            f"Got the guider {type(guider).__name__}; the rollout combines positive and negative prompts itself. Use "
            "BasicGuider or CFGGuider."
        )


def _report(callback: Callable | None, silent: bool) -> Callable[[Progress], None]:
    """Steps of the rollout, as the callback of ComfyUI's samplers hears of them."""
    done = 0

    def report(progress: Progress) -> None:
        nonlocal done
        check_cancelled()
        done += 1
        if callback is not None and not silent:
            newest = progress.x0[:, :, -1:]
            callback(done - 1, newest, newest, progress.total)

    return report


NODES = [SelfForcingSamplerSelect, SelfForcingSigmas]
