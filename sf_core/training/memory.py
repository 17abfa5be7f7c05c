"""Memory of a training run on each device, computed before it starts.

Computed from shapes. With b bytes a number in the run's precision, S tokens a frame, P parameters:

    trained network   weights, gradients, two AdamW moments in float32: 16 P; the student's average 4 P more, in
                      consistency 12 P: a second average, and the weights that it takes the place of meanwhile
    frozen network    P times the bytes of model.frozen; so the weights under adapters, where they are not sharded
    cache             2 layers frames S dim b a sample, of whole rollouts where blocks run again
    activations       what the largest loss of a step keeps for its backward pass, and the block that is at work
    autoencoder       Wan's, in its file's dtype
    text              UMT5's encoder, in the wan world: in bfloat16, or float8 as its file has it

A forward saves of each block its input alone with `recompute`, else about (2 ffn_dim + 23 dim) b a token (28 dim in
bfloat16, half of all where weights are frozen), its weights once more where they are cast, and in a rollout the keys
and values that each chunk saw; always the prompt's keys and values. A loss holds the graphs of its forwards:

    dmd     student, or critic; the scores run without gradient, the real one under two prompts at once
    sid     student, critic, and teacher under two prompts; or critic
    gan     student and critic; or critic for real and generated clips and a perturbation of each

After the backward pass AdamW and the averaging of gradients need a copy of these, at most what a graph took before.
Sharding divides weights and their company by the number of processes; the blocks in use, two at a time, are whole.
Weights and cache are exact. Activations are an estimate from above: coefficients are those of tensors that autograd
saves with a fused attention kernel; on a CPU there are the scores of plain attention, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ..autoencoders.wan_vae import WanVAE
from ..checkpoints.load import describe as describe_file
from ..checkpoints.tensorfiles import read_header
from ..device import available_memory
from ..memory import MemoryPlan
from ..sampling.families import DEFAULT
from ..sampling.plan import Plan
from ..text_encoder import bytes_loaded
from ..wan.config import WanConfig
from ..wan.model import WanModel
from .config import AUTOENCODER_METHODS, SELF_FORCING, ModelConfig, TrainConfig
from .encoders import DTYPES, NEW, check_exists, latent_size, student_dtype
from .lora import has_adapter
from .methods.discriminator import Discriminator
from .run_folder import CHECKPOINT, load_run

GIB = 2**30
WAN_14B = WanConfig(dim=5120, ffn_dim=13824, heads=40, layers=40)
UMT5_BYTES = 2 * (256384 * 4096 + 24 * (4 * 4096**2 + 3 * 4096 * 10240))  # umt5-xxl's encoder in bfloat16
REMEDIES = (
    "Use recompute: true, a smaller micro_batch or clip, shard: true over more devices, or model.frozen: bfloat16 "
    "(with precision: bfloat16)."
)
NAMED = {"wan-1.3b": WanConfig(), "wan-14b": WAN_14B}


@dataclass(frozen=True)
class TrainingMemory:
    """Memory of a run on one device, in bytes, by what takes it."""

    student: int
    critic: int
    teacher: int
    gathered: int
    cache: int
    activations: int
    text: int
    autoencoder: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    def __str__(self) -> str:
        parts = [f"{name} {value / GIB:.1f}" for name, value in vars(self).items() if value]
        return f"{self.total / GIB:.1f} GiB a device: {', '.join(parts)}"


@dataclass(frozen=True)
class NetworkShapes:
    """Shapes of a run's networks; None for one it does not have."""

    student: WanConfig
    critic: WanConfig | None
    teacher: WanConfig | None


def plan_memory(config: TrainConfig, processes: int = 1, device: torch.device | None = None) -> TrainingMemory:
    """Memory plan of a run that `processes` devices share; on GPUs unless the configuration or `device` says otherwise.

    Raises as opening its files does.
    """
    device = device or torch.device("cpu" if config.device == "cpu" else "cuda")
    student = read_shape(config.model.student, config.model)
    self_forced = config.method in SELF_FORCING
    followed = config.model.teacher if config.method in ("dmd", "sid", "ode", "consistency") else None
    teacher = read_shape(followed, config.model) if followed else None
    begun = config.model.critic or config.model.teacher or config.model.student
    critic = read_shape(begun, config.model) if self_forced else None
    shares = processes if config.shard else 1
    networks = [network for network in (student, critic, teacher) if network]
    trained = max(count_trained_parameters(config, student), count_parameters(critic) if critic else 0)
    update = 4 * trained // shares
    return TrainingMemory(
        student=student_bytes(config, student) // shares,
        critic=16 * (count_parameters(critic) + discriminator_parameters(config, critic)) // shares if critic else 0,
        teacher=count_parameters(teacher) * DTYPES[config.model.frozen].itemsize // shares if teacher else 0,
        gathered=sum(gathered_bytes(network, config) for network in networks) if config.shard else 0,
        cache=cache_bytes(config, student, processes) if self_forced else 0,
        activations=max(graph_bytes(config, NetworkShapes(student, critic, teacher), processes, device), update),
        text=text_bytes(config.model) if config.model.world == "wan" else 0,
        autoencoder=autoencoder_bytes(config.model) if config.model.world == "wan" else 0,
    )


