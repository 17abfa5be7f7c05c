"""A user's files as encoders: UMT5's place is taken by a table, the VAE and the model are small."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import save_file

from sf_core.checkpoints.load import describe, load_model
from sf_core.training import encoders as encoders_module
from sf_core.training.config import ModelConfig
from sf_core.training.run_folder import MODEL
from sf_core.wan.config import WanConfig
from sf_core.wan.model import WanModel
from tests.core.regenerate import weights
from tests.core.runs import FAST, losses, trained
from tests.core.test_training import clip_folder
from tests.core.test_vae import SMALL, autoencoder

CONFIG = WanConfig(dim=24, heads=2, layers=2, ffn_dim=32, freq_dim=16, text_dim=8, text_len=6)
CPU = torch.device("cpu")


class Table(torch.nn.Module):
    """Prompts -> numbers that depend on their words."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def encode(self, prompts):
        self.asked += prompts
        seeds = [sum(map(ord, prompt)) for prompt in prompts]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        rows = [torch.randn(CONFIG.text_len, CONFIG.text_dim, generator=one) for one in generators]
        return torch.stack(rows).bfloat16()


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The `model` part of a configuration, its files written."""
    wan = WanModel(CONFIG, device="meta")
    state = weights({name: tuple(t.shape) for name, t in wan.state_dict().items()}, 1)
    save_file(state, tmp_path / "wan.safetensors", {"wan": json.dumps(asdict(CONFIG))})
    save_file(autoencoder(SMALL).state_dict(), tmp_path / "vae.safetensors")
    monkeypatch.setattr(encoders_module, "load_text_encoder", lambda *_: Table())
    model = {"world": "wan", "student": "wan.safetensors", "teacher": "wan.safetensors", "vae": "vae.safetensors"}
    places = {name: str(tmp_path / value) if name != "world" else value for name, value in model.items()}
    return {**places, "text_encoder": "umt5", "width": 32, "height": 16}


@pytest.mark.parametrize("method", ["dmd", "gan", "teacher-forcing"])
def test_a_users_model_is_trained(files, tmp_path, method):
    out = tmp_path / "run"
    data = {"clips": str(clip_folder(tmp_path / "clips"))}
    changes = {"rollout": {"frames": 2, "extra_chunks": 1, "extra_share": 1}, "optimizer": FAST}
    trained(method, out, model=files, data=data, **changes)
    assert len(losses(out)) == 3
    about = describe(out / MODEL)
    assert about.config == CONFIG and about.sampling.steps == (1000, 500)
    before = load_model(files["student"])[0].state_dict()
    after = load_model(out / MODEL)[0].state_dict()  # bfloat16
    assert any(not torch.equal(after[name], before[name].bfloat16()) for name in before)


def test_what_guidance_steers_away_from_is_encoded_once_and_a_frame_is_made_a_still(files):
    encoders = encoders_module.open_encoders(ModelConfig(**files), CPU, "blurry")
    embeds = encoders.embeds(["a", "", "blurry", "blurry", "a"])
    assert embeds.shape == (5, 6, 8) and embeds.dtype == torch.float32
    assert torch.equal(encoders.embeds(["", "blurry"]), embeds[1:3]) and encoders.text.asked == ["a", "", "blurry", "a"]
    clip = encoders.encode(torch.rand(1, 9, 16, 32, 3))
    assert clip.shape == (1, 16, 3, 2, 4)
    expected = encoders.encode(encoders.decode(clip)[:, -1:])
    assert torch.equal(encoders.still(clip), expected) and expected.shape == (1, 16, 1, 2, 4)


def test_a_world_without_its_files_is_refused(files):
    with pytest.raises(ValueError, match="Got no model.text_encoder and no model.vae"):
        encoders_module.open_encoders(ModelConfig(world="wan"), CPU)
    with pytest.raises(ValueError, match="Got 40 x 16 pixels; use multiples of 16"):
        encoders_module.open_encoders(replace(ModelConfig(**files), width=40), CPU)
