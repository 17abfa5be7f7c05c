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
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..sampling.config import Sampling, read_sampling
from ..sampling.families import DEFAULT, FAMILIES, OF_48_CHANNELS, Family, Guess, family_named, guess_family
from ..wan.config import WanConfig
from ..wan.model import WanModel
from .identify import FLOAT8_DTYPES, GET_ONE, Found, find_wan, in_wans_shape, is_scale, metadata_entry
from .lora import Lora, Merged, read_lora
from .nvfp4 import Unpacked
from .tensorfiles import CheckpointError, TensorFile, map_tensors, read_header

Loras = Sequence[tuple[str | Path, float]]
"""Files with LoRAs and their strengths, merged in this order."""

FAMILY = "family"  # metadata of files that say it themselves
MODELS_FOLDERS = ("models", "diffusion_models", "unet")  # folders above these are not a model's
CHOOSE = "If it is another, choose its family: in Load Self Forcing Model, or with --family."
LEVELS = 6  # folders that may tell
PROJECT = Path(__file__).resolve().parents[2]
STAGE = re.compile(r"ode[-_]init|causal[-_]ode|causal[-_]cd|ar[-_]diffusion", re.IGNORECASE)


@dataclass(frozen=True)
class Description:
    """What a file's header says.

    dtype       of its linear layers; where any weight is float8, torch.float8_e4m3fn or else torch.float8_e5m2, since
                such a file has to be taken apart layer by layer, however many of them are float8
    family      a name in FAMILIES; `note` says, for people, how it was known and what else to know
    known       whether anything told the family, the user included
    causal      whether anything says that it is causal; nothing in the weights does
    sampling    the family's, or what a model of our own training says of itself
    source      which weights of the file these are, for people
    file_bytes  of the file, or of all its shards
    networks    sets of weights: 2 where another than the one that denoises writes the cache
    quantised   what the file says of layers in a form that only ComfyUI computes with, each with its `format`
    tensors, parameters, weight_bytes   of the model alone, without scales, all sets together
    """

    config: WanConfig
    dtype: torch.dtype
    family: str
    known: bool
    causal: bool
    sampling: Sampling
    note: str
    source: str
    file_bytes: int
    tensors: int
    parameters: int
    weight_bytes: int
    networks: int = 1
    quantised: dict[str, dict] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Description):
    """A description and the weights: CPU views of the file under Wan's names, scales beside float8 ones.

    With LoRAs, a weight that they change is computed each time it is read. `memory` are those of the network that
    writes the cache, where it is another.
    """

    state_dict: Mapping[str, Tensor]
    memory: Mapping[str, Tensor] | None = None


def describe(path: str | Path, family: str | None = None, loras: Loras = ()) -> Description:
    """What a file is, from its header alone, and whether LoRAs go with it. Raises as `load_checkpoint` does."""
    file, found = _open(path, family)
    return _describe(file, found, family, _read_loras(loras, file, found))


def load_checkpoint(
    path: str | Path, family: str | None = None, loras: Loras = (), takes_quantised: bool = False
) -> Checkpoint:
    """Opens a checkpoint: a file, a shard, an index of shards, or a folder with one of these.

    `family` says how it is sampled instead of a guess, and is taken for word that the model is causal. The weights are
    memory-mapped: they take no memory of their own until they are changed or converted. `loras` are files whose LoRAs
    are merged into them, each with its strength. `takes_quantised`: the caller has layers for every form that ComfyUI
    knows, and gets all tensors of such layers as the file has them. Raises CheckpointError, a ValueError, for anything
    but a causal Wan text-to-video model, and for a LoRA that does not go with it; ValueError for an unknown family.
    """
    file, found = _open(path, family)
    if found.quantised and not takes_quantised:
        raise quantised_error(file.paths[0].name, found.quantised)
    merged = _read_loras(loras, file, found)
    packed = [at for parts in found.packed.values() for at in parts.values()]
    mapped = map_tensors(file, {*found.names.values(), *found.memory.values(), *packed})

    def weights(names: dict[str, str]) -> dict[str, Tensor]:
        return {
            name: _scale(mapped[at]) if is_scale(name) and not found.quantised else in_wans_shape(name, mapped[at])
            for name, at in names.items()
        }

    about, state = _describe(file, found, family, merged), weights(found.names)
    if packed:
        in_four_bits = {name: {part: mapped[at] for part, at in parts.items()} for name, parts in found.packed.items()}
        state = Unpacked(state, in_four_bits)
    loras = [(lora, strength) for _, lora, strength in merged]
    memory = weights(found.memory) if found.memory else None
    return Checkpoint(**vars(about), state_dict=Merged(state, loras) if loras else state, memory=memory)


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
    dtype = dtype or plain_dtype(checkpoint.dtype)
    return build_model(checkpoint.config, dequantised(checkpoint.state_dict, dtype, device)), checkpoint


