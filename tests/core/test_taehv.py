"""TAEHV against the published code's outputs, and the laws that streaming has to keep."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from sf_core.autoencoders.stream import DecoderStream, EncoderStream, walk
from sf_core.autoencoders.taehv import TAEHV, Layout
from tests.core.regenerate import weights

GOLDEN = Path(__file__).parents[1] / "golden" / "taehv.safetensors"

TAEW2_1 = Layout()
TAEW2_2 = Layout(channels=48, patch=2)
TAEW2_2_SUPER = Layout(channels=48, patch=2, widths=(512, 256, 128, 64), super_decoder=True)
SMALL = Layout(widths=(16, 12, 8, 8), encoder_width=8)


def autoencoder(layout, seed=21):
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in TAEHV(layout).state_dict().items()}
    return TAEHV.from_state_dict(weights(shapes, seed))


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN)


@pytest.fixture(scope="module")
def taew2_1():
    return autoencoder(TAEW2_1)


@pytest.fixture(scope="module")
def taew2_2():
    return autoencoder(TAEW2_2)


@pytest.fixture(scope="module")
def small():
    return autoencoder(SMALL)


def latents_of(x):  # golden layout [B, F, C, H, W] <-> [B, C, F, H, W]
    return x.transpose(1, 2)


def frames_of(x):  # golden layout [B, T, 3, H, W] -> [B, T, H, W, 3]
    return x.permute(0, 1, 3, 4, 2)


def middle(x):  # the half of [..., H, W] that is kept of large golden tensors
    height, width = x.shape[-2:]
    return x[..., height // 4 : height // 4 + height // 2, width // 4 : width // 4 + width // 2]


def assert_near(ours, published):
    torch.testing.assert_close(ours, published, atol=2e-5, rtol=0)


def test_decode_is_the_published_decode(taew2_1, golden):
    assert_near(taew2_1.decode(latents_of(golden["z"])), frames_of(golden["decode"]))


@pytest.mark.parametrize("latents, frames", [("z", "decode.raw_untrimmed_unclamped"), ("z9", "decode9.raw")])
def test_all_frames_at_once_before_trim_and_clamp(taew2_1, golden, latents, frames):
    assert_near(middle(walk(taew2_1.decoder, golden[latents], {})), golden[f"{frames}.middle"])


def test_nine_latents_streamed_as_in_a_rollout(taew2_1, golden):
    stream = DecoderStream(taew2_1)
    pieces = [stream.decode(chunk) for chunk in latents_of(golden["z9"]).split(3, 2)]
    assert [piece.shape[1] for piece in pieces] == [9, 12, 12]
    ours = middle(torch.cat(pieces, 1).permute(0, 1, 4, 2, 3))
    assert_near(ours, golden["decode9.raw.middle"][:, 3:].clamp(0, 1))


def test_weights_without_time_upscale_decode_one_frame_per_latent(golden):
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in TAEHV(TAEW2_1).state_dict().items()}
    state = weights(shapes, 21)
    for name in ("decoder.13.conv.weight", "decoder.19.conv.weight"):
        state[name] = state[name].chunk(2)[1]
    preview = TAEHV.from_state_dict(state).decode(latents_of(golden["z"]))
    assert_near(preview, frames_of(golden["decode.no_time_upscale"]))


@pytest.mark.parametrize("frames", [16, 17])
def test_encode_is_the_published_encode(taew2_1, golden, frames):
    pixels = frames_of(golden["px"])[:, :frames]
    assert_near(taew2_1.encode(pixels), latents_of(golden[f"encode{frames}"]))


def test_taew2_2(taew2_2, golden):
    decoded = taew2_2.decode(latents_of(golden["taew2_2.z"]))
    assert_near(middle(decoded.permute(0, 1, 4, 2, 3)), golden["taew2_2.decode.middle"])
    assert_near(taew2_2.encode(frames_of(golden["taew2_2.px"])), latents_of(golden["taew2_2.encode"]))


def test_taew2_2_super(golden):
    decoded = autoencoder(TAEW2_2_SUPER).decode(latents_of(golden["taew2_2.z"]))
    assert_near(middle(decoded.permute(0, 1, 4, 2, 3)), golden["taew2_2_super.decode.middle"])


def cuts(total, numbers):
    """Sizes of pieces that add up to `total`."""
    sizes = []
    for number in numbers:
        sizes.append(min(number, total - sum(sizes)))
    return [size for size in [*sizes, total - sum(sizes)] if size]


CHUNKING = st.lists(st.integers(1, 6), max_size=12)
LATENT_SIZE = st.tuples(st.integers(1, 5), st.integers(1, 5))


@settings(max_examples=25)
@given(st.integers(1, 12), CHUNKING, st.integers(1, 3), LATENT_SIZE)
def test_streamed_decode_is_the_whole_decode(small, latents, numbers, batch, size):
    x = torch.randn(batch, 16, latents, *size, generator=torch.Generator().manual_seed(latents))
    stream = DecoderStream(small)
    streamed = torch.cat([stream.decode(piece) for piece in x.split(cuts(latents, numbers), 2)], 1)
    assert streamed.shape == (batch, 4 * latents - 3, 8 * size[0], 8 * size[1], 3)
    assert torch.equal(streamed, small.decode(x))
    at_once = walk(small.decoder, x.transpose(1, 2), {})[:, 3:].clamp(0, 1)
    torch.testing.assert_close(streamed, frames_of(at_once), atol=1e-5, rtol=0)


@settings(max_examples=25)
@given(st.integers(1, 23), CHUNKING, st.integers(1, 3), LATENT_SIZE)
def test_streamed_encode_is_the_whole_encode(small, frames, numbers, batch, size):
    x = torch.rand(batch, frames, 8 * size[0], 8 * size[1], 3, generator=torch.Generator().manual_seed(frames))
    stream = EncoderStream(small)
    pieces = [stream.encode(piece) for piece in x.split(cuts(frames, numbers), 1)]
    streamed = torch.cat([*pieces, stream.flush()], 2)
    assert streamed.shape == (batch, 16, -(-frames // 4), *size)
    assert torch.equal(streamed, small.encode(x))


def test_encode_repeats_the_last_frame(small):
    x = torch.rand(1, 6, 16, 16, 3)
    longer = torch.cat([x, x[:, -1:], x[:, -1:]], 1)
    assert torch.equal(small.encode(x), small.encode(longer))


def test_clips_of_a_batch_do_not_meet(small):
    x = torch.randn(3, 16, 4, 2, 3)
    alone = torch.cat([small.decode(clip) for clip in x.split(1)])
    torch.testing.assert_close(small.decode(x), alone, atol=1e-5, rtol=0)


def test_reset_starts_another_clip(small):
    x = torch.randn(1, 16, 3, 2, 2)
    stream = DecoderStream(small)
    first = stream.decode(x)
    assert not torch.equal(stream.decode(x)[:, 3:], first)
    stream.reset()
    assert torch.equal(stream.decode(x), first)


def test_two_streams_over_one_autoencoder_do_not_meet(small):
    x, y = torch.randn(2, 1, 16, 4, 2, 2)
    one, other = DecoderStream(small), DecoderStream(small)
    pieces = []
    for i in (slice(0, 2), slice(2, 4)):
        pieces.append(one.decode(x[:, :, i]))
        other.decode(y[:, :, i])
    assert torch.equal(torch.cat(pieces, 1), small.decode(x))


def test_frames_are_float32_in_0_to_1_whatever_the_weights_are():
    vae = autoencoder(SMALL).bfloat16()
    frames = vae.decode(100 * torch.randn(1, 16, 2, 2, 2))
    assert frames.dtype == torch.float32 and frames.min() >= 0 and frames.max() <= 1
    assert vae.encode(frames).dtype == torch.float32


def test_latents_are_left_as_they_were(small):
    x = torch.randn(1, 16, 3, 2, 2)
    before = x.clone()
    small.decode(x)
    assert torch.equal(x, before)


def test_the_layout_is_read_off_the_weights():
    for layout in (TAEW2_1, TAEW2_2, TAEW2_2_SUPER, SMALL, Layout(grow=(1, 1, 1))):
        with torch.device("meta"):
            assert Layout.of(TAEHV(layout).state_dict()) == layout


@pytest.mark.parametrize("change", ["another model", "missing", "unknown", "wrong shape"])
def test_weights_of_something_else_are_refused(change):
    state = dict(TAEHV(SMALL).state_dict())
    if change == "another model":
        state = {"blocks.0.self_attn.q.weight": torch.zeros(4, 4)}
    elif change == "missing":
        del state["encoder.17.bias"]
    elif change == "unknown":
        state["post.weight"] = torch.zeros(3)
    else:
        state["decoder.9.conv.0.bias"] = torch.zeros(5)
    with pytest.raises(ValueError, match="do not make up a TAEHV"):
        TAEHV.from_state_dict(state)


@pytest.mark.parametrize("shape", [(1, 4, 3, 2, 2), (16, 3, 2, 2), (1, 16, 0, 2, 2)])
def test_latents_of_another_model_are_refused(small, shape):
    with pytest.raises(ValueError, match="needs .*16"):
        DecoderStream(small).decode(torch.zeros(shape))


def test_another_batch_needs_a_reset(small):
    stream = DecoderStream(small)
    stream.decode(torch.zeros(2, 16, 1, 2, 2))
    with pytest.raises(ValueError, match="reset"):
        stream.decode(torch.zeros(1, 16, 1, 2, 2))


@pytest.mark.parametrize("shape", [(1, 4, 20, 16, 3), (1, 4, 16, 16, 4), (4, 16, 16, 3)])
def test_frames_that_cannot_be_encoded_are_refused(small, shape):
    with pytest.raises(ValueError, match="multiples of 8"):
        EncoderStream(small).encode(torch.zeros(shape))


def test_a_clip_needs_a_frame(small):
    with pytest.raises(ValueError, match="at least one"):
        EncoderStream(small).flush()
