"""Names of files, and consoles that cannot show them: never a traceback."""

import os
import subprocess
import sys
from pathlib import Path, PureWindowsPath

import pytest

from sf_core.cli.main import main
from sf_core.device import console_text
from sf_core.video import check_destination, check_folder, check_names, destination

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["generate", "a red circle", "--frames", "5"]


def error_of(capsys, *argv: str) -> str:
    """The one line that a refused command prints."""
    assert main(list(argv)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.parametrize(("encoding", "name"), [("ascii", "ёж"), ("cp1252", "狐"), ("utf-8", "b\udcff")])
def test_a_console_that_cannot_show_a_name_shows_an_escape(tmp_path, encoding, name):
    out = tmp_path / f"{name}.mp4"
    env = {**os.environ, "PYTHONIOENCODING": encoding, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "sf_core", *SHORT, "--out", str(out), "--preview"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True)
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr.decode(errors="replace")
    shown = done.stdout.decode(encoding)
    assert shown.startswith(f"{out}:".encode(encoding, "backslashreplace").decode(encoding))


def test_a_system_whose_file_names_are_ascii_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(destination.os, "fsencode", lambda path: str(path).encode("ascii"))
    with pytest.raises(ValueError, match=r"Got '.*\\u0451.mp4', which this system's file names cannot hold"):
        check_destination(tmp_path / "ё.mp4")


def test_text_for_the_log_has_what_the_console_has(monkeypatch):
    monkeypatch.setattr(sys, "stderr", type("Console", (), {"encoding": "cp1252"}))
    assert console_text("é狐\udcff") == "é\\u72d0\\udcff"
    monkeypatch.setattr(sys, "stderr", None)
    assert console_text(Path("é")) == "\\xe9"


@pytest.mark.parametrize(
    "name",
    ["CON", "nul", "aux.mp4", "com1.gif", "LPT9.webm", "COM\u00b9.mp4", "nul .mp4", "CONIN$", "a/prn/x.mp4",
     "dots..", "folder /x.mp4", "ends. ", "a<b.mp4", 'say "x".mp4', "a|b.gif", "what?.mp4", "*.mp4", "12:30.mp4",
     "D:\\video\\12:30.mp4", "tab\t.mp4"],
)  # fmt: skip
def test_names_that_windows_cannot_have_are_refused_there(monkeypatch, name):
    check_names(name)
    monkeypatch.setattr(destination, "ON_WINDOWS", True)
    with pytest.raises(ValueError, match="Got .*Windows.* Use letters"):
        check_names(name)


@pytest.mark.parametrize(
    "name",
    ["D:\\video\\clip.mp4", "C:clip.mp4", "\\\\server\\share\\clip.mp4", "..\\clip.mp4", ".\\a b\\clip.v2.mp4",
     "console.mp4", "com10.mp4", "auxiliary\\nullify.gif", "folder\\", "狐\\ё.mp4"],
)  # fmt: skip
def test_ordinary_names_are_taken_on_windows(monkeypatch, name):
    monkeypatch.setattr(destination, "ON_WINDOWS", True)
    check_names(name)
    assert destination._windows_fault(str(PureWindowsPath(name))) is None


def test_windows_counts_letters_and_not_bytes(monkeypatch):
    with pytest.raises(OSError, match="name of 304 bytes"):
        check_names("狐" * 100 + ".mp4")
    monkeypatch.setattr(destination, "ON_WINDOWS", True)
    check_names("狐" * 100 + ".mp4")
    with pytest.raises(OSError, match="name of 264"):
        check_names("\U0001f98a" * 130 + ".mp4")


LONG = {"name": "n" * 300, "folder": "n" * 300 + "/x.png", "path": "nnnn/" * 1000 + "x.png"}


@pytest.mark.parametrize("what", LONG)
@pytest.mark.parametrize(
    "option", ["--start", "--source", "--prompt-file", "--out", "--preview", "--model", "--taehv", "--tokenizer"]
)
def test_names_that_are_too_long_are_refused_in_a_short_sentence(tmp_path, capsys, option, what):
    given = {"--out": f"{tmp_path}/x.mp4", option: f"{tmp_path}/{LONG[what]}"}
    if option in ("--model", "--taehv", "--tokenizer"):
        given = {"--text-encoder": "x", "--taehv": "x", "--model": "x"} | given
    words = ["5"] if option == "--prompt-file" else ["5", "a red circle"]
    line = error_of(capsys, "generate", "--frames", *words, *(word for pair in given.items() for word in pair))
    assert ": error: Got " in line and "Errno" not in line and line.endswith(".")
    assert len(line) < 700, line


def test_a_folder_whose_path_leaves_no_room_is_refused(tmp_path):
    folder = tmp_path
    while len(str(folder)) < 3800:
        folder = folder / ("d" * 100)
    folder.mkdir(parents=True)
    check_folder(folder / "x.mp4")
    deepest = folder / ("d" * (4060 - len(str(folder)) - 1))
    os.makedirs(deepest.parent, exist_ok=True)
    cwd = os.open(deepest.parent, os.O_RDONLY)
    try:
        os.mkdir(deepest.name, dir_fd=cwd)
        with pytest.raises(OSError, match="too long|are allowed"):
            check_folder(deepest / f"{'x' * 25}.mp4")
    finally:
        os.rmdir(deepest.name, dir_fd=cwd)
        os.close(cwd)


@pytest.mark.parametrize("command", [["info"], ["evaluate", "--model"]])
def test_what_the_system_says_of_a_file_is_told_as_a_sentence(capsys, tmp_path, command):
    line = error_of(capsys, *command, f"{tmp_path}/{'n' * 300}")
    assert ": error: Got " in line and "Errno" not in line, line


def test_a_null_character_is_refused():
    with pytest.raises(ValueError, match="null character"):
        check_names("a\0b.mp4")
