"""Small valid files of every kind that is read, damaged: in their bytes, in their header, in their tensors."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
from safetensors.torch import save, save_file
from torch import Tensor

from sf_core.autoencoders.taehv import TAEHV
from sf_core.autoencoders.wan_vae import WanVAE
from sf_core.checkpoints.autoencoder import load_autoencoder
from sf_core.checkpoints.load import describe, load_model
from sf_core.text_encoder import bytes_loaded, load_text_encoder
from sf_core.wan.config import WanConfig
from tests.core import test_checkpoint as checkpoints
from tests.core import test_taehv as taehvs
from tests.core import test_vae as vaes

WAN = WanConfig(dim=128, ffn_dim=16, heads=1, layers=1, channels=16, freq_dim=8, text_dim=8)
NARROW = WanConfig(dim=8, ffn_dim=8, heads=2, layers=1, channels=16, freq_dim=4, text_dim=4)
FACTS = {"config": json.dumps({"transformer": {"causal_ar": True, "num_heads": 2, "eps": 1e-6, "text_len": 16}})}
SAMPLING = {"sampling": json.dumps({"steps": [1000, 500], "shift": 5.0, "chunk": 3, "window": 21, "sink": 0})}


def files(folder: Path) -> Callable[[Random], object]:
    """One file damaged, and read by the loader of its kind, now and then by another's."""
    loaders = {
        "model": load_whole,
        "vae": lambda path: load_autoencoder(path, WanVAE, 16),
        "taehv": lambda path: load_autoencoder(path, TAEHV, 16),
        "text": lambda path: (bytes_loaded(path), load_text_encoder(path)),
        "lora": lambda path: load_lora(path, folder / "base.safetensors"),
    }
    save_file(checkpoints.weights(WAN), folder / "base.safetensors", checkpoints.CAUSAL)
    originals = [(kind, state, metadata) for kind, state, metadata in states()]
    save_file(umt5(), folder / "umt5.safetensors")
    bytes_loaded(folder / "umt5.safetensors")  # imports transformers, which no case is to wait for

    def case(random: Random) -> object:
        kind, state, metadata = random.choice(originals)
        loader = loaders[kind if random.random() < 0.9 else random.choice(sorted(loaders))]
        write = random.choice((safetensors, safetensors, zipped, legacy, sharded))
        place = folder / "case"
        place.mkdir(exist_ok=True)
        try:
            return loader(write(random, dict(state), dict(metadata), place))
        finally:
            for path in place.iterdir():
                path.unlink()

    return case


# --- What is damaged -------------------------------------------------------------------------------------------------


def states() -> list[tuple[str, dict[str, Tensor], dict[str, str]]]:
    """(kind, tensors, metadata) of every kind of file."""
    wan, narrow = checkpoints.weights(WAN), checkpoints.weights(NARROW)
    scaled, scales = checkpoints.float8(wan)
    vae = vaes.autoencoder(vaes.SMALL).state_dict()
    return [
        ("model", checkpoints.prefixed(wan, "generator_ema."), checkpoints.CAUSAL),
        ("model", narrow, FACTS | SAMPLING),
        ("model", scaled | checkpoints.legacy(scales, True)[0], {}),
        ("vae", vae, {}),
        ("vae", checkpoints.prefixed(vae, "first_stage_model."), {}),
        ("taehv", taehvs.autoencoder(taehvs.SMALL).state_dict(), {}),
        ("text", umt5(), {}),
        ("lora", lora("base_model.model."), {"ss_network_alpha": "4", "lora_adapter_metadata": '{"lora_alpha": 2}'}),
        ("lora", lora("diffusion_model.") | {"diffusion_model.blocks.0.self_attn.q.alpha": torch.tensor(4.0)}, {}),
        ("lora", relatives_of_lora("diffusion_model.blocks.0."), {}),
    ]


def lora(prefix: str) -> dict[str, Tensor]:
    layers = {"blocks.0.self_attn.q": (128, 128), "blocks.0.ffn.0": (128, 16)}
    halves = {f"{layer}.lora_A.weight": torch.ones(2, inputs) for layer, (inputs, _) in layers.items()}
    halves |= {f"{layer}.lora_B.weight": torch.ones(outputs, 2) for layer, (_, outputs) in layers.items()}
    return checkpoints.prefixed(halves, prefix) | {f"{prefix}blocks.0.norm3.diff_b": torch.ones(128)}


