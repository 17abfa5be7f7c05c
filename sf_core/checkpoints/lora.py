"""LoRAs and their relatives merged into a model's weights; the formulas are those of adapters.py.

    lora = read_lora("lora.pt", shapes)                # for the model whose tensors are these
    state = Merged(state, [(lora, 1.0)])               # a state dict; each weight is computed when it is read

Files of PEFT, of ComfyUI and diffusers, of LyCORIS and of our own training hold the same parts under names of their
own, in whatever dicts and prefixes:

    base_model.model.blocks.0.self_attn.q.lora_A.weight      down [rank, in]; lora_A.default.weight, lora_down.weight
    base_model.model.blocks.0.self_attn.q.lora_B.weight      up [out, rank]; lora_B.default.weight, lora_up.weight
    diffusion_model.blocks.0.self_attn.q.alpha               [], where the file has it
    diffusion_model.blocks.0.self_attn.q.dora_scale          lengths of DoRA; lora_magnitude_vector of PEFT
    lycoris_blocks_0_self_attn_q.lokr_w1, .hada_w1_a, ...    of LoKr, LoHa, GLoRA (a1.weight), OFT and BOFT (oft_blocks)
    lora_unet_blocks_0_self_attn_q.lora_down.weight          with underscores for dots; lycoris_, lora_transformer_
    diffusion_model.blocks.0.norm3.diff, .diff_b             added to a weight and its bias; set_weight takes its place
    diffusion_model.head.modulation.diff                     also of what is no layer's weight
    transformer.blocks.0.attn1.to_q.lora_A.weight            Diffusers' layers

Alpha is the file's own tensor; else what `lora_adapter_metadata` (diffusers), `adapter_config.json` beside the file
(PEFT) or `ss_network_alpha` (kohya) says; else the rank, as it is for LongLive's lora.pt (NVlabs/LongLive,
configs/longlive_inference.yaml: adapter rank 256, alpha 256). `use_rslora` is what the first two say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .adapters import Adapter, Alpha, Parts, adapter_of, missing_part, unused_parts
from .identify import FLOAT8_DTYPES, TEACHERS, WRAPPERS, metadata_entry, wan_name, wrong_file
from .tensorfiles import CheckpointError, TensorFile, map_tensors, read_header

NEEDED = "a LoRA made for this model is needed"
PAIR = re.compile(
    r"(?P<layer>.+?)(?:\.lora_(?P<kind>A|B|down|up)(?:\.\w+?)??(?:\.weight)?"
    r"|[._]lora(?:_linear_layer)?\.(?P<old>down|up)\.weight)"
)
MAGNITUDE = re.compile(r"(?P<layer>.+)\.lora_magnitude_vector(?:\.\w+)*")
WITH_WEIGHT = re.compile(r"(?P<layer>.+)\.(?:lora_(?P<mid>mid)|(?P<glora>[ab][12]))\.weight")
OTHER_PART = re.compile(
    r"(?P<layer>.+)\.(?P<part>alpha|diff|diff_b|w_norm|b_norm|set_weight|dora_scale|oft_blocks|rescale|reshape_weight"
    r"|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2))(?:\.default)?"
)
BIAS_OF_UP = re.compile(r"(?P<layer>.+)\.lora_B(?:\.\w+)?\.bias")
DIFFERENCES = {"w_norm": "diff", "b_norm": "diff_b"}
DOWN = ("A", "down")
UNKNOWN_KINDS = re.compile(r"\.(oft_[RrS]|boft_[RS]|vera_lambda_[bd]|ia3_l|hra_u|lora_E)(\.|$)")
UNDERSCORED = re.compile(r"(lora_unet_+|lycoris_|lora_transformer_)")
UNDERSCORED_NAMES = {
    "attn1_": "self_attn_",
    "attn2_": "cross_attn_",
    "_to_out_0": "_o",
    "_to_": "_",
    "ffn_net_0_proj": "ffn_0",
    "ffn_net_2": "ffn_2",
    "condition_embedder_time_embedder_linear_1": "time_embedding_0",
    "condition_embedder_time_embedder_linear_2": "time_embedding_2",
    "condition_embedder_time_proj": "time_projection_1",
    "condition_embedder_text_embedder_linear_1": "text_embedding_0",
    "condition_embedder_text_embedder_linear_2": "text_embedding_2",
    "proj_out": "head_head",
}
CONFIG_KEYS = ("", "transformer.", "unet.")  # what diffusers puts before PEFT's names


@dataclass(frozen=True)
class Lora:
    """What a file adds to a model.

    adapters  {name of a weight: what is added to it}, as views of the file
    left_out  layers and tensors of the file that are not used with this model
    """

    adapters: dict[str, Adapter]
    left_out: list[str]


class Merged(Mapping[str, Tensor]):
    """A state dict with LoRAs in it, which never stands in memory whole: a weight is made anew whenever it is read.

    loras: (what `read_lora` gives, strength), added one after another in float32 and rounded once.
    """

    def __init__(self, state: Mapping[str, Tensor], loras: Sequence[tuple[Lora, float]]) -> None:
        self.state, self.loras = state, loras

    def __getitem__(self, name: str) -> Tensor:
        weight = whole = self.state[name]
        for lora, strength in self.loras:
            if adapter := lora.adapters.get(name):
                whole = adapter.added_to(whole, strength)
        return whole.to(weight.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


def read_lora(path: str | Path, model: Mapping[str, Tensor]) -> Lora:
    """What the LoRA in a file adds to a model.

    `model` has the weights under Wan's names; only shapes and dtypes are looked at, so they may be on the meta device.
    Layers that the model does not have, or has in another shape, are left out where others fit. Raises CheckpointError
    for a file of which nothing fits, for one of a kind that is not read, for half an adapter, and for a float8 model.
    """
    file, title, layers, left_out = _read(path)
    lora, misfits = Lora({}, left_out), []
    for layer, parts in layers.items():
        weight = _weight_named(layer, model)
        unused = ["alpha"] if parts.keys() == {"alpha"} else unused_parts(parts)
        lora.left_out.extend([layer] if weight is None else [f"{layer}.{part}" for part in unused])
        for name, adds in () if weight is None else _by_weight(parts, layer, weight, title):
            if name in lora.adapters:
                raise CheckpointError(f"{title}, with two LoRAs in it", "only one can be merged", "Save one alone")
            if name not in model or (misfit := _misfit(adds, name, model[name], title)):
                lora.left_out.append(layer)
                misfits += [misfit] if name in model else []
            else:
                lora.adapters[name] = adapter_of(adds, _alpha(file, layer, parts))
    if not lora.adapters:
        raise misfits[0] if misfits else _nothing_fits(title, lora.left_out[0])
    return lora


def _nothing_fits(title: str, part: str) -> CheckpointError:
    return CheckpointError(
        f"{title}, with layers that the model does not have, or parts that add nothing (such as {part})",
        NEEDED,
        "Get the one for Wan 2.1 text-to-video 1.3B, or leave it out",
    )


def _read(path: str | Path) -> tuple[TensorFile, str, dict[str, Parts], list[str]]:
    """(file, its title, {layer as the file names it: its parts}, names of tensors that are no part of a LoRA)."""
    file = read_header(path)
    title, mapped = file.paths[0].name, map_tensors(file, file.tensors)
    layers, others = _layers({name: mapped[name] for name in file.tensors}, title)  # in the file's order
    return file, title, layers, others


def _layers(tensors: dict[str, Tensor], title: str) -> tuple[dict[str, Parts], list[str]]:
    """({layer: its parts}, other names); a critic's are left out."""
    layers: dict[str, Parts] = {}
    others = []
    for name, tensor in tensors.items():
        if TEACHERS.search(name) or name.endswith("comfy_attention.config"):
            continue
        if (part := _part(WRAPPERS.sub("", name))) is None:
            others.append(name)
        else:
            layers.setdefault(part[0], {})[part[1]] = tensor
    if not tensors:
        raise CheckpointError(f"{title}, with no tensors in it", NEEDED, "Choose the file with the LoRA")
    if not layers and (unknown := next(filter(UNKNOWN_KINDS.search, others), None)):
        raise CheckpointError(
            f"{title}, with {unknown} in it, of a kind that is not read here",
            "LoRA, DoRA, LoHa, LoKr, GLoRA, or LyCORIS' OFT or BOFT is needed",
            "Get the LoRA in one of these forms, or a model with it merged",
        )
    if not layers:
        raise wrong_file(title, tensors, NEEDED, "Choose the LoRA's own file, such as LongLive's lora.pt")
    return layers, others


