"""The Wan 2.1 video autoencoder, run over a clip piece by piece.

What looks along time here is convolutions over three frames that never see the future, so a clip can be cut anywhere
between latents if each of them remembers the last two frames it was given. The first frame of a clip is a latent of its
own and passes the halvings and doublings of time as it is. After it, four frames make one latent.

A stream owns those memories (`Past`) and always steps by one latent. Tensor shapes are therefore the same however the
clip is cut, and so, to the bit, are the results; memory does not grow with the clip either.

The two largest sizes (`fine`) take nearly all the memory, and each of their pixels sees only a few around it. On small
cards they run tile by tile, each tile with a past of its own and a margin so wide that nothing is missing: there are no
seams to blend. The rest (`coarse`), in which every pixel attends to the whole picture, always gets the whole picture.

Tensors are kept in channels-last order: convolutions on GPUs want it, the norm then runs along memory, and cuDNN 9.8 to
9.14 computes half-precision 3D convolutions of other tensors by a slow detour.

Layer names are the checkpoint's (Wan2.1_VAE.pth, wan_2.1_vae.safetensors). Architecture: github.com/Wan-Video/Wan2.1.

B batch, C channels, F latent frames, T frames, H W height and width (of latents where frames are 8H x 8W).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class LatentStatistics:
    """Mean and standard deviation of each latent channel: latents in model space are (raw - mean) / std."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def to_model_space(self, raw: Tensor) -> Tensor:
        """Latents [B, C, F, H, W] as the autoencoder makes them -> as the model sees them, float32."""
        mean, std = _mean_and_std(self, raw.device)
        return (raw.float() - mean) / std

    def from_model_space(self, latents: Tensor) -> Tensor:
        """The inverse of `to_model_space`."""
        mean, std = _mean_and_std(self, latents.device)
        return latents.float() * std + mean


@lru_cache
def _mean_and_std(statistics: LatentStatistics, device: torch.device) -> Tensor:
    """[2, C, 1, 1, 1]; made once per device, since copying it there makes the CPU wait."""
    return torch.tensor([statistics.mean, statistics.std], device=device).view(2, -1, 1, 1, 1)


WAN21_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
WAN21_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip

WAN21 = LatentStatistics(WAN21_MEAN, WAN21_STD)
to_model_space, from_model_space = WAN21.to_model_space, WAN21.from_model_space

Past = dict[nn.Module, Tensor]
"""What each layer remembers of the frames before, [B, C, 1 or 2, H, W]; {} before the first frame."""


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
    """Twice the height and width, C' channels and, with `time`, twice the frames except for a clip's first."""

    def __init__(self, width: int, outputs: int, time: bool):
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(width, outputs, 3, padding=1)})
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


def through(layers: Iterable[nn.Module], x: Tensor, past: Past) -> Tensor:
    for layer in layers:
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


def middle_layers(width: int) -> nn.Sequential:
    return nn.Sequential(Residual(width, width), Attention(width), Residual(width, width))


class Encoder(nn.Module):
    """Frames [B, 3, 1 or 4, 8H, 8W] in -1..1 -> `fine` -> [B, C, 1 or 2, 2H, 2W] -> `coarse` -> [B, C', 1, H, W]."""

    def __init__(self, layout: Layout):
        super().__init__()
        widths = layout.widths
        layers: list[nn.Module] = []
        for i, (before, width) in enumerate(pairwise((widths[0], *widths))):
            layers += [Residual(before if block == 0 else width, width) for block in range(layout.blocks)]
            layers += [Downsample(width, layout.time[i])] if i < len(layout.time) else []
        self.conv1 = CausalConv3d(3, widths[0])
        self.downsamples = nn.Sequential(*layers)
        self.middle = middle_layers(widths[-1])
        self.head = Head(widths[-1], 2 * layout.channels)
        self.split = 2 * (layout.blocks + 1)  # after the second Downsample

    def fine(self, x: Tensor, past: Past) -> Tensor:
        return through([self.conv1, *self.downsamples[: self.split]], x, past)

    def coarse(self, x: Tensor, past: Past) -> Tensor:
        return through([*self.downsamples[self.split :], *self.middle, self.head], x, past)


