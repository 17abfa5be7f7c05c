"""The command line: python -m sf_core generate | batch | info | doctor | convert | bench | train | evaluate.

A command is a module with `add_arguments(parser)` and `run(args)`; what run returns is printed. It is imported when it
is asked for, so a typing error is told at once. Every error is one line with its remedy, and exit status 2.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from io import TextIOWrapper
from typing import NoReturn

STOPPED = 130  # what shells report for ^C
LONGEST_WORD = 300  # letters of a file's name in an error


@dataclass(frozen=True)
class Command:
    module: str
    summary: str


COMMANDS = {
    "generate": Command(".generate", "make a video from a prompt"),
    "batch": Command(".batch", "make many videos, one for each line of a file; resumable, on several GPUs"),
    "info": Command(".info", "list built-in model, presets and devices, or say what a model file is"),
    "doctor": Command(".doctor", "say what runs here, which model files there are and what to expect: a bug report"),
    "convert": Command(".convert", "make a safetensors file that all loaders read of any causal checkpoint"),
    "bench": Command(".bench", "time rollout and decoders on this machine"),
    "train tiny": Command(".train_tiny", "train the built-in model"),
    "train": Command(".train", "train a model by a configuration: Self Forcing and its baselines"),
    "evaluate": Command(".evaluate", "score a checkpoint of the built-in model"),
}


class UsageError(ValueError):
    """A command line that cannot be followed."""


class Parser(argparse.ArgumentParser):
    """Tells what is wrong by an exception, and in one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. Run python -m {self.prog} --help to see what is possible.")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 2 after an error, 130 after ^C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names may have letters that a console has not
    try:
        report = _run(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        print("sf_core: stopped", file=sys.stderr)
        return STOPPED
    except (ValueError, OSError, MemoryError, ImportError) as error:
        print("sf_core: error:", _sentence(error), file=sys.stderr)
        return 2
    if report:
        print(report)
    return 0


def _run(argv: list[str]) -> str | None:
    if not argv or argv[0] in ("-h", "--help"):
        return _overview()
    name = next((name for name in COMMANDS if argv[: len(name.split())] == name.split()), None)
    if name is None:
        raise UsageError(f"Got the command {argv[0]!r}; there is {', '.join(COMMANDS)}. Try python -m sf_core --help.")
    command = import_module(COMMANDS[name].module, __package__)
    parser = Parser(prog=f"sf_core {name}", description=command.__doc__.splitlines()[0])
    command.add_arguments(parser)
    return command.run(parser.parse_args(argv[len(name.split()) :]))


def _sentence(error: Exception) -> str:
    """An error in one line; what the system says of a file, with what to do about it."""
    text = str(error)
    if isinstance(error, OSError) and error.errno and error.strerror and error.filename is not None:
        name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else str(error.filename)
        text = f"Got {name!r}, but: {error.strerror.lower()}. Name another file or folder, or mend that."
    return " ".join(word if len(word) <= LONGEST_WORD else f"{word[:LONGEST_WORD]}..." for word in text.split())


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: python -m sf_core COMMAND ...", "", *lines, "", "COMMAND --help tells more."])
