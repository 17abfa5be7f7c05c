"""Is a file's header that of a causal Wan model, and which tensor is which? Or what is it instead?

Checkpoints of Wan differ in their wrapping only: the layers have the same names, under some prefix, in some dict.
Diffusers alone has other names, which are turned to Wan's first. Names are cut at the first part that is a layer of Wan
(`blocks.0...`); what comes before is the root. The best root is taken: EMA weights, then the generator, then any other;
never a critic. The shape of the model follows from the tensors' shapes; only the number of heads cannot be seen
(metadata, or else heads 128 wide). Every name and shape is then checked against the model itself, on the meta device,
before a single weight is mapped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..wan.config import WanConfig
from ..wan.model import WanModel
from . import nvfp4
from .tensorfiles import CheckpointError, TensorFile, map_tensors

FLOAT8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
PLAIN = (torch.float32, torch.float16, torch.bfloat16)
HEAD_WIDTH = 128  # of every published Wan
DIM_14B = 5120

NEEDED = "a causal Wan 2.1 text-to-video model is needed"
GET_ONE = (
    "Get checkpoints/self_forcing_dmd.pt from huggingface.co/gdhe17/Self-Forcing, or another causal model: Self "
    "Gradient Forcing, LongLive, Causal Forcing, Rolling Forcing"
)

WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
LAYER = re.compile(r"(?:^|\.)(text_embedding|time_projection|blocks|head)\.")
SIGNATURE = ("text_embedding.0.weight", "time_projection.1.weight", "blocks.0.self_attn.q.weight", "head.modulation")
TEACHERS = re.compile(r"(^|\.)(critic|fake_score|real_score|discriminator)(_lora)?\.")
EMA = re.compile(r"(^|[._])ema([._]|$)")
SCALES = {"scale_weight": "weight_scale", "scale_input": "input_scale"}  # other names of the same
# Diffusers' names -> Wan's (huggingface/diffusers, scripts/convert_wan_to_diffusers.py, the other way round). Only the
# norm before cross-attention has weights: norm3 to Wan, norm2 to Diffusers.
DIFFUSERS = re.compile(r"(^|\.)blocks\.0\.attn1\.to_q\.")
DIFFUSERS_NAMES = {
    r"\bcondition_embedder\.time_embedder\.linear_1\.": "time_embedding.0.",
    r"\bcondition_embedder\.time_embedder\.linear_2\.": "time_embedding.2.",
    r"\bcondition_embedder\.time_proj\.": "time_projection.1.",
    r"\bcondition_embedder\.text_embedder\.linear_1\.": "text_embedding.0.",
    r"\bcondition_embedder\.text_embedder\.linear_2\.": "text_embedding.2.",
    r"\battn1\.(?=to_|norm_)": "self_attn.",
    r"\battn2\.(?=to_|norm_)": "cross_attn.",
    r"(?<=_attn\.)to_([qkv])\.": r"\1.",
    r"(?<=_attn\.)to_out\.0\.": "o.",
    r"\bblocks\.(\d+)\.norm2\.": r"blocks.\1.norm3.",
    r"\bffn\.net\.0\.proj\.": "ffn.0.",
    r"\bffn\.net\.2\.": "ffn.2.",
    r"\bblocks\.(\d+)\.scale_shift_table$": r"blocks.\1.modulation",
    r"\bscale_shift_table$": "head.modulation",
    r"\bproj_out\.": "head.head.",
}
MARK = "comfy_quant"  # a tensor with JSON that says how its layer is quantised
FLOAT8_FORMATS = ("float8_e4m3fn", "float8_e5m2")  # ComfyUI's names of what we compute with ourselves
MEMORY = re.compile(r"(^|\.)memory_(?=[a-z_]+(\.|$))")
MARKERS = ("scaled_fp8", MARK, "freqs")  # tensors that say nothing the others do not


@dataclass(frozen=True)
class Found:
    """A model in a file: its shape and, for every tensor of it (float8 scales included), {Wan's name: file's name}.

    `root` is the prefix its names have in the file, wrappers removed; `causal` whether the file itself says so;
    `memory` the same names of a second set of weights, which writes the cache (SGF+), {} where there is none;
    `quantised` what the file says of each layer that is quantised in a form which only ComfyUI computes with: a dict
    with its `format`. Such a layer's tensors are all among `names`, whatever they are called;
    `packed` has {part: file's name} of weights in four bits (nvfp4.py), which in `names` go by their first part.
    """

    config: WanConfig
    names: dict[str, str]
    root: str
    causal: bool
    memory: dict[str, str]
    quantised: dict[str, dict]
    packed: dict[str, dict[str, str]]

    def headers(self, file: TensorFile) -> dict[str, Tensor]:
        """The model's tensors under Wan's names, on the meta device."""
        return _headers(file, self.names, self.packed)


def find_wan(file: TensorFile, trusted: bool = False) -> Found:
    """The model in a header. `trusted`: the user says that it is causal, which lets a 14B model pass.

    Raises CheckpointError, saying what the file is, where there is no model in it that can be sampled.
    """
    title = file.paths[0].name
    _refuse_loras(file.tensors, title)
    root, names = _best_root(file.tensors, title)
    names, packed = _packed(names, title)
    names, memory = _split_memory(names)
    quantised = _quantised_layers(file, root)
    tensors = _headers(file, names, packed)
    facts = _transformer_facts(file.metadata)
    causal = facts.get("causal_ar") is True or "generator" in root
    _refuse_variants(tensors, title, trusted or facts.get("causal_ar") is True, causal)
    config = _config(tensors, facts, title)
    _check(tensors, config, title, quantised)
    if memory:
        _check(_headers(file, memory), config, title)
    return Found(config, names, root, causal, memory, quantised, packed)


def _headers(file: TensorFile, names: dict[str, str], packed: Iterable[str] = ()) -> dict[str, Tensor]:
    """Tensors under Wan's names; `packed` are the names of weights in four bits, whose shape the file does not have."""
    tensors = {name: in_wans_shape(name, file.tensors[at]) for name, at in names.items()}
    for name in packed:
        rows, *half = tensors[name].shape or (0,)
        tensors[name] = torch.empty(rows, *(2 * columns for columns in half), dtype=torch.bfloat16, device="meta")
    return tensors


def in_wans_shape(name: str, tensor: Tensor) -> Tensor:
    """A weight as Wan has it: the patch embedding is a convolution, of which Causal-rCM made a linear layer."""
    if name == "patch_embedding.weight" and tensor.ndim == 2 and tensor.shape[1] % 4 == 0:
        return tensor.reshape(len(tensor), -1, 1, 2, 2)
    return tensor


def _packed(names: dict[str, str], title: str) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Names with one for each weight in four bits, and {weight: {part: file's name}} of these.

    Raises CheckpointError for one without a part.
    """
    parts: dict[str, dict[str, str]] = {}
    for name, at in names.items():
        layer, _, last = name.rpartition(".")
        if last.startswith(nvfp4.PREFIX):
            parts.setdefault(f"{layer}.weight", {})[last.removeprefix(nvfp4.PREFIX)] = at
    if missing := [f"{weight} ({part})" for weight, at in parts.items() for part in nvfp4.PARTS if part not in at]:
        raise _incomplete(title, missing)
    plain = {name: at for name, at in names.items() if not name.rpartition(".")[2].startswith(nvfp4.PREFIX)}
    return plain | {weight: at["values"] for weight, at in parts.items()}, parts


def _quantised_layers(file: TensorFile, root: str) -> dict[str, dict]:
    """{layer: what the file says of it} of all layers, where any is in another form than float8; else {}.

    ComfyUI's files say it in their metadata, or in a tensor of each layer that holds JSON.
    """
    layers = metadata_entry(file.metadata, "_quantization_metadata").get("layers", {})
    layers = (
        {name: about for name, about in layers.items() if isinstance(about, dict)} if isinstance(layers, dict) else {}
    )
    marks = [name for name, tensor in file.tensors.items() if name.endswith(f".{MARK}") and tensor.dtype is torch.uint8]
    for name, mark in map_tensors(file, marks).items() if marks else ():
        try:
            about = json.loads(bytes(mark.flatten().tolist()))
        except ValueError:
            continue
        if isinstance(about, dict):
            layers[name.removesuffix(f".{MARK}")] = about
    layers = {WRAPPERS.sub("", name).removeprefix(root): about for name, about in layers.items()}
    known = {str(about.get("format")) for about in layers.values() if "format" in about}
    return layers if known - set(FLOAT8_FORMATS) else {}


def is_scale(name: str) -> bool:
    return name.endswith((".weight_scale", ".input_scale"))


# --- Names -----------------------------------------------------------------------------------------------------------


def _best_root(tensors: dict[str, Tensor], title: str) -> tuple[str, dict[str, str]]:
    """The root of the best set of Wan layers, and {Wan's name: the file's name} of all that is under it."""
    clean = {WRAPPERS.sub("", name): name for name in tensors}
    if any(DIFFUSERS.search(name) for name in clean):
        clean = {wan_name(name): at for name, at in clean.items()}
    roots = {root for root in map(_root, clean) if root is not None}
    usable = sorted((root for root in roots if not TEACHERS.search(root)), key=_rank)
    if not usable:
        raise _stranger(list(clean), roots, title)
    best, others = usable[0], tuple(root for root in roots if root)
    under = {
        _plain_name(name[len(best) :]): at
        for name, at in clean.items()
        if name.startswith(best) and (best or not name.startswith(others))
    }
    return best, {name: at for name, at in under.items() if not _is_marker(name)}


def _split_memory(names: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """{Wan's name: the file's} of the weights that denoise, and of those that write the cache, {} where there are none.

    The latter have `memory_` before the last part of their names, or before the first. Their head is not needed, since
    nothing reads what it says: where it is left out there is the other one.
    """
    memory = {MEMORY.sub(r"\1", name): at for name, at in names.items() if MEMORY.search(name)}
    names = {name: at for name, at in names.items() if not MEMORY.search(name)}
    head = {name: at for name, at in names.items() if memory and name.startswith("head.")}
    return names, head | memory


def _is_marker(name: str) -> bool:
    """Whether a tensor says nothing of the weights; `comfy_attention.config` names a preferred attention, which is
    ComfyUI's to choose."""
    return name.rpartition(".")[2] in MARKERS or name.endswith("comfy_attention.config") or name.startswith("accum_")


def wan_name(name: str) -> str:
    """Wan's name of a tensor that has Diffusers'."""
    for pattern, replacement in DIFFUSERS_NAMES.items():
        name = re.sub(pattern, replacement, name)
    return name


def _root(name: str) -> str | None:
    """What stands before a layer that only Wan has."""
    layer = LAYER.search(name)
    return name[: layer.start(1)] if layer and name[layer.start(1) :] in SIGNATURE else None


def _rank(root: str) -> tuple[bool, bool, str]:
    return (not EMA.search(root), "generator" not in root, root)


def _plain_name(name: str) -> str:
    layer, _, last = name.rpartition(".")
    return f"{layer}.{SCALES[last]}" if last in SCALES else name


# --- Shapes ----------------------------------------------------------------------------------------------------------


def _transformer_facts(metadata: dict[str, str]) -> dict:
    """What a safetensors file says of its transformer, where ComfyUI looks and where our training puts it."""
    facts = metadata_entry(metadata, "config").get("transformer", {})
    own = metadata_entry(metadata, "wan")
    names = {"heads": "num_heads", "text_len": "text_len", "eps": "eps"}
    ours = {theirs: own[name] for name, theirs in names.items() if name in own}
    return ours | facts if isinstance(facts, dict) else ours


def metadata_entry(metadata: dict[str, str], name: str) -> dict:
    """A JSON object in the metadata; {} if there is none that can be read."""
    try:
        entry = json.loads(metadata.get(name, "{}"))
    except (ValueError, TypeError):
        return {}
    return entry if isinstance(entry, dict) else {}


def _config(tensors: dict[str, Tensor], facts: dict, title: str) -> WanConfig:
    dim, channels, *_ = _shape(tensors, "patch_embedding.weight", 5, title)
    heads = facts.get("num_heads", dim // HEAD_WIDTH if dim % HEAD_WIDTH == 0 else None)
    if heads is None:
        raise CheckpointError(
            f"{title}, a Wan model of width {dim} that does not say how many heads it has",
            f"the number is needed where heads are not {HEAD_WIDTH} wide",
            'Save it as safetensors with the metadata config = {"transformer": {"num_heads": n}}',
        )
    ffn_dim, _ = _shape(tensors, "blocks.0.ffn.0.weight", 2, title)  # rows, which no packing changes
    _, freq_dim = _shape(tensors, "time_embedding.0.weight", 2, title)
    _, text_dim = _shape(tensors, "text_embedding.0.weight", 2, title)
    layers = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    try:
        text_len, eps = int(facts.get("text_len", WanConfig.text_len)), float(facts.get("eps", WanConfig.eps))
        return WanConfig(dim, ffn_dim, int(heads), layers, channels, freq_dim, text_dim, text_len, eps)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{title}, whose metadata cannot be right ({error})", NEEDED, GET_ONE) from None


def _shape(tensors: dict[str, Tensor], name: str, ndim: int, title: str) -> tuple[int, ...]:
    if name not in tensors:
        raise _incomplete(title, [name])
    shape = tuple(tensors[name].shape)
    if len(shape) != ndim:
        raise _misshapen(title, name, shape, f"it has {ndim} dimensions in every Wan model")
    return shape


def _check(tensors: dict[str, Tensor], config: WanConfig, title: str, quantised: Collection[str] = ()) -> None:
    """Every tensor of the model is there, nothing else is, and all have the right shape and a dtype of use.

    Of `quantised` layers the weights need only be there.
    """
    needed = {name: tuple(tensor.shape) for name, tensor in WanModel(config, device="meta").state_dict().items()}
    if quantised:
        layers = {name: name.rpartition(".")[0] for name in tensors}
        tensors = {
            name: torch.empty(needed.get(name, ()), device="meta") if layer in quantised else tensors[name]
            for name, layer in layers.items()
            if layer not in quantised or name in needed
        }
    if missing := [name for name in needed if name not in tensors]:
        raise _incomplete(title, missing)
    for name in needed:
        if tensors[name].dtype not in PLAIN + FLOAT8_DTYPES:
            if tensors[name].dtype is torch.float64:
                raise CheckpointError(
                    f"{title}, whose {name} is float64",
                    "weights are float32, float16, bfloat16 or float8",
                    "Save it again in float32",
                )
            raise _unknown_quantisation(title, name, tensors[name])
    for name, shape in needed.items():
        if tuple(tensors[name].shape) != shape:
            raise _misshapen(title, name, tuple(tensors[name].shape), f"the other layers need {list(shape)}")
    for name in sorted(tensors.keys() - needed.keys()):
        weight = tensors.get(re.sub(r"\.(weight|input)_scale$", ".weight", name)) if is_scale(name) else None
        if weight is None:
            raise CheckpointError(f"{title}, a Wan variant with other layers ({name})", NEEDED, GET_ONE)
        _check_scale(name, tensors[name], weight, title)


def _check_scale(name: str, scale: Tensor, weight: Tensor, title: str) -> None:
    per_row = weight.shape[0] if name.endswith(".weight_scale") else 1
    if scale.dtype not in PLAIN or weight.dtype not in FLOAT8_DTYPES or scale.numel() not in (1, per_row):
        raise _unknown_quantisation(title, name, scale)


# --- What else a file may be -----------------------------------------------------------------------------------------

LORA = re.compile(r"(^|[._])lora[._]|lokr_w|hada_w|\.(diff(_b)?|dora_scale|oft_blocks)$")

WAN = "a Wan diffusion model"
WAN_VAE = "the Wan 2.1 VAE"
WAN22_VAE = "the Wan 2.2 VAE"
TAEHV = "a TAEHV"
T5 = "a text encoder (T5)"

# A name in the file (as a pattern), what the file is, its folder in ComfyUI's models. The first that fits counts: files
# that hold others (a checkpoint with its VAE, a ControlNet with a UNet's names) come before those.
STRANGERS = tuple(
    (re.compile(pattern), what, folder)
    for pattern, what, folder in (
        (LORA.pattern, "a LoRA", "loras"),
        (
            r"(^|\.)(control_model|input_hint_block|zero_convs|control(net)?_(blocks|cond_embedding|down_blocks|mid_block"
            r"|x_embedder|add_embedding|single_blocks))\.",
            "a ControlNet",
            "controlnet",
        ),
        (
            r"(^|\.)blocks\.\d+\.(self|cross)_attn\.[qkvo]\.|(^|\.)condition_embedder\.(time|text)_",
            WAN,
            "diffusion_models",
        ),
        (r"conditioner\.embedders|(^|\.)label_emb\.0\.", "a Stable Diffusion XL checkpoint", "checkpoints"),
        (r"cond_stage_model|(^|\.)input_blocks\.0\.0\.", "a Stable Diffusion checkpoint", "checkpoints"),
        (r"^(unet\.)?(time|add)_embedding\.linear_1\.", "a Stable Diffusion UNet", "diffusion_models"),
        (r"(^|\.)joint_blocks\.0\.", "an image model (Stable Diffusion 3)", "diffusion_models"),
        (r"(^|\.)individual_token_refiner\.", "a HunyuanVideo model", "diffusion_models"),
        (
            r"(^|\.)(joint|double|single|double_stream)_(blocks|modules)\.0\.",
            "an image model (Flux or a relative)",
            "diffusion_models",
        ),
        (
            r"(^|\.)(single_)?transformer_blocks\.0\.",
            "an image or video model of another kind (Diffusers)",
            "diffusion_models",
        ),
        (
            r"(^|\.)text_model\.(encoder|embeddings)\.|^(?!.*\bvisual\.).*\btransformer\.resblocks\.0\.",
            "a CLIP encoder",
            "text_encoders",
        ),
        (r"(^|\.)(vision_model|visual\.(transformer|conv1))\.", "a CLIP vision encoder", "clip_vision"),
        (r"(^|\.)(token_embedding\.weight|shared\.weight|encoder\.block\.\d+\.layer\.0\.)", T5, "text_encoders"),
        (r"(^|\.)layers\.\d+\.self_attn\.(q_proj|qkv_proj)\.", "a language model", "text_encoders"),
        (
            r"(^|\.)(decoder\.upsamples\.\d+\.upsamples|encoder\.downsamples\.\d+\.downsamples"
            r"|(down|up)_blocks\.\d+\.(down|up)sampler)\.",
            WAN22_VAE,
            "vae",
        ),
        (
            r"(^|\.)(decoder\.(middle\.0|upsamples\.0)|encoder\.(middle\.0|downsamples\.0))\."
            r"|(^|\.)(en|de)coder\.mid_block\.resnets\.0\.norm1\.gamma$",
            WAN_VAE,
            "vae",
        ),
        (r"(^|\.)(en|de)coder\.(mid\.block_1|mid_block|conv_in)\.", "an image VAE", "vae"),
        (
            r"^taesd_(en|de)coder\.|^\d+\.conv\.\d+\.(weight|bias)$"
            r"|(^|\.)(en|de)coder\.layers\.\d+\.(conv\.\d+\.)?(weight|bias)$",
            "a TAESD, the tiny autoencoder of image models",
            "vae_approx",
        ),
        (r"(^|\.)(en|de)coder\.\d+\.(conv\.)?(\d+\.)?weight$", TAEHV, "vae_approx"),
        (
            r"(^|\.)(model\.1\.sub\.\d+|RRDB_trunk|body\.\d+\.rdb\d|conv_first|layers\.\d+\.residual_group)\."
            r"|^(params(_ema)?\.)?body\.\d+\.(weight|bias)$",
            "an upscale model (ESRGAN or a relative)",
            "upscale_models",
        ),
        (
            r"^(emb_params|clip_[lgh]|string_to_param\.\*|<[^>]+>)$",
            "an embedding (textual inversion)",
            "embeddings",
        ),
        (r"(^|\.)patch_embedding\.weight$", WAN, "diffusion_models"),
    )
)


def identify_tensors(names: Iterable[str]) -> tuple[str, str] | None:
    """(what tensors of these names are, in words; ComfyUI's folder for it); None if they are of nothing known here."""
    names = [WRAPPERS.sub("", name) for name in names]
    for pattern, what, folder in STRANGERS:
        if any(pattern.search(name) for name in names):
            return what, f"models/{folder}"
    return None


def wrong_file(title: str, names: Collection[str], needed: str, remedy: str) -> CheckpointError:
    """The error for a file that is another than the one that is needed: it says what it is, and where it belongs."""
    if known := identify_tensors(names):
        what, folder = known
        return CheckpointError(f"{title}, {what}", needed, f"It belongs in {folder}. {remedy}")
    what = f"{len(names)} tensors of no model known here (such as {min(names)})" if names else "no tensors in it"
    return CheckpointError(f"{title}, with {what}", needed, remedy)


def _refuse_loras(tensors: dict[str, Tensor], title: str) -> None:
    if any(LORA.search(name) for name in tensors):
        raise CheckpointError(
            f"{title}, a LoRA or a model with LoRA layers not merged into it",
            f"{NEEDED}, whole (the step-distilled 'self forcing' LoRAs make a model faster, not causal)",
            "A LoRA belongs in models/loras and is added to a model: with LoraLoaderModelOnly in ComfyUI, or as the "
            f"LoRA of the model. {GET_ONE}",
        )


def _stranger(names: list[str], teachers: set[str], title: str) -> CheckpointError:
    if teachers:
        return CheckpointError(f"{title}, a critic without its generator", NEEDED, GET_ONE)
    if (known := identify_tensors(names)) and known[0] == WAN:
        return CheckpointError(f"{title}, a part of a Wan model", f"{NEEDED}, whole", GET_ONE)
    return wrong_file(title, names, NEEDED, GET_ONE)


def _refuse_variants(tensors: dict[str, Tensor], title: str, trusted: bool, causal: bool) -> None:
    """Raises CheckpointError for Wan models that cannot be sampled here.

    trusted  lets a 14B model pass, and Wan 2.2 5B as `causal` does
    """
    dim, takes, *_ = _shape(tensors, "patch_embedding.weight", 5, title)
    gives = _shape(tensors, "head.head.weight", 2, title)[0] // 4
    if takes == 36 or any("k_img" in name or name.startswith("img_emb") for name in tensors):
        what = "a Wan image-to-video model"
        remedy = f"Text-to-video models start from an image too: give it as a prefix. {GET_ONE}"
    elif takes == gives == 48 and not (trusted or causal):
        what = "Wan 2.2 5B or a relative, which nothing calls causal"
        remedy = (
            "Get model_bf16.pt from huggingface.co/Efficient-Large-Model/LongLive-2.0-5B. If it is that, choose the "
            "family longlive-2"
        )
    elif takes != gives:
        what, remedy = f"a Wan variant that takes {takes} channels and gives {gives} (inpainting, control)", GET_ONE
    elif dim == DIM_14B and not trusted:
        what = "a Wan 14B model that nothing calls causal (the step-distilled 'self forcing' 14B models are not)"
        remedy = f"{GET_ONE}. If it is causal all the same, choose its family (Krea Realtime: krea-14b)"
    else:
        return
    raise CheckpointError(f"{title}, {what}", NEEDED, remedy)


def _incomplete(title: str, missing: list[str]) -> CheckpointError:
    tensors = "a tensor" if len(missing) == 1 else f"{len(missing)} of the tensors"
    return CheckpointError(
        f"{title}, a Wan model without {tensors} of its kind ({missing[0]})",
        "all of them are needed",
        "If it is one of several shards, put them in one folder under their own names; else download it again",
    )


def _misshapen(title: str, name: str, got: tuple[int, ...], needed: str) -> CheckpointError:
    return CheckpointError(f"{title}, whose {name} has the shape {list(got)}", needed, GET_ONE)


def _unknown_quantisation(title: str, name: str, tensor: Tensor) -> CheckpointError:
    kind = str(tensor.dtype).removeprefix("torch.")
    return CheckpointError(
        f"{title}, quantised in a way not known here ({name} is {kind} {list(tensor.shape)})",
        "weights are float32, float16, bfloat16, or float8 with a scale for the whole tensor or for each row",
        "Get the bf16 or fp8_scaled version",
    )
