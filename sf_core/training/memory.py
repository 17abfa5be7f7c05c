"""What memory a run takes on each device, before it takes it.

Computed from shapes. With b bytes a number in the run's precision, S tokens a frame, P parameters:

    trained network   weights, gradients, two AdamW moments in float32: 16 P; the student's average 4 P more
    frozen network    P times the bytes of model.frozen
    cache             2 layers frames S dim b a sample, of whole rollouts where blocks run again
    activations       what a backward pass keeps of the largest graph: of each block its input alone with `recompute`,
                      else about (2 ffn_dim + 20 dim) b a token, and in a rollout the keys and values that each
                      chunk saw, 2 dim b a token; and one block in full
    text              UMT5's encoder in bfloat16, in the wan world

Sharding divides weights and their company by the number of processes; the blocks in use, two at a time, are whole.
Weights and cache are exact. Activations are an estimate, of the kind in checkpoint.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..checkpoint import describe as describe_file
from ..config import WanConfig
from ..families import DEFAULT
from ..machine import memory_of
from ..model import WanModel
from .config import SELF_FORCING, ModelConfig, TrainConfig
from .store import CHECKPOINT, load_checkpoint
from .worlds import DTYPES, NEW, latent_size, there

GIB = 2**30
WAN_14B = WanConfig(dim=5120, ffn_dim=13824, heads=40, layers=40)
UMT5_BYTES = 2 * (256384 * 4096 + 24 * (4 * 4096**2 + 3 * 4096 * 10240))  # umt5-xxl's encoder in bfloat16
NAMED = {"wan-1.3b": WanConfig(), "wan-14b": WAN_14B}


@dataclass(frozen=True)
class Needed:
    """Bytes on one device."""

    student: int
    critic: int
    teacher: int
    gathered: int
    cache: int
    activations: int
    text: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    def __str__(self) -> str:
        parts = [f"{name} {value / GIB:.1f}" for name, value in vars(self).items() if value]
        return f"{self.total / GIB:.1f} GiB a device: {', '.join(parts)}"


def needed(config: TrainConfig, processes: int = 1) -> Needed:
    """Memory of a run that `processes` devices share. Raises as opening its files does."""
    student = shape_of(config.model.student, config.model)
    self_forced = config.method in SELF_FORCING
    followed = config.model.teacher if config.method in ("dmd", "sid", "ode", "consistency") else None
    teacher = shape_of(followed, config.model) if followed else None
    begun = config.model.critic or config.model.teacher or config.model.student
    critic = shape_of(begun, config.model) if self_forced else None
    shares = processes if config.shard else 1
    networks = [network for network in (student, critic, teacher) if network]
    return Needed(
        student=student_bytes(config, student) // shares,
        critic=16 * parameters(critic) // shares if critic else 0,
        teacher=parameters(teacher) * DTYPES[config.model.frozen].itemsize // shares if teacher else 0,
        gathered=sum(gathered(network, config) for network in networks) if config.shard else 0,
        cache=cache_bytes(config, student, processes) if self_forced else 0,
        activations=max(
            graph_bytes(config, student, processes, generates=True),
            graph_bytes(config, critic, processes, generates=False) if critic else 0,
        ),
        text=UMT5_BYTES if config.model.world == "wan" else 0,
    )


def check_memory(config: TrainConfig, processes: int, device: torch.device) -> None:
    """Raises MemoryError for a run that does not fit."""
    if config.method == "autoencoder":
        return
    there, run = memory_of(device), needed(config, processes)
    together = processes if device.type == "cpu" else 1  # processes on one CPU share its memory
    if there is not None and run.total * together > there:
        raise MemoryError(
            f"Got {there / GIB:.1f} GiB of memory; this run takes {run}. Use recompute: true, a smaller micro_batch or "
            "clip, shard: true over more devices, or model.frozen: bfloat16 (with precision: bfloat16)."
        )


def shape_of(source: str, model: ModelConfig) -> WanConfig:
    """The shape of a network, from what its file or run says. `wan-1.3b` and `wan-14b` stand for files to come."""
    path = Path(source)
    if source in NAMED:
        return NAMED[source]
    if source in ("new", "built-in"):
        return NEW if model.world == "tiny" else WanConfig()
    if (path / CHECKPOINT).is_file():
        return WanConfig(**load_checkpoint(path)["wan"])
    return describe_file(there(path), DEFAULT).config


def parameters(config: WanConfig) -> int:
    return sum(p.numel() for p in WanModel(config, device="meta").parameters())


def student_bytes(config: TrainConfig, student: WanConfig) -> int:
    if config.lora is None:
        return 20 * parameters(student)
    adapters = 0
    for name, module in WanModel(student, device="meta").named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith("blocks."):
            adapters += config.lora.rank * sum(module.weight.shape)
    return 4 * parameters(student) + 20 * adapters


def gathered(network: WanConfig, config: TrainConfig) -> int:
    """Two blocks and what is outside of blocks, in the run's precision."""
    wan = WanModel(network, device="meta")
    block = sum(p.numel() for p in wan.blocks[0].parameters())
    outside = parameters(network) - network.layers * block
    return (2 * block + outside) * DTYPES[config.precision].itemsize


def samples(config: TrainConfig, processes: int) -> int:
    return min(config.micro_batch or config.batch, max(1, config.batch // processes))


def cache_bytes(config: TrainConfig, student: WanConfig, processes: int) -> int:
    rollout = config.rollout
    frames = rollout.frames + rollout.extra_chunks * config.sampling.chunk
    window = rollout.window or config.sampling.window
    kept = frames if config.recompute or window is None else min(window, frames)
    bytes_each = DTYPES[config.precision].itemsize
    size = latent_size(config.model)
    return samples(config, processes) * kept * student.cache_bytes_per_frame(*size, bytes_each)


def graph_bytes(config: TrainConfig, network: WanConfig, processes: int, generates: bool) -> int:
    """What a backward pass through a clip keeps; a student that generates keeps what its chunks saw, too."""
    self_forced = config.method in SELF_FORCING
    frames = config.rollout.frames if self_forced else config.flow.frames
    copies = 2 if config.method in ("teacher-forcing", "ode", "consistency") else 1
    tokens = samples(config, processes) * copies * frames * network.tokens_per_frame(*latent_size(config.model))
    chunks = -(-frames // config.sampling.chunk)
    seen = 2 * network.dim * (chunks + 1) / 2 if generates and self_forced else 0  # keys and values, all chunks before
    block = int(tokens * (2 * network.ffn_dim + 20 * network.dim + seen))
    kept = network.layers * tokens * network.dim + block if config.recompute else network.layers * block
    return kept * DTYPES[config.precision].itemsize