class Decoder(nn.Module):
    """[B, C, 1, H, W] -> `coarse` -> [B, C', 1 or 2, 2H, 2W] -> `fine` -> frames [B, 3, 1 or 4, 8H, 8W] in -1..1."""

    def __init__(self, layout: Layout):
        super().__init__()
        widths, time = layout.widths[::-1], layout.time[::-1]
        layers: list[nn.Module] = []
        for i, (before, width) in enumerate(zip((widths[0], *(w // 2 for w in widths)), widths)):
            layers += [Residual(before if block == 0 else width, width) for block in range(layout.blocks + 1)]
            layers += [Upsample(width, width // 2, time[i])] if i < len(time) else []
        self.conv1 = CausalConv3d(layout.channels, widths[0])
        self.middle = middle_layers(widths[0])
        self.upsamples = nn.Sequential(*layers)
        self.head = Head(widths[-1], 3)
        self.split = -2 * (layout.blocks + 2)  # before the last Upsample but one

    def coarse(self, x: Tensor, past: Past) -> Tensor:
        return through([self.conv1, *self.middle, *self.upsamples[: self.split]], x, past)

    def fine(self, x: Tensor, past: Past) -> Tensor:
        return through([*self.upsamples[self.split :], self.head], x, past)


class WanVAE(nn.Module):
    """The autoencoder itself, for inference. `DecoderStream` and `EncoderStream` run it."""

    name = "a Wan 2.1 VAE"
    files = "Wan2.1_VAE.pth or wan_2.1_vae.safetensors"
    layout = Layout
    statistics = WAN21

    def __init__(self, layout: Layout = Layout()):
        super().__init__()
        self.channels = layout.channels
        self.space = 2 ** len(layout.time)  # pixels per latent pixel
        self.between = self.space // 4  # pixels per latent pixel between `coarse` and `fine`
        self.time = 2 ** sum(layout.time)  # frames per latent, after the first
        self.margin = -(-(6 * layout.blocks + 10) // self.space)  # latent pixels around a tile that `fine` looks at
        self.encoder = Encoder(layout)
        self.conv1 = nn.Conv3d(2 * layout.channels, 2 * layout.channels, 1)
        self.conv2 = nn.Conv3d(layout.channels, layout.channels, 1)
        self.decoder = Decoder(layout)

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> WanVAE:
        """Builds the autoencoder that a state dict describes, in its dtype, around its tensors (no copies).

        Raises ValueError if it is not an autoencoder of this kind.
        """
        try:
            with torch.device("meta"):
                vae = cls(cls.layout.of(state))
        except (LookupError, ArithmeticError, RuntimeError) as error:  # the last: sizes beyond all memory
            raise cls._wrong(state, error if isinstance(error, LookupError) else "a layer") from None
        needed, found = ({name: tensor.shape for name, tensor in d.items()} for d in (vae.state_dict(), state))
        if wrong := needed.items() ^ found.items():
            raise cls._wrong(state, min(wrong)[0])
        if vae.channels != (channels := len(cls.statistics.mean)):
            raise cls._wrong(state, f"conv2.weight (for {vae.channels} channels, not {channels})")
        vae.load_state_dict(state, assign=True)
        return vae.requires_grad_(False).eval()

    def decode_coarse(self, z: Tensor, past: Past) -> Tensor:
        """One raw latent [B, C, 1, H, W] -> what `decoder.fine` makes frames of; updates `past`."""
        z = z.contiguous(memory_format=torch.channels_last_3d)  # one layout, whatever z was cut from
        return self.decoder.coarse(self.conv2(z), past)

    def encode_coarse(self, x: Tensor, past: Past) -> Tensor:
        """What `encoder.fine` made of one latent's frames -> the raw latent [B, C, 1, H, W]; updates `past`."""
        mean, _ = self.conv1(self.encoder.coarse(x, past)).chunk(2, 1)
        return mean

    def decode(self, latents: Tensor, tile: int | None = None) -> Tensor:
        """A whole clip: latents [B, C, F, H, W] in model space -> frames [B, 4F-3, 8H, 8W, 3] in 0..1, float32."""
        return DecoderStream(self, tile).decode(latents)

    def encode(self, frames: Tensor, tile: int | None = None) -> Tensor:
        """A whole clip: frames [B, T, 8H, 8W, 3] in 0..1 -> latents [B, C, 1 + (T-1)//4, H, W] in model space, float32.

        Frames at the end that do not fill a latent, (T-1) % 4 of them, are left out, as in the published code.
        """
        return EncoderStream(self, tile).encode(frames)

    @classmethod
    def _wrong(cls, state: dict[str, Tensor], reason: object) -> ValueError:
        return ValueError(
            f"Got {len(state)} tensors that do not make up {cls.name}: {reason} is missing, unknown or of a wrong "
            f"shape. Use {cls.files}, and download the file again if it is one of these."
        )


@dataclass(frozen=True)
class Span:
    """A stretch of rows or columns, in latent pixels: `core` is wanted, `seen` has the margin around it."""

    core: slice
    seen: slice

    @property
    def inside(self) -> slice:
        """The core, counted from where `seen` begins."""
        return slice(self.core.start - self.seen.start, self.core.stop - self.seen.start)


def spans(length: int, tile: int, margin: int) -> list[Span]:
    """As few stretches as cover `length` latent pixels with none seeing more than `tile`, all about equally long."""
    for count in itertools.count(1):
        edges = [i * length // count for i in range(count + 1)]
        cut = [slice(max(a - margin, 0), min(b + margin, length)) for a, b in pairwise(edges)]
        if max(seen.stop - seen.start for seen in cut) <= tile:
            return [Span(slice(a, b), seen) for (a, b), seen in zip(pairwise(edges), cut)]


@dataclass
class Tile:
    rows: Span
    columns: Span
    past: Past = field(default_factory=dict)

    def cut_from(self, x: Tensor, scale: int) -> Tensor:
        """What it sees of x [B, C, T, scale * H, scale * W]."""
        return _window(x, self.rows.seen, self.columns.seen, scale)

    def put_into(self, canvas: Tensor, y: Tensor, scale: int) -> None:
        """Its core of y, made of what it saw, into its place in the canvas [B, C, T, scale * H, scale * W]."""
        wanted = _window(y, self.rows.inside, self.columns.inside, scale)
        _window(canvas, self.rows.core, self.columns.core, scale).copy_(wanted)


def _window(x: Tensor, rows: slice, columns: slice, scale: int) -> Tensor:
    return x[..., scale * rows.start : scale * rows.stop, scale * columns.start : scale * columns.stop]


class Fine:
    """Runs `layers` over a clip at the larger sizes, whole or in tiles, and keeps their pasts.

    Pasts of tiles wait in CPU memory for their turn: at full size they are what takes the most.
    """

    def __init__(self, layers: Callable[[Tensor, Past], Tensor], before: int, after: int, tiles: list[Tile]):
        self.layers = layers
        self.before, self.after = before, after  # how wide a latent pixel is in what goes in and what comes out
        self.tiles = tiles

    def run(self, xs: list[Tensor]) -> list[Tensor]:
        """Steps [B, C, T, before * H, before * W] -> [B, C', T', after * H, after * W] each."""
        if len(self.tiles) == 1:
            return [self.layers(x, self.tiles[0].past) for x in xs]
        canvases: list[Tensor] = []
        for tile in self.tiles:
            tile.past = _moved(tile.past, xs[0].device)
            for i, x in enumerate(xs):
                y = self.layers(tile.cut_from(x, self.before), tile.past)
                if tile is self.tiles[0]:
                    canvases.append(self._canvas(x, y))
                tile.put_into(canvases[i], y, self.after)
            tile.past = _moved(tile.past, torch.device("cpu"))
        return canvases

    def _canvas(self, x: Tensor, y: Tensor) -> Tensor:
        height, width = (n * self.after // self.before for n in x.shape[3:])
        shape = (*y.shape[:3], height, width)
        return torch.empty(shape, dtype=y.dtype, device=y.device, memory_format=torch.channels_last_3d)


def _moved(past: Past, device: torch.device) -> Past:
    return {layer: tensor.to(device) for layer, tensor in past.items()}


class Stream:
    """One clip's way through the autoencoder: what is remembered of it. `tile` in latent pixels; None: no tiles."""

    def __init__(self, vae: WanVAE, tile: int | None = None):
        if tile is not None and tile <= 2 * vae.margin:
            raise ValueError(
                f"Got tiles of {tile} latent pixels; they need a margin of {vae.margin} on each side. "
                f"Use {4 * vae.margin} or more, or no tiles."
            )
        self.vae = vae
        self.tile = tile
        self.reset()

    def reset(self) -> None:
        """Forgets the clip; the next call starts another."""
        self.shape: tuple[int, int, int] | None = None  # B, H, W of the clip under way, in latent pixels
        self.past: Past = {}  # of the coarse layers
        self.fine: Fine | None = None

    def _tiles(self, height: int, width: int) -> list[Tile]:
        rows, columns = (spans(n, self.tile or n, self.vae.margin) for n in (height, width))
        return [Tile(row, column) for row, column in itertools.product(rows, columns)]

    def _begin(self, batch: int, height: int, width: int) -> bool:
        """Whether this is a clip's first call. Raises ValueError if it does not go with the clip under way."""
        if self.shape not in (None, (batch, height, width)):
            raise ValueError(
                f"Got a batch of {batch} with {height} x {width} latent pixels, but this clip began with "
                f"{self.shape[0]} with {self.shape[1]} x {self.shape[2]}. Call reset() before another clip."
            )
        first, self.shape = self.shape is None, (batch, height, width)
        return first

    @property
    def _together(self) -> int:
        """Latents that a tile takes in one turn."""
        return 1 if self.tile is None else 4


class DecoderStream(Stream):
    """Latents in, frames out, any number of latents at a time.

        stream = DecoderStream(vae)
        for chunk in rollout(...):
            frames = stream.decode(chunk.latents)

    The first call gives 4F-3 frames, later ones 4F. However the clip is cut, the frames are the same to the bit.
    With `tile`, a stream takes less memory and more time.
    """

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """latents [B, C, F, H, W] in model space -> frames [B, T, 8H, 8W, 3], float32 in 0..1, on the vae's device.

        Raises ValueError for other shapes, or for a batch or size unlike the one the clip began with.
        """
        self._check(latents)
        batch, _, _, height, width = latents.shape
        if self._begin(batch, height, width):
            self.fine = Fine(self.vae.decoder.fine, self.vae.between, self.vae.space, self._tiles(height, width))
        weight = next(self.vae.parameters())
        raw = self.vae.statistics.from_model_space(latents.to(weight.device)).to(weight.dtype)
        frames = [y for piece in raw.split(self._together, 2) for y in self._frames(piece)]
        return torch.cat(frames, 1).float().add_(1).div_(2).clamp_(0, 1)

    def _frames(self, raw: Tensor) -> list[Tensor]:
        """[B, C, F, H, W] -> [B, 1 or 4, 8H, 8W, 3] in -1..1 for each latent."""
        coarse = [self.vae.decode_coarse(z, self.past) for z in raw.split(1, 2)]
        return [y.movedim(1, -1) for y in self.fine.run(coarse)]

    def _check(self, latents: Tensor) -> None:
        if latents.ndim != 5 or latents.shape[1] != self.vae.channels or 0 in latents.shape:
            raise ValueError(
                f"Got latents of shape {list(latents.shape)}; this decoder needs [batch, {self.vae.channels}, "
                "latent frames (1 or more), height, width]. Decode with the autoencoder that belongs to the model."
            )


class EncoderStream(Stream):
    """Frames in, latents out, any number of frames at a time; frames wait until a latent's worth is there.

        stream = EncoderStream(vae)
        latents = torch.cat([*(stream.encode(frames) for frames in clip), stream.flush()], 2)

    A clip's first frame is its first latent; then four frames make one. However the clip is cut, the latents are the
    same to the bit.
    """

    def reset(self) -> None:
        """Forgets the clip, with the frames that wait; the next call starts another."""
        super().reset()
        self.waiting: Tensor | None = None  # [B, 3, 0..3, 8H, 8W]

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """frames [B, T, 8H, 8W, 3] in 0..1 -> the latents that are complete, [B, C, F, H, W] in model space, float32.

        F may be 0. Raises ValueError for other shapes, or for a batch or size unlike the one the clip began with.
        """
        self._check(frames)
        space, weight = self.vae.space, next(self.vae.parameters())
        height, width = frames.shape[2] // space, frames.shape[3] // space
        first = self._begin(len(frames), height, width)
        if first:
            self.fine = Fine(self.vae.encoder.fine, space, self.vae.between, self._tiles(height, width))
        x = (frames.to(weight.device, torch.float32) * 2 - 1).to(weight.dtype).movedim(-1, 1)  # [B, 3, T, 8H, 8W]
        steps = self._steps(x if first else torch.cat([self.waiting, x], 2), first)
        pieces = [steps[i : i + self._together] for i in range(0, len(steps), self._together)]
        latents = [z for piece in pieces for z in self._latents(piece)]
        return self.vae.statistics.to_model_space(torch.cat([self._none(), *latents], 2))

    def flush(self) -> Tensor:
        """Ends the clip. Frames that wait are left out, as in the published code: [B, C, 0, H, W]. Resets the stream.

        Raises ValueError when no frame was given since the last reset.
        """
        if self.shape is None:
            raise ValueError("Got no frame to encode; a clip needs at least one. Call encode() first.")
        none = self._none()
        self.reset()
        return none

    def _steps(self, x: Tensor, first: bool) -> list[Tensor]:
        """Frames [B, 3, T, 8H, 8W] -> those of each whole latent; the others wait."""
        alone = [1] if first else []
        whole, rest = divmod(x.shape[2] - len(alone), self.vae.time)
        *steps, waiting = x.split([*alone, *[self.vae.time] * whole, rest], 2)
        self.waiting = waiting.clone()  # not a view that keeps the whole of x
        return steps

    def _latents(self, steps: list[Tensor]) -> list[Tensor]:
        return [self.vae.encode_coarse(x, self.past) for x in self.fine.run(steps)]

    def _none(self) -> Tensor:
        batch, height, width = self.shape
        return torch.empty(batch, self.vae.channels, 0, height, width, device=self.waiting.device)

    def _check(self, frames: Tensor) -> None:
        space, shape = self.vae.space, frames.shape
        if len(shape) != 5 or shape[4] != 3 or 0 in shape or shape[2] % space or shape[3] % space:
            raise ValueError(
                f"Got frames of shape {list(shape)}; this encoder needs [batch, frames (1 or more), height, width, 3] "
                f"with height and width multiples of {space}. Crop or resize the frames."
            )
