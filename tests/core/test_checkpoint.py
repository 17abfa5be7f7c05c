"""Every format a Wan checkpoint comes in, and every file that is taken for one."""

import gc
import json
import os
import pickle
import sys
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sf_core.checkpoints.identify import find_wan
from sf_core.checkpoints.load import (
    CheckpointError,
    dequantised,
    describe,
    load_checkpoint,
    load_model,
    plain_dtype,
)
from sf_core.checkpoints.tensorfiles import TensorFile
from sf_core.memory import MemoryPlan
from sf_core.pipeline import loaded_weight_bytes
from sf_core.sampling.config import Sampling
from sf_core.sampling.families import FAMILIES, KINDS, MODELS, guess_family
from sf_core.sampling.plan import Plan
from sf_core.wan.attention import FullAttention
from sf_core.wan.config import WanConfig
from sf_core.wan.model import WanModel, encode_prompt, velocity

ROOT = Path(__file__).resolve().parents[2]
SMALL = WanConfig(dim=128, ffn_dim=64, heads=1, layers=2, channels=16, freq_dim=16, text_dim=24)
CAUSAL = {"config": json.dumps({"transformer": {"causal_ar": True}})}
needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc or writes sparse files")


def weights(config: WanConfig = SMALL, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: tensor.shape for name, tensor in WanModel(config, device="meta").state_dict().items()}
    return {name: (0.02 * torch.randn(shape, generator=generator)).to(dtype) for name, shape in shapes.items()}


def shapes(config: WanConfig, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    return WanModel(config, device="meta", dtype=dtype).state_dict()


def prefixed(state: dict, prefix: str) -> dict:
    return {prefix + name: tensor for name, tensor in state.items()}


def fsdp(state: dict) -> dict:
    """Names as a training run under FSDP with checkpointed blocks saves them."""
    wrapped = {}
    for name, tensor in state.items():
        block, number, rest = (name.split(".", 2) + ["", ""])[:3]
        inside = f"blocks.{number}._fsdp_wrapped_module._checkpoint_wrapped_module.{rest}"
        wrapped["model._fsdp_wrapped_module." + (inside if block == "blocks" else name)] = tensor
    return wrapped


def same(state: dict, other: dict) -> bool:
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in other)


# --- Formats ---------------------------------------------------------------------------------------------------------

TRAINING_FILES = {
    "generator_ema beside the others": lambda ema, raw, critic: {
        "generator": fsdp(raw), "critic": fsdp(critic), "generator_ema": fsdp(ema), "step": 600, "name": "dmd",
    },
    "generator_ema in a nested form": lambda ema, raw, critic: {
        "generator_ema": {"decay": 0.99, "shadow": prefixed(ema, "model.")}, "generator": prefixed(raw, "model."),
    },
    "an ema of its own name": lambda ema, raw, critic: {"model": raw, "ema": {"state_dict": ema}},
    "generator alone": lambda ema, raw, critic: {"generator": prefixed(ema, "model."), "critic": critic},
    "model": lambda ema, raw, critic: {"model": ema},
    "bare": lambda ema, raw, critic: ema,
    "compiled": lambda ema, raw, critic: {"generator": prefixed(ema, "_orig_mod.model.")},
    "lists and optimisers beside it": lambda ema, raw, critic: {
        "generator": ema, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4}]},
    },
}  # fmt: skip


@pytest.mark.parametrize("wrap", TRAINING_FILES.values(), ids=TRAINING_FILES.keys())
def test_pt_files_give_the_best_weights_in_them(tmp_path, wrap):
    ema, raw, critic = (weights(seed=seed) for seed in range(3))
    torch.save(wrap(ema, raw, critic), tmp_path / "self_forcing_dmd.pt")
    checkpoint = load_checkpoint(tmp_path / "self_forcing_dmd.pt")
    assert checkpoint.config == SMALL
    assert same(checkpoint.state_dict, ema)


PREFIXES = ["model.", "diffusion_model.", "net.", "generator.", "module."]
WRAPPERS = ["_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod."]


@settings(max_examples=40)
@given(st.lists(st.sampled_from(PREFIXES + WRAPPERS), max_size=5), st.lists(st.sampled_from(WRAPPERS), max_size=3))
def test_every_combination_of_prefixes_is_stripped(prefixes, wrappers):
    def wrapped(name):
        first, _, rest = name.partition(".")
        return "".join(prefixes) + first + "." + "".join(wrappers) + rest

    names = shapes(SMALL)
    file = TensorFile((Path("x.safetensors"),), {wrapped(name): tensor for name, tensor in names.items()}, {})
    found = find_wan(file)
    assert found.names == {name: wrapped(name) for name in names}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("metadata", [None, CAUSAL], ids=["bare", "metadata"])
def test_comfyui_safetensors_load(tmp_path, prefix, metadata):
    state = weights(dtype=torch.bfloat16)
    others = {"vae.decoder.conv1.weight": torch.zeros(3)} if prefix else {}
    save_file(prefixed(state, prefix) | others, tmp_path / "causal.safetensors", metadata)
    checkpoint = load_checkpoint(tmp_path / "causal.safetensors")
    assert same(checkpoint.state_dict, state)
    assert checkpoint.config == SMALL


