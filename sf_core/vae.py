"""The Wan 2.1 video autoencoder, run over a clip piece by piece.

What looks along time here is convolutions over three frames that never see the future, so a clip can be cut anywhere
between latents if each of them remembers the last two frames it was given. The first frame of a clip is a latent of its
own and passes the halvings and doublings of time as it is. After it, four frames make one latent.

A stream owns those memories (`Past`) and always steps by one latent. Tensor shapes are therefore the same however the
clip is cut, and so, to the bit, are the results; memory does not grow with the clip either. With `Tiling`, every tile
of the picture is such a clip, with a past of its own.

Tensors are kept in channels-last order: convolutions on GPUs want it, the norm then runs along memory, and cuDNN 9.8 to
9.14 computes half-precision 3D convolutions of other tensors by a slow detour.

Layer names are the checkpoint's (Wan2.1_VAE.pth, wan_2.1_vae.safetensors). Architecture: github.com/Wan-Video/Wan2.1.

B batch, C channels, F latent frames, T frames, H W height and width (of latents where frames are 8H x 8W).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise, product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Latents in model space are (raw - mean) / std, channel by channel.
LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip

Past = dict[nn.Module, Tensor]
"""What each layer remembers of the frames before, [B, C, 1 or 2, H, W]; {} before the first frame."""


def to_model_space(raw: Tensor) -> Tensor:
    """Latents [B, 16, F, H, W] as the autoencoder makes them -> as the model sees them, float32."""
    mean, std = _mean_and_std(raw.device)
    return (raw.float() - mean) / std


def from_model_space(latents: Tensor) -> Tensor:
    """The inverse of `to_model_space`."""
    mean, std = _mean_and_std(latents.device)
    return latents.float() * std + mean


@lru_cache
def _mean_and_std(device: torch.device) -> Tensor:
    """[2, 16, 1, 1, 1]; made once per device, since copying it there makes the CPU wait."""
    return torch.tensor([LATENT_MEAN, LATENT_STD], device=device).view(2, -1, 1, 1, 1)


class CausalConv3d(nn.Conv3d):
    """A convolution that sees, in time, the present and the past: zeros before the first frame."""

    def __init__(self, inputs: int, outputs: int, size: tuple[int, int, int] = (3, 3, 3), time_stride: int = 1):
        padding = (0, size[1] // 2, size[2] // 2)
        super().__init__(inputs, outputs, size, stride=(time_stride, 1, 1), padding=padding)
        self.memory = size[0] - time_stride  # frames to remember

    def forward(self, x: Tensor, past: Past, silu: bool = False) -> Tensor:
        """x [B, C, T, H, W] -> [B, C', T / time_stride, H, W]; with `silu`, of silu(x)."""
        batch, width, frames, *size = x.shape
        whole = (batch, width, self.memory + frames, *size)
        seen = torch.empty(whole, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
        before, now = seen.split([self.memory, frames], 2)
        before.copy_(past.pop(self)) if self in past else before.zero_()
        torch.ops.aten.silu.out(x, out=now) if silu else now.copy_(x)
        past[self] = seen[:, :, frames:].clone()
        return super().forward(seen)


class Norm(nn.Module):
    """Each pixel's channels scaled to a root mean square of one, then by `gamma`."""

    def __init__(self, width: int, axes: int = 3):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width, *[1] * axes))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.movedim(1, -1), self.gamma.shape[:1], self.gamma.flatten(), eps=1e-24).movedim(-1, 1)


