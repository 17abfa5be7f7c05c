"""The tiny decoder for what it gets: latents of rollouts, which are off by a little, instead of clean ones.

The distilled model rolls out prompts of the tiny world. What each video should look like is then drawn: the prompted
shape at the place and size at which the video shows it (`fit_shapes`). The latents of the drawing are what the latents
of the rollout should have been, so that

    denoiser        latents of a rollout -> latents of its drawing
    decoder         latents of a rollout -> frames of its drawing

are trained side by side, from what the autoencoder's own training has left. Samples keep a part of the rollout's error,
which may be none of it or a little more than all, so that encoded clips and videos of more steps are decoded as well.
Encoder, and so the latent space, stay what they are.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from tqdm import tqdm

from ...sampling.plan import Plan
from ...sampling.prompts import PromptSchedule
from ...sampling.rollout import rollout
from ...tiny.autoencoder import SPACE, TinyAutoencoder, psnr
from ...tiny.data import SIZE, Clips, caption, draw, render_at, surfaces
from ...tiny.detect import fit_shapes
from ...wan.model import Network
from ..config import TrainConfig
from ..encoders import DTYPES, TinyEncoders, check_lineage, latent_size, load_network
from ..optim import Average, Optimizer
from ..run_folder import write_atomically
from ..step_random import StepRandom
from .base import Method, Update

POOL = "rollouts.pt"
ROLLOUT_BATCH = 16  # prompts that are rolled out together
MISMATCH = 0.12  # RMS difference (0..1) between a video and its drawing above which it does not show its prompt
FRAMES, WARM_UP = 6, 2  # latent frames of a sample; of them, in the middle of a video, those that no pixel counts of
PIXELS = 4  # one sample of so many is decoded to pixels, which costs many times what its latents do
SHIFT = 2  # samples are moved around the torus by a multiple of so many latent pixels, as checkers repeat
LINES = 4.0  # times that a difference across the lines between latent pixels counts
EVEN = 0.05  # distance up to which the latents of a drawing are those of an even surface
NEAR = 0.02  # a difference of latents or pixels below which the losses are quadratic


@dataclass(frozen=True)
class Pairs:
    """Rollouts beside their drawings: latents `made` and `drawn` [n, C, F, H, W]; the drawings as pictures.

    colour, shape, background      indices into data's tables, each [n]
    x, y, radius                   where the shape is, in pixels, each [n, 4F-3]
    """

    made: Tensor
    drawn: Tensor
    colour: Tensor
    shape: Tensor
    background: Tensor
    x: Tensor
    y: Tensor
    radius: Tensor

    def __len__(self) -> int:
        return len(self.made)

    def __getitem__(self, which: Tensor) -> Pairs:
        return Pairs(**{f.name: getattr(self, f.name)[which] for f in fields(self)})

    def frames(self, row: int, first: int) -> Tensor:
        """Frames [4 FRAMES, 64, 64, 3] of a drawing from latent frame `first` on; a video's first counts as a still."""
        at = torch.arange(4 * first - 3, 4 * (first + FRAMES) - 3).clamp(min=0)
        one = self[torch.tensor([row])]
        return render_at(one, one.x[:, at], one.y[:, at], one.radius[:, at])[0]


