"""A user's own files in ComfyUI: every format through the loaders, LoRAs, the samplers and the decoders.

The files are random and small, in exactly the formats that people have.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.host.core import core_latents

FRAMES = 9  # 3 latent frames, one chunk
CAUSAL = {"config": json.dumps({"transformer": {"causal_ar": True}})}


@pytest.fixture
def folder(comfyui, tmp_path, monkeypatch):
    """An empty models folder, known to the host for every kind of model used here."""
    import folder_paths

    for kind in ("diffusion_models", "loras", "vae", "vae_approx"):
        (tmp_path / kind).mkdir()
        extensions = folder_paths.folder_names_and_paths[kind][1]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(tmp_path / kind)], extensions))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


def wan_weights(dtype=torch.float32, seed=0) -> dict[str, torch.Tensor]:
    """A state dict under Wan's names, with Wan's own heads of 128 channels."""
    from any_folder_name.sf_core.wan.config import WanConfig
    from any_folder_name.sf_core.wan.model import WanModel

    torch.manual_seed(seed)
    config = WanConfig(dim=128, ffn_dim=256, heads=1, layers=2)
    wan = WanModel(config).initialise()
    torch.nn.init.normal_(wan.head.head.weight, std=0.02)
    return {name: tensor.detach().to(dtype) for name, tensor in wan.state_dict().items()}


def fp8_file(weights: dict, per_row: bool = False) -> dict:
    """The weights as ComfyUI's fp8-scaled files have them."""
    out = {}
    for name, tensor in weights.items():
        if name.startswith("blocks.") and tensor.ndim == 2:
            scale = tensor.abs().amax(1 if per_row else None, keepdim=per_row).float() / 448
            out[name] = (tensor / scale).to(torch.float8_e4m3fn)
            out[name.replace(".weight", ".scale_weight")] = scale
        else:
            out[name] = tensor
    return out | {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}


def save(folder, name: str, weights: dict, metadata: dict | None = None) -> str:
    path = folder / "diffusion_models" / name
    if path.suffix == ".safetensors":
        save_file({key: tensor.contiguous() for key, tensor in weights.items()}, path, metadata=metadata)
    else:
        torch.save({"generator_ema": {f"model.{key}": tensor for key, tensor in weights.items()}}, path)
    return name


FILES = {
    "published .pt": ("self_forcing_dmd.pt", wan_weights, "auto"),
    "safetensors in bf16": ("self_forcing.safetensors", lambda: wan_weights(torch.bfloat16), "auto"),
    "bf16 chosen": ("self_forcing.safetensors", wan_weights, "bf16"),
    "fp16 chosen": ("self_forcing.safetensors", wan_weights, "fp16"),
    "fp8 chosen": ("self_forcing.safetensors", wan_weights, "fp8"),
    "fp8 chosen for a .pt": ("self_forcing_dmd.pt", wan_weights, "fp8"),
    "fp8 file": ("self_forcing_fp8.safetensors", lambda: fp8_file(wan_weights()), "auto"),
    "fp8 file with a scale per row": ("self_forcing_rows.safetensors", lambda: fp8_file(wan_weights(), True), "auto"),
    "fp8 file to bf16": ("self_forcing_fp8.safetensors", lambda: fp8_file(wan_weights()), "bf16"),
}


@pytest.fixture
def latent():
    return {"samples": torch.zeros(1, 16, 3, 4, 4)}


@pytest.fixture
def prompt():
    return [[torch.randn(1, 20, 4096, generator=torch.Generator().manual_seed(1)), {}]]


@pytest.fixture
def sample(call, latent, prompt):
    """sample(model, ...) -> latents [1, 16, 3, 4, 4]."""

    def run(model, **changes) -> torch.Tensor:
        inputs = {
            "model": model, "positive": prompt, "latent": latent, "seed": 0, "preset": "auto",
            "steps": 0, "chunk": 0, "window": 0, "sink": -1, **changes,
        }  # fmt: skip
        return call("Sampler", **inputs)["samples"]

    return run


@pytest.fixture
def exact(prompt):
    """What the core makes of the same weights in float32, in raw VAE space."""
    return rolled_out(core_model(), prompt)


def core_model(state=None):
    from any_folder_name.sf_core.wan.config import WanConfig
    from any_folder_name.sf_core.wan.model import WanModel

    wan = WanModel(WanConfig(dim=128, ffn_dim=256, heads=1, layers=2))
    wan.load_state_dict(state or wan_weights())
    return wan


