"""Runs cases of a kind and tells a refusal of ours from anything else."""

import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.fuzz.files import files
from tests.fuzz.media import media
from tests.fuzz.prompts import prompts

Case = Callable[[Random], object]
KINDS: dict[str, Callable[[Path], Case]] = {"files": files, "media": media, "prompts": prompts}
SECONDS = 10  # that a case may take


@dataclass(frozen=True)
class Failure:
    """A case that neither succeeded nor was refused in a sentence of ours."""

    seed: int
    text: str


@dataclass
class Result:
    taken: int = 0
    refused: int = 0
    slowest: tuple[float, int] = (0.0, 0)  # seconds, seed
    failures: list[Failure] = field(default_factory=list)


class TooSlow(BaseException):
    """No Exception, so that nothing that is tested catches it."""


def run(
    kind: Callable[[Path], Case],
    count: int,
    seed: int,
    folder: Path,
    on_failure: Callable[[Failure], object] | None = None,
) -> Result:
    """Cases with the seeds seed, seed + 1, ..., in a folder of their own; `on_failure` is told of each at once."""
    case, result = kind(folder), Result()
    for number in range(seed, seed + count):
        started = time.monotonic()
        try:
            with time_limit(SECONDS), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                case(Random(number))
            result.taken += 1
        except (Exception, TooSlow) as error:  # noqa: BLE001  that is the question
            if is_ours(error):
                result.refused += 1
            else:
                result.failures.append(Failure(number, "".join(traceback.format_exception(error))))
                if on_failure:
                    on_failure(result.failures[-1])
        result.slowest = max(result.slowest, (time.monotonic() - started, number))
    return result


def is_ours(error: BaseException) -> bool:
    """Whether an error says, in our words, what was got and what to do."""
    if isinstance(error, ImportError):
        return "is not installed: pip install" in str(error)
    return isinstance(error, ValueError | OSError) and "Got " in str(error) and str(error).endswith(".")


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TooSlow after so long; without a limit where the system has no such signal (Windows)."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(*_: object) -> None:
        raise TooSlow(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