class FitDecoder(Method):
    """Decoder training on rollouts: a new denoiser learns on latents and, with the rest of the decoder, on pixels."""

    def __init__(self, config: TrainConfig, encoders: TinyEncoders, device: torch.device) -> None:
        check_lineage(config.model.student, encoders, "model.student")
        torch.manual_seed(config.seed)  # of the denoiser
        vae = TinyAutoencoder(denoised=True)
        vae.load_state_dict({**vae.state_dict(), **encoders.vae.state_dict()})
        vae.encoder.requires_grad_(False)
        self.vae, self.device, self.precision = vae.to(device), device, DTYPES[config.precision]
        self.pairs = load_pairs(config, encoders, device)
        set_surfaces(self.vae, self.pairs)
        self.modules = {"student": self.vae}
        self.averages = {"student": Average(self.vae, config.average.decay, config.average.start)}
        self.updates = [Update(Optimizer([self.vae], config.optimizer), self.loss)]

    def loss(self, random: StepRandom, progress: float) -> dict[str, Tensor]:
        """How far denoised latents are from those of the drawings, and pixels of some samples from the drawings."""
        decoder = self.vae.decoder[0]
        noisy, drawn, places = (part.to(self.device) for part in self.samples(random))
        with self.autocast():
            denoised, _, _ = decoder.denoiser(noisy, None)
        weight = decoder.linear.weight.detach().norm(dim=0).sqrt()  # [C], what a channel does to a picture
        off = (denoised.float() - drawn) * (weight / weight.mean())[:, None, None]
        losses = {"loss": 100 * near_norm(off, 2).mean(), "latents": off.detach().square().mean().sqrt()}
        chosen = [i for i, sample in enumerate(random.samples) if sample % PIXELS == 0]
        if chosen:
            losses["pixels"], losses["dB"] = self.pixel_loss(noisy[chosen], places[chosen])
            losses["loss"] = losses["loss"] + 100 * losses["pixels"] * len(chosen) * PIXELS / len(places)
        return losses

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32)

    def samples(self, random: StepRandom) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy and drawn latents [B, F, C, H, W]; rows, first latent frames and shifts down and right, [B, 4]."""
        pairs, side = self.pairs, SIZE // SPACE // SHIFT
        rows = random.integers("pair", len(pairs))
        begin = random.integers("first", pairs.made.shape[2] - FRAMES + 4)  # one in several is a beginning
        first = (begin - 3).clamp(min=0)
        moved = torch.stack([SHIFT * random.integers(way, side) for way in ("down", "right")], 1)
        places = torch.cat([rows[:, None], first[:, None], moved], 1)
        drawn, made = (cut(latents, places) for latents in (pairs.drawn, pairs.made))
        kept = error_kept(random.uniform("error")).view(-1, 1, 1, 1, 1)
        return torch.lerp(drawn, made, kept), drawn, places

    def pixel_loss(self, noisy: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """How far pixels, and differences of neighbours, are from the drawings'; PSNR. Latents [B, F, C, H, W]."""
        wanted = [
            roll(self.pairs.frames(row, first).movedim(-1, 1), (SPACE * down, SPACE * right))
            for row, first, down, right in places.tolist()
        ]
        wanted = torch.stack(wanted).to(self.device)  # [B, T, 3, H, W]
        with self.autocast():
            decoded, _ = self.vae.decoder[0](noisy, None)
        frame = torch.arange(4 * FRAMES, device=self.device)
        counts = frame >= torch.where(places[:, 1:2] == 0, 3, 4 * WARM_UP)  # [B, T]
        off = (decoded.float() - wanted)[counts]  # [n, 3, H, W]
        quality = psnr((off + wanted[counts]).detach().clamp(0, 1), wanted[counts]).mean()
        return near_norm(off, 1).mean() + unevenness(off), quality


@torch.no_grad()
def set_surfaces(vae: TinyAutoencoder, pairs: Pairs) -> None:
    """Sets the denoiser's even surfaces to the world's own, and its scale by how far rollouts are off on them."""
    denoiser = vae.decoder[0].denoiser
    colours = surfaces().to(vae.encoder.weight.device)
    still = colours[:, None, None, None].expand(-1, 1, SPACE, SPACE, 3)
    latents = vae.encode(still).flatten(1)  # [SURFACES, C]
    drawn, made = (value.movedim(1, -1).flatten(0, -2).to(latents) for value in (pairs.drawn, pairs.made))  # [n, C]
    even = torch.cdist(drawn, latents).amin(1) < EVEN
    denoiser.surfaces.copy_(latents)
    denoiser.scale.copy_(1 / (made - drawn)[even].std(0))


