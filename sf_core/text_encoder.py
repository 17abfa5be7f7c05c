"""UMT5: prompts to embeddings, without ComfyUI.

Wan reads its prompts with the encoder half of UMT5-XXL (5.7 billion weights). The network itself is transformers'
`UMT5EncoderModel`; this file brings to it what people have on disk:

    folder of google/umt5-xxl, of Wan or of a pipeline   safetensors, .bin or .pth inside, whole or in shards
    umt5_xxl_fp16.safetensors (ComfyUI)                  transformers' names; the tokenizer's bytes in `spiece_model`
    umt5_xxl_fp8_e4m3fn_scaled.safetensors (ComfyUI)     the same, linear weights in float8 with a scale beside them
    models_t5_umt5-xxl-enc-bf16.pth (Wan)                Wan's names: token_embedding, blocks.N.attn.q, ...

Files are mapped, not read, and go to their device tensor by tensor; what already has the wanted dtype is not copied on
the CPU. float8 weights stay float8 and are widened a layer at a time (`ScaledLinear`): the 6.7 GB file needs 6.7 GB.

A prompt is run alone and without padding. A mask over padding would give the same numbers at a higher price; this way
what a prompt means cannot depend, not even in the last bit, on the prompts beside it.
"""

from __future__ import annotations

import html
import importlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoints.identify import T5, identify_tensors
from .checkpoints.tensorfiles import TensorFile, map_tensors, read_header

TEXT_LEN = 512

NEEDED = (
    "Needed is the UMT5-XXL encoder Wan uses: umt5_xxl_fp16.safetensors or umt5_xxl_fp8_e4m3fn_scaled.safetensors "
    "(Comfy-Org/Wan_2.1_ComfyUI_repackaged), models_t5_umt5-xxl-enc-bf16.pth (Wan-AI/Wan2.1-T2V-1.3B), or a folder of "
    "google/umt5-xxl."
)
TOKENIZER_NEEDED = "Give as tokenizer the spiece.model or tokenizer.json of google/umt5-xxl, or the folder it is in."

# Wan's names of the layers -> transformers'.
ATTENTION, FEED_FORWARD = r"encoder.block.\1.layer.0.", r"encoder.block.\1.layer.1."
WAN_NAMES = {
    r"^token_embedding\.": "shared.",
    r"^norm\.": "encoder.final_layer_norm.",
    r"^blocks\.(\d+)\.norm1\.": ATTENTION + "layer_norm.",
    r"^blocks\.(\d+)\.attn\.": ATTENTION + "SelfAttention.",
    r"^blocks\.(\d+)\.pos_embedding\.embedding\.": ATTENTION + "SelfAttention.relative_attention_bias.",
    r"^blocks\.(\d+)\.norm2\.": FEED_FORWARD + "layer_norm.",
    r"^blocks\.(\d+)\.ffn\.gate\.0\.": FEED_FORWARD + "DenseReluDense.wi_0.",
    r"^blocks\.(\d+)\.ffn\.fc1\.": FEED_FORWARD + "DenseReluDense.wi_1.",
    r"^blocks\.(\d+)\.ffn\.fc2\.": FEED_FORWARD + "DenseReluDense.wo.",
}

# The tensors that tell the network's sizes: rows x width, buckets x heads, heads * head_dim x width, ffn x width.
SIZED = (
    "shared.weight",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "encoder.block.0.layer.0.SelfAttention.q.weight",
    "encoder.block.0.layer.1.DenseReluDense.wi_0.weight",
)

# ftfy straightens these for Wan; of what it does to well-formed text, the tokenizer's own normaliser does the rest.
STRAIGHT = {
    **dict.fromkeys(map(ord, "\u02bc\u2018\u2019\u201a\u201b"), "'"),
    **dict.fromkeys(map(ord, "\u201c\u201d\u201e\u201f"), '"'),
}


