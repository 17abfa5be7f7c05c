"""Prompts with times: what a text means, and what the built-in model makes of it."""

import re
import time

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from sf_core import tiny
from sf_core.autoencoders.stream import DecoderStream
from sf_core.cli.evaluate import ask
from sf_core.sampling.config import PRESETS, Sampling
from sf_core.sampling.noise import SeededNoise
from sf_core.sampling.plan import cut_into_chunks
from sf_core.sampling.prompt_text import (
    EncodedPrompt,
    Prompt,
    StartTime,
    explain_unscheduled,
    parse,
    parse_start,
    place,
    schedule,
)
from sf_core.tiny import detect
from tests.core.rolling import roll_out

STORY = """
0: a red circle moves right
4s: a blue square: big
8.5s cut: a green star

@60 blend 1.5s: a yellow triangle
"""
CHUNKS = cut_into_chunks(21, Sampling())  # chunks begin at 0, 3, ... 18


def test_a_line_says_when_and_how_a_prompt_comes_in():
    assert parse(STORY) == (
        Prompt("a red circle moves right"),
        Prompt("a blue square: big", StartTime(16, said="4s")),
        Prompt("a green star", StartTime(34, transition="cut", said="8.5s")),
        Prompt("a yellow triangle", StartTime(60, True, "blend", 6, "@60")),
    )


def test_seconds_are_counted_at_the_fps():
    assert parse("0: a\n4s: b", fps=24)[1].start.at == 24


def test_spaces_capitals_and_line_ends_do_not_matter():
    second = Prompt("b", StartTime(16, transition="cut", said="4S"))
    assert parse("  0 :  a\r\n\r\n\t4S  CUT :b\r\n") == (Prompt("a"), second)


@pytest.mark.parametrize(
    "text",
    [
        "a red circle",
        "  kept as it is  ",
        "style: oil painting, a fox",
        "2001: a space odyssey",
        "16:9, a fox runs",
        "0:30 on a digital clock",
        "12: angry men",
        "two lines\nof one prompt: no times",
        "@home: a robot",
        "http://example.org",
        "1920s cut glass, a red circle",
        "80s blend of a red circle and neon",
        "1950s: a red circle in a diner",
        "90s: skaters",
        "4:3, a fox\n16:9, a wolf",
    ],
)
def test_a_text_without_times_is_one_prompt(text):
    assert parse(text) == (Prompt(text),)


@pytest.mark.parametrize(
    ("text", "frames"),
    [
        ("0\uff1aa\n1s\uff1ab", [0, 4]),
        ("0:00 a\n0:01 b", [0, 4]),
        ("0:00: a\n0:01.5 cut: b\n01:30: c", [0, 6, 360]),
        ("00:00:00 a\n00:01:30 b", [0, 360]),
        ("0: a\n0:02: b", [0, 8]),
        ("0s: a\n2s\uff1a b: c", [0, 8]),
    ],
)
def test_times_are_read_as_people_write_them(text, frames):
    prompts = parse(text)
    assert [prompt.start.at for prompt in prompts] == frames
    assert [prompt.text[0] for prompt in prompts] == list("abc"[: len(frames)])
    assert explain_unscheduled(text) is None


def test_a_clock_may_have_a_transition_and_seconds_a_fraction():
    second = parse("0:00 a\n0:01.5 cut: b")[1]
    assert (second.start.at, second.start.transition, second.text) == (6, "cut", "b")


@pytest.mark.parametrize(
    ("text", "looks"), [("0:30 on a clock\nand birds", True), ("1950s: a diner", True), ("a fox", False)]
)
def test_what_looks_like_a_schedule_and_is_none_is_said(text, looks):
    assert parse(text) == (Prompt(text),)
    assert ("begins with a time" in (explain_unscheduled(text) or "")) == looks


def test_times_may_be_words_of_a_prompt():
    assert parse("0: 1950s: a diner") == (Prompt("1950s: a diner"),)


MALFORMED = [
    ("4s: a", 1, 1, "the first prompt starts at 0"),
    ("@3: a", 1, 1, "the first prompt starts at 0"),
    ("a fox\n4s: b", 1, 1, "all do"),
    ("0: a\n4: b", 2, 1, "Write 4s for seconds or @4"),
    ("0: a\n4sec: b", 2, 1, "Write seconds as 4s"),
    ("0: a\n-4s: b", 2, 1, "Write seconds as 4s"),
    ("0: a\n1,5s: b", 2, 1, "Write seconds as 4s"),
    ("0: a\n1m30s: b", 2, 1, "Write seconds as 4s"),
    ("0: a\n@1.5: b", 2, 1, "Write seconds as 4s"),
    ("0: a\n4s b", 2, 4, "a colon comes between"),
    ("0: a\n  : b", 2, 3, "a time comes before the colon"),
    ("0: a\n4s:  ", 2, 3, "words come after the colon"),
    ("0:\n4s: b", 1, 2, "words come after the colon"),
    ("0: a\n4s fade: b", 2, 4, "one of recache, renew, cut, blend"),
    ("0: a\n4s cut 2s: b", 2, 8, "nothing more is needed"),
    ("0: a\n4s blend: b", 2, 4, "a blend has a length"),
    ("0: a\n4s blend soon: b", 2, 10, "number of seconds above 0"),
    ("0: a\n4s blend 0s: b", 2, 10, "number of seconds above 0"),
    ("0: a\n4s blend 1s 2s: b", 2, 13, "nothing more is needed"),
    ("0 cut: a\n4s: b", 1, 3, "follows no other"),
    ("0: a\n4s: b\n\n 2s: c", 4, 2, "starts at 4s"),
    ("0: a\n4s: b\n4.01s: c", 3, 1, "starts at 4s"),
    ("0: a\n0: b", 2, 1, "starts at 0"),
    ("0: a\n4s: b\n0: c", 3, 1, "starts at 4s"),
    ("0: a\n9999999s: b", 2, 1, "the most"),
    (f"0: a\n@{'9' * 5000}: b", 2, 1, "the most"),
    ("0: a\nand a bird", 2, 1, "all do"),
]


