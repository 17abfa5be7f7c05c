"""A LoRA merged into a model's weights: W + strength (alpha / rank) up down (arXiv 2106.09685).

    adapters = read_lora("lora.pt", shapes)            # for the model whose tensors are these
    state = Merged(state, [(adapters, 1.0)])           # a state dict; each weight is computed when it is read

Files of PEFT, of ComfyUI and diffusers, and of our own training hold the same pairs under names of their own, in
whatever dicts and prefixes:

    base_model.model.blocks.0.self_attn.q.lora_A.weight      down [rank, in]; lora_A.default.weight, lora_down.weight
    base_model.model.blocks.0.self_attn.q.lora_B.weight      up [out, rank]; lora_B.default.weight, lora_up.weight
    diffusion_model.blocks.0.self_attn.q.alpha               [], where the file has it
    lora_unet_blocks_0_self_attn_q.lora_down.weight          with underscores for dots; lycoris_, lora_transformer_
    diffusion_model.blocks.0.norm3.diff, .diff_b             added to a weight and its bias as they are
    transformer.blocks.0.attn1.to_q.lora_A.weight            Diffusers' layers

Alpha is the file's own tensor; else what `lora_adapter_metadata` (diffusers), `adapter_config.json` beside the file
(PEFT) or `ss_network_alpha` (kohya) says; else the rank, as it is for LongLive's lora.pt (NVlabs/LongLive,
configs/longlive_inference.yaml: adapter rank 256, alpha 256).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .identify import FLOAT8_DTYPES, TEACHERS, WRAPPERS, metadata_entry, wan_name, wrong_file
from .tensorfiles import CheckpointError, TensorFile, map_tensors, read_header

NEEDED = "a LoRA made for this model is needed"
PAIR = re.compile(
    r"(?P<layer>.+?)(?:\.lora_(?P<kind>A|B|down|up)(?:\.\w+?)??(?:\.weight)?"
    r"|[._]lora(?:_linear_layer)?\.(?P<old>down|up)\.weight)"
)
OTHER_PART = re.compile(r"(?P<layer>.+)\.(?P<part>alpha|diff|diff_b|w_norm|b_norm)")
BIAS_OF_UP = re.compile(r"(?P<layer>.+)\.lora_B(?:\.\w+)?\.bias")
DIFFERENCES = {"diff": "diff", "w_norm": "diff", "diff_b": "diff_b", "b_norm": "diff_b"}
DOWN = ("A", "down")
OTHER_ADAPTERS = re.compile(
    r"\.(lokr_\w+|hada_\w+|oft_blocks|dora_scale|lora_magnitude_vector(\.\w+)*|lora_mid\.weight)$"
)
UNDERSCORED = re.compile(r"(lora_unet_+|lycoris_|lora_transformer_)")
UNDERSCORED_NAMES = {
    "attn1_": "self_attn_",
    "attn2_": "cross_attn_",
    "_to_out_0": "_o",
    "_to_": "_",
    "ffn_net_0_proj": "ffn_0",
    "ffn_net_2": "ffn_2",
}
CONFIG_KEYS = ("", "transformer.", "unet.")  # what diffusers puts before PEFT's names


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
    """A state dict with LoRAs in it, which never stands in memory whole: a weight is made anew whenever it is read.

    loras: (what `read_lora` gives, strength), added one after another in float32 and rounded once.
    """

    def __init__(self, state: Mapping[str, Tensor], loras: Sequence[tuple[Mapping[str, Adapter], float]]) -> None:
        self.state, self.loras = state, loras

    def __getitem__(self, name: str) -> Tensor:
        weight, added = self.state[name], [(lora[name], strength) for lora, strength in self.loras if name in lora]
        whole = weight.float() if added else weight
        for adapter, strength in added:
            whole = adapter.added_to(whole, strength)
        return whole.to(weight.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


@dataclass(frozen=True)
class Difference:
    """What a file adds to one weight or bias as it stands, of the same shape."""

    change: Tensor

    def added_to(self, weight: Tensor, strength: float) -> Tensor:
        """The weight with it, in the weight's dtype; computed in float32."""
        return weight.float().add(self.change.float().view_as(weight), alpha=strength).to(weight.dtype)


