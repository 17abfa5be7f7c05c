"""Any causal checkpoint -> one safetensors file that ComfyUI's own loaders and ours read alike.

Wan's names without prefixes, metadata for what shapes do not tell (`comfy.py`), the family and its licence. The weights
are written as they are read, some hundred MiB at a time: first the header, whose offsets follow from shapes and dtypes
alone, then each tensor at its place. The file is opened anew for each portion, so that pages that were read do not stay
in memory; LoRAs are merged, and matrices made float8, one by one on the way.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..sampling.families import FAMILIES
from .comfy import MARK, SCALED, Fp8Form, multiplies_in_full, quantisation_mark, wan_metadata
from .identify import is_scale
from .load import FAMILY, Description, Loras, dequantised, describe, load_checkpoint, plain_dtype
from .tensorfiles import DTYPES, CheckpointError, read_header

PORTION = 2**29  # bytes
SAID = ("config", "format", "_quantization_metadata")  # metadata that is written anew
LICENCE = "licence"  # metadata
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Conversion:
    """A checkpoint, and what is to become of it.

    path, family, loras  as `load_checkpoint` takes them
    fp8    matrices of the blocks in float8, with one scale each: ComfyUI's form
    dtype  of all that is not float8; None: as it is. Without `fp8` float8 weights get it, too
    """

    path: Path
    family: str | None = None
    loras: Loras = ()
    fp8: bool = False
    dtype: torch.dtype | None = None

    def describe(self) -> Description:
        """What the checkpoint is. Raises as `load_checkpoint` does."""
        about = describe(self.path, self.family, self.loras)
        if about.networks > 1:
            raise CheckpointError(
                f"{self.path.name}, with a second network that writes the cache",
                "a converted file holds one",
                "Use it as it is: Load Self Forcing Model and --model take both",
            )
        return about

    def metadata(self) -> dict[str, str]:
        """The converted file's: the checkpoint's own, what ComfyUI looks for, family and licence."""
        about, own = self.describe(), read_header(self.path).metadata
        dropped = SAID + ("sampling",) * (self.family is not None)
        kept = {name: text for name, text in own.items() if name not in dropped}
        shape = wan_metadata(about.config, about.causal)
        known = family_metadata(about.family) if about.causal else {}
        return {**kept, "format": "pt", **shape, **known}

    def shapes(self) -> dict[str, Tensor]:
        """The converted file's tensors on the meta device."""
        state = load_checkpoint(self.path, self.family).state_dict  # LoRAs change neither shapes nor dtypes
        state = {name: tensor.to("meta") for name, tensor in state.items()}
        convert = self._converter()
        return {name: tensor.to("meta") for at in state if not is_scale(at) for name, tensor in convert(at, state)}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The converted file's tensors, one after the other."""
        convert = self._converter()
        for names in self._portions():
            state = load_checkpoint(self.path, self.family, self.loras).state_dict
            for name in names:
                yield from convert(name, state)

    def _portions(self) -> Iterator[list[str]]:
        """Names of weights that are read while the checkpoint is open once."""
        names, size = [], 0
        for name, tensor in load_checkpoint(self.path, self.family).state_dict.items():
            if is_scale(name):
                continue
            if names and size + tensor.nbytes > PORTION:
                yield names
                names, size = [], 0
            names.append(name)
            size += tensor.nbytes
        yield names

    def _converter(self):
        """(name of a weight, state dict) -> (name, tensor) of all that becomes of it."""
        about = self.describe()
        form = Fp8Form(self.dtype or plain_dtype(about.dtype), self.fp8, multiplies_in_full(self.path))

        def convert(name: str, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
            tensor = state[name]
            if self.dtype is not None and not self.fp8 and tensor.dtype in SCALED:
                scale = {f"{name}_scale": state[f"{name}_scale"]} if f"{name}_scale" in state else {}
                yield from dequantised({name: tensor, **scale}, self.dtype, tensor.device).items()
                return
            tensors, quantised = form.tensors(name, state)
            if quantised is None and self.dtype is not None:
                tensors = {name: tensor.to(self.dtype) for name, tensor in tensors.items()}
            yield from tensors.items()
            if quantised is not None:
                yield f"{name.removesuffix('.weight')}.{MARK}", quantisation_mark(quantised)

        return convert


def family_metadata(family: str) -> dict[str, str]:
    """Name of a family, licence of its weights, and where they come from."""
    known = FAMILIES[family]
    return {FAMILY: family, LICENCE: known.licence, "page": known.page}


def write_checkpoint(path: Path, conversion: Conversion) -> None:
    """Writes the converted checkpoint as a safetensors file. Raises as `load_checkpoint` does."""
    write_safetensors(path, conversion.shapes(), conversion.tensors(), conversion.metadata())


def write_safetensors(
    path: Path, shapes: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]], metadata: dict[str, str]
) -> None:
    """Writes tensors one by one as they come, in any order; `shapes` has all of them, on the meta device."""
    with path.open("wb") as file:
        places = _write_header(file, shapes, metadata)
        for name, tensor in tensors:
            file.seek(places[name])
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _write_header(file: BinaryIO, shapes: Mapping[str, Tensor], metadata: dict[str, str]) -> dict[str, int]:
    """Writes a safetensors header; returns where in the file each tensor has its place.

    The widest numbers come first, so that each tensor begins at a multiple of its own.
    """
    header, end = {"__metadata__": metadata}, 0
    for name in sorted(shapes, key=lambda name: (-shapes[name].itemsize, name)):
        tensor = shapes[name]
        offsets = [end, end + tensor.nbytes]
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        end = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    file.truncate(8 + len(text) + end)
    return {name: 8 + len(text) + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}