def rolled_out(wan, prompt) -> torch.Tensor:
    from any_folder_name.sf_core.autoencoders.wan_vae import from_model_space
    from any_folder_name.sf_core.sampling.families import FAMILIES

    sampling = FAMILIES["self-forcing"].sampling
    return from_model_space(core_latents(wan, sampling, prompt[0][0], 3, 4, 4))


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).square().mean() / b.square().mean()).sqrt().item()


# --- Quantised in ComfyUI's own forms --------------------------------------------------------------------------------


def quantised_file(weights: dict, form: str, **settings) -> dict:
    """The weights as ComfyUI's own quantiser makes them, each layer with its mark."""
    import comfy.quant_ops as quant

    out = dict(weights)
    layout = quant.get_layout_class(quant.QUANT_ALGOS[form]["comfy_tensor_layout"])
    for name in [name for name, tensor in weights.items() if name.startswith("blocks.") and tensor.ndim == 2]:
        data, params = layout.quantize(weights[name].bfloat16(), **settings)
        layer = name.removesuffix(".weight")
        scales = {"weight_scale": params.scale}
        if form == "nvfp4":
            scales = {"weight_scale": params.block_scale, "weight_scale_2": params.scale}
        raw = {key: scale.view(torch.uint8) if scale.dtype.itemsize == 1 else scale for key, scale in scales.items()}
        mark = torch.tensor(list(json.dumps({"format": form, **settings}).encode()), dtype=torch.uint8)
        out |= {name: data, f"{layer}.comfy_quant": mark, **{f"{layer}.{key}": scale for key, scale in raw.items()}}
    return out


FORMS = {
    "int8_tensorwise": {},
    "int8 with convrot": {"convrot": True, "convrot_groupsize": 64, "per_channel": True},
    "nvfp4": {},
    "mxfp8": {},
}


@pytest.mark.parametrize("form", FORMS)
def test_quantised_layers_are_handed_on_as_they_are(call, folder, sample, exact, form):
    import comfy.quant_ops as quant
    import nodes

    algorithm, settings = "int8_tensorwise" if form.startswith("int8") else form, FORMS[form]
    if algorithm not in quant.QUANT_ALGOS:
        pytest.skip(f"this ComfyUI does not know {algorithm}")
    file = save(
        folder, "self_forcing_quantised.safetensors", quantised_file(wan_weights(), algorithm, **settings), CAUSAL
    )
    model = call("LoadModel", file, "auto", "auto")
    weight = model.model.diffusion_model.blocks[0].ffn[0].weight
    assert isinstance(weight, quant.QuantizedTensor)
    assert torch.equal(
        weight._qdata.view(torch.uint8),
        load_file(folder / "diffusion_models" / file)["blocks.0.ffn.0.weight"].view(torch.uint8),
    )
    stock = nodes.UNETLoader().load_unet(file, "default")[0]
    assert torch.equal(sample(model), sample(stock))
    assert relative_error(sample(model), exact) < 0.35
    with pytest.raises(ValueError, match="Got the precision bf16 .*Set precision to auto"):
        call("LoadModel", file, "auto", "bf16")


def test_forms_that_the_host_does_not_know_are_refused(call, folder):
    weights, mark = wan_weights(), {"format": "convrot_w4a4", "convrot_groupsize": 256}
    weights["blocks.0.ffn.0.weight"] = torch.zeros(256, 64, dtype=torch.uint8)
    weights["blocks.0.ffn.0.comfy_quant"] = torch.tensor(list(json.dumps(mark).encode()), dtype=torch.uint8)
    weights["blocks.0.ffn.0.weight_scale"] = torch.ones(256, 2)
    file = save(folder, "self_forcing_w4a4.safetensors", weights, CAUSAL)
    with pytest.raises(ValueError, match="quantised as convrot_w4a4; this ComfyUI knows .*Update ComfyUI"):
        call("LoadModel", file, "auto", "auto")


def test_a_preferred_attention_is_handed_on(call, folder, monkeypatch):
    """Layers that know none of it leave it out."""
    import comfy.sd

    seen, load = {}, comfy.sd.load_diffusion_model_state_dict

    def watch(state, **settings):
        seen.update(state)
        return load(state, **settings)

    monkeypatch.setattr(comfy.sd, "load_diffusion_model_state_dict", watch)
    choice = torch.tensor(list(b'{"preferred_attention": "sage"}'), dtype=torch.uint8)
    weights = wan_weights() | {"blocks.1.self_attn.comfy_attention.config": choice}
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in weights.items()}
    call("LoadModel", save(folder, "self_forcing.safetensors", prefixed, CAUSAL), "auto", "auto")
    assert torch.equal(seen["blocks.1.self_attn.comfy_attention.config"], choice)


