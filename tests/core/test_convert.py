"""Any checkpoint to one safetensors file: the same weights, the same frames, little memory."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sf_core.checkpoints import convert
from sf_core.checkpoints.load import dequantised, describe, load_checkpoint
from sf_core.cli.main import main
from sf_core.sampling.config import Sampling
from sf_core.sampling.families import FAMILIES
from sf_core.training.run_folder import write_atomically
from sf_core.wan.config import WanConfig
from tests.core.test_checkpoint import (
    CAUSAL,
    SMALL,
    TRAINING_FILES,
    diffusers,
    float8,
    fsdp,
    legacy,
    listed,
    needs_linux,
    prefixed,
    same,
    shard,
    tagged,
    weights,
)
from tests.core.test_cli_models import MODEL, TINY, files, folder, make, wan  # noqa: F401  fixtures
from tests.core.test_text import spiece  # noqa: F401  fixture

ROOT = Path(__file__).parents[2]
Q = "blocks.1.self_attn.q"


@pytest.fixture
def converted(tmp_path, capsys):
    """converted(path, "--fp8", ...) -> (path of the new file, the report)."""

    def run(path, *options, name="new.safetensors"):
        out = tmp_path / name
        status = main(["convert", str(path), "--out", str(out), "--json", *options])
        captured = capsys.readouterr()
        assert status == 0, captured.err
        return out, json.loads(captured.out)

    return run


def metadata_of(path) -> dict:
    with safe_open(path, "pt") as file:
        return file.metadata()


# --- Forms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", TRAINING_FILES.values(), ids=TRAINING_FILES.keys())
def test_training_files_become_their_best_weights_under_wans_names(tmp_path, converted, wrap):
    ema, raw, critic = (weights(seed=seed) for seed in range(3))
    torch.save(wrap(ema, raw, critic), tmp_path / "self_forcing_dmd.pt")
    out, report = converted(tmp_path / "self_forcing_dmd.pt")
    assert same(load_file(out), ema)
    assert report["family"] == "self-forcing" and report["licence"] == "Apache-2.0"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["diffusers", "shards", "prefix"])
def test_other_forms_become_wans_names_to_the_bit(tmp_path, converted, form, dtype, monkeypatch):
    monkeypatch.setattr(convert, "PORTION", 100_000)  # bytes: many portions
    state, source = weights(dtype=dtype), tmp_path / "SFWan" / "transformer"
    source.mkdir(parents=True)
    if form == "prefix":
        save_file(
            prefixed(state, "model.diffusion_model.") | {"vae.conv1.weight": torch.ones(3)}, source / "x.safetensors"
        )
    else:
        shard(diffusers(state) if form == "diffusers" else state, source)
    out, report = converted(source)
    assert same(load_file(out), state)
    assert report["bytes"] == out.stat().st_size and report["tensors"] == len(state)


def test_metadata_speaks_of_a_causal_model_its_family_and_licence(tmp_path, converted):
    torch.save({"generator": weights()}, tmp_path / "longlive_base.pt")
    out, _ = converted(tmp_path / "longlive_base.pt")
    about = metadata_of(out)
    assert json.loads(about["config"])["transformer"]["causal_ar"] is True
    assert about["family"] == "longlive" and "CC-BY-NC-SA-4.0" in about["licence"]
    assert about["page"].startswith("huggingface.co/Efficient-Large-Model/LongLive-1.3B")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_family_goes_along_whatever_the_new_name_says(tmp_path, converted, family):
    torch.save(weights(), tmp_path / "model.pt")
    out, _ = converted(tmp_path / "model.pt", "--family", family, name="causvid_longlive_1step.safetensors")
    about = describe(out)
    assert (about.family, about.sampling, about.causal) == (family, FAMILIES[family].sampling, True)
    assert f'its metadata says "{family}"' in about.note
    again, _ = converted(out, name="rolling_forcing.safetensors")
    assert describe(again).family == family


def test_a_model_that_nothing_calls_causal_is_not_called_so(tmp_path, converted):
    save_file(weights(), tmp_path / "model.safetensors")
    out, report = converted(tmp_path / "model.safetensors")
    assert "Nothing says that this model is causal" in report["note"] and not report["causal"]
    assert "causal_ar" not in metadata_of(out)["config"] and "family" not in metadata_of(out)
    assert "Nothing says that this model is causal" in describe(out).note


def test_models_of_our_own_training_stay_what_they_are(tmp_path, converted):
    config, sampling = replace(SMALL, heads=2, text_len=64), Sampling((900, 300), shift=3.0, chunk=2, window=6, sink=1)
    own = {"wan": json.dumps(asdict(config)), "sampling": json.dumps(asdict(sampling)), "seed": "3"}
    save_file(weights(config), tmp_path / "x.safetensors", own | CAUSAL)
    out, _ = converted(tmp_path / "x.safetensors")
    assert (describe(out).config, describe(out).sampling, metadata_of(out)["seed"]) == (config, sampling, "3")
    chosen, _ = converted(tmp_path / "x.safetensors", "--family", "longlive", name="other.safetensors")
    assert describe(chosen).sampling == FAMILIES["longlive"].sampling


def test_numbers_begin_at_multiples_of_their_size(tmp_path, converted):
    """As readers need that map the file and look at it as numbers."""
    torch.save({"generator": weights(dtype=torch.bfloat16)}, tmp_path / "self_forcing.pt")
    out, _ = converted(tmp_path / "self_forcing.pt", "--fp8")
    raw = out.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    del header["__metadata__"]
    sizes = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "U8": 1}
    ends = sorted(entry["data_offsets"] for entry in header.values())
    assert length % 8 == 0 and all(
        (8 + length + e["data_offsets"][0]) % sizes[e["dtype"]] == 0 for e in header.values()
    )
    assert all(a[1] == b[0] for a, b in zip(ends, ends[1:])) and 8 + length + ends[-1][1] == len(raw)


# --- Float8, dtypes and LoRAs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [legacy, tagged, listed])
@pytest.mark.parametrize("inputs", [False, True], ids=["weights", "inputs"])
def test_float8_files_keep_their_weights_and_scales(tmp_path, converted, write, inputs):
    state, scales = float8({name: tensor.bfloat16() for name, tensor in weights().items()})
    extra, metadata = write(scales, inputs)
    save_file(state | extra, tmp_path / "self_forcing.safetensors", metadata | CAUSAL)
    out, _ = converted(tmp_path / "self_forcing.safetensors")
    before, after = (load_checkpoint(path).state_dict for path in (tmp_path / "self_forcing.safetensors", out))
    assert same(before, after) and (f"{Q}.input_scale" in after) == inputs
    mark = json.loads(bytes(load_file(out)[f"{Q}.comfy_quant"].tolist()))
    assert mark["format"] == "float8_e4m3fn"
    assert mark.get("full_precision_matrix_mult", False) == (write is legacy and inputs)


def test_fp8_scales_matrices_of_the_blocks_and_nothing_else(tmp_path, converted):
    state = weights(dtype=torch.bfloat16)
    torch.save({"generator": state}, tmp_path / "self_forcing.pt")
    out, report = converted(tmp_path / "self_forcing.pt", "--fp8")
    written = load_file(out)
    plain = dequantised(load_checkpoint(out).state_dict, torch.float32)
    for name, tensor in state.items():
        quantised = name.startswith("blocks.") and tensor.ndim == 2 and name.endswith(".weight")
        assert written[name].dtype == (torch.float8_e4m3fn if quantised else torch.bfloat16), name
        assert quantised == (f"{name.removesuffix('.weight')}.comfy_quant" in written)
        if quantised:
            torch.testing.assert_close(plain[name], tensor.float(), rtol=2**-4, atol=1e-4)
            assert written[name].float().abs().max() == 448
        else:
            assert torch.equal(written[name], tensor)
    assert report["dtype"] == "float8_e4m3fn"


def test_scales_per_row_become_one_for_each_matrix(tmp_path, converted):
    original = weights()
    state, scales = float8(original, per_row=True)
    save_file(state | tagged(scales, False)[0], tmp_path / "self_forcing.safetensors", CAUSAL)
    out, _ = converted(tmp_path / "self_forcing.safetensors")
    assert load_file(out)[f"{Q}.weight_scale"].shape == ()
    plain = dequantised(load_checkpoint(out).state_dict, torch.float32)
    assert (plain[f"{Q}.weight"] - original[f"{Q}.weight"]).norm() < 0.06 * original[f"{Q}.weight"].norm()


@pytest.mark.parametrize("fp8", [False, True])
def test_dtype_is_that_of_all_that_is_not_float8(tmp_path, converted, fp8):
    state, scales = float8(weights())
    save_file(state | tagged(scales, False)[0], tmp_path / "self_forcing.safetensors", CAUSAL)
    out, _ = converted(tmp_path / "self_forcing.safetensors", "--dtype", "float16", *["--fp8"] * fp8)
    kinds = {name: tensor.dtype for name, tensor in load_file(out).items() if "comfy_quant" not in name}
    assert kinds.pop("head.head.weight") == torch.float16
    assert kinds.pop(f"{Q}.weight") == (torch.float8_e4m3fn if fp8 else torch.float16)
    assert (f"{Q}.weight_scale" in kinds) == fp8


def test_loras_are_merged_in_full_precision(tmp_path, converted):
    state = weights()
    torch.save({"generator": state}, tmp_path / "longlive_base.pt")
    torch.save(
        {f"{Q}.lora_A.weight": torch.ones(2, 128), f"{Q}.lora_B.weight": torch.ones(128, 2)}, tmp_path / "lora.pt"
    )
    path = tmp_path / "longlive_base.pt"
    out, report = converted(path, "--lora", f"{tmp_path}/lora.pt", "--lora-strength", "0.5")
    merged = load_file(out)
    assert torch.equal(merged[f"{Q}.weight"], state[f"{Q}.weight"] + 1)
    assert torch.equal(merged[f"{Q}.bias"], state[f"{Q}.bias"]) and "With lora.pt merged" in report["note"]
    small, _ = converted(path, "--lora", f"{tmp_path}/lora.pt", "--fp8", name="fp8.safetensors")
    plain = dequantised(load_checkpoint(small).state_dict, torch.float32)[f"{Q}.weight"]
    torch.testing.assert_close(plain, state[f"{Q}.weight"] + 2, rtol=2**-4, atol=0)


# --- Videos ----------------------------------------------------------------------------------------------------------


def test_frames_of_a_converted_file_are_the_same_to_the_bit(make, converted):  # noqa: F811
    _, before, _ = make(*MODEL, *TINY)
    out, _ = converted("self_forcing_dmd.pt", name="renamed.safetensors")
    _, after, said = make("--model", str(out), *MODEL[2:], *TINY, name="after/")
    assert torch.equal(before, after) and 'its metadata says "self-forcing"' in said


def test_frames_of_a_float8_file_are_close(make, converted):  # noqa: F811
    _, before, _ = make(*MODEL, *TINY)
    out, _ = converted("self_forcing_dmd.pt", "--fp8", name="fp8.safetensors")
    _, after, _ = make("--model", str(out), *MODEL[2:], *TINY, name="after/")
    assert not torch.equal(before, after) and (before - after).abs().mean() < 0.02


# --- Memory and files ------------------------------------------------------------------------------------------------

LARGE = WanConfig(dim=768, ffn_dim=3072, heads=6, layers=8)
MEASURE = """
import resource, sys
from sf_core.checkpoints import convert
from sf_core.cli.main import main
convert.PORTION = 2**24
assert main(["convert", sys.argv[1], "--out", sys.argv[1] + ".small.safetensors", *sys.argv[3:]]) == 0
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert main(["convert", sys.argv[2], "--out", sys.argv[2] + ".new.safetensors", *sys.argv[3:]]) == 0
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@needs_linux
@pytest.mark.parametrize(
    ("suffix", "options"), [("pt", []), ("safetensors", ["--fp8"]), ("pt", ["--dtype", "bfloat16"])]
)
def test_memory_does_not_grow_with_the_file(tmp_path, suffix, options):
    small, large = tmp_path / f"self_forcing_small.{suffix}", tmp_path / f"self_forcing_large.{suffix}"
    for path, config in ((small, SMALL), (large, LARGE)):
        state = weights(config)
        torch.save({"generator_ema": fsdp(state)}, path) if suffix == "pt" else save_file(state, path)
    del state
    command = [sys.executable, "-c", MEASURE, str(small), str(large), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    grown, size = int(done.stdout.splitlines()[-1]), large.stat().st_size
    assert size > 3e8 and grown < 0.25 * size, f"{grown / 2**20:.0f} MiB for a file of {size / 2**20:.0f}"


def test_nothing_is_ever_replaced(tmp_path, capsys):
    torch.save(weights(), tmp_path / "self_forcing.pt")
    save_file(weights(seed=1), tmp_path / "other.safetensors")
    before = (tmp_path / "other.safetensors").read_bytes()
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "self_forcing.pt")
    (tmp_path / "dangling.safetensors").symlink_to(tmp_path / "nothing")
    for name, message in [
        ("other.safetensors", "is there already"),
        ("link.safetensors", "would replace FILE"),
        ("dangling.safetensors", "is there already"),
        ("new.pt", "ending in .safetensors"),
        ("none/new.safetensors", "there is no folder"),
    ]:
        assert main(["convert", str(tmp_path / "self_forcing.pt"), "--out", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err, name
    assert (tmp_path / "other.safetensors").read_bytes() == before
    assert not list(tmp_path.glob("*.partial"))


def test_what_is_no_model_leaves_no_file(tmp_path, capsys):
    save_file({"decoder.conv1.weight": torch.ones(3)}, tmp_path / "vae.safetensors")
    assert main(["convert", str(tmp_path / "vae.safetensors"), "--out", str(tmp_path / "new.safetensors")]) == 2
    assert "is needed" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["vae.safetensors"]


def test_a_write_that_fails_leaves_nothing_behind(tmp_path):
    def write(partial):
        partial.write_bytes(b"half")
        raise OSError("No space left on device")

    with pytest.raises(OSError):
        write_atomically(tmp_path / "new.safetensors", write)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, capsys, monkeypatch):
    from sf_core.cli import convert as command

    torch.save(weights(), tmp_path / "self_forcing.pt")
    full = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(command.shutil, "disk_usage", lambda path: full)
    assert main(["convert", str(tmp_path / "self_forcing.pt"), "--out", str(tmp_path / "new.safetensors")]) == 2
    assert "has 0 MiB free" in capsys.readouterr().err and not (tmp_path / "new.safetensors").exists()
