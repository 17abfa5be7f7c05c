"""Every file that is taken for another is called what it is, by every loader; autoencoders load from every wrapping."""

import re

import pytest
import torch
from safetensors.torch import save_file

from sf_core.autoencoders.taehv import TAEHV
from sf_core.autoencoders.wan_vae import Layout, WanVAE
from sf_core.checkpoints.autoencoder import load_autoencoder, wan_vae_names
from sf_core.checkpoints.identify import identify_tensors
from sf_core.checkpoints.load import describe, load_checkpoint
from sf_core.checkpoints.lora import read_lora
from sf_core.checkpoints.tensorfiles import CheckpointError
from sf_core.text_encoder import bytes_loaded, load_text_encoder
from tests.core import test_checkpoint as checkpoints
from tests.core import test_taehv as taehvs
from tests.core import test_vae as vaes

# Names as the published files have them: what the file is, its folder.
FILES = {
    "Wan": (["blocks.0.self_attn.q.weight", "patch_embedding.weight"], "a Wan diffusion model", "diffusion_models"),
    "Wan under FSDP": (
        ["generator.model._fsdp_wrapped_module.blocks.0._fsdp_wrapped_module.self_attn.q.weight"],
        "a Wan diffusion model",
        "diffusion_models",
    ),
    "Wan of Diffusers": (
        ["condition_embedder.time_embedder.linear_1.weight", "blocks.0.attn1.to_q.weight"],
        "a Wan diffusion model",
        "diffusion_models",
    ),
    "Wan with its VAE": (
        ["model.diffusion_model.blocks.3.cross_attn.k.bias", "vae.decoder.middle.0.residual.0.gamma"],
        "a Wan diffusion model",
        "diffusion_models",
    ),
    "Wan 2.1 VAE": (["conv1.weight", "decoder.middle.0.residual.0.gamma"], "the Wan 2.1 VAE", "vae"),
    "Wan 2.1 VAE, half": (["encoder.downsamples.0.residual.0.gamma"], "the Wan 2.1 VAE", "vae"),
    "Wan 2.1 VAE of Diffusers": (
        ["encoder.conv_in.weight", "decoder.mid_block.resnets.0.norm1.gamma", "quant_conv.bias"],
        "the Wan 2.1 VAE",
        "vae",
    ),
    "Wan 2.2 VAE": (
        ["decoder.middle.0.residual.0.gamma", "decoder.upsamples.0.upsamples.0.residual.0.gamma"],
        "the Wan 2.2 VAE",
        "vae",
    ),
    "Wan 2.2 VAE of Diffusers": (
        ["decoder.mid_block.resnets.0.norm1.gamma", "decoder.up_blocks.0.upsampler.time_conv.weight"],
        "the Wan 2.2 VAE",
        "vae",
    ),
    "SD VAE": (["encoder.mid.block_1.norm1.weight", "decoder.conv_in.weight"], "an image VAE", "vae"),
    "SD VAE of Diffusers": (["encoder.mid_block.resnets.0.norm1.weight", "quant_conv.bias"], "an image VAE", "vae"),
    "TAEHV": (["encoder.0.weight", "decoder.3.conv.0.weight"], "a TAEHV", "vae_approx"),
    "TAESD": (["1.weight", "3.conv.0.weight"], "a TAESD, the tiny autoencoder of image models", "vae_approx"),
    "TAESD of Diffusers": (["decoder.layers.2.conv.0.weight"], "a TAESD", "vae_approx"),
    "UMT5": (["shared.weight", "encoder.block.1.layer.0.layer_norm.weight"], "a text encoder (T5)", "text_encoders"),
    "UMT5 of Wan": (["token_embedding.weight", "blocks.0.attn.q.weight"], "a text encoder (T5)", "text_encoders"),
    "language model": (["model.layers.0.self_attn.q_proj.weight"], "a language model", "text_encoders"),
    "CLIP": (
        ["text_model.embeddings.token_embedding.weight", "text_model.encoder.layers.0.mlp.fc1.weight"],
        "a CLIP encoder",
        "text_encoders",
    ),
    "CLIP of OpenCLIP": (["token_embedding.weight", "transformer.resblocks.0.ln_1.weight"], "a CLIP e", "text_enc"),
    "CLIP vision": (["vision_model.embeddings.patch_embedding.weight"], "a CLIP vision encoder", "clip_vision"),
    "CLIP of Wan": (["visual.transformer.0.attn.to_qkv.weight", "visual.conv1.weight"], "a CLIP vision", "clip_vision"),
    "LoRA": (["diffusion_model.blocks.0.self_attn.q.lora_A.weight"], "a LoRA", "loras"),
    "LoRA of kohya": (["lora_unet_down_blocks_0_attentions_0.lora_up.weight"], "a LoRA", "loras"),
    "SD": (["cond_stage_model.x", "first_stage_model.decoder.conv_in.weight"], "a Stable Diffusion c", "checkpoints"),
    "SDXL": (["conditioner.embedders.0.transformer.text_model.x"], "a Stable Diffusion XL checkpoint", "checkpoints"),
    "SD UNet": (["time_embedding.linear_1.bias", "down_blocks.0.x"], "a Stable Diffusion UNet", "diffusion"),
    "Flux": (["double_blocks.0.img_attn.qkv.weight"], "an image model (Flux", "diffusion_models"),
    "SD3 with its encoders": (
        ["model.diffusion_model.joint_blocks.0.x_block.x", "text_encoders.t5xxl.transformer.shared.weight"],
        "an image model (Stable Diffusion 3)",
        "diffusion_models",
    ),
    "HunyuanVideo": (
        ["txt_in.individual_token_refiner.blocks.0.x", "double_blocks.0.img_attn.qkv.weight"],
        "a HunyuanVideo model",
        "diffusion_models",
    ),
    "ControlNet": (["control_model.input_blocks.0.0.bias", "control_model.label_emb.0.0.bias"], "a Contr", "contr"),
    "ControlNet of Diffusers": (
        ["controlnet_cond_embedding.conv_in.weight", "time_embedding.linear_1.bias"],
        "a ControlNet",
        "controlnet",
    ),
    "ESRGAN": (["model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight"], "an upscale model", "upscale_models"),
    "Real-ESRGAN": (["params_ema.conv_first.weight", "params_ema.body.0.rdb1.conv1.weight"], "an upscale", "upscale"),
    "Real-ESRGAN, compact": (["params.body.0.weight", "params.body.1.weight"], "an upscale model", "upscale_models"),
    "embedding": (["string_to_param.*"], "an embedding (textual inversion)", "embeddings"),
    "embedding of SDXL": (["clip_g", "clip_l"], "an embedding (textual inversion)", "embeddings"),
}  # fmt: skip


