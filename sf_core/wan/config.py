"""Shape of a Wan DiT, read off a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WanConfig:
    """Shape of a Wan DiT. The defaults are Wan 2.1 T2V 1.3B.

    `channels` is the number of latent channels, `freq_dim` the width of the sinusoidal time embedding, `text_len` and
    `text_dim` the prompt's length in tokens and its embedding width. Raises ValueError when heads do not divide dim.
    """

    dim: int = 1536
    ffn_dim: int = 8960
    heads: int = 12
    layers: int = 30
    channels: int = 16
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.dim % self.heads or self.head_dim % 2:
            raise ValueError(
                f"Got dim {self.dim} with {self.heads} heads; rotary embeddings need an even, whole head width. "
                "Choose heads so that dim / heads is even."
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def space(self) -> int:
        """Pixels to a latent pixel, of the autoencoder that belongs to the model: Wan 2.2's has 48 channels."""
        return 16 if self.channels == 48 else 8

    def tokens_per_frame(self, height: int, width: int) -> int:
        """Tokens of one latent frame of `height` x `width` latent pixels (2 x 2 patches)."""
        return (height // 2) * (width // 2)

    def cache_bytes_per_frame(self, height: int, width: int, bytes_per_number: int = 2) -> int:
        """Bytes that the keys and values of one latent frame take over all layers, for one video."""
        return 2 * self.layers * self.tokens_per_frame(height, width) * self.dim * bytes_per_number


WAN_1_3B = WanConfig()
