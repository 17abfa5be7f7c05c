"""The autoencoder of the built-in model: 16 channels, one latent pixel for 8 x 8 pixels of 4 frames.

The encoder is a fixed linear map, the principal components of 4 x 8 x 8 x 3 blocks of the training clips; their scale
is flattened (standard deviation ~ eigenvalue^0.15) so that latents come out near unit variance. The decoder adds to
the linear reconstruction what a small causal network makes of the latents; it is made of the same streaming layers as
TAEHV, so `DecoderStream` runs it.

Time is Wan's: 1 + 4k frames are 1 + k latents. The first frame is encoded as if it had been standing still for three
frames before, so latent 0 always is a still, and decodes to one frame.

B batch, T pixel frames, F latent frames, C channels, H W latent size.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..autoencoders.stream import DecoderStream, Stateful, walk
from ..autoencoders.taehv import conv

CHANNELS, TIME, SPACE = 16, 4, 8
BLOCK = TIME * SPACE * SPACE * 3  # numbers in a block
ROWS = 64  # blocks that are encoded together at least
WIDTHS, DEPTHS = (80, 48, 32), (2, 3, 2)


class CausalBlock(Stateful):
    """Pre-norm residual convolutions over each frame beside the frame before it (zeros before the first)."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1, self.conv2 = conv(2 * width, width), conv(width, width)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, last: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [B, T, C, H, W], last [B, 1, C, H, W] -> y [B, T, C, H, W] and the new last."""
        normed = F.normalize(x.float(), dim=2).to(x.dtype) * x.shape[2] ** 0.5
        last = torch.zeros_like(normed[:, :1]) if last is None else last
        before = torch.cat([last, normed[:, :-1]], 1)
        both = torch.cat([normed, before], 2).flatten(0, 1)  # [B*T, 2C, H, W]
        return x + self.conv2(F.silu(self.conv1(both))).view_as(x), normed[:, -1:]


class Grow(nn.Module):
    """Twice the frames, twice the height, twice the width: [B*T, C, H, W] -> [B*2T, C', 2H, 2W]."""

    def __init__(self, width: int, narrower: int):
        super().__init__()
        self.conv = nn.Conv2d(width, 8 * narrower, 1)

    def forward(self, x: Tensor) -> Tensor:
        frames, _, height, width = x.shape
        return F.pixel_shuffle(self.conv(x).reshape(2 * frames, -1, height, width), 2)