@pytest.mark.parametrize("names, what, folder", FILES.values(), ids=FILES.keys())
def test_published_files_are_known_by_their_names(names, what, folder):
    got = identify_tensors(names)
    assert got[0].startswith(what) and got[1].startswith(f"models/{folder}"), got


@pytest.mark.parametrize("names", [[], ["x"], ["layer.0.weight", "norm.bias"]])
def test_other_tensors_are_not_known(names):
    assert identify_tensors(names) is None


READERS = {
    "model": (describe, "a causal Wan 2.1 text-to-video model is needed"),
    "VAE": (lambda path: load_autoencoder(path, WanVAE, 16), "the Wan 2.1 VAE is needed here"),
    "TAEHV": (lambda path: load_autoencoder(path, TAEHV, 16), "a TAEHV for Wan 2.1 (taew2_1) is needed here"),
    "text encoder": (load_text_encoder, "Needed is the UMT5-XXL encoder"),
    "its size": (bytes_loaded, "Needed is the UMT5-XXL encoder"),
    "LoRA": (lambda path: read_lora(path, checkpoints.weights()), "a LoRA made for this model is needed"),
}
RIGHT = {  # the files that a loader takes up, and refuses as not whole
    "model": ("Wan", "Wan of Diffusers", "Wan under FSDP", "Wan with its VAE", "LoRA", "LoRA of kohya"),
    "VAE": ("Wan 2.1 VAE", "Wan 2.1 VAE, half", "Wan 2.1 VAE of Diffusers", "Wan with its VAE"),
    "TAEHV": ("TAEHV",),
    "text encoder": ("UMT5", "UMT5 of Wan"),
    "its size": ("UMT5", "UMT5 of Wan"),
    "LoRA": ("LoRA", "LoRA of kohya"),
}


