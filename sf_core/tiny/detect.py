"""Reads colour, shape, motion and background off generated frames, by measuring; nothing here is learnt.

background  the backdrop that the median pixel is nearest to
colour      the palette entry that most pixels unlike the backdrop are near to
shape       overlap of what the shape covers with each shape drawn at the same place and size
motion      speed, spread and growth of that cover, compared with what each motion does
residual    mean distance of the pixels to the nearer of the prompted colour and the prompted backdrop: 0 is a perfect
            picture, and its growth over a long video is drift
sharpness   mean steepness of the edges: sum of squared over sum of plain differences of neighbouring pixels. Blur
            lowers it; what it is on drawn clips is what to compare with
grid        how much neighbouring pixels of the background differ across the lines between latent pixels, as a multiple
            of how much others do: 1 is no grid
spread      standard deviation (of 255) of the background about its mean: 0 is a flat one
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import data
from .autoencoder import SPACE
from .data import MOTIONS, SHAPES, SIZE, Clips

ATTRIBUTES = ("colour", "background", "shape", "motion")
UNLIKE = 0.22  # a pixel this far (RGB distance) from the backdrop may belong to the shape
MARGIN = 4  # pixels around a shape that count neither as shape nor as background
FAINT = 0.35  # cover below which a pixel is background
UNSEEN = 0.5 / 255  # a difference that no screen shows, added to both sides of the grid: 1 where nothing is uneven


@dataclass(frozen=True)
class Reading:
    """What a batch of clips shows: indices into data's tables, each [B]."""

    colour: Tensor
    background: Tensor
    shape: Tensor
    motion: Tensor


def read(frames: Tensor) -> Reading:
    """Frames [B, T, 64, 64, 3] in 0..1 -> Reading. T is best at least one period (32 frames)."""
    background = read_background(frames)
    behind = data.backdrops()[background][:, None]  # [B, 1, H, W, 3]
    colour = read_colour(frames, behind)
    cover = cover_of(frames, behind, data.palette()[colour])
    x, y, area = locate(cover)
    return Reading(colour, background, read_shape(cover, x, y, area), read_motion(x, y, area))


def read_background(frames: Tensor) -> Tensor:
    """Index [B] of the backdrop with the smallest median distance."""
    distances = [(frames - backdrop).norm(dim=-1).flatten(1).median(1).values for backdrop in data.backdrops()]
    return torch.stack(distances, 1).argmin(1)


def read_colour(frames: Tensor, behind: Tensor) -> Tensor:
    """Index [B] of the colour with the most evidence among pixels unlike the backdrop `behind` [B, 1, H, W, 3]."""
    unlike = (frames - behind).norm(dim=-1) > UNLIKE  # [B, T, H, W]
    evidence = [
        (unlike * (-(frames - ink).square().sum(-1) / (2 * 0.12**2)).exp()).flatten(1).sum(1) for ink in data.palette()
    ]
    return torch.stack(evidence, 1).argmax(1)


def cover_of(frames: Tensor, behind: Tensor, ink: Tensor) -> Tensor:
    """Where each pixel lies between backdrop (0) and ink (1), [B, T, H, W]; faint traces count as nothing."""
    return ((position_of(frames, behind, ink) - 0.2) / 0.8).clamp(0, 1)


def position_of(frames: Tensor, behind: Tensor, ink: Tensor) -> Tensor:
    """Where each pixel lies on the way from backdrop (0) to ink [B, 3] (1), [B, T, H, W]; not clamped."""
    way = ink[:, None, None, None] - behind
    return ((frames - behind) * way).sum(-1) / way.square().sum(-1)


