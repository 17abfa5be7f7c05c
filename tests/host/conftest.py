"""A real ComfyUI for the tests in this folder: $COMFYUI_PATH, the one this pack is installed in, or ~/ComfyUI.

The host comes first on sys.path (its nodes.py and our nodes/ share a name), runs on the CPU, and loads the pack the way
it loads any custom node: from a folder, under a name of its own choosing.
"""

import asyncio
import importlib.util
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def find_comfyui() -> Path | None:
    places = [os.environ.get("COMFYUI_PATH"), ROOT.parents[1], Path.home() / "ComfyUI"]
    return next((Path(p).resolve() for p in places if p and (Path(p) / "comfy" / "sd.py").is_file()), None)


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """The host's folder, importable. Skips where there is no host, or where this Python lacks what it needs."""
    path = find_comfyui()
    if path is None:
        pytest.skip("no ComfyUI found: set COMFYUI_PATH to its folder")
    sys.path.insert(0, str(path))
    try:
        import comfy.cli_args

        comfy.cli_args.args.cpu = True
        import comfy.sd
        import nodes  # noqa: F401
    except ImportError as error:
        pytest.skip(f"the ComfyUI at {path} does not run in this Python: {error}")
    return path


@pytest.fixture(scope="session")
def pack(comfyui):
    """The pack's module, under a name that a user's folder could have; `import_seconds` is the CPU time it took."""
    init = ROOT / "__init__.py"
    spec = importlib.util.spec_from_file_location("any_folder_name", init, submodule_search_locations=[str(ROOT)])
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    started = time.process_time()
    spec.loader.exec_module(module)
    module.import_seconds = time.process_time() - started
    return module


@pytest.fixture(scope="session")
def nodes(pack):
    """Node id -> class."""

    async def collect():
        return await (await pack.comfy_entrypoint()).get_node_list()

    return {node.GET_SCHEMA().node_id: node for node in asyncio.run(collect())}


@pytest.fixture(scope="session")
def call(nodes):
    """call("Sampler", ...) runs SelfForcingSampler and gives its outputs: one bare, several as a tuple."""

    def run(name: str, *args, **inputs):
        outputs = nodes[f"SelfForcing{name}"].execute(*args, **inputs).args
        return outputs[0] if len(outputs) == 1 else outputs

    return run


@pytest.fixture(scope="session")
def tiny(call):
    """The built-in model as the loader gives it: .model, .clip, .vae and .prompt, some conditioning."""
    with torch.inference_mode():
        model, clip, vae = call("LoadTiny")
        prompt = call("Prompt", clip, "a red circle moves right on a white background")
    return SimpleNamespace(model=model, clip=clip, vae=vae, prompt=prompt)


@pytest.fixture
def sample(call, tiny, latent):
    """sample(seed=1, ...) runs Self Forcing Sampler on the built-in model, on the `latent` of the file's own, and gives
    its latents [B, C, F, H, W].
    """

    def run(**changes) -> torch.Tensor:
        inputs = {
            "model": tiny.model, "positive": tiny.prompt, "latent": latent, "seed": 0, "preset": "auto",
            "steps": 0, "chunk": 0, "window": 0, "sink": -1, **changes,
        }  # fmt: skip
        return call("Sampler", **inputs)["samples"]

    return run


@pytest.fixture(autouse=True)
def inference_mode():
    """The host runs nodes in inference mode."""
    with torch.inference_mode():
        yield