class TextEncoder(nn.Module):
    """Prompts -> what Wan's cross-attention reads.

    model: transformers' UMT5EncoderModel; dtype: of its activations, and of the embeddings.
    """

    text_len = TEXT_LEN

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, dtype: torch.dtype):
        super().__init__()
        self.model, self.tokenizer, self.dtype = model, tokenizer, dtype

    @property
    def text_dim(self) -> int:
        return self.model.shared.embedding_dim

    def tokens(self, prompt: str) -> list[int]:
        """Rows of the vocabulary, the end token last; at most text_len."""
        return self.tokenizer.encode(clean(prompt))[: TEXT_LEN - 1] + [self.tokenizer.end]

    def truncated(self, prompt: str) -> list[str]:
        """The words that are left out because the prompt is longer than text_len."""
        return self.tokenizer.decode(self.tokenizer.encode(clean(prompt))[TEXT_LEN - 1 :]).split()

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Tensor:
        """Prompts -> embeddings [B, text_len, text_dim], zeros behind each prompt's own tokens."""
        if isinstance(prompts, str):
            raise TypeError("Got one string; encode takes a list of prompts. Use encode([prompt]).")
        device = self.model.shared.weight.device
        embeds = torch.zeros(len(prompts), TEXT_LEN, self.text_dim, device=device, dtype=self.dtype)
        for row, prompt in zip(embeds, prompts):
            ids = torch.tensor([self.tokens(prompt)], device=device)  # [1, tokens]
            row[: ids.shape[1]] = self.model(input_ids=ids).last_hidden_state[0]
        return embeds


class ScaledLinear(nn.Module):
    """A linear layer whose weight stays float8: y = (x @ quantized.T) * scale, the weight widened during the product.

    quantized [out, in]; scale [1] or one per row [out], float32.
    """

    weight = None  # transformers looks at wo.weight and would cast the activations to its dtype, float8

    def __init__(self, quantized: Tensor, scale: Tensor):
        super().__init__()
        self.register_buffer("quantized", quantized)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return (F.linear(x, self.quantized.to(x.dtype)) * self.scale).to(x.dtype)


def load_text_encoder(
    path: str | Path,
    tokenizer: str | Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> TextEncoder:
    """The UMT5 encoder in a file or folder, see the top of this file.

    tokenizer: spiece.model, tokenizer.json or a folder with one of them; None looks inside ComfyUI's file, then beside
    the weights as Hugging Face and Wan lay them out. dtype: bfloat16, as Wan computes, or float32, as ComfyUI does.
    Never looks on the network. Raises ValueError (another model's file, a damaged one, no file, no tokenizer),
    ImportError (a package is missing).
    """
    if dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"Got dtype {dtype}, in which UMT5 overflows. Use torch.bfloat16 or torch.float32.")
    path = Path(path)
    file = _header(path)
    _umt5(file.tensors, path)  # a wrong file is refused before anything is mapped
    tensors = map_tensors(file, file.tensors)
    weights = _umt5(tensors, path)
    text = _tokenizer(tokenizer, tensors.get("spiece_model"), file.paths[0])
    _check_vocabulary(text, rows=len(weights["shared.weight"]))
    return TextEncoder(_model(weights, path, torch.device(device), dtype), text, dtype)


