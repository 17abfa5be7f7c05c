"""A LoRA merged into a model's weights: W + strength (alpha / rank) up down (arXiv 2106.09685).

    adapters = read_lora("lora.pt", shapes)            # for the model whose tensors are these
    state = Merged(state, adapters, strength=1.0)      # a state dict; each weight is computed when it is read

Files of PEFT, of ComfyUI and diffusers, and of our own training hold the same pairs under names of their own, in
whatever dicts and prefixes:

    base_model.model.blocks.0.self_attn.q.lora_A.weight      down [rank, in]; lora_A.default.weight, lora_down.weight
    base_model.model.blocks.0.self_attn.q.lora_B.weight      up [out, rank]; lora_B.default.weight, lora_up.weight
    diffusion_model.blocks.0.self_attn.q.alpha               [], where the file has it
    lora_unet_blocks_0_self_attn_q.lora_down.weight          with underscores for dots
    transformer.blocks.0.attn1.to_q.lora_A.weight            Diffusers' layers

PEFT keeps alpha in a configuration beside the file. Where the file has none it is taken to be the rank, as it is for
LongLive's lora.pt (NVlabs/LongLive, configs/longlive_inference.yaml: adapter rank 256, alpha 256). For another, ask for
alpha / rank as the strength.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .identify import FLOAT8, TEACHERS, WRAPPERS, wan_name
from .tensorfiles import CheckpointError, map_tensors, read_header

NEEDED = "a LoRA made for this model is needed"
PART = re.compile(r"(?P<layer>.+?)\.(?:(?P<part>alpha)|lora[._](?P<kind>A|down|B|up)(?:\.\w+)?\.weight)")
DOWN = ("A", "down")
UNDERSCORED = re.compile(r"lora_unet_+")


@dataclass(frozen=True)
class Adapter:
    """What a LoRA adds to one weight [out, in]: scale times up [out, rank] times down [rank, in]."""

    down: Tensor
    up: Tensor
    scale: float

    def added_to(self, weight: Tensor, strength: float) -> Tensor:
        """The weight with it, in the weight's dtype; computed in float32."""
        change = self.up.flatten(1).float() @ self.down.flatten(1).float()
        return weight.float().add(change.view_as(weight), alpha=strength * self.scale).to(weight.dtype)


class Merged(Mapping[str, Tensor]):
    """A state dict with a LoRA in it, which never stands in memory whole: a weight is made anew whenever it is read."""

    def __init__(self, state: Mapping[str, Tensor], adapters: Mapping[str, Adapter], strength: float) -> None:
        self.state, self.adapters, self.strength = state, adapters, strength

    def __getitem__(self, name: str) -> Tensor:
        weight, adapter = self.state[name], self.adapters.get(name)
        return weight if adapter is None else adapter.added_to(weight, self.strength)

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


def read_lora(path: str | Path, model: Mapping[str, Tensor]) -> dict[str, Adapter]:
    """{name of a weight: what the LoRA in a file adds to it}, as views of the file.

    `model` has the weights under Wan's names; only shapes and dtypes are looked at, so they may be on the meta device.
    Raises CheckpointError for a file that is no LoRA, for one of another model or of a kind that is not read, and for a
    float8 model.
    """
    file = read_header(path)
    title = file.paths[0].name
    mapped = map_tensors(file, file.tensors)
    layers = _layers({name: mapped[name] for name in file.tensors}, title)  # in the file's order
    adapters = {}
    for at, parts in layers.items():
        if (weight := _weight_named(at, model)) is None:
            raise CheckpointError(
                f"{title}, a LoRA with layers that the model does not have (such as {at})",
                NEEDED,
                "Get the one for Wan 2.1 text-to-video 1.3B, or leave it out",
            )
        if weight in adapters:
            raise CheckpointError(f"{title}, with two LoRAs in it", "only one can be merged", "Save one of them alone")
        adapters[weight] = _adapter(parts, at, title)
        _check(adapters[weight], weight, model[weight], title)
    return adapters


def _layers(tensors: dict[str, Tensor], title: str) -> dict[str, dict[str, Tensor]]:
    """{layer as the file names it: {"down", "up", perhaps "alpha"}}; a critic's, which training saves too, left out."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if TEACHERS.search(name):
            continue
        found = PART.fullmatch(WRAPPERS.sub("", name))
        if found is None:
            raise CheckpointError(
                f"{title}, with {name} in it, which is no part of a plain LoRA",
                "a LoRA of pairs lora_A and lora_B, or lora_down and lora_up, is needed",
                "Give a model with --model; LoKr, DoRA and the like, and differences of norms and biases, are not read",
            )
        part = found["part"] or ("down" if found["kind"] in DOWN else "up")
        layers.setdefault(found["layer"], {})[part] = tensor
    if not layers:
        raise CheckpointError(f"{title}, with no tensors in it", NEEDED, "Name the file with the LoRA")
    return layers


def _adapter(parts: dict[str, Tensor], layer: str, title: str) -> Adapter:
    if missing := {"down", "up"} - parts.keys():
        raise CheckpointError(
            f"{title}, whose {layer} lacks its {'lora_A' if 'down' in missing else 'lora_B'}",
            "both halves of a LoRA are needed",
            "Download it again",
        )
    down, up = parts["down"], parts["up"]
    alpha = parts["alpha"].item() if "alpha" in parts else len(down)
    return Adapter(down, up, alpha / len(down))


def _weight_named(layer: str, model: Mapping[str, Tensor]) -> str | None:
    """The model's weight that a layer of the file stands for: its name without any prefix; None if there is none."""
    if UNDERSCORED.match(layer):
        plain = UNDERSCORED.sub("", layer)
        return next((name for name in model if name.removesuffix(".weight").replace(".", "_") == plain), None)
    parts = wan_name(f"{layer}.weight").split(".")
    names = (".".join(parts[i:]) for i in range(len(parts)))
    return next((name for name in names if name in model), None)


def _check(adapter: Adapter, name: str, weight: Tensor, title: str) -> None:
    """Raises CheckpointError if an adapter does not go with the weight."""
    (rank, width), (out, inner) = adapter.down.flatten(1).shape, adapter.up.flatten(1).shape
    if (out, width) != tuple(weight.flatten(1).shape) or rank != inner:
        raise CheckpointError(
            f"{title}, a LoRA that adds [{out}, {inner}] x [{rank}, {width}] to {name}",
            f"the model has {list(weight.shape)} there",
            "Get the one for this model: 1.3B, not 14B",
        )
    if weight.dtype in FLOAT8:
        raise CheckpointError(
            f"{title} for a float8 model, which is too coarse to take up a LoRA",
            "it is merged into float32, bfloat16 or float16",
            "Get that version of the model; --fp8 makes it float8 with the LoRA in it",
        )