def unevenness(off: Tensor) -> Tensor:
    """How much errors [n, 3, H, W] of neighbours differ; across the lines between latent pixels it counts more."""
    lines = torch.arange(1, off.shape[-1], device=off.device) % SPACE == 0
    weight = torch.where(lines, LINES, 1.0)
    weight = weight / weight.mean()
    rows, columns = (near_norm(off.diff(dim=axis), 1) for axis in (2, 3))
    return (rows * weight[:, None]).mean() + (columns * weight).mean()


def near_norm(off: Tensor, dim: int) -> Tensor:
    """Norm over `dim`, quadratic near zero. Unlike its square it makes what is nearly right quite right."""
    return (off.square().sum(dim) + NEAR**2).sqrt() - NEAR


def error_kept(uniform: Tensor) -> Tensor:
    """How much of a rollout's error samples keep: a quarter of them nothing, half all, the rest up to 1.25 of it."""
    return torch.where(uniform < 0.25, 0.0, torch.where(uniform < 0.75, 1.0, 5 * (uniform - 0.75)))


def cut(latents: Tensor, places: Tensor) -> Tensor:
    """Samples [B, F, C, H, W] of latents [n, C, F, H, W] at places [B, 4]."""
    return torch.stack([
        roll(latents[row, :, first : first + FRAMES].transpose(0, 1), (down, right))
        for row, first, down, right in places.tolist()
    ])  # fmt: skip


def roll(picture: Tensor, moved: tuple[int, int]) -> Tensor:
    """Moves [..., H, W] around the torus."""
    return picture.roll(moved, (-2, -1))


def load_pairs(config: TrainConfig, encoders: TinyEncoders, device: torch.device) -> Pairs:
    """The run's pairs, made once and kept in its folder. Raises ValueError for a student that follows no prompt."""
    path = config.out / POOL
    if not path.is_file():
        made = make_pairs(config, encoders, device)
        if not len(made):
            raise ValueError(
                f"Got {config.data.pool} rollouts of {config.model.student}, none of which shows what its prompt says; "
                "a decoder learns from a model that does. Train the model first."
            )
        content = {f.name: getattr(made, f.name) for f in fields(made)}
        write_atomically(path, lambda partial: torch.save(content, partial))
    return Pairs(**torch.load(path, weights_only=True))


def make_pairs(config: TrainConfig, encoders: TinyEncoders, device: torch.device) -> Pairs:
    """Rolls out `data.pool` prompts of `rollout.frames` latent frames and draws what they show."""
    network = Network(load_network(config.model.student, torch.float32).to(device))
    generator = torch.Generator().manual_seed(config.seed)
    parts = []
    for first in tqdm(range(0, config.data.pool, ROLLOUT_BATCH), "rollouts", disable=None):
        clips = draw(min(ROLLOUT_BATCH, config.data.pool - first), generator, config.data.procedural)
        embeds = encoders.embeds(caption(clips, generator))
        plan = Plan(config.sampling, config.rollout.frames, *latent_size(config.model), len(clips))
        noise = StepRandom(config.seed, 0, tuple(range(first, first + len(clips)))).noise("pair")
        made = torch.cat([x0 for _, x0 in rollout(network, plan, PromptSchedule.of(embeds), noise)], 2)
        parts.append(draw_pairs(made.cpu().clone(), clips, encoders))
    return Pairs(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Pairs)})


def draw_pairs(made: Tensor, clips: Clips, encoders: TinyEncoders) -> Pairs:
    """Pairs of rollouts [B, C, F, H, W] of clips' prompts. Those that do not show their prompt are left out."""
    frames = encoders.decode(made)
    x, y, radius = fit_shapes(frames, clips)
    drawing = render_at(clips, x, y, radius)
    shown = (drawing - frames).square().mean((1, 2, 3, 4)).sqrt() < MISMATCH
    pairs = Pairs(made, encoders.encode(drawing), clips.colour, clips.shape, clips.background, x, y, radius)
    return pairs[shown.nonzero().squeeze(1)]