def test_metadata_says_what_shapes_cannot(tmp_path):
    config = replace(SMALL, heads=4, text_len=64)
    facts = {"transformer": {"causal_ar": True, "num_heads": 4, "text_len": 64, "text_dim": 24}}
    save_file(weights(config), tmp_path / "tiny.safetensors", {"config": json.dumps(facts)})
    assert load_checkpoint(tmp_path / "tiny.safetensors").config == config


@pytest.mark.parametrize("text", ["not json", "[]", '{"transformer": 3}'])
def test_metadata_that_cannot_be_read_is_passed_over(tmp_path, text):
    save_file(weights(), tmp_path / "x.safetensors", {"config": text})
    assert load_checkpoint(tmp_path / "x.safetensors").config == SMALL


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_every_precision_loads_as_it_is(tmp_path, dtype, suffix):
    state, path = weights(dtype=dtype), tmp_path / f"wan.{suffix}"
    torch.save({"generator": state}, path) if suffix == "pt" else save_file(state, path)
    checkpoint = load_checkpoint(path)
    assert checkpoint.dtype == dtype
    assert same(checkpoint.state_dict, state)


def shard(state: dict, folder: Path, count: int = 3, index: bool = True) -> list[Path]:
    names = sorted(state)
    paths = [folder / f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    for i, path in enumerate(paths):
        save_file({name: state[name] for name in names[i::count]}, path, CAUSAL)
    if index:
        weight_map = {name: paths[i % count].name for i, name in enumerate(names)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return paths


@pytest.mark.parametrize("index", [True, False], ids=["index", "no index"])
@pytest.mark.parametrize("given", ["index", "shard", "folder"])
def test_shards_load_by_index_by_shard_and_by_folder(tmp_path, index, given):
    if given == "index" and not index:
        pytest.skip("no index to give")
    state = weights()
    paths = shard(state, tmp_path, index=index)
    path = {"index": tmp_path / "model.safetensors.index.json", "shard": paths[1], "folder": tmp_path}[given]
    checkpoint = load_checkpoint(path)
    assert same(checkpoint.state_dict, state)
    assert checkpoint.file_bytes == sum(path.stat().st_size for path in paths)


DIFFUSERS_LAYERS = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "patch_embedding": "patch_embedding",
    "proj_out": "head.head",
}
DIFFUSERS_BLOCK = {
    **{f"attn1.to_{x}": f"self_attn.{x}" for x in "qkv"}, "attn1.to_out.0": "self_attn.o",
    **{f"attn2.to_{x}": f"cross_attn.{x}" for x in "qkv"}, "attn2.to_out.0": "cross_attn.o",
    "attn1.norm_q": "self_attn.norm_q", "attn1.norm_k": "self_attn.norm_k",
    "attn2.norm_q": "cross_attn.norm_q", "attn2.norm_k": "cross_attn.norm_k",
    "norm2": "norm3", "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2",
}  # fmt: skip


def diffusers(state: dict) -> dict:
    """The same tensors under Diffusers' names."""
    layers = dict(DIFFUSERS_LAYERS)
    for i in range(SMALL.layers):
        layers |= {f"blocks.{i}.{theirs}": f"blocks.{i}.{wans}" for theirs, wans in DIFFUSERS_BLOCK.items()}
    names = {f"{theirs}.{end}": f"{wans}.{end}" for theirs, wans in layers.items() for end in ("weight", "bias")}
    names |= {f"blocks.{i}.scale_shift_table": f"blocks.{i}.modulation" for i in range(SMALL.layers)}
    names["scale_shift_table"] = "head.modulation"
    renamed = {theirs: state[wans] for theirs, wans in names.items() if wans in state}
    assert len(renamed) == len(state)
    return renamed


@pytest.mark.parametrize("prefix", ["", "transformer.", "model.diffusion_model."])
def test_diffusers_names_are_wans(tmp_path, prefix):
    save_file(prefixed(diffusers(weights()), prefix), tmp_path / "wan.safetensors")
    checkpoint = load_checkpoint(tmp_path / "wan.safetensors")
    assert checkpoint.config == SMALL and same(checkpoint.state_dict, weights())


def test_a_diffusers_folder_loads_and_its_name_tells_the_family(tmp_path):
    folder = tmp_path / "SFWan2.1-T2V-1.3B-Diffusers" / "transformer"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    shard(diffusers(weights()), folder)
    checkpoint = load_checkpoint(folder)
    assert same(checkpoint.state_dict, weights())
    assert checkpoint.family == "self-forcing" and 'its name says "sfwan"' in checkpoint.note


def test_a_folder_with_one_checkpoint_stands_for_it(tmp_path):
    (tmp_path / "README.md").write_text("words")
    save_file(weights(), tmp_path / "wan.safetensors")
    assert load_checkpoint(tmp_path).config == SMALL


def test_all_825_tensors_of_the_1_3b_model_are_known():
    found = find_wan(TensorFile((Path("self_forcing_dmd.pt"),), prefixed(shapes(WanConfig()), "generator_ema."), {}))
    assert len(found.names) == 825
    assert found.config == WanConfig()
    assert found.causal


def test_models_of_our_own_training_say_how_they_are_sampled(tmp_path):
    config, sampling = replace(SMALL, heads=2), Sampling((900, 300), shift=3.0, chunk=2, window=6, sink=1)
    own = {"wan": json.dumps(asdict(config)), "sampling": json.dumps(asdict(sampling))}
    save_file(weights(config), tmp_path / "x.safetensors", own | CAUSAL)
    about = describe(tmp_path / "x.safetensors")
    assert (about.config, about.sampling) == (config, sampling)
    assert describe(tmp_path / "x.safetensors", family="longlive").sampling == FAMILIES["longlive"].sampling
    save_file(weights(config), tmp_path / "x.safetensors", own | {"sampling": '{"chunk": 0}'})
    with pytest.raises(CheckpointError, match="whose metadata cannot be right"):
        describe(tmp_path / "x.safetensors")


# --- Float8 ----------------------------------------------------------------------------------------------------------


def float8(state: dict, per_row: bool = False, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[dict, dict]:
    """(state with the blocks' linear weights in float8, {layer: scale})."""
    quantised, scales = {}, {}
    for name, tensor in state.items():
        layer = name.removesuffix(".weight")
        if name.startswith("blocks.") and tensor.ndim == 2 and layer != name:
            scale = tensor.abs().amax(1, keepdim=per_row) / torch.finfo(dtype).max
            scales[layer] = scale if per_row else scale.max()
            quantised[name] = (tensor / scales[layer]).to(dtype)
        else:
            quantised[name] = tensor
    return quantised, scales


def tag(text: dict) -> torch.Tensor:
    return torch.tensor(list(json.dumps(text).encode()), dtype=torch.uint8)


def legacy(scales: dict, inputs: bool) -> tuple[dict, dict]:
    extra = {f"{layer}.scale_weight": scale.clone() for layer, scale in scales.items()}
    extra |= {f"{layer}.scale_input": torch.tensor(0.5) for layer in scales if inputs}
    return extra | {"scaled_fp8": torch.zeros(2 if inputs else 0, dtype=torch.float8_e4m3fn)}, {}


def tagged(scales: dict, inputs: bool) -> tuple[dict, dict]:
    extra = {f"{layer}.weight_scale": scale.clone() for layer, scale in scales.items()}
    extra |= {f"{layer}.input_scale": torch.tensor(0.5) for layer in scales if inputs}
    return extra | {f"{layer}.comfy_quant": tag({"format": "float8_e4m3fn"}) for layer in scales}, {}


def listed(scales: dict, inputs: bool) -> tuple[dict, dict]:
    extra = {f"{layer}.weight_scale": scale.clone() for layer, scale in scales.items()}
    extra |= {f"{layer}.input_scale": torch.tensor(0.5) for layer in scales if inputs}
    layers = {layer: {"format": "float8_e4m3fn"} for layer in scales}
    return extra, {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


@pytest.mark.parametrize("write", [legacy, tagged, listed])
@pytest.mark.parametrize("per_row", [False, True], ids=["tensor", "row"])
@pytest.mark.parametrize("inputs", [False, True], ids=["weights", "inputs"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_scaled_float8_stays_float8_beside_its_scales(tmp_path, write, per_row, inputs, prefix):
    state, scales = float8(weights(), per_row)
    extra, metadata = write(scales, inputs)
    save_file(prefixed(state | extra, prefix), tmp_path / "fp8.safetensors", metadata | CAUSAL)
    checkpoint = load_checkpoint(tmp_path / "fp8.safetensors")
    assert checkpoint.dtype == torch.float8_e4m3fn
    kinds = {"weight_scale", "input_scale"} if inputs else {"weight_scale"}
    assert checkpoint.state_dict.keys() == state.keys() | {f"{layer}.{kind}" for layer in scales for kind in kinds}
    q = "blocks.1.self_attn.q"
    assert checkpoint.state_dict[f"{q}.weight"].dtype == torch.float8_e4m3fn
    assert checkpoint.state_dict[f"{q}.weight_scale"].shape == ((128,) if per_row else ())
    assert checkpoint.weight_bytes < 4 * checkpoint.parameters


@pytest.mark.parametrize("per_row", [False, True], ids=["tensor", "row"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_dequantised_is_weight_times_scale(tmp_path, per_row, dtype):
    original = weights()
    state, scales = float8(original, per_row, dtype)
    save_file(state | legacy(scales, True)[0], tmp_path / "fp8.safetensors")
    plain = dequantised(load_checkpoint(tmp_path / "fp8.safetensors").state_dict, torch.float32)
    assert plain.keys() == original.keys()
    step = 2**-3 if dtype == torch.float8_e5m2 else 2**-4  # half the distance of two float8 numbers, relative
    for name, tensor in original.items():
        torch.testing.assert_close(plain[name], tensor, rtol=step, atol=1e-5)


@pytest.mark.parametrize(
    "dtypes", [(torch.float8_e4m3fn,), (torch.float8_e5m2,), (torch.float8_e5m2, torch.float8_e4m3fn)]
)
def test_one_float8_layer_makes_a_float8_file(tmp_path, dtypes):
    state = weights(dtype=torch.bfloat16)
    state |= {f"blocks.1.ffn.{2 * i}.weight": state[f"blocks.1.ffn.{2 * i}.weight"].to(d) for i, d in enumerate(dtypes)}
    save_file(state, tmp_path / "mixed.safetensors")
    about = describe(tmp_path / "mixed.safetensors")
    assert about.dtype == dtypes[-1] and plain_dtype(about.dtype) == torch.bfloat16
    model, _ = load_model(tmp_path / "mixed.safetensors")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_float8_without_scales_is_taken_at_its_word(tmp_path):
    state = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in weights().items()}
    save_file(state, tmp_path / "wan_fp8_e4m3fn.safetensors")
    plain = dequantised(load_checkpoint(tmp_path / "wan_fp8_e4m3fn.safetensors").state_dict, torch.bfloat16)
    assert all(torch.equal(plain[name], state[name].bfloat16()) for name in state)


# --- The model -------------------------------------------------------------------------------------------------------


def forward(model: WanModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1, 16, 2, 4, 4, generator=generator)
    text = encode_prompt(model, torch.randn(1, 3, SMALL.text_dim, generator=generator))
    return velocity(model, x, 500.0, text, FullAttention(SMALL, range(2), 4, 4))


def test_loaded_model_computes_what_the_saved_one_did(tmp_path):
    model = WanModel(SMALL)
    model.load_state_dict(weights())
    torch.save({"generator_ema": fsdp(model.state_dict())}, tmp_path / "self_forcing.pt")
    loaded, checkpoint = load_model(tmp_path / "self_forcing.pt")
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(forward(loaded), forward(model))
    assert checkpoint.family == "self-forcing"


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.float32])
def test_load_model_converts_on_demand(tmp_path, dtype):
    state, scales = float8(weights())
    save_file(state | legacy(scales, False)[0], tmp_path / "fp8.safetensors")
    model, _ = load_model(tmp_path / "fp8.safetensors", dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype or torch.bfloat16}


def test_changing_a_loaded_model_leaves_the_file_alone(tmp_path):
    path = tmp_path / "wan.safetensors"
    save_file(weights(), path)
    before = path.read_bytes()
    model, _ = load_model(path)
    model.patch_embedding.weight.add_(1)
    assert path.read_bytes() == before


def anonymous_memory() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))


@needs_linux
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_loading_takes_no_copy_of_the_weights(tmp_path, suffix):
    config = replace(SMALL, ffn_dim=64_000)
    state, path = weights(config), tmp_path / f"wan.{suffix}"  # 134 MB
    torch.save({"generator": state}, path) if suffix == "pt" else save_file(state, path)
    del state
    gc.collect()
    before = anonymous_memory()
    model, _ = load_model(path)
    total = sum(parameter.sum().item() for parameter in model.parameters())
    assert total == total and path.stat().st_size > 120e6
    assert anonymous_memory() - before < 10e6


# --- What a file is --------------------------------------------------------------------------------------------------


@needs_linux
def test_describe_reads_the_header_of_a_full_size_file(tmp_path):
    path = write_sparse(tmp_path / "causal_forcing_framewise_bf16.safetensors", shapes(WanConfig()), CAUSAL)
    about = describe(path)
    assert (about.config, about.dtype, about.tensors) == (WanConfig(), torch.bfloat16, 825)
    assert about.parameters == 1_418_996_800
    assert about.weight_bytes == 2 * about.parameters < about.file_bytes
    assert about.family == "causal-forcing-framewise" and about.sampling.chunk == 1
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_describe_agrees_with_loading(tmp_path):
    torch.save({"generator": weights()}, tmp_path / "longlive_base.pt")
    about, checkpoint = describe(tmp_path / "longlive_base.pt"), load_checkpoint(tmp_path / "longlive_base.pt")
    facts = vars(checkpoint)
    assert len(facts.pop("state_dict")) == about.tensors and facts.pop("memory") is None
    assert facts == vars(about)
    assert "generator" in about.source


def test_memory_of_the_1_3b_model():
    plan = Plan(FAMILIES["longlive"].sampling, 21, 60, 104)
    need = MemoryPlan(WanConfig(), plan, torch.bfloat16, weights=2_838_000_000).use
    assert need.cache == 12 * 2 * 30 * 1560 * 1536 * 2  # 3.2 GiB
    assert need.prompt == 2 * 30 * 512 * 1536 * 2
    assert 400e6 < need.activations < 500e6
    assert need.total == need.weights + need.cache + need.prompt + need.activations


def test_float8_cache_takes_half_and_a_scale_for_each_token_and_head():
    plan = Plan(FAMILIES["longlive"].sampling, 21, 60, 104, cache_dtype=torch.float8_e4m3fn)
    need = MemoryPlan(WanConfig(), plan, torch.bfloat16).use
    assert need.cache == 12 * 2 * 30 * 1560 * (1536 + 12 * 4)


def memory_use(about, height, width, sampling=None, frames=21, dtype=None):
    """Memory of a video of so many pixels and latent frames, in the file's dtype unless told."""
    plan, dtype = Plan(sampling or about.sampling, frames, height // 8, width // 8), dtype or plain_dtype(about.dtype)
    return MemoryPlan(about.config, plan, dtype, loaded_weight_bytes(about, dtype)).use


def test_memory_follows_size_window_and_precision(tmp_path):
    save_file(weights(), tmp_path / "longlive.safetensors")
    about = describe(tmp_path / "longlive.safetensors")
    default = memory_use(about, 64, 64)
    assert default == memory_use(about, 64, 64, sampling=replace(about.sampling, window=12))
    assert memory_use(about, 64, 64, sampling=replace(about.sampling, window=6)).cache == default.cache // 2
    assert memory_use(about, 64, 64, frames=3).cache == default.cache // 4
    assert memory_use(about, 128, 64).cache == 2 * default.cache
    half = memory_use(about, 64, 64, dtype=torch.bfloat16)
    assert (half.weights, half.cache) == (default.weights // 2, default.cache // 2)


# --- Families --------------------------------------------------------------------------------------------------------

NAMES = {
    "self_forcing_dmd.pt": "self-forcing",
    "self_forcing_sid_v2.safetensors": "self-forcing",
    "chunkwise/causal_forcing.pt": "causal-forcing",
    "framewise/causal_forcing.pt": "causal-forcing-framewise",
    "causal-forcing++/framewise-2step.pt": "causal-forcing-2step",
    "causal-forcing++/framewise-1step.pt": "causal-forcing-1step",
    "causal_forcing_framewise_bf16.safetensors": "causal-forcing-framewise",
    "causal_forcing_chunkwise_fp8_scaled.safetensors": "causal-forcing",
    "chunkwise/longvideo.pt": "causal-forcing-long",
    "Wan2_1-T2V-1_3B-LongLive_fp16.safetensors": "longlive",
    "longlive_models/longlive_base.pt": "longlive",
    "Reward-Forcing-T2V-1.3B/rewardforcing.pt": "reward-forcing",
    "rolling_forcing_dmd.pt": "rolling-forcing",
    "LongLive/self_forcing_dmd.pt": "self-forcing",
    "autoregressive_checkpoint/model.pt": "causvid",
    "autoregressive_checkpoint.pt": "causvid",
    "Wan2_1-T2V-1_3B-CausVid_fp16.safetensors": "causvid",
    "autoregressive_checkpoint_warp_4step_cfg2/model.pt": "causvid-4step",
}


@pytest.mark.parametrize("name", NAMES)
def test_family_is_guessed_from_the_names_users_have(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    torch.save({"generator_ema": weights()}, path) if path.suffix == ".pt" else save_file(weights(), path)
    about = describe(path)
    assert about.family == NAMES[name]
    assert "name says" in about.note


def test_chosen_family_wins_over_the_name(tmp_path):
    torch.save({"generator_ema": weights()}, tmp_path / "self_forcing_dmd.pt")
    about = describe(tmp_path / "self_forcing_dmd.pt", family="longlive")
    assert about.family == "longlive" and about.sampling.window == 12
    assert "chosen" in about.note
    with pytest.raises(ValueError, match="known are self-forcing"):
        load_checkpoint(tmp_path / "self_forcing_dmd.pt", family="stable-forcing")


def test_every_pattern_leads_to_a_family():
    kinds = {family for patterns in KINDS.values() for _, family in patterns}
    assert {model for _, model in MODELS} | kinds == FAMILIES.keys()
    assert guess_family("model_final_v2.safetensors") == ("self-forcing", None, "")


def test_bidirectional_causvid_is_not_taken_for_the_causal_one():
    assert guess_family("Wan21_CausVid_bidirect2_T2V_1_3B.safetensors").evidence is None


def test_causvids_steps_are_told_to_the_network_as_they_stand():
    steps = FAMILIES["causvid"].sampling.steps_of(first=True)
    assert [step.timestep for step in steps] == [1000, 757, 522]
    # Noise levels of the entries of CausVid's table, shift 8, that lie nearest to them.
    table = [8 * u / (1 + 7 * u) for u in (1 - i / 1000 for i in range(1000))]
    assert [step.sigma for step in steps] == [min(table, key=lambda s: abs(s - t)) for t in (1, 0.757, 0.522)]


def test_model_that_nothing_calls_causal_gets_a_warning(tmp_path):
    save_file(weights(), tmp_path / "wan2.1_t2v_1.3B_bf16.safetensors")
    assert "Nothing says that this model is causal" in describe(tmp_path / "wan2.1_t2v_1.3B_bf16.safetensors").note
    save_file(weights(), tmp_path / "mine.safetensors", CAUSAL)
    assert "Nothing says" not in describe(tmp_path / "mine.safetensors").note


def test_stage_of_training_gets_a_warning(tmp_path):
    torch.save({"generator": weights()}, tmp_path / "ode_init.pt")
    assert "stage of training" in describe(tmp_path / "ode_init.pt").note


# --- Bad files -------------------------------------------------------------------------------------------------------


def write_sparse(path: Path, tensors: dict[str, torch.Tensor], metadata: dict | None = None) -> Path:
    """A safetensors file of any size with all its numbers zero, which takes no room on the disk."""
    kinds = {torch.bfloat16: "BF16", torch.float32: "F32", torch.uint8: "U8", torch.int8: "I8"}
    header, end = {"__metadata__": metadata or {}}, 0
    for name, tensor in tensors.items():
        offsets = [end, end := end + tensor.nbytes]
        header[name] = {"dtype": kinds[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def named(path: Path, *names: str, metadata: dict | None = None) -> Path:
    """A file with small tensors of these names."""
    save_file({name: torch.zeros(2, 2) for name in names}, path, metadata)
    return path


def changed(path: Path, **tensors: torch.Tensor | None) -> Path:
    """A small model with tensors (`__` for dots) put in, or left out where None."""
    state = weights() | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, path)
    return path


def cut(path: Path, keep: float) -> Path:
    """A whole checkpoint of the path's kind, cut off."""
    torch.save({"generator": weights()}, path) if path.suffix == ".pt" else save_file(weights(), path)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    return path


def image_to_video(path: Path) -> Path:
    state = shapes(WanConfig(dim=5120, ffn_dim=13824, heads=40, layers=40, channels=36))
    state["head.head.weight"] = torch.empty(64, 5120, device="meta", dtype=torch.bfloat16)
    return write_sparse(path, state | shapes_of("img_emb.proj.0.weight", "blocks.0.cross_attn.k_img.weight"))


def shapes_of(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.empty(16, 16, device="meta", dtype=torch.bfloat16) for name in names}


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


def bomb(path: Path, bare: bool = False) -> Path:
    if bare:
        path.write_bytes(pickle.dumps(Bomb()))
    else:
        torch.save({"generator": weights(), "args": Bomb()}, path)
    return path


def text(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def folder(path: Path, *names: str) -> Path:
    path.mkdir()
    for name in names:
        named(path / name, "x") if name.endswith(".safetensors") else (path / name).write_text("words")
    return path


def archive(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "words")
    return path


def script(path: Path) -> Path:
    """A TorchScript archive, as far as its table of contents."""
    with zipfile.ZipFile(path, "w") as file:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py", "version"):
            file.writestr(f"script/{name}", "")
    return path


def shards(path: Path, missing: int) -> Path:
    path.mkdir()
    paths = shard(weights(), path)
    paths[missing].unlink()
    return paths[0]


NO_LORA = "a LoRA or a model with LoRA layers not merged into it"
Q = "blocks.0.self_attn.q"

# What the file is: how it is made, what its error calls it. docs/files.md lists the same.
BAD = {
    "lora.safetensors": (lambda p: named(p, f"diffusion_model.{Q}.lora_A.weight"), NO_LORA),
    "lora_kohya.safetensors": (lambda p: named(p, "lora_unet_blocks_0_self_attn_q.lora_up.weight"), NO_LORA),
    "lora_unmerged.safetensors": (lambda p: changed(p, blocks__0__self_attn__q__lora_A__weight=torch.ones(1)), NO_LORA),
    "i2v.safetensors": (image_to_video, "a Wan image-to-video model"),
    "wan2.2_ti2v_5B.safetensors": (
        lambda p: write_sparse(p, shapes(WanConfig(dim=3072, ffn_dim=14336, heads=24, channels=48))),
        "Wan 2.2 5B or a relative",
    ),
    "wan2.1_t2v_14B.safetensors": (
        lambda p: write_sparse(p, shapes(WanConfig(dim=5120, ffn_dim=13824, heads=40, layers=40))),
        "a Wan 14B model that nothing calls causal",
    ),
    "fun_control.safetensors": (
        lambda p: changed(p, patch_embedding__weight=torch.ones(128, 32, 1, 2, 2)),
        "a Wan variant that takes 32 channels and gives 16",
    ),
    "vace.safetensors": (
        lambda p: changed(p, vace_blocks__0__ffn__0__weight=torch.ones(2)),
        "a Wan variant with other layers",
    ),
    "critic.pt": (lambda p: torch.save({"critic": weights()}, p), "a critic without its generator"),
    "sd15.safetensors": (
        lambda p: named(p, "model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.x"),
        "a Stable Diffusion checkpoint",
    ),
    "sdxl.safetensors": (
        lambda p: named(p, "model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.0.x"),
        "a Stable Diffusion XL checkpoint",
    ),
    "flux.safetensors": (lambda p: named(p, "double_blocks.0.img_attn.qkv.weight"), "an image model"),
    "wan_2.1_vae.safetensors": (
        lambda p: named(p, "encoder.conv1.weight", "decoder.middle.0.residual.0.gamma", "decoder.head.0.gamma"),
        "the Wan 2.1 VAE",
    ),
    "vae-ft-mse.safetensors": (lambda p: named(p, "decoder.mid.block_1.conv1.weight"), "an image VAE"),
    "taew2_1.safetensors": (lambda p: named(p, "encoder.0.weight", "decoder.3.conv.0.weight"), "a TAEHV"),
    "umt5_xxl.safetensors": (
        lambda p: named(p, "shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"),
        "a text encoder (T5)",
    ),
    "models_t5_umt5-xxl-enc-bf16.pth": (
        lambda p: torch.save({"token_embedding.weight": torch.ones(2), "blocks.0.attn.q.weight": torch.ones(2)}, p),
        "a text encoder (T5)",
    ),
    "clip_l.safetensors": (lambda p: named(p, "text_model.encoder.layers.0.mlp.fc1.weight"), "a CLIP encoder"),
    "other.safetensors": (lambda p: named(p, "layer.weight"), "tensors of no model known here"),
    "no_tensors.pt": (lambda p: torch.save({"step": 3}, p), "no tensors in it"),
    "missing.safetensors": (
        lambda p: changed(p, blocks__1__norm3__weight=None, head__head__bias=None),
        "a Wan model without 2 of the tensors of its kind",
    ),
    "wrong_shape.safetensors": (
        lambda p: changed(p, blocks__1__ffn__2__bias=torch.ones(64)),
        "whose blocks.1.ffn.2.bias has the shape [64]",
    ),
    "wrong_rank.safetensors": (lambda p: changed(p, patch_embedding__weight=torch.ones(128, 63)), "has the shape"),
    "no_heads.safetensors": (lambda p: save_file(weights(replace(SMALL, dim=96)), p), "how many heads"),
    "wrong_heads.safetensors": (
        lambda p: save_file(weights(), p, {"config": '{"transformer": {"num_heads": 7}}'}),
        "whose metadata cannot be right",
    ),
    "int8.safetensors": (
        lambda p: changed(p, blocks__0__ffn__0__weight=torch.ones(64, 128, dtype=torch.int8)),
        "quantised in a way not known here",
    ),
    "nvfp4.safetensors": (
        lambda p: changed(p, blocks__0__ffn__0__weight=torch.ones(64, 64, dtype=torch.uint8)),
        "quantised in a way not known here",
    ),
    "block_scaled.safetensors": (
        lambda p: changed(
            p,
            blocks__0__ffn__0__weight=torch.ones(64, 128).to(torch.float8_e4m3fn),
            blocks__0__ffn__0__weight_scale=torch.ones(64, 4),
        ),
        "quantised in a way not known here",
    ),
    "float64.safetensors": (
        lambda p: changed(p, head__modulation=torch.ones(1, 2, 128, dtype=torch.float64)),
        "whose head.modulation is float64",
    ),
    "truncated.safetensors": (lambda p: cut(p, 0.9), "a truncated file"),
    "truncated_early.safetensors": (lambda p: cut(p, 0.0005), "a truncated file"),
    "damaged.safetensors": (
        lambda p: text(p, (20).to_bytes(8, "little") + b'{"x": {"dtype": "F3"'),
        "a damaged safetensors file",
    ),
    "truncated.pt": (lambda p: cut(p, 0.9), "a truncated .pt file"),
    "truncated_early.pt": (lambda p: cut(p, 0.0005), "a truncated .pt file"),
    "renamed.safetensors": (
        lambda p: cut(p.with_suffix(".pt"), 1).rename(p),
        "a PyTorch file under a safetensors name",
    ),
    "archive.zip": (archive, "a zip archive without tensors"),
    "script.pt": (script, "a TorchScript program"),
    "sparse.pt": (
        lambda p: torch.save(weights() | {"head.modulation": weights()["head.modulation"].to_sparse()}, p),
        "whose head.modulation is a sparse tensor",
    ),
    "bomb.pt": (bomb, "Python objects"),
    "bomb.ckpt": (lambda p: bomb(p, bare=True), "a bare Python pickle"),
    "gguf.gguf": (lambda p: text(p, b"GGUF\3\0\0\0"), "a GGUF file"),
    "empty.safetensors": (lambda p: text(p, b""), "an empty file"),
    "notes.pt": (lambda p: text(p, b"These are not weights."), "a text file"),
    "page.safetensors": (lambda p: text(p, b"<!DOCTYPE html><html>"), "a web page"),
    "pointer.safetensors": (lambda p: text(p, b"version https://git-lfs.github.com/spec/v1\n"), "a Git LFS pointer"),
    "noise.bin": (lambda p: text(p, b"\xff\0\xfe\1" * 40), "a file of another kind"),
    "nothing.pt": (lambda p: p, "which does not exist"),
    "empty_folder": (folder, "with nothing in it"),
    "docs_folder": (lambda p: folder(p, "README.md"), "with no weights in it"),
    "crowded_folder": (lambda p: folder(p, "a.safetensors", "b.safetensors"), "with 2 files"),
    "shards": (lambda p: shards(p, missing=2), "2 of 3 shards"),
    "bare.index.json": (lambda p: text(p, b'{"weight_map": {}}'), "which does not list any shards"),
    "broken.index.json": (lambda p: text(p, b"{}"), "which does not list any shards"),
}


def test_a_tensor_without_numbers_is_refused(tmp_path):
    torch.save(weights() | {"head.modulation": weights()["head.modulation"].to("meta")}, tmp_path / "meta.pt")
    with pytest.raises(CheckpointError, match="Got meta.pt, whose head.modulation was saved from the meta device"):
        load_checkpoint(tmp_path / "meta.pt")


def test_a_shard_of_an_impossible_name_is_missing(tmp_path):
    for name in ("x" * 5000, "a\0b", "..", ""):
        (tmp_path / "model.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
        with pytest.raises(CheckpointError, match="Got 0 of 1 shards") as caught:
            describe(tmp_path / "model.index.json")
        assert len(str(caught.value)) < 300
    with pytest.raises(CheckpointError, match="which does not exist"):
        describe(tmp_path / ("x" * 5000))


def tensors_alive() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


@pytest.fixture
def sentinel(tmp_path, monkeypatch) -> Path:
    path = tmp_path / "the bomb went off"
    monkeypatch.setenv("BOMB", str(path))
    return path


@needs_linux
@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_named_and_not_kept_open(tmp_path, sentinel, name):
    build, what = BAD[name]
    path = tmp_path / name
    path = build(path) or path
    for read in (load_checkpoint, load_model, describe):
        with pytest.raises(CheckpointError) as caught:
            read(path)
        message = str(caught.value)
        assert message.startswith("Got ") and what in message and message.endswith(".")
        assert len(message) < 600
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert not sentinel.exists()


@needs_linux
def test_bad_files_leave_no_tensors_behind(tmp_path, sentinel):
    before = tensors_alive()
    for name in ("bomb.pt", "missing.safetensors", "truncated.pt", "vace.safetensors", "critic.pt"):
        path = tmp_path / name
        BAD[name][0](path)
        with pytest.raises(CheckpointError):
            load_checkpoint(path)
    assert tensors_alive() <= before


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_file_larger_than_memory_is_not_called_damaged(tmp_path, monkeypatch, suffix):
    def refuse(*_, **__):
        raise RuntimeError("unable to mmap 57000000000 bytes from file: Cannot allocate memory (12)")

    path = tmp_path / f"wan.{suffix}"
    cut(path, 1)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr("sf_core.checkpoints.tensorfiles.safe_open", refuse)
    with pytest.raises(CheckpointError, match="cannot be mapped into memory"):
        load_checkpoint(path)


def test_damaged_archive_is_named(tmp_path):
    path = tmp_path / "wan.pt"
    cut(path, 1)
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(tmp_path / "bad.pt", "w") as bad:
        for entry in whole.namelist():
            content = whole.read(entry)
            bad.writestr(entry, content[:50] if entry.endswith("data.pkl") else content)
    with pytest.raises(CheckpointError, match="damaged|more than tensors"):
        load_checkpoint(tmp_path / "bad.pt")


def test_bomb_would_go_off_if_it_were_opened(tmp_path, sentinel):
    torch.load(bomb(tmp_path / "bomb.pt"), weights_only=False)
    assert sentinel.exists()


def test_every_bad_file_is_in_the_documentation():
    documented = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
    missing = {what for _, what in BAD.values() if what.split(" [")[0] not in documented}
    assert not missing


@needs_linux
def test_14b_model_passes_where_it_is_called_causal(tmp_path):
    fourteen = WanConfig(dim=5120, ffn_dim=13824, heads=40, layers=40)
    bare = write_sparse(tmp_path / "krea.safetensors", shapes(fourteen))
    assert describe(bare, family="self-forcing").config == fourteen
    said = write_sparse(tmp_path / "said.safetensors", shapes(fourteen), CAUSAL)
    assert describe(said).config == fourteen


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_with_a_reason(tmp_path_factory, content):
    path = text(tmp_path_factory.getbasetemp() / "bytes.bin", content)
    with pytest.raises(CheckpointError, match="Got bytes.bin"):
        load_checkpoint(path)


@given(st.integers(0, 10**6), st.integers(0, 255))
def test_a_changed_header_never_raises_anything_else(tmp_path_factory, at, value):
    path = tmp_path_factory.getbasetemp() / "changed.safetensors"
    named(path, "a.weight", "b.weight")
    content = bytearray(path.read_bytes())
    content[at % len(content)] = value
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        load_checkpoint(path)


def test_plain_dtype_of_float8_is_bfloat16():
    assert plain_dtype(torch.float8_e5m2) == torch.bfloat16
    assert plain_dtype(torch.float16) == torch.float16


def test_a_preferred_attention_is_passed_over(tmp_path):
    mark = {"blocks.0.self_attn.comfy_attention.config": tag({"name": "sage"})}
    save_file(weights() | mark, tmp_path / "x.safetensors")
    assert same(load_checkpoint(tmp_path / "x.safetensors").state_dict, weights())


@given(st.integers(0, 10**6), st.integers(0, 255))
def test_a_changed_archive_never_raises_anything_else(tmp_path_factory, at, value):
    path = tmp_path_factory.getbasetemp() / "changed.pt"
    torch.save({"a.weight": torch.zeros(2, 2)}, path)
    content = bytearray(path.read_bytes())
    content[at % len(content)] = value
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
