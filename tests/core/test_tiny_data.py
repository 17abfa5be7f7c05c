"""The clips of the built-in model, their captions, and the detectors that read them."""

import pytest
import torch

from sf_core import tiny
from sf_core.autoencoders.stream import DecoderStream
from sf_core.cli.evaluate import WINDOW, score_truth
from sf_core.tiny import data, detect
from sf_core.tiny.autoencoder import psnr


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_detectors_read_truth_and_reconstructions():
    scores = score_truth(48, 3, tiny.load_autoencoder())
    for name, least in (("truth", 1.0), ("reconstruction", 0.97)):
        assert min(scores[name][attribute] for attribute in detect.ATTRIBUTES) >= least
    assert scores["truth"]["residual"] < 0.005
    assert scores["reconstruction"]["psnr"] >= 30


def test_clips_and_captions_depend_on_the_generator_alone():
    torch.manual_seed(1)
    first = data.draw(8, generator(5))
    torch.manual_seed(2)
    again = data.draw(8, generator(5))
    assert torch.equal(data.render(first, 5), data.render(again, 5))
    assert data.caption(first, generator(6)) == data.caption(again, generator(6))
    assert not torch.equal(data.render(first, 5), data.render(data.draw(8, generator(7)), 5))


def test_frames_are_pictures():
    frames = data.render(data.draw(16, generator(), "all"), 9)
    assert frames.shape == (16, 9, 64, 64, 3)
    assert 0 <= frames.min() and frames.max() <= 1


def test_every_motion_comes_back_after_a_period():
    frames = data.render(data.draw(64, generator(), "all"), data.PERIOD + 1)
    assert torch.allclose(frames[:, 0], frames[:, -1], atol=1e-3)


def test_held_out_combinations_are_never_drawn_for_training():
    def combinations(split):
        clips = data.draw(4000, generator(), split)
        fields = (clips.colour, clips.shape, clips.motion, clips.background)
        return set(zip(*(field.tolist() for field in fields)))

    assert data.held_out().sum() == data.COMBINATIONS // 10
    assert not combinations("trained") & combinations("held-out")


def test_captions_use_the_vocabulary_and_fit():
    captions = data.caption(data.draw(2000, generator(), "all"), generator())
    text = tiny.load_text_encoder()
    assert not any(text.unknown(caption) or text.truncated(caption) for caption in captions)
    assert {word for caption in captions for word in caption.split()} == set(text.words)


def test_a_caption_leaves_out_only_defaults():
    clips = data.draw(500, generator(), "all")
    for background, motion, caption in zip(clips.background, clips.motion, data.caption(clips, generator())):
        named = [name for name in (*data.BACKGROUNDS, "grey") if name in caption.split()]
        assert named or background == data.DEFAULT_BACKGROUND
        phrases = data.MOTION_PHRASES[data.MOTIONS[motion]]
        assert motion == data.DEFAULT_MOTION or any(phrase in caption for phrase in phrases)


def test_residual_grows_with_a_wrong_picture():
    clips = data.draw(8, generator())
    frames = data.render(clips, WINDOW)
    dirty = frames.lerp(torch.full_like(frames, 0.4), 0.3)
    assert (detect.residual(dirty, clips) > detect.residual(frames, clips) + 0.02).all()


def test_a_still_of_noise_is_read_without_fault():
    found = detect.read(torch.rand(2, 5, 64, 64, 3, generator=generator()))
    assert found.colour.shape == found.motion.shape == (2,)


@pytest.mark.parametrize("size", [(16, 16), (48, 80)])
def test_autoencoder_streams_what_it_decodes_whole(size):
    vae = tiny.load_autoencoder()
    latents = torch.randn(1, 16, 5, size[0] // 8, size[1] // 8, generator=generator())
    whole = vae.decode(latents)
    assert whole.shape == (1, 17, *size, 3)
    stream = DecoderStream(vae)
    pieces = [stream.decode(piece) for piece in latents.split((1, 3, 1), 2)]
    assert [piece.shape[1] for piece in pieces] == [1, 12, 4]
    assert torch.equal(torch.cat(pieces, 1), whole)


def test_latents_follow_the_time_of_wan():
    vae = tiny.load_autoencoder()
    frames = data.render(data.draw(8, generator()), 12)
    assert vae.encode(frames[:, :1]).shape == (8, 16, 1, 8, 8)
    assert vae.encode(frames[:, :9]).shape[2] == 3
    assert vae.encode(frames).shape[2] == 4  # 12 frames: the last is repeated
    assert torch.allclose(vae.encode(frames)[:, :, :1], vae.encode(frames[:, :1]), atol=1e-4)
    assert 0.5 < vae.encode(frames).std() < 1.5


def test_a_single_picture_survives_the_autoencoder():
    vae = tiny.load_autoencoder()
    frames = data.render(data.draw(16, generator()), 1)
    assert psnr(vae.decode(vae.encode(frames)), frames).mean() > 28


def test_a_size_that_eight_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="60 x 64 pixels.*multiples of 8"):
        tiny.load_autoencoder().encode(torch.zeros(1, 1, 64, 60, 3))
