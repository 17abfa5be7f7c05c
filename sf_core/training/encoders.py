"""Encoders: the text encoder and autoencoder of a run; and loading networks that go with them.

    encoders.embeds(["a red circle"])    prompts -> [B, tokens, text_dim]; "" is no prompt
    encoders.encode(frames)              [B, T, H, W, 3] in 0..1 -> latents [B, C, F, H, W] in model space
    encoders.decode(latents)             and back
    encoders.still(latents)              the last frame as a clip of its own: [B, C, 1, H, W]

`TinyEncoders` are the built-in model's, whose text encoder may be trained along; `WanEncoders` read a user's files. The
configuration chooses by `model.world`: tiny or wan.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from .. import tiny
from ..autoencoders import wan_vae
from ..autoencoders.stream import DecoderStream
from ..checkpoints.autoencoder import load_autoencoder
from ..checkpoints.load import load_model
from ..sampling.families import DEFAULT
from ..text_encoder import load_text_encoder
from ..tiny.autoencoder import CHANNELS, SPACE, TinyAutoencoder, has_denoiser
from ..tiny.data import vocabulary
from ..tiny.text import TEXT_DIM, TEXT_LEN, TinyTextEncoder
from ..wan.config import WAN_1_3B, WanConfig
from ..wan.model import WanModel
from .config import ModelConfig, TrainConfig
from .distributed import load_full
from .run_folder import CHECKPOINT, fingerprint, load_run, training_hint

NEW = WanConfig(dim=160, ffn_dim=640, heads=5, layers=6, channels=CHANNELS, text_dim=TEXT_DIM, text_len=TEXT_LEN)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Encoders(Protocol):
    """Text encoder and autoencoder of a run."""

    config: ModelConfig
    text: nn.Module
    vae: nn.Module

    def embeds(self, prompts: list[str]) -> Tensor: ...

    def encode(self, frames: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...

    def still(self, latents: Tensor) -> Tensor: ...

    def new_student(self) -> WanModel: ...


class TinyEncoders:
    """The built-in model's encoders. The text encoder is the student's: a new one for a new student."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.text = load_tiny_text(config.student).requires_grad_(config.student == "new").to(device)
        self.vae = load_tiny_autoencoder(config.vae).requires_grad_(False)

    def embeds(self, prompts: list[str]) -> Tensor:
        rows = torch.full((len(prompts), TEXT_LEN), -1)
        named = [i for i, prompt in enumerate(prompts) if prompt]
        if named:
            rows[named] = self.text.batch([prompts[i] for i in named])
        return self.text(rows.to(self.device))

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        return self.vae.encode(frames)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return DecoderStream(self.vae).decode(latents.cpu())

    @torch.no_grad()
    def still(self, latents: Tensor) -> Tensor:
        return self.vae.still(latents.cpu()).to(latents)

    def new_student(self) -> WanModel:
        shape = {name: getattr(self.config, name) for name in ("dim", "layers", "heads", "ffn_dim")}
        return WanModel(replace(NEW, **{k: v for k, v in shape.items() if v})).initialise()


class WanEncoders:
    """Wan 2.1's encoders: UMT5 and the Wan VAE. The text encoder stays on the CPU unless there is a GPU.

    What guidance steers away from, "" or `negative`, is asked for with every clip, and encoded once.
    """

    def __init__(self, config: ModelConfig, device: torch.device, negative: str = "") -> None:
        missing = [name for name in ("text_encoder", "vae") if getattr(config, name) is None]
        if missing:
            raise ValueError(
                f"Got no model.{' and no model.'.join(missing)}; the wan world needs UMT5 and the Wan 2.1 VAE. Name "
                "the files."
            )
        self.config, self.device = config, device
        self.text = load_text_encoder(config.text_encoder, config.tokenizer, device)
        self.vae = load_autoencoder(config.vae, wan_vae.WanVAE, channels=16).to(device).requires_grad_(False)
        self.kept: dict[str, Tensor | None] = {"": None, negative: None}

    @torch.no_grad()
    def embeds(self, prompts: list[str]) -> Tensor:
        return torch.cat([self._row(prompt) for prompt in prompts]).float().to(self.device)

    def _row(self, prompt: str) -> Tensor:
        kept = self.kept.get(prompt)
        row = self.text.encode([prompt]) if kept is None else kept
        if prompt in self.kept:
            self.kept[prompt] = row
        return row

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        stream = wan_vae.EncoderStream(self.vae)
        return torch.cat((stream.encode(frames), stream.flush()), 2)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return wan_vae.DecoderStream(self.vae).decode(latents)

    @torch.no_grad()
    def still(self, latents: Tensor) -> Tensor:
        return self.encode(self.decode(latents)[:, -1:]).to(latents)

    def new_student(self) -> WanModel:
        return WanModel(WAN_1_3B).initialise()


def open_encoders(config: ModelConfig, device: torch.device, negative: str = "") -> TinyEncoders | WanEncoders:
    """The encoders of a run; `negative` is a prompt that will be asked for again and again.

    Raises ValueError for a size that has no latents, and for files that are missing.
    """
    if config.width % 16 or config.height % 16:
        raise ValueError(f"Got {config.width} x {config.height} pixels; use multiples of 16.")
    return TinyEncoders(config, device) if config.world == "tiny" else WanEncoders(config, device, negative)


