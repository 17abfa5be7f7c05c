"""A prompt goes in, frames come out, chunk by chunk: with the built-in model, or with a user's files.

    from sf_core.pipeline import TinyPipeline
    from sf_core.video import save_video

    pipeline = TinyPipeline()                                  # or FilePipeline(model, text_encoder, vae)
    save_video("circle.mp4", pipeline("a red circle moves right", frames=81, seed=0), fps=16)

    prompts -> embeddings -> rollout -> latent chunk -> streaming decoder -> frames

Videos are made in whole chunks and cut to the frames asked for, so the first frames are the same for any length. Each
network is loaded when it is its turn, and the text encoder, the largest, is gone before the model comes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import memory, tiny
from .autoencoders import taehv, wan_vae
from .autoencoders.stream import DecoderStream, EncoderStream, latent_frames, pixel_frames
from .checkpoints.autoencoder import WAN_VAES, Autoencoder, load_autoencoder
from .checkpoints.load import (
    Checkpoint,
    Description,
    dequantised,
    describe,
    load_checkpoint,
    load_memory,
    load_model,
    plain_dtype,
    quantised_error,
)
from .device import HostCopy, Timer, available_memory, default_device, default_dtype, release_memory
from .memory import DecoderMemory, MemoryPlan
from .sampling.config import PRESETS, Sampling
from .sampling.context import Reencode
from .sampling.noise import SeededNoise
from .sampling.plan import Chunk, Plan, round_up_to_chunks
from .sampling.prompt_text import EncodedPrompt, Prompt, parse, scene_texts, schedule
from .sampling.prompts import PromptSchedule
from .sampling.rollout import OnStep, rollout
from .text_encoder import bytes_loaded, load_text_encoder
from .wan.attention import Attention, sdpa
from .wan.config import WanConfig
from .wan.fp8 import E4M3, Fp8Linear, quantise_block, quantise_model
from .wan.model import EAGER, BlockOps, Network, WanModel
from .wan.offload import BlockLoader

if TYPE_CHECKING:  # a machine that only measures needs no PyAV
    from .video import Clip

TEXT_ENCODER_WORK = 2**30  # bytes that a text encoder takes beside its weights, roughly
PIECE = 16  # frames of a clip that are encoded at a time: 4 latents, what a tile takes in one turn
NATIVE, FITTED = 72, 60  # bytes per pixel of a clip's own frames, and of each frame of a piece, while it is read
Stream = DecoderStream | wan_vae.DecoderStream


@dataclass(frozen=True)
class Runtime:
    """Device, dtypes and kernels that a pipeline computes with.

    dtype        None: bfloat16 on a GPU, float32 on a CPU
    fp8          weights of the blocks in float8
    cache_dtype  dtype of the KV cache; None: `dtype`. torch.float8_e4m3fn takes half the memory of bfloat16
    tile         side of the decoder's tiles in latent pixels; None: the whole picture at once
    attention    attention kernel; see `attention_kernel`
    ops          block operations; see `compile_ops`
    offload      blocks of a user's model wait in the CPU's memory and come one at a time
    """

    device: torch.device = field(default_factory=default_device)
    dtype: torch.dtype | None = None
    fp8: bool = False
    cache_dtype: torch.dtype | None = None
    tile: int | None = None
    attention: Attention = sdpa
    ops: BlockOps = EAGER
    offload: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", torch.device(self.device))
        object.__setattr__(self, "dtype", self.dtype or default_dtype(self.device))


@dataclass(frozen=True)
class ClipFrames:
    """Frames of a clip in a file, read as they are asked for, so that memory does not grow with it.

    size, fps, most  see `video.Clip.frames`
    watch            pieces -> the same pieces, as a progress bar sees them go by
    """

    clip: Clip
    size: tuple[int, int]
    fps: float
    most: int | None = None
    watch: Callable[[Iterator[Tensor]], Iterator[Tensor]] = iter

    def __len__(self) -> int:
        return self.clip.count(self.fps, self.most)

    @property
    def bytes(self) -> int:
        """Bytes of the machine's memory that are taken while it is read, however long it is.

        Frames at their own size as they are decoded and converted, also by the decoder's threads, and a piece at its
        new size; more than what was measured for films of 1080p and 4K, with 8 and 10 bits, photos of 24 megapixels.
        """
        return NATIVE * self.clip.width * self.clip.height + FITTED * PIECE * self.size[0] * self.size[1]

    def pieces(self) -> Iterator[Tensor]:
        """Pieces [n, H, W, 3] in 0..1. Raises OSError and ValueError as `Clip.frames` does."""
        return self.watch(self.clip.frames(self.size, self.fps, self.most))


@dataclass(frozen=True)
class Request:
    """A video to make: `frames` pixel frames of `width` x `height` pixels, even multiples of `space`.

    prompt, fps         a prompt, or several with their times, and the rate at which those are counted
    sampling            how the model is sampled
    start               frames [T, H, W, 3] in 0..1, or of a file, that the video begins with, in whole latent frames
    keep_start          whether the start is a part of the frames that come out
    full_history        the start is a video that was generated: all of it is read, however long
    source, strength    frames, likewise, of a video to make another of, and how much of it gives way, in (0, 1]
    negative, guidance  a prompt to lead away from, where guidance (CFG) is not 1
    reencode            first-frame re-encode, for models of short clips; some are sampled so by themselves
    space               pixels to a latent pixel of the model
    """

    prompt: str
    frames: int
    width: int
    height: int
    sampling: Sampling
    fps: int = 16
    seed: int = 0
    start: Tensor | ClipFrames | None = None
    keep_start: bool = True
    full_history: bool = False
    source: Tensor | ClipFrames | None = None
    strength: float = 1.0
    negative: str = ""
    guidance: float = 1.0
    reencode: bool = False
    space: int = 8

    @property
    def prefix(self) -> int:
        """Latent frames of the start."""
        return 0 if self.start is None else latent_frames(len(self.start) - (len(self.start) - 1) % 4)

    @property
    def skipped(self) -> int:
        """Pixel frames of the start that do not come out."""
        return pixel_frames(self.prefix) if self.prefix and not self.keep_start else 0

    @cached_property
    def prompts(self) -> tuple[Prompt, ...]:
        """Raises ValueError for an empty prompt, and for a schedule that is none."""
        if not self.prompt.strip():
            raise ValueError(
                "Got an empty prompt; the model needs words to follow. Write what the video shows, such as a red "
                "circle moves right."
            )
        prompts = parse(self.prompt, self.fps)
        return tuple(map(_as_scene, prompts)) if self.sampling.shots else prompts

    @property
    def reencodes(self) -> bool:
        """Whether first-frame re-encode is asked for, or what the model was made for."""
        return self.reencode or self.sampling.reencode

    @property
    def rereads(self) -> bool:
        """Whether a prompt, or re-encoding, makes the model read its window again."""
        starts = [prompt.start.transition for prompt in self.prompts[1:]]
        return self.reencodes or any(map(self.sampling.rereads_at, starts))

    def plan(self, cache_dtype: torch.dtype | None = None) -> Plan:
        """Size and chunks of the rollout, in whole chunks. Raises ValueError as `Plan` does, and for an odd size."""
        step = 2 * self.space
        if self.width % step or self.height % step:
            near = [max(step, round(pixels / step) * step) for pixels in (self.width, self.height)]
            raise ValueError(
                f"Got {self.width} x {self.height} pixels; this model's videos are multiples of {step} wide and high. "
                f"Use {near[0]} x {near[1]}."
            )
        frames = round_up_to_chunks(latent_frames(self.frames), self.sampling, self.prefix)
        strength = 1.0 if self.source is None else self.strength
        size = (self.height // self.space, self.width // self.space)
        return Plan(self.sampling, frames, *size, 1, self.prefix, self.full_history, strength, cache_dtype)


@dataclass(frozen=True)
class Generation:
    """A rollout with all that it needs at hand: what command line, nodes and benchmarks run.

    prefix, source  latents [B, C, F, H, W] in model space; see `rollout`
    """

    network: Network
    plan: Plan
    prompts: PromptSchedule
    seed: int = 0
    prefix: Tensor | None = None
    source: Tensor | None = None
    reencode: Reencode | None = None

    def chunks(self, on_step: OnStep | None = None) -> Iterator[tuple[Chunk, Tensor]]:
        """(chunk, latents [B, C, frames, H, W] in model space), as they are made."""
        return rollout(
            self.network, self.plan, self.prompts, SeededNoise(self.seed),
            prefix=self.prefix, source=self.source, reencode=self.reencode, on_step=on_step,
        )  # fmt: skip

    def latents(self, on_step: OnStep | None = None) -> Tensor:
        """All latents [B, C, F, H, W] in model space."""
        return torch.cat([x0 for _, x0 in self.chunks(on_step)], 2)

    def frames(
        self, decoder: Stream, length: int, on_step: OnStep | None = None, timer: Timer | None = None
    ) -> Iterator[Tensor]:
        """The first `length` frames, in pieces [B, T, H, W, 3] in 0..1 on the CPU, as `pieces` makes them."""
        for piece in self.pieces(decoder, length, on_step, timer):
            yield piece.wait()

    def pieces(
        self, decoder: Stream, length: int, on_step: OnStep | None = None, timer: Timer | None = None
    ) -> Iterator[HostCopy]:
        """The same, on their way to the CPU: latent by latent of the first chunk, which is waited for, then one piece
        per chunk. A GPU has not made them yet; hand them to a thread that waits, as `run_beside` does.
        """
        timer, wanted = timer or Timer(self.prompts.device), latent_frames(length)
        for chunk, x0 in timer.each("rollout", self.chunks(on_step)):
            x0 = x0[:, :, : wanted - chunk.start]
            for latents in x0.split(x0.shape[2] if chunk.index else 1, 2):
                with timer.queued("decode"):
                    frames = decoder.decode(latents)[:, :length]
                    piece = HostCopy(frames)
                length -= frames.shape[1]
                yield piece


class Pipeline(ABC):
    """The networks that a video takes, and how they are put to work.

    name           what is used, for people
    note           what else there is to say of it
    networks       sets of weights: 2 where another writes the cache
    sampling       how the model is sampled unless a request says otherwise
    width, height  pixels of a video unless a request says otherwise
    frames         pixel frames, likewise: the length of a training clip
    fps            frames per second, likewise
    """

    name: str
    note: str = ""
    networks: int = 1
    sampling: Sampling
    width: int
    height: int
    frames: int = 81  # 21 latent frames
    fps: int = 16

    def __init__(self, runtime: Runtime | None = None) -> None:
        self.runtime = runtime or Runtime()

    def __call__(self, prompt: str | Request, **settings) -> Iterator[Tensor]:
        """Frames [T, H, W, 3] in 0..1 of a prompt, chunk by chunk, as they are made.

        `settings` are fields of `Request`: frames, seed, width, start, guidance, ... Raises ValueError for those that
        do not go together, before anything large is loaded.
        """
        request = prompt if isinstance(prompt, Request) else self.request(prompt, **settings)
        request.plan()
        return self._frames(request)

    def request(self, prompt: str, **settings) -> Request:
        """A request with the model's own size and sampling, where `settings` do not say otherwise.

        It is as long as its source, or as a training clip, which a start comes before but for one frame of it.
        """
        start, source = settings.get("start"), settings.get("source")
        begun = 1 if start is None else len(start) - (len(start) - 1) % 4
        frames = begun + self.frames - 1 if source is None else len(source)
        usual = {"frames": frames, "width": self.width, "height": self.height, "sampling": self.sampling}
        return Request(prompt, **{**usual, "fps": self.fps, "space": self.config.space, **settings})

    def memory_plan(self, request: Request) -> MemoryPlan:
        """What a request takes of the device's memory, before anything large is loaded."""
        return MemoryPlan(
            config=self.config,
            plan=request.plan(self.runtime.cache_dtype),
            dtype=self.runtime.dtype,
            weights=self.weight_bytes,
            decoder=self.decoder_memory,
            fp8=self.runtime.fp8,
            tile=self.runtime.tile,
            rereads=request.rereads,
            guided=request.guidance != 1,
            networks=self.networks,
            offload=self.runtime.offload,
        )

    def prepare(
        self, request: Request, timer: Timer | None = None, on_ignored: Callable[[str, list[str]], None] | None = None
    ) -> tuple[Generation, Stream]:
        """The rollout of a request and the decoder of its latents; networks are loaded one after the other.

        on_ignored  called with (reason, words) where some words of a prompt do not count
        """
        runtime, timer = self.runtime, timer or Timer(self.runtime.device)
        plan = request.plan(runtime.cache_dtype)
        prefix = self._encode_clip(request.start, pixel_frames(request.prefix), timer)
        source = self._encode_clip(request.source, pixel_frames(plan.frames), timer)
        with timer.measure("load"):
            autoencoder, text = self.load_autoencoder(), self.load_text_encoder()
            decoder = self.decoder_stream(autoencoder)
        for prompt in request.prompts:
            for words, reason in self.ignored_words(text, prompt.text):
                if words and on_ignored:
                    on_ignored(reason, words)
        with timer.measure("prompt"):
            prompts = self._encode_prompts(text, request, plan)
        del text
        release_memory(runtime.device)
        reencode = (lambda latents: self.encode_still(autoencoder, latents)) if request.reencodes else None
        with timer.measure("load"):
            wan, written = self.load_model(), self.load_memory()
            ops = self._block_ops(wan, written)
            network = Network(wan, runtime.dtype, runtime.attention, ops, memory=written)
        return Generation(network, plan, prompts, request.seed, prefix, source, reencode), decoder

    def _frames(self, request: Request) -> Iterator[Tensor]:
        generation, decoder = self.prepare(request)
        return drop_frames((piece[0] for piece in generation.frames(decoder, request.frames)), request.skipped)

    def _block_ops(self, *models: WanModel | None) -> BlockOps:
        """Block operations that bring blocks to the device, where they wait in the CPU's memory."""
        runtime = self.runtime
        if not runtime.offload:
            return runtime.ops
        call = runtime.ops.call
        for wan in filter(None, models):
            call = BlockLoader(wan, runtime.device, call)
        return runtime.ops._replace(call=call)

    def _encode_clip(self, clip: Tensor | ClipFrames | None, length: int, timer: Timer) -> Tensor | None:
        """Latents [1, C, F, H, W] of frames, cut or with the last one repeated to `length`; the encoder is freed."""
        if clip is None:
            return None
        with timer.measure("encode"):
            latents = self.encode(self.load_autoencoder(), fit_length(clip, length))
        release_memory(self.runtime.device)
        return latents

    def _encode_prompts(self, text: nn.Module, request: Request, plan: Plan) -> PromptSchedule:
        def place(embeds: Tensor) -> Tensor:
            return embeds.to(self.runtime.device, self.runtime.dtype)

        def encode(prompt: Prompt) -> EncodedPrompt:
            words = scene_texts(prompt) if request.sampling.shots and prompt.start.at else None
            scene = words and place(text.encode([words[0]]))
            return EncodedPrompt(prompt.start, place(text.encode([prompt.text])), scene)

        prompts = list(map(encode, request.prompts))
        negative = place(self.encode_negative(text, request.negative)) if request.guidance != 1 else None
        return schedule(prompts, plan.chunks, negative, request.guidance)

    # --- What one pipeline has and another has not -------------------------------------------------------------------

    config: WanConfig
    weight_bytes: int
    decoder_memory: DecoderMemory

    @abstractmethod
    def load_model(self) -> WanModel:
        """The model on its device, in float8 where that was asked for."""

    def load_memory(self) -> WanModel | None:
        """The network that writes the cache, where it is another than the one that denoises."""
        return None

    @abstractmethod
    def load_text_encoder(self) -> nn.Module:
        """Prompt -> embeddings; dropped before the model comes."""

    @abstractmethod
    def load_autoencoder(self) -> nn.Module:
        """Latents <-> frames."""

    @abstractmethod
    def decoder_stream(self, autoencoder: nn.Module) -> Stream:
        """Latents in model space -> frames, streaming. Raises ValueError for tiles that it does not have."""

    @abstractmethod
    def encode(self, autoencoder: nn.Module, pieces: Iterator[Tensor]) -> Tensor:
        """Pieces [1, n, H, W, 3] of 1 + 4k frames in 0..1 -> latents [1, C, 1 + k, H, W] in model space, on the CPU."""

    @abstractmethod
    def encode_still(self, autoencoder: nn.Module, latents: Tensor) -> Tensor:
        """The last picture of latents [1, C, F, H, W] as the latent [1, C, 1, H, W] of a still."""

    @abstractmethod
    def encode_negative(self, text: nn.Module, prompt: str) -> Tensor:
        """Embeddings [1, tokens, text_dim] of a prompt to lead away from; it may be empty."""

    @abstractmethod
    def ignored_words(self, text: nn.Module, prompt: str) -> Iterator[tuple[list[str], str]]:
        """(words, why they will not count). May raise ValueError if none of the prompt does."""