def quantised_error(title: str, quantised: dict[str, dict]) -> CheckpointError:
    """The error for a file in a form that only ComfyUI's layers compute with."""
    return CheckpointError(
        f"{title}, quantised as {' and '.join(formats_of(quantised))}",
        "only ComfyUI's own layers compute with that",
        "Use Load Self Forcing Model in ComfyUI, without a LoRA, or get the bf16 or fp8 version",
    )


def formats_of(quantised: dict[str, dict]) -> list[str]:
    """Names of the forms that layers are quantised in, each once."""
    return sorted({str(about["format"]) for about in quantised.values() if "format" in about})


def load_memory(checkpoint: Checkpoint, device: torch.device | str, dtype: torch.dtype) -> WanModel | None:
    """The network that writes the cache, where a checkpoint has another one for that."""
    memory = checkpoint.memory
    return None if memory is None else build_model(checkpoint.config, dequantised(memory, dtype, device))


def build_model(config: WanConfig, state: Mapping[str, Tensor]) -> WanModel:
    """A model around plain weights."""
    model = WanModel(config, device="meta")
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


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
    named = family or guess(file).family
    return file, find_wan(file, trusted=family is not None or named in ("krea-14b", OF_48_CHANNELS))


def _read_loras(loras: Loras, file: TensorFile, found: Found) -> list[tuple[str, Lora, float]]:
    """(file's name, what it adds to the model's weights, strength) of each LoRA."""
    if loras and found.quantised:
        raise quantised_error(file.paths[0].name, found.quantised)
    headers = found.headers(file)
    return [(Path(path).name, read_lora(path, headers), strength) for path, strength in loras]


def _scale(tensor: Tensor) -> Tensor:
    """A scale as float32, [] or [out]."""
    scale = tensor.float()
    return scale.reshape(()) if scale.numel() == 1 else scale.flatten()


