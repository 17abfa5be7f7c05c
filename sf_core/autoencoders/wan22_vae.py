"""The Wan 2.2 video autoencoder: 48 channels, 4 frames and 16 x 16 pixels to a latent.

Layers, streams and tiles are those of the Wan 2.1 autoencoder (wan_vae.py). What is different:

    frames are cut into patches of 2 x 2 pixels first, 12 channels of them
    each size is a stage with a shortcut around it: means of the pixels that become one, or copies of the one that
    becomes several
    the decoder is wider than the encoder

A stage's shortcut follows its layers: of a clip's first frame they make one, so it leaves its surplus copies out.

Layer names are the checkpoint's (Wan2.2_VAE.pth, wan2.2_vae.safetensors). Architecture: github.com/Wan-Video/Wan2.2.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .wan_vae import (
    CausalConv3d,
    Downsample,
    Head,
    LatentStatistics,
    Past,
    Residual,
    Upsample,
    WanVAE,
    middle_layers,
    through,
)

WAN22 = LatentStatistics(
    mean=(
        -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
        0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
        -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
        -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
    ),
    std=(
        0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
        0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
        0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
        0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
    ),
)  # fmt: skip

PATCH = 2
PATCHED = 3 * PATCH**2  # channels of a patch


@dataclass(frozen=True)
class Layout:
    """What tells one Wan 2.2 autoencoder from another. The default is the published one."""

    channels: int = 48
    widths: tuple[int, ...] = (160, 320, 640, 640)  # channels of the encoder's stages, the largest size first
    decoder_widths: tuple[int, ...] = (256, 512, 1024, 1024)
    blocks: int = 2  # residual blocks of a stage of the encoder; the decoder has one more
    time: tuple[bool, ...] = (False, True, True)  # which halvings of the size halve the number of frames too

    @classmethod
    def of(cls, state: dict[str, Tensor]) -> Layout:
        """Reads the layout off a state dict's shapes. Raises KeyError or IndexError if it is not one's."""
        stages = len({name.split(".")[2] for name in state if name.startswith("encoder.downsamples.")})
        first = "encoder.downsamples.0.downsamples"
        blocks = len({name.split(".")[4] for name in state if name.startswith(f"{first}.") and ".residual." in name})
        down = [f"encoder.downsamples.{i}.downsamples" for i in range(stages)]
        up = [f"decoder.upsamples.{i}.upsamples" for i in range(stages)]
        return cls(
            channels=state["conv2.weight"].shape[0],
            widths=tuple(state[f"{stage}.0.residual.6.weight"].shape[0] for stage in down),
            decoder_widths=tuple(state[f"{stage}.0.residual.6.weight"].shape[0] for stage in reversed(up)),
            blocks=blocks,
            time=tuple(f"{stage}.{blocks}.time_conv.weight" in state for stage in down[:-1]),
        )


class DownStage(nn.Module):
    """A stage of the encoder: [B, C, T, H, W] -> [B, C', T or T / 2, H / 2, W / 2], the last one as large as before."""

    def __init__(self, inputs: int, width: int, blocks: int, halves: bool, time: bool):
        super().__init__()
        layers = [Residual(inputs if block == 0 else width, width) for block in range(blocks)]
        self.downsamples = nn.Sequential(*layers, *[Downsample(width, time)] * halves)
        self.width, self.space, self.time = width, 1 + halves, 1 + time

    def forward(self, x: Tensor, past: Past) -> Tensor:
        return through(self.downsamples, x, past) + self._means(x)  # not in place: `past` may hold the first frame

    def _means(self, x: Tensor) -> Tensor:
        """Channels of the pixels that become one, meaned in groups; a single frame is meaned with one of zeros."""
        x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % self.time, 0))
        x = rearrange(x, "b c (t i) (h j) (w k) -> b t h w (c i j k)", i=self.time, j=self.space, k=self.space)
        return x.unflatten(-1, (self.width, -1)).mean(-1).movedim(-1, 1)


