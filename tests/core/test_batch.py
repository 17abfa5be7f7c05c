"""Many videos: the same as one by one, made once, whatever becomes of the others."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sf_core.cli import batch, generate
from sf_core.cli.main import main
from sf_core.pipeline import FilePipeline
from sf_core.video import read_video
from tests.core.test_cli import small_models  # noqa: F401  fixture
from tests.core.test_cli_models import MODEL, TINY, files, folder, wan  # noqa: F401  fixtures
from tests.core.test_text import spiece  # noqa: F401  fixture

ROOT = Path(__file__).parents[2]
PROMPTS = ["a red circle moves right", "a circle moves", "red moves right"]
SHORT = ("--frames", "5")


@pytest.fixture
def make(tmp_path, capsys):
    """make(prompts, "--samples", "2", ...) -> (status, folder, what was printed); a list goes into a text file."""

    def run(prompts, *options, name="videos"):
        path = tmp_path / "prompts.txt" if isinstance(prompts, list) else prompts
        if isinstance(prompts, list):
            path.write_text("\n".join(prompts), encoding="utf-8")
        status = main(["batch", str(path), "--out", str(tmp_path / name), *SHORT, *options])
        printed = capsys.readouterr()
        return status, tmp_path / name, printed.out + printed.err

    return run


def table(folder) -> list[dict]:  # noqa: F811
    with (folder / "batch.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def records(folder) -> list[dict]:  # noqa: F811
    lines = [line for path in folder.glob("batch*.jsonl") for line in path.read_text(encoding="utf-8").splitlines()]
    return [json.loads(line) for line in lines]


def times(folder) -> dict[str, int]:  # noqa: F811
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.mp4")}


def test_videos_are_those_of_generate_and_each_seed_has_one(make, tmp_path):
    status, out, said = make(PROMPTS, "--samples", "2", "--seed", "7", "--format", "png")
    assert status == 0, said
    assert "6 made, 0 there already" in said
    for number, prompt in enumerate(PROMPTS, 1):
        for seed in (7, 8):
            alone = f"{tmp_path}/alone-{number}-{seed}/"
            assert main(["generate", prompt, "--out", alone, "--seed", str(seed), *SHORT]) == 0
            slug = prompt.replace(" ", "-")
            assert torch.equal(read_video(out / f"{number:04}-{slug}-seed{seed}"), read_video(alone))


def test_the_table_says_what_was_made(make):
    _, out, _ = make(PROMPTS, "--shift", "4")
    rows = table(out)
    assert [row["prompt"] for row in rows] == PROMPTS and {row["seed"] for row in rows} == {"0"}
    for row, record in zip(rows, records(out), strict=True):
        assert (out / row["file"]).stat().st_size == record["bytes"] > 0
        assert float(row["seconds"]) > 0 and row["error"] == "" and row["frames"] == "5"
        assert json.loads(row["settings"])["shift"] == 4.0 == record["sampling"]["shift"]


def test_names_as_vbench_wants_them(make):
    _, out, _ = make(PROMPTS, "--samples", "2", "--names", "vbench")
    assert {path.name for path in out.glob("*.mp4")} == {f"{prompt}-{i}.mp4" for prompt in PROMPTS for i in (0, 1)}
    assert [row["seed"] for row in table(out)] == ["0", "1"] * 3


def test_a_csv_gives_seeds_and_names(make, tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text('name,prompt,seed\nfirst,"a red circle moves right",5\n,circle moves,\n', encoding="utf-8-sig")
    status, out, said = make(path, "--seed", "3")
    assert status == 0, said
    assert {row["file"]: row["seed"] for row in table(out)} == {"first.mp4": "5", "0002-circle-moves-seed3.mp4": "3"}
    _, out, _ = make(path, "--samples", "2", name="more")
    assert {"first-0.mp4", "first-1.mp4"} <= {row["file"] for row in table(out)}


def test_what_is_finished_is_not_made_again_and_all_else_is(make):
    _, out, _ = make(PROMPTS)
    before = times(out)
    first, second, third = sorted(before)
    status, _, said = make(PROMPTS)
    assert status == 0 and "0 made, 3 there already" in said and times(out) == before
    (out / first).unlink()  # somebody removed it
    (out / second).write_bytes((out / second).read_bytes()[:100])  # it was cut short
    _, _, said = make([*PROMPTS, "circle"])
    assert "3 made, 1 there already" in said
    assert times(out)[third] == before[third] and (out / second).stat().st_size > 100
    assert len(table(out)) == 4


def test_a_file_that_no_record_speaks_of_is_made(make):
    _, out, _ = make(PROMPTS)
    (path,) = out.glob("batch.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]) + lines[2][:40])  # the last line was cut short by a kill
    before = times(out)
    _, _, said = make(PROMPTS)
    assert "1 made, 2 there already" in said
    assert sum(times(out)[name] != before[name] for name in before) == 1 and len(table(out)) == 3


def test_a_run_that_was_killed_is_finished_and_leaves_no_litter(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle moves right\na blue square moves left\n")
    command = [sys.executable, "-m", "sf_core", "batch", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "--frames", "4001"], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob("out/*.unfinished-*.mp4")):
        pass
    process.kill()
    process.wait()
    assert list(tmp_path.glob("out/*.unfinished-*.mp4"))
    assert subprocess.run([*command, "--frames", "9"], cwd=ROOT, env=environment).returncode == 0
    made = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert made == [
        "0001-a-red-circle-moves-right-seed0.mp4",
        "0002-a-blue-square-moves-left-seed0.mp4",
        "batch.csv",
        "batch.jsonl",
    ]


def test_a_folder_of_other_settings_is_refused_whole(make):
    _, out, _ = make(PROMPTS)
    before = times(out)
    for options, said in [
        (["--frames", "9"], "frames 5 instead of 9"),
        (["--shift", "2"], "shift None instead of 2.0"),
        (["--guidance", "2"], "guidance 1.0 instead of 2.0"),
    ]:
        status, _, told = make(PROMPTS, *options)
        assert status == 2 and said in told and times(out) == before
    status, _, told = make(["circle", *PROMPTS[1:]], "--names", "number")
    assert status == 0, told  # another prompt has another name


def test_one_bad_prompt_does_not_end_the_others(make, tmp_path):
    path = tmp_path / "prompts.csv"
    lines = [
        "prompt,seed,name",
        "circle,0,a",
        "zebra,0,b",
        ",0,c",
        "circle,x,d",
        "circle,0,../e",
        f"circle,0,{'f' * 300}",
    ]
    path.write_text("\n".join([*lines, "red circle,0,g"]))
    status, out, said = make(path)
    assert status == 2 and "5 of 7 videos failed, 2 were made" in said
    assert {path.name for path in out.glob("*.mp4")} == {"a.mp4", "g.mp4"}
    errors = {row["file"][:3]: row["error"] for row in table(out)}
    said = {
        "b.m": "recognises nothing",
        "c.m": "empty prompt",
        "d.m": "seed: got x",
        "../": "slashes",
        "fff": "304 bytes",
    }
    assert not errors.pop("a.m") and not errors.pop("g.m") and errors.keys() == said.keys()
    assert all(said[name] in errors[name] for name in said), errors
    assert not (tmp_path / "e.mp4").exists()
    status, _, said = make(path)
    assert status == 2 and "0 were made, 2 were there" in said


def test_one_that_fails_while_it_is_made_does_not_end_the_others(make, monkeypatch):
    save = batch.save_video

    def fail(path, *rest):
        if "0002" in str(path):
            raise RuntimeError("CUDA error: device-side assert")
        return save(path, *rest)

    monkeypatch.setattr(batch, "save_video", fail)
    status, out, said = make(PROMPTS)
    assert status == 2 and "device-side assert" in said and len(list(out.glob("*.mp4"))) == 2
    monkeypatch.setattr(batch, "save_video", save)
    status, _, said = make(PROMPTS)
    assert status == 0 and "1 made, 2 there already" in said
    assert [row["error"] for row in table(out)] == [""] * 3


def test_two_of_one_name_are_refused(make):
    status, out, said = make(["circle", "Circle"], "--names", "vbench")
    assert status == 2 and "two videos that would be 'Circle-0.mp4'" in said and not out.exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.txt", None, "no file"), ("empty.txt", "\n \n", "no prompts"),
        ("x.csv", "text\ncircle\n", "column named"),
        ("latin.txt", b"\xff\xfe\xfd", "not UTF-8"),
    ],
)  # fmt: skip
def test_files_that_hold_no_prompts_are_refused(make, tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    status, out, told = make(tmp_path / name)
    assert status == 2 and said in told and not out.exists()


def test_an_input_is_never_replaced(make, tmp_path):
    (tmp_path / "videos").mkdir()
    path = tmp_path / "videos" / "batch-prompts.csv"
    path.write_text("prompt,name\ncircle,video\n")
    status, _, said = make(path)
    assert status == 0, said  # beside the videos it may lie
    start = tmp_path / "videos" / "video.mp4"
    status, _, said = make(path, "--start", str(start))
    assert status == 2 and "would replace --start" in said


def test_networks_are_loaded_once_and_the_text_encoder_is_gone_before_the_model(make, files, monkeypatch):  # noqa: F811
    loaded = []
    for name in ("load_text_encoder", "load_autoencoder", "load_model"):
        load = getattr(FilePipeline, name)
        monkeypatch.setattr(FilePipeline, name, lambda self, load=load, name=name: loaded.append(name) or load(self))
    size = ("--width", "32", "--height", "48")
    status, out, said = make([*PROMPTS, "2s"], *MODEL, *TINY, *size, "--samples", "2", "--format", "png")
    assert status == 0, said
    assert loaded == ["load_text_encoder", "load_autoencoder", "load_model"]
    alone = f"{out.parent}/alone/"
    assert main(["generate", PROMPTS[1], "--out", alone, *SHORT, *MODEL, *TINY, *size, "--seed", "1"]) == 0
    assert torch.equal(read_video(out / "0002-a-circle-moves-seed1"), read_video(alone))


def test_float8_and_guidance_are_those_of_generate(make, tmp_path):
    options = ("--fp8", "--guidance", "2", "--negative", "circle")
    status, out, said = make(PROMPTS, *options, "--format", "png")
    assert status == 0, said
    alone = f"{tmp_path}/alone/"
    assert main(["generate", PROMPTS[2], "--out", alone, *SHORT, *options]) == 0
    assert torch.equal(read_video(out / "0003-red-moves-right-seed0"), read_video(alone))


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_make_what_one_makes(tmp_path, processes):
    (tmp_path / "prompts.txt").write_text("a red circle moves right\na blue square moves left\na star\n")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = [str(tmp_path / "prompts.txt"), *SHORT, "--samples", "2", "--format", "png", "--names", "vbench"]
    torchrun = ["torch.distributed.run", "--nproc-per-node", str(processes), "-m", "sf_core"]
    for module, name in ((torchrun, "several"), (["sf_core"], "one")):
        command = [sys.executable, "-m", *module, "batch", *options, "--out", str(tmp_path / name)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    one, several = tmp_path / "one", tmp_path / "several"
    assert len(list(several.glob("batch-*-of-*.jsonl"))) == processes
    kept = ("file", "prompt", "seed", "frames", "error", "settings")
    assert [[row[name] for name in kept] for row in table(one)] == [
        [row[name] for name in kept] for row in table(several)
    ]
    for row in table(one):
        pictures = sorted(path.name for path in (one / row["file"]).iterdir())
        assert len(pictures) == 5
        for name in pictures:
            assert (one / row["file"] / name).read_bytes() == (several / row["file"] / name).read_bytes()


def test_one_process_goes_on_where_several_were(make, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    _, out, said = make(PROMPTS)
    assert "1 made" in said
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    status, _, said = make(PROMPTS)
    assert status == 0 and "2 made, 1 there already" in said and len(table(out)) == 3


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert batch.local_device("cuda") == torch.device("cuda", 3) == chosen[0]


def test_every_option_of_generate_is_there_but_those_of_one_file():
    def options(command):
        parser = generate.argparse.ArgumentParser()
        command.add_arguments(parser)
        return {name for action in parser._actions for name in action.option_strings}

    assert options(generate) - options(batch) == {"--prompt-file", "--preview"}