def _describe(file: TensorFile, found: Found, chosen: str | None, loras: list[tuple[str, Lora, float]]) -> Description:
    headers = found.headers(file)
    both = (*headers.items(), *((name, file.tensors[at]) for name, at in found.memory.items()))
    weights = [tensor for name, tensor in both if not is_scale(name)]
    float8 = [dtype for dtype in FLOAT8_DTYPES if any(tensor.dtype is dtype for tensor in weights)]
    guessed = Guess(chosen, "chosen") if chosen else _fitting(guess(file), file, found.config)
    own = None if chosen else _own_sampling(file)
    notes = ["Sampled as its metadata says."] if own else _notes(file, found, guessed, chosen is not None, bool(loras))
    for name, lora, strength in loras:
        notes.append(f"With {name} merged into it, strength {strength:g}.")
        if lora.left_out:
            notes.append(
                f"{len(lora.left_out)} parts of it do not fit this model and are left out, such as {lora.left_out[0]}."
            )
    return Description(
        config=found.config,
        dtype=float8[0] if float8 else headers["blocks.0.self_attn.q.weight"].dtype,
        family=guessed.family,
        known=bool(own or guessed.evidence or guessed.family == OF_48_CHANNELS),
        causal=bool(found.causal or own or guessed.evidence),
        sampling=own or FAMILIES[guessed.family].sampling,
        note=" ".join(notes),
        source=_source(file, found),
        file_bytes=file.nbytes,
        tensors=len(weights),
        parameters=sum(tensor.numel() for tensor in weights),
        weight_bytes=sum(tensor.nbytes for tensor in weights),
        networks=2 if found.memory else 1,
        quantised=found.quantised,
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


def guess(file: TensorFile) -> Guess:
    """The family of a file, by its metadata where they name one; else by its name, its folders and all its metadata."""
    if (named := file.metadata.get(FAMILY)) in FAMILIES:
        return Guess(named, named)
    path = file.paths[0]
    return guess_family(path.name, *_folders(path), *file.metadata.values())


def _folders(path: Path) -> list[str]:
    """Names of the folders that may tell what a file is, the nearest first, up to where models are kept."""
    names = []
    for folder in path.absolute().parents[:LEVELS]:
        if folder.name.lower() in MODELS_FOLDERS or folder in (Path.home(), PROJECT):
            break
        names.append(folder.name)
    return names


def _fitting(guessed: Guess, file: TensorFile, config: WanConfig) -> Guess:
    """The guess, where metadata say so or the latents are those of that family; else a family whose they are."""
    if file.metadata.get(FAMILY) == guessed.family or (config.channels == 48) == (guessed.family == OF_48_CHANNELS):
        return guessed
    return Guess(OF_48_CHANNELS if config.channels == 48 else DEFAULT, None)


def _notes(file: TensorFile, found: Found, guessed: Guess, chosen: bool, has_lora: bool) -> list[str]:
    """How the family was known, what it is, and doubts about the file, in sentences."""
    family, name = FAMILIES[guessed.family], file.paths[0].name
    if chosen:
        notes = [f"Sampled as {guessed.family}, as chosen."]
    elif guessed.evidence:
        where = "metadata" if file.metadata.get(FAMILY) == guessed.evidence else "name"
        notes = [f'Sampled as {guessed.family}: its {where} says "{guessed.evidence}".']
    elif guessed.family == OF_48_CHANNELS:
        notes = [f"Sampled as {OF_48_CHANNELS}, the one family known whose latents have 48 channels."]
    else:
        notes = [
            f"NOTHING TELLS WHICH MODEL THIS IS: neither its name, nor its folders, nor its metadata. It is sampled as "
            f"{guessed.family}, {_in_words(family.sampling)}. {CHOOSE}"
        ]
    if guessed.assumed:
        notes.append(f"Nothing tells chunk-wise from frame-wise: {guessed.assumed} is assumed. {CHOOSE}")
    if guessed.evidence:
        notes.append(f"{family.what} Licence: {family.licence}. {family.page}.")
    if found.quantised:
        notes.append(f"Quantised as {' and '.join(formats_of(found.quantised))}: ComfyUI's own layers compute with it.")
    if family.base and not has_lora and _is_base(family, file):
        notes.append(
            f"This is the base alone, a model of 5 seconds: what makes it {guessed.family} is in {family.lora}. Give "
            "that as its LoRA."
        )
    if STAGE.search(f"{file.paths[0].parent.name}/{name}"):
        notes.append("The name is that of a stage of training before the last: expect blurred motion in few steps.")
    if not (found.causal or guessed.evidence):
        notes.append(
            "Nothing says that this model is causal. Wan 2.1 T2V 1.3B itself and its step distillations have exactly "
            f"the same tensors, but fall apart when they are sampled chunk by chunk. If the video does: {GET_ONE}."
        )
    return notes


def _is_base(family: Family, file: TensorFile) -> bool:
    return bool(re.search(family.base, re.sub(r"[^a-z0-9]+", "-", file.paths[0].name.lower())))


def _in_words(sampling: Sampling) -> str:
    return f"{len(sampling.steps)} steps with chunks of {sampling.chunk} latent frames"
