"""LoRAs merged into a checkpoint: every form they come in, and every file that is taken for one."""

import json
import math
import re

import pytest
import torch
from safetensors.torch import save_file

from sf_core.checkpoints.load import CheckpointError, describe, load_checkpoint, load_model
from sf_core.checkpoints.lora import read_lora
from sf_core.training.config import LoraConfig
from sf_core.training.lora import PREFIX, adapter_file, add_adapters, merge_adapters
from sf_core.wan.model import WanModel
from tests.core.test_checkpoint import SMALL, float8, forward, fsdp, legacy, same, weights

RANK = 4
LAYERS = [f"blocks.{i}.{layer}" for i in range(2) for layer in ("self_attn.q", "cross_attn.o", "ffn.0", "ffn.2")]
BASE = weights()


def pairs(layers=LAYERS, seed=7):
    """{layer: (down, up)} of random numbers."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for layer in layers:
        out, width = BASE[f"{layer}.weight"].shape
        found[layer] = (torch.randn(RANK, width, generator=generator), torch.randn(out, RANK, generator=generator))
    return found


def written(prefix="base_model.model.", down="lora_A.weight", up="lora_B.weight", alpha=None, dots=".", lora=None):
    """The pairs under a format's names."""
    tensors = {}
    for layer, (a, b) in (lora or pairs()).items():
        at = prefix + layer.replace(".", dots)
        tensors |= {f"{at}.{down}": a, f"{at}.{up}": b} | (
            {} if alpha is None else {f"{at}.alpha": torch.tensor(alpha)}
        )
    return tensors


def expected(strength=1.0, lora=None):
    state = dict(BASE)
    for layer, (down, up) in (lora or pairs()).items():
        state[f"{layer}.weight"] = BASE[f"{layer}.weight"] + strength * (up @ down)
    return state


@pytest.fixture
def base(tmp_path):
    torch.save({"generator": fsdp(BASE)}, tmp_path / "longlive_base.pt")
    return tmp_path / "longlive_base.pt"


def check(base, lora, strength=1.0, scale=1.0):
    state = load_checkpoint(base, loras=[(lora, strength)]).state_dict
    want = expected(strength * scale)
    assert state.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(state[name], tensor, atol=1e-6, rtol=1e-5)


OLD = {"down": "lora_down.weight", "up": "lora_up.weight"}
FORMATS = {
    "PEFT": ({}, 1),
    "PEFT with an adapter's name": ({"down": "lora_A.default.weight", "up": "lora_B.default.weight"}, 1),
    "ComfyUI": ({"prefix": "diffusion_model.", "alpha": 2.0}, 2 / RANK),
    "ComfyUI, up and down": ({"prefix": "diffusion_model.", **OLD, "alpha": 8.0}, 8 / RANK),
    "underscores": ({"prefix": "lora_unet_", "dots": "_", **OLD, "alpha": 4.0}, 1),
    "two underscores": ({"prefix": "lora_unet__", "dots": "_", **OLD}, 1),
    "lycoris": ({"prefix": "lycoris_", "dots": "_", **OLD, "alpha": 2.0}, 2 / RANK),
    "OneTrainer": ({"prefix": "lora_transformer_", "dots": "_", **OLD}, 1),
    "diffusers' lora.down": ({"prefix": "", "down": "lora.down.weight", "up": "lora.up.weight"}, 1),
    "without weight": ({"prefix": "", "down": "lora_A", "up": "lora_B"}, 1),
    "bare": ({"prefix": ""}, 1),
    "under FSDP": ({"prefix": "base_model.model._fsdp_wrapped_module."}, 1),
}


@pytest.mark.parametrize("names, scale", FORMATS.values(), ids=FORMATS.keys())
def test_every_format_is_merged(base, names, scale):
    lora = base.with_name("lora.safetensors")
    save_file(written(**names), lora)
    check(base, lora, scale=scale)


METADATA = {
    "diffusers": {"lora_adapter_metadata": json.dumps({"transformer.r": RANK, "transformer.lora_alpha": 8})},
    "kohya": {"ss_network_alpha": "8.0"},
}