def relatives_of_lora(prefix: str) -> dict[str, Tensor]:
    """DoRA, LoHa, LoKr, GLoRA, OFT, BOFT, each over a layer of its own."""
    kinds = {
        "ffn.0": {"lora_up.weight": (16, 2), "lora_down.weight": (2, 128), "dora_scale": (16, 1)},
        "self_attn.k": {"hada_w1_a": (128, 2), "hada_w1_b": (2, 128), "hada_w2_a": (128, 2), "hada_w2_b": (2, 128)},
        "self_attn.v": {"lokr_w1": (4, 2), "lokr_w2_a": (32, 2), "lokr_w2_b": (2, 64), "alpha": ()},
        "self_attn.o": {"a1.weight": (128, 2), "a2.weight": (2, 128), "b1.weight": (128, 2), "b2.weight": (2, 128)},
        "cross_attn.q": {"oft_blocks": (32, 4, 4)},
        "cross_attn.k": {"oft_blocks": (2, 32, 4, 4), "rescale": (128, 1), "alpha": ()},
        "norm3": {"set_weight": (128,)},
    }
    return {
        f"{prefix}{layer}.{part}": torch.ones(shape) for layer, parts in kinds.items() for part, shape in parts.items()
    }


def umt5() -> dict[str, Tensor]:
    width, heads, ffn = 8, 2, 12
    block = {
        "0.SelfAttention.relative_attention_bias": (32, heads),
        **{f"0.SelfAttention.{layer}": (width, width) for layer in "qkvo"},
        "0.layer_norm": (width,), "1.layer_norm": (width,),
        "1.DenseReluDense.wi_0": (ffn, width), "1.DenseReluDense.wi_1": (ffn, width),
        "1.DenseReluDense.wo": (width, ffn),
    }  # fmt: skip
    shapes = {f"encoder.block.{i}.layer.{name}": shape for i in range(2) for name, shape in block.items()}
    shapes |= {"shared": (40, width), "encoder.final_layer_norm": (width,)}
    state = {f"{name}.weight": torch.ones(shape) for name, shape in shapes.items()}
    return state | {"spiece_model": torch.arange(50, dtype=torch.uint8)}


# --- How it is read --------------------------------------------------------------------------------------------------


def load_whole(path: Path) -> object:
    return load_model(path) if path.name.startswith("model-") else (describe(path), load_model(path))


def load_lora(path: Path, base: Path) -> object:
    return load_model(base, loras=((path, 0.5),))


# --- How it is damaged -----------------------------------------------------------------------------------------------


def safetensors(random: Random, state: dict, metadata: dict, folder: Path) -> Path:
    path, data = folder / "model.safetensors", save(*tensors(random, state, plain=True), metadata or None)
    how = random.randrange(4)
    path.write_bytes(
        header(random, data) if how == 0 else damaged(random, data) if how == 1 else near(random, data, how)
    )
    return path


def zipped(random: Random, state: dict, metadata: dict, folder: Path) -> Path:
    return pickled(random, state, folder, new=True)


def legacy(random: Random, state: dict, metadata: dict, folder: Path) -> Path:
    return pickled(random, state, folder, new=False)


def pickled(random: Random, state: dict, folder: Path, new: bool) -> Path:
    (state,) = tensors(random, state, plain=False)
    path = folder / random.choice(("model.pt", "model.pth", "model.bin", "model.ckpt"))
    tree = random.choice((state, {"generator_ema": state, "step": 3}, {"state_dict": state}, {"a": [state]}, [state]))
    torch.save(tree, path, _use_new_zipfile_serialization=new)
    how, data = random.randrange(4), path.read_bytes()
    if how:
        path.write_bytes(damaged(random, data) if how == 1 else near(random, data, how))
    return path


def sharded(random: Random, state: dict, metadata: dict, folder: Path) -> Path:
    """Two shards and their index, one of the three damaged; named by any of them or by the folder."""
    (state,) = tensors(random, state, plain=True)
    names = [f"model-{i:05}-of-00002.safetensors" for i in (1, 2)]
    for i, name in enumerate(names):
        save_file({key: state[key] for key in list(state)[i::2]}, folder / name, metadata or None)
    where = {key: names[i % 2] for i, key in enumerate(state)}
    index = json.dumps({"metadata": {"total_size": 1}, "weight_map": where})
    at = folder / "model.safetensors.index.json"
    if random.random() < 0.5:
        index = json.dumps({"weight_map": random.choice((where, odd(random), dict.fromkeys(where, odd(random))))})
        at.write_bytes(damaged(random, index.encode()) if random.random() < 0.5 else index.encode())
    else:
        at.write_text(index)
        path = folder / random.choice(names)
        if random.random() < 0.2:
            path.unlink()
        else:
            path.write_bytes(near(random, path.read_bytes(), 3))
    return random.choice((at, folder, *(folder / name for name in names)))


def near(random: Random, data: bytes, how: int) -> bytes:
    """Damage where the description is, at the beginning or the end; as it is for 2, one time in two."""
    if how == 2 and random.random() < 0.5:
        return data
    cut = random.choice((300, 3000, len(data)))
    if random.random() < 0.5:
        return damaged(random, data[:cut]) + data[cut:]
    return data[:-cut] + damaged(random, data[-cut:])


