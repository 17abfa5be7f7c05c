"""Loaders: the built-in model, a user's checkpoint, a TAEHV."""

from __future__ import annotations

import logging
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..sf_core.device import console_text
from ..sf_core.sampling.families import FAMILIES
from .host import checkpoints, tiny
from .host.progress import say
from .inputs import AUTO, CATEGORY, check_numbers

NONE = "none"
MODEL_FOLDERS = ("diffusion_models",)
TAEHV_FOLDERS = ("vae_approx", "vae")
MODEL_SOURCE = (
    "a causal Wan 2.1 checkpoint, such as self_forcing_dmd.pt from huggingface.co/gdhe17/Self-Forcing (checkpoints)"
)
TAEHV_SOURCE = "a TAEHV, such as taew2_1.safetensors from huggingface.co/Kijai/WanVideo_comfy"

log = logging.getLogger(__name__)


class SelfForcingLoadTiny(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SelfForcingLoadTiny",
            display_name="Load Tiny Self Forcing (built in)",
            category=CATEGORY,
            description="A small real model that comes with this pack: nothing to download. It draws coloured shapes "
            "that move, at 64 x 64 pixels, and works with the stock nodes too.",
            search_aliases=["tiny wan", "demo model", "test model", "built-in model", "load self forcing"],
            inputs=[],
            outputs=[
                io.Model.Output(tooltip="Model, a causal Wan network."),
                io.Clip.Output(tooltip="Text encoder that belongs to it."),
                io.Vae.Output(tooltip="Autoencoder that belongs to it."),
            ],
        )

    @classmethod
    @check_numbers
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(tiny.load_patcher(), tiny.load_clip(), tiny.load_vae())


class SelfForcingLoadModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SelfForcingLoadModel",
            display_name="Load Self Forcing Model",
            category=CATEGORY,
            description="Loads a causal Wan checkpoint (Self Forcing, Causal Forcing, LongLive, ...) in whatever "
            "format it comes, as a MODEL that stock nodes take too.",
            search_aliases=["self forcing loader", "causal forcing", "longlive", "load wan", "unet loader", "causvid"],
            inputs=[
                io.Combo.Input(
                    "file", display_name="model_name", options=files_in(MODEL_FOLDERS),
                    tooltip="Checkpoint: a .pt or .safetensors file in models/diffusion_models. Of a model in several "
                    "files, any.",
                ),
                io.Combo.Input(
                    "family", options=[AUTO, *FAMILIES], default=AUTO,
                    tooltip="Family: which model it is, and so its steps, chunk, window and sink. auto: by the names "
                    "of the file and its folders and by its metadata; where none tells, the node says so. Choosing "
                    "one also says that the model is causal where nothing in the file does.",
                ),
                io.Combo.Input(
                    "precision", options=list(checkpoints.PRECISIONS), default=AUTO,
                    tooltip="Precision of the weights. auto: as ComfyUI loads any Wan model, in float16 on most "
                    "NVIDIA cards; bf16, as these models were trained; fp16; fp8: the blocks' matrices in float8 with "
                    "scales, half the memory.",
                ),
                io.Combo.Input(
                    "lora", options=[NONE, *folder_paths.get_filename_list("loras")], default=NONE, optional=True,
                    advanced=True,
                    tooltip="LoRA that is a part of the model, merged as it is loaded: LongLive's lora.pt. LoRAs of "
                    "a style or a subject go behind this node, in LoraLoaderModelOnly.",
                ),
                io.Float.Input(
                    "strength", default=1.0, min=-10.0, max=10.0, step=0.05, optional=True, advanced=True,
                    tooltip="LoRA strength.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="Model, a native Wan MODEL that knows how it is sampled.")],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, file):
        return missing_file(file, MODEL_FOLDERS, MODEL_SOURCE) or True

    @classmethod
    @check_numbers
    def execute(cls, file, family, precision, lora=NONE, strength=1.0) -> io.NodeOutput:
        path = Path(folder_paths.get_full_path_or_raise("diffusion_models", file))
        merged = None if lora == NONE else Path(folder_paths.get_full_path_or_raise("loras", lora))
        source = checkpoints.CheckpointSource(path, None if family == AUTO else family, precision, merged, strength)
        checkpoint = source.checkpoint()
        level = logging.INFO if checkpoint.known else logging.WARNING
        log.log(level, "%s: %s", console_text(file), console_text(checkpoint.note))
        say(cls, checkpoint.note)
        return io.NodeOutput(checkpoints.from_checkpoint(checkpoint, source))


class SelfForcingLoadTAEHV(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SelfForcingLoadTAEHV",
            display_name="Load TAEHV",
            category=CATEGORY,
            description="Loads a tiny autoencoder for Wan video (taew2_1, lighttaew2_1; taew2_2 for LongLive 2): far "
            "faster and smaller than the Wan VAE, a little softer. The VAE works in VAE Decode and VAE Encode too.",
            search_aliases=["taew2_1", "taehv", "lighttae", "tiny vae", "tiny autoencoder", "load vae", "fast vae"],
            inputs=[
                io.Combo.Input(
                    "file", display_name="vae_name", options=files_in(TAEHV_FOLDERS),
                    tooltip="TAEHV file: taew2_1, lighttaew2_1 or taew2_2, .safetensors or .pth, in models/vae_approx "
                    "or models/vae.",
                ),
            ],
            outputs=[io.Vae.Output(tooltip="VAE, for Self Forcing Decode, VAE Decode and VAE Encode.")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, file):
        return missing_file(file, TAEHV_FOLDERS, TAEHV_SOURCE) or True

    @classmethod
    @check_numbers
    def execute(cls, file) -> io.NodeOutput:
        folder = next((name for name in TAEHV_FOLDERS if folder_paths.get_full_path(name, file)), TAEHV_FOLDERS[0])
        return io.NodeOutput(checkpoints.load_taehv(Path(folder_paths.get_full_path_or_raise(folder, file))))


def files_in(folders: tuple[str, ...]) -> list[str]:
    """Names of all files in these folders, each once; where there is none, one line that says so.

    A list with nothing in it would be shown as "undefined", and a run would fail with "missing connection".
    """
    names = [file for folder in folders for file in folder_paths.get_filename_list(folder)]
    return list(dict.fromkeys(names)) or [f"no file in models/{folders[0]}"]


def missing_file(file: str | None, folders: tuple[str, ...], source: str) -> str | None:
    """What is missing, from where and into which folder, as a sentence; None where the file is there.

    Said before the run, in place of the host's "value not in list". A name that comes over a wire is not known then.
    """
    if file is None or any(folder_paths.get_full_path(folder, file) for folder in folders):
        return None
    places = folder_paths.get_folder_paths(folders[0])
    place = next((path for path in places if Path(path).name == folders[0]), places[0])
    searched = " or ".join(f"models/{folder}" for folder in folders)
    got = f"no file in {searched}" if file in files_in(folders) else f"{file}, which is not in {searched}"
    return f"Got {got}; needed: {source}. Put it into {place} and press R."


NODES = [SelfForcingLoadTiny, SelfForcingLoadModel, SelfForcingLoadTAEHV]