class TinyPipeline(Pipeline):
    """The built-in model."""

    name = "built-in"
    sampling = PRESETS["tiny"]
    width = height = 64
    decoder_memory = memory.BUILT_IN

    @cached_property
    def model(self) -> WanModel:
        return tiny.load_transformer(torch.device("cpu"), torch.float32)

    @property
    def config(self) -> WanConfig:
        return self.model.config

    @property
    def weight_bytes(self) -> int:
        return sum(weight.numel() for weight in self.model.parameters()) * self.runtime.dtype.itemsize

    def load_model(self) -> WanModel:
        wan, runtime = self.model, self.runtime
        if runtime.fp8:
            del self.model  # quantised in place: the next video begins with plain weights again
            return quantise_onto(wan, runtime.device, runtime.dtype)
        return wan.to(runtime.device, runtime.dtype)

    def load_text_encoder(self) -> nn.Module:
        return tiny.load_text_encoder().to(self.runtime.device)

    def load_autoencoder(self) -> nn.Module:
        return tiny.load_autoencoder()

    def decoder_stream(self, autoencoder: nn.Module) -> DecoderStream:
        _refuse_tiles(self.runtime.tile, "the built-in decoder")
        return DecoderStream(autoencoder.to(self.runtime.device, self.runtime.dtype))

    def encode(self, autoencoder: nn.Module, pieces: Iterator[Tensor]) -> Tensor:
        return autoencoder.encode_pieces(pieces)

    def encode_still(self, autoencoder: nn.Module, latents: Tensor) -> Tensor:
        return autoencoder.still(latents)

    def encode_negative(self, text: nn.Module, prompt: str) -> Tensor:
        return text.encode([prompt]) if prompt.strip() else text.null(1)

    def ignored_words(self, text: nn.Module, prompt: str) -> Iterator[tuple[list[str], str]]:
        text.tokens(prompt)
        yield text.unknown(prompt), "the built-in model does not know these words and leaves them out"
        yield text.truncated(prompt), "the built-in model has no room for these words and leaves them out"