class SkipDecoder(Stateful):
    """The linear reconstruction plus the network's correction: [B, F, C, H, W] -> [B, 4F, 3, 8H, 8W]."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(CHANNELS, BLOCK)
        layers = [conv(CHANNELS, WIDTHS[0])]
        for width, narrower, depth in zip(WIDTHS, (*WIDTHS[1:], None), DEPTHS, strict=True):
            layers += [CausalBlock(width) for _ in range(depth)]
            layers += [Grow(width, narrower)] if narrower else []
        layers += [nn.SiLU(), conv(WIDTHS[-1], 12), nn.PixelShuffle(2)]
        self.net = nn.Sequential(*layers)

    def forward(self, x: Tensor, states: dict | None) -> tuple[Tensor, dict]:
        states = dict(states or {})
        correction = walk(self.net, x, states)
        blocks = self.linear(x.movedim(2, -1))  # [B, F, H, W, block]
        return from_blocks(blocks).movedim(-1, 2) + correction, states


class TinyAutoencoder(nn.Module):
    """`encoder` is the linear map, `decoder` what `DecoderStream` runs. Any multiple of 8 pixels."""

    channels, time, space = CHANNELS, TIME, SPACE

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(BLOCK, CHANNELS)
        self.decoder = nn.Sequential(SkipDecoder())

    def encode(self, frames: Tensor) -> Tensor:
        """frames [B, T, 8H, 8W, 3] in 0..1 -> latents [B, C, 1 + ceil((T-1)/4), H, W] in model space.

        The last frame is repeated where T is not 1 + 4k. Raises ValueError for a size that 8 does not divide.
        """
        self._check(frames)
        return self._latents(torch.cat([_still(frames), frames], 1))

    def encode_pieces(self, pieces: Iterator[Tensor]) -> Tensor:
        """`encode` of a clip that comes in pieces [B, n, 8H, 8W, 3], few of which are held; the same to the bit.

        Kernels add up in another order where they see few rows, so there are at least ROWS at a time.
        """
        latents, waiting = [], None
        for piece in pieces:
            self._check(piece)
            waiting = torch.cat([_still(piece) if waiting is None else waiting, piece], 1)
            step = TIME * -(-ROWS * SPACE**2 // piece.shape[2:4].numel())
            while waiting.shape[1] >= 2 * step:
                latents.append(self._latents(waiting[:, :step]))
                waiting = waiting[:, step:]
        if waiting is None:
            raise ValueError("Got no frame to encode; a clip needs at least one. Give one.")
        return torch.cat([*latents, self._latents(waiting)], 2)

    def _latents(self, frames: Tensor) -> Tensor:
        after = frames[:, -1:].expand(-1, -frames.shape[1] % TIME, -1, -1, -1)
        frames = torch.cat([frames, after], 1) if after.shape[1] else frames
        return self.encoder(to_blocks(frames).to(self.encoder.weight)).movedim(-1, 1)

    def _check(self, frames: Tensor) -> None:
        _, _, height, width, _ = frames.shape
        if height % SPACE or width % SPACE:
            raise ValueError(
                f"Got frames of {width} x {height} pixels; the built-in autoencoder needs "
                f"multiples of {SPACE}. Crop or resize them."
            )

    def decode(self, latents: Tensor) -> Tensor:
        """A whole clip: latents [B, C, F, H, W] -> frames [B, 4F-3, 8H, 8W, 3] in 0..1, float32."""
        return DecoderStream(self).decode(latents)

    def still(self, latents: Tensor) -> Tensor:
        """Latents [B, C, F, H, W] of a clip's end -> the latent [B, C, 1, H, W] of a still of its last frame.

        The rollout's first-frame re-encode. The last few latents decide the frame.
        """
        return self.encode(self.decode(latents[:, :, -4:])[:, -1:]).to(latents)


def _still(frames: Tensor) -> Tensor:
    """The first of frames [B, T, H, W, 3], as often as it stands before them."""
    return frames[:, :1].expand(-1, TIME - 1, -1, -1, -1)


def to_blocks(frames: Tensor) -> Tensor:
    """[B, 4F, 8H, 8W, 3] -> [B, F, H, W, block]."""
    return rearrange(frames, "b (f t) (h p) (w q) c -> b f h w (t p q c)", t=TIME, p=SPACE, q=SPACE)


def from_blocks(blocks: Tensor) -> Tensor:
    """[B, F, H, W, block] -> [B, 4F, 8H, 8W, 3]."""
    return rearrange(blocks, "b f h w (t p q c) -> b (f t) (h p) (w q) c", t=TIME, p=SPACE, q=SPACE, c=3)


def fit_linear(vae: TinyAutoencoder, blocks: Tensor) -> None:
    """Sets the encoder and the decoder's linear part to the principal components of `blocks` [n, block].

    Numbers are rounded to bfloat16, in which the model ships, so that training sees the shipped latents.
    """
    mean = blocks.mean(0)
    spread, axes = torch.linalg.eigh(torch.cov((blocks - mean).T))
    spread, axes = spread[-CHANNELS:].flip(0), axes[:, -CHANNELS:].flip(1)  # largest first
    wanted = spread**0.15
    gain = wanted / (wanted.square().mean().sqrt() * spread.sqrt())
    encode, decode = axes * gain, axes / gain
    with torch.no_grad():
        vae.encoder.weight.copy_(encode.T.bfloat16())
        vae.encoder.bias.copy_((-mean @ encode).bfloat16())
        vae.decoder[0].linear.weight.copy_(decode.bfloat16())
        vae.decoder[0].linear.bias.copy_(mean.bfloat16())


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each clip [B, ...] in 0..1: [B]."""
    return -10 * (a - b).square().flatten(1).mean(1).log10()
