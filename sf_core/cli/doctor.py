"""Says what runs here: versions, devices, attention, compiling, model files, and what size, window and speed to expect.

    python -m sf_core doctor ~/ComfyUI/models
    python -m sf_core doctor --json

One paste into a bug report. A part that fails becomes a line that says so, and the others go on; that is why modules
are imported where they are used, torch among them. Paths lose the user's name.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from .. import __version__

PACK = Path(__file__).resolve().parents[2]
PACKAGES = (
    "torch", "numpy", "einops", "safetensors", "av", "imageio", "Pillow", "tqdm", "transformers", "tokenizers",
    "sentencepiece", "triton", "flash-attn", "flash-attn-3", "sageattention", "comfyui-frontend-package",
)  # fmt: skip
MOST_FILES, MOST_SECONDS = 400, 20.0  # that are spent on files
SIZES = ((832, 480), (640, 368), (416, 240))  # pixels
MEASURED_FRAMES = 21
HOMES = re.compile(r"(?:/home|/Users|[A-Za-z]:[/\\]+Users)[/\\]+[^/\\\s:\"',;]+")

Part = Callable[[], object]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, nargs="*", help="folders with model files (ComfyUI's, and this one)")
    parser.add_argument("--json", action="store_true", help="report as JSON")


def run(args: argparse.Namespace) -> str:
    report = make_report(args.folder or usual_folders())
    return json.dumps(report, indent=2) if args.json else as_text(report)


def make_report(folders: Sequence[Path], host: Mapping[str, Part] | None = None) -> dict:
    """{part: what there is to say of it}, of plain values; {"error": why} in the place of what failed.

    `host` has parts of its own, such as ComfyUI's, which come before the files.
    """
    parts: dict[str, Part] = {
        "versions": versions,
        "devices": devices,
        "attention": attention,
        "compile": compiling,
        **(host or {}),
    }
    report = {name: tried(part) for name, part in parts.items()}
    files = tried(lambda: list(files_in(folders)))
    report["files"] = files
    report["expect"] = tried(lambda: expectations(files if isinstance(files, list) else []))
    report["built-in model"] = tried(measure_built_in)
    return without_names(report)


def tried(part: Part) -> object:
    """What a part has to say, or why it has not."""
    try:
        return part()
    except (Exception, SystemExit) as error:  # noqa: BLE001  a report that fails is none
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def without_names(value: object) -> object:
    """The same without the names of users: home folders become ~."""
    if isinstance(value, dict):
        return {name: without_names(part) for name, part in value.items()}
    if isinstance(value, list):
        return [without_names(part) for part in value]
    if not isinstance(value, str):
        return value
    home = os.path.expanduser("~")
    if len(home) > 1:
        value = re.sub(re.escape(home) + r"(?=$|[^\w.-])", "~", value)
    return HOMES.sub("~", value)


# --- The machine -----------------------------------------------------------------------------------------------------


def versions() -> dict:
    found = {"self forcing": __version__, "python": platform.python_version(), "system": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found | {"pack": str(PACK), "python at": sys.executable}


def devices() -> dict:
    import torch

    from ..device import available_memory, default_device, default_dtype, free_memory

    cpu, used = torch.device("cpu"), default_device()
    found = {
        "used": str(used),
        "dtype": str(default_dtype(used)).removeprefix("torch."),
        "cuda of torch": torch.version.cuda or torch.version.hip or "none",
        "cpu": {
            "name": _cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "total_bytes": available_memory(cpu),
            "free_bytes": free_memory(cpu),
        },
    }
    for index in range(torch.cuda.device_count()):
        found[f"cuda:{index}"] = tried(lambda index=index: _gpu(index))
    if torch.backends.mps.is_available():
        found["mps"] = {"name": "Apple GPU"}
    return found


def _gpu(index: int) -> dict:
    import torch

    from ..device import free_memory
    from ..wan.fp8 import multiplies_float8

    device, about = torch.device("cuda", index), torch.cuda.get_device_properties(index)
    return {
        "name": about.name,
        "capability": f"{about.major}.{about.minor}",
        "total_bytes": about.total_memory,
        "free_bytes": free_memory(device),
        "float8 units": multiplies_float8(device),
    }


def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def attention() -> dict:
    """Kernels by the names that --attention takes: whether they can be had here, and which one is taken."""
    import torch

    from ..device import default_device
    from ..wan.attention import KERNELS, attention_kernel

    device, found = default_device(), {}
    for name in KERNELS:
        problem = tried(lambda name=name: attention_kernel(name, device, torch.bfloat16) and None)
        found[name] = "yes" if problem is None else problem["error"].partition(": ")[2]
    return {"taken": "sdpa, unless --attention says otherwise", "sdpa uses": _sdpa_kernel(device.type), **found}


def _sdpa_kernel(kind: str) -> str:
    import torch

    if kind != "cuda":
        return "plain matrix products for bfloat16, torch's fused kernel for float32" if kind == "cpu" else kind
    cuda, q = torch.backends.cuda, torch.empty(1, 12, 128, 128, device="cuda", dtype=torch.bfloat16)
    params = cuda.SDPAParams(q, q, q, None, 0.0, False, False)
    able = {
        "flash": cuda.flash_sdp_enabled() and cuda.can_use_flash_attention(params),
        "cudnn": cuda.cudnn_sdp_enabled() and cuda.can_use_cudnn_attention(params),
        "memory-efficient": cuda.mem_efficient_sdp_enabled() and cuda.can_use_efficient_attention(params),
    }
    return next((name for name in able if able[name]), "plain products") + f" (able: {able})"


def compiling() -> dict:
    """Whether torch.compile has what it needs: Triton on a GPU, a C++ compiler on a CPU."""
    import torch

    triton = importlib.util.find_spec("triton") is not None
    names = [os.environ.get("CXX"), "g++", "clang++", "cl"]
    compiler = next((found for name in names if name and (found := shutil.which(name))), None)
    works = triton if torch.cuda.is_available() else compiler is not None
    return {"works": works, "triton": triton, "compiler": compiler or "none found"}


# --- Files -----------------------------------------------------------------------------------------------------------


def usual_folders() -> list[Path]:
    """Where this pack lies in a ComfyUI, its models; and the working directory."""
    models = PACK.parents[1] / "models"
    return [*([models] if PACK.parent.name == "custom_nodes" and models.is_dir() else []), Path()]


def files_in(folders: Sequence[Path]) -> Iterator[dict]:
    """What the model files in folders are, by their headers."""
    from ..checkpoints.tensorfiles import SHARD, SUFFIXES

    until, count = time.monotonic() + MOST_SECONDS, 0
    for folder in folders:
        if not folder.is_dir():
            yield {"file": str(folder), "error": "there is no such folder"}
        for path in walk(folder, deep=folder != Path(), suffixes=(*SUFFIXES, ".gguf")):
            shard = SHARD.fullmatch(path.name)
            if shard and not re.search("-0*1-of-", path.name):
                continue
            if count >= MOST_FILES or time.monotonic() > until:
                yield {"file": str(folder), "error": f"more files than are looked at ({count}); name a smaller folder"}
                return
            count += 1
            told = tried(lambda path=path: about_file(path))
            yield {"file": str(path), **(told if "error" not in told else {**_size_of(path), **told})}


def walk(folder: Path, deep: bool, suffixes: Sequence[str]) -> Iterator[Path]:
    """Files with these suffixes, in order; folders that cannot be read are passed over."""
    for at, inner, names in os.walk(folder):
        inner.sort()
        yield from (Path(at) / name for name in sorted(names) if name.lower().endswith(tuple(suffixes)))
        if not deep:
            return


def _size_of(path: Path) -> dict:
    try:
        return {"size_bytes": path.stat().st_size}
    except OSError:
        return {}


def about_file(path: Path) -> dict:
    """What a file is. Raises as `read_header` does."""
    from ..checkpoints.identify import WAN, identify_tensors
    from ..checkpoints.load import describe
    from ..checkpoints.tensorfiles import read_header

    file = read_header(path)
    sizes: dict[str, int] = {}
    for tensor in file.tensors.values():
        kind = str(tensor.dtype).removeprefix("torch.")
        sizes[kind] = sizes.get(kind, 0) + tensor.nbytes
    what, folder = identify_tensors(file.tensors) or ("tensors of no model known here", None)
    told = {"kind": what, "dtype": max(sizes, key=sizes.get, default="none"), "size_bytes": file.nbytes}
    if what != WAN:
        return told | ({"folder": folder} if folder else {})
    about = tried(lambda: describe(path))
    if isinstance(about, dict):
        return {**told, "not usable": about["error"].partition(": ")[2]}
    config = {"layers": about.config.layers, "dim": about.config.dim, "parameters": about.parameters}
    kind = "a causal Wan model" if about.causal else "a Wan model that nothing calls causal"
    dtype = str(about.dtype).removeprefix("torch.")
    return {**told, "kind": kind, "dtype": dtype, "family": about.family, **config, "note": about.note}


# --- What to expect --------------------------------------------------------------------------------------------------


def expectations(files: Sequence[dict]) -> dict:
    """Memory and speed of 81 frames of each size, for the largest model that was found or else for one of 1.3B."""
    from ..checkpoints.load import describe
    from ..sampling.families import DEFAULT, FAMILIES
    from ..wan.config import WAN_1_3B

    models = [file for file in files if "family" in file]
    path = max(models, key=lambda file: file["parameters"])["file"] if models else None
    about = tried(lambda: describe(path)) if path else None
    if about is None or isinstance(about, dict):
        path, config, sampling, parameters = None, WAN_1_3B, FAMILIES[DEFAULT].sampling, 1_419_000_000
    else:
        config, sampling, parameters = about.config, about.sampling, about.parameters
    return {"model": path or "none found; figures are of a 1.3B model", **_expect(config, sampling, parameters)}


def _expect(config, sampling, parameters: int) -> dict:
    from ..device import default_device, default_dtype, free_memory
    from .bench import Job, matmul_peak, plan_of

    device = default_device()
    dtype, free = default_dtype(device), free_memory(device)
    sizes = (1024,) if device.type == "cpu" else (4096,)
    peak = matmul_peak(device, dtype, sizes, repeats=3)
    videos = {}
    for width, height in SIZES:
        plan = plan_of(21, width, height, sampling)
        job = Job(config, plan, device, dtype)
        bound = job.pixel_frames * peak / job.flops()
        fits = _fits(config, plan, parameters, dtype, free)
        videos[f"{width} x {height}"] = {**fits, "computed: frames per second at most": round(bound, 3)}
    return {
        "device": str(device),
        "free_bytes": free,
        "measured: TFLOP/s of a matrix product": round(peak / 1e12, 3),
        "dtype": str(dtype).removeprefix("torch."),
        **videos,
    }


def _fits(config, plan, parameters: int, dtype, free: int | None) -> dict:
    """What a video takes with each decoder, the longest window that has room, and what would mend the lack of it."""
    from dataclasses import replace

    from ..memory import TAEHV, WAN_VAE, MemoryPlan, advise

    vae = MemoryPlan(config, plan, dtype, parameters * dtype.itemsize, decoder=WAN_VAE)
    taehv = replace(vae, decoder=TAEHV)
    told = {
        "window": plan.window,
        "vae_bytes": vae.total,
        "vae in tiles_bytes": replace(vae, tile=WAN_VAE.tile).total,
        "taehv_bytes": taehv.total,
        "taehv, --fp8 --fp8-cache_bytes": replace(taehv, fp8=True).with_fp8_cache().total,
    }
    if free is None:
        return told
    room = "fits" if vae.total <= free else advise(vae, free)
    return told | {"longest window, taehv": taehv.longest_window(free) or "none fits", "room": room}


def measure_built_in() -> dict:
    """A short video by the built-in model: whether a video can be made here at all."""
    from ..pipeline import TinyPipeline

    pipeline = TinyPipeline()
    list(pipeline("a red circle moves right", frames=1))  # warms up
    began = time.perf_counter()
    made = sum(len(piece) for piece in pipeline("a red circle moves right", frames=MEASURED_FRAMES))
    seconds = time.perf_counter() - began
    return {"frames": made, "size": "64 x 64", "measured: frames per second": round(made / seconds, 1)}


# --- Text ------------------------------------------------------------------------------------------------------------


def as_text(report: dict) -> str:
    """A report for people."""
    lines = ["Self Forcing report"]
    for name, part in report.items():
        lines += ["", name, *_lines(part, "  ")]
    return "\n".join(lines)


def _lines(value: object, indent: str) -> Iterator[str]:
    if isinstance(value, list):
        for entry in value:
            title, *rest = entry.items()
            yield f"{indent}{_said(*title)}: {', '.join(_short(name, said) for name, said in rest)}"
        if not value:
            yield f"{indent}none found"
    elif isinstance(value, dict):
        plain = {name: part for name, part in value.items() if not isinstance(part, dict)}
        width = max((len(_label(name)) for name in plain), default=0)
        for name, part in value.items():
            if isinstance(part, dict):
                yield f"{indent}{name}"
                yield from _lines(part, indent + "  ")
            else:
                yield f"{indent}{_label(name):{width}}  {_said(name, part)}"
    else:
        yield f"{indent}{value}"


def _label(name: str) -> str:
    return name.removesuffix("_bytes")


def _short(name: str, value: object) -> str:
    """A fact of a file: those that speak for themselves without their names."""
    said = _said(name, value)
    return said if name in ("kind", "family", "dtype", "size_bytes", "note") else f"{_label(name)} {said}"


def _said(name: str, value: object) -> str:
    if name.endswith("bytes") and isinstance(value, int):
        return f"{value / 2**30:.1f} GiB" if value >= 2**29 else f"{value / 2**20:.1f} MiB"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "not known"}[value]
    return str(value)
