"""The command line, in this process and with small random models in place of the built-in one."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from sf_core import tiny
from sf_core.autoencoders.stream import DecoderStream
from sf_core.autoencoders.taehv import TAEHV, Layout
from sf_core.cli import generate
from sf_core.cli.main import STOPPED, main
from sf_core.tiny.text import TEXT_DIM, TEXT_LEN, TinyTextEncoder
from sf_core.video import read_video, save_video
from sf_core.wan.config import WanConfig
from sf_core.wan.model import WanModel
from tests.core.regenerate import weights

ROOT = Path(__file__).parents[2]
PROMPT = "a red circle moves right"
CONFIG = WanConfig(dim=48, ffn_dim=64, heads=2, layers=2, freq_dim=32, text_dim=TEXT_DIM, text_len=TEXT_LEN)


def drawn(module):
    """The module with weights that are the same in every run."""
    state = weights({name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}, seed=5)
    module.load_state_dict(state)
    return module


@pytest.fixture(autouse=True)
def small_models(monkeypatch):
    words = "a red circle moves right".split()
    layout = Layout(widths=(16, 12, 8, 8), encoder_width=8)
    load_model = lambda device, dtype: drawn(WanModel(CONFIG)).to(device, dtype)  # noqa: E731
    monkeypatch.setattr(tiny, "load_transformer", load_model, raising=False)
    monkeypatch.setattr(tiny, "load_text_encoder", lambda: drawn(TinyTextEncoder(words)), raising=False)
    monkeypatch.setattr(tiny, "load_autoencoder", lambda: drawn(TAEHV(layout)), raising=False)


@pytest.fixture
def make(tmp_path, capsys):
    """make("--frames", "9") -> what was printed as JSON, and the frames."""

    def run(*options, prompt=PROMPT, name="frames/"):
        out = f"{tmp_path}/{name}"
        assert main(["generate", prompt, "--out", out, "--json", *options]) == 0
        return json.loads(capsys.readouterr().out), read_video(out)

    return run


def refused(capsys, *argv):
    """The one line an impossible command ends with."""
    assert main(list(argv)) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    line = captured.err.splitlines()[-1]
    assert line.startswith("sf_core: error: ")
    return line


def test_report_tells_what_was_done(make, tmp_path):
    report, frames = make("--frames", "10", "--width", "32", "--height", "48", "--fps", "8", name="clip.mp4")
    assert frames.shape == (10, 48, 32, 3)
    assert (report["seed"], report["frames"], report["width"], report["height"], report["fps"]) == (0, 10, 32, 48, 8)
    assert {"load", "prompt", "rollout", "decode", "write", "first_frames", "total"} == report["seconds"].keys()
    assert all(seconds >= 0 for seconds in report["seconds"].values())
    assert report["frames_per_second"] > 0 and report["out"] == f"{tmp_path}/clip.mp4"
    assert report["sampling"]["window"] == 9 and report["device"] == "cpu" and report["dtype"] == "float32"


def test_a_start_is_the_beginning_and_goes_on(make, tmp_path):
    save_video(f"{tmp_path}/start/", torch.rand(1, 64, 64, 3))
    report, frames = make("--start", f"{tmp_path}/start/frame_00000.png", "--frames", "9")
    _, alone = make("--frames", "9")
    assert len(frames) == 9 and report["seconds"]["encode"] > 0
    assert not torch.equal(frames, alone)
    save_video(f"{tmp_path}/clip/", frames)
    report, longer = make("--start", f"{tmp_path}/clip/")
    assert len(longer) == 89


def test_a_start_of_another_size_is_cut_around_its_middle(make, tmp_path, monkeypatch):
    wide = torch.zeros(1, 32, 128, 3)
    wide[:, :, 48:80] = 1
    save_video(f"{tmp_path}/wide/", wide)
    seen = []
    monkeypatch.setattr(TAEHV, "encode", lambda self, frames: seen.append(frames) or torch.zeros(1, 16, 1, 8, 8))
    make("--start", f"{tmp_path}/wide/", "--frames", "9")
    assert seen[0].shape == (1, 1, 64, 64, 3) and seen[0][..., 4:-4, :].min() > 0.9


@pytest.mark.parametrize("strength", ["0.5", "1"])
def test_a_source_gives_length_and_content(make, tmp_path, strength):
    save_video(f"{tmp_path}/clip/", torch.rand(14, 64, 64, 3))
    report, frames = make("--source", f"{tmp_path}/clip/", "--strength", strength)
    assert len(frames) == 14 and report["latent_frames"] == 6
    _, alone = make("--frames", "14")
    assert torch.equal(frames, alone) == (strength == "1")


def test_guidance_leads_away_from_the_negative_prompt(make):
    _, plain = make("--frames", "9")
    _, guided = make("--frames", "9", "--guidance", "3", "--negative", "a circle")
    _, same = make("--frames", "9", "--guidance", "3", "--negative", PROMPT)
    assert not torch.equal(guided, plain)
    assert (same - plain).abs().max() < 0.02
    _, unasked = make("--frames", "9", "--guidance", "3")  # away from no prompt at all
    assert not torch.equal(unasked, plain) and not torch.equal(unasked, guided)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--start", "missing.png"], "Got missing.png, which is not there"),
        (["--start", "README.md"], "Got README.md, which is neither a video nor a picture that can be read"),
        (["--source", "missing.mp4"], "Got missing.mp4"),
        (["--strength", "0"], "above 0 and at most 1"),
        (["--strength", "much"], "above 0 and at most 1"),
        (["--start", "docs/workflow.png", "--frames", "1"], "at least one frame must be left"),
    ],
)
def test_starts_that_cannot_be_are_refused(capsys, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(ROOT)
    assert message in refused(capsys, "generate", PROMPT, "--out", f"{tmp_path}/clip.mp4", *options)
    assert os.listdir(tmp_path) == []


def test_default_is_81_frames_of_64_x_64(make):
    report, frames = make()
    assert frames.shape == (81, 64, 64, 3) and report["latent_frames"] == 21 and report["fps"] == 16


@pytest.mark.parametrize("frames", [1, 2, 9, 10, 13, 22])
def test_first_frames_do_not_depend_on_the_number_asked_for(make, frames):
    _, longest = make("--frames", "33", "--width", "16", "--height", "16")
    _, shorter = make("--frames", str(frames), "--width", "16", "--height", "16", name="shorter/")
    assert torch.equal(shorter, longest[:frames])


def test_a_seed_gives_the_same_bytes(make, tmp_path):
    make("--frames", "9", "--seed", "7", name="one.mp4")
    make("--frames", "9", "--seed", "7", name="two.mp4")
    make("--frames", "9", "--seed", "8", name="other.mp4")
    one, two, other = ((tmp_path / f"{name}.mp4").read_bytes() for name in ("one", "two", "other"))
    assert one == two != other


def test_seed_minus_one_draws_a_seed_that_can_be_used_again(make):
    drawn_report, first = make("--frames", "5", "--seed", "-1")
    again_report, again = make("--frames", "5", "--seed", str(drawn_report["seed"]), name="again/")
    other_report, _ = make("--frames", "5", "--seed", "-1", name="other/")
    assert torch.equal(first, again)
    assert other_report["seed"] != drawn_report["seed"] >= 0 and again_report["seed"] == drawn_report["seed"]


def test_drawn_seed_is_told_before_the_work(tmp_path, capsys):
    assert main(["generate", PROMPT, "--out", f"{tmp_path}/frames/", "--frames", "1", "--seed", "-1"]) == 0
    assert capsys.readouterr().err.startswith("sf_core: seed ")


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--preset", "cli"], {"shift": 5.0, "window": None}),
        (["--preset", "demo", "--steps", "2"], {"shift": 8.0, "steps": [1000, 500]}),
        (["--steps", "1000,700,200"], {"steps": [1000, 700, 200], "shift": 3.0}),
        (["--window", "all"], {"window": None}),
        (["--window", "4", "--sink", "2", "--chunk", "2"], {"window": 4, "sink": 2, "chunk": 2}),
    ],
)
def test_options_change_the_preset(make, options, expected):
    report, _ = make("--frames", "5", "--width", "16", "--height", "16", *options)
    assert {name: report["sampling"][name] for name in expected} == expected


def test_half_precision(make):
    report, frames = make("--frames", "5", "--dtype", "bfloat16")
    assert report["dtype"] == "bfloat16" and frames.isfinite().all()


@pytest.mark.parametrize("preview, name", [(["--preview"], "clip.png"), (["--preview", "sheet.png"], "sheet.png")])
def test_preview_is_a_png(make, tmp_path, monkeypatch, preview, name):
    monkeypatch.chdir(tmp_path)
    report, _ = make("--frames", "9", *preview, name="clip.gif")
    assert (tmp_path / name).read_bytes().startswith(b"\x89PNG") and report["preview"].endswith(name)


def test_progress_tells_chunk_speed_and_first_frames(tmp_path, capsys):
    assert main(["generate", PROMPT, "--out", f"{tmp_path}/clip.gif", "--frames", "33"]) == 0
    captured = capsys.readouterr()
    assert "chunk 3/3" in captured.err and "frames/s" in captured.err and "first after" in captured.err
    assert captured.out.startswith(f"{tmp_path}/clip.gif: 33 frames of 64 x 64, seed 0")


def test_words_it_does_not_know_are_told(make, capsys, tmp_path):
    argv = ["generate", "a red dinosaur 🦖 moves right", "--out", f"{tmp_path}/clip.gif", "--frames", "1"]
    assert main(argv) == 0
    assert "leaves them out: dinosaur" in capsys.readouterr().err


def test_a_very_long_prompt_is_cut_and_told(capsys, tmp_path):
    assert main(["generate", "a red circle " * 5000, "--out", f"{tmp_path}/clip.gif", "--frames", "1"]) == 0
    error = capsys.readouterr().err
    assert "has no room for" in error and len(error) < 1000


STORY = "0: a red circle\n0.5s cut: a circle moves right"


def test_a_second_prompt_takes_over_from_its_time_on(make):
    frames, alone = make("--frames", "21", prompt=STORY)[1], make("--frames", "21", prompt="a red circle")[1]
    assert torch.equal(frames[:9], alone[:9])
    assert not torch.equal(frames[9:], alone[9:])


def test_a_prompt_is_read_from_a_file(make, tmp_path, capsys):
    (tmp_path / "story.txt").write_text("\ufeff" + STORY, encoding="utf-8")
    options = ["--out", f"{tmp_path}/file/", "--frames", "21", "--prompt-file", f"{tmp_path}/story.txt"]
    assert main(["generate", *options]) == 0
    assert "the prompt of 0.5s starts with frame 9 (0.56 s)" in capsys.readouterr().err
    assert torch.equal(read_video(f"{tmp_path}/file/"), make("--frames", "21", prompt=STORY)[1])


@pytest.mark.parametrize(
    "prompt, remedy",
    [
        ("0: a red circle\n4: a circle", "line 2, column 1 .* Write 4s for seconds"),
        ("0: a red circle\n9s: a circle", "Start the prompt earlier, or make a longer video"),
    ],
)
def test_a_schedule_that_cannot_be_followed_is_refused_before_anything_is_loaded(
    tmp_path, capsys, monkeypatch, prompt, remedy
):
    monkeypatch.setattr(tiny, "load_text_encoder", None)
    assert re.search(remedy, refused(capsys, "generate", prompt, "--out", f"{tmp_path}/clip.mp4"))


@pytest.mark.parametrize("content, remedy", [(None, "Got no file .* Name one"), (b"\xff\xfe0", "plain text in UTF-8")])
def test_a_prompt_file_that_is_no_text_is_refused(tmp_path, capsys, content, remedy):
    file = tmp_path / "story.txt"
    if content is not None:
        file.write_bytes(content)
    line = refused(capsys, "generate", "--prompt-file", str(file), "--out", f"{tmp_path}/clip.mp4")
    assert re.search(remedy, line), line


IMPOSSIBLE = [
    (["--bogus"], "--bogus"),
    (["--frames", "0"], "from 1 to 1000000"),
    (["--frames", "-3"], "from 1 to 1000000"),
    (["--frames", "99999999999999999999"], "from 1 to 1000000"),
    (["--frames", "many"], "whole number"),
    (["--width", "60"], "multiple of 16.* 64"),
    (["--height", "0"], "from 1|multiple of 16"),
    (["--width", "-64"], "from 1|multiple of 16"),
    (["--height", "100000"], "up to 2048"),
    (["--fps", "0"], "from 1 to 120"),
    (["--seed", "-2"], "from -1"),
    (["--seed", "18446744073709551616"], "from -1"),
    (["--steps", "0"], "from 1"),
    (["--steps", "250,500"], "must fall"),
    (["--steps", "1000,x"], "numbers like"),
    (["--chunk", "0"], "from 1"),
    (["--window", "2"], "window of at least 4"),
    (["--window", "4", "--sink", "2"], "window of at least 5"),
    (["--window", "none"], "whole number"),
    (["--sink", "-1"], "from 0"),
    (["--preset", "best"], "cli.*demo.*tiny"),
    (["--device", "toaster"], "use .*cpu"),
    (["--device", "meta"], "use .*cpu"),
    (["--dtype", "int8"], "float32"),
    (["--preview", "sheet.jpg"], r"ends in \.png"),
    (["--out", "clip.avi"], r"\.mp4, \.webm or \.gif"),
    (["--out", "missing/clip.mp4"], "Make it first"),
    (["--preview", "missing/sheet.png"], "Make it first"),
    (["--vae", "vae.pth", "--family", "longlive"], "--vae and --family without --model"),
    (["--model", "model.pt"], "--text-encoder"),
    (["--model", "model.pt", "--text-encoder", "umt5.safetensors"], "--taehv"),
    (["--vae", "vae.pth", "--taehv", "taew2_1.pth"], "not allowed with"),
    (["--strength", "0.3"], "--strength without --source"),
    (["--drop-start"], "--drop-start without --start"),
    (["--history", "all"], "--history without --start"),
    (["--negative", "a square"], "--negative without --guidance"),
    (["--tile", "256"], "Leave --tile out"),
    (["--tile", "100"], "multiple of 16"),
    (["--compile", "hard"], "max-autotune"),
    (["--attention", "flash"], "Use sdpa"),
    (["--attention", "xformers"], "sage"),
]


NUMBERS = [
    ("generate", "--frames"), ("generate", "--seed"), ("generate", "--width"), ("generate", "--height"),
    ("generate", "--fps"), ("generate", "--steps"), ("generate", "--first-steps"), ("generate", "--shift"),
    ("generate", "--chunk"), ("generate", "--first-chunk"), ("generate", "--window"), ("generate", "--sink"),
    ("generate", "--context-noise"), ("generate", "--strength"), ("generate", "--guidance"), ("generate", "--tile"),
    ("generate", "--lora-strength"), ("bench", "--frames"), ("bench", "--threads"), ("bench", "--repeats"),
    ("evaluate", "--prompts"), ("evaluate", "--windows"), ("evaluate", "--seed"), ("evaluate", "--context-noise"),
    ("train tiny", "--steps"), ("train tiny", "--processes"), ("train tiny", "--seed"), ("info", "--width"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "option"), NUMBERS, ids=map(" ".join, NUMBERS))
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400", "", "0x10"])
def test_what_is_no_number_is_refused(capsys, command, option, value):
    words = [PROMPT, "--out", "clip.mp4"] if command == "generate" else []
    assert option in refused(capsys, *command.split(), *words, f"{option}={value}")


@pytest.mark.parametrize("option", ["--frames", "--threads", "--repeats"])
def test_numbers_of_bench_are_at_least_one(capsys, option):
    assert "from 1 to" in refused(capsys, "bench", option, "0")


@pytest.mark.parametrize("options, remedy", IMPOSSIBLE, ids=[" ".join(options) for options, _ in IMPOSSIBLE])
def test_impossible_options_are_refused_in_one_line(tmp_path, capsys, monkeypatch, options, remedy):
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, "generate", PROMPT, "--out", "clip.mp4", *options)
    assert re.search(remedy, line), line
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("prompt", ["", "   ", "🦖", "dinosaurs\ndance"])
def test_a_prompt_without_a_known_word_is_refused(tmp_path, capsys, prompt):
    assert "red circle" in refused(capsys, "generate", prompt, "--out", f"{tmp_path}/clip.mp4")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("argv", [["dance"], ["train"], ["train", "giant"], ["generate"], ["generate", PROMPT]])
def test_incomplete_commands_are_refused(capsys, argv):
    assert "--help" in refused(capsys, *argv)


def test_a_cache_that_cannot_fit_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(generate, "available_memory", lambda device: 2**24)
    line = refused(capsys, "generate", PROMPT, "--out", f"{tmp_path}/clip.mp4", "--window", "all", "--frames", "99999")
    assert "cpu has 16 MiB" in line and re.search(r"Use --window \d+ \(\d+ MiB\), or a smaller size", line), line
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])
def test_out_of_memory_is_told(tmp_path, capsys, monkeypatch, kind):
    def full(*_):
        raise kind("not enough memory: you tried to allocate memory for a cinema.")

    monkeypatch.setattr(DecoderStream, "decode", full)
    line = refused(capsys, "generate", PROMPT, "--out", f"{tmp_path}/clip.mp4")
    assert "Got out of memory on cpu" in line and re.search(r"Use --fp8-cache \(\d+ MiB\), --fp8", line), line
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["clip.mp4", "clip.webm", "clip.gif", "clip/"])
def test_stopping_leaves_nothing(tmp_path, capsys, monkeypatch, name):
    calls = []
    decode = DecoderStream.decode

    def interrupted(stream, latents):
        calls.append(latents)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return decode(stream, latents)

    monkeypatch.setattr(DecoderStream, "decode", interrupted)
    assert main(["generate", PROMPT, "--out", f"{tmp_path}/{name}"]) == STOPPED
    assert "stopped" in capsys.readouterr().err and os.listdir(tmp_path) == []


def test_info_lists_model_presets_and_devices(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert all(part in out for part in ("M parameters", "circle", "demo", "shift 8", "longlive", "cpu"))


@pytest.mark.parametrize("argv", [[], ["--help"]])
def test_overview_names_every_command(capsys, argv):
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("generate", "info", "train tiny", "evaluate"))


def test_module_can_be_run():
    done = subprocess.run(
        [sys.executable, "-m", "sf_core", "generate", "--frames", "0"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("sf_core: error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("rank", [None, "0"])
def test_one_of_torchruns_processes_ends_without_python_ending(tmp_path, rank):
    """Everything it said is out, and its status is the command's."""
    (tmp_path / "sitecustomize.py").write_text("import atexit\natexit.register(print, 'Python ends')\n")
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    environment |= {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))} | ({"RANK": rank} if rank else {})
    for argv, status, said in ((["--help"], 0, "usage"), (["generate", "--frames", "0"], 2, "sf_core: error")):
        command = [sys.executable, "-m", "sf_core", *argv]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == status and said in done.stdout + done.stderr
        assert ("Python ends" in done.stdout) == (rank is None)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_is_stopped_leaves_nothing(tmp_path, sign):
    command = [
        sys.executable,
        "-m",
        "sf_core",
        "generate",
        PROMPT,
        "--frames",
        "100000",
        "--out",
        f"{tmp_path}/clip.mp4",
    ]

    def hear():  # a shell's background jobs ignore ^C, and so would what they start
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, preexec_fn=hear) as process:
        too_long = threading.Timer(120, process.kill)
        too_long.start()
        while b"chunk" not in (said := process.stderr.read1()):
            assert said, "it ended by itself"
        process.send_signal(sign)
        rest = process.stderr.read()
        too_long.cancel()
    assert process.returncode == STOPPED and b"stopped" in rest and b"Traceback" not in rest
    assert os.listdir(tmp_path) == []


def test_the_built_in_model_makes_a_video(tmp_path):
    command = [sys.executable, "-m", "sf_core", "generate", PROMPT, "--out", "clip.mp4", "--preview", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["frames"] == len(read_video(tmp_path / "clip.mp4")) == 81
    assert sorted(os.listdir(tmp_path)) == ["clip.mp4", "clip.png"]