def read_lora(path: str | Path, model: Mapping[str, Tensor]) -> dict[str, Adapter | Difference]:
    """{name of a weight: what the LoRA in a file adds to it}, as views of the file.

    `model` has the weights under Wan's names; only shapes and dtypes are looked at, so they may be on the meta device.
    Layers that the model does not have are left out (`left_out` names them) where others fit. Raises CheckpointError
    for a file of which nothing fits, for one of another model's shapes or of a kind that is not read, and for a float8
    model.
    """
    file, title, layers, _ = _read(path)
    adapters: dict[str, Adapter | Difference] = {}
    for layer, parts in layers.items():
        if (weight := _weight_named(layer, model)) is None:
            continue
        for name, adapter in _adapters(parts, layer, weight, _alpha(file, layer), title):
            if name in adapters:
                raise CheckpointError(f"{title}, with two LoRAs in it", "only one can be merged", "Save one alone")
            if name in model:
                _check(adapter, name, model[name], title)
                adapters[name] = adapter
    if not adapters:
        raise CheckpointError(
            f"{title}, with layers that the model does not have (such as {next(iter(layers))})",
            NEEDED,
            "Get the one for Wan 2.1 text-to-video 1.3B, or leave it out",
        )
    return adapters


def left_out(path: str | Path, model: Mapping[str, Tensor]) -> list[str]:
    """Layers and tensors of a LoRA's file that `read_lora` does not use with this model, in the file's order."""
    _, _, layers, others = _read(path)
    return [layer for layer in layers if _weight_named(layer, model) is None] + others


def _read(path: str | Path) -> tuple[TensorFile, str, dict[str, dict[str, Tensor]], list[str]]:
    """(file, its title, {layer as the file names it: its parts}, names of tensors that are no part of a LoRA)."""
    file = read_header(path)
    title, mapped = file.paths[0].name, map_tensors(file, file.tensors)
    layers, others = _layers({name: mapped[name] for name in file.tensors}, title)  # in the file's order
    return file, title, layers, others


def _layers(tensors: dict[str, Tensor], title: str) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """({layer: {"down", "up", "alpha", "diff", "diff_b", those it has}}, other names); a critic's are left out."""
    layers: dict[str, dict[str, Tensor]] = {}
    others = []
    for name, tensor in tensors.items():
        if TEACHERS.search(name) or name.endswith("comfy_attention.config"):
            continue
        if OTHER_ADAPTERS.search(name):
            raise CheckpointError(
                f"{title}, with {name} in it, of a kind (DoRA, LoKr, LoHa, OFT, LoCon) that is not merged here",
                "a LoRA of pairs lora_A and lora_B, or lora_down and lora_up, is needed",
                "ComfyUI's LoraLoaderModelOnly applies these to a loaded model",
            )
        if (part := _part(WRAPPERS.sub("", name))) is None:
            others.append(name)
        else:
            layers.setdefault(part[0], {})[part[1]] = tensor
    if not tensors:
        raise CheckpointError(f"{title}, with no tensors in it", NEEDED, "Choose the file with the LoRA")
    if not layers:
        raise wrong_file(title, tensors, NEEDED, "Choose the LoRA's own file, such as LongLive's lora.pt")
    return layers, others


def _part(name: str) -> tuple[str, str] | None:
    """(layer, what the tensor is of it); None for a tensor that is no part of a LoRA."""
    if found := PAIR.fullmatch(name):
        return found["layer"], "down" if (found["kind"] or found["old"]) in DOWN else "up"
    if found := BIAS_OF_UP.fullmatch(name):
        return found["layer"], "diff_b"
    if found := OTHER_PART.fullmatch(name):
        return found["layer"], DIFFERENCES.get(found["part"], found["part"])
    return None


def _adapters(
    parts: dict[str, Tensor], layer: str, weight: str, alpha: float | None, title: str
) -> Iterator[tuple[str, Adapter | Difference]]:
    """(name of a weight or bias, what is added to it)."""
    if parts.keys() & {"down", "up"}:
        yield weight, _adapter(parts, layer, alpha, title)
    elif "diff" in parts:
        yield weight, Difference(parts["diff"])
    if "diff_b" in parts:
        yield f"{weight.removesuffix('.weight')}.bias", Difference(parts["diff_b"])