def test_a_model_with_a_network_for_its_memory_makes_what_the_core_makes(call, folder, sample, prompt):
    from any_folder_name.sf_core.autoencoders.wan_vae import from_model_space
    from any_folder_name.sf_core.sampling.families import FAMILIES

    memory = wan_weights(seed=1)
    named = {
        f"{name.rpartition('.')[0]}.memory_{name.rpartition('.')[2]}"
        if name.startswith("blocks.")
        else f"memory_{name}": t
        for name, t in memory.items()
    }
    model = call("LoadModel", save(folder, "sgf-plus_chunkwise.pt", wan_weights() | named), "auto", "auto")
    long = {"samples": torch.zeros(1, 16, 9, 4, 4)}
    got = sample(model, latent=long)
    wanted = core_latents(core_model(), FAMILIES["sgf-plus"].sampling, prompt[0][0], 9, 4, 4, memory=core_model(memory))
    assert relative_error(got, from_model_space(wanted)) < 1e-3
    alone = core_latents(core_model(), FAMILIES["sgf-plus"].sampling, prompt[0][0], 9, 4, 4)
    assert relative_error(got, from_model_space(alone)) > 1e-2


# --- Load Self Forcing Model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FILES)
def test_every_format_is_sampled_with_a_lora_and_decoded(call, folder, sample, exact, kind):
    name, weights, precision = FILES[kind]
    model = call("LoadModel", save(folder, name, weights(), CAUSAL), "auto", precision)
    samples = sample(model)
    assert relative_error(samples, exact) < 0.03

    assert relative_error(sample(some_lora(folder, model)), samples) > 0.03
    assert torch.equal(sample(model), samples)
    frames = call("Decode", {"samples": samples}, call("LoadTAEHV", save_taehv(folder, "taew2_1.safetensors")))
    assert frames.shape == (FRAMES, 32, 32, 3) and frames.isfinite().all()


def some_lora(folder, model):
    """The MODEL with a LoRA on one layer."""
    import nodes

    key = "diffusion_model.blocks.1.ffn.0"
    lora = {f"{key}.lora_A.weight": torch.randn(4, 128), f"{key}.lora_B.weight": torch.randn(256, 4)}
    save_file(lora, folder / "loras" / "some.safetensors")
    return nodes.LoraLoaderModelOnly().load_lora_model_only(model, "some.safetensors", 1.0)[0]


def test_lora_of_our_training_changes_the_video_as_in_the_core(call, folder, sample, prompt, exact):
    import nodes
    from any_folder_name.sf_core.training.config import LoraConfig
    from any_folder_name.sf_core.training.lora import adapter_file, add_adapters, merge_adapters

    settings = LoraConfig(rank=4, alpha=8.0)
    adapted = add_adapters(core_model(), settings, seed=0)
    for name, weight in adapted.named_parameters():
        if name.endswith(".up"):
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)))
    save_file(adapter_file(adapted.state_dict(), settings), folder / "loras" / "trained.safetensors")
    model = call("LoadModel", save(folder, "self_forcing.safetensors", wan_weights(), CAUSAL), "auto", "auto")
    patched = nodes.LoraLoaderModelOnly().load_lora_model_only(model, "trained.safetensors", 1.0)[0]
    wanted = rolled_out(core_model(merge_adapters(adapted.state_dict(), settings)), prompt)
    assert relative_error(sample(patched), wanted) < 0.01
    assert relative_error(wanted, exact) > 0.1


@pytest.mark.parametrize("precision", ["auto", "bf16", "fp8"])
def test_weights_kept_elsewhere_are_brought_with_their_lora(call, folder, sample, monkeypatch, precision):
    import comfy.model_management as management

    model = call("LoadModel", save(folder, "self_forcing.safetensors", wan_weights(), CAUSAL), "auto", precision)
    patched = some_lora(folder, model)
    usual = sample(patched)
    management.unload_all_models()
    monkeypatch.setattr(
        management, "load_models_gpu", lambda models, **_: models[0].load(torch.device("cpu"), lowvram_model_memory=1)
    )
    assert relative_error(sample(patched), usual) < 0.02
    assert patched.model.model_lowvram