class Residual(nn.Module):
    """Norm, SiLU, convolution, twice, beside a shortcut: [B, C, T, H, W] -> [B, C', T, H, W]."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        convs = {"2": CausalConv3d(inputs, outputs), "6": CausalConv3d(outputs, outputs)}
        self.residual = nn.ModuleDict({"0": Norm(inputs), "3": Norm(outputs), **convs})
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv3d(inputs, outputs, 1)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        layers = self.residual
        y = layers["2"](layers["0"](x), past, silu=True)
        y = layers["6"](layers["3"](y), past, silu=True)
        return y.add_(self.shortcut(x))


class Attention(nn.Module):
    """Every pixel attends to the pixels of its own frame, one head."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = Norm(width, axes=2)
        self.to_qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        batch, width, frames, *size = x.shape
        tokens = self.norm(x).movedim(1, -1).reshape(batch * frames, 1, -1, width)  # [B*T, 1 head, H*W, C]
        q, k, v = F.linear(tokens, self.to_qkv.weight.flatten(1), self.to_qkv.bias).chunk(3, -1)
        y = F.scaled_dot_product_attention(q, k, v)
        y = F.linear(y, self.proj.weight.flatten(1), self.proj.bias)
        return y.view(batch, frames, *size, width).movedim(-1, 1).add_(x)


class Upsample(nn.Module):
    """Twice the height and width, half the channels and, with `time`, twice the frames except for a clip's first."""

    def __init__(self, width: int, time: bool):
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(width, width // 2, 3, padding=1)})
        self.time_conv = CausalConv3d(width, 2 * width, (3, 1, 1)) if time else None

    def forward(self, x: Tensor, past: Past) -> Tensor:
        batch, width, frames, height, w = x.shape
        x = self._grow(x, past).unflatten(1, (-1, width))  # [B, 1 or 2, C, T, H, W]
        x = x.permute(0, 3, 1, 4, 5, 2)[:, :, :, :, None, :, None]  # [B, T, 1 or 2, H, 1, W, 1, C]
        x = x.expand(-1, -1, -1, -1, 2, -1, 2, -1).reshape(-1, 2 * height, 2 * w, width)  # the one copy
        x = self.resample["1"](x.movedim(-1, 1))
        return x.unflatten(0, (batch, -1)).transpose(1, 2)

    def _grow(self, x: Tensor, past: Past) -> Tensor:
        """Two frames' channels in the place of one, [B, 2C, T, H, W]; the first frame as it is."""
        if self.time_conv is None:
            return x
        if self.time_conv in past:
            return self.time_conv(x, past)
        past[self.time_conv] = torch.zeros_like(x).expand(-1, -1, self.time_conv.memory, -1, -1)
        return x


class Downsample(nn.Module):
    """Half the height and width and, with `time`, half the frames except for a clip's first."""

    def __init__(self, width: int, time: bool):
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(width, width, 3, stride=2)})
        self.time_conv = CausalConv3d(width, width, (3, 1, 1), time_stride=2) if time else None

    def forward(self, x: Tensor, past: Past) -> Tensor:
        batch = x.shape[0]
        x = F.pad(x.transpose(1, 2).flatten(0, 1), (0, 1, 0, 1))  # [B*T, C, H + 1, W + 1]
        x = self.resample["1"](x).unflatten(0, (batch, -1)).transpose(1, 2)
        if self.time_conv is None:
            return x
        if self.time_conv in past:
            return self.time_conv(x, past)
        past[self.time_conv] = x
        return x


class Chain(nn.Sequential):
    """Layers that take a past, one after the other."""

    def forward(self, x: Tensor, past: Past) -> Tensor:
        for layer in self:
            x = layer(x, past)
        return x


class Head(nn.ModuleDict):
    def __init__(self, inputs: int, outputs: int):
        super().__init__({"0": Norm(inputs), "2": CausalConv3d(inputs, outputs)})

    def forward(self, x: Tensor, past: Past) -> Tensor:
        return self["2"](self["0"](x), past, silu=True)


