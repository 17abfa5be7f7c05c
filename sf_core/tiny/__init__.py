"""The built-in model: a Wan-type DiT of a few MB with its own autoencoder and text encoder, made by `python -m sf_core
train tiny`.

    wan, text, vae = load_transformer(), load_text_encoder(), load_autoencoder()

It draws one coloured shape that moves on a background, 64 x 64 pixels; `data` says what it has seen, `text` which
words it knows.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..wan.config import WanConfig
from ..wan.model import WanModel
from .autoencoder import TinyAutoencoder, has_denoiser
from .text import TinyTextEncoder

WEIGHTS = Path(__file__).parent / "weights"
PARTS = ("transformer", "autoencoder", "text_encoder")


def load_transformer(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, path: Path | None = None
) -> WanModel:
    """The DiT, ready to sample. `path` is another file of the same kind; raises as `read` does."""
    path = Path(path or WEIGHTS / "transformer.safetensors")
    state, metadata = read(path)
    wan = WanModel(WanConfig(**json.loads(entry(metadata, "wan", path))), device="meta")
    return fill(wan, state, path).to(device, dtype)


def load_text_encoder(path: Path | None = None) -> TinyTextEncoder:
    """The text encoder, float32 on the CPU; raises as `read` does."""
    path = Path(path or WEIGHTS / "text_encoder.safetensors")
    state, metadata = read(path)
    return fill(TinyTextEncoder(json.loads(entry(metadata, "words", path))), state, path).float()


def load_autoencoder(path: Path | None = None) -> TinyAutoencoder:
    """The autoencoder, float32 on the CPU; raises as `read` does."""
    path = Path(path or WEIGHTS / "autoencoder.safetensors")
    state, _ = read(path)
    return fill(TinyAutoencoder(has_denoiser(state)), state, path).float()


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises FileNotFoundError for a missing file and ValueError for one that is not whole; both say how to mend it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"Got no file {path}; the built-in model needs it. {_remedy(path)}")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"Got {path}, which is not a whole safetensors file ({error}). {_remedy(path)}") from None


def entry(metadata: dict[str, str], key: str, path: Path) -> str:
    if key not in metadata:
        raise ValueError(
            f"Got {path} without the metadata entry {key!r}; a part of the built-in model has it. {_remedy(path)}"
        )
    return metadata[key]


def fill(module: nn.Module, state: dict[str, Tensor], path: Path) -> nn.Module:
    """Puts a file's tensors into a module, in the file's dtype, for inference."""
    try:
        module.load_state_dict(state, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"Got {path}, whose tensors do not fit this part of the built-in model ({reason}). {_remedy(path)}"
        ) from None
    return module.requires_grad_(False).eval()


def _remedy(path: Path) -> str:
    if path.parent == WEIGHTS:
        return "Reinstall the package, or train the model again: python -m sf_core train tiny."
    return "Give a file written by python -m sf_core train tiny."
