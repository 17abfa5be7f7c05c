"""Prompts that change while a video is made, and guidance."""

import pytest
import torch

from sf_core.sampling.config import Sampling
from sf_core.sampling.noise import SeededNoise
from sf_core.sampling.prompts import TRANSITIONS, Cue, Script
from sf_core.sampling.rollout import Denoiser, rollout
from sf_core.wan.attention import Sequence
from sf_core.wan.model import encode_text, velocity
from tests.core.test_rollout import PROMPT, SMALL, WAN, equal, roll

OTHER = torch.randn(1, 4, SMALL.text_dim, generator=torch.Generator().manual_seed(2))
WINDOW = Sampling(window=6, sink=1)


def cues(transition, start=6, blend=0):
    return [Cue(0, PROMPT), Cue(start, OTHER, transition, blend or (6 if transition == "blend" else 0))]


@pytest.mark.parametrize("transition", TRANSITIONS)
def test_nothing_before_a_switch_changes_and_everything_after_does(transition):
    alone, switched = roll(12, WINDOW), roll(12, WINDOW, prompt=cues(transition))
    assert torch.equal(switched[:, :, :6], alone[:, :, :6])
    for chunk in (6, 9):
        assert (switched[:, :, chunk : chunk + 3] - alone[:, :, chunk : chunk + 3]).abs().amax() > 1e-3


def test_transitions_differ():
    videos = [roll(15, WINDOW, prompt=cues(transition, 9))[:, :, 9:] for transition in TRANSITIONS]
    for i, a in enumerate(videos):
        assert all((a - b).abs().amax() > 1e-4 for b in videos[:i])


def test_a_switch_waits_for_the_next_chunk():
    assert torch.equal(roll(12, WINDOW, prompt=cues("cut", 4)), roll(12, WINDOW, prompt=cues("cut", 6)))


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize(("start", "frames"), [(13, range(7, 13)), (10, range(4, 10)), (7, range(7))])
def test_a_recache_reads_sinks_again_only_while_they_are_the_first_frames(monkeypatch, pinned, start, frames):
    read, commit = [], Denoiser.commit

    def spy(self, x0, timestep, attend):
        read.append(attend.frames)
        commit(self, x0, timestep, attend)

    monkeypatch.setattr(Denoiser, "commit", spy)
    roll(19, Sampling(window=9, sink=3, pinned=pinned, first_chunk=1), prompt=cues("recache", start))
    assert max(read, key=len) == frames


def test_a_cut_without_sinks_starts_afresh():
    # Positions go on, but rotary attention knows distances only: the rest is the other prompt's video, with its noise.
    def later(frames):
        """The seed's noise, `frames` later."""
        noise = SeededNoise(0)
        return lambda start, *rest: noise(start + frames, *rest)

    def video(prompt, frames, offset):
        chunks = rollout(WAN, Sampling(window=6), prompt, later(offset), frames, 4, 6)
        return torch.cat([chunk.latents for chunk in chunks], 2)

    equal(video(cues("cut"), 15, 0)[:, :, 6:], video(OTHER, 9, 6))


def test_a_blend_ends_at_the_new_prompt():
    script = Script.of(cues("blend", start=6, blend=6))
    keys = [script.embeds_at(frame)[0] for frame in (0, 3, 6, 9, 12)]
    assert keys[:2] == [(0, 1.0)] * 2 and keys[-1] == (1, 1.0)
    assert 0 < keys[2][1] < keys[3][1] < 1
    assert script.embeds_at(12)[1] is OTHER
    halfway = script.embeds_at(8)[1]
    torch.testing.assert_close(halfway[:, :4], (PROMPT[:, :4] + OTHER) / 2)


@torch.no_grad()
def test_guidance_is_the_formula_with_a_cache_for_each_branch():
    negative, scale = OTHER, 3.0
    guided = roll(3, Sampling(steps=(1000,)), negative=negative, guidance=scale)
    x = SeededNoise(0)(0, 3, 0, (1, SMALL.channels, 4, 6))
    see = Sequence(SMALL, range(3), 4, 6)
    positive, negative = (velocity(WAN, x, 1000, encode_text(WAN, embeds), see) for embeds in (PROMPT, OTHER))
    equal(guided, x - (negative + scale * (positive - negative)))


def test_guidance_towards_the_same_prompt_changes_nothing_however_long():
    equal(roll(12, WINDOW, negative=PROMPT, guidance=4.0), roll(12, WINDOW))


def test_guidance_needs_a_negative_prompt():
    with pytest.raises(ValueError, match="guidance 4 with no negative prompt"):
        roll(3, guidance=4.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cue(0, PROMPT, "fade"), "transition 'fade'"),
        (lambda: Cue(3, PROMPT, "blend"), "a blend needs 1 or more"),
        (lambda: Cue(3, PROMPT, "cut", 3), "nothing else takes a length"),
        (lambda: Script(()), r"start at latent frames \[\]"),
        (lambda: Script((Cue(3, PROMPT),)), "the first starts at 0"),
        (lambda: Script((Cue(0, PROMPT), Cue(0, OTHER))), "each later"),
        (lambda: Script((Cue(0, PROMPT), Cue(3, OTHER.expand(2, -1, -1)))), r"batches of \[1, 2\]"),
    ],
)
def test_impossible_scripts_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
