"""The world of the built-in model: one coloured shape on a background, 64x64 pixels, moving for ever.

The picture is a torus (what leaves on the right comes back on the left) and every motion is periodic, so a clip can
be cut at any frame and "moves right" means the same in the tenth second as in the first. That makes drift measurable.

A clip is eight numbers (`Clips`); `render` draws it, `caption` says it in English. What a caption leaves out has a
default: a black background, a medium size, standing still. Combinations of colour, shape, motion and background
marked in `held_out()` are never trained on.
"""

import math
from dataclasses import dataclass, fields
from functools import cache

import torch
from torch import Tensor

SIZE = 64  # pixels, both ways
PERIOD = 32  # frames in which a linear motion or an orbit comes back to where it was
SPEED = SIZE / PERIOD  # pixels per frame of the linear motions
BOUNCE_HEIGHT, BOUNCE_PERIOD = 18.0, 16
ORBIT_RADIUS = 11.0
OFF_CENTRE = 8.0  # pixels that a path may lie off the middle of the picture
PULSE_DEPTH, PULSE_PERIOD = 0.22, 16

COLOURS = {
    "red": (0.90, 0.10, 0.12), "green": (0.10, 0.70, 0.20), "blue": (0.15, 0.35, 0.95), "yellow": (0.98, 0.88, 0.10),
    "orange": (1.00, 0.50, 0.05), "purple": (0.55, 0.15, 0.80), "cyan": (0.10, 0.85, 0.90), "pink": (1.00, 0.50, 0.75),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star")
MOTIONS = ("right", "left", "up", "down", "bounce", "orbit", "pulse", "still")
BACKGROUNDS = ("black", "gray", "white", "navy", "checkered")
SIZES = {"small": 8.5, "medium": 11.0, "big": 14.0}  # radius in pixels of the circle of equal area
DEFAULT_BACKGROUND, DEFAULT_MOTION, DEFAULT_SIZE = BACKGROUNDS.index("black"), MOTIONS.index("still"), 1

FLAT = {
    "black": (0.02, 0.02, 0.02),
    "gray": (0.50, 0.50, 0.50),
    "white": (0.96, 0.96, 0.96),
    "navy": (0.06, 0.08, 0.32),
}
CHECKER_TILE, CHECKER_LEVELS = 8, (0.30, 0.65)

MOTION_PHRASES = {
    "right": ("moves right", "moves to the right", "moving right", "slides to the right", "is moving right"),
    "left": ("moves left", "moves to the left", "moving left", "slides to the left", "is moving left"),
    "up": ("moves up", "moving up", "slides up", "is moving up", "rises"),
    "down": ("moves down", "moving down", "slides down", "is moving down", "falls"),
    "bounce": ("bounces", "bouncing", "is bouncing", "bounces up and down"),
    "orbit": ("orbits", "orbiting", "is orbiting", "moves around"),
    "pulse": ("pulses", "pulsing", "is pulsing", "grows and shrinks"),
    "still": ("stays still", "is still", "standing still", ""),
}
BACKGROUND_PHRASES = ("on a {} background", "on {}", "in front of a {} background", "over a {} background")
BACKGROUND_WORDS = {"gray": ("gray", "grey")}  # where a background has more than its own name
SIZE_WORDS = {"small": ("small", "little"), "medium": ("", "", "medium"), "big": ("big", "large")}
COMBINATIONS = len(COLOURS) * len(SHAPES) * len(MOTIONS) * len(BACKGROUNDS)


@dataclass(frozen=True)
class Clips:
    """A batch of clips, each field [B]: indices into the tables above, start (pixels) and phase (turns, 0..1)."""

    colour: Tensor
    shape: Tensor
    motion: Tensor
    background: Tensor
    size: Tensor
    x: Tensor
    y: Tensor
    phase: Tensor

    def __len__(self) -> int:
        return len(self.colour)

    def __getitem__(self, which) -> "Clips":
        """A slice or an index tensor of the batch."""
        return Clips(**{f.name: getattr(self, f.name)[which] for f in fields(self)})


@cache
def held_out() -> Tensor:
    """bool [COMBINATIONS]: the tenth of the combinations that training never sees."""
    order = torch.randperm(COMBINATIONS, generator=torch.Generator().manual_seed(20250608))
    mask = torch.zeros(COMBINATIONS, dtype=torch.bool)
    mask[order[: COMBINATIONS // 10]] = True
    return mask


def draw(n: int, generator: torch.Generator, split: str = "trained") -> Clips:
    """n random clips of "trained", "held-out" or "all" combinations, each equally likely; half are of medium size."""
    allowed = {"trained": ~held_out(), "held-out": held_out(), "all": torch.ones(COMBINATIONS, dtype=torch.bool)}[split]
    choices = allowed.nonzero().squeeze(1)
    combination = choices[torch.randint(len(choices), (n,), generator=generator)]
    size = torch.tensor([0, 1, 1, 2])[torch.randint(4, (n,), generator=generator)]
    x, y, phase, along = torch.rand(4, n, generator=generator)
    rest, background = combination // len(BACKGROUNDS), combination % len(BACKGROUNDS)
    rest, motion = rest // len(MOTIONS), rest % len(MOTIONS)
    middle, where = (
        SIZE / 2,
        SIZE * along,
    )  # a travelling shape may start anywhere on its path, which is near the middle
    x, y = (middle + OFF_CENTRE * (2 * offset - 1) for offset in (x, y))
    x = torch.where(motion <= MOTIONS.index("left"), where, x)
    y = torch.where((motion == MOTIONS.index("up")) | (motion == MOTIONS.index("down")), where, y)
    y = torch.where(motion == MOTIONS.index("bounce"), y + BOUNCE_HEIGHT / 2, y)
    return Clips(rest // len(SHAPES), rest % len(SHAPES), motion, background, size, x, y, phase)


def caption(clips: Clips, generator: torch.Generator, backgrounds: bool = False) -> list[str]:
    """One English sentence per clip, phrased at random; `backgrounds`: naming the background even if it is black."""

    def pick(options):
        return options[int(torch.randint(len(options), (1,), generator=generator))]

    captions = []
    for c, s, m, b, z in zip(clips.colour, clips.shape, clips.motion, clips.background, clips.size, strict=True):
        words = (pick(SIZE_WORDS[list(SIZES)[z]]), list(COLOURS)[c], SHAPES[s], pick(MOTION_PHRASES[MOTIONS[m]]))
        subject = " ".join(" ".join(words).split())
        subject = f"{'an' if subject.startswith('orange') else 'a'} {subject}"
        place = pick(BACKGROUND_PHRASES).format(pick(BACKGROUND_WORDS.get(BACKGROUNDS[b], (BACKGROUNDS[b],))))
        unnamed = b == DEFAULT_BACKGROUND and not backgrounds and pick((True, False))
        captions.append(
            subject if unnamed else pick((f"{subject} {place}", f"{subject} {place}", f"{place} {subject}"))
        )
    return captions


def vocabulary() -> list[str]:
    """Every word that a caption can contain, sorted."""
    phrases = [p for options in MOTION_PHRASES.values() for p in options]
    variants = [w for options in (*SIZE_WORDS.values(), *BACKGROUND_WORDS.values()) for w in options]
    text = " ".join([*phrases, *BACKGROUND_PHRASES, *COLOURS, *SHAPES, *BACKGROUNDS, *variants, "a an"])
    return sorted(set(text.replace("{}", "").split()))


def trajectory(clips: Clips, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centre x, y (pixels, not wrapped) and scale of the radius at `time` [T] frames, each [B, T]."""
    turn = clips.phase[:, None] + time / PERIOD
    hop = (clips.phase[:, None] + time / BOUNCE_PERIOD) * math.pi
    beat = (clips.phase[:, None] + time / PULSE_PERIOD) * 2 * math.pi
    zero = torch.zeros_like(turn)
    travel = zero + SPEED * time
    dx = torch.stack([travel, -travel, zero, zero, zero, ORBIT_RADIUS * (2 * math.pi * turn).cos(), zero, zero])
    dy = torch.stack(
        [
            zero,
            zero,
            -travel,
            travel,
            -BOUNCE_HEIGHT * hop.sin().abs(),
            ORBIT_RADIUS * (2 * math.pi * turn).sin(),
            zero,
            zero,
        ]
    )
    row = torch.arange(len(clips))
    pulse = (clips.motion == MOTIONS.index("pulse"))[:, None]
    scale = torch.where(pulse, 1 + PULSE_DEPTH * beat.sin(), 1 + zero)
    return clips.x[:, None] + dx[clips.motion, row], clips.y[:, None] + dy[clips.motion, row], scale


def coverage(shape: int, x: Tensor, y: Tensor, radius: Tensor, size: int = SIZE) -> Tensor:
    """How much of each pixel the shape covers, 0..1, [..., size, size].

    Centre and radius (of the circle of equal area) are [...], in pixels. The distance to the outline becomes an
    anti-aliased edge. The plane wraps around.
    """
    grid = torch.arange(size) + 0.5
    px = (grid - x[..., None] + size / 2) % size - size / 2  # [..., size]
    py = (grid - y[..., None] + size / 2) % size - size / 2
    px, py, r = px[..., None, :], py[..., :, None], radius[..., None, None]
    return (0.5 - DISTANCES[shape](px, py, r)).clamp_(0, 1)


def _circle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return (x * x + y * y).sqrt() - r


def _square(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - r * (math.sqrt(math.pi) / 2)


def _triangle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    inscribed = r * math.sqrt(math.pi / (3 * math.sqrt(3)))
    return torch.maximum(y, x.abs() * (math.sqrt(3) / 2) - y * 0.5) - inscribed


def _star(x: Tensor, y: Tensor, r: Tensor, inner: float = 0.45) -> Tensor:
    """Five points, one up: fold the plane into one half point and measure to its edge."""
    half = math.pi / 5
    outer = r * math.sqrt(math.pi / (5 * inner * math.sin(half)))
    angle = torch.atan2(x, -y)
    angle = ((angle + half) % (2 * half) - half).abs()  # 0 at a tip, `half` at a notch
    edge = torch.tensor([math.cos(half) * inner - 1, math.sin(half) * inner])  # tip to notch, tip at (1, 0)
    nx, ny = (torch.stack([edge[1], -edge[0]]) / edge.norm()).tolist()
    distance = (x * x + y * y).sqrt()
    return distance * (angle.cos() * nx + angle.sin() * ny) - outer * nx


DISTANCES = (_circle, _square, _triangle, _star)


@cache
def palette() -> Tensor:
    """RGB of the shape colours, [8, 3] in 0..1."""
    return torch.tensor(list(COLOURS.values()))


def surfaces() -> Tensor:
    """RGB of every colour that is even over a tile: backgrounds, tiles of checkers, shapes; [14, 3] in 0..1."""
    tiles = [(level,) * 3 for level in CHECKER_LEVELS]
    return torch.tensor([*FLAT.values(), *tiles, *COLOURS.values()])


@cache
def backdrops(size: int = SIZE) -> Tensor:
    """The backgrounds as pictures, [5, size, size, 3] in 0..1."""
    flats = [torch.tensor(FLAT[name]).expand(size, size, 3) for name in BACKGROUNDS if name in FLAT]
    tile = torch.arange(size) // CHECKER_TILE
    board = torch.tensor(CHECKER_LEVELS)[(tile[:, None] + tile) % 2]
    return torch.stack([*flats, board[..., None].expand(size, size, 3)])


def render(clips: Clips, frames: int) -> Tensor:
    """Draws frames 0..frames-1 of every clip: [B, T, 64, 64, 3] in 0..1."""
    x, y, scale = trajectory(clips, torch.arange(frames, dtype=torch.float32))
    radius = torch.tensor(list(SIZES.values()))[clips.size][:, None] * scale
    return render_at(clips, x, y, radius)


def render_at(clips: Clips, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Draws the shapes of clips at centres x, y with a radius (pixels, each [B, T]): [B, T, 64, 64, 3] in 0..1."""
    cover = shape_coverage(clips.shape, x, y, radius)
    behind = backdrops()[clips.background][:, None]  # [B, 1, 64, 64, 3]
    ink = palette()[clips.colour][:, None, None, None]  # [B, 1, 1, 1, 3]
    return torch.lerp(behind, ink, cover[..., None])


def shape_coverage(shape: Tensor, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """`coverage` where every clip has a shape of its own, [B]: [B, T, 64, 64]."""
    cover = torch.empty(*x.shape, SIZE, SIZE)
    for number in range(len(SHAPES)):
        rows = (shape == number).nonzero().squeeze(1)
        cover[rows] = coverage(number, x[rows], y[rows], radius[rows])
    return cover