@pytest.mark.parametrize("metadata", METADATA.values(), ids=METADATA.keys())
def test_alpha_is_what_the_metadata_says(base, metadata):
    lora = base.with_name("lora.safetensors")
    save_file(written(), lora, metadata)
    check(base, lora, scale=8 / RANK)
    save_file(written(alpha=2.0), lora, metadata)  # the tensors come first
    check(base, lora, scale=2 / RANK)


def test_alpha_is_what_pefts_configuration_beside_the_file_says(base):
    lora = base.with_name("adapter_model.safetensors")
    save_file(written(), lora)
    base.with_name("adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": 6}))
    check(base, lora, scale=6 / RANK)


def test_rank_stabilised_alpha_is_divided_by_the_root_of_the_rank(base):
    lora = base.with_name("adapter_model.safetensors")
    save_file(written(), lora)
    base.with_name("adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": 6, "use_rslora": True}))
    check(base, lora, scale=6 / math.sqrt(RANK))
    save_file(written(alpha=2.0), lora)  # LyCORIS writes an alpha that has the root in it
    check(base, lora, scale=2 / RANK)
    save_file(written(), lora, {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 8, "unet.use_rslora": True})})
    check(base, lora, scale=8 / math.sqrt(RANK))


def test_alpha_of_single_layers_is_what_pefts_pattern_says(base):
    lora = base.with_name("adapter_model.safetensors")
    save_file(written(), lora)
    config = {"r": RANK, "lora_alpha": 6, "alpha_pattern": {"self_attn.q": 10}, "use_rslora": True}
    base.with_name("adapter_config.json").write_text(json.dumps(config))
    state = load_checkpoint(base, loras=[(lora, 1.0)]).state_dict
    for layer, (down, up) in pairs().items():
        alpha = 10 if layer.endswith("self_attn.q") else 6
        want = BASE[f"{layer}.weight"] + alpha / math.sqrt(RANK) * up @ down
        torch.testing.assert_close(state[f"{layer}.weight"], want, atol=1e-5, rtol=1e-5)


def test_pefts_configuration_scales_kronecker_products_of_whole_matrices(base):
    lora, at = base.with_name("adapter_model.safetensors"), "base_model.model.blocks.0.ffn.0"
    first, second = torch.randn(4, 2), torch.randn(16, 64)
    save_file({f"{at}.lokr_w1": first, f"{at}.lokr_w2": second}, lora)
    base.with_name("adapter_config.json").write_text(json.dumps({"r": 8, "alpha": 2}))
    state = load_checkpoint(base, loras=[(lora, 0.5)]).state_dict
    want = BASE["blocks.0.ffn.0.weight"] + 0.5 * 2 / 8 * torch.kron(first, second)
    torch.testing.assert_close(state["blocks.0.ffn.0.weight"], want, atol=1e-6, rtol=1e-5)


def test_layers_of_another_shape_are_left_out_where_others_fit(base):
    lora = base.with_name("lora.safetensors")
    wide = {"diffusion_model.patch_embedding.lora_A.weight": torch.ones(4, 36, 1, 2, 2)}
    wide["diffusion_model.patch_embedding.lora_B.weight"] = torch.ones(128, 4, 1, 1, 1)
    save_file(written() | wide, lora)
    check(base, lora)
    assert read_lora(lora, BASE).left_out == ["diffusion_model.patch_embedding"]


EMBEDDERS = {
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "head.head": "proj_out",
}


@pytest.mark.parametrize("prefix, dot", [("transformer.", "."), ("lycoris_", "_"), ("lora_transformer_", "_")])
def test_diffusers_embedders_are_wans(base, prefix, dot):
    lora, tensors, found = base.with_name("lora.safetensors"), {}, pairs(list(EMBEDDERS))
    for layer, (down, up) in found.items():
        at = prefix + EMBEDDERS[layer].replace(".", dot)
        tensors |= {f"{at}.lora_down.weight": down, f"{at}.lora_up.weight": up}
    save_file(tensors, lora)
    state = load_checkpoint(base, loras=[(lora, 1.0)]).state_dict
    for layer, (down, up) in found.items():
        torch.testing.assert_close(state[f"{layer}.weight"], BASE[f"{layer}.weight"] + up @ down, atol=1e-5, rtol=1e-5)


