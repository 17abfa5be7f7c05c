"""Lists the built-in model, the sampling presets and this machine's devices; or says what a model file is.

    python -m sf_core info self_forcing_dmd.pt --width 832 --height 480 --window 12

Of a file only the header is read.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterator
from dataclasses import replace

import torch

from .. import __version__, memory, tiny
from ..checkpoints.load import Description, describe, plain_dtype
from ..memory import LONGEST_TRAINED, MemoryPlan, format_bytes
from ..pipeline import loaded_weight_bytes
from ..sampling.config import PRESETS, Sampling, override
from ..sampling.families import FAMILIES
from ..sampling.plan import Plan
from .arguments import size, window

DECODERS = {  # by channels of the latents
    16: {
        "Wan VAE": (memory.WAN_VAE, None),
        "Wan VAE, --tile 256": (memory.WAN_VAE, 32),
        "TAEHV": (memory.TAEHV, None),
    },
    48: {
        "Wan VAE": (memory.WAN22_VAE, None),
        "Wan VAE, --tile 512": (memory.WAN22_VAE, 32),
        "TAEHV": (memory.TAEHV22, None),
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("file", nargs="?", metavar="FILE", help="a model: file, index of shards, or folder; without it: what is here")
    add("--width", type=size, default=832, help="pixels of the video whose memory is told (832)")
    add("--height", type=size, default=480, help="pixels (480)")
    add("--window", type=window, default=argparse.SUPPRESS, help="latent frames attended to (the family's)")
    add("--family", metavar="NAME", help=f"instead of the guessed one: {', '.join(FAMILIES)}")


def run(args: argparse.Namespace) -> str:
    return _about(args) if args.file else _overview()


# --- A file ----------------------------------------------------------------------------------------------------------


def _about(args: argparse.Namespace) -> str:
    about = describe(args.file, args.family)
    window = {"window": args.window} if "window" in args else {}
    sampling = override(about.sampling, **window)
    return "\n".join([*_file(about), "", *_memory(about, sampling, args.width, args.height)])


def _file(about: Description) -> list[str]:
    config, dtype = about.config, str(about.dtype).removeprefix("torch.")
    return [
        about.source,
        f"  size      {format_bytes(about.file_bytes)}; the model {format_bytes(about.weight_bytes)} in {dtype}, "
        f"{about.parameters / 1e6:,.0f} M parameters, {about.tensors} tensors",
        f"  shape     layers {config.layers}, dim {config.dim}, ffn {config.ffn_dim}, heads {config.heads}, "
        f"latent channels {config.channels}, text {config.text_len} x {config.text_dim}",
        *_family(about),
        f"  {about.note}",
    ]


def _family(about: Description) -> list[str]:
    """How it is sampled and, where something told what it is, the terms it comes under."""
    sampled = f"  family    {about.family}: {_sampling(about.sampling)}"
    if not about.known:
        return [f"{sampled} (ASSUMED: nothing tells)"]
    family = FAMILIES[about.family]
    return [sampled, f"  licence   {family.licence}", f"  page      {family.page}"]


def _memory(about: Description, sampling: Sampling, width: int, height: int) -> list[str]:
    dtype = torch.float16 if plain_dtype(about.dtype) is torch.float16 else torch.bfloat16
    frames, space = max(LONGEST_TRAINED, sampling.window or 0), about.config.space
    video = Plan(sampling, frames, height // space, width // space)
    plain = MemoryPlan(about.config, video, dtype, loaded_weight_bytes(about, dtype), networks=about.networks)
    small = replace(plain, fp8=True).with_fp8_cache()
    decoders = _decoders(plain)
    rows = [
        ("weights", plain.use.weights, small.use.weights),
        ("cache", plain.use.cache, small.use.cache),
        ("prompt", plain.use.prompt, small.use.prompt),
        ("a forward", plain.use.activations, small.use.activations),
        *((name, _decoding(plain, name), _decoding(small, name)) for name in decoders),
        *((f"total, {name}", _with(plain, name).total, _with(small, name).total) for name in decoders),
    ]
    size = f"{width} x {height}, window {plain.window}, {frames} latent frames"
    precision = str(dtype).removeprefix("torch.")
    return [
        f"{f'Memory at {size}':58}{precision:>12}{'--fp8 --fp8-cache':>20}",
        *(f"  {name:56}{format_bytes(full):>12}{format_bytes(fp8):>20}" for name, full, fp8 in rows),
    ]


def _decoders(plan: MemoryPlan) -> dict[str, tuple[memory.DecoderMemory, int | None]]:
    return DECODERS.get(plan.config.channels, DECODERS[16])


def _with(plan: MemoryPlan, name: str) -> MemoryPlan:
    decoder, tile = _decoders(plan)[name]
    return replace(plan, decoder=decoder, tile=tile)


def _decoding(plan: MemoryPlan, name: str) -> int:
    use = _with(plan, name).use
    return use.decoder + use.decoding


# --- What is here ----------------------------------------------------------------------------------------------------


def _overview() -> str:
    lines = [f"Self Forcing {__version__}, torch {torch.__version__}, Python {platform.python_version()}", ""]
    lines += ["Built-in model", *_model(), "", "Presets (generate --preset)"]
    lines += [f"  {name:6} {_sampling(sampling)}" for name, sampling in PRESETS.items()]
    lines += ["", "Families (generate --model FILE --family)"]
    lines += [f"  {name:31} {_sampling(family.sampling)}" for name, family in FAMILIES.items()]
    lines += ["", "Their weights"]
    lines += [f"  {name:31} {family.page} ({family.size}; {family.licence})" for name, family in FAMILIES.items()]
    return "\n".join([*lines, "", "Devices", *_devices()])


def _model() -> list[str]:
    parts = {
        "wan": tiny.load_transformer(torch.device("cpu"), torch.float32),
        "text": tiny.load_text_encoder(),
        "autoencoder": tiny.load_autoencoder(),
    }
    config = parts["wan"].config
    sizes = {name: sum(weight.numel() for weight in part.parameters()) / 1e6 for name, part in parts.items()}
    return [
        *(f"  {name:12} {size:.2f} M parameters" for name, size in sizes.items()),
        f"  layers {config.layers}, dim {config.dim}, heads {config.heads}, latent channels {config.channels}",
        f"  knows the words: {' '.join(parts['text'].words)}",
    ]


def _sampling(sampling: Sampling) -> str:
    steps = ", ".join(f"{step:g}" for step in sampling.steps) + ("" if sampling.warp else " as they stand")
    window = "all" if sampling.window is None else sampling.window
    sink = f"{sampling.sink}, pinned" if sampling.pinned and sampling.sink else sampling.sink
    said = f"steps {steps}; shift {sampling.shift:g}; chunk {sampling.chunk}; window {window}; sink {sink}"
    return "; ".join([said, *_rules(sampling)])


def _rules(sampling: Sampling) -> Iterator[str]:
    """What is not as in Self Forcing."""
    if sampling.sampler != "chunks":
        yield f"{sampling.sampler} sampler"
    if sampling.solver != "renoise":
        yield f"solver {sampling.solver}"
    if sampling.shots:
        yield f"several shots, a jump of {sampling.shots.jump} at each cut"
    if sampling.holds_prefix:
        yield "an image is held"
    if sampling.position_range:
        yield f"positions within {sampling.position_range}"
    if sampling.sink_decay < 1:
        yield f"sink decay {sampling.sink_decay:g}"
    if sampling.bank:
        yield f"memory bank {sampling.bank.frames}, every {sampling.bank.interval} chunks"
    if sampling.rope_jitter:
        yield f"RoPE jitter {sampling.rope_jitter:g}"
    if sampling.reencode:
        yield "first-frame re-encode"


def _devices() -> list[str]:
    cuda = [f"  cuda:{i}  {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    mps = ["  mps"] if torch.backends.mps.is_available() else []
    return [*cuda, *mps, f"  cpu     {torch.get_num_threads()} threads"]