@dataclass(frozen=True)
class Layout:
    """What tells one Wan 2.1 autoencoder from another. The default is the published one."""

    channels: int = 16
    widths: tuple[int, ...] = (96, 192, 384, 384)  # channels at full size, half, quarter, eighth
    blocks: int = 2  # residual blocks per size in the encoder; the decoder has one more
    time: tuple[bool, ...] = (False, True, True)  # which halvings of the size halve the number of frames too

    @classmethod
    def of(cls, state: dict[str, Tensor]) -> Layout:
        """Reads the layout off a state dict's shapes. Raises KeyError if it is not such an autoencoder's."""
        inside = {name.split(".")[2] for name in state if name.startswith("encoder.downsamples.")}
        layers = [f"encoder.downsamples.{i}" for i in range(len(inside))]
        halvings = [i for i, layer in enumerate(layers) if f"{layer}.resample.1.weight" in state]
        last = [*(i - 1 for i in halvings), len(layers) - 1]  # the last residual block of each size
        return cls(
            channels=state["conv2.weight"].shape[0],
            widths=tuple(state[f"encoder.downsamples.{i}.residual.6.weight"].shape[0] for i in last),
            blocks=last[0] + 1,
            time=tuple(f"{layers[i]}.time_conv.weight" in state for i in halvings),
        )


def _middle(width: int) -> Chain:
    return Chain(Residual(width, width), Attention(width), Residual(width, width))


class Encoder(nn.Module):
    """Frames [B, 3, 1 or 4, 8H, 8W] in -1..1 -> [B, 2 * channels, 1, H, W]."""

    def __init__(self, layout: Layout):
        super().__init__()
        widths = layout.widths
        layers: list[nn.Module] = []
        for i, (before, width) in enumerate(pairwise((widths[0], *widths))):
            layers += [Residual(before if block == 0 else width, width) for block in range(layout.blocks)]
            layers += [Downsample(width, layout.time[i])] if i < len(layout.time) else []
        self.conv1 = CausalConv3d(3, widths[0])
        self.downsamples = Chain(*layers)
        self.middle = _middle(widths[-1])
        self.head = Head(widths[-1], 2 * layout.channels)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        return self.head(self.middle(self.downsamples(self.conv1(x, past), past), past), past)