@dataclass(frozen=True)
class ModelFiles:
    """A user's files: a causal Wan model, its text encoder and its autoencoder.

    vae            a Wan VAE or, with `is_taehv`, a TAEHV
    tokenizer      where the text encoder's file lacks it
    family         how the model is sampled; None: guessed
    loras          merged into the model in this order: (file, strength)
    """

    model: Path
    text_encoder: Path
    vae: Path
    is_taehv: bool = False
    tokenizer: Path | None = None
    family: str | None = None
    loras: tuple[tuple[Path, float], ...] = ()


class FilePipeline(Pipeline):
    """A user's files. Only the model's header is read at first; raises as `checkpoints.load.describe` does."""

    def __init__(self, files: ModelFiles, runtime: Runtime | None = None) -> None:
        super().__init__(runtime)
        self.files = files
        self.description = describe(files.model, files.family, files.loras)
        if self.description.quantised:
            raise quantised_error(files.model.name, self.description.quantised)
        self.name, self.note, self.sampling = str(files.model), self.description.note, self.description.sampling
        self.config, self.networks = self.description.config, self.description.networks
        is_wan22 = self.config.space == 16
        self.width, self.height = (1280, 704) if is_wan22 else (832, 480)
        self.frames, self.fps = (125, 24) if is_wan22 else (81, 16)  # 32 latent frames, or 21
        small, large = (memory.TAEHV22, memory.WAN22_VAE) if is_wan22 else (memory.TAEHV, memory.WAN_VAE)
        self.decoder_memory = small if files.is_taehv else large

    @property
    def weight_bytes(self) -> int:
        return loaded_weight_bytes(self.description, self.runtime.dtype)

    @property
    def is_light(self) -> bool:
        """Whether the TAEHV is lighttaew2_1; nothing but the name tells."""
        return "lighttae" in self.files.vae.name.lower()

    def load_model(self) -> WanModel:
        files, dtype = self.files, self.runtime.dtype
        device = torch.device("cpu") if self.runtime.offload else self.runtime.device  # blocks stay there then
        if self.description.dtype is E4M3:
            wan = load_fp8_model(load_checkpoint(files.model, files.family), device, dtype)  # takes no LoRA
            wan = quantise_model(wan) if self.runtime.fp8 else wan  # what the file has in another dtype
        elif self.runtime.fp8:
            wan = quantise_onto(load_model(files.model, family=files.family, loras=files.loras)[0], device, dtype)
        else:
            wan = load_model(files.model, device, dtype, files.family, files.loras)[0]
        return self._place(wan)

    def load_memory(self) -> WanModel | None:
        if self.description.networks == 1:
            return None
        dtype = self.runtime.dtype
        device = torch.device("cpu") if self.runtime.offload else self.runtime.device
        checkpoint = load_checkpoint(self.files.model, self.files.family)
        if self.runtime.fp8:
            wan = load_memory(checkpoint, "cpu", plain_dtype(checkpoint.dtype))
            return self._place(quantise_onto(wan, device, dtype))
        return self._place(load_memory(checkpoint, device, dtype))

    def _place(self, wan: WanModel) -> WanModel:
        """The model with all that is not a block on the device, where blocks stay behind."""
        for name, part in wan.named_children() if self.runtime.offload else ():
            if name != "blocks":
                part.to(self.runtime.device)
        return wan

    def load_text_encoder(self) -> nn.Module:
        """UMT5, on the device if it fits there, else on the CPU."""
        room, files = available_memory(self.runtime.device), self.files
        fits = room is None or bytes_loaded(files.text_encoder) + TEXT_ENCODER_WORK < room
        return load_text_encoder(files.text_encoder, files.tokenizer, self.runtime.device if fits else "cpu")

    def load_autoencoder(self) -> Autoencoder:
        wan = WAN_VAES.get(self.config.channels, wan_vae.WanVAE)
        kind = taehv.TAEHV if self.files.is_taehv else wan
        autoencoder = load_autoencoder(self.files.vae, kind, self.config.channels)
        return autoencoder.to(self.runtime.device, self.runtime.dtype)

    def decoder_stream(self, autoencoder: nn.Module) -> Stream:
        if self.files.is_taehv:
            _refuse_tiles(self.runtime.tile, "TAEHV")
            return LightDecoderStream(autoencoder) if self.is_light else DecoderStream(autoencoder)
        return wan_vae.DecoderStream(autoencoder, _check_tile(self.runtime.tile, autoencoder))

    def encode(self, autoencoder: nn.Module, pieces: Iterator[Tensor]) -> Tensor:
        """One piece is on the device at a time."""
        first = next(pieces)
        if self.files.is_taehv:
            stream = EncoderStream(autoencoder)
            stream.encode(first[:, :1].expand(-1, 3, -1, -1, -1))  # its first latent is of 4 frames too: a still
        else:
            stream = wan_vae.EncoderStream(autoencoder, _check_tile(self.runtime.tile, autoencoder))
        latents = torch.cat([stream.encode(piece).cpu() for piece in chain([first], pieces)], 2)
        return wan_vae.to_model_space(latents) if self.files.is_taehv and self.is_light else latents

    def encode_still(self, autoencoder: nn.Module, latents: Tensor) -> Tensor:
        last = self.decoder_stream(autoencoder).decode(latents[:, :, -4:])[:, -1:]
        return self.encode(autoencoder, iter([last])).to(latents)

    def encode_negative(self, text: nn.Module, prompt: str) -> Tensor:
        return text.encode([prompt])

    def ignored_words(self, text: nn.Module, prompt: str) -> Iterator[tuple[list[str], str]]:
        yield text.truncated(prompt), "the text encoder has no room for these words and leaves them out"


