"""Prompts with times, cut up and put together again."""

from collections.abc import Callable
from pathlib import Path
from random import Random

from sf_core.sampling import prompt_text

WHOLE = (
    "a red circle moves right",
    "0: a fox in the snow\n2.5s: it turns its head\n",
    "0: a fox\n@3 cut: a hare\n1:20.5 blend 1.5s: an owl: it flies",
    "0s: noon in the 1980s\r\n00:04 hard: dusk\n\n# a note\n10s soft: night",
    "5 dogs: one barks\n3: 20 pm",
)
PIECES = (
    "0", "1", "9" * 30, "9" * 5000, "1e9", "0.5", ".5", "-1", "nan", "inf", "\u00b2", "\u0663", "\uff11", "\u00bd",
    "s", "ms", "@", "@@", ":", "\uff1a", "::", "1:2:3:4", "00:00:00.000", "cut", "blend", "blend 1.5s", "hard", "soft",
    " ", "\t", "\n", "\r", "\u2028", "\u200b", "\x00", "\ufeff", "\ud800", "\U0001f600", "#", "(", ")", "%s", "{}",
    "\\", "a" * 1000, " " * 2000, "e\u0301", "\u0130", "\u00df",
)  # fmt: skip
RATES = (16.0, 16.0, 1.0, 24.0, 120.0, 0.5, 29.97)


def prompts(folder: Path) -> Callable[[Random], object]:
    """Parsing prompts, what is said of times that are none, and start times by themselves."""

    def case(random: Random) -> object:
        text, fps = mutated(random), random.choice(RATES)
        if random.random() < 0.2:
            return prompt_text.parse_start(random.choice(text.split("\n")), fps)
        parsed = prompt_text.parse(text, fps)
        assert parsed and all(prompt.text == prompt.text.strip() or len(parsed) == 1 for prompt in parsed), text
        return prompt_text.explain_unscheduled(text)

    return case


def mutated(random: Random) -> str:
    text = random.choice((*WHOLE, ""))
    for _ in range(random.randint(0, 6)):
        at, other = sorted(random.randint(0, len(text)) for _ in range(2))
        piece = random.choice((random.choice(PIECES), chr(random.randrange(0x11000)), text[at:other]))
        text = text[:at] + piece + text[random.choice((at, other)) :]
    return text
