"""A prompt of several lines, each with the time at which it starts:

    0: a red circle moves right
    4s: a blue square moves right
    8s cut: a green star bounces
    @60 blend 1.5s: a big yellow star orbits

Before the colon stand the time (0, seconds, minutes and seconds as 0:30, or after how many chunks: @60) and, where it
is not to be recache, the transition: renew, cut, or blend and how long it takes. prompts.py says what they do. All else
is words. A text without such a line is one prompt, whatever colons it has.

    parse(text, fps)        -> prompts, each with its start time
    scene_texts(prompt)     -> what a model of several shots is told at a scene cut
    schedule(prompts, chunks, negative, guidance)    -> what `rollout` takes, once it is known where chunks begin
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .plan import Chunk
from .prompts import TRANSITIONS, PromptSchedule, TimedPrompt

DEFAULT = "recache"
SCENE_CUT = "The scene transitions. "  # how the captions of LongLive 2 begin in the first chunk of a shot
MOST = 1_000_000  # seconds or chunks
NUMBER = r"(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
SECONDS, CHUNKS = re.compile(rf"(0(?=$)|{NUMBER}(?=s$))s?", re.I), re.compile("@([0-9]+)")
CLOCK = re.compile(r"(?:([0-9]{1,2}):)?([0-9]{1,3}):([0-9]{2}(?:\.[0-9]+)?)")
NAMED = f"(?:{'|'.join(name for name in TRANSITIONS if name != 'blend')}|blend(?:\\s+[0-9.]+s?)?)"
TIME = rf"\s*(?:0|{NUMBER}s|@[0-9]+)"
TIMED = re.compile(rf"{TIME}(?:\s+{NAMED})?\s*:(?![0-9])", re.I)  # how a line of a schedule begins
CLOCKED = re.compile(rf"\s*(?P<time>{CLOCK.pattern})(?=\s|:|$)(?P<rest>\s+{NAMED}(?=\s*:))?\s*:?", re.I)
LIKE_TIMED = re.compile(rf"(?:{TIME}|\s*{CLOCK.pattern})(?=\s|:|$)", re.I)
DECADE = re.compile(r"\s*(?:1[0-9]|20)?[2-9]0s\b", re.I)
TIMES = "Write seconds as 4s or 1.5s, a number of chunks as @60, and the beginning as 0."


@dataclass(frozen=True)
class StartTime:
    """Start time of a prompt, and how it takes over from the one before.

    at          latent frame, or with `in_chunks` the number of chunks that come before
    transition  one of prompts.TRANSITIONS
    blend       latent frames that "blend" takes
    said        the time as it was written
    """

    at: int = 0
    in_chunks: bool = False
    transition: str = DEFAULT
    blend: int = 0
    said: str = "0"


@dataclass(frozen=True)
class Prompt:
    """Words of a prompt, and when they take over."""

    text: str
    start: StartTime = StartTime()


@dataclass(frozen=True)
class Word:
    """A piece of a prompt and where it stands, both counted from 1."""

    text: str
    line: int
    column: int

    def error(self, needed: str) -> ValueError:
        shown = self.text if len(self.text) <= 40 else self.text[:37] + "..."
        return ValueError(f"Got {shown!r} in line {self.line}, column {self.column} of the prompt; {needed}")


def parse(text: str, fps: float = 16.0) -> tuple[Prompt, ...]:
    """The prompts of a text, in order; seconds are counted at `fps` frames, of which a latent frame is four.

    Raises ValueError, with line and column, for what is not a schedule although a line of it begins with a time.
    """
    if not is_schedule(text):
        return (Prompt(text),)
    prompts: list[Prompt] = []
    for number, line in enumerate(_lines(text), 1):
        if line.strip():
            prompts.append(_prompt(line, number, fps, prompts))
    return tuple(prompts)


def scene_texts(prompt: Prompt) -> tuple[str, str] | None:
    """(words for a shot's first chunk, words for its others); None where no shot begins.

    One begins with a cut, and with words that say so themselves, as in the published captions.
    """
    caption = prompt.text.strip().removeprefix(SCENE_CUT.strip()).strip()
    says_so = caption != prompt.text.strip()
    return (SCENE_CUT + caption, caption) if caption and (says_so or prompt.start.transition == "cut") else None


def is_schedule(text: str) -> bool:
    """Whether a text is prompts with their times: a line of it begins with a time and a colon, or the first at 0:00.

    A single line that begins with a decade ("1950s: a diner") is a prompt.
    """
    lines = [line for line in _lines(text) if line.strip()]
    if not lines or (len(lines) == 1 and DECADE.match(lines[0])):
        return False
    clock = CLOCKED.match(lines[0])
    return any(TIMED.match(line) for line in lines) or bool(clock and not _clock_seconds(clock["time"]))


def explain_unscheduled(text: str) -> str | None:
    """Why a text that looks like a schedule is taken for one prompt; None for one that does not."""
    if is_schedule(text) or not any(LIKE_TIMED.match(line) for line in _lines(text)):
        return None
    return (
        "a line of the prompt begins with a time, but is taken for words. A schedule has a line for each prompt, the "
        "first of which begins with 0: and the others with a time such as 4s:"
    )


def _lines(text: str) -> list[str]:
    """Lines, in which the first colon may be a full-width one."""
    return [re.sub("^([^:\uff1a]*)\uff1a", r"\1:", line) for line in text.split("\n")]


def parse_start(text: str, fps: float = 16.0) -> StartTime:
    """What stands before the colon of a line that is not the first, such as `4s`, `@20 cut` or `8s blend 1.5s`.

    Raises ValueError, with the column, for anything else.
    """
    words = _words(text, 1)
    if not words:
        raise Word(text, 1, 1).error(f"a prompt that follows another has a time. {TIMES}")
    start, chunks = _time(words[0], fps)
    if not start:
        raise words[0].error("the prompt that starts at 0 is the first one. Give this one a later time.")
    transition, blend = _transition(words[1:], fps) if words[1:] else (DEFAULT, 0)
    return StartTime(start, chunks, transition, blend, words[0].text)


def _words(text: str, line: int) -> list[Word]:
    return [Word(match[0], line, match.start() + 1) for match in re.finditer(r"\S+", text)]


def _prompt(line: str, number: int, fps: float, before: list[Prompt]) -> Prompt:
    """The prompt that stands in a line."""
    head, colon, text = _split(line)
    words = _words(head, number)
    if not words:
        raise Word(":", number, len(head) + 1).error(f"a time comes before the colon. {TIMES}")
    start, chunks = _time(words[0], fps)
    if not colon:
        raise words[-1].error(
            f"a colon comes between time and prompt. Write {words[0].text}: and then what the video shows."
        )
    transition, blend = _transition(words[1:], fps) if words[1:] else (DEFAULT, 0)
    if not text.strip():
        raise Word(":", number, len(head) + 1).error("words come after the colon. Write what is seen from then on.")
    prompt = Prompt(text.strip(), StartTime(start, chunks, transition, blend, words[0].text))
    _check_order(words, prompt.start, before)
    return prompt


def _split(line: str) -> tuple[str, str, str]:
    """What comes before the colon, the colon, and the words. After a time like 0:30 it may be left out."""
    clock = CLOCKED.match(line)
    if clock is None:
        return line.partition(":")
    return clock[0].rstrip().removesuffix(":"), ":", line[clock.end() :]


def _clock_seconds(text: str) -> float:
    hours, minutes, seconds = CLOCK.fullmatch(text).groups(default="0")
    return 3600 * int(hours) + 60 * int(minutes) + float(seconds)


def _time(word: Word, fps: float) -> tuple[int, bool]:
    """(latent frame, False) or (number of chunks, True)."""
    if match := CHUNKS.fullmatch(word.text):
        return int(_number(word, match[1])), True
    if match := SECONDS.fullmatch(word.text):
        return latent_frame(_number(word, match[1]), fps), False
    if CLOCK.fullmatch(word.text):
        return latent_frame(_number(word, str(_clock_seconds(word.text))), fps), False
    if re.fullmatch("[0-9]+", word.text):
        raise word.error(f"a time has a unit. Write {word.text}s for seconds or @{word.text} for chunks.")
    raise word.error(f"where one line starts with a time, all do. {TIMES}")


def _number(word: Word, digits: str) -> float:
    if float(digits) > MOST:
        raise word.error(f"{MOST} seconds or chunks is the most. Write a smaller number.")
    return float(digits)


def latent_frame(seconds: float, fps: float) -> int:
    """The latent frame that shows a moment; the first holds one frame, the others four."""
    return -(-round(seconds * fps) // 4)


def _transition(words: list[Word], fps: float) -> tuple[str, int]:
    """A transition's name, and the latent frames that a blend takes."""
    name, length = words[0], words[1:]
    if name.text.lower() not in TRANSITIONS:
        raise name.error(f"between time and colon stands one of {', '.join(TRANSITIONS)}, or nothing.")
    wanted = 1 if name.text.lower() == "blend" else 0
    if len(length) > wanted:
        raise length[wanted].error("nothing more is needed here. Leave it out; the colon follows.")
    if not wanted:
        return name.text.lower(), 0
    if not length:
        raise name.error("a blend has a length. Write how long it takes, e.g. blend 1.5s.")
    match = SECONDS.fullmatch(length[0].text)
    if not match or not _number(length[0], match[1]):
        raise length[0].error("a blend takes a number of seconds above 0. Write e.g. blend 1.5s.")
    return "blend", max(1, round(float(match[1]) * fps / 4))


def _check_order(words: list[Word], start_time: StartTime, before: list[Prompt]) -> None:
    if not before and start_time.at:
        raise words[0].error("the first prompt starts at 0. Begin with a line 0: that says what is seen first.")
    if not before and words[1:]:
        raise words[1].error("the first prompt follows no other. Write 0: without a transition.")
    last = before[-1].start if before else None
    if last and (last.in_chunks == start_time.in_chunks or not start_time.at) and start_time.at <= last.at:
        raise words[0].error(
            f"the prompt before it starts at {last.said}, and each at least a latent frame (4 frames) after the last. "
            "Put the lines in order, or give one of them another time."
        )


@dataclass(frozen=True)
class EncodedPrompt:
    """Embeddings [B, tokens, text_dim] of a prompt, when they take over, and those for its first chunk if others."""

    start: StartTime
    embeds: Tensor
    scene: Tensor | None = None


def schedule(
    prompts: Sequence[EncodedPrompt],
    chunks: Sequence[Chunk],
    negative: Tensor | None = None,
    guidance: float = 1.0,
) -> PromptSchedule:
    """Prompt schedule of encoded prompts, each starting with a chunk of the rollout.

    Raises ValueError as `place` and `PromptSchedule` do.
    """
    frames = place([prompt.start for prompt in prompts], chunks)
    timed = [
        TimedPrompt(at, prompt.embeds, prompt.start.transition, prompt.start.blend, prompt.scene)
        for at, prompt in zip(frames, prompts)
    ]
    return PromptSchedule(tuple(timed), negative, guidance)


def place(starts: Sequence[StartTime], chunks: Sequence[Chunk]) -> list[int]:
    """The latent frames at which prompts take effect: where the first chunk begins then or later; 0 for the first.

    Raises ValueError where no chunk is left for a prompt, or none for the one before it.
    """
    found, last = [0], "0"
    for start in starts[1:]:
        frame = _first_frame(start, chunks)
        if frame <= found[-1]:
            raise ValueError(
                f"Got prompts at {last} and {start.said}, which start with the same chunk or in the wrong order; "
                "each needs a chunk of its own. Put more time between them, or make smaller chunks."
            )
        found.append(frame)
        last = start.said
    return found


def _first_frame(start: StartTime, chunks: Sequence[Chunk]) -> int:
    """Latent frame at which the first chunk begins that follows a prompt."""
    later = chunks[start.at :] if start.in_chunks else [chunk for chunk in chunks if chunk.start >= start.at]
    if not later:
        last = chunks[-1]
        moment = f"after {start.at} chunks" if start.in_chunks else f"latent frame {start.at}"
        raise ValueError(
            f"Got a prompt at {start.said} ({moment}), and the video has {len(chunks)} chunks, the last of which "
            f"begins at latent frame {last.start}. Start the prompt earlier, or make a longer video."
        )
    return later[0].start
