"""Every published causal model, by its real name, folders and metadata: its family, its settings, and what is said.

Weights are random, at small sizes, under the names that the files have.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sf_core.checkpoints.load import describe, load_checkpoint, load_memory, load_model
from sf_core.sampling.families import FAMILIES, guess_family
from sf_core.wan.bank import Bank
from sf_core.wan.config import WanConfig
from sf_core.wan.shot_cache import Shots
from tests.core.test_checkpoint import CAUSAL, SMALL, diffusers, fsdp, prefixed, shapes, weights, write_sparse

FOUR, FIVE = (1000, 750, 500, 250), (1000, 800, 600, 400, 200)
DEEP = {"window": 21, "sink": 15, "pinned": True}
ROLLING = {"window": 21, "sink": 3, "pinned": True, "sampler": "rolling", "steps": FOUR}
RCM = "Causal_rCM_Wan2.1_T2V_1.3B_480p_TF-dCM-init_SF-DMD"

# Path in its repository, family, settings.
PUBLISHED = {
    "Self-Forcing/checkpoints/self_forcing_dmd.pt": ("self-forcing", {"chunk": 3, "steps": FOUR, **DEEP}),
    "Self-Forcing/checkpoints/self_forcing_sid.pt": ("self-forcing", {"chunk": 3, "steps": FOUR}),
    "Self-Forcing/checkpoints/self_forcing_sid_v2.pt": ("self-forcing", {"chunk": 3}),
    "Self-Forcing/checkpoints/self_forcing_gan.pt": ("self-forcing", {"chunk": 3}),
    "Self-Forcing/checkpoints/self_forcing_10s.pt": ("self-forcing-10s", {"chunk": 3, "window": 21}),
    "Causal-Forcing/chunkwise/causal_forcing.pt": ("causal-forcing", {"chunk": 3, **DEEP}),
    "Causal-Forcing/framewise/causal_forcing.pt": ("causal-forcing-framewise", {"chunk": 1, **DEEP}),
    "Causal-Forcing/causal-forcing++/framewise-2step.pt": (
        "causal-forcing-2step",
        {"chunk": 1, "steps": (1000, 500), "first_steps": FOUR},
    ),
    "Causal-Forcing/causal-forcing++/framewise-1step.pt": ("causal-forcing-1step", {"chunk": 1, "steps": (1000,)}),
    "causal_forcing-framewise.safetensors": ("causal-forcing-framewise", {"chunk": 1}),
    "Causal-Forcing/chunkwise/longvideo.pt": ("causal-forcing-long", ROLLING),
    "CausalForcing-Long-Wan2.1-T2V-1.3B-Diffusers/transformer/diffusion_pytorch_model.safetensors": (
        "causal-forcing-long",
        ROLLING,
    ),
    "LongLive-2.0-5B/model_bf16.pt": (
        "longlive-2",
        {"chunk": 8, "window": 32, "sink": 8, "steps": FOUR, "solver": "unipc", "shots": Shots(), "holds_prefix": True},
    ),
    "LongLive-1.3B/models/longlive_base.pt": ("longlive", {"window": 12, "sink": 3, "pinned": False}),
    "Reward-Forcing-T2V-1.3B/rewardforcing.pt": ("reward-forcing", {"window": 9, "sink": 3, "sink_decay": 0.999}),
    "RollingForcing/checkpoints/rolling_forcing_dmd.pt": ("rolling-forcing", ROLLING | {"steps": FIVE}),
    "CausVid/autoregressive_checkpoint/model.pt": (
        "causvid",
        {"steps": (1000, 757, 522), "shift": 8, "warp": False, **DEEP},
    ),
    "CausVid/autoregressive_checkpoint_warp_4step_cfg2/model.pt": ("causvid-4step", {"steps": FOUR, "shift": 8}),
    "CausVid/wan_causal_ode_checkpoint_model_003000/model.pt": (
        "causvid",
        {"steps": (1000, 757, 522), "shift": 8, "warp": False},
    ),
    "SFWan2.1-T2V-1.3B-Diffusers/transformer/diffusion_pytorch_model.safetensors": ("self-forcing", {"chunk": 3}),
    "Self_Gradient_Forcing/framewise/ar/model.pt": (
        "self-gradient-forcing-framewise",
        {"chunk": 1, "window": 21, "sink": 4, "pinned": True, "position_range": 21},
    ),
    "Self_Gradient_Forcing/chunkwise/ar/model.pt": (
        "self-gradient-forcing",
        {"chunk": 3, "window": 12, "sink": 3, "pinned": True, "position_range": 21},
    ),
    "Self_Gradient_Forcing_Plus/chunkwise/model.pt": (
        "sgf-plus",
        {"chunk": 3, "window": 12, "sink": 3, "position_range": 12},
    ),
    "Self_Gradient_Forcing_Plus/framewise/model.pt": (
        "sgf-plus-framewise",
        {"chunk": 1, "window": 21, "sink": 4, "position_range": 21},
    ),
    "OneForcing/checkpoints/one_forcing.pt": ("one-forcing", {"chunk": 1, "steps": (1000,)}),
    "MemFlow/base.pt": ("memflow", {"window": 12, "sink": 3, "bank": Bank(3, 3)}),
    "StreamDiffusionV2/wan_causal_dmd_v2v/model.pt": (
        "streamdiffusion-v2",
        {"chunk": 1, "window": 6, "steps": (750, 250)},
    ),
    f"rcm-Wan/{RCM}_c3-3_step4.pt": ("causal-rcm", {"chunk": 3, "steps": (999, 937, 833, 625), "warp": False}),
    f"rcm-Wan/{RCM}_c3-3_step2.pt": ("causal-rcm-2step", {"chunk": 3, "steps": (999, 833), "warp": False}),
    f"rcm-Wan/{RCM}_c3-3_step1.pt": ("causal-rcm-1step", {"chunk": 3, "steps": (999,), "warp": False}),
    f"{RCM}_c1-1_step4.pt": ("causal-rcm-framewise", {"chunk": 1, "steps": (999, 937, 833, 625)}),
    f"{RCM}_c1-1_step2.pt": ("causal-rcm-framewise-2step", {"chunk": 1, "steps": (999, 833)}),
    f"{RCM}_c1-1_step1.pt": ("causal-rcm-framewise-1step", {"chunk": 1, "steps": (999,)}),
    "krea-realtime-video/krea-realtime-video-14b.safetensors": (
        "krea-14b",
        {"chunk": 3, "window": 6, "shift": 5, "reencode": True},
    ),
    # As Hugging Face keeps them, and as people name their own folders.
    "models--JunhaoZhuang--Self_Gradient_Forcing/snapshots/0a1b2c/framewise/ar/model.pt": (
        "self-gradient-forcing-framewise",
        {"chunk": 1},
    ),
    "models/diffusion_models/SGF+/framewise/model.pt": ("sgf-plus-framewise", {"chunk": 1}),
    "LongLive/self_forcing_dmd.pt": ("self-forcing", {"window": 21}),
    "framewise comparison/causal_forcing_chunkwise.pt": ("causal-forcing", {"chunk": 3}),
}


def write(path: Path, state: dict, metadata: dict | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"generator_ema": state}, path) if path.suffix == ".pt" else save_file(state, path, metadata)
    return path


def published_state(name: str) -> dict:
    if "Diffusers" in name:
        return diffusers(weights())
    if RCM in name:
        state = weights()
        state["patch_embedding.weight"] = state["patch_embedding.weight"].flatten(1)
        return prefixed(state, "net.") | {
            "net.accum_video_sample_counter": torch.zeros(()),
            "net.accum_x": torch.ones(1),
        }
    if "Plus" in name or "SGF+" in name:
        return with_memory(weights(), weights(seed=1))
    if "LongLive-2.0" in name:
        return prefixed(weights(replace(SMALL, channels=48)), "model.")
    return fsdp(weights())


def with_memory(state: dict, memory: dict) -> dict:
    """Both sets of weights of SGF+ under its names."""
    renamed = {}
    for name, tensor in memory.items():
        layer, _, last = name.rpartition(".")
        renamed[f"{layer}.memory_{last}" if name.startswith("blocks.") else f"memory_{name}"] = tensor
    return prefixed(state | renamed, "model.")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_file_gets_its_family_and_settings(tmp_path, name):
    family, settings = PUBLISHED[name]
    path = write(tmp_path / name, published_state(name))
    about = describe(path)
    assert about.family == family and about.known and about.causal, about.note
    assert {setting: getattr(about.sampling, setting) for setting in settings} == settings
    assert about.sampling == FAMILIES[family].sampling
    assert FAMILIES[family].licence in about.note and FAMILIES[family].page in about.note
    assert "NOTHING TELLS" not in about.note


def test_every_family_is_one_of_a_published_file():
    assert {family for family, _ in PUBLISHED.values()} | {"longlive-infinity"} == FAMILIES.keys()


@pytest.mark.parametrize("name", ["model.pt", "ar/model.pt", "models/diffusion_models/wan/model_bf16.safetensors"])
def test_where_nothing_tells_it_is_said_with_what_is_assumed(tmp_path, name):
    note = (about := describe(write(tmp_path / name, weights()))).note
    assert not about.known and about.family == "self-forcing"
    assert note.startswith("NOTHING TELLS WHICH MODEL THIS IS") and "4 steps with chunks of 3" in note
    assert "Load Self Forcing Model" in note and "--family" in note
    assert "Licence" not in note  # of a model that it may not be


def test_folders_above_the_models_folder_do_not_count(tmp_path):
    path = tmp_path / "longlive" / "models" / "diffusion_models" / "model.pt"
    assert not describe(write(path, weights())).known


def test_metadata_tell_the_family(tmp_path):
    titled = write(tmp_path / "a.safetensors", weights(), {"modelspec.title": "One-Forcing 1.3B"})
    assert describe(titled).family == "one-forcing"
    named = write(tmp_path / "self_forcing_dmd.safetensors", weights(), {"family": "memflow"})
    assert describe(named).family == "memflow" and 'metadata says "memflow"' in describe(named).note


def test_a_layout_that_nothing_tells_is_said_to_be_assumed(tmp_path):
    note = describe(write(tmp_path / "Self_Gradient_Forcing" / "model.pt", weights())).note
    assert "Nothing tells chunk-wise from frame-wise: chunk-wise is assumed" in note


@pytest.mark.parametrize("name", ["LongLive-1.3B/longlive_base.pt", "MemFlow/base.pt"])
def test_a_base_without_its_lora_is_said_to_be_half(tmp_path, name):
    path, lora = write(tmp_path / name, weights()), tmp_path / "lora.pt"
    q = "base_model.model.blocks.0.self_attn.q"
    torch.save({f"{q}.lora_A.weight": torch.ones(2, 128), f"{q}.lora_B.weight": torch.ones(128, 2)}, lora)
    assert "This is the base alone" in describe(path).note
    assert "This is the base alone" not in describe(path, loras=[(lora, 1.0)]).note


@pytest.mark.parametrize("name", ["wan_causal_ode_checkpoint_model_003000/model.pt", "CausVid/ode_init.pt"])
def test_a_stage_before_the_last_is_said_to_be_one(tmp_path, name):
    assert "stage of training before the last" in describe(write(tmp_path / name, weights())).note


def test_causal_rcm_is_the_model_it_was_saved_from(tmp_path):
    name = f"{RCM}_c3-3_step4.pt"
    model, checkpoint = load_model(write(tmp_path / name, published_state(name)))
    assert model.state_dict().keys() == weights().keys()
    assert all(torch.equal(tensor, weights()[name]) for name, tensor in model.state_dict().items())
    assert checkpoint.tensors == len(weights())


def test_sgf_plus_holds_two_networks(tmp_path):
    path = write(tmp_path / "sgf-plus" / "chunkwise" / "model.pt", with_memory(weights(), weights(seed=1)))
    model, checkpoint = load_model(path)
    memory = load_memory(checkpoint, "cpu", torch.float32)
    assert checkpoint.networks == 2 and checkpoint.parameters == 2 * sum(w.numel() for w in weights().values())
    assert all(torch.equal(tensor, weights()[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, weights(seed=1)[name]) for name, tensor in memory.state_dict().items())


def test_the_memory_network_needs_no_head(tmp_path):
    state = with_memory(weights(), weights(seed=1))
    state = {name: tensor for name, tensor in state.items() if "memory_head" not in name}
    checkpoint = load_checkpoint(write(tmp_path / "sgf-plus.pt", state))
    assert torch.equal(checkpoint.memory["head.head.weight"], weights()["head.head.weight"])
    del state["model.blocks.1.ffn.0.memory_bias"]
    with pytest.raises(ValueError, match="without a tensor of its kind .blocks.1.ffn.0.bias"):
        load_checkpoint(write(tmp_path / "sgf-plus.pt", state))


def test_one_network_has_no_memory(tmp_path):
    checkpoint = load_checkpoint(write(tmp_path / "self_forcing_dmd.pt", weights()))
    assert checkpoint.memory is None and load_memory(checkpoint, "cpu", torch.float32) is None


FOURTEEN = WanConfig(dim=5120, ffn_dim=13824, heads=40, layers=40)


def test_krea_passes_at_its_full_size_and_other_14b_models_do_not(tmp_path):
    about = describe(write_sparse(tmp_path / "krea-realtime-video-14b.safetensors", shapes(FOURTEEN)))
    assert about.config == FOURTEEN and about.family == "krea-14b"
    with pytest.raises(ValueError, match="14B model that nothing calls causal"):
        describe(write_sparse(tmp_path / "wan2.1_14b.safetensors", shapes(FOURTEEN)))


@pytest.mark.parametrize(
    "name",
    ["Wan21_CausVid_bidirect2_T2V_1_3B.safetensors", "rcm-Wan/rCM_Wan2.1_T2V_1.3B_480p.pt", "wan2.1_t2v_1.3B.pt"],
)
def test_models_that_are_not_causal_are_not_taken_for_one(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    torch.save(weights(), path) if path.suffix == ".pt" else save_file(weights(), path)
    about = describe(path)
    assert not about.known and not about.causal and "Nothing says that this model is causal" in about.note


def test_causal_metadata_alone_do_not_tell_the_family(tmp_path):
    about = describe(write(tmp_path / "mine.safetensors", weights(), CAUSAL))
    assert about.causal and not about.known and "NOTHING TELLS" in about.note


def test_names_are_read_whatever_separates_their_words():
    for name in ("SelfGradientForcing", "self gradient forcing", "SELF.GRADIENT.FORCING"):
        assert guess_family(f"{name}_framewise.pt").family == "self-gradient-forcing-framewise"


def test_own_sampling_in_metadata_is_read_with_its_memory_bank(tmp_path):
    from dataclasses import asdict

    sampling = replace(FAMILIES["memflow"].sampling, shift=3)
    metadata = {"sampling": json.dumps(asdict(sampling)), "wan": json.dumps({"heads": SMALL.heads})}
    assert describe(write(tmp_path / "x.safetensors", weights(), metadata)).sampling == sampling


@pytest.mark.parametrize("family", FAMILIES)
def test_the_documentation_has_every_family_with_its_numbers(family):
    text = (Path(__file__).parents[2] / "docs" / "files.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith(f"| `{family}` |")]
    assert len(rows) == 2
    sampling, about = FAMILIES[family].sampling, FAMILIES[family]
    steps = ", ".join(f"{step:g}" for step in sampling.steps)
    assert f"| {sampling.chunk} | {steps}" in rows[0] and f"| {sampling.window} | {sampling.sink}" in rows[0]
    assert all(f"| {part} |" in rows[1] for part in (about.size, about.licence, about.page, about.source))
