"""A MODEL that is sampled in another way: settings that travel with it, and float8 weights."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.latest import io

from ..sf_core.sampling.config import SAMPLERS
from . import inputs
from .host import checkpoints
from .host.model import family_of, set_family

AS_MADE, PINNED = "as made", "pinned"


class SelfForcingSettings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SelfForcingSettings",
            display_name="Self Forcing Settings",
            category=inputs.CATEGORY,
            description="How a model is sampled, for all nodes behind it: chunks, steps, and what keeps long videos "
            "from drifting. What is not set here stays as the model was made for.",
            search_aliases=["drift", "long video", "window", "attention sink", "context noise", "frame-wise", "shift"],
            inputs=[
                io.Model.Input("model", tooltip="Model: a causal Wan text-to-video model."),
                inputs.preset(),
                inputs.steps(),
                inputs.chunk(),
                inputs.window(),
                inputs.sink(),
                io.Combo.Input(
                    "sink_positions", options=[inputs.AUTO, AS_MADE, PINNED], default=inputs.AUTO,
                    tooltip="Sink positions: where the model sees the sink. as made: ever further back. pinned: just "
                    "before the window, however long the video, so that no distance exceeds what it was trained with. "
                    "Use pinned with a sink beyond a minute or so; models made for it (longlive-infinity) have it by "
                    "themselves.",
                ),
                io.Float.Input(
                    "context_noise", default=-1.0, min=-1.0, max=999.0, step=1.0, advanced=True,
                    tooltip="Context noise: timestep (0 to 999) that the model is told finished frames have. -1: the "
                    "preset's (0). 100 or so makes it trust its own frames less, which softens errors that pile up "
                    "and blurs a little; for models trained with context noise.",
                ),
                io.Float.Input(
                    "shift", default=0.0, min=0.0, max=100.0, step=0.1, advanced=True,
                    tooltip="Flow shift: the larger, the more steps at high noise. 0: the preset's (5; the published "
                    "web demo has 8).",
                ),
                io.Int.Input(
                    "first_chunk", default=0, min=0, max=100, advanced=True,
                    tooltip="First chunk's size in latent frames: 1 for models trained with an independent first "
                    "frame. 0: the preset's.",
                ),
                io.Int.Input(
                    "first_steps", default=0, min=0, max=100, advanced=True,
                    tooltip="First chunk's steps, where it needs more than the others (models of 1 or 2 steps: "
                    "4). 0: the preset's.",
                ),
                io.Vae.Input(
                    "reencode_vae", optional=True,
                    tooltip="First-frame re-encode: with a VAE here, the memory begins anew whenever the window is "
                    "full, with a still of its first frame, as in training clips. For models of short clips without a "
                    "sink that flicker or change once the first frames have left the window. Takes the place of the "
                    "sink.",
                ),
                *rules(),
            ],
            outputs=[io.Model.Output(tooltip="Model with these settings.")],
        )  # fmt: skip

    @classmethod
    @inputs.check_numbers
    def execute(
        cls, model, preset, steps, chunk, window, sink, sink_positions, context_noise, shift, first_chunk, first_steps,
        reencode_vae=None, **rules,
    ) -> io.NodeOutput:  # fmt: skip
        family = family_of(model)
        sampling = inputs.change_sampling(
            family.sampling, preset, steps, chunk, window, sink,
            pinned=None if sink_positions == inputs.AUTO else sink_positions == PINNED,
            context_noise=None if context_noise < 0 else context_noise,
            shift=shift or None,
            first_chunk=first_chunk or None,
            first_steps=first_steps or None,
            **changed_rules(**rules),
        )  # fmt: skip
        model = model.clone()
        trained = family.trained or family.sampling.chunk
        reencoder = reencode_vae or family.reencoder
        set_family(model, replace(family, sampling=sampling, trained=trained, reencoder=reencoder))
        return io.NodeOutput(model)


def rules() -> list[io.Input]:
    """Inputs of rules that some families have by themselves."""
    return [
        io.Combo.Input(
            "sampler", options=[inputs.AUTO, *SAMPLERS], default=inputs.AUTO, optional=True, advanced=True,
            tooltip="Sampler. chunks: one after the other. rolling: as many at once as there are steps, each a step "
            "further than the next, as Rolling Forcing's models were trained.",
        ),
        io.Int.Input(
            "position_range", default=0, min=0, max=100_000, optional=True, advanced=True,
            tooltip="Position range: latent frames that positions of a pinned sink stay within, as Self Gradient "
            "Forcing's models were trained (21). 0: the preset's, else the window.",
        ),
        io.Float.Input(
            "sink_decay", default=-1.0, min=-1.0, max=1.0, step=0.001, optional=True, advanced=True,
            tooltip="Sink decay: what a sink keeps of itself as frames that leave the window are blended into it, as "
            "Reward Forcing does (0.999). 1: all of it. -1: the preset's.",
        ),
        io.Int.Input(
            "bank", default=-1, min=-1, max=1000, optional=True, advanced=True,
            tooltip="Memory bank: latent frames kept beside the window, those that the prompt fits most, as MemFlow "
            "does (3). 0: none. -1: the preset's.",
        ),
        io.Int.Input(
            "bank_interval", default=0, min=0, max=1000, optional=True, advanced=True,
            tooltip="Memory bank's interval: chunks that share one of its places. 0: the preset's (3).",
        ),
        io.Float.Input(
            "rope_jitter", default=-1.0, min=-1.0, max=0.99, step=0.05, optional=True, advanced=True,
            tooltip="RoPE jitter: spread of the attention heads' bases in time, so that a sink does not pull a long "
            "video back to its beginning; LoL has 0.8. 0: none. -1: the preset's.",
        ),
    ]  # fmt: skip


def changed_rules(
    sampler: str = inputs.AUTO,
    position_range: int = 0,
    sink_decay: float = -1.0,
    bank: int = -1,
    bank_interval: int = 0,
    rope_jitter: float = -1.0,
) -> dict:
    """Fields of `Sampling` for the inputs of `rules`, those that were left alone not among them."""
    fields = {
        "sampler": None if sampler == inputs.AUTO else sampler,
        "position_range": position_range or None,
        "sink_decay": None if sink_decay < 0 else sink_decay,
        "bank_frames": None if bank < 0 else bank,
        "bank_interval": bank_interval or None,
        "rope_jitter": None if rope_jitter < 0 else rope_jitter,
    }
    return {name: value for name, value in fields.items() if value is not None}


class SelfForcingFP8(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SelfForcingFP8",
            display_name="Self Forcing FP8",
            category=inputs.CATEGORY,
            description="Turns the weights of a model's blocks into float8 with scales: half the memory, nearly the "
            "same video.",
            search_aliases=["fp8", "float8", "quantize", "quantise", "low vram", "e4m3"],
            inputs=[
                io.Model.Input("model", tooltip="Model: a causal Wan text-to-video model, with or without LoRAs."),
                io.Boolean.Input(
                    "enabled",
                    default=True,
                    tooltip="Float8 on or off. Off: the model goes through as it is.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="Model in float8; LoRAs and other patches stay in place.")],
        )

    @classmethod
    @inputs.check_numbers
    def execute(cls, model, enabled) -> io.NodeOutput:
        return io.NodeOutput(checkpoints.quantise_model(model) if enabled else model)


NODES = [SelfForcingSettings, SelfForcingFP8]
