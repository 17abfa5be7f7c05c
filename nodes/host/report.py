"""What a report says of ComfyUI: its versions, its memory, the attention it takes, where its models lie."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path

import comfy.model_management as management
import comfyui_version
import folder_paths
from comfy.cli_args import args
from comfy.ldm.modules.attention import optimized_attention

KINDS = ("diffusion_models", "text_encoders", "vae", "vae_approx", "loras")
FRONTEND = "comfyui-frontend-package"


def model_folders() -> list[Path]:
    """Folders in which ComfyUI looks for files of the kinds that this pack takes, those that are there."""
    folders = [Path(folder) for kind in KINDS for folder in folder_paths.get_folder_paths(kind)]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def host_parts() -> dict[str, Callable[[], dict]]:
    """Parts of a report, as `make_report` takes them."""
    return {"ComfyUI": _versions, "ComfyUI's memory": _memory}


def _versions() -> dict:
    """A folder of the frontend's own takes the place of the package."""
    frontend = args.front_end_root or importlib.metadata.version(FRONTEND)
    return {
        "version": comfyui_version.__version__,
        "frontend": str(frontend),
        "attention": optimized_attention.__name__,
    }


def _memory() -> dict:
    device = management.get_torch_device()
    return {
        "device": str(device),
        "state": management.vram_state.name,
        "total_bytes": int(management.get_total_memory(device)),
        "free_bytes": int(management.get_free_memory(device)),
        "weights": str(management.unet_dtype()).removeprefix("torch."),
    }