class LightDecoderStream(DecoderStream):
    """lighttaew2_1: TAEHV's layers, trained on latents as the Wan VAE makes them instead of the model's."""

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(wan_vae.from_model_space(latents))


def drop_frames(pieces: Iterator[Tensor], count: int) -> Iterator[Tensor]:
    """Pieces [T, H, W, 3] without the first `count` frames."""
    for piece in pieces:
        if len(piece) > count:
            yield piece[count:]
        count = max(0, count - len(piece))


def fit_length(frames: Tensor | ClipFrames, length: int) -> Iterator[Tensor]:
    """Pieces [1, n, H, W, 3] of frames, cut to `length` in all, or with the last frame repeated up to it."""
    last = None
    for piece in frames.split(PIECE) if isinstance(frames, Tensor) else frames.pieces():
        piece = piece[:length]
        last, length = piece[-1:], length - len(piece)
        yield piece[None]
        if not length:
            return
    while length:
        count = min(PIECE, length)
        yield last.expand(count, -1, -1, -1)[None]
        length -= count


def loaded_weight_bytes(description: Description, dtype: torch.dtype) -> int:
    """Bytes of a file's weights once loaded to compute in `dtype`: float8 stays float8."""
    return description.weight_bytes if description.dtype is E4M3 else description.parameters * dtype.itemsize


