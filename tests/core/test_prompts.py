"""Prompts that change while a video is made, and guidance."""

import pytest
import torch

from sf_core.sampling.config import Sampling
from sf_core.sampling.context import Context
from sf_core.sampling.noise import SeededNoise
from sf_core.sampling.prompts import TRANSITIONS, PromptSchedule, TimedPrompt
from sf_core.wan.attention import FullAttention
from sf_core.wan.model import encode_prompt, velocity
from tests.core.rolling import roll_out
from tests.core.test_rollout import PROMPT, SMALL, WAN, equal, roll

OTHER = torch.randn(1, 4, SMALL.text_dim, generator=torch.Generator().manual_seed(2))
WINDOW = Sampling(window=6, sink=1)


def timed(transition, start=6, blend=0):
    return [TimedPrompt(0, PROMPT), TimedPrompt(start, OTHER, transition, blend or (6 if transition == "blend" else 0))]


@pytest.mark.parametrize("transition", TRANSITIONS)
def test_nothing_before_a_switch_changes_and_everything_after_does(transition):
    alone, switched = roll(12, WINDOW), roll(12, WINDOW, prompt=timed(transition))
    assert torch.equal(switched[:, :, :6], alone[:, :, :6])
    for chunk in (6, 9):
        assert (switched[:, :, chunk : chunk + 3] - alone[:, :, chunk : chunk + 3]).abs().amax() > 1e-3


def test_transitions_differ():
    videos = [roll(15, WINDOW, prompt=timed(transition, 9))[:, :, 9:] for transition in TRANSITIONS]
    for i, a in enumerate(videos):
        assert all((a - b).abs().amax() > 1e-4 for b in videos[:i])


def test_a_switch_waits_for_the_next_chunk():
    assert torch.equal(roll(12, WINDOW, prompt=timed("cut", 4)), roll(12, WINDOW, prompt=timed("cut", 6)))


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize(("start", "frames"), [(13, range(7, 13)), (10, range(4, 10)), (7, range(7))])
def test_a_recache_reads_sinks_again_only_while_they_are_the_first_frames(monkeypatch, pinned, start, frames):
    read, commit = [], Context._commit

    def spy(self, x0, timestep, attend):
        read.append(attend.frames)
        commit(self, x0, timestep, attend)

    monkeypatch.setattr(Context, "_commit", spy)
    roll(19, Sampling(window=9, sink=3, pinned=pinned, first_chunk=1), prompt=timed("recache", start))
    assert max(read, key=len) == frames


def test_a_cut_without_sinks_starts_afresh():
    # Positions go on, but rotary attention knows distances only: the rest is the other prompt's video, with its noise.
    def later(frames):
        """The seed's noise, `frames` later."""
        noise = SeededNoise(0)
        return lambda start, *rest: noise(start + frames, *rest)

    def video(prompt, frames, offset):
        return roll_out(WAN, Sampling(window=6), prompt, later(offset), frames, 4, 6)

    equal(video(timed("cut"), 15, 0)[:, :, 6:], video(OTHER, 9, 6))


def test_a_blend_ends_at_the_new_prompt():
    schedule = PromptSchedule(tuple(timed("blend", start=6, blend=6)))
    keys = [schedule.embeds_at(frame)[0] for frame in (0, 3, 6, 9, 12)]
    assert keys[:2] == [(0, 1.0)] * 2 and keys[-1] == (1, 1.0)
    assert 0 < keys[2][1] < keys[3][1] < 1
    assert schedule.embeds_at(12)[1] is OTHER
    halfway = schedule.embeds_at(8)[1]
    torch.testing.assert_close(halfway[:, :4], (PROMPT[:, :4] + OTHER) / 2)


@torch.no_grad()
def test_guidance_is_the_formula_with_a_cache_for_each_branch():
    negative, scale = OTHER, 3.0
    guided = roll(3, Sampling(steps=(1000,)), negative=negative, guidance=scale)
    x = SeededNoise(0)(0, 3, 0, (1, SMALL.channels, 4, 6))
    see = FullAttention(SMALL, range(3), 4, 6)
    positive, negative = (velocity(WAN, x, 1000, encode_prompt(WAN, embeds), see) for embeds in (PROMPT, OTHER))
    equal(guided, x - (negative + scale * (positive - negative)))


def test_guidance_of_ones_own_gets_both_predictions_and_the_step():
    steps = []

    def line(x, positive, negative, step):
        steps.append(step.sigma)
        return torch.lerp(negative, positive, 3.0)

    usual = roll(6, WINDOW, negative=OTHER, guidance=3.0)
    assert torch.allclose(roll(6, WINDOW, negative=OTHER, guidance=3.0, guide=line), usual, atol=1e-4)
    assert steps == [step.sigma for step in WINDOW.steps_of(False)] * 2


def test_guidance_of_ones_own_gets_the_negative_prompt_at_1_where_there_is_one():
    given = []

    def note(x, positive, negative, step):
        given.append(negative is not None)
        return positive

    usual = roll(3, WINDOW)
    assert torch.equal(roll(3, WINDOW, guide=note), usual)
    assert torch.allclose(roll(3, WINDOW, negative=OTHER, guide=note), usual, atol=1e-5)
    assert set(given) == {False, True}


def test_guidance_towards_the_same_prompt_changes_nothing_however_long():
    equal(roll(12, WINDOW, negative=PROMPT, guidance=4.0), roll(12, WINDOW))


def test_guidance_needs_a_negative_prompt():
    with pytest.raises(ValueError, match="guidance 4 with no negative prompt"):
        roll(3, guidance=4.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TimedPrompt(0, PROMPT, "fade"), "transition 'fade'"),
        (lambda: TimedPrompt(3, PROMPT, "blend"), "a blend needs 1 or more"),
        (lambda: TimedPrompt(3, PROMPT, "cut", 3), "nothing else takes a length"),
        (lambda: PromptSchedule(()), r"start at latent frames \[\]"),
        (lambda: PromptSchedule((TimedPrompt(3, PROMPT),)), "the first starts at 0"),
        (lambda: PromptSchedule((TimedPrompt(0, PROMPT), TimedPrompt(0, OTHER))), "each later"),
        (
            lambda: PromptSchedule((TimedPrompt(0, PROMPT), TimedPrompt(3, OTHER.expand(2, -1, -1)))),
            r"batches of \[1, 2\]",
        ),
    ],
)
def test_impossible_schedules_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
