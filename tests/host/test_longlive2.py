"""LongLive 2.0 in ComfyUI: its file, the Wan 2.2 VAE and taew2_2 through all nodes, from text and from an image.

The files are random and small, in exactly the formats that people have.
"""

import pytest
import torch
from safetensors.torch import save_file

from tests.host.test_models import folder, save_taehv, taehv_weights  # noqa: F401  fixture

SENTENCE = "The scene transitions. "
SMALL = {"dim": 8, "dec_dim": 16}  # widths of the VAE


@pytest.fixture
def model(call, folder):  # noqa: F811
    """The MODEL of a published-form file."""
    from any_folder_name.sf_core.wan.config import WanConfig
    from any_folder_name.sf_core.wan.model import WanModel

    torch.manual_seed(0)
    wan = WanModel(WanConfig(dim=128, ffn_dim=256, heads=1, layers=2, channels=48)).initialise()
    torch.nn.init.normal_(wan.head.head.weight, std=0.02)
    state = {f"model.{name}": tensor.detach() for name, tensor in wan.state_dict().items()}
    file = folder / "diffusion_models" / "LongLive-2.0-5B" / "model_bf16.pt"
    file.parent.mkdir()
    torch.save({"generator": state}, file)
    return call("LoadModel", "LongLive-2.0-5B/model_bf16.pt", "auto", "auto")


@pytest.fixture
def network(comfyui, monkeypatch):
    """ComfyUI's own Wan 2.2 VAE, small, with random weights."""
    import comfy.ldm.wan.vae2_2 as theirs

    torch.manual_seed(0)
    small = lambda build=theirs.WanVAE, **config: build(**(config | SMALL))  # noqa: E731
    monkeypatch.setattr("comfy.sd.comfy.ldm.wan.vae2_2.WanVAE", small)
    vae = small(z_dim=48, temperal_downsample=[False, True, True])
    for weight in vae.parameters():
        weight.data.copy_(torch.randn(weight.shape) / max(1, weight[0].numel()) ** 0.5)
    return vae.eval()


@pytest.fixture
def vae(network, folder):  # noqa: F811
    """The same from Load VAE."""
    import nodes

    save_file(network.state_dict(), folder / "vae" / "wan2.2_vae.safetensors")
    return nodes.VAELoader().load_vae("wan2.2_vae.safetensors")[0]


@pytest.fixture
def prompt():
    return [[torch.randn(1, 20, 4096, generator=torch.Generator().manual_seed(1)), {}]]


@pytest.fixture
def sample(call, model, prompt):
    """sample(latent, ...) -> latents."""

    def run(latent, **changes) -> torch.Tensor:
        inputs = {
            "model": model, "positive": prompt, "latent": latent, "seed": 0, "preset": "auto",
            "steps": 0, "chunk": 0, "window": 0, "sink": -1, **changes,
        }  # fmt: skip
        return call("Sampler", **inputs)["samples"]

    return run


def latent_of(call, model, frames=61, width=64, height=32):
    return call("Latent", width, height, frames, 0.0, 24.0, 1, model)


def test_our_vae_is_comfyuis_on_the_same_weights(pack, network):
    from any_folder_name.sf_core.autoencoders.wan22_vae import Wan22VAE
    from any_folder_name.sf_core.autoencoders.wan_vae import DecoderStream

    ours, form = Wan22VAE.from_state_dict(network.state_dict()), Wan22VAE.statistics
    raw, frames = torch.randn(2, 48, 4, 2, 3), torch.rand(2, 13, 32, 48, 3)
    theirs = network.decode(raw).add(1).div(2).clamp(0, 1).movedim(1, -1)
    whole = ours.decode(form.to_model_space(raw))
    torch.testing.assert_close(whole, theirs, atol=2e-5, rtol=0)
    stream = DecoderStream(ours)
    pieces = [stream.decode(form.to_model_space(piece)) for piece in raw.split([1, 2, 1], 2)]
    assert torch.equal(torch.cat(pieces, 1), whole)
    encoded = form.from_model_space(ours.encode(frames))
    torch.testing.assert_close(encoded, network.encode(frames.movedim(-1, 1) * 2 - 1), atol=2e-5, rtol=0)


