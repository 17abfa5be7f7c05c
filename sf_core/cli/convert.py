"""Converts any causal checkpoint to one safetensors file that ComfyUI's own loaders and ours read alike.

    python -m sf_core convert self_forcing_dmd.pt --out self_forcing_dmd.safetensors --dtype bfloat16
    python -m sf_core convert longlive_base.pt --lora lora.pt --out longlive_fp8.safetensors --fp8

Weights stay as they are, to the bit, unless --dtype, --fp8 or --lora change them. The file is written as it is read, so
that memory does not grow with it, and appears when it is whole.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from ..checkpoints.convert import LICENCE, Conversion, write_checkpoint
from ..checkpoints.load import describe
from ..checkpoints.tensorfiles import read_header
from ..memory import format_bytes
from ..sampling.families import FAMILIES
from ..training.run_folder import write_atomically
from ..video import check_folder, check_outputs
from .arguments import DTYPES, add_loras, read_loras


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="checkpoint: file, index of shards, or folder; see docs/files.md")
    add("--out", type=Path, required=True, metavar="FILE", help="output, a name that ends in .safetensors")
    add("--fp8", action="store_true", help="float8 matrices of the blocks, with a scale each, as ComfyUI has them")
    add("--dtype", choices=DTYPES, help="dtype of the other weights (as they are)")
    add_loras(parser)
    add("--family", metavar="NAME", help=f"family, how it is sampled (guessed): {', '.join(FAMILIES)}")
    add("--json", action="store_true", help="report of what was written as JSON")


def run(args: argparse.Namespace) -> str:
    loras = read_loras(args)
    _check_files(args)
    conversion = Conversion(args.file, args.family, loras, args.fp8, DTYPES.get(args.dtype))
    about = conversion.describe()
    _check_room(args.out, conversion)
    write_atomically(args.out, lambda partial: write_checkpoint(partial, conversion))
    written, metadata = describe(args.out), read_header(args.out).metadata
    report = {
        "out": str(args.out),
        "from": about.source,
        "bytes": written.file_bytes,
        "tensors": written.tensors,
        "dtype": str(written.dtype).removeprefix("torch."),
        "causal": written.causal,
        "family": written.family,
        "licence": metadata.get(LICENCE),
        "note": about.note,
    }
    return json.dumps(report, indent=2) if args.json else _sentence(report)


def _check_files(args: argparse.Namespace) -> None:
    """Refuses an output that cannot be written, or would replace anything."""
    if args.out.suffix.lower() != ".safetensors":
        raise ValueError(
            f"Got --out {str(args.out)!r}; a safetensors file is written. Use a name ending in .safetensors."
        )
    inputs = {"FILE": args.file} | {f"--lora {i}": path for i, path in enumerate(args.lora or [], 1)}
    check_outputs({"--out": args.out}, inputs)
    if args.out.exists() or args.out.is_symlink():
        raise FileExistsError(
            f"Got --out {str(args.out)!r}, which is there already. Choose another name, or remove it."
        )
    check_folder(args.out)


def _check_room(out: Path, conversion: Conversion) -> None:
    needed, free = sum(tensor.nbytes for tensor in conversion.shapes().values()), shutil.disk_usage(out.parent).free
    if needed > free:
        raise OSError(
            f"Got {format_bytes(needed)} to write to {str(out.parent)!r}, which has {format_bytes(free)} free. Make "
            "room, use another disk, or --fp8 or --dtype for a smaller file."
        )


def _sentence(report: dict) -> str:
    licence = f", licence {report['licence']}" if report["licence"] else ""
    return (
        f"{report['out']}: {format_bytes(report['bytes'])}, {report['tensors']} tensors in {report['dtype']}, sampled "
        f"as {report['family']}{licence}\n  from {report['from']}. {report['note']}"
    )