def locate(cover: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centre x, y (pixels, on the torus: circular means) and area (pixels) of cover [B, T, H, W], each [B, T]."""
    angle = (torch.arange(SIZE) + 0.5) * (2 * math.pi / SIZE)

    def circular_mean(weights: Tensor) -> Tensor:
        turn = torch.atan2((weights * angle.sin()).sum(-1), (weights * angle.cos()).sum(-1))
        return turn % (2 * math.pi) * SIZE / (2 * math.pi)

    return circular_mean(cover.sum(-2)), circular_mean(cover.sum(-1)), cover.sum((-1, -2))


def fit_shapes(frames: Tensor, clips: Clips, rounds: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Centre x, y and radius (pixels, each [B, T]) at which the prompted shapes, drawn, are nearest to frames.

    Finer than `locate`, from which it begins: Gauss-Newton on how far each pixel lies between backdrop and colour.
    """
    behind, ink = data.backdrops()[clips.background][:, None], data.palette()[clips.colour]
    x, y, area = locate(cover_of(frames, behind, ink))
    at = torch.stack([x, y, (area / math.pi).sqrt()])  # [3, B, T]
    wanted = position_of(frames, behind, ink).flatten(2)  # [B, T, H*W]
    reach = torch.eye(3)[:, :, None, None] / 2

    def drawn(at: Tensor) -> Tensor:
        return data.shape_coverage(clips.shape, *at).flatten(2)

    for _ in range(rounds):
        slopes = torch.stack([drawn(at + step) - drawn(at - step) for step in reach], -1)  # [B, T, H*W, 3], a pixel
        normal = slopes.mT @ slopes + torch.eye(3) / 2
        missing = slopes.mT @ (wanted - drawn(at))[..., None]
        at = at + torch.linalg.solve(normal, missing)[..., 0].clamp(-1, 1).movedim(-1, 0)
    x, y, radius = at
    return x % SIZE, y % SIZE, radius.clamp(min=1)


def read_shape(cover: Tensor, x: Tensor, y: Tensor, area: Tensor) -> Tensor:
    """Index [B] of the shape that overlaps best when drawn at the measured places and sizes."""
    radius = (area / math.pi).sqrt()
    overlaps = []
    for shape in range(len(SHAPES)):
        drawn = data.coverage(shape, x, y, radius)
        both, either = torch.minimum(drawn, cover).sum((-1, -2)), torch.maximum(drawn, cover).sum((-1, -2))
        overlaps.append((both / either.clamp(min=1)).mean(1))
    return torch.stack(overlaps, 1).argmax(1)


def read_motion(x: Tensor, y: Tensor, area: Tensor) -> Tensor:
    """Index [B] of the motion whose speed, spread and growth are nearest to the measured ones."""
    return torch.cdist(motion_features(x, y, area), motion_prototypes()).argmin(1)


def motion_features(x: Tensor, y: Tensor, area: Tensor) -> Tensor:
    """[B, 5]: speed (1 = the linear motions'), spread (1 = an orbit's), both ways; growth (1 = a pulse's)."""
    pulse = data.PULSE_DEPTH / math.sqrt(2)
    radius = area.clamp(min=1).sqrt()
    return torch.stack([*_path_features(x), *_path_features(y), radius.std(1) / radius.mean(1) / pulse], 1)


def motion_prototypes() -> Tensor:
    """The features of every motion, [8, 5]: speed x, spread x, speed y, spread y, growth."""
    hop = data.BOUNCE_HEIGHT * math.sqrt(0.5 - (2 / math.pi) ** 2) / (data.ORBIT_RADIUS / math.sqrt(2))
    features = {
        "right": (1, 0, 0, 0, 0), "left": (-1, 0, 0, 0, 0), "up": (0, 0, -1, 0, 0), "down": (0, 0, 1, 0, 0),
        "bounce": (0, 0, 0, hop, 0), "orbit": (0, 1, 0, 1, 0), "pulse": (0, 0, 0, 0, 1), "still": (0, 0, 0, 0, 0),
    }  # fmt: skip
    return torch.tensor([features[m] for m in MOTIONS], dtype=torch.float32)


def _path_features(position: Tensor) -> tuple[Tensor, Tensor]:
    """Speed and spread of positions [B, T] on the torus around uniform motion, in units of the prototypes."""
    step = (position.diff(dim=1) + SIZE / 2) % SIZE - SIZE / 2
    path = torch.cat([torch.zeros_like(step[:, :1]), step.cumsum(1)], 1)
    time = torch.arange(path.shape[1]) - (path.shape[1] - 1) / 2
    slope = (path * time).sum(1) / time.square().sum()
    moved = slope.abs()[:, None] > data.SPEED / 2  # a slow trend is part of an orbit or a hop
    around = path - slope[:, None] * time * moved
    return slope / data.SPEED, around.std(1) / (data.ORBIT_RADIUS / math.sqrt(2))


def matches(reading: Reading, clips: Clips) -> dict[str, Tensor]:
    """bool [B] for each attribute, and for all of them at once."""
    right = {name: getattr(reading, name) == getattr(clips, name) for name in ATTRIBUTES}
    return {**right, "all": torch.stack(list(right.values())).all(0)}


def residual(frames: Tensor, clips: Clips) -> Tensor:
    """Mean RMS distance (0..1) of the pixels [B, T, H, W, 3] to the nearer of prompted colour and backdrop: [B]."""
    ink = data.palette()[clips.colour][:, None, None, None]
    behind = data.backdrops()[clips.background][:, None]
    distance = torch.minimum((frames - ink).square().mean(-1), (frames - behind).square().mean(-1)).sqrt()
    return distance.flatten(1).mean(1)


def sharpness(frames: Tensor) -> Tensor:
    """Mean steepness (0..1 a pixel) of the edges in frames [B, T, H, W, 3]: [B]."""
    right = frames[:, :, :-1, 1:] - frames[:, :, :-1, :-1]
    down = frames[:, :, 1:, :-1] - frames[:, :, :-1, :-1]
    steep = (right.square() + down.square()).mean(-1)  # [B, T, H-1, W-1], squared
    return steep.flatten(1).sum(1) / steep.sqrt().flatten(1).sum(1).clamp(min=1e-9)


def grid(frames: Tensor, clips: Clips) -> Tensor:
    """How the background differs across lines between latent pixels, over how it differs elsewhere: [B].

    Neighbouring pixels of frames [B, T, H, W, 3] are compared after the prompted backdrop is taken away, so the tiles
    of a checkered one do not count.
    """
    there, off = _background(frames, clips)
    across, within = torch.zeros(2, 2, len(frames))  # each [2, B]: sum of differences, number of them
    for axis in (2, 3):
        size = frames.shape[axis] - 1
        pairs = there.narrow(axis, 0, size) & there.narrow(axis, 1, size)
        shape = [size if dim == axis else 1 for dim in range(4)]
        line = (torch.arange(1, size + 1) % SPACE == 0).view(shape)
        differences = off.diff(dim=axis).abs().mean(-1)
        across += _sum_where(differences, pairs & line)
        within += _sum_where(differences, pairs & ~line)
    return (across[0] / across[1].clamp(min=1) + UNSEEN) / (within[0] / within[1].clamp(min=1) + UNSEEN)


def spread(frames: Tensor, clips: Clips) -> Tensor:
    """Standard deviation, of 255, of the background about its mean in each frame [B, T, H, W, 3], over all: [B]."""
    there, off = _background(frames, clips)
    weight = there[..., None] / there.sum((2, 3), keepdim=True)[..., None].clamp(min=1)  # [B, T, H, W, 1]
    mean = (off * weight).sum((2, 3), keepdim=True)
    return 255 * ((off - mean).square() * weight).sum((2, 3)).mean((1, 2)).sqrt()


def _background(frames: Tensor, clips: Clips) -> tuple[Tensor, Tensor]:
    """Which pixels are background and not near a shape, bool [B, T, H, W]; how far each is from the backdrop."""
    behind = data.backdrops()[clips.background][:, None]
    cover = cover_of(frames, behind, data.palette()[clips.colour]).flatten(0, 1)[:, None]  # [B*T, 1, H, W]
    near = F.max_pool2d(F.pad(cover, [MARGIN] * 4, mode="circular"), 2 * MARGIN + 1, 1)
    return (near < FAINT).view(frames.shape[:-1]), frames - behind


def _sum_where(values: Tensor, which: Tensor) -> Tensor:
    """Sum and number of the chosen values of each clip, [2, B]."""
    return torch.stack([(values * which).flatten(1).sum(1), which.flatten(1).sum(1)])


MEASURES = {"residual": residual, "sharpness": lambda frames, clips: sharpness(frames), "grid": grid, "spread": spread}