def test_files_are_listed(nodes, folder):
    save(folder, "self_forcing_dmd.pt", wan_weights())
    save_taehv(folder, "taew2_1.pth")
    save_taehv(folder, "taew2_1.pth", "vae")
    options = {
        name: nodes[f"SelfForcing{name}"].define_schema().inputs[0].options for name in ("LoadModel", "LoadTAEHV")
    }
    assert options == {"LoadModel": ["self_forcing_dmd.pt"], "LoadTAEHV": ["taew2_1.pth"]}


def test_fp8_files_keep_their_weights(call, folder):
    weights = fp8_file(wan_weights())
    model = call("LoadModel", save(folder, "self_forcing.safetensors", weights, CAUSAL), "auto", "auto")
    name = "blocks.0.ffn.2.weight"
    kept = model.model.diffusion_model.state_dict()[name]
    assert kept.dtype == torch.float8_e4m3fn
    assert torch.equal(kept.view(torch.uint8), weights[name].view(torch.uint8))


@pytest.mark.parametrize("precision", ["auto", "fp8"])
def test_a_lora_that_is_a_part_of_the_model_is_merged(call, sample, folder, precision):
    """In PEFT's names, as LongLive publishes it; also in the copy that ComfyUI asks for."""
    from any_folder_name.nodes.host import model as host

    weights, layer = wan_weights(), "blocks.1.self_attn.q"
    wide = weights[f"{layer}.weight"].shape[0]
    pair = {"A": 0.1 * torch.randn(2, wide), "B": 0.1 * torch.randn(wide, 2)}
    named = {f"base_model.model.{layer}.lora_{part}.weight": value for part, value in pair.items()}
    torch.save({"generator_lora": named}, folder / "loras" / "lora.pt")
    base = save(folder, "longlive_base.safetensors", weights, CAUSAL)
    merged = weights | {f"{layer}.weight": weights[f"{layer}.weight"] + 0.5 * pair["B"] @ pair["A"]}
    whole = call("LoadModel", save(folder, "longlive.safetensors", merged, CAUSAL), "auto", precision)
    model = call("LoadModel", base, "auto", precision, "lora.pt", 0.5)
    torch.testing.assert_close(sample(model), sample(whole), rtol=0, atol=1e-4)
    again = host.load_again(model.cached_patcher_init)
    torch.testing.assert_close(sample(again), sample(whole), rtol=0, atol=1e-4)
    assert not torch.allclose(sample(call("LoadModel", base, "auto", precision)), sample(whole), atol=1e-3)


def in_full(model) -> set[bool]:
    """Whether the float8 layers of a MODEL multiply in full precision."""
    layers = model.model.diffusion_model.blocks.modules()
    return {layer._full_precision_mm_config for layer in layers if getattr(layer, "layout_type", None) is not None}