@pytest.mark.parametrize(("text", "line", "column", "message"), MALFORMED, ids=[text[:20] for text, *_ in MALFORMED])
def test_malformed_schedules_are_refused_where_they_are_wrong(text, line, column, message):
    with pytest.raises(ValueError, match=rf"in line {line}, column {column} of the prompt; .*{re.escape(message)}"):
        parse(text)


@given(st.text("0:4s.@ cutblend\n-,a\u0663\u2028", max_size=40) | st.text())
@example("0: a\n" + "9" * 5000 + "s: b")
def test_any_text_is_prompts_in_order_or_an_error_with_a_remedy(text):
    try:
        prompts = parse(text)
    except ValueError as error:
        assert re.match("Got .* in line [0-9]+, column [0-9]+ of the prompt; ", str(error), re.S)
        return
    assert prompts[0].start == StartTime(said=prompts[0].start.said)
    assert prompts == (Prompt(text),) or all(prompt.text.strip() for prompt in prompts)


def test_a_long_row_of_digits_is_read_at_once():
    started = time.monotonic()
    assert len(parse("1" * 100_000 + " dogs")) == 1
    long, short = (parse(f"0: a\n1.{zeros}s: b")[1].start for zeros in ("0" * 50_000, "0"))
    assert long.at == short.at
    assert time.monotonic() - started < 2


def test_a_start_is_what_stands_before_the_colon():
    assert parse_start("4s") == StartTime(16, said="4s")
    assert parse_start("@60 blend 1.5s") == StartTime(60, True, "blend", 6, "@60")
    assert parse_start("4s cut", fps=24) == StartTime(24, transition="cut", said="4s")


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [("", 1, "has a time"), ("0", 1, "a later time"), ("4", 1, "Write 4s"), ("4s fade", 4, "one of recache")],
)
def test_other_starts_are_refused_where_they_are_wrong(text, column, message):
    with pytest.raises(ValueError, match=f"line 1, column {column} .*{message}"):
        parse_start(text)


# --- Among chunks ----------------------------------------------------------------------------------------------------


def begin(text):
    return place([prompt.start for prompt in parse(text)], CHUNKS)


def test_a_prompt_starts_with_the_next_chunk():
    assert begin("0: a\n2s: b\n2.5s: c\n@6: d") == [0, 9, 12, 18]


@pytest.mark.parametrize("late", ["5s", "@7"])
def test_a_prompt_after_the_last_chunk_is_refused(late):
    with pytest.raises(ValueError, match=f"at {late} .*7 chunks, the last of which begins at latent frame 18"):
        begin(f"0: a\n{late}: b")


@pytest.mark.parametrize("text", ["0: a\n2s: b\n2.25s: c", "0: a\n@3: b\n1s: c"])
def test_prompts_that_leave_each_other_no_chunk_are_refused(text):
    with pytest.raises(ValueError, match="each needs a chunk of its own"):
        begin(text)


# --- The built-in model ----------------------------------------------------------------------------------------------


def test_built_in_model_follows_a_new_prompt_within_two_chunks_and_the_old_one_until_then():
    n, switch = 10, 9  # videos; latent frame
    frames, sampling, noise = switch + 6 + 9, PRESETS["tiny"], SeededNoise(0)
    _, first = ask(n, 0)
    after, then = ask(n, 1)
    wan, text, vae = tiny.load_transformer(), tiny.load_text_encoder(), tiny.load_autoencoder()
    later = StartTime(switch // 3, in_chunks=True)
    shots = [EncodedPrompt(StartTime(), text.encode(first)), EncodedPrompt(later, text.encode(then))]

    def video(prompt, frames):
        return roll_out(wan, sampling, prompt, noise, frames, 8, 8)

    switched = video(schedule(shots, cut_into_chunks(frames, sampling)).prompts, frames)
    assert torch.equal(switched[:, :, :switch], video(text.encode(first), switch))
    later = DecoderStream(vae).decode(switched[:, :, switch + 5 :])[:, 1:]  # two chunks on, one period of all motions
    found = detect.matches(detect.read(later), after)
    shares = {name: value.float().mean().item() for name, value in found.items()}
    assert min(shares[name] for name in ("colour", "shape", "motion")) >= 0.8, shares