class UpStage(nn.Module):
    """A stage of the decoder: [B, C, T, H, W] -> [B, C', T or 2T, 2H, 2W], the last one as large as before."""

    def __init__(self, inputs: int, width: int, blocks: int, doubles: bool, time: bool):
        super().__init__()
        layers = [Residual(inputs if block == 0 else width, width) for block in range(blocks)]
        self.upsamples = nn.Sequential(*layers, *[Upsample(width, width, time)] * doubles)
        self.doubles, self.time = doubles, 1 + time

    def forward(self, x: Tensor, past: Past) -> Tensor:
        y = through(self.upsamples, x, past)
        return self._add_copies(y, x) if self.doubles else y

    def _add_copies(self, y: Tensor, x: Tensor) -> Tensor:
        """Adds to each of the pixels that one has become the channel that it is a copy of; in place."""
        width, factor = y.shape[1], 4 * self.time
        channel = torch.arange(width, device=x.device) * factor
        times = range(self.time) if y.shape[2] > x.shape[2] else [self.time - 1]  # of a first frame, the later copy
        for at, (time, row, column) in enumerate(itertools.product(times, range(2), range(2)), 4 * times[0]):
            copies = x.index_select(1, (channel + at) * x.shape[1] // (width * factor))
            y[:, :, time - times[0] :: len(times), row::2, column::2] += copies
        return y


class Encoder(nn.Module):
    """Frames [B, 3, 1 or 4, 16H, 16W] in -1..1 -> `fine` -> [B, C, 1 or 2, 2H, 2W] -> `coarse` -> [B, C', 1, H, W]."""

    def __init__(self, layout: Layout):
        super().__init__()
        widths, time = layout.widths, (*layout.time, False)
        stages = [
            DownStage(before, width, layout.blocks, i < len(layout.time), time[i])
            for i, (before, width) in enumerate(pairwise((widths[0], *widths)))
        ]
        self.conv1 = CausalConv3d(PATCHED, widths[0])
        self.downsamples = nn.Sequential(*stages)
        self.middle = middle_layers(widths[-1])
        self.head = Head(widths[-1], 2 * layout.channels)

    def fine(self, x: Tensor, past: Past) -> Tensor:
        x = rearrange(x, "b c t (h q) (w r) -> b (c r q) t h w", q=PATCH, r=PATCH)
        return through([self.conv1, *self.downsamples[:2]], x, past)

    def coarse(self, x: Tensor, past: Past) -> Tensor:
        return through([*self.downsamples[2:], *self.middle, self.head], x, past)


class Decoder(nn.Module):
    """[B, C, 1, H, W] -> `coarse` -> [B, C', 1 or 2, 2H, 2W] -> `fine` -> frames [B, 3, 1 or 4, 16H, 16W] in -1..1."""

    def __init__(self, layout: Layout):
        super().__init__()
        widths, time = layout.decoder_widths[::-1], (*layout.time[::-1], False)
        stages = [
            UpStage(before, width, layout.blocks + 1, i < len(layout.time), time[i])
            for i, (before, width) in enumerate(pairwise((widths[0], *widths)))
        ]
        self.conv1 = CausalConv3d(layout.channels, widths[0])
        self.middle = middle_layers(widths[0])
        self.upsamples = nn.Sequential(*stages)
        self.head = Head(widths[-1], PATCHED)

    def coarse(self, x: Tensor, past: Past) -> Tensor:
        return through([self.conv1, *self.middle, *self.upsamples[:-3]], x, past)

    def fine(self, x: Tensor, past: Past) -> Tensor:
        x = through([*self.upsamples[-3:], self.head], x, past)
        return rearrange(x, "b (c r q) t h w -> b c t (h q) (w r)", q=PATCH, r=PATCH)


class Wan22VAE(WanVAE):
    """The autoencoder itself, for inference; `DecoderStream` and `EncoderStream` of wan_vae.py run it."""

    name = "a Wan 2.2 VAE"
    files = "Wan2.2_VAE.pth or wan2.2_vae.safetensors"
    layout = Layout
    statistics = WAN22

    def __init__(self, layout: Layout = Layout()):
        nn.Module.__init__(self)
        self.channels = layout.channels
        self.space = PATCH * 2 ** len(layout.time)
        self.between = self.space // (4 * PATCH)
        self.time = 2 ** sum(layout.time)
        self.margin = -(-PATCH * (14 * layout.blocks + 18) // self.space)
        self.encoder = Encoder(layout)
        self.conv1 = nn.Conv3d(2 * layout.channels, 2 * layout.channels, 1)
        self.conv2 = nn.Conv3d(layout.channels, layout.channels, 1)
        self.decoder = Decoder(layout)
