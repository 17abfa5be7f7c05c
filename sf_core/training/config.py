"""Configuration of a training run: one frozen dataclass, read from YAML.

    method: dmd
    out: runs/dmd
    model: {world: tiny, student: runs/causal, teacher: runs/teacher}
    data: {prompts: prompts.txt}

Every key has the name of a field below; nested keys are nested dataclasses. A key that is none is an error that names
the nearest one. `--set optimizer.lr=1e-4` on the command line changes one value.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from ..sampling.config import Sampling
from .methods.losses import Levels
from .methods.self_rollout import RolloutConfig

METHODS = {
    "dmd": "Self Forcing with distribution matching",
    "sid": "Self Forcing with score identity distillation",
    "gan": "Self Forcing with a discriminator on the critic's features",
    "teacher-forcing": "diffusion loss, noisy chunks beside clean ones",
    "diffusion-forcing": "diffusion loss, a noise level per chunk and no clean chunks",
    "bidirectional": "diffusion loss on whole clips: a teacher",
    "ode": "few-step student from trajectories of a many-step causal teacher",
    "consistency": "few-step student by consistency along a teacher's trajectory",
    "autoencoder": "the autoencoder of the tiny world",
    "decoder": "its decoder, for latents of rollouts",
}
SELF_FORCING = ("dmd", "sid", "gan")
AUTOENCODER_METHODS = ("autoencoder", "decoder")
CONTEXTS = ("own", "teacher-forced")
PRECISIONS = ("bfloat16", "float32")
WORLDS = ("tiny", "wan")
SHIPPED = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class ModelConfig:
    """Networks of a run.

    world      encoders: "tiny", the built-in model's; "wan", the user's files below
    student    a safetensors or .pt file, the folder of an earlier run (its averaged weights), "built-in", or "new"
    teacher    real score of dmd and sid, bidirectional; or source of trajectories for ode and consistency, causal
    critic     initial weights of the fake score; None: the teacher, else the student
    frozen     dtype of weights that are not trained
    width, height   of the video in pixels; 64 x 64 in the tiny world
    text_encoder, tokenizer, vae   files of the wan world
    dim, layers, heads, ffn_dim   shape of a "new" student of the tiny world, where it differs from the shipped one
    """

    world: str = "tiny"
    student: str = "built-in"
    teacher: str | None = None
    critic: str | None = None
    frozen: str = "float32"
    width: int = 64
    height: int = 64
    text_encoder: Path | None = None
    tokenizer: Path | None = None
    vae: Path | None = None
    dim: int | None = None
    layers: int | None = None
    heads: int | None = None
    ffn_dim: int | None = None


@dataclass(frozen=True)
class DataConfig:
    """Training data: one of prompts, clips and procedural.

    prompts     text file, a prompt a line: enough for dmd and sid
    clips       folder of videos, each beside a .txt with its caption: for teachers and gan
    procedural  the tiny world's generator: "trained", "held-out" or "all" combinations
    pool        procedural clips that are drawn and encoded once
    negative    negative prompt of guidance; empty: no prompt
    dropped     caption dropout, 0..1, which guidance needs
    late        share of clips, 0..1, that begin in the middle, as windows later in a video do
    """

    prompts: Path | None = None
    clips: Path | None = None
    procedural: str | None = None
    pool: int = 16384
    negative: str = ""
    dropped: float = 0.1
    late: float = 0.0


@dataclass(frozen=True)
class FlowConfig:
    """The diffusion loss of the baselines, and of what starts a student.

    shift          timestep shift of the noise levels, uniform before it
    frames         latent frames of a clip
    short          share of the steps, the first, on one chunk instead of a clip, with as many more samples
    context_sigma  highest noise level, 0..1, of context chunks in teacher forcing, drawn for each
    guidance       guidance scale of the teacher in ode and consistency
    teacher_steps  Euler steps of that trajectory (ode), or levels of the whole way (consistency)
    consistent     decay of the moving average that is the target of consistency
    """

    shift: float = 5.0
    frames: int = 21
    short: float = 0.0
    context_sigma: float = 0.0
    guidance: float = 4.0
    teacher_steps: int = 48
    consistent: float = 0.95


@dataclass(frozen=True)
class GanConfig:
    """GAN losses, and the discriminator on the critic's features.

    relativistic   logits of generated and real clips are compared with each other
    generator_weight, critic_weight   weights of its losses
    r1, r2         weights of the approximate gradient penalties on real and generated clips
    nudge          epsilon of those penalties: size of the perturbation their finite difference takes
    score_weight   weight of the flow-matching loss that keeps the critic a score network
    layers         blocks whose tokens are pooled, as shares 0..1 of the depth
    """

    relativistic: bool = True
    generator_weight: float = 0.01
    critic_weight: float = 0.01
    r1: float = 1.0
    r2: float = 1.0
    nudge: float = 0.01
    score_weight: float = 1.0
    layers: tuple[float, ...] = (0.45, 0.72, 1.0)


@dataclass(frozen=True)
class LossConfig:
    """Loss of Self Forcing.

    guidance   guidance scale of the real score: null + guidance (prompt - null)
    sid_alpha  alpha of sid
    context    "own": the student's own output (Self Forcing); "teacher-forced": clean clips of the data, a baseline
    levels     noise levels at which the score networks compare clips
    """

    guidance: float = 4.0
    sid_alpha: float = 1.0
    context: str = "own"
    levels: Levels = Levels()
    gan: GanConfig = GanConfig()


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer: AdamW; with `muon_lr`, Muon for matrices.

    Learning rates warm up over the first `warmup` (a share of the run, 0..1) and fall linearly to zero from
    `decay_from` on (1: never). Gradients are clipped to the norm `clip`.
    """

    lr: float = 2e-6
    muon_lr: float | None = None
    betas: tuple[float, float] = (0.0, 0.999)
    weight_decay: float = 0.01
    clip: float = 10.0
    warmup: float = 0.0
    decay_from: float = 1.0


