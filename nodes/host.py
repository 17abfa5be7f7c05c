"""The seam to ComfyUI: models, memory, attention, progress and latents, as the core wants them and the host has them.

The core walks Wan's layer names, so it drives the network that ComfyUI has loaded, patched, quantised or offloaded,
through ComfyUI's own layers. On wires everything is native: a MODEL is a ModelPatcher, a LATENT is raw VAE space.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import takewhile
from typing import TypeVar
from weakref import WeakKeyDictionary

import comfy.model_management as management
import comfy.sd
import comfy.utils
import latent_preview
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.ldm.wan.model import WanModel
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from ..sf_core.config import PRESETS, Sampling, WanConfig
from ..sf_core.machine import ran_out
from ..sf_core.model import Attention, WanLayers
from ..sf_core.rollout import Progress, Reencode
from ..sf_core.storyboard import Entrance
from . import room

Result = TypeVar("Result")
Preview = tuple[str, Image.Image, int]  # format, picture, largest side

SMALL, SMALL_FRAME = 64 * 1024**2, 256 * 256  # bytes of a model, pixels
SECONDS_BETWEEN_PICTURES = 0.1  # as often as ComfyUI itself tells of progress
MOST_WAITING = 64  # messages; a run that nobody is slow to watch has a few
PREVIEW_SIZE = 256  # pixels, at least where a picture can be enlarged by a whole factor
FAMILY = "self_forcing_family"
ENTRANCE = "self_forcing_entrance"  # key of a CONDITIONING entry: the storyboard.Entrance of a prompt after the first


@dataclass(frozen=True)
class Family:
    """What a MODEL knows about its own sampling: it travels with the MODEL through LoRAs and other patches.

    sampling   how it is sampled
    trained    latent frames of the chunks it was trained with; None: those of `sampling`
    preview    newest latents [B, C, F, H, W] in model space -> picture; None: ComfyUI's own preview for the latents
    reencoder  the VAE that makes stills for first-frame re-encode; None: without
    """

    sampling: Sampling = PRESETS["cli"]
    trained: int | None = None
    preview: Callable[[Tensor], Image.Image] | None = None
    reencoder: comfy.sd.VAE | None = None


def set_family(patcher: ModelPatcher, family: Family) -> None:
    patcher.set_attachments(FAMILY, family)


def family_of(patcher: ModelPatcher) -> Family:
    return patcher.get_attachment(FAMILY) or Family()


# --- The network -----------------------------------------------------------------------------------------------------


def wan_of(patcher: ModelPatcher) -> WanLayers:
    """The Wan layers of a MODEL. Raises ValueError for anything that is not a Wan text-to-video model."""
    module = patcher.model.diffusion_model
    if not isinstance(module, WanModel):
        raise ValueError(
            f"Got a MODEL of type {type(patcher.model).__name__}; this node samples Wan video models. "
            "Connect Load Tiny Self Forcing, or a Self Forcing checkpoint of Wan 2.1 from Load Diffusion Model."
        )
    if module.in_dim != module.out_dim or module.img_emb is not None:
        raise ValueError(
            f"Got a Wan model with {module.in_dim} input channels, made for image or control inputs; this node needs a "
            "text-to-video model. Use a text-to-video checkpoint, and the prefix input to start from an image."
        )
    layers = WanLayers.of(module, wan_config(module))
    return replace(layers, patch_embedding=_in_float32(module.patch_embedding))


def wan_config(module: WanModel) -> WanConfig:
    return WanConfig(
        dim=module.dim,
        ffn_dim=module.ffn_dim,
        heads=module.num_heads,
        layers=module.num_layers,
        channels=module.in_dim,
        freq_dim=module.freq_dim,
        text_dim=module.text_dim,
        text_len=module.text_len,
        eps=module.eps,
    )


def _in_float32(layer: torch.nn.Module) -> Callable[[Tensor], Tensor]:
    """ComfyUI keeps the patch embedding in float32, whatever the other layers are."""
    return lambda x: layer(x.float()).to(x.dtype)


def host_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: dict) -> Tensor:
    return optimized_attention(
        q, k, v, q.shape[1], mask=mask, skip_reshape=True, skip_output_reshape=True, transformer_options=options
    )


@lru_cache
def untraced_attention() -> Callable:
    """`host_attention` as a call that torch.compile leaves alone: some of ComfyUI's kernels ask for free memory."""
    return torch.compiler.disable(host_attention)


