"""A whole training run: from the configuration, or the checkpoint of its folder, to the exported model."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict

import torch

from ..device import release_memory, within_memory
from .config import SELF_FORCING, TrainConfig
from .data import open_data
from .distributed import Group
from .encoders import open_world, tiny_autoencoder
from .memory import check_memory, out_of_memory
from .methods.autoencoder import FitAutoencoder
from .methods.base import Task
from .methods.diffusion import Flow
from .methods.dmd import Adversarial, SelfForcing
from .methods.ode import Consistency, Ode
from .run_folder import MODEL, load_checkpoint, save_model
from .trainer import Trainer, use_threads

TASKS = {"sid": SelfForcing, "dmd": SelfForcing, "gan": Adversarial, "ode": Ode, "consistency": Consistency}


ADAPTERS, TEXT, AUTOENCODER = "lora.safetensors", "text_encoder.safetensors", "autoencoder.safetensors"


def train(config: TrainConfig, group: Group, device: torch.device) -> None:
    """The whole run: from the configuration, or from the checkpoint of its folder, to the exported model."""
    use_threads(device)
    # Autocast leaves the weights of norms in float32, which is meant; torch warns of the kernel it cannot use for it.
    warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
    # FSDP's, of outputs that are changed in place. None is: sharded gradients are those of one process.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    check_memory(config, group.size, device)
    within_memory(
        lambda: Trainer(config, make_task(config, group, device), group).run(),
        lambda: out_of_memory(config, group.size, device),
        lambda: release_memory(device),
    )
    if group.first:
        export(config)
    group.wait()


def make_task(config: TrainConfig, group: Group, device: torch.device) -> Task:
    if config.method == "autoencoder":
        return FitAutoencoder(config, device)
    torch.manual_seed(config.seed)  # of a new text encoder
    world = open_world(config.model, device, config.data.negative)
    data = open_data(config, world, group)
    return TASKS.get(config.method, Flow)(config, world, data, group, device)


def export(config: TrainConfig) -> None:
    """Writes what a run made, in bfloat16: the model, LoRA adapters, and the tiny world's parts that belong to it."""
    saved = load_checkpoint(config.out)
    origin = {"method": config.method, "step": str(saved["step"]), "seed": str(config.seed)}
    if "wan" not in saved:
        return save_model(config.out / MODEL, saved["student"], origin, torch.bfloat16)
    save_model(config.out / MODEL, saved["student"], {**origin, **describe(config, saved["wan"])}, torch.bfloat16)
    if saved["text"]:
        words = {"words": json.dumps(saved["words"])}
        save_model(config.out / TEXT, saved["text"], {**origin, **words}, torch.bfloat16)
        autoencoder = tiny_autoencoder(config.model.vae).state_dict()
        save_model(config.out / AUTOENCODER, autoencoder, origin, torch.bfloat16)
    if "adapters" in saved:
        save_model(config.out / ADAPTERS, saved["adapters"], origin, torch.float32)


def describe(config: TrainConfig, wan: dict) -> dict[str, str]:
    """Metadata by which the nodes and the command line know the model and how it is sampled."""
    causal = config.method in (*SELF_FORCING, "teacher-forcing", "diffusion-forcing", "ode", "consistency")
    facts = {"causal_ar": causal, "num_heads": wan["heads"]}
    return {
        "config": json.dumps({"transformer": facts}),
        "wan": json.dumps(wan),
        "sampling": json.dumps(asdict(config.sampling)),
    }
