"""The Wan VAE against the published code's outputs, and the laws of streaming and of tiles."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sf_core.autoencoders.wan_vae import (
    DecoderStream,
    EncoderStream,
    Layout,
    WanVAE,
    from_model_space,
    spans,
    to_model_space,
)
from tests.core.goldens import golden
from tests.core.regenerate import weights

TINY = Layout(widths=(16, 32, 64, 64))  # what the golden tensors were made with
SMALL = Layout(widths=(2, 4, 4, 4), blocks=1)  # two latent pixels of margin


def autoencoder(layout, seed=11):
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in WanVAE(layout).state_dict().items()}
    return WanVAE.from_state_dict(weights(shapes, seed))


@pytest.fixture(scope="module")
def published():
    return golden("g4_vae")


@pytest.fixture(scope="module")
def vae():
    return autoencoder(TINY)


@pytest.fixture(scope="module")
def small():
    return autoencoder(SMALL)


def latents_of(x):  # golden layout [B, F, C, H, W] <-> [B, C, F, H, W]
    return x.transpose(1, 2)


def pixels_of(frames):  # frames [B, T, H, W, 3] in 0..1 -> golden layout [B, T, 3, H, W] in -1..1
    return frames.movedim(-1, 2) * 2 - 1


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def clip(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def assert_near(ours, theirs, atol=2e-5):
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


def test_decode_is_the_published_decode(vae, published):
    stream = DecoderStream(vae)
    pieces = [stream.decode(piece) for piece in latents_of(published["decode.z"]).split(3, 2)]
    assert [piece.shape[1] for piece in pieces] == [9, 12, 12]
    ours, theirs = pixels_of(torch.cat(pieces, 1)), published["decode.pixels_clamped"]
    assert_near(ours[:, :: 32 // (theirs.shape[1] - 1)], theirs)  # of the 33 frames, every fourth is kept


def test_every_clip_begins_afresh(vae, published):
    stream = DecoderStream(vae)
    stream.decode(drawn(1, 16, 2, 4, 6))
    stream.reset()
    assert_near(pixels_of(stream.decode(latents_of(published["decode2.z"]))), published["decode2.pixels"])


def test_encode_is_the_published_encode(vae, published):
    frames = published["pixels"].movedim(1, -1) / 2 + 0.5
    assert_near(vae.encode(frames), latents_of(published["encode.latent"]))
    assert_near(vae.encode(frames[:, :1]), latents_of(published["encode1.latent"]))


def test_latents_are_normalised_as_published(published):
    raw = drawn(2, 16, 1, 2, 2)
    mean, std = (published[name].view(1, 16, 1, 1, 1) for name in ("mean", "std"))
    assert_near(to_model_space(raw), (raw - mean) / std, atol=1e-6)
    assert_near(from_model_space(to_model_space(raw)), raw, atol=1e-6)


def cuts(total, numbers):
    """Sizes of pieces that add up to `total`."""
    sizes = []
    for number in numbers:
        sizes.append(min(number, total - sum(sizes)))
    return [size for size in [*sizes, total - sum(sizes)] if size]


CHUNKING = st.lists(st.integers(1, 6), max_size=8)
LATENT_SIZE = st.tuples(st.integers(1, 8), st.integers(1, 8))
TILE = st.sampled_from([None, 5, 7])


@settings(max_examples=12)
@given(st.integers(1, 7), CHUNKING, st.integers(1, 2), LATENT_SIZE, TILE)
def test_streamed_decode_is_the_whole_decode(small, latents, numbers, batch, size, tile):
    x = drawn(batch, 16, latents, *size)
    stream = DecoderStream(small, tile)
    streamed = torch.cat([stream.decode(piece) for piece in x.split(cuts(latents, numbers), 2)], 1)
    assert streamed.shape == (batch, 4 * latents - 3, 8 * size[0], 8 * size[1], 3)
    assert torch.equal(streamed, small.decode(x, tile))


@settings(max_examples=12)
@given(st.integers(1, 23), CHUNKING, st.integers(1, 2), LATENT_SIZE, TILE)
def test_streamed_encode_is_the_whole_encode(small, frames, numbers, batch, size, tile):
    x = clip(batch, frames, 8 * size[0], 8 * size[1], 3)
    stream = EncoderStream(small, tile)
    pieces = [stream.encode(piece) for piece in x.split(cuts(frames, numbers), 1)]
    streamed = torch.cat([*pieces, stream.flush()], 2)
    assert streamed.shape == (batch, 16, 1 + (frames - 1) // 4, *size)
    assert torch.equal(streamed, small.encode(x, tile))


@torch.no_grad()
def test_latents_after_the_first_may_be_decoded_all_at_once(vae):
    raw, past = drawn(1, 16, 3, 3, 2), {}
    pieces = [vae.decoder.fine(vae.decode_coarse(z, past), past) for z in raw.split([1, 2], 2)]
    at_once = torch.cat(pieces, 2).movedim(1, -1).clamp(-1, 1) / 2 + 0.5
    assert_near(vae.decode(to_model_space(raw)), at_once)


def test_tiles_leave_no_seams_in_what_is_decoded(vae):
    x = drawn(1, 16, 2, 7, 10)
    assert_near(vae.decode(x, tile=8), vae.decode(x))


def test_tiles_leave_no_seams_in_what_is_encoded(vae):
    x = clip(1, 5, 56, 80, 3)
    assert_near(vae.encode(x, tile=8), vae.encode(x))


@given(st.integers(1, 200), st.integers(1, 3), st.integers(1, 60))
def test_tiles_cover_every_latent_pixel_once(length, margin, more):
    tile = 2 * margin + more
    cut = spans(length, tile, margin)
    covered = [place for span in cut for place in range(span.core.start, span.core.stop)]
    assert covered == list(range(length))
    for span in cut:
        assert span.seen.stop - span.seen.start <= tile
        assert span.seen.start in (0, span.core.start - margin)
        assert span.seen.stop in (length, span.core.stop + margin)


def test_a_tile_that_holds_only_margins_is_refused(vae):
    with pytest.raises(ValueError, match="Use 12 or more"):
        DecoderStream(vae, tile=6)


def bytes_held(stream):
    pasts = [stream.past, *(tile.past for tile in stream.fine.tiles)]
    return sum(tensor.untyped_storage().nbytes() for past in pasts for tensor in past.values())


def test_what_is_remembered_does_not_grow(small):
    decoder, encoder = DecoderStream(small), EncoderStream(small)
    decoder.decode(drawn(1, 16, 2, 3, 3))
    encoder.encode(clip(1, 5, 24, 24, 3))
    held = bytes_held(decoder), bytes_held(encoder)
    decoder.decode(drawn(1, 16, 5, 3, 3))
    encoder.encode(clip(1, 23, 24, 24, 3))
    assert (bytes_held(decoder), bytes_held(encoder)) == held
    assert encoder.waiting.untyped_storage().nbytes() == 3 * 3 * 24 * 24 * 4


def test_clips_of_a_batch_do_not_meet(vae):
    x = drawn(2, 16, 2, 2, 3)
    assert_near(vae.decode(x), torch.cat([vae.decode(one) for one in x.split(1)]))


def test_two_streams_over_one_autoencoder_do_not_meet(small):
    x, y = drawn(2, 1, 16, 4, 2, 2)
    one, other = DecoderStream(small), DecoderStream(small)
    pieces = []
    for i in (slice(0, 2), slice(2, 4)):
        pieces.append(one.decode(x[:, :, i]))
        other.decode(y[:, :, i])
    assert torch.equal(torch.cat(pieces, 1), small.decode(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_come_close(dtype, vae):
    half, z = autoencoder(TINY).to(dtype), drawn(1, 16, 2, 2, 2)
    frames = half.decode(z)
    assert frames.dtype == torch.float32 and frames.min() >= 0 and frames.max() <= 1
    assert (frames - vae.decode(z)).abs().mean() < 0.02
    latents = half.encode(frames)
    assert latents.dtype == torch.float32
    assert (latents - vae.encode(frames)).abs().mean() < 0.01


def test_inputs_are_left_as_they_were(small):
    x, frames = drawn(1, 16, 2, 2, 2), clip(1, 5, 16, 16, 3)
    before = x.clone(), frames.clone()
    small.decode(x)
    small.encode(frames)
    assert torch.equal(x, before[0]) and torch.equal(frames, before[1])


def test_frames_that_fill_no_latent_are_left_out(small):
    frames = clip(1, 8, 16, 16, 3)
    assert torch.equal(small.encode(frames), small.encode(frames[:, :5]))
    stream = EncoderStream(small)
    stream.encode(frames)
    assert stream.flush().shape == (1, 16, 0, 2, 2)
    assert torch.equal(stream.encode(frames), small.encode(frames))


@pytest.mark.parametrize("layout", [Layout(), TINY, SMALL, Layout(widths=(8, 8, 16, 24), time=(True, False, True))])
def test_the_layout_is_read_off_the_weights(layout):
    with torch.device("meta"):
        assert Layout.of(WanVAE(layout).state_dict()) == layout


def test_the_tensors_given_are_the_tensors_used():
    state = autoencoder(SMALL).state_dict()
    ours = WanVAE.from_state_dict(state).state_dict()
    assert all(ours[name].data_ptr() == tensor.data_ptr() for name, tensor in state.items())


@pytest.mark.parametrize("change", ["another model", "missing", "unknown", "wrong shape", "48 channels"])
def test_weights_of_something_else_are_refused(change):
    state = dict(WanVAE(SMALL).state_dict())
    if change == "another model":
        state = {"blocks.0.self_attn.q.weight": torch.zeros(4, 4)}
    elif change == "missing":
        del state["encoder.middle.0.residual.2.bias"]
    elif change == "unknown":
        state["post.weight"] = torch.zeros(3)
    elif change == "wrong shape":
        state["decoder.conv1.bias"] = torch.zeros(5)
    else:
        state = WanVAE(Layout(channels=48, widths=SMALL.widths, blocks=1)).state_dict()
    with pytest.raises(ValueError, match="do not make up a Wan 2.1 VAE"):
        WanVAE.from_state_dict(state)


@pytest.mark.parametrize("shape", [(1, 4, 3, 2, 2), (16, 3, 2, 2), (1, 16, 0, 2, 2)])
def test_latents_of_another_model_are_refused(small, shape):
    with pytest.raises(ValueError, match="needs .*16"):
        DecoderStream(small).decode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 4, 20, 16, 3), (1, 4, 16, 16, 4), (4, 16, 16, 3), (1, 0, 16, 16, 3)])
def test_frames_that_cannot_be_encoded_are_refused(small, shape):
    with pytest.raises(ValueError, match="multiples of 8"):
        EncoderStream(small).encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 16, 1, 2, 2), (2, 16, 1, 2, 3)])
def test_another_batch_or_size_needs_a_reset(small, shape):
    stream = DecoderStream(small)
    stream.decode(torch.zeros(2, 16, 1, 2, 2))
    with pytest.raises(ValueError, match="reset"):
        stream.decode(torch.zeros(shape))


def test_a_clip_needs_a_frame(small):
    with pytest.raises(ValueError, match="at least one"):
        EncoderStream(small).flush()