def test_underscored_diffusers_layers_and_mixed_dots_are_wans(base):
    lora = base.with_name("lora.safetensors")
    save_file({underscored(diffusers_name(name)): t for name, t in written(prefix="", **OLD).items()}, lora)
    check(base, lora)
    mixed = {"lora_unet_" + name.replace("blocks.", "blocks_"): t for name, t in written(prefix="", **OLD).items()}
    save_file(mixed, lora)
    check(base, lora)


def underscored(name):
    layer, end = name.split(".lora_")
    return "lora_unet_" + layer.replace(".", "_") + ".lora_" + end


def test_layers_that_the_model_lacks_are_left_out_and_named(base):
    lora = base.with_name("lora.safetensors")
    others = {"diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight": torch.ones(4, 128), "extra": torch.ones(1)}
    save_file(written() | others, lora)
    check(base, lora)
    assert sorted(read_lora(lora, BASE).left_out) == ["diffusion_model.blocks.0.cross_attn.k_img", "extra"]
    assert "2 parts of it do not fit" in describe(base, loras=[(lora, 1.0)]).note


def test_differences_are_added_to_weights_and_biases(base):
    lora = base.with_name("lora.safetensors")
    parts = {"norm3.diff": "norm3.weight", "norm3.diff_b": "norm3.bias", "ffn.0.diff_b": "ffn.0.bias"}
    changes = {name: torch.full_like(BASE[f"blocks.1.{at}"], 2.0) for name, at in parts.items()}
    save_file({f"diffusion_model.blocks.1.{name}": tensor for name, tensor in changes.items()}, lora)
    state = load_checkpoint(base, loras=[(lora, 0.5)]).state_dict
    for at in parts.values():
        torch.testing.assert_close(state[f"blocks.1.{at}"], BASE[f"blocks.1.{at}"] + 1)


@pytest.mark.parametrize("strength", [0.5, 0.0, -1.0])
def test_strength_scales_what_is_added(base, strength):
    lora = base.with_name("lora.safetensors")
    save_file(written(), lora)
    check(base, lora, strength)


def test_a_training_runs_file_gives_the_generators(base):
    lora = base.with_name("lora.pt")
    torch.save({"generator_lora": written(), "critic_lora": written(lora=pairs(seed=8)), "step": 3000}, lora)
    check(base, lora)


def test_lora_of_our_own_training_gives_its_merged_model(base):
    config = LoraConfig(rank=RANK, alpha=6)
    wan = WanModel(SMALL)
    wan.load_state_dict(BASE)
    add_adapters(wan, config, seed=0)
    state = {name: 0.1 + value if name.endswith(".up") else value for name, value in wan.state_dict().items()}
    lora = base.with_name("lora.safetensors")
    save_file(adapter_file(state, config), lora)
    assert all(name.startswith(PREFIX) for name in adapter_file(state, config))
    got, want = load_checkpoint(base, loras=[(lora, 1.0)]).state_dict, merge_adapters(state, config)
    assert got.keys() == want.keys()
    assert all(torch.allclose(got[name], want[name], atol=1e-6) for name in want)


def test_diffusers_layers_are_wans(base):
    lora = base.with_name("lora.safetensors")
    save_file({diffusers_name(name): tensor for name, tensor in written(prefix="transformer.").items()}, lora)
    check(base, lora)


def diffusers_name(name):
    renames = {"self_attn.q": "attn1.to_q", "cross_attn.o": "attn2.to_out.0", "ffn.0": "ffn.net.0.proj"}
    for wans, theirs in (renames | {"ffn.2": "ffn.net.2"}).items():
        name = name.replace(wans, theirs)
    return name


