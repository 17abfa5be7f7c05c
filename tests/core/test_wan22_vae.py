"""The Wan 2.2 VAE against the published code's outputs, and the laws of streaming, of tiles and of its files."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sf_core.autoencoders.wan22_vae import WAN22, Layout, Wan22VAE
from sf_core.autoencoders.wan_vae import DecoderStream, EncoderStream, WanVAE
from sf_core.checkpoints.autoencoder import load_autoencoder, wan_vae_names
from sf_core.checkpoints.tensorfiles import CheckpointError
from sf_core.memory import WAN22_VAE
from tests.core.goldens import FOLDER, frames_second
from tests.core.longlive2 import tensors
from tests.core.regenerate import weights
from tests.core.test_vae import CHUNKING, assert_near, clip, cuts, drawn, pixels_of
from tests.core.test_vae import SMALL as WAN21_SMALL
from tests.core.test_vae import autoencoder as wan21_autoencoder

TINY = Layout(widths=(8, 16, 32, 32), decoder_widths=(16, 32, 64, 64))  # what the golden tensors were made with
SMALL = Layout(widths=(2, 4, 4, 4), decoder_widths=(2, 4, 4, 4), blocks=1)  # four latent pixels of margin
LATENT_SIZE = st.tuples(st.integers(1, 12), st.integers(1, 5))
TILE = st.sampled_from([None, 9, 11])


def autoencoder(layout, seed=11):
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in Wan22VAE(layout).state_dict().items()}
    return Wan22VAE.from_state_dict(weights(shapes, seed))


@pytest.fixture(scope="module")
def published():
    return {name.removeprefix("vae."): tensor for name, tensor in tensors("h7_vae").items()}


@pytest.fixture(scope="module")
def vae():
    return autoencoder(TINY)


@pytest.fixture(scope="module")
def small():
    return autoencoder(SMALL)


def test_decode_is_the_published_decode(vae, published):
    stream = DecoderStream(vae)
    pieces = [stream.decode(piece) for piece in frames_second(published["decode.z"]).split([2, 7], 2)]
    assert [piece.shape[1] for piece in pieces] == [5, 28]
    ours, theirs = pixels_of(torch.cat(pieces, 1)), published["decode.pixels"]
    assert_near(ours[:, :: 32 // (theirs.shape[1] - 1)], theirs)  # of the 33 frames, every fourth is kept


def test_every_clip_begins_afresh(vae, published):
    stream = DecoderStream(vae)
    stream.decode(drawn(1, 48, 2, 2, 3))
    stream.reset()
    assert_near(pixels_of(stream.decode(frames_second(published["decode2.z"]))), published["decode2.pixels_fresh"])


def test_encode_is_the_published_encode(vae, published):
    frames = published["encode.pixels"].movedim(1, -1) / 2 + 0.5
    assert_near(vae.encode(frames), frames_second(published["encode.latent"]))
    assert_near(vae.encode(frames[:, :1]), frames_second(published["encode1.latent"]))


def test_latents_are_normalised_as_published(published):
    assert torch.equal(torch.tensor(WAN22.mean), published["mean"])
    assert torch.equal(torch.tensor(WAN22.std), published["std"])
    raw = drawn(1, 48, 2, 2, 2)
    assert_near(WAN22.from_model_space(WAN22.to_model_space(raw)), raw, atol=1e-6)


@settings(max_examples=8)
@given(st.integers(1, 7), CHUNKING, st.integers(1, 2), LATENT_SIZE, TILE)
def test_streamed_decode_is_the_whole_decode(small, latents, numbers, batch, size, tile):
    x, stream = drawn(batch, 48, latents, *size), DecoderStream(small, tile)
    streamed = torch.cat([stream.decode(piece) for piece in x.split(cuts(latents, numbers), 2)], 1)
    assert streamed.shape == (batch, 4 * latents - 3, 16 * size[0], 16 * size[1], 3)
    assert torch.equal(streamed, small.decode(x, tile))


@settings(max_examples=8)
@given(st.integers(1, 18), CHUNKING, st.integers(1, 2), LATENT_SIZE, TILE)
def test_streamed_encode_is_the_whole_encode(small, frames, numbers, batch, size, tile):
    x, stream = clip(batch, frames, 16 * size[0], 16 * size[1], 3), EncoderStream(small, tile)
    pieces = [stream.encode(piece) for piece in x.split(cuts(frames, numbers), 1)]
    streamed = torch.cat([*pieces, stream.flush()], 2)
    assert streamed.shape == (batch, 48, 1 + (frames - 1) // 4, *size)
    assert torch.equal(streamed, small.encode(x, tile))


def test_tiles_have_no_seams(small):
    x, frames = drawn(1, 48, 3, 25, 3), clip(1, 9, 400, 48, 3)
    assert_near(small.decode(x, tile=9), small.decode(x), atol=1e-5)
    assert_near(small.encode(frames, tile=9), small.encode(frames), atol=1e-5)


def test_a_margin_is_no_wider_than_what_a_tile_looks_at(small):
    narrow = autoencoder(SMALL)
    narrow.margin -= 1
    x = drawn(1, 48, 3, 25, 3)
    assert (narrow.decode(x, tile=9) - small.decode(x)).abs().max() > 1e-5


def test_what_a_stream_keeps_is_what_the_memory_plan_says():
    with torch.device("meta"):
        stream = DecoderStream(Wan22VAE().requires_grad_(False))
        stream.decode(torch.empty(1, 48, 3, 22, 40))
    fine, coarse = (sum(t.numel() for t in past.values()) for past in (stream.fine.tiles[0].past, stream.past))
    pixels = 22 * 40 * 16**2
    assert (fine + coarse) / pixels == pytest.approx(WAN22_VAE.kept, rel=0.01)
    assert fine / pixels == pytest.approx(WAN22_VAE.fine, rel=0.01)


# --- Files -----------------------------------------------------------------------------------------------------------

RESIDUAL = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2"}
RESIDUAL |= {"shortcut": "conv_shortcut"}
NAMES = {"conv1": "conv_in", "head.0": "norm_out", "head.2": "conv_out"}


def diffusers_name(name, blocks):
    """The name of a tensor in Diffusers' AutoencoderKLWan; `blocks`: Residuals of a stage, by side."""
    side, _, rest = name.partition(".")
    if side in ("conv1", "conv2"):
        return f"{'quant_conv' if side == 'conv1' else 'post_quant_conv'}.{rest}"
    layer, _, last = rest.rpartition(".")
    if layer in NAMES:
        return f"{side}.{NAMES[layer]}.{last}"
    place, number, inside = layer.split(".", 2)
    if place == "middle":
        where = "attentions.0" if number == "1" else f"resnets.{int(number) // 2}"
        return f"{side}.mid_block.{where}.{RESIDUAL.get(inside, inside)}.{last}"
    way = place.removesuffix("samples")
    _, block, inside = inside.split(".", 2)
    where = f"resnets.{block}" if int(block) < blocks[side] else f"{way}sampler"
    return f"{side}.{way}_blocks.{number}.{where}.{RESIDUAL.get(inside, inside)}.{last}"


