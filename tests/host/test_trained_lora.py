"""A LoRA that our training writes, in ComfyUI's own loader: the video is that of its merged weights in the core."""

import pytest
import torch

from tests.host.core import core_latents

FRAMES = 6  # latent frames


@pytest.fixture(scope="module")
def run(tmp_path_factory, pack):
    """The folder of a short run that trains adapters on the built-in model, with steps large enough to see."""
    from any_folder_name.sf_core.training.config import TrainConfig, build
    from any_folder_name.sf_core.training.distributed import Group
    from any_folder_name.sf_core.training.train import train

    out = tmp_path_factory.mktemp("run")
    config = build(
        TrainConfig,
        {
            "method": "teacher-forcing", "out": str(out), "steps": 8, "batch": 4, "precision": "float32",
            "model": {"world": "tiny", "student": "built-in"}, "data": {"procedural": "trained", "pool": 16},
            "sampling": {"shift": 3, "window": 9}, "flow": {"shift": 3, "frames": 9},
            "lora": {"rank": 4, "alpha": 8}, "optimizer": {"lr": 1e-2}, "average": {"decay": 0.0},
        },
    )  # fmt: skip
    with torch.inference_mode(False), torch.enable_grad():
        train(config, Group(), torch.device("cpu"))
    return out


def test_lora_of_a_training_run_is_its_merged_model(run, call, tiny, monkeypatch):
    import folder_paths
    import nodes
    from any_folder_name.sf_core import tiny as core
    from any_folder_name.sf_core.sampling.config import PRESETS

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(run)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    model = nodes.LoraLoaderModelOnly().load_lora_model_only(tiny.model, "lora.safetensors", 1.0)[0]

    def sampled(patcher):
        latent = call("Latent", 64, 64, 4 * FRAMES - 3, 0.0, 16.0, 1)
        samples = call("Sampler", model=patcher, positive=tiny.prompt, latent=latent, seed=0)["samples"]
        return tiny.model.model.process_latent_in(samples)

    merged = core.load_transformer(path=run / "model.safetensors")
    expected = core_latents(merged, PRESETS["tiny"], tiny.prompt[0][0], FRAMES, 8, 8)
    plain, adapted = sampled(tiny.model), sampled(model)
    assert (adapted - expected).norm() < 0.05 * expected.norm()  # the merged model is bfloat16
    assert (adapted - plain).norm() > 5 * (adapted - expected).norm()