@dataclass(frozen=True)
class CriticConfig:
    """Critic (fake score): `updates` per generator update, each on fresh rollouts or on the generator's own.

    ahead   share of the run, its first steps, in which it learns alone: a new discriminator knows nothing to teach
    """

    updates: int = 5
    fresh: bool = True
    ahead: float = 0.0
    optimizer: OptimizerConfig = OptimizerConfig(lr=4e-7)


@dataclass(frozen=True)
class AverageConfig:
    """Exponential moving average of the student's weights, which is exported. `start`: the first step it takes in."""

    decay: float = 0.99
    start: int = 0


@dataclass(frozen=True)
class LoraConfig:
    """LoRA adapters on the student's linear layers instead of all its weights: weight + (alpha / rank) up down."""

    rank: int = 32
    alpha: float = 32.0
    layers: tuple[str, ...] = ("q", "k", "v", "o", "ffn.0", "ffn.2")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(
                f"Got lora.rank {self.rank}; adapters need a rank of 1 or more. Published ones use 16 to 128."
            )


@dataclass(frozen=True)
class LogConfig:
    """Logging, checkpoints and sample videos.

    every          steps between two updates of the progress bar and TensorBoard
    save_every     steps between two checkpoints
    sample_every   steps between two sample videos (0: none) of the prompts `samples`, `sample_frames` latent frames
    tensorboard    losses and videos for TensorBoard, too
    plot           losses.png beside losses.jsonl at every checkpoint
    """

    every: int = 10
    save_every: int = 100
    sample_every: int = 0
    samples: tuple[str, ...] = ()
    sample_frames: int = 21
    tensorboard: bool = False
    plot: bool = False