@dataclass(frozen=True, eq=False)
class PatchedAttention:
    """ComfyUI's attention, [B, N, L, D] in and out, with whatever the MODEL's patches put in its place."""

    options: dict
    kernel: Callable

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.kernel(q, k, v, mask, self.options)


def attention_of(patcher: ModelPatcher, compiled: bool = False, options: dict | None = None) -> Attention:
    """ComfyUI's attention with the MODEL's patches, or those of other transformer_options."""
    kernel = untraced_attention() if compiled else host_attention
    return PatchedAttention(patcher.model_options["transformer_options"] if options is None else options, kernel)


def loaded_again(loader: tuple) -> ModelPatcher:
    """A MODEL with weights of its own, as its `cached_patcher_init` (function, arguments, index of several) says."""
    load, arguments, *index = loader
    loaded = load(*arguments, disable_dynamic=True)
    return loaded[index[0]] if index else loaded


_static: WeakKeyDictionary[BaseModel, ModelPatcher] = WeakKeyDictionary()


def for_compiling(patcher: ModelPatcher) -> ModelPatcher:
    """The MODEL as torch.compile can trace it: weights that come and go by ComfyUI's dynamic memory cannot be.

    Loads the weights a second time where they do, and keeps them as long as the first are kept.
    """
    if not patcher.is_dynamic():
        return patcher
    if patcher.cached_patcher_init is None:
        raise ValueError(
            "Got a MODEL whose loader gives ComfyUI no way to load it again, which compiling needs while dynamic "
            "memory is on. Use Load Self Forcing Model, or set compile to off."
        )
    if patcher.model not in _static:
        _static[patcher.model] = loaded_again(patcher.cached_patcher_init)
    return patcher.clone(disable_dynamic=True, model_override=_static[patcher.model].get_clone_model_override())


# --- Memory ----------------------------------------------------------------------------------------------------------


def load(patcher: ModelPatcher, needed: room.Rollout, beside: int = 0, others: Sequence[ModelPatcher] = ()) -> None:
    """Brings the model to its device, with room for the KV cache, one chunk's forward and `beside` bytes.

    `others` come with it. Raises ValueError when cache and forward alone are larger than the device.
    """
    room.check(needed, patcher.load_device)
    management.load_models_gpu([patcher, *others], memory_required=needed.bytes + beside)


@contextmanager
def loaded(
    patcher: ModelPatcher, needed: room.Rollout, beside: int = 0, others: Sequence[ModelPatcher] = ()
) -> Iterator[None]:
    """The model on its device and ready to run; raises as `load` does."""
    load(patcher, needed, beside, others)
    patcher.pre_run()
    try:
        with threads_for(patcher, 64 * needed.height * needed.width):
            yield
    finally:
        patcher.cleanup()


def within_memory(work: Callable[[], Result], what: str, remedy: str) -> Result:
    """What `work` gives. If memory runs out all that it held is freed before torch.OutOfMemoryError says what to do.

    ComfyUI knows that error: it unloads its models and shows the message.
    """
    try:
        return work()
    except RuntimeError as error:
        if not management.is_oom(error) and not ran_out(error):
            raise
    # Outside of the except block, where nothing refers to the tensors that were being worked with any more.
    management.soft_empty_cache()
    raise torch.OutOfMemoryError(f"Got {what}, for which this device ran out of memory. {remedy}")


