"""A video at full size with random weights, from files in the real formats: does it run, and is the memory as planned?

    python benchmarks/full_size.py [--folder /tmp] [--steps 4] [-- --fp8 ...]

Makes self_forcing_dmd.pt (1.3B, float32), umt5_xxl_fp8_e4m3fn_scaled.safetensors and wan_2.1_vae.safetensors of random
numbers in a folder of its own (12.7 GB), runs `generate` on them in another process, and removes them. That process
is watched: its most memory while it loads and reads the prompt, and while it makes the video, each beside the plan's.
What stands after -- is handed to `generate`. Linux only. On a CPU of two cores it takes a quarter of an hour.
"""

import argparse
import re
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sf_core.autoencoders.wan_vae import WanVAE
from sf_core.checkpoints.convert import write_safetensors
from sf_core.cli.main import Parser
from sf_core.memory import format_bytes
from sf_core.pipeline import TEXT_ENCODER_WORK
from sf_core.text_encoder import bytes_loaded
from sf_core.wan.config import WAN_1_3B
from sf_core.wan.model import WanModel

ROOT = Path(__file__).resolve().parents[1]
E4M3 = torch.float8_e4m3fn
MODEL, TEXT, VAE = "self_forcing_dmd.pt", "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "wan_2.1_vae.safetensors"
ROWS, PIECES, WIDTH, FFN, HEADS, BLOCKS = 256384, 256300, 4096, 10240, 64, 24  # UMT5-XXL
POOL = torch.randn(2**22 + 7, generator=torch.Generator().manual_seed(0))
PROMPT = "a fox runs through fresh snow at dawn"


def random(shape: tuple[int, ...], std: float = 0.02) -> Tensor:
    """Random numbers, those of the pool over and over: drawing billions takes longer than writing them."""
    count = torch.Size(shape).numel()
    return POOL.repeat(count // len(POOL) + 1)[:count].reshape(shape) * std


# --- Files -----------------------------------------------------------------------------------------------------------


def write_model(path: Path) -> None:
    state = WanModel(WAN_1_3B, device="meta").state_dict()
    torch.save({"generator_ema": {f"model.{name}": random(tensor.shape) for name, tensor in state.items()}}, path)


def write_autoencoder(path: Path) -> None:
    with torch.device("meta"):
        state = WanVAE().state_dict()
    weights = {name: random(w.shape, max(1, w[0].numel()) ** -0.5 if w.ndim > 1 else 0.1) for name, w in state.items()}
    save_file({name: weight.bfloat16() for name, weight in weights.items()}, path)


def text_shapes() -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """(shape, dtype) of each tensor of ComfyUI's file."""
    half, shapes = torch.float16, {"shared.weight": ((ROWS, WIDTH), torch.float16)}
    for i in range(BLOCKS):
        attention, feed = f"encoder.block.{i}.layer.0.", f"encoder.block.{i}.layer.1."
        layers = {f"{attention}SelfAttention.{name}": (WIDTH, WIDTH) for name in "qkvo"}
        layers |= {f"{feed}DenseReluDense.wi_{j}": (FFN, WIDTH) for j in range(2)}
        layers[f"{feed}DenseReluDense.wo"] = (WIDTH, FFN)
        for name, shape in layers.items():
            shapes[f"{name}.weight"] = (shape, E4M3)
            shapes[f"{name}.scale_weight"] = ((), torch.float32)
        shapes[f"{attention}SelfAttention.relative_attention_bias.weight"] = ((32, HEADS), half)
        shapes |= {f"{part}layer_norm.weight": ((WIDTH,), half) for part in (attention, feed)}
    return shapes | {"encoder.final_layer_norm.weight": ((WIDTH,), half), "scaled_fp8": ((0,), E4M3)}


def write_text_encoder(path: Path) -> None:
    shapes, spiece = text_shapes(), tokenizer()
    metas = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in shapes.items()}
    metas["spiece_model"] = spiece.to("meta")

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, (shape, dtype) in shapes.items():
            if name.endswith("scale_weight"):
                yield name, torch.tensor(1e-4)
            else:
                yield name, random(shape, 100 if dtype is E4M3 else 1).to(dtype)
        yield "spiece_model", spiece

    write_safetensors(path, metas, tensors(), {"format": "pt"})


def entry(piece: bytes, kind: int) -> bytes:
    """A piece of a sentencepiece model."""
    message = b"\x0a" + bytes([len(piece)]) + piece + b"\x15" + struct.pack("<f", -10.0) + bytes([0x18, kind])
    return b"\x0a" + bytes([len(message)]) + message