@pytest.mark.parametrize("tile", [0, 256])
def test_decode_streams_to_what_stock_decode_gives(call, vae, tile):
    import nodes

    latents = {"samples": torch.randn(1, 48, 3, 2, 20)}
    ours, stock = call("Decode", latents, vae, tile), nodes.VAEDecode().decode(vae, latents)[0]
    assert ours.shape == (9, 32, 320, 3) and torch.allclose(ours, stock, atol=2e-5) and ours.std() > 0.01


def test_tiles_that_are_mostly_margin_are_refused(call, vae):
    with pytest.raises(ValueError, match="tiles of 128 pixels.*Set tile to 256"):
        call("Decode", {"samples": torch.randn(1, 48, 2, 4, 4)}, vae, tile=128)


def test_the_latent_is_the_models(call, model, nodes):
    assert latent_of(call, model)["samples"].shape == (1, 48, 16, 2, 4)
    assert call("Latent", 64, 32, 61, 0.0, 24.0, 1)["samples"].shape == (1, 16, 16, 4, 8)
    with pytest.raises(ValueError, match="multiples of 32. Use 64 x 32"):
        latent_of(call, model, width=80)


def test_text_to_video(call, model, sample, vae, prompt):
    from any_folder_name.nodes.host.model import family_of, wan_of

    from tests.host.core import core_latents

    sampling = family_of(model).sampling
    assert (sampling.solver, sampling.chunk, sampling.window) == ("unipc", 8, 32) and sampling.shots
    ours = sample(latent_of(call, model))
    core = core_latents(wan_of(model), sampling, prompt[0][0], 16, 2, 4)
    torch.testing.assert_close(ours, model.model.process_latent_out(core), atol=2e-5, rtol=0)
    assert call("Decode", {"samples": ours}, vae).shape == (61, 32, 64, 3)


def test_image_to_video(call, model, sample, vae):
    import nodes

    image = torch.rand(1, 32, 64, 3)
    prefix = nodes.VAEEncode().encode(vae, image)[0]
    assert prefix["samples"].shape == (1, 48, 1, 2, 4)
    latent = latent_of(call, model)
    one, other = sample(latent, prefix=prefix), sample(latent, prefix=prefix, seed=1)
    assert one.shape[2] == 16
    torch.testing.assert_close(one[:, :, :1], prefix["samples"].float(), atol=1e-5, rtol=0)
    assert torch.equal(one[:, :, :1], other[:, :, :1]) and not torch.equal(one[:, :, 1:], other[:, :, 1:])
    assert call("Decode", {"samples": one}, vae).shape == (61, 32, 64, 3)


def test_a_video_is_gone_on_from_in_whole_chunks(call, model, sample):
    first = {"samples": sample(latent_of(call, model, frames=29))}
    longer = sample(latent_of(call, model, frames=61), prefix=first)
    torch.testing.assert_close(longer[:, :, :8], first["samples"], atol=1e-5, rtol=0)


class Clip:
    """A text encoder that remembers what it was asked; embeddings by the text."""

    def __init__(self):
        self.texts = []

    def tokenize(self, text):
        return text

    def encode_from_tokens_scheduled(self, text):
        self.texts.append(text)
        seed = sum(text.encode())
        return [[torch.randn(1, 20, 4096, generator=torch.Generator().manual_seed(seed)), {}]]


@pytest.mark.parametrize("second", ["@1 cut: a castle", f"@1: {SENTENCE}a castle"])
def test_scene_cuts_of_a_prompt(call, model, sample, second):
    from any_folder_name.nodes.host.model import family_of, wan_of
    from any_folder_name.sf_core.pipeline import Generation
    from any_folder_name.sf_core.sampling.plan import Plan
    from any_folder_name.sf_core.sampling.prompts import PromptSchedule, TimedPrompt
    from any_folder_name.sf_core.wan.model import Network

    clip = Clip()
    ours = sample(latent_of(call, model, frames=93), positive=call("Prompt", clip, f"0: a boat\n{second}", 24.0))
    assert sorted(clip.texts) == sorted(["a boat", SENTENCE + "a castle", "a castle"])
    boat, scene, castle = (
        clip.encode_from_tokens_scheduled(text)[0][0] for text in ("a boat", SENTENCE + "a castle", "a castle")
    )
    prompts = PromptSchedule((TimedPrompt(0, boat), TimedPrompt(8, castle, "cut", scene=scene)))
    sampling = family_of(model).sampling
    core = Generation(Network(wan_of(model)), Plan(sampling, 24, 2, 4), prompts).latents()
    torch.testing.assert_close(ours, model.model.process_latent_out(core), atol=2e-5, rtol=0)