@contextmanager
def threads_for(patcher: ModelPatcher, pixels: int) -> Iterator[None]:
    """One thread for a model and frames so small that, on a CPU, handing work over takes longer than the work."""
    threads = torch.get_num_threads()
    if patcher.load_device.type == "cpu" and patcher.model_size() < SMALL and pixels <= SMALL_FRAME:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# --- Latents and prompts ---------------------------------------------------------------------------------------------


def latents_of(latent: dict, wan: WanLayers, what: str = "latent") -> Tensor:
    """The samples [B, C, F, H, W] of a LATENT that fits the model. Raises ValueError where it does not."""
    samples, channels = latent["samples"], wan.config.channels
    if samples.ndim != 5 or samples.shape[1] != channels:
        raise ValueError(
            f"Got a {what} of shape {list(samples.shape)}; this model needs [batch, {channels}, frames, height, "
            "width]. Make it with Self Forcing Latent, or with VAE Encode and the VAE that belongs to the model."
        )
    return samples


def entering(conditioning: list, entrance: Entrance) -> list:
    """The first entry of a prompt's CONDITIONING as one that comes in later.

    The entrance stands in the entry's dict. For stock samplers the entry starts when sampling is over, so that they
    follow the first prompt alone.
    """
    embeds, values = conditioning[0]
    return [embeds, {**values, ENTRANCE: entrance, "start_percent": 1.0}]


def in_order(conditioning: list) -> list:
    """The first entry and those right after it that come in later; the rest is what others have combined with it."""
    first, *others = conditioning
    return [first, *takewhile(lambda entry: ENTRANCE in entry[1], others)]


def prompts_of(conditioning: list, batch: int) -> list[tuple[Entrance, Tensor]]:
    """The first entry and those right after it that come in later, with embeddings [B, tokens, width] for `batch`.

    Whatever else stock nodes have combined with it is left out. Raises ValueError if there is no entry.
    """
    if not conditioning:
        raise ValueError("Got empty conditioning; the sampler needs a prompt. Connect Self Forcing Prompt.")
    first, *later = in_order(conditioning)
    prompts = [(Entrance(), first[0]), *((values[ENTRANCE], embeds) for embeds, values in later)]
    return [(entrance, comfy.utils.repeat_to_batch_size(embeds, batch)) for entrance, embeds in prompts]


def negative_of(conditioning: list | None, batch: int) -> Tensor:
    """Embeddings [B, tokens, width] of a negative prompt. Raises ValueError if there is none."""
    if not conditioning:
        raise ValueError(
            "Got cfg other than 1 without a negative prompt; guidance leads away from one. Connect a prompt to "
            "negative (an empty one of CLIP Text Encode will do), or set cfg to 1, which distilled models are made for."
        )
    return comfy.utils.repeat_to_batch_size(conditioning[0][0], batch)


def still_of(patcher: ModelPatcher, vae: comfy.sd.VAE, free: int) -> Reencode:
    """First-frame re-encode by a VAE of ComfyUI, after which the model has its place and `free` bytes again."""

    def still(latents: Tensor) -> Tensor:
        """Latents [B, C, F, H, W] in model space -> the latent [B, C, 1, H, W] of a still of their last frame."""
        raw = patcher.model.process_latent_out(latents[:, :, -4:])
        frames = [vae.decode(video)[0, -1:] for video in raw.split(1)]  # [1, 8H, 8W, 3] each
        stills = torch.cat([vae.encode(frame) for frame in frames])
        management.load_models_gpu([patcher], memory_required=free)  # the VAE may have taken its place
        return patcher.model.process_latent_in(stills).to(latents)

    return still


# --- Progress --------------------------------------------------------------------------------------------------------