def tokenizer() -> Tensor:
    """A sentencepiece model of UMT5's size, as bytes: letters, and pieces that no text has (protobuf's wire format)."""
    letters = [chr(code) for code in range(33, 127)] + ["\u2581"]
    pieces = [("<pad>", 3), ("</s>", 3), ("<unk>", 2), *((letter, 1) for letter in letters)]
    pieces += [(f"\u2581\u2581{i}", 1) for i in range(PIECES - len(pieces))]
    model = b"".join(entry(piece.encode(), kind) for piece, kind in pieces)
    # trainer_spec: unigram, unk 2, no bos, eos 1, pad 0
    spec = b"\x18\x01" + b"\xc0\x02\x02" + b"\xc8\x02" + b"\xff" * 9 + b"\x01" + b"\xd0\x02\x01" + b"\xd8\x02\x00"
    return torch.frombuffer(bytearray(model + b"\x12" + bytes([len(spec)]) + spec), dtype=torch.uint8)


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


# --- The run ---------------------------------------------------------------------------------------------------------


class Watch:
    """The most memory of a process, before and after it shows its progress bar."""

    def __init__(self, command: list[str]) -> None:
        self.peaks = {"loading and prompt": (0, 0), "video": (0, 0)}  # stage: (bytes, those of mapped files)
        self.stage, self.said = "loading and prompt", ""
        began = time.monotonic()
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        sampler = threading.Thread(target=self._sample)
        sampler.start()
        while piece := self.process.stderr.read(1):
            self.said += piece
            if self.said.endswith("frames/s]") or self.said.endswith("? frames/s"):
                self.stage = "video"
        self.printed, self.status = self.process.stdout.read(), self.process.wait()
        self.seconds = time.monotonic() - began
        sampler.join()

    def _sample(self) -> None:
        while self.process.poll() is None:
            try:
                status = Path(f"/proc/{self.process.pid}/status").read_text()
            except OSError:
                return
            found = {name: 1024 * int(size) for name, size in re.findall(r"^(VmRSS|RssFile):\s+(\d+) kB", status, re.M)}
            if found:
                self.peaks[self.stage] = max(self.peaks[self.stage], (found["VmRSS"], found["RssFile"]))
            time.sleep(0.1)


def baseline() -> int:
    """Bytes of a process that has imported what `generate` imports and computed something."""
    work = "import sf_core.cli.generate, transformers, sentencepiece, torch; torch.ones(64, 64) @ torch.ones(64, 64)"
    end = "; print(open('/proc/self/status').read())"
    done = subprocess.run([sys.executable, "-c", work + end], cwd=ROOT, capture_output=True, text=True, check=True)
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", done.stdout)[1])


def planned(options: list[str]) -> dict[str, int]:
    """The plan's bytes for each stage, without the process itself."""
    from sf_core.cli import generate

    parser = Parser()
    generate.add_arguments(parser)
    args = parser.parse_args(options)
    pipeline = generate.read_pipeline(args)
    video = pipeline.memory_plan(generate.read_request(args, pipeline))
    decoder = pipeline.decoder_memory.weights * pipeline.runtime.dtype.itemsize
    return {"loading and prompt": bytes_loaded(args.text_encoder) + TEXT_ENCODER_WORK + decoder, "video": video.total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default=None, help="where the files are made for the time (the system's)")
    parser.add_argument("--frames", default="9", help="pixel frames (9)")
    parser.add_argument("--steps", default="4", help="steps (4)")
    parser.add_argument("options", nargs="*", help="more options of generate, after --")
    args = parser.parse_args()
    extra = args.options or ["--tile", "256"]
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        began = time.monotonic()
        write_text_encoder(Path(folder, TEXT))
        write_autoencoder(Path(folder, VAE))
        write_model(Path(folder, MODEL))
        sizes = {path.name: path.stat().st_size for path in sorted(Path(folder).iterdir())}
        made = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in sizes.items())
        say(f"{made}: made in {time.monotonic() - began:.0f} s")
        files = ["--model", f"{folder}/{MODEL}", "--text-encoder", f"{folder}/{TEXT}", "--vae", f"{folder}/{VAE}"]
        counts = ["--frames", args.frames, "--steps", args.steps, "--json"]
        options = [PROMPT, "--out", f"{folder}/video.mp4", *files, *counts, *extra]
        process, plans = baseline(), planned(options)
        watch = Watch([sys.executable, "-m", "sf_core", "generate", *options])
        say(watch.said if watch.status else watch.printed)
        say(f"status {watch.status}, {watch.seconds:.0f} s; the process alone {format_bytes(process)}")
        for stage, plan in plans.items():
            peak, mapped = watch.peaks[stage]
            off = 100 * (peak / (plan + process) - 1)
            total = f"{format_bytes(plan)} + {format_bytes(process)}"
            say(f"{stage}: planned {total}, peak {format_bytes(peak)} ({format_bytes(mapped)} mapped), {off:+.1f} %")
    sys.exit(watch.status)


if __name__ == "__main__":
    main()