def _part(name: str) -> tuple[str, str] | None:
    """(layer, what the tensor is of it); None for a tensor that is no part of a LoRA."""
    if found := MAGNITUDE.fullmatch(name):
        return found["layer"], "magnitude"
    if found := WITH_WEIGHT.fullmatch(name):
        return found["layer"], found["mid"] or found["glora"]
    if found := PAIR.fullmatch(name):
        return found["layer"], "down" if (found["kind"] or found["old"]) in DOWN else "up"
    if found := BIAS_OF_UP.fullmatch(name):
        return found["layer"], "diff_b"
    if found := OTHER_PART.fullmatch(name):
        return found["layer"], DIFFERENCES.get(found["part"], found["part"])
    return None


def _by_weight(parts: Parts, layer: str, weight: str, title: str) -> Iterator[tuple[str, Parts]]:
    """(name of a weight or bias, the parts that are added to it). Raises CheckpointError for half an adapter."""
    if missing := missing_part(parts):
        missing = {"down": "lora_A", "up": "lora_B"}.get(missing, missing)
        raise CheckpointError(
            f"{title}, whose {layer} lacks its {missing}", "both halves of a LoRA are needed", "Download it again"
        )
    empty = any(0 in part.shape for part in parts.values())
    flat = any(part.ndim < (2 if name in ("down", "up") else 1) for name, part in parts.items() if name != "alpha")
    if empty or flat or ("alpha" in parts and parts["alpha"].numel() != 1):
        raise CheckpointError(f"{title}, whose {layer} is no pair of matrices", NEEDED, "Download it again")
    if own := {name: part for name, part in parts.items() if name not in ("alpha", "diff_b", *unused_parts(parts))}:
        yield weight, own
    if "diff_b" in parts:
        yield f"{weight.removesuffix('.weight')}.bias", {"diff": parts["diff_b"]}