def check_memory(config: TrainConfig, processes: int, device: torch.device) -> None:
    """Raises MemoryError, with the plan and remedies, for a run that does not fit."""
    if config.method in AUTOENCODER_METHODS:
        return
    available, plan = available_memory(device), plan_memory(config, processes, device)
    together = processes if device.type == "cpu" else 1  # processes on one CPU share its memory
    if available is not None and plan.total * together > available:
        raise MemoryError(f"Got {available / GIB:.1f} GiB of memory; this run takes {plan}. {REMEDIES}")


def out_of_memory(config: TrainConfig, processes: int, device: torch.device) -> MemoryError:
    """Out of memory, as an error with the plan and remedies."""
    plan = (
        ""
        if config.method in AUTOENCODER_METHODS
        else f", where {plan_memory(config, processes, device)} were expected"
    )
    return MemoryError(f"Got out of memory on {device}{plan}. {REMEDIES}")


def read_shape(source: str, model: ModelConfig) -> WanConfig:
    """The shape of a network, from what its file or run says. `wan-1.3b` and `wan-14b` stand for files to come."""
    path = Path(source)
    if source in NAMED:
        return NAMED[source]
    if source in ("new", "built-in"):
        return NEW if model.world == "tiny" else WanConfig()
    if (path / CHECKPOINT).is_file():
        return WanConfig(**load_run(path)["wan"])
    return describe_file(check_exists(path), DEFAULT).config


def text_bytes(model: ModelConfig) -> int:
    """Bytes of the text encoder as its file has it; in bfloat16 where that is a file to come."""
    path = model.text_encoder
    return bytes_loaded(path) if path and path.exists() else UMT5_BYTES


def autoencoder_bytes(model: ModelConfig) -> int:
    """Bytes of Wan's autoencoder as its file has it; in float32 where that is a file to come."""
    if model.vae and model.vae.exists():
        return sum(tensor.nbytes for tensor in read_header(model.vae).tensors.values())
    with torch.device("meta"):
        return 4 * sum(p.numel() for p in WanVAE().parameters())


def count_parameters(config: WanConfig) -> int:
    """Parameters of a network of that shape."""
    return sum(p.numel() for p in WanModel(config, device="meta").parameters())


def count_trained_parameters(config: TrainConfig, student: WanConfig) -> int:
    """Trained parameters: the student's, or its adapters'."""
    if config.lora is None:
        return count_parameters(student)
    linear = [
        module
        for name, module in WanModel(student, device="meta").named_modules()
        if isinstance(module, torch.nn.Linear) and has_adapter(name, config.lora)
    ]
    return sum(config.lora.rank * sum(module.weight.shape) for module in linear)


def student_bytes(config: TrainConfig, student: WanConfig) -> int:
    """Bytes of the student: weights, gradients, AdamW's moments and averages."""
    averages = 12 if config.method == "consistency" else 4
    frozen = student_dtype(config).itemsize * count_parameters(student) if config.lora else 0
    return frozen + (16 + averages) * count_trained_parameters(config, student)


def discriminator_parameters(config: TrainConfig, critic: WanConfig) -> int:
    """Parameters of the discriminator of `gan`."""
    if config.method != "gan":
        return 0
    with torch.device("meta"):
        return sum(p.numel() for p in Discriminator(critic, config.loss.gan.layers).parameters())


def gathered_bytes(network: WanConfig, config: TrainConfig) -> int:
    """Bytes of gathered weights under sharding: two blocks and what is outside of blocks, in the run's precision."""
    outside = outside_blocks(network)
    block = (count_parameters(network) - outside) // network.layers
    return (2 * block + outside) * DTYPES[config.precision].itemsize


def outside_blocks(network: WanConfig) -> int:
    """Parameters of embeddings and head."""
    return sum(p.numel() for name, p in WanModel(network, device="meta").named_parameters() if "blocks." not in name)