def test_sums_are_float32_and_rounded_once(base, tmp_path):
    half, lora = tmp_path / "half.safetensors", tmp_path / "lora.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in BASE.items()}, half)
    save_file({name: tensor.bfloat16() for name, tensor in written().items()}, lora)
    state = load_checkpoint(half, loras=[(lora, 1.0)]).state_dict
    for layer, (down, up) in pairs().items():
        weight = BASE[f"{layer}.weight"].bfloat16().float() + up.bfloat16().float() @ down.bfloat16().float()
        assert torch.equal(state[f"{layer}.weight"], weight.bfloat16())


def test_the_model_computes_with_it(base):
    lora = base.with_name("lora.safetensors")
    save_file(written(), lora)
    model, checkpoint = load_model(base, loras=[(lora, 0.01)])
    plain = WanModel(SMALL)
    plain.load_state_dict(expected(0.01))
    torch.testing.assert_close(forward(model), forward(plain), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(forward(model), forward(load_model(base)[0]), atol=1e-3)
    assert "With lora.safetensors merged into it, strength 0.01." in checkpoint.note
    about = vars(describe(base, loras=[(lora, 0.01)]))
    assert about == {name: value for name, value in vars(checkpoint).items() if name not in ("state_dict", "memory")}


def test_without_a_lora_weights_are_those_of_the_file(base):
    assert same(load_checkpoint(base).state_dict, BASE)


def rescaled(path):
    """A LoRA of a model twice as wide."""
    wide = {layer: (torch.cat([a, a], 1), torch.cat([b, b])) for layer, (a, b) in pairs().items()}
    save_file(written(lora=wide), path)


def without(path, end):
    save_file({name: t for name, t in written().items() if not name.endswith(f"ffn.0.{end}")}, path)


def other_layers(path):
    lora = {f"double_blocks.0.{name}": pair for name, pair in pairs(["blocks.0.self_attn.q"]).items()}
    save_file({name.replace("blocks.0.self_attn.q", "img_attn.qkv"): t for name, t in written(lora=lora).items()}, path)


BAD = {
    "another width": (rescaled, r"adds \[256, 4\] x \[4, 256\] to blocks.0.cross_attn.o.weight; the model has"),
    "another model": (other_layers, "layers that the model does not have"),
    "no up": (lambda p: without(p, "lora_B.weight"), "ffn.0 lacks its lora_B"),
    "no down": (lambda p: without(p, "lora_A.weight"), "ffn.0 lacks its lora_A"),
    "a model": (lambda p: save_file(BASE, p), "a Wan diffusion model; a LoRA .* belongs in models/diffusion_models"),
    "half of LoHa": (lambda p: save_file({f"{LAYERS[0]}.hada_w1_a": torch.ones(128, 4)}, p), "lacks its hada_w1_b"),
    "half of LoKr": (lambda p: save_file({f"{LAYERS[0]}.lokr_w1": torch.ones(4, 4)}, p), "lacks its lokr_w2_a"),
    "LoKr of another model": (
        lambda p: save_file({f"{LAYERS[0]}.lokr_w{n}": torch.ones(4, 4) for n in (1, 2)}, p),
        r"adds \[4, 4\] x \[4, 4\] to blocks.0.self_attn.q.weight",
    ),
    "OFT of PEFT": (
        lambda p: save_file({f"{LAYERS[0]}.oft_R.weight": torch.ones(2, 6)}, p),
        "of a kind that is not read",
    ),
    "lengths alone": (lambda p: save_file({f"{LAYERS[0]}.dora_scale": torch.ones(128, 1)}, p), "does not have"),
    "two": (lambda p: save_file(written() | written(prefix="other."), p), "two LoRAs"),
    "integers": (
        lambda p: save_file({k: t.to(torch.int8) for k, t in written().items()}, p),
        "is int8; floating point",
    ),
    "nothing": (lambda p: save_file({}, p), "no tensors"),
    "no file": (lambda p: None, "does not exist"),
}


@pytest.mark.parametrize("build, what", BAD.values(), ids=BAD.keys())
def test_a_lora_that_cannot_be_merged_is_refused(base, build, what):
    lora = base.with_name("lora.safetensors")
    build(lora)
    for read in (describe, load_checkpoint):
        with pytest.raises(CheckpointError, match=what):
            read(base, loras=[(lora, 1.0)])


def test_a_float8_model_takes_none(tmp_path):
    state, scales = float8(BASE)
    save_file(state | legacy(scales, False)[0], tmp_path / "fp8.safetensors")
    save_file(written(), tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match="make it float8 with the LoRA in it"):
        describe(tmp_path / "fp8.safetensors", loras=[(tmp_path / "lora.safetensors", 1.0)])


def test_weights_are_made_as_they_are_read_and_the_file_stays(base):
    lora = base.with_name("lora.safetensors")
    save_file(written(), lora)
    before = base.read_bytes(), lora.read_bytes()
    state = load_checkpoint(base, loras=[(lora, 1.0)]).state_dict
    name = f"{LAYERS[0]}.weight"
    assert state[name] is not state[name] and len(state) == len(BASE)
    state[name].fill_(math.pi)
    assert (base.read_bytes(), lora.read_bytes()) == before
    torch.testing.assert_close(state[name], expected()[name])


# --- Several ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def several(base):
    """Three LoRAs: two over the same layers, and one of other differences, with a layer that the model lacks."""
    files = [base.with_name(name) for name in ("first.safetensors", "second.pt", "third.safetensors")]
    save_file(written(), files[0])
    torch.save({"generator_lora": written(lora=pairs(seed=8))}, files[1])
    more = {"diffusion_model.blocks.1.norm3.diff": torch.full((128,), 2.0), "extra": torch.ones(1)}
    save_file(written(prefix="diffusion_model.", lora=pairs(LAYERS[:1], seed=9)) | more, files[2])
    return files


def test_several_loras_are_all_merged(base, several):
    strengths = (1.0, -0.5, 2.0)
    state = load_checkpoint(base, loras=list(zip(several, strengths))).state_dict
    want = expected(1.0)
    for lora, strength in ((pairs(seed=8), -0.5), (pairs(LAYERS[:1], seed=9), 2.0)):
        for layer, (down, up) in lora.items():
            want[f"{layer}.weight"] = want[f"{layer}.weight"] + strength * up @ down
    want["blocks.1.norm3.weight"] = BASE["blocks.1.norm3.weight"] + 4.0
    assert state.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(state[name], tensor, atol=1e-4, rtol=1e-4)


def test_one_lora_twice_is_that_lora_with_the_sum_of_strengths(base, several):
    twice = load_checkpoint(base, loras=[(several[0], 0.25), (several[0], 0.5)]).state_dict
    once = load_checkpoint(base, loras=[(several[0], 0.75)]).state_dict
    assert all(torch.allclose(twice[name], once[name], atol=1e-5) for name in once)


def test_several_loras_are_rounded_once(tmp_path, several):
    half = tmp_path / "half.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in BASE.items()}, half)
    state = load_checkpoint(half, loras=[(several[0], 1.0), (several[1], 1.0)]).state_dict
    both = {layer: (pairs()[layer], pairs(seed=8)[layer]) for layer in LAYERS}
    for layer, ((a, b), (c, d)) in both.items():
        weight = (BASE[f"{layer}.weight"].bfloat16().float() + b @ a) + d @ c
        assert torch.equal(state[f"{layer}.weight"], weight.bfloat16())


def test_the_note_speaks_of_every_lora(base, several):
    note = describe(base, loras=list(zip(several, (1.0, -0.5, 2.0)))).note
    assert re.search(
        r"first.safetensors .*strength 1\. With second.pt .*strength -0.5\. With third.* strength 2\.", note
    )
    assert note.endswith("1 parts of it do not fit this model and are left out, such as extra.")


def test_one_wrong_lora_of_several_is_refused_by_its_name(base, several):
    save_file({"decoder.middle.0.residual.0.gamma": torch.ones(2)}, base.with_name("vae.safetensors"))
    loras = [(several[0], 1.0), (base.with_name("vae.safetensors"), 1.0)]
    for read in (describe, load_checkpoint, load_model):
        with pytest.raises(CheckpointError, match="Got vae.safetensors, the Wan 2.1 VAE; a LoRA .*models/vae"):
            read(base, loras=loras)
