"""Any file with an autoencoder -> the autoencoder, or an error that says what the file is instead.

    vae = load_autoencoder("wan_2.1_vae.safetensors", WanVAE, channels=16)

Files differ in their wrapping only: the layers stand under some prefix, in some dict (`vae.`, `first_stage_model.`,
{"state_dict": ...}), which ends where a layer of the autoencoder begins. Diffusers alone has other names for the Wan
VAEs, which are turned to Wan's first. Names and dtypes are checked in the header, before anything is mapped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..autoencoders.taehv import TAEHV
from ..autoencoders.wan22_vae import Wan22VAE
from ..autoencoders.wan_vae import WanVAE
from . import identify
from .identify import PLAIN, WRAPPERS, identify_tensors, wrong_file
from .tensorfiles import CheckpointError, TensorFile, map_tensors, read_header

Autoencoder = WanVAE | Wan22VAE | TAEHV
WAN_VAES = {16: WanVAE, 48: Wan22VAE}  # by the channels of their latents


@dataclass(frozen=True)
class Kind:
    """A kind of autoencoder: what it is called, a tensor that every file of it has, and where to get it."""

    what: str
    called: str
    signature: str
    remedy: str


# By class and channels of the latents.
KINDS = {
    (WanVAE, 16): Kind(
        identify.WAN_VAE,
        "the Wan 2.1 VAE",
        "decoder.middle.0.residual.0.gamma",
        "Get wan_2.1_vae.safetensors (Comfy-Org/Wan_2.1_ComfyUI_repackaged) or Wan2.1_VAE.pth (Wan-AI/Wan2.1-T2V-1.3B)",
    ),
    (TAEHV, 16): Kind(
        identify.TAEHV,
        "a TAEHV for Wan 2.1 (taew2_1)",
        "encoder.0.weight",
        "Get taew2_1 (madebyollin/taehv) or lighttaew2_1",
    ),
    (Wan22VAE, 48): Kind(
        identify.WAN22_VAE,
        "the Wan 2.2 VAE",
        "decoder.middle.0.residual.0.gamma",
        "Get wan2.2_vae.safetensors (Comfy-Org/Wan_2.2_ComfyUI_Repackaged) or Wan2.2_VAE.pth (Wan-AI/Wan2.2-TI2V-5B)",
    ),
    (TAEHV, 48): Kind(
        identify.TAEHV,
        "a TAEHV for Wan 2.2 (taew2_2)",
        "encoder.0.weight",
        "Get taew2_2 (madebyollin/taehv)",
    ),
}

# Diffusers' names -> Wan's (huggingface/diffusers, scripts/convert_wan_to_diffusers.py, the other way round). Wan
# counts all layers of the decoder in one row, Diffusers those of each size.
DIFFUSERS = re.compile(r"(^|\.)(en|de)coder\.mid_block\.resnets\.0\.norm1\.gamma$")
DIFFUSERS_NAMES = {
    r"\bmid_block\.attentions\.0\.": "middle.1.",
    r"\bmid_block\.resnets\.0\.": "middle.0.",
    r"\bmid_block\.resnets\.1\.": "middle.2.",
    r"\bencoder\.down_blocks\.": "encoder.downsamples.",
    r"\bconv_in\.": "conv1.",
    r"\bnorm_out\.": "head.0.",
    r"\bconv_out\.": "head.2.",
    r"\bpost_quant_conv\.": "conv2.",
    r"\bquant_conv\.": "conv1.",
    r"(\.\d+)\.norm1\.": r"\1.residual.0.",
    r"(\.\d+)\.conv1\.": r"\1.residual.2.",
    r"(\.\d+)\.norm2\.": r"\1.residual.3.",
    r"(\.\d+)\.conv2\.": r"\1.residual.6.",
    r"\bconv_shortcut\.": "shortcut.",
}
STAGED = re.compile(r"\b(en|de)coder\.(down|up)_blocks\.(\d{1,3})\.(?:resnets\.(\d{1,3})|(?:down|up)sampler)\.")
UP_BLOCK = re.compile(r"\bdecoder\.up_blocks\.(\d{1,3})\.(resnets|upsamplers)\.(\d{1,3})\.")


def load_autoencoder(path: str | Path, kind: type[Autoencoder], channels: int | None) -> Autoencoder:
    """The autoencoder of that kind in a file, in the file's dtype, around its tensors; for latents of `channels`.

    Without channels it may be for any that a kind is known for.

    Raises CheckpointError, a ValueError, for any other file.
    """
    file, about = read_header(path), _kind(kind, channels)
    title, names = file.paths[0].name, _find(file, about)
    mapped = map_tensors(file, names.values())
    try:
        autoencoder = kind.from_state_dict({name: mapped[at] for name, at in names.items()})
    except ValueError as error:
        raise ValueError(f"{title}: {error}") from None
    known = [channels] if channels else [of for known, of in KINDS if known is kind]
    if autoencoder.channels not in known:
        raise CheckpointError(
            f"{title}, an autoencoder for latents of {autoencoder.channels} channels",
            f"the model makes {' or '.join(map(str, known))}",
            about.remedy,
        )
    return autoencoder


def _kind(kind: type[Autoencoder], channels: int | None) -> Kind:
    """What is known of a kind, that for latents of other channels where there is none for these."""
    return KINDS.get((kind, channels)) or next(about for (known, _), about in KINDS.items() if known is kind)


def _find(file: TensorFile, about: Kind) -> dict[str, str]:
    """{the kind's name of a tensor: the file's}. Raises CheckpointError if no autoencoder of that kind is in it."""
    title, needed = file.paths[0].name, f"{about.called} is needed here"
    clean = {WRAPPERS.sub("", name): name for name in file.tensors}
    if about.what != identify.TAEHV and any(DIFFUSERS.search(name) for name in clean):
        clean = dict(zip(wan_vae_names(clean), clean.values()))
    roots = [name.removesuffix(about.signature) for name in clean if name.endswith(about.signature)]
    roots = [root for root in roots if not root or root.endswith(".")]
    root = min(roots, key=len, default="")
    found = {name[len(root) :]: at for name, at in clean.items() if name.startswith(root)}
    known = identify_tensors(found)
    if known and known[0] == about.what and not roots:
        raise CheckpointError(f"{title}, {about.what} without its {about.signature}", needed, "Download it again")
    if not roots or (known and known[0] != about.what):
        raise wrong_file(title, found, needed, about.remedy)
    for name, at in found.items():
        if file.tensors[at].dtype not in PLAIN:
            dtype = str(file.tensors[at].dtype).removeprefix("torch.")
            plain = "weights of an autoencoder are float32, float16 or bfloat16"
            raise CheckpointError(f"{title}, whose {name} is {dtype}", plain, about.remedy)
    return found


def wan_vae_names(names: Iterable[str]) -> list[str]:
    """Wan's names of tensors of a Wan VAE, 2.1 or 2.2, that have Diffusers' names."""
    names = _in_stages(list(names))
    placed = [found for name in names if (found := UP_BLOCK.search(name))]
    resnets = 1 + max((int(found[3]) for found in placed if found[2] == "resnets"), default=0)

    def in_one_row(found: re.Match[str]) -> str:
        within = int(found[3]) if found[2] == "resnets" else resnets
        return f"decoder.upsamples.{int(found[1]) * (resnets + 1) + within}."

    renamed = []
    for name in names:
        for pattern, replacement in DIFFUSERS_NAMES.items():
            name = re.sub(pattern, replacement, name)
        renamed.append(UP_BLOCK.sub(in_one_row, name))
    return renamed


def _in_stages(names: list[str]) -> list[str]:
    """The names, those in stages of a Wan 2.2 VAE as Wan numbers them: what halves or doubles the size comes last."""
    if not any(re.search(r"\b(down|up)sampler\.", name) for name in names):
        return names
    placed = [found for name in names if (found := STAGED.search(name))]
    blocks = {side: 1 + max((int(f[4]) for f in placed if f[1] == side and f[4]), default=-1) for side in ("en", "de")}

    def in_stage(found: re.Match[str]) -> str:
        side, way, stage, block = found.groups()
        return f"{side}coder.{way}samples.{stage}.{way}samples.{block or blocks[side]}."

    return [STAGED.sub(in_stage, name) for name in names]
