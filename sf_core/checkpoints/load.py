"""Any checkpoint a user has -> (config, plain Wan state dict), or an error that says what the file is instead.

    model, checkpoint = load_model("self_forcing_dmd.pt", "cuda", torch.bfloat16)
    sampling = checkpoint.sampling

Three layers: tensorfiles.py reads files, identify.py finds the model in a header, and here is what a user has of it:
what the file is (`describe`), its weights (`load_checkpoint`), the model (`load_model`).

Float8 weights stay float8. A scaled one has its scale beside it, under one name whatever the file calls it:

    blocks.0.self_attn.q.weight          float8 [out, in]
    blocks.0.self_attn.q.weight_scale    float32, [] for the tensor or [out] per row: weight = float8 * scale
    blocks.0.self_attn.q.input_scale     float32 [], where the file has one: for float8 activations

`dequantised` makes plain weights of them. Weights in four bits (nvfp4.py) are bfloat16 when they are read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..sampling.config import Sampling, read_sampling
from ..sampling.families import DEFAULT, FAMILIES, OF_48_CHANNELS, Guess, family_named, guess_family
from ..wan.config import WanConfig
from ..wan.model import WanModel
from .identify import FLOAT8_DTYPES, GET_ONE, Found, find_wan, is_scale, metadata_entry
from .lora import Lora, Merged, read_lora
from .nvfp4 import Unpacked
from .tensorfiles import CheckpointError, TensorFile, map_tensors, read_header

Loras = Sequence[tuple[str | Path, float]]
"""Files with LoRAs and their strengths, merged in this order."""

FAMILY = "family"  # metadata of files that convert.py has written
STAGE = re.compile(r"ode[-_]init|causal[-_]ode|causal[-_]cd|ar[-_]diffusion", re.IGNORECASE)


@dataclass(frozen=True)
class Description:
    """What a file's header says.

    dtype       of its linear layers; where any weight is float8, torch.float8_e4m3fn or else torch.float8_e5m2, since
                such a file has to be taken apart layer by layer, however many of them are float8
    family      a name in FAMILIES; `note` says, for people, how it was known and what else to know
    sampling    the family's, or what a model of our own training says of itself
    causal      whether the file, a name or the user says that it is causal; nothing in the weights does
    source      which weights of the file these are, for people
    file_bytes  of the file, or of all its shards
    tensors, parameters, weight_bytes   of the model alone, without scales
    """

    config: WanConfig
    dtype: torch.dtype
    family: str
    sampling: Sampling
    causal: bool
    note: str
    source: str
    file_bytes: int
    tensors: int
    parameters: int
    weight_bytes: int


@dataclass(frozen=True)
class Checkpoint(Description):
    """A description and the weights: CPU views of the file under Wan's names, scales beside float8 ones.

    With LoRAs, a weight that they change is computed each time it is read.
    """

    state_dict: Mapping[str, Tensor]


def describe(path: str | Path, family: str | None = None, loras: Loras = ()) -> Description:
    """What a file is, from its header alone, and whether LoRAs go with it. Raises as `load_checkpoint` does."""
    file, found = _open(path, family)
    return _describe(file, found, family, _read_loras(loras, file, found))


def load_checkpoint(path: str | Path, family: str | None = None, loras: Loras = ()) -> Checkpoint:
    """Opens a checkpoint: a file, a shard, an index of shards, or a folder with one of these.

    `family` says how it is sampled instead of a guess, and is taken for word that the model is causal. The weights are
    memory-mapped: they take no memory of their own until they are changed or converted. `loras` are files whose LoRAs
    are merged into them, each with its strength. Raises CheckpointError, a ValueError, for anything but a causal Wan
    text-to-video model, and for a LoRA that does not go with it; ValueError for an unknown family.
    """
    file, found = _open(path, family)
    merged = _read_loras(loras, file, found)
    packed = [at for parts in found.packed.values() for at in parts.values()]
    mapped = map_tensors(file, {*found.names.values(), *packed})
    state = {name: _scale(mapped[at]) if is_scale(name) else mapped[at] for name, at in found.names.items()}
    if packed:
        in_four_bits = {name: {part: mapped[at] for part, at in parts.items()} for name, parts in found.packed.items()}
        state = Unpacked(state, in_four_bits)
    about = _describe(file, found, family, merged)
    loras = [(lora, strength) for _, lora, strength in merged]
    return Checkpoint(**vars(about), state_dict=Merged(state, loras) if loras else state)


def load_model(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    family: str | None = None,
    loras: Loras = (),
) -> tuple[WanModel, Checkpoint]:
    """The model itself, ready to run, and its checkpoint.

    `dtype` defaults to the file's (bfloat16 for float8 files). Weights that need neither conversion nor another device
    remain views of the file; others are converted one at a time. Raises as `load_checkpoint` does.
    """
    checkpoint = load_checkpoint(path, family, loras)
    model = WanModel(checkpoint.config, device="meta")
    state = dequantised(checkpoint.state_dict, dtype or plain_dtype(checkpoint.dtype), device)
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval(), checkpoint


def dequantised(
    state_dict: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Plain weights of a state dict in `dtype` on `device`; float8 weights times their scales, in float32."""
    plain = {}
    for name, tensor in state_dict.items():
        if is_scale(name):
            continue
        if (scale := state_dict.get(f"{name}_scale")) is not None:
            rows = scale.to(device).reshape(-1, *[1] * (tensor.ndim - 1))  # [1 or out, 1]
            tensor = tensor.to(device).float() * rows
        plain[name] = tensor.to(device, dtype)
    return plain


