"""Self Forcing Report: what ComfyUI adds, broken files among the user's, and never the report of an earlier run."""

import json

import pytest
import torch

from tests.host.server import running
from tests.host.test_models import CAUSAL, folder, save, wan_weights  # noqa: F401  fixture


@pytest.fixture
def quick(pack, monkeypatch):
    """Without the parts that take seconds."""
    from any_folder_name.sf_core.cli import doctor

    monkeypatch.setattr(doctor, "measure_built_in", lambda: {"frames": 21})
    monkeypatch.setattr(doctor, "expectations", lambda files: {})


def test_report_tells_of_the_host_and_of_its_files(call, folder, quick):  # noqa: F811
    import comfyui_version

    save(folder, "self_forcing_dmd.pt", wan_weights())
    save(folder, "longlive.safetensors", wan_weights(torch.bfloat16), CAUSAL)
    (folder / "diffusion_models" / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    (folder / "vae" / "page.pt").write_text("<html>")
    report = json.loads(call("Report", "json"))
    assert report["ComfyUI"]["version"] == comfyui_version.__version__
    assert report["ComfyUI"]["frontend"][0].isdigit() and report["ComfyUI"]["attention"].startswith("attention")
    assert report["ComfyUI's memory"]["free_bytes"] > 0
    files = {file["file"].rpartition("/")[2]: file for file in report["files"]}
    assert {files[name]["family"] for name in ("self_forcing_dmd.pt", "longlive.safetensors")} == {
        "self-forcing",
        "longlive",
    }
    assert "damaged" in files["cut.safetensors"]["error"] or "truncated" in files["cut.safetensors"]["error"]
    assert "a web page" in files["page.pt"]["error"]
    text = call("Report", "text")
    assert text.startswith("Self Forcing report\n") and "a causal Wan model" in text


def test_a_part_of_the_host_that_fails_ends_nothing(call, quick, monkeypatch):
    import comfy.model_management as management

    def fail(*args, **kwargs):
        raise RuntimeError("no driver")

    monkeypatch.setattr(management, "get_total_memory", fail)
    report = json.loads(call("Report", "json"))
    assert report["ComfyUI's memory"] == {"error": "RuntimeError: no driver"} and "version" in report["ComfyUI"]


def test_the_same_graph_reports_anew_and_the_node_shows_it(comfyui, tmp_path):
    with running(comfyui, tmp_path) as server:
        prompt = {"1": {"class_type": "SelfForcingReport", "inputs": {"format": "text"}}}
        models, shown = tmp_path / "models" / "diffusion_models", []
        models.mkdir(parents=True, exist_ok=True)
        for name in ("first", "second"):
            (models / f"{name}.safetensors").write_text("<html>")
            entry = server.finished(server.queue(prompt))
            assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
            shown.append(entry["outputs"]["1"]["text"][0])
    assert "second.safetensors" not in shown[0] and "second.safetensors" in shown[1]
    assert "measured: frames per second" in shown[1] and "ERROR" not in shown[1]
    assert "error" not in shown[1].partition("built-in model")[2]