def _alpha(file: TensorFile, layer: str, parts: Parts) -> Alpha:
    """Alpha as the layer's own tensor says, else the file's metadata, PEFT's configuration beside it, or nothing."""
    if "alpha" in parts:
        return Alpha(parts["alpha"].item())
    for config in (metadata_entry(file.metadata, "lora_adapter_metadata"), _peft_config(file.paths[0])):
        for prefix in CONFIG_KEYS:
            if (value := _setting(config, prefix, "alpha", layer)) is not None:
                rank = _setting(config, prefix, "rank", layer)
                return Alpha(value, config.get(f"{prefix}use_rslora") is True, None if rank is None else int(rank))
    try:
        return Alpha(float(file.metadata["ss_network_alpha"]))
    except (KeyError, TypeError, ValueError):  # kohya writes "None" where it was not set
        return Alpha()


def _setting(config: dict, prefix: str, what: str, layer: str) -> float | None:
    """PEFT's alpha or rank of a layer: what the pattern for it says, else the same for all; None where neither does."""
    pattern = config.get(f"{prefix}{what}_pattern")
    pattern = pattern if isinstance(pattern, dict) else {}
    everywhere = ("lora_alpha", "alpha") if what == "alpha" else ("r",)  # LoHa's and LoKr's is called alpha
    for name, value in (*pattern.items(), *(("", config.get(f"{prefix}{key}")) for key in everywhere)):
        if isinstance(value, (int, float)) and (not name or layer == name or layer.endswith(f".{name}")):
            return float(value)
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
    for end in (".weight", ""):  # "" for what is no layer's weight, such as a modulation
        parts = wan_name(f"{layer}{end}".replace(".processor.", ".")).split(".")
        names = (".".join(parts[i:]) for i in range(len(parts)))
        if found := next((name for name in names if name in model), None):
            return found
    return None


def _misfit(parts: Parts, name: str, weight: Tensor, title: str) -> CheckpointError | None:
    """Why an adapter's parts do not go with a weight; None where they do.

    Raises CheckpointError for parts that go with no weight, and for a weight that takes up nothing.
    """
    if odd := [p for part, p in parts.items() if not p.is_floating_point() and part != "reshape_weight"]:
        dtype = str(odd[0].dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{title}, whose part for {name} is {dtype}", "floating point is needed", "Get that version"
        )
    if weight.dtype in FLOAT8_DTYPES and _fits(parts, weight):
        raise CheckpointError(
            f"{title} for a float8 model, which is too coarse to take up a LoRA",
            "it is merged into float32, bfloat16 or float16",
            "Get that version of the model, and make it float8 with the LoRA in it",
        )
    if _fits(parts, weight):
        return None
    adds = " x ".join(str(list(parts[part].shape)) for part in sorted(parts, reverse=True))  # up x down
    return CheckpointError(
        f"{title}, a LoRA that adds {adds} to {name}",
        f"the model has {list(weight.shape)} there",
        "Get the one for this model: 1.3B, not 14B",
    )


def _fits(parts: Parts, weight: Tensor) -> bool:
    """Whether the parts make something of the weight's shape: computed on the meta device, where nothing is."""
    adapter = adapter_of({name: part.to("meta") for name, part in parts.items()}, Alpha())
    try:
        return adapter is not None and adapter.added_to(weight.to("meta"), 1.0).shape == weight.shape
    except (RuntimeError, ValueError, IndexError):  # what torch has for shapes that do not go together
        return False