class Decoder(nn.Module):
    """[B, channels, 1, H, W] -> frames [B, 3, 1 or 4, 8H, 8W] in -1..1, not clamped."""

    def __init__(self, layout: Layout):
        super().__init__()
        widths, time = layout.widths[::-1], layout.time[::-1]
        layers: list[nn.Module] = []
        for i, (before, width) in enumerate(zip((widths[0], *(w // 2 for w in widths)), widths)):
            layers += [Residual(before if block == 0 else width, width) for block in range(layout.blocks + 1)]
            layers += [Upsample(width, time[i])] if i < len(time) else []
        self.conv1 = CausalConv3d(layout.channels, widths[0])
        self.middle = _middle(widths[0])
        self.upsamples = Chain(*layers)
        self.head = Head(widths[-1], 3)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        return self.head(self.upsamples(self.middle(self.conv1(x, past), past), past), past)


class WanVAE(nn.Module):
    """The autoencoder itself, for inference. `DecoderStream` and `EncoderStream` run it."""

    def __init__(self, layout: Layout = Layout()):
        super().__init__()
        self.channels = layout.channels
        self.space = 2 ** len(layout.time)  # pixels per latent pixel
        self.time = 2 ** sum(layout.time)  # frames per latent, after the first
        self.encoder = Encoder(layout)
        self.conv1 = nn.Conv3d(2 * layout.channels, 2 * layout.channels, 1)
        self.conv2 = nn.Conv3d(layout.channels, layout.channels, 1)
        self.decoder = Decoder(layout)

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> WanVAE:
        """Builds the autoencoder that a state dict describes, in its dtype, around its tensors (no copies).

        Raises ValueError if it is not a Wan 2.1 autoencoder.
        """
        try:
            with torch.device("meta"):
                vae = cls(Layout.of(state))
        except (KeyError, IndexError) as error:
            raise ValueError(_not_a_wan_vae(state, error)) from None
        needed, found = ({name: tensor.shape for name, tensor in d.items()} for d in (vae.state_dict(), state))
        if wrong := needed.items() ^ found.items():
            raise ValueError(_not_a_wan_vae(state, min(wrong)[0]))
        if vae.channels != len(LATENT_MEAN):
            raise ValueError(_not_a_wan_vae(state, f"conv2.weight (for {vae.channels} channels, not 16)"))
        vae.load_state_dict(state, assign=True)
        return vae.requires_grad_(False).eval()

    def decode_step(self, z: Tensor, past: Past) -> Tensor:
        """One raw latent [B, C, 1, H, W] -> frames [B, 3, 1 or 4, 8H, 8W] in -1..1, not clamped; updates `past`."""
        z = z.contiguous(memory_format=torch.channels_last_3d)  # one layout, whatever z was cut from
        return self.decoder(self.conv2(z), past)

    def encode_step(self, x: Tensor, past: Past) -> Tensor:
        """A clip's first frame, or the next four, [B, 3, 1 or 4, 8H, 8W] in -1..1 -> one raw latent [B, C, 1, H, W]."""
        mean, _ = self.conv1(self.encoder(x, past)).chunk(2, 1)
        return mean

    def decode(self, latents: Tensor, tiling: Tiling | None = None) -> Tensor:
        """A whole clip: latents [B, C, F, H, W] in model space -> frames [B, 4F-3, 8H, 8W, 3] in 0..1, float32."""
        return DecoderStream(self, tiling).decode(latents)

    def encode(self, frames: Tensor, tiling: Tiling | None = None) -> Tensor:
        """A whole clip: frames [B, T, 8H, 8W, 3] in 0..1 -> latents [B, C, 1 + (T-1)//4, H, W] in model space, float32.

        Frames at the end that do not fill a latent, (T-1) % 4 of them, are left out, as in the published code.
        """
        return EncoderStream(self, tiling).encode(frames)


def _not_a_wan_vae(state: dict[str, Tensor], reason: object) -> str:
    return (
        f"Got {len(state)} tensors that do not make up a Wan 2.1 VAE: {reason} is missing, unknown or of a wrong "
        "shape. Use Wan2.1_VAE.pth or wan_2.1_vae.safetensors, and download the file again if it is one of these."
    )


@dataclass(frozen=True)
class Tiling:
    """Decode or encode square tiles instead of whole pictures: less memory, more work, results almost the same.

    Both in latent pixels (8 pixels each). Neighbours share at least `overlap`, where one fades into the other. The
    tiles of a picture are all of one size and evenly spread.
    """

    size: int = 32
    overlap: int = 8

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < self.size:
            raise ValueError(
                f"Got tiles of {self.size} latent pixels that overlap by {self.overlap}; the overlap must be 0 or more "
                "and less than the size. Use a larger size or a smaller overlap."
            )

    def spans(self, length: int) -> list[slice]:
        """Where the tiles of `length` latent pixels lie."""
        size = min(self.size, length)
        steps = -(-(length - size) // (self.size - self.overlap))
        starts = [round(i * (length - size) / max(steps, 1)) for i in range(steps + 1)]
        return [slice(start, start + size) for start in starts]

    def fades(self, length: int, scale: int) -> list[Tensor]:
        """How much each span counts at each of its size * scale places; all over the picture the sum is one."""
        spans = [slice(s.start * scale, s.stop * scale) for s in self.spans(length)]
        size = spans[0].stop
        rising = torch.arange(1, size + 1) / (self.overlap * scale + 1)
        fade = torch.minimum(rising, rising.flip(0)).clamp(max=1)
        total = torch.zeros(length * scale)
        for span in spans:
            total[span] += fade
        return [fade / total[span] for span in spans]


@dataclass
class Tile:
    rows: slice  # in latent pixels
    columns: slice
    weight: Tensor | None = None  # what it counts at each place of the output; None: it is the whole picture
    past: Past = field(default_factory=dict)


def tiles_of(height: int, width: int, tiling: Tiling | None, scale: int, device: torch.device) -> list[Tile]:
    """The tiles of a picture of so many latent pixels, with empty pasts. `scale`: output pixels per latent pixel."""
    if tiling is None or max(height, width) <= tiling.size:
        return [Tile(slice(0, height), slice(0, width))]
    rows, columns = (list(zip(tiling.spans(n), tiling.fades(n, scale))) for n in (height, width))
    return [
        Tile(row, column, (fade[:, None] * fade_across).to(device))
        for (row, fade), (column, fade_across) in product(rows, columns)
    ]


def run_tiles(step: Callable[[Tensor, Past], Tensor], x: Tensor, tiles: list[Tile], before: int, after: int) -> Tensor:
    """One step [B, C, T, H, W] -> [B, C', T', H', W'], float32, tile by tile.

    `before` and `after`: how many pixels a latent pixel is wide in x and in the result.
    """
    if len(tiles) == 1:
        return step(x, tiles[0].past).float()
    canvas = None
    for tile in tiles:
        y = step(x[..., _scaled(tile.rows, before), _scaled(tile.columns, before)], tile.past)
        if canvas is None:
            size = (x.shape[3] * after // before, x.shape[4] * after // before)
            canvas = torch.zeros(*y.shape[:3], *size, device=y.device)
        canvas[..., _scaled(tile.rows, after), _scaled(tile.columns, after)] += y * tile.weight
    return canvas


def _scaled(span: slice, scale: int) -> slice:
    return slice(span.start * scale, span.stop * scale)


class DecoderStream:
    """Latents in, frames out, any number of latents at a time.

        stream = DecoderStream(vae)
        for chunk in rollout(...):
            frames = stream.decode(chunk.latents)

    The first call gives 4F-3 frames, later ones 4F. However the clip is cut, the frames are the same to the bit.
    """

    def __init__(self, vae: WanVAE, tiling: Tiling | None = None):
        self.vae = vae
        self.tiling = tiling
        self.reset()

    def reset(self) -> None:
        """Forgets the clip; the next call starts another."""
        self.shape: tuple[int, ...] | None = None  # B, H, W of the clip under way
        self.tiles: list[Tile] = []

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """latents [B, C, F, H, W] in model space -> frames [B, T, 8H, 8W, 3], float32 in 0..1, on the vae's device.

        Raises ValueError for other shapes, or for a batch or size unlike the one the clip began with.
        """
        self._check(latents)
        weight = next(self.vae.parameters())
        if self.shape is None:
            self.shape = _batch_and_size(latents)
            self.tiles = tiles_of(*self.shape[1:], self.tiling, self.vae.space, weight.device)
        raw = from_model_space(latents.to(weight.device)).to(weight.dtype)
        frames = torch.cat([self._step(z) for z in raw.split(1, 2)], 2)  # [B, 3, T, 8H, 8W]
        return frames.movedim(1, -1).add_(1).div_(2).clamp_(0, 1)

    def _step(self, z: Tensor) -> Tensor:
        return run_tiles(self.vae.decode_step, z, self.tiles, 1, self.vae.space)

    def _check(self, latents: Tensor) -> None:
        if latents.ndim != 5 or latents.shape[1] != self.vae.channels or 0 in latents.shape:
            raise ValueError(
                f"Got latents of shape {list(latents.shape)}; this decoder needs [batch, {self.vae.channels}, "
                "latent frames (1 or more), height, width]. Decode with the autoencoder that belongs to the model."
            )
        _check_same_clip(self.shape, _batch_and_size(latents))


class EncoderStream:
    """Frames in, latents out, any number of frames at a time; frames wait until a latent's worth is there.

        stream = EncoderStream(vae)
        latents = torch.cat([stream.encode(frames) for frames in clip], 2)

    A clip's first frame is its first latent; then four frames make one. However the clip is cut, the latents are the
    same to the bit.
    """

    def __init__(self, vae: WanVAE, tiling: Tiling | None = None):
        self.vae = vae
        self.tiling = tiling
        self.reset()

    def reset(self) -> None:
        """Forgets the clip, with the frames that wait; the next call starts another."""
        self.shape: tuple[int, ...] | None = None  # B, 8H, 8W of the clip under way
        self.tiles: list[Tile] = []
        self.waiting: Tensor | None = None  # [B, 3, 0..3, 8H, 8W]

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """frames [B, T, 8H, 8W, 3] in 0..1 -> the latents that are complete, [B, C, F, H, W] in model space, float32.

        F may be 0. Raises ValueError for other shapes, or for a batch or size unlike the one the clip began with.
        """
        x = frames.movedim(-1, 1)  # [B, 3, T, 8H, 8W]
        self._check(frames)
        weight, space = next(self.vae.parameters()), self.vae.space
        height, width = x.shape[3] // space, x.shape[4] // space
        if first := self.shape is None:
            self.shape = _batch_and_size(x)
            self.tiles = tiles_of(height, width, self.tiling, 1, weight.device)
        x = (x.to(weight.device, torch.float32) * 2 - 1).to(weight.dtype)
        x = x if self.waiting is None else torch.cat([self.waiting, x], 2)
        steps, self.waiting = self._cut(x, first)
        none = torch.empty(len(x), self.vae.channels, 0, height, width, device=x.device)
        return to_model_space(torch.cat([none, *(self._step(step) for step in steps)], 2))

    def flush(self) -> Tensor:
        """Ends the clip. Frames that wait are left out, as in the published code: [B, C, 0, H, W]. Resets the stream.

        Raises ValueError when no frame was given since the last reset.
        """
        if self.shape is None:
            raise ValueError("Got no frame to encode; a clip needs at least one. Call encode() first.")
        batch, height, width = self.shape
        size = (height // self.vae.space, width // self.vae.space)
        device = self.waiting.device
        self.reset()
        return torch.empty(batch, self.vae.channels, 0, *size, device=device)

    def _cut(self, x: Tensor, first: bool) -> tuple[list[Tensor], Tensor]:
        """Frames [B, 3, T, 8H, 8W] -> those that make up whole latents, latent by latent, and the others."""
        alone = 1 if first else 0
        whole = (x.shape[2] - alone) // self.vae.time
        *steps, rest = x.split([*[1] * alone, *[self.vae.time] * whole, (x.shape[2] - alone) % self.vae.time], 2)
        return steps, rest.clone()  # not a view that keeps the whole of x

    def _step(self, x: Tensor) -> Tensor:
        return run_tiles(self.vae.encode_step, x, self.tiles, self.vae.space, 1)

    def _check(self, frames: Tensor) -> None:
        space = self.vae.space
        shape = frames.shape
        if len(shape) != 5 or shape[4] != 3 or 0 in shape or shape[2] % space or shape[3] % space:
            raise ValueError(
                f"Got frames of shape {list(shape)}; this encoder needs [batch, frames (1 or more), height, width, 3] "
                f"with height and width multiples of {space}. Crop or resize the frames."
            )
        _check_same_clip(self.shape, (shape[0], shape[2], shape[3]))


def _batch_and_size(x: Tensor) -> tuple[int, ...]:
    """B, H, W of [B, C, T, H, W]."""
    return (x.shape[0], *x.shape[3:])


def _check_same_clip(begun: tuple[int, ...] | None, given: tuple[int, ...]) -> None:
    if begun not in (None, given):
        raise ValueError(
            f"Got batch, height, width {list(given)}, but this clip began with {list(begun)}. "
            "Call reset() before another clip."
        )