def plain_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: that of the weights, or bfloat16 for float8."""
    return torch.bfloat16 if dtype in FLOAT8_DTYPES else dtype


def _open(path: str | Path, family: str | None) -> tuple[TensorFile, Found]:
    if family is not None:
        family_named(family)
    file = read_header(path)
    named = family or _guess(file).family
    return file, find_wan(file, trusted=family is not None or named == OF_48_CHANNELS)


def _read_loras(loras: Loras, file: TensorFile, found: Found) -> list[tuple[str, Lora, float]]:
    """(file's name, what it adds to the model's weights, strength) of each LoRA."""
    headers = found.headers(file)
    return [(Path(path).name, read_lora(path, headers), strength) for path, strength in loras]


def _scale(tensor: Tensor) -> Tensor:
    """A scale as float32, [] or [out]."""
    scale = tensor.float()
    return scale.reshape(()) if scale.numel() == 1 else scale.flatten()


def _describe(file: TensorFile, found: Found, chosen: str | None, loras: list[tuple[str, Lora, float]]) -> Description:
    headers = found.headers(file)
    weights = [tensor for name, tensor in headers.items() if not is_scale(name)]
    float8 = [dtype for dtype in FLOAT8_DTYPES if any(tensor.dtype is dtype for tensor in weights)]
    guess = Guess(chosen, "chosen") if chosen else _fitting(_guess(file), file, found.config)
    own = None if chosen else _own_sampling(file)
    notes = ["Sampled as its metadata says."] if own else _notes(file, found, guess, chosen is not None)
    for name, lora, strength in loras:
        notes.append(f"With {name} merged into it, strength {strength:g}.")
        if lora.left_out:
            notes.append(
                f"{len(lora.left_out)} parts of it do not fit this model and are left out, such as {lora.left_out[0]}."
            )
    return Description(
        config=found.config,
        dtype=float8[0] if float8 else headers["blocks.0.self_attn.q.weight"].dtype,
        family=guess.family,
        sampling=own or FAMILIES[guess.family].sampling,
        causal=found.causal or guess.evidence is not None,
        note=" ".join(notes),
        source=_source(file, found),
        file_bytes=file.nbytes,
        tensors=len(weights),
        parameters=sum(tensor.numel() for tensor in weights),
        weight_bytes=sum(tensor.nbytes for tensor in weights),
    )


def _own_sampling(file: TensorFile) -> Sampling | None:
    """What a model of our own training says of itself."""
    entry = metadata_entry(file.metadata, "sampling")
    try:
        return read_sampling(entry) if entry else None
    except (TypeError, ValueError) as error:
        title = f"{file.paths[0].name}, whose metadata cannot be right ({error})"
        raise CheckpointError(title, "its `sampling` must fit", "Choose a family, or correct it") from None


def _source(file: TensorFile, found: Found) -> str:
    shards = f" and {len(file.paths) - 1} more" if len(file.paths) > 1 else ""
    which = f"weights under {found.root.rstrip('.')}" if found.root else "bare names"
    return f"{file.paths[0].name}{shards}, {which}"


def _guess(file: TensorFile) -> Guess:
    """The family, by the metadata of a converted file (convert.py) or else by the file's name; by its folder too where
    that leaves it open ("framewise/causal_forcing.pt").

    A Diffusers pipeline has its name one folder further up, over "transformer".
    """
    path = file.paths[0]
    if (named := file.metadata.get(FAMILY)) in FAMILIES:
        return Guess(named, named)
    guess = guess_family(path.name)
    if guess.evidence is None or guess.family == "causal-forcing":
        folder = path.absolute().parent
        folder = folder.parent if folder.name == "transformer" else folder
        return guess_family(f"{folder.name} {path.name}", *file.metadata.values())
    return guess


def _fitting(guess: Guess, file: TensorFile, config: WanConfig) -> Guess:
    """The guess, where metadata say so or the latents are those of that family; else a family whose they are."""
    if file.metadata.get(FAMILY) == guess.family or (config.channels == 48) == (guess.family == OF_48_CHANNELS):
        return guess
    return Guess(OF_48_CHANNELS if config.channels == 48 else DEFAULT, None)


def _notes(file: TensorFile, found: Found, guess: Guess, chosen: bool) -> list[str]:
    """How the family was known, and doubts about the file, in sentences."""
    if chosen:
        notes = [f"Sampled as {guess.family}, as chosen."]
    elif guess.evidence:
        where = "metadata" if file.metadata.get(FAMILY) == guess.evidence else "name"
        notes = [f'Sampled as {guess.family}: its {where} says "{guess.evidence}".']
    elif guess.family == OF_48_CHANNELS:
        notes = [f"Sampled as {OF_48_CHANNELS}, the one family known whose latents have 48 channels."]
    else:
        notes = [f"Sampled as {DEFAULT}, since no name tells the family: choose it if it is another."]
    if STAGE.search(file.paths[0].name):
        notes.append("The name is that of a stage of training before the last: expect blurred motion in few steps.")
    if not (found.causal or guess.evidence):
        notes.append(
            "Nothing says that this model is causal. Wan 2.1 T2V 1.3B itself and its step distillations have exactly "
            f"the same tensors, but fall apart when they are sampled chunk by chunk. If the video does: {GET_ONE}."
        )
    return notes