@dataclass(frozen=True)
class TrainConfig:
    """Configuration of a training run.

    steps        updates of the student
    batch        batch size of one update, over all processes and passes
    micro_batch  samples of a process at a time; None: its whole share. The rest is accumulated
    precision    dtype of the arithmetic (autocast); weights that are trained stay float32
    recompute    gradient checkpointing: blocks are recomputed in the backward pass
    shard        FSDP2: weights, gradients and optimizer states are sharded over the processes

    Raises ValueError for what does not go together.
    """

    method: str
    out: Path
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    sampling: Sampling = Sampling()
    rollout: RolloutConfig = RolloutConfig()
    loss: LossConfig = LossConfig()
    flow: FlowConfig = FlowConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    critic: CriticConfig = CriticConfig()
    average: AverageConfig = AverageConfig()
    lora: LoraConfig | None = None
    log: LogConfig = field(default_factory=LogConfig)
    steps: int = 1000
    batch: int = 8
    micro_batch: int | None = None
    seed: int = 0
    device: str = "auto"
    precision: str = "bfloat16"
    recompute: bool = False
    shard: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (
            ("method", self.method, METHODS),
            ("precision", self.precision, PRECISIONS),
            ("model.frozen", self.model.frozen, PRECISIONS),
            ("model.world", self.model.world, WORLDS),
            ("loss.context", self.loss.context, CONTEXTS),
        ):
            if value not in known:
                raise ValueError(f"Got {name} {value!r}, which is none. {_nearest(value, known)}")
        if min(self.steps, self.batch, self.micro_batch or 1, self.log.every, self.log.save_every) < 1:
            raise ValueError(
                f"Got {self.steps} steps, batch {self.batch}, micro_batch {self.micro_batch}, log.every "
                f"{self.log.every}, log.save_every {self.log.save_every}; all must be 1 or more."
            )
        if not 0 <= self.critic.ahead < 1:
            raise ValueError(
                f"Got critic.ahead {self.critic.ahead}; it is a share of the run, 0 or more and less than 1. A tenth "
                "is plenty."
            )
        if self.log.sample_every and not self.log.samples:
            raise ValueError(
                f"Got log.sample_every {self.log.sample_every} without prompts to sample. Give log.samples, a list of "
                "prompts."
            )
        self._check_data()
        self._check_networks()
        self._check_context()

    @property
    def needs_clips(self) -> bool:
        forced = self.method in SELF_FORCING and self.loss.context != "own"
        return self.method not in ("dmd", "sid") or forced

    def _check_data(self) -> None:
        data = self.data
        given = [name for name in ("prompts", "clips", "procedural") if getattr(data, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"Got {' and '.join(given) or 'nothing'} under data; a run is trained on one of prompts, clips and "
                "procedural. Keep the one you mean."
            )
        if data.pool < 1:
            raise ValueError(f"Got data.pool {data.pool}; at least one clip must be drawn. The default is 16384.")
        if self.needs_clips and given == ["prompts"]:
            raise ValueError(
                f"Got prompts alone for {self.method}; it needs clips to learn from. Give data.clips, a folder of "
                "videos with captions."
            )
        if given == ["procedural"] and self.model.world != "tiny":
            raise ValueError("Got procedural data outside the tiny world; give data.prompts or data.clips.")

    def _check_networks(self) -> None:
        distilled = ("dmd", "sid", "ode", "consistency")
        if self.method in distilled and not self.model.teacher:
            raise ValueError(f"Got no model.teacher; {self.method} learns from one. Name a file or a run's folder.")
        networks = (self.model.student, self.model.teacher, self.model.critic)
        if self.model.world == "wan" and "built-in" in networks:
            raise ValueError("Got the built-in model in the wan world; it reads the tiny world's prompts. Name a file.")
        if self.model.frozen == "bfloat16" and self.precision == "float32":
            raise ValueError(
                "Got model.frozen bfloat16 with precision float32; frozen weights are computed with in the run's "
                "precision. Use precision: bfloat16, or model.frozen: float32."
            )
        if self.shard and (self.optimizer.muon_lr or self.critic.optimizer.muon_lr):
            raise ValueError("Got Muon with sharded weights; it needs whole matrices. Leave out muon_lr, or shard.")
        if self.lora and self.method == "bidirectional" and self.model.student == "new":
            raise ValueError("Got LoRA on a new student; adapters need trained weights. Name a student, or leave out.")

    def _check_context(self) -> None:
        if self.method in SELF_FORCING and self.recompute and self.sampling.pinned and self.sampling.sink:
            raise ValueError(
                f"Got sampling.pinned with sampling.sink {self.sampling.sink}, and recompute; the keys of pinned sinks "
                "move on before the backward pass reads them again. Use sampling.pinned: false, or recompute: false."
            )
        if self.loss.context == "teacher-forced" and self.rollout.extra_chunks:
            raise ValueError(
                f"Got rollout.extra_chunks {self.rollout.extra_chunks} with loss.context teacher-forced, whose clips "
                "have no chunks before them. Use rollout.extra_chunks: 0."
            )


def read_config(source: str | Path, changes: Sequence[str] = ()) -> TrainConfig:
    """Configuration from a YAML file, or from the shipped one of that name, with changes like "optimizer.lr=1e-4".

    Raises FileNotFoundError, ImportError without PyYAML, and ValueError for what the file cannot mean.
    """
    yaml = _yaml()
    path = Path(source)
    if not path.is_file() and path.suffix == "" and (SHIPPED / f"{source}.yaml").is_file():
        path = SHIPPED / f"{source}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.yaml")))
        raise FileNotFoundError(
            f"Got no file {source}; shipped configurations are {names}. Name one, or a YAML file, or see python -m "
            "sf_core train --help."
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        for change in changes:
            content = _apply_change(content, change, yaml)
    except yaml.YAMLError as error:
        raise ValueError(f"Got {path}, which is not YAML ({' '.join(str(error).split())}). Correct it.") from None
    if not isinstance(content, dict):
        raise ValueError(f"Got {path}, which holds no keys. Start with method, out, model and data.")
    return build(TrainConfig, content)


def build(kind: type, content: dict[str, Any], under: str = "") -> Any:
    """A configuration dataclass from a mapping; `under` is its dotted path, for errors.

    Raises ValueError for keys and values that do not fit.
    """
    known, hints = {f.name: f for f in fields(kind)}, typing.get_type_hints(kind)
    for key in content:
        if key not in known:
            raise ValueError(f"Got the key {under + str(key)!r}, which is none. {_nearest(str(key), known, under)}")
    for name, about in known.items():
        if name not in content and about.default is MISSING and about.default_factory is MISSING:
            raise ValueError(f"Got no {under + name!r}; a run needs it. Add it to the configuration.")
    return kind(**{key: _value(hints[key], value, under + key) for key, value in content.items()})


def _value(hint: Any, value: Any, name: str) -> Any:
    if _is_optional(hint):
        if value is None:
            return None
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
    if is_dataclass(hint):
        if not isinstance(value, dict):
            raise ValueError(
                f"Got {name}: {value!r}; it has keys of its own: {', '.join(f.name for f in fields(hint))}."
            )
        return build(hint, value, f"{name}.")
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"Got {name}: {value!r}; it is a list. Write [{value}].")
        kind, *rest = typing.get_args(hint)
        if rest != [Ellipsis] and len(value) != 1 + len(rest):
            raise ValueError(f"Got {name}: {list(value)}; it has {1 + len(rest)} entries. Give as many.")
        return tuple(_value(kind, item, name) for item in value)
    return _plain(hint, value, name)