@pytest.mark.parametrize("reader", READERS)
def test_every_loader_says_what_another_file_is_and_where_it_belongs(tmp_path, reader):
    load, needed = READERS[reader]
    for kind, (names, what, folder) in FILES.items():
        path = tmp_path / f"{kind}.safetensors"
        save_file({name: torch.ones(2, 2) for name in names}, path)
        with pytest.raises(ValueError) as caught:
            load(path)
        message = str(caught.value)
        assert path.name in message and "Got " in message and len(message) < 700, message
        if kind not in RIGHT[reader]:
            assert what in message and needed in message and f"models/{folder}" in message, message


def test_a_text_encoder_given_as_the_vae(tmp_path):
    save_file({"shared.weight": torch.ones(2, 2)}, tmp_path / "umt5_xxl.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_autoencoder(tmp_path / "umt5_xxl.safetensors", WanVAE, 16)
    assert str(caught.value) == (
        "Got umt5_xxl.safetensors, a text encoder (T5); the Wan 2.1 VAE is needed here. It belongs in "
        "models/text_encoders. Get wan_2.1_vae.safetensors (Comfy-Org/Wan_2.1_ComfyUI_repackaged) or Wan2.1_VAE.pth "
        "(Wan-AI/Wan2.1-T2V-1.3B)."
    )


def test_parts_of_a_model_are_called_so(tmp_path):
    save_file({"blocks.1.self_attn.q.weight": torch.ones(2, 2)}, tmp_path / "part.safetensors")
    with pytest.raises(CheckpointError, match="Got part.safetensors, a part of a Wan model; .* is needed, whole"):
        load_checkpoint(tmp_path / "part.safetensors")


# --- Autoencoders in other wrappings ---------------------------------------------------------------------------------

RESIDUAL = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2"}
RESIDUAL["shortcut"] = "conv_shortcut"
TOP = {"conv1": "quant_conv", "conv2": "post_quant_conv"}
PARTS = {"conv1": "conv_in", "head.0": "norm_out", "head.2": "conv_out"}


def diffusers_vae(state, blocks):
    """A Wan VAE's tensors under the names of Diffusers' AutoencoderKLWan. `blocks`: Residuals a size in the encoder."""
    return {_diffusers_name(name, blocks + 1): tensor for name, tensor in state.items()}


def _diffusers_name(name, resnets):
    half, _, rest = name.partition(".")
    if half in TOP:
        return f"{TOP[half]}.{rest}"
    layer, _, last = rest.rpartition(".")
    if layer in PARTS:
        return f"{half}.{PARTS[layer]}.{last}"
    place, number, inside = layer.split(".", 2)
    inside = RESIDUAL.get(inside, inside)
    if place == "middle":
        where = "attentions.0" if number == "1" else f"resnets.{int(number) // 2}"
        return f"{half}.mid_block.{where}.{inside}.{last}"
    if place == "downsamples":
        return f"{half}.down_blocks.{number}.{inside}.{last}"
    block, within = divmod(int(number), resnets + 1)
    where = f"resnets.{within}" if within < resnets else "upsamplers.0"
    return f"{half}.up_blocks.{block}.{where}.{inside}.{last}"


LAYOUTS = {"one": vaes.SMALL, "two": Layout(widths=(2, 4, 4, 4)), "three": Layout(widths=(2, 2, 4, 4), blocks=3)}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_vae_of_diffusers_decodes_and_encodes_to_the_bit_as_wans(tmp_path, layout):
    vae = vaes.autoencoder(layout)
    renamed = diffusers_vae(vae.state_dict(), layout.blocks)
    assert len(renamed) == len(vae.state_dict()) and not renamed.keys() & (vae.state_dict().keys())
    save_file(renamed, tmp_path / "diffusion_pytorch_model.safetensors")
    loaded = load_autoencoder(tmp_path / "diffusion_pytorch_model.safetensors", WanVAE, 16)
    assert checkpoints.same(loaded.state_dict(), vae.state_dict())
    latents = vaes.drawn(1, 16, 3, 2, 2)
    assert torch.equal(loaded.decode(latents), vae.decode(latents))
    frames = vaes.clip(1, 5, 16, 16, 3)
    assert torch.equal(loaded.encode(frames), vae.encode(frames))


def test_all_194_names_of_the_published_vae_are_wans():
    with torch.device("meta"):
        state = WanVAE().state_dict()
    renamed = diffusers_vae(state, 2)
    assert len(renamed) == 194 and wan_vae_names(renamed) == list(state)
    assert "decoder.up_blocks.1.resnets.0.conv_shortcut.weight" in renamed
    assert "decoder.up_blocks.2.upsamplers.0.resample.1.weight" in renamed
    assert "decoder.up_blocks.3.resnets.2.conv2.bias" in renamed and "encoder.down_blocks.10.norm1.gamma" in renamed
    assert "encoder.mid_block.attentions.0.to_qkv.weight" in renamed
    assert re.search(r"'encoder.down_blocks.5.time_conv.weight'", str(list(renamed)))


PREFIXES = ["", "vae.", "first_stage_model.", "model.", "module.vae.", "_orig_mod."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("names", ["wan", "diffusers", "taehv"])
def test_prefixes_are_stripped(tmp_path, prefix, names):
    network = taehvs.autoencoder(taehvs.SMALL) if names == "taehv" else vaes.autoencoder(vaes.SMALL)
    state = network.state_dict()
    named = diffusers_vae(state, vaes.SMALL.blocks) if names == "diffusers" else state
    beside = {"model.diffusion_model.blocks.0.self_attn.q.weight": torch.ones(2)} if prefix.endswith("vae.") else {}
    save_file(checkpoints.prefixed(named, prefix) | beside, tmp_path / "vae.safetensors")
    loaded = load_autoencoder(tmp_path / "vae.safetensors", type(network), 16)
    assert checkpoints.same(loaded.state_dict(), state)


@pytest.mark.parametrize("wrap", [lambda s: {"state_dict": s}, lambda s: {"model": {"vae": s}, "step": 4}])
def test_nested_dicts_are_opened(tmp_path, wrap):
    vae = vaes.autoencoder(vaes.SMALL)
    for named in (vae.state_dict(), diffusers_vae(vae.state_dict(), 1)):
        torch.save(wrap(named), tmp_path / "vae.pt")
        loaded = load_autoencoder(tmp_path / "vae.pt", WanVAE, 16)
        assert checkpoints.same(loaded.state_dict(), vae.state_dict())


def changed(**tensors):
    state = vaes.autoencoder(vaes.SMALL).state_dict()
    return {
        name: t for name, t in (state | {k.replace("__", "."): t for k, t in tensors.items()}).items() if t is not None
    }


BROKEN = {
    "missing": (changed(decoder__head__2__bias=None), "decoder.head.2.bias is missing"),
    "unknown": (changed(post__weight=torch.ones(2)), "post.weight is missing, unknown"),
    "no start": (changed(decoder__middle__0__residual__0__gamma=None), "the Wan 2.1 VAE without its decoder.middle.0"),
    "int8": (changed(conv1__bias=torch.ones(32, dtype=torch.int8)), "whose conv1.bias is int8; weights of an auto"),
    "48 channels": (WanVAE(Layout(channels=48, widths=(2, 4, 4, 4))).state_dict(), "for 48 channels, not 16"),
}  # fmt: skip


@pytest.mark.parametrize("state, what", BROKEN.values(), ids=BROKEN.keys())
def test_a_vae_that_is_not_whole_is_refused(tmp_path, state, what):
    save_file(state, tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match=f"vae.safetensors.*{what}"):
        load_autoencoder(tmp_path / "vae.safetensors", WanVAE, 16)


def test_a_taehv_of_another_model_is_refused(tmp_path):
    save_file(taehvs.autoencoder(taehvs.TAEW2_2).state_dict(), tmp_path / "taew2_2.safetensors")
    with pytest.raises(CheckpointError, match="latents of 48 channels; the model makes 16. Get .*taew2_1"):
        load_autoencoder(tmp_path / "taew2_2.safetensors", TAEHV, 16)
