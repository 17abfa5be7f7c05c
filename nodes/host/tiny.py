"""The built-in model in ComfyUI's own forms: MODEL, CLIP and VAE, which stock nodes take as well."""

from __future__ import annotations

import logging
import math

import comfy.model_patcher
import comfy.sd
import torch
from comfy.latent_formats import Wan21
from comfy.model_patcher import ModelPatcher
from comfy.supported_models_base import ClipTarget
from PIL import Image
from torch import Tensor, nn

from ...sf_core import tiny
from ...sf_core.device import console_text
from ...sf_core.pipeline import TinyPipeline
from ...sf_core.sampling.config import PRESETS
from . import checkpoints
from .model import Family, set_family
from .progress import frame_picture, say_on_running_node

NAME = "tiny"


# --- MODEL -----------------------------------------------------------------------------------------------------------


def load_patcher(disable_dynamic: bool = False) -> ModelPatcher:
    """The network as a native Wan MODEL; ComfyUI calls this again where it needs a second copy of the weights."""
    wan = tiny.load_transformer()
    patcher = comfy.sd.load_diffusion_model_state_dict(
        wan.state_dict(), metadata=checkpoints.wan_metadata(wan.config), disable_dynamic=disable_dynamic
    )
    patcher.cached_patcher_init = (load_patcher, ())
    size = (TinyPipeline.width, TinyPipeline.height)
    set_family(patcher, Family(PRESETS[NAME], preview=Preview(), size=size, only_size=True))
    return patcher


class Preview:
    """Pictures of latents under way, by the model's own decoder."""

    def __init__(self) -> None:
        self.autoencoder = tiny.load_autoencoder()

    def __call__(self, latents: Tensor) -> Image.Image:
        return frame_picture(self.autoencoder.decode(latents.cpu())[0, -1])


# --- CLIP ------------------------------------------------------------------------------------------------------------


class TextTokens:
    """ComfyUI's tokenizer for an encoder that reads plain text: one "token", the text itself."""

    def __init__(self, embedding_directory=None, tokenizer_data=None) -> None:
        pass

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs) -> dict:
        return {NAME: [[(text, 1.0)]]}

    def state_dict(self) -> dict:
        return {}


class TextModel(nn.Module):
    """What ComfyUI's CLIP asks of a text model, over the built-in text encoder."""

    disable_offload = True  # plain torch layers: they are loaded whole
    dtypes = (torch.float32,)

    def __init__(self, device=None, dtype=None, model_options=None) -> None:
        super().__init__()
        self.encoder = tiny.load_text_encoder().to(device)

    def reset_clip_options(self) -> None:
        pass

    def set_clip_options(self, options: dict) -> None:
        pass

    def encode_token_weights(self, tokens: dict) -> tuple[Tensor, None]:
        """Embeddings [B, text_len, text_dim], and no pooled output. An empty text, as negative prompts are, is none."""
        texts = [text for ((text, _),) in tokens[NAME]]
        left_out = [line for text in texts for line in self.left_out(text)]
        for line in left_out:
            logging.warning(console_text(line))
        if left_out:
            say_on_running_node("\n".join(left_out))
        embeds = [self.encoder.encode([text]) if text.strip() else self.encoder.null(1) for text in texts]
        return torch.cat(embeds), None

    def left_out(self, text: str) -> list[str]:
        """Which words of a prompt do not count and why, a line for each reason."""
        left_out = {"does not know": self.encoder.unknown(text), "has no room for": self.encoder.truncated(text)}
        return [
            f"The built-in model {why} these words and leaves them out: {' '.join(words[:8])}"
            for why, words in left_out.items()
            if words
        ]


def words_left_out(clip: comfy.sd.CLIP, text: str) -> list[str]:
    """`TextModel.left_out` of a prompt for the built-in text encoder; nothing for other ones."""
    model = getattr(clip, "cond_stage_model", None)
    return model.left_out(text) if isinstance(model, TextModel) else []


def load_clip() -> comfy.sd.CLIP:
    target = ClipTarget(TextTokens, TextModel)
    return comfy.sd.CLIP(target)


# --- VAE -------------------------------------------------------------------------------------------------------------


class HostAutoencoder(nn.Module):
    """The built-in autoencoder between ComfyUI's raw latents and pictures [B, 3, T, H, W] in 0..1."""

    def __init__(self) -> None:
        super().__init__()
        self.autoencoder = tiny.load_autoencoder()
        self.to_model_space, self.to_raw = Wan21().process_in, Wan21().process_out

    def decode(self, latents: Tensor, **options) -> Tensor:
        return self.autoencoder.decode(self.to_model_space(latents)).movedim(-1, 1)

    def encode(self, pixels: Tensor, **options) -> Tensor:
        return self.to_raw(self.autoencoder.encode(pixels.movedim(1, -1)).float())


class TinyVAE(comfy.sd.VAE):
    """A VAE whose network is ours; the host's constructor only knows networks of its own."""

    def __init__(self) -> None:
        super().__init__(sd={"pixel_space_vae": torch.tensor(1.0)})  # sets every field; those of video follow
        self.first_stage_model = HostAutoencoder()
        self.latent_channels, self.latent_dim = 16, 3
        self.upscale_ratio, self.upscale_index_formula = (lambda f: max(0, 4 * f - 3), 8, 8), (4, 8, 8)
        self.downscale_ratio, self.downscale_index_formula = (lambda t: math.ceil((t + 3) / 4), 8, 8), (4, 8, 8)
        self.process_input = self.process_output = lambda pictures: pictures
        self.memory_used_encode = lambda shape, dtype: 60 * math.prod(shape[-3:])
        self.memory_used_decode = lambda shape, dtype: 600 * 4 * 8 * 8 * math.prod(shape[-3:])
        self.vae_dtype, self.working_dtypes, self.size = torch.float32, [torch.float32], None
        self.disable_offload = True  # plain torch layers: they are loaded whole
        self.patcher = comfy.model_patcher.ModelPatcher(
            self.first_stage_model, load_device=self.device, offload_device=self.patcher.offload_device
        )


def load_vae() -> TinyVAE:
    return TinyVAE()