def test_float8_made_here_and_files_that_ask_for_it_are_multiplied_in_full(call, folder):
    made = call("LoadModel", save(folder, "self_forcing.safetensors", wan_weights(), CAUSAL), "auto", "fp8")
    assert in_full(made) == {True}
    weights, asks = fp8_file(wan_weights()), json.dumps({"full_precision_matrix_mult": True})
    files = {
        "plain": ({}, {}, False),
        "old mark": ({"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)}, {}, True),
        "mark": ({"blocks.0.ffn.0.comfy_quant": torch.tensor(list(asks.encode()), dtype=torch.uint8)}, {}, True),
        "metadata": ({}, {"_quantization_metadata": f'{{"layers": {{"blocks.0.ffn.0": {asks}}}}}'}, True),
    }
    for name, (more, metadata, expected) in files.items():
        file = save(folder, f"self_forcing_{name}.safetensors", weights | more, CAUSAL | metadata)
        assert in_full(call("LoadModel", file, "auto", "auto")) == {expected}, name


def test_fp8_leaves_what_reads_or_writes_the_latents_alone(call, folder):
    model = call("LoadModel", save(folder, "self_forcing.safetensors", wan_weights(), CAUSAL), "auto", "fp8")
    float8 = {name for name, w in model.model.diffusion_model.state_dict().items() if w.dtype == torch.float8_e4m3fn}
    assert len(float8) == 2 * 10
    assert all(name.startswith("blocks.") and name.endswith(".weight") for name in float8)


def test_auto_samples_as_the_family_says(call, folder, sample, latent):
    name = save(folder, "longlive_base.safetensors", wan_weights(), CAUSAL)
    usual = sample(call("LoadModel", name, "auto", "auto"))
    assert torch.equal(usual, sample(call("LoadModel", name, "self-forcing", "auto"), preset="longlive"))
    frame_wise = call("LoadModel", name, "causal-forcing-framewise", "auto")
    assert torch.equal(sample(frame_wise), sample(frame_wise, preset="causal-forcing-framewise"))
    assert not torch.equal(sample(frame_wise), usual)


def test_second_copy_of_the_weights_can_be_had(call, folder, sample):
    model = call("LoadModel", save(folder, "self_forcing.safetensors", wan_weights(), CAUSAL), "auto", "fp8")
    load, source = model.cached_patcher_init
    assert torch.equal(sample(load(*source, disable_dynamic=True)), sample(model))


def test_stock_sampler_runs_the_loaded_model(call, folder, latent, prompt):
    import nodes

    model = call("LoadModel", save(folder, "self_forcing.safetensors", wan_weights(), CAUSAL), "auto", "fp8")
    sampled = nodes.common_ksampler(model, 0, 2, 1.0, "euler", "simple", prompt, prompt, latent)[0]["samples"]
    assert sampled.shape == latent["samples"].shape and sampled.isfinite().all()


@pytest.mark.parametrize("precision", ["auto", "fp8"])
def test_saved_model_is_the_same_model(call, folder, sample, monkeypatch, precision):
    import comfy.sd
    from comfy_extras.nodes_model_merging import ModelSave

    model = call("LoadModel", save(folder, "self_forcing.safetensors", wan_weights(), CAUSAL), "auto", precision)
    saver = ModelSave()
    saver.output_dir = str(folder / "diffusion_models")
    saver.save(model, "saved")
    (saved,) = (folder / "diffusion_models").glob("saved*.safetensors")
    assert torch.allclose(sample(call("LoadModel", saved.name, "self-forcing", "auto")), sample(model), atol=1e-5)
    assert load_file(saved) and comfy.sd.load_diffusion_model(str(saved)) is not None


def test_host_compiler_node_in_the_graph_changes_nothing(call, folder, sample):
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    model = call("LoadModel", save(folder, "self_forcing.safetensors", wan_weights(), CAUSAL), "auto", "auto")
    compiled = TorchCompileModel.execute(model, "inductor").args[0]
    assert torch.equal(sample(compiled), sample(model))


BAD = {
    "text": (b"this is not a model", "a safetensors file or a PyTorch .pt file is needed"),
    "empty": (b"", "Got self_forcing.safetensors"),
}


@pytest.mark.parametrize("kind", BAD)
def test_wrong_file_is_explained(call, folder, kind):
    content, message = BAD[kind]
    (folder / "diffusion_models" / "self_forcing.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        call("LoadModel", "self_forcing.safetensors", "auto", "auto")


def test_image_to_video_model_is_refused(call, folder):
    weights = wan_weights()
    weights["patch_embedding.weight"] = torch.zeros(128, 36, 1, 2, 2)
    with pytest.raises(ValueError, match="^Got self_forcing.safetensors"):
        call("LoadModel", save(folder, "self_forcing.safetensors", weights, CAUSAL), "auto", "auto")


# --- Other loaders ---------------------------------------------------------------------------------------------------


def test_stock_loader_with_float8_weights_is_sampled(folder, sample, exact):
    import nodes

    name = save(folder, "self_forcing.safetensors", wan_weights(), CAUSAL)
    model = nodes.UNETLoader().load_unet(name, "fp8_e4m3fn")[0]
    samples = sample(model, preset="self-forcing")
    assert samples.isfinite().all()
    assert relative_error(samples, exact) < 0.1


def test_tree_of_foreign_linear_layers_is_sampled(sample, exact):
    """Loaders of GGUF files keep Wan's names and bring layers that store their weights in a form of their own."""
    import comfy.ops
    import comfy.sd

    class Operations(comfy.ops.manual_cast):
        class Linear(comfy.ops.manual_cast.Linear):
            """Eight bits and a scale per row, turned back in every call."""

            def _load_from_state_dict(self, state, prefix, *rest):
                weight = state[f"{prefix}weight"].float()
                self.scale = weight.abs().amax(1, keepdim=True) / 127
                self.weight = torch.nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)
                self.bias = torch.nn.Parameter(state[f"{prefix}bias"].float(), requires_grad=False)

            def forward(self, x):
                return torch.nn.functional.linear(x, (self.weight * self.scale).to(x.dtype), self.bias.to(x.dtype))

    options = {"custom_operations": Operations}
    model = comfy.sd.load_diffusion_model_state_dict(wan_weights(), model_options=options, metadata=CAUSAL)
    assert model.model.diffusion_model.blocks[0].ffn[0].weight.dtype == torch.int8
    assert relative_error(sample(model, preset="self-forcing"), exact) < 0.03


# --- Load TAEHV ------------------------------------------------------------------------------------------------------


def taehv_weights(dtype=torch.float16, channels=16) -> dict[str, torch.Tensor]:
    from comfy.taesd.taehv import TAEHV

    torch.manual_seed(0)
    state = TAEHV(latent_channels=channels).state_dict()
    return {name: (torch.randn(w.shape) / max(1, w[0].numel()) ** 0.5).to(dtype) for name, w in state.items()}


def save_taehv(folder, name: str, kind: str = "vae_approx", weights: dict | None = None) -> str:
    weights = taehv_weights() if weights is None else weights
    path = folder / kind / name
    save_file(weights, path) if path.suffix == ".safetensors" else torch.save(weights, path)
    return name


@pytest.mark.parametrize(
    ("name", "kind"), [("taew2_1.safetensors", "vae_approx"), ("taew2_1.pth", "vae_approx"), ("my_tae.pth", "vae")]
)
def test_taehv_decodes_alike_in_all_nodes(call, folder, name, kind):
    import nodes
    from any_folder_name.sf_core.autoencoders.taehv import TAEHV
    from any_folder_name.sf_core.autoencoders.wan_vae import to_model_space

    vae = call("LoadTAEHV", save_taehv(folder, name, kind))
    latents = {"samples": torch.randn(1, 16, 5, 4, 6)}
    stock, ours = nodes.VAEDecode().decode(vae, latents)[0], call("Decode", latents, vae)
    assert ours.shape == (17, 32, 48, 3)
    assert torch.allclose(stock, ours, atol=2e-5)
    network = TAEHV.from_state_dict({key: w.float() for key, w in taehv_weights().items()})
    assert torch.allclose(ours, network.decode(to_model_space(latents["samples"]))[0], atol=2e-5)


def test_taehv_encodes_what_the_core_encodes(call, folder):
    import nodes
    from any_folder_name.sf_core.autoencoders.taehv import TAEHV
    from any_folder_name.sf_core.autoencoders.wan_vae import from_model_space

    vae, frames = call("LoadTAEHV", save_taehv(folder, "taew2_1.pth")), torch.rand(9, 32, 48, 3)
    network = TAEHV.from_state_dict({key: w.float() for key, w in taehv_weights().items()})
    stock = nodes.VAEEncode().encode(vae, frames)[0]["samples"]
    assert stock.shape == (1, 16, 3, 4, 6)
    assert torch.allclose(stock, from_model_space(network.encode(frames[None])), atol=1e-4)


def test_lighttae_reads_raw_latents(call, folder):
    from any_folder_name.sf_core.autoencoders.taehv import TAEHV

    weights = taehv_weights(torch.bfloat16)
    vae = call("LoadTAEHV", save_taehv(folder, "lighttaew2_1.safetensors", "vae", weights))
    latents = torch.randn(1, 16, 2, 4, 4)
    network = TAEHV.from_state_dict({key: w.float() for key, w in weights.items()})
    assert torch.allclose(call("Decode", {"samples": latents}, vae), network.decode(latents)[0], atol=2e-5)


def test_tiny_autoencoders_of_other_models_are_refused(call, folder):
    save_taehv(folder, "taehv1_5.safetensors", weights=taehv_weights(channels=32))
    with pytest.raises(ValueError, match="latents of 32 channels; the model makes 16 or 48.*Get taew2_1"):
        call("LoadTAEHV", "taehv1_5.safetensors")
    save_taehv(folder, "taesd.safetensors", weights={"taesd_decoder.1.weight": torch.zeros(64, 4, 3, 3)})
    with pytest.raises(ValueError, match="Got taesd.safetensors, a TAESD.*a TAEHV .* is needed here"):
        call("LoadTAEHV", "taesd.safetensors")


# --- The Wan VAE -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wan_vae_weights(comfyui):
    """A small random VAE under the names of wan_2.1_vae.safetensors."""
    from any_folder_name.sf_core.autoencoders.wan_vae import Layout, WanVAE

    torch.manual_seed(0)
    weights = WanVAE(Layout(widths=(16, 32, 64, 64))).state_dict()
    return {name: w.detach() for name, w in weights.items()}


@pytest.fixture
def wan_vae(folder, wan_vae_weights):
    """It, from Load VAE."""
    import nodes

    save_file(wan_vae_weights, folder / "vae" / "wan_2.1_vae.safetensors")
    return nodes.VAELoader().load_vae("wan_2.1_vae.safetensors")[0]


@pytest.fixture
def progress():
    """What the node reports: a list of values that fills while it runs."""
    import comfy.utils

    reports = []
    comfy.utils.set_progress_bar_global_hook(lambda value, total, preview, **_: reports.append(value))
    yield reports
    comfy.utils.set_progress_bar_global_hook(None)


@pytest.mark.parametrize("latent_frames", [1, 2, 6])
def test_wan_vae_is_streamed_to_what_stock_decode_gives(call, wan_vae, progress, latent_frames):
    import nodes

    latents = {"samples": torch.randn(2, 16, latent_frames, 4, 6)}
    ours = call("Decode", latents, wan_vae)
    assert progress[-1] == 2 * latent_frames
    stock = nodes.VAEDecode().decode(wan_vae, latents)[0]
    assert ours.shape == (2 * (4 * latent_frames - 3), 32, 48, 3)
    assert torch.allclose(ours, stock, atol=2e-5)
    assert ours.std() > 0.01


def test_tiles_show_no_seams(call, wan_vae):
    latents = {"samples": torch.randn(1, 16, 2, 20, 18)}
    whole, tiled = call("Decode", latents, wan_vae), call("Decode", latents, wan_vae, tile=128)
    assert torch.allclose(whole, tiled, atol=2e-5)


def test_tiles_that_are_mostly_margin_are_refused(call, wan_vae):
    with pytest.raises(ValueError, match="tiles of 64 pixels.*Set tile to 128"):
        call("Decode", {"samples": torch.randn(1, 16, 2, 4, 4)}, wan_vae, tile=64)


def test_room_for_the_decoder_does_not_depend_on_the_length(call, wan_vae, monkeypatch):
    import comfy.model_management as management

    asked, load = [], management.load_models_gpu
    monkeypatch.setattr(
        management,
        "load_models_gpu",
        lambda models, memory_required=0, **_: asked.append(memory_required) or load(models),
    )
    for frames in (1, 5):
        call("Decode", {"samples": torch.randn(1, 16, frames, 4, 4)}, wan_vae)
    assert asked[0] == asked[1] > 0


def test_decoding_ends_at_cancel(call, wan_vae):
    import comfy.model_management as management
    import comfy.utils

    seen = []

    def press_cancel(value, *_, **__):
        seen.append(value)
        management.interrupt_current_processing()

    comfy.utils.set_progress_bar_global_hook(press_cancel)
    try:
        with pytest.raises(management.InterruptProcessingException):
            call("Decode", {"samples": torch.randn(1, 16, 9, 4, 4)}, wan_vae)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
        management.interrupt_current_processing(False)
    assert seen == [3]


def test_out_of_memory_while_decoding_says_what_to_do(call, wan_vae, monkeypatch):
    from any_folder_name.sf_core.autoencoders.wan_vae import DecoderStream

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(DecoderStream, "decode", full)
        with pytest.raises(torch.OutOfMemoryError, match="Set tile to 256, or use a TAEHV") as caught:
            call("Decode", {"samples": torch.randn(1, 16, 2, 4, 4)}, wan_vae)
        assert caught.value.__context__ is None
    assert call("Decode", {"samples": torch.randn(1, 16, 2, 4, 4)}, wan_vae).isfinite().all()


def test_stock_encode_makes_the_prefix_that_the_core_makes(wan_vae, wan_vae_weights):
    import nodes
    from any_folder_name.sf_core.autoencoders.wan_vae import WanVAE, from_model_space

    frames = torch.rand(9, 32, 48, 3)
    stock = nodes.VAEEncode().encode(wan_vae, frames)[0]["samples"]
    ours = from_model_space(WanVAE.from_state_dict(wan_vae_weights).encode(frames[None]))
    assert stock.shape == ours.shape == (1, 16, 3, 4, 6)
    assert torch.allclose(stock, ours, atol=1e-4)


# --- How it is run ---------------------------------------------------------------------------------------------------


@pytest.fixture
def model(call, folder):
    return call("LoadModel", save(folder, "self_forcing.safetensors", wan_weights(), CAUSAL), "auto", "auto")


def test_float8_cache_costs_little_quality(sample, model):
    nine = {"latent": {"samples": torch.zeros(1, 16, 9, 4, 4)}}
    usual, float8 = sample(model, **nine), sample(model, **nine, cache="fp8")
    assert not torch.equal(usual, float8)
    assert relative_error(float8, usual) < 0.02


def memory_plan(tiny, cache_dtype=None):
    """What the built-in model takes for a long video without a window."""
    from any_folder_name.nodes.host.model import wan_of
    from any_folder_name.sf_core.memory import MemoryPlan
    from any_folder_name.sf_core.sampling.config import Sampling
    from any_folder_name.sf_core.sampling.plan import Plan

    return MemoryPlan(wan_of(tiny.model).config, Plan(Sampling(), 40, 8, 8, cache_dtype=cache_dtype), torch.float32)


@pytest.mark.parametrize(("share", "fp8_alone"), [(0.8, True), (0.3, False)])
def test_too_much_memory_is_refused_with_what_would_fit(call, tiny, sample, monkeypatch, share, fp8_alone):
    import re

    import comfy.model_management as management
    from any_folder_name.nodes.host import memory as room

    needed = memory_plan(tiny)
    limit = int(share * needed.total) + management.extra_reserved_memory()
    monkeypatch.setattr(management, "get_total_memory", lambda *_: limit)
    device = torch.device("cpu")
    with pytest.raises(ValueError, match=r"Set a smaller window \(\d+ at most\), or cache to fp8") as caught:
        room.check(needed, device)
    assert ("and a smaller window" not in str(caught.value)) == fp8_alone
    longest = int(re.search(r"window \((\d+) at most\)", str(caught.value)).group(1))
    room.check(needed.with_window(longest), device)
    with pytest.raises(ValueError):
        room.check(needed.with_window(longest + 1), device)
    if fp8_alone:
        room.check(memory_plan(tiny, cache_dtype=torch.float8_e4m3fn), device)
    latent = call("Latent", 64, 64, 157, 0.0, 16.0, 1)
    with pytest.raises(ValueError, match="Got 42 latent frames of 64 x 64 pixels"):
        sample(tiny.model, positive=tiny.prompt, latent=latent, preset="cli")


def test_out_of_memory_frees_the_cache_and_leaves_the_host_usable(sample, model, monkeypatch):
    import gc

    from any_folder_name.sf_core.wan import model as wan

    velocity, calls = wan.velocity, []

    def fills_up(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return velocity(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(wan, "velocity", fills_up)
        with pytest.raises(
            torch.OutOfMemoryError, match="3 latent frames of 32 x 32 pixels.*Set cache to fp8"
        ) as caught:
            sample(model)
        gc.collect()
        assert not any(type(thing).__name__ == "RollingCache" for thing in gc.get_objects())
        assert caught.value.__context__ is None
    assert sample(model).isfinite().all()


def test_compiled_parts_serve_all_blocks_chunks_and_runs(sample, model, monkeypatch):
    from any_folder_name.nodes.host import generation as job
    from any_folder_name.sf_core.wan.compile import compile_ops
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    monkeypatch.setattr(job, "compile_ops", lambda mode: compile_ops(mode, backend=counter))
    nine = {"latent": {"samples": torch.zeros(1, 16, 9, 4, 4)}}
    compiled = sample(model, **nine, compile="default")
    first = counter.frame_count
    assert torch.allclose(compiled, sample(model, **nine), atol=1e-4)
    sample(model, **nine, compile="default", seed=1)
    assert first == counter.frame_count == 3  # before, between and after the two attentions


def test_models_in_dynamic_memory_are_compiled_from_a_copy_loaded_once(folder, sample, model, monkeypatch):
    from any_folder_name.nodes.host import model as host

    patched, (load, source), loads = some_lora(folder, model), model.cached_patcher_init, []
    spy = lambda *source, **how: loads.append(how) or load(*source, **how)  # noqa: E731
    for patcher in (model, patched):
        patcher.cached_patcher_init = (spy, source)
        monkeypatch.setattr(patcher, "is_dynamic", lambda: True)
    copies = [host.for_compiling(model), host.for_compiling(patched)]
    assert loads == [{"disable_dynamic": True}]
    assert copies[0].model is copies[1].model is not model.model
    for copy, patcher in zip(copies, (model, patched), strict=True):
        assert torch.equal(sample(copy), sample(patcher))
    patched.cached_patcher_init = None
    with pytest.raises(ValueError, match="set compile to off"):
        host.for_compiling(patched)