def test_other_models_take_such_a_prompt_as_it_stands(call):
    from any_folder_name.nodes.host.conditioning import read_prompts

    conditioning = call("Prompt", Clip(), f"0: a boat\n4s: {SENTENCE}a castle", 24.0)
    plain, shots = read_prompts(conditioning, 1), read_prompts(conditioning, 1, has_shots=True)
    assert [p.start.transition for p in plain] == ["recache", "recache"] and plain[1].scene is None
    assert shots[1].start.transition == "cut" and torch.equal(shots[1].scene, plain[1].embeds)


def test_custom_sampler_makes_the_same_frames(call, model, sample, prompt, nodes):
    from comfy.samplers import CFGGuider

    latent = latent_of(call, model)
    guider = CFGGuider(model)
    guider.set_conds(prompt, prompt)
    guider.set_cfg(1.0)
    sigmas = call("Sigmas", model, "auto", 0)
    assert sigmas[0] < 1
    sampler = call("SamplerSelect", 0, 0, -1)
    samples = latent["samples"].clone()
    ours = guider.sample(torch.randn(samples.shape), samples, sampler, sigmas, seed=0)
    torch.testing.assert_close(ours, sample(latent), atol=2e-5, rtol=0)


def test_taew2_2_decodes_what_the_core_decodes(call, folder):  # noqa: F811
    import nodes
    from any_folder_name.sf_core.autoencoders.taehv import TAEHV
    from any_folder_name.sf_core.autoencoders.wan22_vae import WAN22

    weights = taehv_weights(channels=48)
    vae = call("LoadTAEHV", save_taehv(folder, "taew2_2.safetensors", weights=weights))
    network = TAEHV.from_state_dict({name: weight.float() for name, weight in weights.items()})
    latents, frames = {"samples": torch.randn(1, 48, 3, 2, 4)}, torch.rand(9, 32, 64, 3)
    ours, stock = call("Decode", latents, vae), nodes.VAEDecode().decode(vae, latents)[0]
    assert ours.shape == (9, 32, 64, 3) and torch.allclose(ours, stock, atol=2e-5)
    assert torch.allclose(ours, network.decode(WAN22.to_model_space(latents["samples"]))[0], atol=2e-5)
    encoded = nodes.VAEEncode().encode(vae, frames)[0]["samples"]
    assert torch.allclose(encoded, WAN22.from_model_space(network.encode(frames[None])), atol=1e-4)


@pytest.mark.parametrize("kind", ["vae", "taehv"])
def test_stream(call, model, vae, prompt, folder, kind):  # noqa: F811
    if kind == "taehv":
        vae = call("LoadTAEHV", save_taehv(folder, "taew2_2.safetensors", weights=taehv_weights(channels=48)))
    latent = latent_of(call, model)
    frames, latents, *_ = call(
        "Stream", model=model, positive=prompt, latent=latent, vae=vae, seed=0, fps=24.0, preset="auto", file="", keep=0
    )
    assert frames.shape == (61, 32, 64, 3) and latents["samples"].shape == (1, 48, 16, 2, 4)
    assert torch.allclose(frames, call("Decode", latents, vae), atol=2e-5)


def test_memory_of_the_full_size_is_planned(model, prompt):
    from any_folder_name.nodes.host.generation import HostGeneration
    from any_folder_name.nodes.host.model import family_of
    from any_folder_name.sf_core.sampling.plan import Plan
    from any_folder_name.sf_core.sampling.prompt_text import EncodedPrompt, StartTime

    plan = Plan(family_of(model).sampling, 128, 44, 80)
    generation = HostGeneration(model, plan, 128, [EncodedPrompt(StartTime(), prompt[0][0])], 0)
    assert generation.what == "128 latent frames of 1280 x 704 pixels" and generation.pixels == 1280 * 704
    assert generation.memory.use.cache == 2 * 2 * 32 * 880 * 128 * generation.dtype.itemsize


def test_what_a_prompt_says_of_its_scenes_is_known(call):
    from any_folder_name.nodes.host.patches import ignored_conditioning

    conditioning = call("Prompt", Clip(), "0: a boat\n4s cut: a castle", 24.0)
    assert ignored_conditioning(positive=conditioning) == []
