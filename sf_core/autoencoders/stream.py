"""Streaming decoders and encoders: layers that remember a frame, run over a clip handed in piece by piece.

A `Stream` owns what the layers remember and always steps by the same number of frames. Tensor shapes are therefore the
same however the clip is cut, and so, to the bit, are the results; memory does not grow with the clip either.

    DecoderStream.decode(latents) -> frames         EncoderStream.encode(frames) -> latents         reset()

is the one protocol; wan_vae.py has streams of its own behind it.

B batch, T pixel frames, F latent frames, C channels, H W latent size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

TIME = 4  # pixel frames of every latent frame but the first, which holds one


def latent_frames(pixels: int) -> int:
    """Latent frames that hold so many pixel frames: 1 + ceil((pixels - 1) / 4)."""
    return 1 + -(-(pixels - 1) // TIME)


def pixel_frames(latents: int) -> int:
    """Pixel frames that so many latent frames decode to: 1 + 4 (latents - 1)."""
    return 1 + TIME * (latents - 1)


class Stateful(nn.Module):
    """A layer that remembers: forward(x [B, T, C, H, W], state) -> (y, state); state is None before the first frame."""


def walk(layers: nn.Sequential, x: Tensor, states: dict[str, object]) -> Tensor:
    """Runs frames [B, T, C, H, W] through `layers`, all T at once (as training wants it); updates `states` in place.

    `states` holds what each Stateful layer remembers, by layer name; {} before the first frame.
    Other layers see [B*T, C, H, W] and may change the number of frames.
    """
    batch = x.shape[0]
    for name, layer in layers.named_children():
        if isinstance(layer, Stateful):
            x, states[name] = layer(x, states.get(name))
        else:
            x = layer(x.flatten(0, 1)).unflatten(0, (batch, -1))
    return x


class Stream:
    """Runs `layers` over a clip, `step` frames at a time, and keeps the layers' states between calls."""

    def __init__(self, layers: nn.Sequential, step: int = 1):
        self.layers = layers
        self.step = step
        self.states: dict[str, object] = {}

    def reset(self) -> None:
        """Forgets the clip; the next frame is a first one."""
        self.states = {}

    def run(self, x: Tensor) -> Iterator[Tensor]:
        """x [B, T, C, H, W], T a multiple of `step` -> one output per step."""
        for piece in x.split(self.step, 1):
            yield walk(self.layers, piece, self.states)


class DecoderStream:
    """Latents in, frames out, any number of latents at a time.

        stream = DecoderStream(vae)
        for chunk in rollout(...):
            frames = stream.decode(chunk.latents)

    The first call gives 4F-3 frames, later ones 4F: of the frames a clip's first latent decodes to, the last counts.
    `vae` is any autoencoder with `channels` and a `decoder`, a Sequential [B, F, C, H, W] -> [B, 4F, 3, 8H, 8W].
    """

    def __init__(self, vae: nn.Module):
        self.vae = vae
        self.stream = Stream(vae.decoder)
        self.batch = 0  # of the clip under way; 0 before its first latent

    def reset(self) -> None:
        """Forgets the clip; the next call starts another."""
        self.stream.reset()
        self.batch = 0

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """latents [B, C, F, H, W] in model space -> frames [B, T, 8H, 8W, 3], float32 in 0..1, on the vae's device.

        Raises ValueError for other shapes, or for a batch unlike the one the clip began with.
        """
        self._check(latents)
        weight = next(self.vae.parameters())
        x = latents.to(weight).transpose(1, 2)  # [B, F, C, H, W]
        frames = [to_frames(y) for y in self.stream.run(x)]  # [B, 4, 8H, 8W, 3] each
        if not self.batch:
            frames[0] = frames[0][:, -1:]
        self.batch = latents.shape[0]
        return torch.cat(frames, 1)

    def _check(self, latents: Tensor) -> None:
        if latents.ndim != 5 or latents.shape[1] != self.vae.channels or latents.shape[2] < 1:
            raise ValueError(
                f"Got latents of shape {list(latents.shape)}; this decoder needs [batch, {self.vae.channels}, "
                "latent frames (1 or more), height, width]. Decode with the autoencoder that belongs to the model."
            )
        if self.batch not in (0, latents.shape[0]):
            raise ValueError(
                f"Got a batch of {latents.shape[0]}, but this clip began with {self.batch}. "
                "Call reset() before decoding another clip."
            )


class EncoderStream:
    """Frames in, latents out, any number of frames at a time; frames wait until a latent's worth is there.

        stream = EncoderStream(vae)
        latents = torch.cat([*(stream.encode(frames) for frames in clip), stream.flush()], 2)

    `vae` is any autoencoder with `channels`, `space` (pixels per latent pixel), `time` (frames per latent) and an
    `encoder`, a Sequential [B, time*F, 3, 8H, 8W] -> [B, F, C, H, W].
    """

    def __init__(self, vae: nn.Module):
        self.vae = vae
        self.stream = Stream(vae.encoder, step=vae.time)
        self.waiting: Tensor | None = None  # [B, 0..time-1, 3, 8H, 8W]

    def reset(self) -> None:
        """Forgets the clip; the next call starts another."""
        self.stream.reset()
        self.waiting = None

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """frames [B, T, 8H, 8W, 3] in 0..1 -> the latents that are complete, [B, C, F, H, W] in model space, float32.

        F may be 0. Raises ValueError for other shapes.
        """
        self._check(frames)
        x = frames.to(next(self.vae.parameters())).permute(0, 1, 4, 2, 3)  # [B, T, 3, 8H, 8W]
        x = x if self.waiting is None else torch.cat([self.waiting, x], 1)
        ready = x.shape[1] // self.vae.time * self.vae.time
        self.waiting = x[:, ready:]
        return self._latents(x[:, :ready])

    @torch.no_grad()
    def flush(self) -> Tensor:
        """Ends the clip: the latent of the waiting frames, the last of them repeated; F is 0 or 1. Resets the stream.

        Raises ValueError when no frame was given since the last reset.
        """
        if self.waiting is None:
            raise ValueError("Got no frame to encode; a clip needs at least one. Call encode() first.")
        x = self.waiting
        if x.shape[1]:
            x = torch.cat([x, x[:, -1:].expand(-1, self.vae.time - x.shape[1], -1, -1, -1)], 1)
        latents = self._latents(x)
        self.reset()
        return latents

    def _latents(self, x: Tensor) -> Tensor:
        batch, frames, _, height, width = x.shape
        if not frames:
            return x.new_zeros(batch, self.vae.channels, 0, height // self.vae.space, width // self.vae.space).float()
        return torch.cat(list(self.stream.run(x)), 1).transpose(1, 2).float()

    def _check(self, frames: Tensor) -> None:
        space = self.vae.space
        if frames.ndim != 5 or frames.shape[4] != 3 or frames.shape[2] % space or frames.shape[3] % space:
            raise ValueError(
                f"Got frames of shape {list(frames.shape)}; this encoder needs [batch, frames, height, width, 3] with "
                f"height and width multiples of {space}. Crop or resize the frames."
            )


def to_frames(x: Tensor) -> Tensor:
    """[B, T, 3, H, W] -> [B, T, H, W, 3] clamped to 0..1, float32."""
    return x.clamp(0, 1).permute(0, 1, 3, 4, 2).float()
