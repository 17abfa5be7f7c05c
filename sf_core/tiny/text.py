"""The text encoder of the built-in model: a vector per known word plus a vector per place in the sentence.

The vectors are learnt together with the model. Capitals and punctuation do not matter, and words it does not know are
left out; a prompt that leaves nothing to draw is an error, because the model would then draw anything.
"""

import re

import torch
from torch import Tensor, nn

TEXT_LEN, TEXT_DIM = 16, 128
FILLERS = frozenset("a an and around background front in is of on over the to".split())  # these describe nothing


class TinyTextEncoder(nn.Module):
    """words: the vocabulary, in the order of the embedding's rows."""

    def __init__(self, words: list[str]):
        super().__init__()
        self.words = list(words)
        self.rows = {word: row for row, word in enumerate(self.words)}
        self.embedding = nn.Embedding(len(self.words), TEXT_DIM)
        self.position = nn.Parameter(0.1 * torch.randn(TEXT_LEN, TEXT_DIM))

    def forward(self, rows: Tensor) -> Tensor:
        """rows [B, text_len] of words, -1 where the sentence is over -> embeddings [B, text_len, text_dim]."""
        there = rows >= 0
        return (self.embedding(rows.clamp(min=0)) + self.position) * there[..., None]

    def tokens(self, prompt: str) -> list[int]:
        """Rows of the known words, at most text_len. Raises ValueError when they describe nothing."""
        known = [word for word in words_of(prompt) if word in self.rows]
        if FILLERS.issuperset(known):
            shown = prompt if len(prompt) <= 60 else prompt[:57] + "..."
            names = ", ".join(word for word in self.words if word not in FILLERS)
            raise ValueError(
                f"Got the prompt {shown!r}, in which the built-in model recognises nothing; it knows {names}. "
                'Describe one shape, e.g. "a red circle moves right on a white background".'
            )
        return [self.rows[word] for word in known[:TEXT_LEN]]

    def unknown(self, prompt: str) -> list[str]:
        """The words of a prompt that are left out because the vocabulary lacks them, in order."""
        return [word for word in words_of(prompt) if word not in self.rows]

    def truncated(self, prompt: str) -> list[str]:
        """The known words of a prompt that are left out because it is longer than text_len."""
        return [word for word in words_of(prompt) if word in self.rows][TEXT_LEN:]

    def batch(self, prompts: list[str]) -> Tensor:
        """Prompts -> rows [B, text_len], -1 behind each sentence."""
        rows = torch.full((len(prompts), TEXT_LEN), -1)
        for i, prompt in enumerate(prompts):
            found = self.tokens(prompt)
            rows[i, : len(found)] = torch.tensor(found)
        return rows

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Tensor:
        """Prompts -> embeddings [B, text_len, text_dim], zeros behind each sentence. ValueError as in `tokens`."""
        return self(self.batch(prompts).to(self.position.device))

    def null(self, batch: int) -> Tensor:
        """The embedding of no prompt at all, for unconditional forwards: zeros [B, text_len, text_dim]."""
        return torch.zeros(batch, TEXT_LEN, TEXT_DIM, device=self.position.device, dtype=self.position.dtype)


def words_of(prompt: str) -> list[str]:
    """Lower-case words of letters and digits."""
    return re.findall(r"\w+", prompt.lower())