def samples_per_pass(config: TrainConfig, processes: int) -> int:
    """Samples of one pass of a process."""
    return min(config.micro_batch or config.batch, max(1, config.batch // processes))


def cache_bytes(config: TrainConfig, student: WanConfig, processes: int) -> int:
    """Bytes of the KV cache of a self-rollout, extra chunks included; of every frame where blocks are recomputed."""
    rollout, sampling = config.rollout, config.rollout.sampling(config.sampling)
    frames = rollout.frames + rollout.extra_chunks * sampling.chunk
    plan = Plan(sampling, frames, *latent_size(config.model), samples_per_pass(config, processes))
    return MemoryPlan(student, plan, DTYPES[config.precision], keeps_all=config.recompute).use.cache


def graph_bytes(config: TrainConfig, networks: NetworkShapes, processes: int, device: torch.device) -> int:
    """Bytes of the largest loss of a step: what it saves for its backward pass, and the block at work."""
    return max(sum(kept) + work for kept, work in loss_bytes(config, networks, processes, device).values())


def loss_bytes(
    config: TrainConfig, networks: NetworkShapes, processes: int, device: torch.device
) -> dict[str, tuple[list[int], int]]:
    """Bytes of every loss of a step: (those of each graph that it holds, those of the block at work)."""
    student, critic, teacher = networks.student, networks.critic, networks.teacher
    each = samples_per_pass(config, processes)
    forward, frozen = partial(ForwardMemory, config, device), DTYPES[config.model.frozen]
    if config.method not in SELF_FORCING:
        copies = 2 if config.method in ("teacher-forcing", "ode", "consistency") else 1
        once = forward(student, each, copies * config.flow.frames, student_dtype(config))
        guided = (
            forward(teacher, 2 * each, copies * config.flow.frames, frozen, frozen=True).workspace if teacher else 0
        )
        return {"loss": ([once.saved], max(once.workspace, guided))}
    frames, chunk = config.rollout.frames, config.sampling.chunk
    rollout = forward(student, each, frames, student_dtype(config), chunks=-(-frames // chunk))
    score = forward(critic, each, frames)
    both = each if config.loss.guidance == 1 else 2 * each
    real = forward(teacher, both, frames, frozen, frozen=True) if teacher else None
    if config.method == "dmd":
        generator = [rollout.saved], max(rollout.workspace, score.workspace, real.workspace)
        return {"generator": generator, "critic": ([score.saved], score.workspace)}
    if config.method == "sid":
        work = max(rollout.workspace, score.workspace, real.workspace)
        return {
            "generator": ([rollout.saved, score.saved, real.saved], work),
            "critic": ([score.saved], score.workspace),
        }
    gan, logit = config.loss.gan, score.saved + score.pool_bytes(len(config.loss.gan.layers))
    forwards = [logit] * (2 + (gan.r1 > 0) + (gan.r2 > 0))
    work = max(rollout.workspace, score.workspace)
    return {"generator": ([rollout.saved, logit], work), "critic": (forwards, score.workspace)}


@dataclass(frozen=True)
class ForwardMemory:
    """Memory of one forward of `samples` clips of `frames` latent frames; of a rollout, one for each of its `chunks`.

    weights  their dtype
    frozen   whether it is the clips alone that get gradients
    """

    config: TrainConfig
    device: torch.device
    network: WanConfig
    samples: int
    frames: int
    weights: torch.dtype = torch.float32
    chunks: int = 1
    frozen: bool = False

    @property
    def saved(self) -> int:
        """Bytes saved for the backward pass."""
        net, is_rollout = self.network, self.chunks > 1
        block = self.tokens * net.dim * self.bytes if self.config.recompute else self.block_bytes(self.tokens)
        inside = net.layers * block
        outside = 5 * self.tokens * net.dim * self.bytes  # embeddings and head
        text = self.samples * net.text_len * (net.text_dim + (6 * net.layers + 4) * net.dim) * self.bytes
        cast = self.cast_bytes(recomputed=self.config.recompute) * (self.chunks if is_rollout else 1)
        return inside + outside + text + cast

    @property
    def workspace(self) -> int:
        """Bytes of the block that is at work: recomputed, or of a network that runs without gradient."""
        return self.block_bytes(-(-self.tokens // self.chunks))

    def pool_bytes(self, count: int) -> int:
        """Bytes that attention pools save of the tokens after `count` blocks: in float32, normed, keys and values."""
        return 4 * 4 * count * self.tokens * self.network.dim

    @property
    def bytes(self) -> int:
        return DTYPES[self.config.precision].itemsize

    @property
    def tokens(self) -> int:
        return self.samples * self.frames * self.network.tokens_per_frame(*latent_size(self.config.model))

    def block_bytes(self, tokens: int) -> int:
        """Bytes that one block saves of `tokens` tokens, without its weights."""
        net, share = self.network, 2 if self.frozen else 1
        numbers = (2 * net.ffn_dim + (23 if self.bytes == 4 else 28) * net.dim) // share
        # Every chunk keeps the keys and values of all chunks before and of its own.
        numbers += net.dim * (self.chunks + 1) if self.chunks > 1 else 0
        scores = 0
        if self.device.type == "cpu":  # in float32, and in the precision of the values
            seen = self.tokens // self.samples * (self.chunks + 1) // (2 * self.chunks) + net.text_len
            scores = net.heads * seen * (4 if self.bytes == 4 else 4 + self.bytes)
        return tokens * (numbers * self.bytes + scores)

    def cast_bytes(self, recomputed: bool) -> int:
        """Bytes of weights cast to the precision of the arithmetic; sharded ones are gathered in it."""
        if self.config.shard or self.weights == DTYPES[self.config.precision]:
            return 0
        net = self.network
        prompt = 2 * net.layers * net.dim**2  # the layers that read the prompt never run again
        return (outside_blocks(net) + prompt if recomputed else count_parameters(net)) * self.bytes