def _adapter(parts: dict[str, Tensor], layer: str, alpha: float | None, title: str) -> Adapter:
    if missing := {"down", "up"} - parts.keys():
        raise CheckpointError(
            f"{title}, whose {layer} lacks its {'lora_A' if 'down' in missing else 'lora_B'}",
            "both halves of a LoRA are needed",
            "Download it again",
        )
    down, up = parts["down"], parts["up"]
    if down.ndim < 2 or up.ndim < 2 or 0 in down.shape or parts.get("alpha", down[0, 0]).numel() != 1:
        raise CheckpointError(f"{title}, whose {layer} is no pair of matrices", NEEDED, "Download it again")
    if "alpha" in parts:
        alpha = parts["alpha"].item()
    return Adapter(down, up, 1.0 if alpha is None else alpha / len(down))


def _alpha(file: TensorFile, layer: str) -> float | None:
    """Alpha as the file's metadata or PEFT's configuration beside it says; None where neither does."""
    for config in (metadata_entry(file.metadata, "lora_adapter_metadata"), _peft_config(file.paths[0])):
        for prefix in CONFIG_KEYS:
            pattern = config.get(f"{prefix}alpha_pattern")
            pattern = pattern if isinstance(pattern, dict) else {}
            for name, alpha in (*pattern.items(), ("", config.get(f"{prefix}lora_alpha"))):
                if isinstance(alpha, (int, float)) and (not name or layer == name or layer.endswith(f".{name}")):
                    return float(alpha)
    try:
        return float(file.metadata["ss_network_alpha"])
    except (KeyError, TypeError, ValueError):  # kohya writes "None" where it was not set
        return None


def _peft_config(path: Path) -> dict:
    """PEFT's configuration beside its weights; {} where there is none that can be read."""
    if not path.name.startswith("adapter_model"):  # another file's neighbours say nothing of it
        return {}
    try:
        config = json.loads(path.with_name("adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _weight_named(layer: str, model: Mapping[str, Tensor]) -> str | None:
    """The model's weight that a layer of the file stands for: its name without any prefix; None if there is none."""
    if UNDERSCORED.match(layer):
        plain = UNDERSCORED.sub("", layer, count=1).replace(".", "_")
        for theirs, wans in UNDERSCORED_NAMES.items():
            plain = plain.replace(theirs, wans)
        return next((name for name in model if name.removesuffix(".weight").replace(".", "_") == plain), None)
    parts = wan_name(f"{layer}.weight".replace(".processor.", ".")).split(".")
    names = (".".join(parts[i:]) for i in range(len(parts)))
    return next((name for name in names if name in model), None)


def _check(adapter: Adapter | Difference, name: str, weight: Tensor, title: str) -> None:
    """Raises CheckpointError if an adapter does not go with the weight."""
    parts = [part for part in vars(adapter).values() if isinstance(part, Tensor)]
    if odd := [part for part in parts if not part.is_floating_point()]:
        dtype = str(odd[0].dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{title}, whose part for {name} is {dtype}", "floating point is needed", "Get that version"
        )
    if isinstance(adapter, Difference):
        fits, adds = adapter.change.numel() == weight.numel(), str(list(adapter.change.shape))
    else:
        (rank, width), (out, inner) = adapter.down.flatten(1).shape, adapter.up.flatten(1).shape
        fits = (out, width) == tuple(weight.flatten(1).shape) and rank == inner
        adds = f"[{out}, {inner}] x [{rank}, {width}]"
    if not fits:
        raise CheckpointError(
            f"{title}, a LoRA that adds {adds} to {name}",
            f"the model has {list(weight.shape)} there",
            "Get the one for this model: 1.3B, not 14B",
        )
    if weight.dtype in FLOAT8_DTYPES:
        raise CheckpointError(
            f"{title} for a float8 model, which is too coarse to take up a LoRA",
            "it is merged into float32, bfloat16 or float16",
            "Get that version of the model, and make it float8 with the LoRA in it",
        )