def check_prompts(encoders: Encoders, prompts: Iterable[str]) -> None:
    """Raises ValueError for a prompt that the text encoder cannot read; "" is no prompt."""
    if isinstance(encoders, TinyEncoders):
        encoders.text.batch([prompt for prompt in prompts if prompt])


def latent_size(config: ModelConfig) -> tuple[int, int]:
    """Size (H, W) of latents."""
    return config.height // SPACE, config.width // SPACE


def student_dtype(config: TrainConfig) -> torch.dtype:
    """Dtype of the weights that a student is loaded with: those that are trained are float32.

    Those under adapters are frozen; only sharding, which wants one dtype in a block, keeps them float32.
    """
    return DTYPES[config.model.frozen] if config.lora and not config.shard else torch.float32


def load_student(source: str, encoders: Encoders, dtype: torch.dtype = torch.float32) -> WanModel:
    """A student to train, on the CPU: "new", "built-in", a file, or the averaged weights of a run's folder."""
    if source == "new":
        return encoders.new_student().to(dtype)
    return load_network(source, dtype).requires_grad_(True)


def load_network(source: str, dtype: torch.dtype) -> WanModel:
    """A frozen network, on the CPU. Raises FileNotFoundError and ValueError for what cannot be one."""
    path = Path(source)
    if source == "built-in":
        return tiny.load_transformer(dtype=dtype)
    if (path / CHECKPOINT).is_file():
        saved = load_run(path)
        wan = WanModel(WanConfig(**saved["wan"]), dtype=dtype)
        load_full(wan, saved["student"])
        return wan.requires_grad_(False).eval()
    # The family is given so that a bidirectional teacher passes; nothing is sampled by it.
    return load_model(check_exists(path), dtype=dtype, family=DEFAULT)[0]


def check_exists(path: Path) -> Path:
    """Raises FileNotFoundError where a model should be and nothing is."""
    if not path.exists():
        raise FileNotFoundError(
            f'Got no {path}; a model is a file, the folder of a run that has saved a checkpoint, "built-in" or "new". '
            f"Check the path, or {training_hint(path)}."
        )
    return path


def check_compatible(expected: WanConfig, other: WanConfig, name: str, source: str, whose: str = "the student") -> None:
    """Raises ValueError unless a network reads the prompts and latents that are expected of it."""
    for what in ("channels", "text_dim", "text_len"):
        mine, theirs = getattr(expected, what), getattr(other, what)
        if mine != theirs:
            raise ValueError(
                f"Got {name} {source} with {what} {theirs}; {whose} has {mine}. Both must be for the same prompts and "
                "latents: use models of one kind."
            )


def check_lineage(source: str, encoders: Encoders, name: str) -> None:
    """Raises ValueError for a network of the tiny world that learnt other embeddings or latents than the run has."""
    if not isinstance(encoders, TinyEncoders) or source == "new":
        return
    theirs, ours = read_lineage(source), lineage(encoders.text.state_dict(), encoders.vae.state_dict())
    for part in theirs:
        if theirs[part] != ours[part]:
            raise ValueError(
                f"Got {name} {source}, which was trained with another {part} than this run has; its prompts and "
                "latents would mean nothing here. Use networks of one lineage, and the model.vae they had."
            )


def read_lineage(source: str) -> dict[str, str]:
    """`lineage` of a run's folder or of a file, of the parts that are there."""
    path = tiny.WEIGHTS / "transformer.safetensors" if source == "built-in" else Path(source)
    folder = path if path.is_dir() else path.parent
    files = {"text": folder / "text_encoder.safetensors", "vae": folder / "autoencoder.safetensors"}
    states = {part: tiny.read(file)[0] for part, file in files.items() if file.is_file()}
    if (path / CHECKPOINT).is_file():
        states["text"] = load_run(path)["text"]
    return lineage(**states)


def lineage(text: dict[str, Tensor] | None = None, vae: dict[str, Tensor] | None = None) -> dict[str, str]:
    """Hashes that tell text encoders and autoencoders apart, of their weights as they are exported.

    Of an autoencoder the encoder alone counts: it says what latents mean, and decoders of one latent space may differ.
    """
    encoder = {name: value for name, value in (vae or {}).items() if name.startswith("encoder.")}
    states = {"text encoder": text, "autoencoder": encoder}
    return {
        part: fingerprint({name: value.bfloat16() for name, value in state.items()})
        for part, state in states.items()
        if state
    }


def load_tiny_text(student: str) -> TinyTextEncoder:
    """The text encoder that belongs to a student of the tiny world."""
    path = Path(student)
    if student == "new":
        return TinyTextEncoder(vocabulary())
    if (path / CHECKPOINT).is_file():
        saved = load_run(path)
        text = TinyTextEncoder(saved["words"])
        load_full(text, saved["text"])
        return text
    beside = path.parent / "text_encoder.safetensors"
    return tiny.load_text_encoder(beside if beside.is_file() else None)


def load_tiny_autoencoder(source: Path | None) -> TinyAutoencoder:
    """The shipped autoencoder, or that of a file or of a run's folder."""
    if source is None or source.is_file():
        return tiny.load_autoencoder(source)
    state = load_run(source)["student"]
    autoencoder = TinyAutoencoder(has_denoiser(state))
    load_full(autoencoder, state)
    return autoencoder