def diffusers(state, blocks):
    sides = {"encoder": blocks, "decoder": blocks + 1}
    return {diffusers_name(name, sides): tensor for name, tensor in state.items()}


def same(loaded, vae):
    ours, theirs = loaded.state_dict(), vae.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
@pytest.mark.parametrize("names", ["wan", "diffusers"])
def test_files_are_recognised(tmp_path, blocks, prefix, names):
    vae = autoencoder(Layout(widths=(2, 4, 4, 4), decoder_widths=(2, 4, 4, 4), blocks=blocks))
    state = vae.state_dict() if names == "wan" else diffusers(vae.state_dict(), blocks)
    save_file({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "vae.safetensors")
    assert same(load_autoencoder(tmp_path / "vae.safetensors", Wan22VAE, 48), vae)


def test_the_published_pth_is_read(tmp_path, small):
    torch.save(small.state_dict(), tmp_path / "Wan2.2_VAE.pth")
    assert same(load_autoencoder(tmp_path / "Wan2.2_VAE.pth", Wan22VAE, 48), small)


def test_all_196_names_of_the_published_vae_are_wans():
    with torch.device("meta"):
        state = Wan22VAE().state_dict()
    renamed = diffusers(state, 2)
    assert len(renamed) == 196 and wan_vae_names(renamed) == list(state)
    assert sum(tensor.numel() for tensor in state.values()) == 704_688_668
    assert Layout.of(state) == Layout()
    assert "encoder.down_blocks.1.downsampler.time_conv.weight" in renamed
    assert "decoder.up_blocks.0.upsampler.resample.1.bias" in renamed


@pytest.mark.skipif(not (FOLDER / "longlive2" / "vae_full_names.json").exists(), reason="only in the full golden set")
def test_names_and_shapes_are_the_published_ones():
    with torch.device("meta"):
        state = Wan22VAE().state_dict()
    theirs = json.loads((FOLDER / "longlive2" / "vae_full_names.json").read_text())["wan22_vae"]
    assert {name: list(tensor.shape) for name, tensor in state.items()} == theirs


@pytest.mark.parametrize(("kind", "channels", "needed"), [(WanVAE, 16, "Wan 2.1"), (Wan22VAE, 48, "Wan 2.2")])
def test_the_other_vae_is_named(tmp_path, small, kind, channels, needed):
    other = small if channels == 16 else wan21_autoencoder(WAN21_SMALL)
    save_file(other.state_dict(), tmp_path / "vae.safetensors")
    got = {"Wan 2.1": "Wan 2.2", "Wan 2.2": "Wan 2.1"}[needed]
    with pytest.raises(CheckpointError, match=f"the {got} VAE; the {needed} VAE is needed here.*Get wan_?{needed[4:]}"):
        load_autoencoder(tmp_path / "vae.safetensors", kind, channels)