def _plain(hint: type, value: Any, name: str) -> Any:
    """A number, a switch, a text or a path. YAML takes 1e-4 for a text; a number is meant."""
    kinds = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path"}
    if isinstance(value, bool) == (hint is bool):
        try:
            number = float(value) if hint in (int, float) else None
        except (TypeError, ValueError):
            number = None
        if number is not None and (hint is float or number.is_integer()):
            return hint(number)
        if hint is bool or (hint in (str, Path) and isinstance(value, str)):
            return hint(value)
    raise ValueError(f"Got {name}: {value!r}; it is {kinds[hint]}.")


def _is_optional(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType) and type(None) in typing.get_args(hint)


def _apply_change(content: dict[str, Any], change: str, yaml: types.ModuleType) -> dict[str, Any]:
    name, equals, value = change.partition("=")
    if not equals:
        raise ValueError(f"Got --set {change}; write it as key=value, e.g. optimizer.lr=1e-4.")
    *path, last = name.split(".")
    here = content = dict(content)
    for key in path:
        inner = here.get(key) or {}
        if not isinstance(inner, dict):
            raise ValueError(f"Got --set {change}; {key} is {inner!r} and has no keys of its own. Write {key}=value.")
        here[key] = dict(inner)
        here = here[key]
    here[last] = yaml.safe_load(value)
    return content


def _nearest(word: str, known: Any, under: str = "") -> str:
    close = difflib.get_close_matches(word, list(known), 1, 0.5)
    return f"Did you mean {under + close[0]!r}?" if close else f"There is {', '.join(known)}."


def _yaml() -> types.ModuleType:
    try:
        import yaml
    except ImportError:
        raise ImportError(
            "Got no PyYAML, which training configurations are read with. Install it: pip install pyyaml."
        ) from None
    return yaml
