"""Prompts over time: which one a chunk follows, and how one gives way to the next.

    recache   the frames in the window are read again under the new prompt, so that memory and prompt agree; sinks stay
    renew     the same, and the oldest frames that are read again become the new sinks
    cut       the window is forgotten, all but the sinks: a new scene that remembers the first one
    blend     embeddings go over from the old prompt to the new one; the window stays as it is

Source of recache and renew: LongLive, arXiv 2509.22622 (KV recache).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TRANSITIONS = ("recache", "renew", "cut", "blend")
REREADING = ("recache", "renew")  # those that read the window again


@dataclass(frozen=True)
class Cue:
    """A prompt and when it starts.

    start       latent frame; it takes effect with the first chunk that starts there or later
    embeds      prompt embeddings [B, tokens, text_dim]
    transition  one of TRANSITIONS; of no consequence for the first cue
    blend       latent frames that "blend" takes
    """

    start: int
    embeds: Tensor
    transition: str = "recache"
    blend: int = 0

    def __post_init__(self) -> None:
        if self.transition not in TRANSITIONS:
            raise ValueError(f"Got transition {self.transition!r}; there is {', '.join(TRANSITIONS)}.")
        if (self.transition == "blend") != (self.blend > 0):
            raise ValueError(
                f"Got transition {self.transition!r} over {self.blend} latent frames; a blend needs 1 or more, and "
                "nothing else takes a length."
            )


@dataclass(frozen=True)
class Script:
    """The cues of a rollout, in order. Raises ValueError unless the first starts at 0 and each later than the last."""

    cues: tuple[Cue, ...]

    def __post_init__(self) -> None:
        starts = [cue.start for cue in self.cues]
        if not starts or starts[0] != 0 or any(a >= b for a, b in zip(starts, starts[1:])):
            raise ValueError(
                f"Got prompts that start at latent frames {starts}; the first starts at 0, each later than the last."
            )
        sizes = {len(cue.embeds) for cue in self.cues}
        if len(sizes) > 1:
            raise ValueError(f"Got prompts for batches of {sorted(sizes)}; all must be for the same number of videos.")

    @classmethod
    def of(cls, prompt: Tensor | Sequence[Cue]) -> Script:
        """A script from one prompt's embeddings, or from cues."""
        return cls((Cue(0, prompt),) if isinstance(prompt, Tensor) else tuple(prompt))

    @property
    def rereads(self) -> bool:
        """Whether finished frames are needed again at a switch."""
        return any(cue.transition in REREADING for cue in self.cues[1:])

    def number_at(self, frame: int) -> int:
        """Index of the cue that a chunk starting at `frame` follows."""
        return sum(cue.start <= frame for cue in self.cues) - 1

    def embeds_at(self, frame: int) -> tuple[tuple[int, float], Tensor]:
        """What a chunk starting at `frame` follows: (cue, how far it has blended in), and the embeddings."""
        number = self.number_at(frame)
        cue = self.cues[number]
        gone = min(1.0, (frame - cue.start + 1) / cue.blend) if number and cue.transition == "blend" else 1.0
        if gone == 1.0:
            return (number, gone), cue.embeds
        before, after = padded_alike(self.cues[number - 1].embeds, cue.embeds)
        return (number, gone), torch.lerp(before, after, gone)


def padded_alike(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both [B, tokens, text_dim] with zeros up to the longer one's tokens; zeros are how prompts are padded anyway."""
    tokens = max(a.shape[1], b.shape[1])
    return tuple(torch.nn.functional.pad(x, (0, 0, 0, tokens - x.shape[1])) for x in (a, b))