def say(node: type[io.ComfyNode], text: str) -> None:
    """Shows a line of text on the node that runs. Needs the hidden input unique_id; does nothing outside a server."""
    if node.hidden is not None and node.hidden.unique_id:
        from server import PromptServer  # runs already; without one it would take a second to import

        PromptServer.instance.send_progress_text(text, node.hidden.unique_id)


class Notes:
    """Lines of text on the node that runs, one below the other: a text that is said takes the place of the last."""

    def __init__(self, node: type[io.ComfyNode]) -> None:
        self.node, self.lines = node, []

    def add(self, line: str) -> None:
        self.lines.append(line)
        say(self.node, "\n".join(self.lines))


def send(node: type[io.ComfyNode], event: str, data: Callable[[], dict]) -> None:
    """Sends an event about the node that runs to the browser it was started from, if that is there and keeps up.

    ComfyUI queues messages without end and sends them one after the other: those for a slow connection would hold up
    everybody's, and grow. So while MOST_WAITING wait this one is dropped.
    """
    if node.hidden is not None and node.hidden.unique_id:
        from server import PromptServer

        server = PromptServer.instance
        if server.client_id in server.sockets and server.messages.qsize() < MOST_WAITING:
            server.send_sync(event, {"node": node.hidden.unique_id, **data()}, server.client_id)


def check_cancelled() -> None:
    """Raises ComfyUI's interruption when the user has pressed Cancel."""
    management.throw_exception_if_processing_interrupted()


class SamplingProgress:
    """A step of a rollout on the node's progress bar, with a picture of the newest frames; Cancel is heard here.

    `compiling` notes that the first step takes longer, and then how long it took.
    """

    def __init__(self, patcher: ModelPatcher, notes: Notes, compiling: bool) -> None:
        self.bar, self.done, self.shown = comfy.utils.ProgressBar(1), 0, -math.inf
        self.preview = family_of(patcher).preview
        self.previewer = previewer_of(patcher)
        self.notes, self.began = notes, time.monotonic() if compiling else None
        if compiling:
            notes.add("Compiling. The first step takes longer.")

    def __call__(self, progress: Progress) -> None:
        check_cancelled()
        if self.began is not None:
            self.notes.add(f"First step with compiling: {time.monotonic() - self.began:.0f} s")
            self.began = None
        self.done += 1
        self.bar.update_absolute(self.done, progress.total, self.picture(progress.x0))

    def picture(self, x0: Tensor) -> Preview | None:
        """None so soon after the last one that nobody would see it: the built-in model takes longer over it than over
        a step."""
        if time.monotonic() < self.shown + SECONDS_BETWEEN_PICTURES:
            return None
        self.shown = time.monotonic()
        newest = x0[:1, :, -1:]  # [1, C, 1, H, W]
        if self.preview is not None:
            return as_preview(self.preview(newest))
        return self.previewer.decode_latent_to_preview_image("JPEG", newest)


def previewer_of(patcher: ModelPatcher) -> latent_preview.LatentPreviewer:
    """The kind the user has chosen. Where previews are off, as they are by default, plain colours: watching the video
    grow is the point, and they cost nothing beside a step."""
    form = patcher.model.latent_format
    return latent_preview.get_previewer(patcher.load_device, form) or latent_preview.Latent2RGBPreviewer(
        form.latent_rgb_factors, form.latent_rgb_factors_bias, form.latent_rgb_factors_reshape
    )


def as_preview(picture: Image.Image) -> Preview:
    """A picture for a progress bar. The canvas shows it pixel by pixel, so the built-in model's are enlarged."""
    factor = max(1, PREVIEW_SIZE // max(picture.size))
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.NEAREST)
    return ("JPEG", picture, min(latent_preview.MAX_PREVIEW_RESOLUTION, max(picture.size)))


def frame_picture(frame: Tensor) -> Image.Image:
    """A frame [H, W, 3] in 0..1 as a picture."""
    return Image.fromarray(frame.mul(255).round().to("cpu", torch.uint8).numpy())