def quantise_onto(wan: WanModel, device: torch.device, dtype: torch.dtype) -> WanModel:
    """The model on its device, its blocks in float8. One block goes at a time, so there is never a plain copy there."""
    for block in wan.blocks:
        quantise_block(block.to(device, dtype))
    for name, part in wan.named_children():
        if name != "blocks":
            part.to(device, dtype)
    return wan


def load_fp8_model(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> WanModel:
    """The model of a float8 checkpoint: float8 weights of its blocks as they are, all else in `dtype`."""
    wan, state = WanModel(checkpoint.config, device="meta"), checkpoint.state_dict
    layers = [name.removesuffix(".weight") for name, tensor in state.items() if _is_fp8_linear(name, tensor)]
    kept = {}
    for layer in layers:
        weight, scale = state[f"{layer}.weight"], state.get(f"{layer}.weight_scale", torch.ones(()))
        kept[f"{layer}.weight"] = weight.to(device)
        kept[f"{layer}.scale_weight"] = scale.to(device).expand(len(weight)).reshape(-1, 1).contiguous()  # [out, 1]
        parent, _, leaf = layer.rpartition(".")
        setattr(wan.get_submodule(parent), leaf, Fp8Linear.of(wan.get_submodule(layer)))
    done = kept.keys() | {f"{layer}.weight_scale" for layer in layers}
    others = dequantised({name: tensor for name, tensor in state.items() if name not in done}, dtype, device)
    wan.load_state_dict(kept | others, assign=True)
    return wan.requires_grad_(False).eval()


def _is_fp8_linear(name: str, tensor: Tensor) -> bool:
    """Whether a weight is one that `Fp8Linear` holds."""
    return name.startswith("blocks.") and name.endswith(".weight") and tensor.ndim == 2 and tensor.dtype is E4M3


def _as_scene(prompt: Prompt) -> Prompt:
    """A prompt as a model of several shots takes it: words that say that the scene changes are a cut."""
    words = scene_texts(prompt) if prompt.start.at else None
    return replace(prompt, text=words[1], start=replace(prompt.start, transition="cut", blend=0)) if words else prompt


def _check_tile(tile: int | None, vae: wan_vae.WanVAE) -> int | None:
    margin = vae.space * vae.margin  # pixels
    if tile is not None and tile <= 2 * vae.margin:
        got = vae.space * tile
        raise ValueError(f"Got --tile {got}; tiles overlap by {2 * margin} pixels. Use {4 * margin} or more.")
    return tile


def _refuse_tiles(tile: int | None, decoder: str) -> None:
    if tile is not None:
        raise ValueError(f"Got --tile with {decoder}, which takes little memory and has no tiles. Leave --tile out.")
