"""ComfyUI's own form of a Wan checkpoint: Wan's names, metadata for what shapes do not tell, float8 with its scales.

Float8 has one scale for each matrix there, and every quantised layer is named with its format: in the metadata, or by a
tensor beside it:

    blocks.0.self_attn.q.weight         float8 [out, in]
    blocks.0.self_attn.q.weight_scale   float32 []: weight = float8 * scale
    blocks.0.self_attn.q.comfy_quant    the bytes of {"format": "float8_e4m3fn", "full_precision_matrix_mult": true}

On GPUs with float8 units ComfyUI also turns activations to float8, with a scale of 1 unless the file has another. What
is quantised here is exempt from that, since it costs more than the weights do; so are files that ask for it. What reads
or writes the latents stays as it is; see fp8.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..wan.config import WanConfig
from ..wan.fp8 import E4M3, LARGEST
from .identify import is_scale, metadata_entry
from .load import dequantised
from .tensorfiles import map_tensors, read_header

IN_FULL = "full_precision_matrix_mult"  # as ComfyUI calls it
SCALED = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}  # ComfyUI's names
MARK = "comfy_quant"


def wan_metadata(config: WanConfig, causal: bool = True) -> dict[str, str]:
    """What ComfyUI cannot read off the weights' shapes, as the metadata of a file would say it.

    Its causal Wan has the latents of Wan 2.1, so a model of 48 channels is Wan 2.2 to it.
    """
    fields = {
        **({"causal_ar": True} if causal and config.channels != 48 else {}),
        "num_heads": config.heads,
        "freq_dim": config.freq_dim,
        "text_dim": config.text_dim,
        "text_len": config.text_len,
        "eps": config.eps,
    }
    return {"config": json.dumps({"transformer": fields})}


def quantisation_metadata(layers: dict[str, dict]) -> dict[str, str]:
    """The metadata that names quantised layers."""
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


def quantisation_mark(form: dict) -> Tensor:
    """The tensor beside a quantised layer that names its format: the bytes of JSON."""
    return torch.tensor(list(json.dumps(form).encode()), dtype=torch.uint8)


def multiplies_in_full(path: Path) -> bool:
    """Whether a float8 file asks for products in full precision, in any of the three forms that ComfyUI knows."""
    file = read_header(path)
    layers = metadata_entry(file.metadata, "_quantization_metadata").get("layers", {}).values()
    marks = [name for name in file.tensors if name.endswith(MARK)]
    told = (json.loads(bytes(mark.tolist())) for mark in map_tensors(file, marks).values())
    return any(layer.get(IN_FULL, False) for layer in (*layers, *told)) or any(
        name.endswith("scaled_fp8") and tensor.numel() == 2 for name, tensor in file.tensors.items()
    )


@dataclass(frozen=True)
class Fp8Form:
    """How weights come to ComfyUI's form of float8.

    dtype     of float8 tensors that are no matrices, which become plain
    quantise  makes float8 of the other matrices of the blocks
    in_full   keeps activations as they are for matrices that are float8 already; for those made here they always are
    """

    dtype: torch.dtype
    quantise: bool
    in_full: bool = False

    def tensors(self, name: str, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict | None]:
        """(one tensor of a state dict in this form, with its scales; its format where it is quantised).

        Matrices that are float8 stay what they are, except that scales per row, which ComfyUI has not, become one scale
        per matrix.
        """
        tensor, layer = state[name], name.removesuffix(".weight")
        one = torch.ones((), device=tensor.device)
        scale = state.get(f"{name}_scale", one)
        matrix = tensor.ndim == 2 and name.endswith(".weight")
        if matrix and tensor.dtype in SCALED and not scale.ndim:
            inputs = {name: state[name] for name in [f"{layer}.input_scale"] if name in state}
            full = {IN_FULL: True} if self.in_full else {}
            return {name: tensor, f"{name}_scale": scale, **inputs}, {"format": SCALED[tensor.dtype], **full}
        if matrix and (tensor.dtype in SCALED or (self.quantise and name.startswith("blocks."))):
            plain = dequantised({name: tensor, f"{name}_scale": scale}, torch.float32, tensor.device)[name]
            return quantise_matrix(name, plain), {"format": SCALED[E4M3], IN_FULL: True}
        return {name: tensor.to(self.dtype) if tensor.dtype in SCALED else tensor}, None


def to_comfy_fp8(
    state: Mapping[str, Tensor], dtype: torch.dtype, quantise: bool, in_full: bool = False
) -> tuple[dict[str, Tensor], dict[str, dict]]:
    """A state dict in ComfyUI's form of float8, and for each quantised layer its format; see `Fp8Form`."""
    done, layers, form = {}, {}, Fp8Form(dtype, quantise, in_full)
    for name in state:
        if is_scale(name):
            continue
        tensors, quantised = form.tensors(name, state)
        done |= tensors
        if quantised:
            layers[name.removesuffix(".weight")] = quantised
    return done, layers


def quantise_matrix(name: str, matrix: Tensor) -> dict[str, Tensor]:
    """A matrix [out, in] as float8 with one scale: weight = float8 * scale."""
    scale = matrix.abs().amax().float().clamp(min=1e-12) / LARGEST
    return {name: (matrix / scale).to(E4M3), f"{name}_scale": scale}
