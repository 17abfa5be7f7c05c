"""The report: everything in it, nothing of the user in it, and nothing that ends it."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sf_core import device
from sf_core.cli import doctor
from sf_core.cli.main import main
from tests.core.test_checkpoint import CAUSAL, float8, shard, tagged, weights
from tests.core.test_cli_models import taehv_state

CPU = torch.device("cpu")


@pytest.fixture
def quick(monkeypatch):
    """Without the parts that take seconds."""
    monkeypatch.setattr(doctor, "measure_built_in", lambda: {"frames": 21})
    monkeypatch.setattr(doctor, "expectations", lambda files: {})


@pytest.fixture
def models(tmp_path):
    """A models folder in which half of the files are broken."""
    folder = tmp_path / "models"
    for name in ("diffusion_models/shards", "vae_approx", "loras"):
        (folder / name).mkdir(parents=True)
    at = folder / "diffusion_models"
    torch.save({"generator_ema": weights()}, at / "self_forcing_dmd.pt")
    state, scales = float8({name: tensor.bfloat16() for name, tensor in weights().items()})
    save_file(state | tagged(scales, False)[0], at / "longlive_fp8.safetensors", CAUSAL)
    save_file(weights(), at / "wan.safetensors")
    shard(weights(), at / "shards")
    save_file(taehv_state(), folder / "vae_approx" / "taew2_1.safetensors")
    save_file({"x.lora_A.weight": torch.ones(2, 2)}, folder / "loras" / "style.safetensors")
    whole = (at / "wan.safetensors").read_bytes()
    (at / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (at / "cut.pt").write_bytes((at / "self_forcing_dmd.pt").read_bytes()[:5000])
    (at / "noise.ckpt").write_bytes(bytes(range(256)) * 9)
    (at / "page.safetensors").write_text("<html>")
    (at / "empty.bin").touch()
    (at / "model.gguf").write_bytes(b"GGUF" + bytes(40))
    (at / "dangling.safetensors").symlink_to(at / "nothing")
    part = {name: tensor for name, tensor in weights().items() if "blocks.1" not in name}
    save_file(part | {"img_emb.proj.0.weight": torch.ones(3)}, at / "i2v.safetensors")
    return folder


def reported(capsys, *argv) -> dict:
    assert main(["doctor", "--json", *map(str, argv)]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_file_is_told_whole_or_broken(models, quick, capsys):
    files = {Path(file["file"]).name: file for file in reported(capsys, models)["files"]}
    assert len(files) == 14 and "model-00002-of-00003.safetensors" not in files
    ours = files["self_forcing_dmd.pt"]
    assert (ours["kind"], ours["family"], ours["dtype"]) == ("a causal Wan model", "self-forcing", "float32")
    assert ours["size_bytes"] == (models / "diffusion_models" / "self_forcing_dmd.pt").stat().st_size
    assert (files["longlive_fp8.safetensors"]["family"], files["longlive_fp8.safetensors"]["dtype"]) == (
        "longlive",
        "float8_e4m3fn",
    )
    assert files["wan.safetensors"]["kind"] == "a Wan model that nothing calls causal"
    assert files["model-00001-of-00003.safetensors"]["parameters"] == ours["parameters"]
    assert files["taew2_1.safetensors"]["kind"] == "a TAEHV"
    assert (files["style.safetensors"]["kind"], files["style.safetensors"]["folder"]) == ("a LoRA", "models/loras")
    assert "image-to-video" in files["i2v.safetensors"]["not usable"]
    broken = {
        "cut.safetensors": "truncated", "cut.pt": "truncated", "noise.ckpt": "another kind",
        "page.safetensors": "a web", "empty.bin": "empty", "model.gguf": "GGUF",
        "dangling.safetensors": "does not exist",
    }  # fmt: skip
    for name, why in broken.items():
        assert why in files[name]["error"], name


def test_text_has_all_that_json_has(models, quick, capsys):
    report = reported(capsys, models)
    text = doctor.as_text(report)
    for name in report:
        assert f"\n{name}\n" in text
    for file in report["files"]:
        (line,) = [line for line in text.splitlines() if line.startswith(f"  {file['file']}: ")]
        assert all(str(file.get(name, "")) in line for name in ("kind", "family", "error", "note", "not usable"))
    assert report["versions"]["torch"] in text and sys.version.split()[0] in text


def test_headers_alone_are_read(tmp_path, quick, capsys):
    """A file of 40 GB, nearly all of it a hole, takes no time."""
    header = {"blocks.0.x": {"dtype": "F32", "shape": [10**10], "data_offsets": [0, 4 * 10**10]}}
    text = json.dumps(header).encode()
    with (tmp_path / "huge.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 4 * 10**10)
    began = time.monotonic()
    (found,) = doctor.files_in([tmp_path])
    assert found["size_bytes"] > 4 * 10**10 and time.monotonic() - began < 5


@pytest.mark.parametrize("part", ["versions", "devices", "attention", "compiling", "files_in", "expectations"])
def test_a_part_that_fails_becomes_a_line(part, quick, monkeypatch, capsys):
    def fail(*args):
        raise RuntimeError("driver too old\nfor this")

    monkeypatch.setattr(doctor, part, fail)
    report = reported(capsys)
    failed = {name for name, value in report.items() if value == {"error": "RuntimeError: driver too old for this"}}
    assert failed == {{"compiling": "compile", "files_in": "files", "expectations": "expect"}.get(part, part)}
    assert "driver too old for this" in doctor.as_text(report)


def test_a_package_that_cannot_be_imported_ends_nothing(monkeypatch, capsys):
    for name in ("torch", "av", "safetensors"):
        monkeypatch.setitem(sys.modules, name, None)  # imports of it fail
    report = doctor.make_report([Path()])
    assert "torch" in report["devices"]["error"] and report["versions"]["python"]
    doctor.as_text(report)


def test_a_folder_that_is_not_there_is_a_line(tmp_path, quick, capsys):
    (line,) = reported(capsys, tmp_path / "none")["files"]
    assert line["error"] == "there is no such folder"


def test_no_user_is_named(monkeypatch):
    monkeypatch.setenv("HOME", "/srv/people/anna")
    told = {
        "a": "/srv/people/anna/ComfyUI/models/x.pt", "b": ["/home/bert/x", "C:\\Users\\Carla\\x.pt: broken"],
        "c": {"d": "Got /Users/dora/m.pt, but", "n": 3}, "e": "/srv/people/annabel/x", "f": "/home/bert",
    }  # fmt: skip
    assert doctor.without_names(told) == {
        "a": "~/ComfyUI/models/x.pt", "b": ["~/x", "~\\x.pt: broken"],
        "c": {"d": "Got ~/m.pt, but", "n": 3}, "e": "/srv/people/annabel/x", "f": "~",
    }  # fmt: skip


def test_more_files_than_a_report_holds_are_counted_off(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "MOST_FILES", 3)
    for i in range(5):
        save_file({"x": torch.ones(1)}, tmp_path / f"{i}.safetensors")
    *files, last = doctor.files_in([tmp_path])
    assert len(files) == 3 and "more files than are looked at (3)" in last["error"]


def test_speeds_say_whether_they_were_measured(models, capsys):
    report = reported(capsys, models)
    speeds = [(name, value) for _, value in report["expect"].items() if isinstance(value, dict) for name in value]
    assert report["expect"]["model"].endswith((".pt", ".safetensors")) and len(speeds) > 6
    found = json.dumps(report["expect"])
    assert found.count("computed: frames per second at most") == 3 == len(doctor.SIZES)
    assert report["built-in model"]["measured: frames per second"] > 0
    large, small = (report["expect"][size] for size in ("832 x 480", "416 x 240"))
    assert large["vae_bytes"] > small["vae_bytes"] > small["taehv_bytes"]


def test_a_container_has_what_its_limit_says(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "CGROUP", tmp_path)
    whole, free = device.available_memory(CPU), device.free_memory(CPU)
    (tmp_path / "memory.max").write_text("max\n")
    assert device.available_memory(CPU) == whole
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    assert (device.available_memory(CPU), device.free_memory(CPU)) == (1_000_000, 600_000)
    (tmp_path / "memory.max").unlink()
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text(f"{2**63 - 4096}\n")  # version 1: no limit
    assert device.available_memory(CPU) == whole and free <= whole