def bytes_loaded(path: str | Path, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes that the weights will take once `load_text_encoder` has them, told from the header. Raises as it does."""
    path = Path(path)
    weights = _umt5(_header(path).tensors, path)
    model = _empty_model(weights)
    _check(model, weights, path)
    linear = _linear_layers(model)
    needed = {name: weights[name] for name, _ in model.named_parameters()}  # without a decoder, or what else is there
    stays = {name for name, weight in needed.items() if weight.element_size() == 1 and _layer(name) in linear}
    return sum(weight.numel() * (1 if name in stays else dtype.itemsize) for name, weight in needed.items())


def clean(prompt: str) -> str:
    """A prompt as Wan gives it to the tokenizer: entities undone (twice), quotes straight, single spaces."""
    unescaped = html.unescape(html.unescape(prompt))
    return re.sub(r"\s+", " ", unescaped.translate(STRAIGHT)).strip()


# --- Weights ---------------------------------------------------------------------------------------------------------


def _header(path: Path) -> TensorFile:
    return read_header(_weights_in(path) if path.is_dir() else path)


def _weights_in(folder: Path) -> Path:
    """The file, or the first shard, with the text encoder of a folder that may hold other models too."""
    for place in (folder, folder / "text_encoder"):
        for pattern in ("models_t5*.pth", "model*.safetensors", "pytorch_model*.bin"):
            if found := sorted(place.glob(pattern)):
                return found[0]
    raise ValueError(
        f"Got the folder {folder}, with no model*.safetensors, pytorch_model*.bin or models_t5*.pth. {NEEDED}"
    )


def _umt5(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors under transformers' names. Raises ValueError if they are not a UMT5's."""
    weights = {_transformers_name(name): tensor for name, tensor in tensors.items()}
    if "shared.weight" not in weights and "encoder.embed_tokens.weight" in weights:
        weights["shared.weight"] = weights["encoder.embed_tokens.weight"]
    biases = sum(name.startswith("encoder.") and name.endswith(".relative_attention_bias.weight") for name in weights)
    if biases == 1 < _layers(weights):
        raise ValueError(
            f"Got {path}, which is a T5 encoder (Flux and SD3 use one), not UMT5: all its blocks share one relative "
            f"position bias. {NEEDED}"
        )
    if not all(name in weights for name in SIZED):
        raise _another(tensors, path)
    for name in SIZED:
        if weights[name].ndim != 2 or not weights[name].numel():
            raise ValueError(f"Got {path}, whose {name} is no matrix but {list(weights[name].shape)}. {NEEDED}")
    return weights


def _transformers_name(name: str) -> str:
    for pattern, replacement in WAN_NAMES.items():
        name = re.sub(pattern, replacement, name)
    return name


def _another(names: Iterable[str], path: Path) -> ValueError:
    """The error for a file that is no UMT5: it says what it is, and where it belongs."""
    names = list(names)
    what, folder = identify_tensors(names) or (None, None)
    if what == T5:
        return ValueError(f"Got {path}, which is a T5 or UMT5 that is not complete. {NEEDED}")
    if what:
        return ValueError(f"Got {path}, which is {what} and belongs in {folder}. {NEEDED}")
    first = ", ".join(names[:3]) or "none"
    return ValueError(f"Got {path}, which is no text encoder known here (its first tensors: {first}). {NEEDED}")


def _layers(weights: dict[str, Tensor]) -> int:
    return len({name.split(".")[2] for name in weights if name.startswith("encoder.block.")})


def _model(weights: dict[str, Tensor], path: Path, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """transformers' module around the weights; its linear layers with float8 weights become ScaledLinear."""
    model = _empty_model(weights)
    _check(model, weights, path)
    linear = _linear_layers(model)
    for name in [name for name, _ in model.named_parameters()]:
        weight, layer = weights[name].to(device), _layer(name)
        if weight.element_size() > 1:
            _put(model, name, nn.Parameter(weight.to(dtype)))
            continue
        scale = _scale(weights, layer, len(weight)).to(device)
        if layer in linear:
            _put(model, layer, ScaledLinear(weight, scale))
        else:
            _put(model, name, nn.Parameter((weight.float() * scale.unsqueeze(-1)).to(dtype)))
    return model.eval().requires_grad_(False)


def _linear_layers(model: nn.Module) -> set[str]:
    """The layers whose weights stay float8 where the file has them so."""
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def _layer(name: str) -> str:
    return name.removesuffix(".weight")


def _empty_model(weights: dict[str, Tensor]) -> nn.Module:
    """transformers' module without storage. Sizes are read from the weights; the rest is the same in every UMT5."""
    transformers = _package("transformers", "The text encoder")
    embedding, bias, query, gate = (weights[name] for name in SIZED)
    config = transformers.UMT5Config(
        vocab_size=embedding.shape[0],
        d_model=embedding.shape[1],
        d_kv=query.shape[0] // bias.shape[1],
        d_ff=gate.shape[0],
        num_layers=_layers(weights),
        num_heads=bias.shape[1],
        relative_attention_num_buckets=bias.shape[0],
        feed_forward_proj="gated-gelu",
    )
    with torch.device("meta"):
        model = transformers.UMT5EncoderModel(config)
    model.encoder.embed_tokens = model.shared
    return model


def _check(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Raises ValueError unless every weight of the model is there, floating point and of the right shape."""
    needed = dict(model.named_parameters())
    if missing := [name for name in needed if name not in weights]:
        raise ValueError(
            f"Got {path}, which lacks {len(missing)} of {len(needed)} tensors, the first {missing[0]}: it is cut short "
            "or not whole. Download it again."
        )
    for name, weight in needed.items():
        got = weights[name]
        if got.shape != weight.shape or not got.is_floating_point():
            raise ValueError(
                f"Got {path}, whose {name} is {got.dtype} {list(got.shape)}; needed is floating point "
                f"{list(weight.shape)}. 4-bit and integer formats are not read here: use the fp16 or fp8_scaled file."
            )


def _scale(weights: dict[str, Tensor], layer: str, rows: int) -> Tensor:
    """What a float8 weight is to be multiplied with: [1] or [rows], float32; 1 where the file gives none."""
    found = [weights[layer + end] for end in (".scale_weight", ".weight_scale") if layer + end in weights]
    scale = found[0].float().flatten() if found else torch.ones(1)
    if len(scale) not in (1, rows):
        raise ValueError(
            f"Got {len(scale)} scales for the {rows} rows of {layer}; needed is one, or one per row. "
            "Block-scaled formats are not read here: use the fp16 or fp8_scaled file."
        )
    return scale


def _put(model: nn.Module, name: str, what: nn.Module | nn.Parameter) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, what)


# --- Tokenizer -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokenizer:
    """Text -> rows of the vocabulary and back. end: the row that ends every prompt; size: rows it knows."""

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    end: int
    size: int


def _tokenizer(given: str | Path | None, embedded: Tensor | None, weights: Path) -> Tokenizer:
    """The tokenizer that was named, or the one in the weights' file, or the one that lies beside it."""
    if given is None and embedded is not None:
        return _sentencepiece(embedded.flatten().view(torch.uint8).numpy().tobytes(), str(weights))
    beside = (weights.parent, weights.parent.parent / "tokenizer", weights.parent / "google" / "umt5-xxl")
    places = beside if given is None else (Path(given),)
    for place in places:
        for file in (place, place / "tokenizer.json", place / "spiece.model"):
            if file.is_file():
                return _tokenizer_file(file)
    if given is not None:
        raise ValueError(f"Got the tokenizer {given}: no file, nor a folder with one. {TOKENIZER_NEEDED}")
    raise ValueError(f"Got {weights}, which carries no tokenizer, and none lies beside it. {TOKENIZER_NEEDED}")


def _tokenizer_file(file: Path) -> Tokenizer:
    return _tokenizers(file) if file.suffix == ".json" else _sentencepiece(file.read_bytes(), str(file))


def _sentencepiece(model: bytes, source: str) -> Tokenizer:
    sentencepiece = _package("sentencepiece", "The tokenizer of " + source)
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise ValueError(f"Got {source}, whose tokenizer is no sentencepiece model. {TOKENIZER_NEEDED}") from error
    return _with_end(pieces.encode, pieces.decode, pieces.piece_to_id("</s>"), pieces.get_piece_size(), source)


def _tokenizers(file: Path) -> Tokenizer:
    tokenizers = _package("tokenizers", f"The tokenizer {file}")
    try:
        pieces = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # noqa: BLE001  the package raises nothing narrower
        raise ValueError(f"Got {file}, which is no tokenizer.json. {TOKENIZER_NEEDED}") from error
    pieces.no_padding()
    pieces.no_truncation()

    def encode(text: str) -> list[int]:
        return pieces.encode(text, add_special_tokens=False).ids

    return _with_end(encode, pieces.decode, pieces.token_to_id("</s>"), pieces.get_vocab_size(), str(file))


def _with_end(encode: Callable, decode: Callable, end: int | None, size: int, source: str) -> Tokenizer:
    if not end:  # None, or 0: sentencepiece's unknown token
        raise ValueError(f"Got {source}, whose tokenizer has no end token </s>. {TOKENIZER_NEEDED}")
    return Tokenizer(encode, decode, end, size)


def _check_vocabulary(tokenizer: Tokenizer, rows: int) -> None:
    """UMT5's table of embeddings is a little longer than its vocabulary (256384 rows), never by more than 512."""
    if not 0 <= rows - tokenizer.size <= 512:
        raise ValueError(
            f"Got a tokenizer of {tokenizer.size} pieces for a text encoder of {rows}: it is another model's. "
            f"{TOKENIZER_NEEDED}"
        )


def _package(name: str, user: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{user} needs the package {name}, which is not installed: pip install {name}") from error
