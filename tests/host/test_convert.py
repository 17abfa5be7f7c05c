"""Converted checkpoints in ComfyUI's own loader and in ours: one model, and the one that the file was made of."""

import json

import pytest
import torch

from tests.host.test_models import (  # noqa: F401  fixtures
    exact,
    folder,
    fp8_file,
    latent,
    prompt,
    relative_error,
    sample,
    save,
    wan_weights,
)


@pytest.fixture
def converted(pack, folder, capsys):  # noqa: F811
    """converted(file in the models folder, "--fp8", ...) -> name of the new file in it."""
    from any_folder_name.sf_core.cli.main import main

    def run(name: str, *options: str) -> str:
        models = folder / "diffusion_models"
        argv = ["convert", str(models / name), "--out", str(models / "new.safetensors"), "--json", *options]
        assert main(argv) == 0, capsys.readouterr().err
        assert json.loads(capsys.readouterr().out)["causal"]
        return "new.safetensors"

    return run


def stock(name: str):
    import nodes

    return nodes.UNETLoader().load_unet(name, "default")[0]


def test_a_training_run_is_the_same_model_in_both_loaders(call, folder, sample, exact, converted):  # noqa: F811
    from comfy.ldm.wan.ar_model import CausalWanModel

    ours = call("LoadModel", save(folder, "self_forcing_dmd.pt", wan_weights()), "auto", "auto")
    name = converted("self_forcing_dmd.pt")
    native, again = stock(name), call("LoadModel", name, "auto", "auto")
    assert isinstance(native.model.diffusion_model, CausalWanModel)
    expected = sample(ours)
    assert torch.equal(sample(again), expected)
    assert torch.equal(sample(native, preset="self-forcing"), expected)
    assert relative_error(expected, exact) < 1e-4


@pytest.mark.parametrize("source", ["a training run", "a float8 file", "a float8 file with a scale per row"])
def test_float8_is_read_alike_by_both_loaders(call, folder, sample, exact, converted, source):  # noqa: F811
    if source == "a training run":
        name = converted(save(folder, "self_forcing_dmd.pt", wan_weights()), "--fp8")
    else:
        weights = fp8_file(wan_weights(), per_row=source.endswith("row"))
        name = converted(save(folder, "self_forcing_fp8.safetensors", weights))
    native, ours = stock(name), call("LoadModel", name, "auto", "auto")
    for model in (native, ours):
        state = model.model.diffusion_model.state_dict()
        assert state["blocks.0.ffn.2.weight"].dtype == torch.float8_e4m3fn
        assert state["head.head.weight"].dtype == torch.float32
    samples = sample(native, preset="self-forcing")
    assert torch.equal(samples, sample(ours))
    assert relative_error(samples, exact) < 0.1
    full = {
        json.loads(bytes(value.tolist())).get("full_precision_matrix_mult", False)
        for key, value in native.model.diffusion_model.state_dict().items()
        if key.endswith("comfy_quant")
    }
    assert full == {source != "a float8 file"}


def test_a_lora_that_was_merged_is_in_both(call, folder, sample, converted):  # noqa: F811
    layer, base = "blocks.1.self_attn.q", save(folder, "longlive_base.pt", wan_weights())
    down, up = 0.1 * torch.randn(2, 128), 0.1 * torch.randn(128, 2)
    torch.save({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}, folder / "loras" / "lora.pt")
    merged = call("LoadModel", base, "auto", "auto", "lora.pt", 1.0)
    name = converted(base, "--lora", str(folder / "loras" / "lora.pt"))
    assert torch.equal(sample(stock(name), preset="longlive"), sample(merged))
    assert torch.equal(sample(call("LoadModel", name, "auto", "auto")), sample(merged))
