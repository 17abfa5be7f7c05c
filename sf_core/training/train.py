"""Training run: from the configuration, or the checkpoint of its folder, to the exported model."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict

import torch

from ..device import release_memory, within_memory
from .config import SELF_FORCING, TrainConfig
from .data import open_data
from .distributed import Group
from .encoders import load_tiny_autoencoder, open_encoders
from .memory import check_memory, out_of_memory
from .methods.autoencoder import FitAutoencoder
from .methods.base import Method
from .methods.consistency import Consistency
from .methods.decoder import FitDecoder
from .methods.diffusion import Bidirectional, DiffusionForcing, TeacherForcing
from .methods.dmd import DMD
from .methods.gan import GAN
from .methods.ode import ODE
from .methods.sid import SiD
from .run_folder import MODEL, load_run, save_model
from .trainer import Trainer, use_threads

METHOD_CLASSES = {
    "dmd": DMD,
    "sid": SiD,
    "gan": GAN,
    "teacher-forcing": TeacherForcing,
    "diffusion-forcing": DiffusionForcing,
    "bidirectional": Bidirectional,
    "ode": ODE,
    "consistency": Consistency,
}
ADAPTERS, TEXT, AUTOENCODER = "lora.safetensors", "text_encoder.safetensors", "autoencoder.safetensors"


def train(config: TrainConfig, group: Group, device: torch.device) -> None:
    """Trains: from the configuration, or from the checkpoint of its folder, to the exported model."""
    use_threads(device)
    # Autocast leaves the weights of norms in float32, which is meant; torch warns of the kernel it cannot use for it.
    warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
    # FSDP's, of outputs that are changed in place. None is: sharded gradients are those of one process.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    check_memory(config, group.size, device)
    within_memory(
        lambda: Trainer(config, make_method(config, group, device), group).run(),
        lambda: out_of_memory(config, group.size, device),
        lambda: release_memory(device),
    )
    if group.first:
        export(config)
    group.wait()


def make_method(config: TrainConfig, group: Group, device: torch.device) -> Method:
    """The method of a run, its networks and data opened. Raises as opening the files does."""
    if config.method == "autoencoder":
        return FitAutoencoder(config, device)
    if config.method == "decoder":
        return FitDecoder(config, open_encoders(config.model, device), device)
    torch.manual_seed(config.seed)  # of a new text encoder
    encoders = open_encoders(config.model, device, config.data.negative)
    data = open_data(config, encoders, group)
    return METHOD_CLASSES[config.method](config, encoders, data, group, device)


def export(config: TrainConfig) -> None:
    """Exports what a run made, in bfloat16: the model, LoRA adapters, and the tiny world's parts that belong to it."""
    saved = load_run(config.out)
    origin = {"method": config.method, "step": str(saved["step"]), "seed": str(config.seed)}
    if "wan" not in saved:
        return save_model(config.out / MODEL, saved["student"], origin, torch.bfloat16)
    save_model(config.out / MODEL, saved["student"], {**origin, **model_metadata(config, saved["wan"])}, torch.bfloat16)
    if saved["text"]:
        words = {"words": json.dumps(saved["words"])}
        save_model(config.out / TEXT, saved["text"], {**origin, **words}, torch.bfloat16)
        autoencoder = load_tiny_autoencoder(config.model.vae).state_dict()
        save_model(config.out / AUTOENCODER, autoencoder, origin, torch.bfloat16)
    if "adapters" in saved:
        save_model(config.out / ADAPTERS, saved["adapters"], origin, torch.float32)


def model_metadata(config: TrainConfig, wan: dict) -> dict[str, str]:
    """Metadata of an exported model, by which the nodes and the command line know the model and how it is sampled."""
    causal = config.method in (*SELF_FORCING, "teacher-forcing", "diffusion-forcing", "ode", "consistency")
    facts = {"causal_ar": causal, "num_heads": wan["heads"]}
    return {
        "config": json.dumps({"transformer": facts}),
        "wan": json.dumps(wan),
        "sampling": json.dumps(asdict(config.sampling)),
    }
