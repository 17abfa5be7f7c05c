"""TAEHV: a tiny video autoencoder.

Every layer works on single frames, except three: `MemBlock` also sees its own previous input frame, `TPool` merges
frames, `TGrow` splits them. So a clip can be cut anywhere between latents if each MemBlock remembers one frame; a
`Stream` (stream.py) owns those memories.

Architecture: github.com/madebyollin/taehv (taew2_1 for the latents of Wan 2.1, taew2_2 and taew2_2_super for those of
Wan 2.2 5B).

B batch, T pixel frames, F latent frames, C channels, H W latent size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .stream import DecoderStream, EncoderStream, Stateful


class MemBlock(Stateful):
    """Residual convolutions over each frame beside the frame before it (zeros before the first). Width is unchanged."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Sequential(
            conv(2 * width, width), nn.ReLU(), conv(width, width), nn.ReLU(), conv(width, width),
        )  # fmt: skip
        self.activation = nn.ReLU()

    def forward(self, x: Tensor, last: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [B, T, C, H, W], last [B, 1, C, H, W] -> y [B, T, C, H, W] and the new last."""
        last = torch.zeros_like(x[:, :1]) if last is None else last
        before = torch.cat([last, x[:, :-1]], 1)  # [B, T, C, H, W]
        both = torch.cat([x, before], 2).flatten(0, 1)  # [B*T, 2C, H, W]
        return self.activation(self.conv(both).view_as(x) + x), x[:, -1:]


class SuperMemBlock(MemBlock):
    """The `super` decoder's MemBlock: depthwise 7x7, then four times wider and back; no activation after the sum."""

    def __init__(self, width: int):
        nn.Module.__init__(self)
        self.conv = nn.Sequential(
            nn.Conv2d(2 * width, 2 * width, 7, padding=3, groups=2 * width, bias=False),
            nn.Conv2d(2 * width, 4 * width, 1),
            nn.ReLU(),
            nn.Conv2d(4 * width, width, 1, bias=False),
        )
        self.activation = nn.Identity()


class TPool(nn.Module):
    """Merges every `stride` frames into one: [B*T, C, H, W] -> [B*T/stride, C, H, W]."""

    def __init__(self, width: int, stride: int):
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(width * stride, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        frames, width, height, w = x.shape
        return self.conv(x.reshape(frames // self.stride, self.stride * width, height, w))


class TGrow(nn.Module):
    """Splits every frame into `stride`: [B*T, C, H, W] -> [B*T*stride, C, H, W]."""

    def __init__(self, width: int, stride: int):
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(width, width * stride, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        frames, width, height, w = x.shape
        return self.conv(x).reshape(frames * self.stride, width, height, w)


class Clamp(nn.Module):
    """Softly limits latents to -3..3."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


def conv(inputs: int, outputs: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=bias)


@dataclass(frozen=True)
class Layout:
    """What tells one TAEHV from another. The default is taew2_1; channels 48 with patch 2 is taew2_2."""

    channels: int = 16
    patch: int = 1  # output pixels per pixel of the last layer, each way
    widths: tuple[int, ...] = (256, 128, 64, 64)  # of the decoder's three stages and its last layer
    encoder_width: int = 64
    grow: tuple[int, ...] = (1, 2, 2)  # frames each stage makes of one; 1, 1, 1 decodes a preview frame per latent
    super_decoder: bool = False  # the larger decoder of taew2_2_super

    @classmethod
    def of(cls, state: dict[str, Tensor]) -> Layout:
        """Reads the layout off a state dict's shapes. Raises KeyError or IndexError if they are not a TAEHV's."""
        shapes = {name: tensor.shape for name, tensor in state.items()}
        if super_decoder := "decoder.0.weight" in shapes:
            first, narrowing, growing = 0, (4, 11, 18, 22), (7, 14, 21)
        else:
            first, narrowing, growing = 1, (8, 14, 20, 22), (7, 13, 19)
        grow = [shapes[f"decoder.{i}.conv.weight"] for i in growing]
        return cls(
            channels=shapes[f"decoder.{first}.weight"][1],
            patch=round((shapes["encoder.0.weight"][1] / 3) ** 0.5),
            widths=tuple(shapes[f"decoder.{i}.weight"][1] for i in narrowing),
            encoder_width=shapes["encoder.0.weight"][0],
            grow=tuple(shape[0] // shape[1] for shape in grow),
            super_decoder=super_decoder,
        )


class TAEHV(nn.Module):
    """The autoencoder itself."""

    time = 4  # pixel frames per latent frame

    def __init__(self, layout: Layout = Layout()):
        super().__init__()
        self.channels = layout.channels
        self.space = 8 * layout.patch  # pixels per latent pixel
        self.encoder = _encoder(layout)
        self.decoder = _super_decoder(layout) if layout.super_decoder else _decoder(layout)

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> TAEHV:
        """Builds the autoencoder that a state dict describes, in its dtype. Raises ValueError if it is not a TAEHV."""
        try:
            with torch.device("meta"):
                vae = cls(Layout.of(state))
        except (LookupError, ArithmeticError, RuntimeError) as error:  # the last: sizes beyond all memory
            raise ValueError(_not_a_taehv(state, error if isinstance(error, LookupError) else "a layer")) from None
        needed, found = ({name: tensor.shape for name, tensor in d.items()} for d in (vae.state_dict(), state))
        if wrong := needed.items() ^ found.items():
            raise ValueError(_not_a_taehv(state, min(wrong)[0]))
        vae.load_state_dict(state, assign=True)
        return vae.requires_grad_(False).eval()

    def decode(self, latents: Tensor) -> Tensor:
        """A whole clip: latents [B, C, F, H, W] in model space -> frames [B, 4F-3, 8H, 8W, 3] in 0..1, float32."""
        return DecoderStream(self).decode(latents)

    def encode(self, frames: Tensor) -> Tensor:
        """A whole clip: frames [B, T, 8H, 8W, 3] in 0..1 -> latents [B, C, ceil(T/4), H, W] in model space, float32."""
        stream = EncoderStream(self)
        return torch.cat([stream.encode(frames), stream.flush()], 2)


def _encoder(layout: Layout) -> nn.Sequential:
    width = layout.encoder_width
    layers = [conv(3 * layout.patch**2, width), nn.ReLU()]
    for stride in (2, 2, 1):
        layers += [TPool(width, stride), conv(width, width, stride=2, bias=False)]
        layers += [MemBlock(width) for _ in range(3)]
    layers += [conv(width, layout.channels)]
    return _numbered(layers, first=nn.PixelUnshuffle(layout.patch))


def _decoder(layout: Layout) -> nn.Sequential:
    widths = layout.widths
    layers = [Clamp(), conv(layout.channels, widths[0]), nn.ReLU()]
    for stride, width, narrower in zip(layout.grow, widths, widths[1:]):
        layers += [MemBlock(width) for _ in range(3)]
        layers += [nn.Upsample(scale_factor=2), TGrow(width, stride), conv(width, narrower, bias=False)]
    layers += [nn.ReLU(), conv(widths[-1], 3 * layout.patch**2), nn.PixelShuffle(layout.patch)]
    return nn.Sequential(*layers)


def _super_decoder(layout: Layout) -> nn.Sequential:
    widths = layout.widths
    layers = [nn.Conv2d(layout.channels, widths[0], 1, bias=False)]
    for stride, width, narrower in zip(layout.grow, widths, widths[1:]):
        layers += [SuperMemBlock(width) for _ in range(3)]
        layers += [conv(width, 4 * narrower), nn.ReLU(), nn.PixelShuffle(2), TGrow(narrower, stride)]
    layers += [conv(widths[-1], 3 * layout.patch**2), nn.PixelShuffle(layout.patch)]
    return nn.Sequential(*layers)


def _not_a_taehv(state: dict[str, Tensor], reason: object) -> str:
    return (
        f"Got {len(state)} tensors that do not make up a TAEHV: {reason} is missing, unknown or of a wrong shape. "
        "Use taew2_1 for Wan 2.1 latents, taew2_2 for Wan 2.2 5B, and download the file again if it is one of these."
    )


def _numbered(layers: list[nn.Module], first: nn.Module) -> nn.Sequential:
    """`first`, then the layers, which keep the numbers that checkpoints give them."""
    sequential = nn.Sequential()
    sequential.add_module("patch", first)
    for i, layer in enumerate(layers):
        sequential.add_module(str(i), layer)
    return sequential