def damaged(random: Random, data: bytes) -> bytes:
    data = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8))):
        at, length, how = random.randint(0, len(data)), random.choice((1, 2, 8, 100)), random.randrange(6)
        if how == 0:
            del data[at:]
        elif how == 1:
            del data[at : at + length]
        elif how == 2:
            data[at:at] = random.randbytes(length)
        elif how == 3:
            data[at:at] = data[at : at + length]
        elif how == 4:
            data[at : at + length] = random.choice((b"\0", b"\xff", b"9", b"{", b'"', b"-")) * length
        elif at < len(data):
            data[at] ^= 1 << random.randrange(8)
    return bytes(data)


def header(random: Random, data: bytes) -> bytes:
    """A safetensors file with some entries of its header changed, its length corrected."""
    (length,) = struct.unpack("<Q", data[:8])
    entries = json.loads(data[8 : 8 + length])
    for _ in range(random.choice((1, 1, 2, 4))):
        name = random.choice(list(entries) or ["x"])
        entry = entries.get(name)
        if not isinstance(entry, dict) or random.random() < 0.2:
            entries[random.choice((name, "__metadata__", "x" * random.randint(0, 40)))] = odd(random)
            continue
        field = random.choice(list(entry) or ["dtype"])
        value = entry.get(field)
        if isinstance(value, list) and value and random.random() < 0.6:
            value[random.randrange(len(value))] = random.choice((0, 1, -1, 2**31, 2**63, 2**70, 7, odd(random)))
        else:
            entry[field] = random.choice((odd(random), "F8_E4M3", "I64", "F4", [], [0], [0, 0], [2**40, 0]))
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def odd(random: Random) -> object:
    return random.choice(
        (None, True, 0, -1, 1.5, 1e400, 10**400, "", "../x", "x\0", "\ud800", "é" * 300, [], [[]], {},
         {"a": {"b": [1]}}, ["x"])
    )  # fmt: skip


def tensors(random: Random, state: dict, plain: bool) -> tuple[dict]:
    """Some tensors left out, renamed, of other shapes or dtypes; not `plain`: also what only a pickle can hold."""
    for _ in range(random.choice((0, 0, 1, 1, 3))):
        if not state:
            break
        name = random.choice([name for name, value in state.items() if is_plain(value)] or [""])
        if not name:
            break
        tensor, how = state.pop(name), random.randrange(8)
        if how == 1:
            state[rename(random, name)] = tensor
        elif how == 2:
            state[name] = tensor.to(
                random.choice((torch.float64, torch.int8, torch.bool, torch.float8_e5m2, torch.int64))
            )
        elif how == 3:
            state[name] = tensor.flatten()[: random.choice((0, 1, 3))].clone()
        elif how == 4:
            state[name] = torch.zeros(
                random.choice(((), (0,), (1, 0, 3), (2, 2), (0, 128), (16, 0, 1, 2, 2), (1,) * 7))
            )
        elif how == 5:
            state[name] = tensor[None].clone()
        elif how == 6 and not plain:
            state[name] = strange(random, tensor)
        elif how == 7:
            state[name], state[rename(random, name)] = tensor, tensor.clone()
    return (state,)


def is_plain(value: object) -> bool:
    """Whether a value can be damaged further."""
    return type(value) is Tensor and value.layout is torch.strided and value.numel() < 10**6 and not value.is_quantized


def rename(random: Random, name: str) -> str:
    parts = name.split(".")
    at = random.randrange(len(parts))
    other = (
        "",
        "0",
        "99",
        "-1",
        "²",
        "9" * 5000,
        "x",
        "blocks",
        "lora_A",
        "weight",
        "weight_scale",
        "encoder",
        "alpha",
        "up_blocks",
    )
    return ".".join([*parts[:at], *random.choice(((random.choice(other),), (), (parts[at],) * 2)), *parts[at + 1 :]])


def strange(random: Random, tensor: Tensor) -> object:
    """What stands in a pickle where a tensor should: other tensors, and no tensors."""
    return random.choice(
        (
            lambda: tensor.float().to_sparse(),
            lambda: torch.ones(1).expand(10**9),
            lambda: torch.zeros(1).expand(2**40, 2),
            lambda: tensor.float().to(torch.complex64),
            lambda: torch.nn.Parameter(tensor.float()),
            lambda: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8),
            lambda: tensor.to("meta"),
            lambda: [tensor],
            lambda: {"x": {"y": {1: tensor}}},
            lambda: None,
            lambda: "text",
            lambda: tensor.t() if tensor.ndim == 2 else tensor,
        )
    )()
