"""Prompts over time: which one a chunk follows, and how one gives way to the next.

    recache   the frames in the window are read again under the new prompt, so that memory and prompt agree; sinks stay
    renew     the same, and the oldest frames that are read again become the new sinks
    cut       the window is forgotten, all but the sinks: a new scene that remembers the first one
    blend     embeddings go over from the old prompt to the new one; the window stays as it is

Source of recache and renew: LongLive, arXiv 2509.22622 (KV recache).

Models of several shots (LongLive 2) read nothing again: to them recache and renew change the words alone, and a cut is
a scene cut (wan/shot_cache.py). Of a shot's first chunk they are told in words, too, that the scene changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .schedule import Step

TRANSITIONS = ("recache", "renew", "cut", "blend")
REREADING = ("recache", "renew")  # those that read the window again

Guide = Callable[[Tensor, Tensor, Tensor | None, Step], Tensor]
"""Guidance of one's own: x_t, x0 of the prompt, x0 of the negative prompt if there is one, step -> x0.

All are [B, C, frames, H, W] in model space; it takes the place of the straight line through both predictions.
"""


@dataclass(frozen=True)
class TimedPrompt:
    """A prompt and when it starts.

    start       latent frame; it takes effect with the first chunk that starts there or later
    embeds      prompt embeddings [B, tokens, text_dim]
    transition  one of TRANSITIONS; of no consequence for the first prompt
    blend       latent frames that "blend" takes
    scene       embeddings [B, tokens, text_dim] for its first chunk, where the words of that are others
    """

    start: int
    embeds: Tensor
    transition: str = "recache"
    blend: int = 0
    scene: Tensor | None = None

    def __post_init__(self) -> None:
        if self.transition not in TRANSITIONS:
            raise ValueError(f"Got transition {self.transition!r}; there is {', '.join(TRANSITIONS)}.")
        if (self.transition == "blend") != (self.blend > 0):
            raise ValueError(
                f"Got transition {self.transition!r} over {self.blend} latent frames; a blend needs 1 or more, and "
                "nothing else takes a length."
            )


@dataclass(frozen=True)
class PromptSchedule:
    """The prompts of a rollout, in order, and what they are guided away from.

    prompts   the first starts at 0, each later than the last, all for the same number of videos
    negative  embeddings [B, tokens, text_dim] to steer away from, where guidance is not 1
    guidance  classifier-free guidance (CFG); 1: none, which distilled models are made for. Any other value doubles the
              work and the KV cache
    guide     guidance of one's own, called at every step; with a negative prompt it gets both predictions, whatever
              `guidance` is

    Raises ValueError for prompts out of order or for different batches, and for guidance without a negative prompt.
    """

    prompts: tuple[TimedPrompt, ...]
    negative: Tensor | None = None
    guidance: float = 1.0
    guide: Guide | None = None

    def __post_init__(self) -> None:
        starts = [prompt.start for prompt in self.prompts]
        if not starts or starts[0] != 0 or any(a >= b for a, b in zip(starts, starts[1:])):
            raise ValueError(
                f"Got prompts that start at latent frames {starts}; the first starts at 0, each later than the last."
            )
        sizes = {len(prompt.embeds) for prompt in self.prompts}
        if len(sizes) > 1:
            raise ValueError(f"Got prompts for batches of {sorted(sizes)}; all must be for the same number of videos.")
        if self.is_guided and (self.negative is None or len(self.negative) != self.batch):
            got = "no negative prompt" if self.negative is None else f"negative prompts for {len(self.negative)} videos"
            raise ValueError(
                f"Got guidance {self.guidance:g} with {got}; guidance needs one for each of {self.batch}. Give a "
                "negative prompt (an empty one will do), or set guidance to 1, which step-distilled models are made "
                "for."
            )

    @classmethod
    def of(cls, embeds: Tensor, negative: Tensor | None = None, guidance: float = 1.0) -> PromptSchedule:
        """One prompt for the whole video, from its embeddings [B, tokens, text_dim]."""
        return cls((TimedPrompt(0, embeds),), negative, guidance)

    def to(self, device: torch.device) -> PromptSchedule:
        """The same with its embeddings on a device."""
        prompts = tuple(
            replace(p, embeds=p.embeds.to(device), scene=None if p.scene is None else p.scene.to(device))
            for p in self.prompts
        )
        return replace(self, prompts=prompts, negative=None if self.negative is None else self.negative.to(device))

    @property
    def batch(self) -> int:
        return len(self.prompts[0].embeds)

    @property
    def device(self) -> torch.device:
        """The device of the embeddings, which the rollout runs on."""
        return self.prompts[0].embeds.device

    @property
    def is_guided(self) -> bool:
        return self.guidance != 1 or (self.guide is not None and self.negative is not None)

    @property
    def branches(self) -> int:
        """Forwards side by side: one, or two with guidance."""
        return 2 if self.is_guided else 1

    def number_at(self, frame: int) -> int:
        """Index of the prompt that a chunk starting at `frame` follows."""
        return sum(prompt.start <= frame for prompt in self.prompts) - 1

    def embeds_at(self, frame: int, opens: bool = False) -> tuple[tuple[int, float], Tensor]:
        """What a chunk starting at `frame` follows: (prompt's index, share of it blended in), and embeddings.

        opens  whether it is the first chunk of its prompt
        """
        number = self.number_at(frame)
        prompt = self.prompts[number]
        if opens and prompt.scene is not None:
            return (number, 0.0), prompt.scene
        share = min(1.0, (frame - prompt.start + 1) / prompt.blend) if number and prompt.transition == "blend" else 1.0
        if share == 1.0:
            return (number, share), prompt.embeds
        before, after = pad_to_longer(self.prompts[number - 1].embeds, prompt.embeds)
        return (number, share), torch.lerp(before, after, share)


def pad_to_longer(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both [B, tokens, text_dim] with zeros up to the longer one's tokens; zeros are how prompts are padded anyway."""
    tokens = max(a.shape[1], b.shape[1])
    return tuple(torch.nn.functional.pad(x, (0, 0, 0, tokens - x.shape[1])) for x in (a, b))
