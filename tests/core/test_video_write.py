"""What is written survives whatever ends the run, and replaces nothing that it should not."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import av
import pytest
import torch
from PIL import Image

from sf_core.video import check_folder, check_outputs, gif_rate, read_video, recover, save_picture, save_video, write

ROOT = Path(__file__).parents[2]
NAMES = ["clip.mp4", "clip.webm", "clip.gif", "clip/"]
KILLED = """
import sys, torch
from sf_core.video import save_video
def pieces():
    for i in range(40):
        print(i, flush=True)
        sys.stdin.readline()
        yield torch.full((1, 32, 32, 3), i / 40)
save_video(sys.argv[1], pieces())
"""


def grey(*values, size=16):
    return torch.stack([torch.full((size, size, 3), value) for value in values])


def killed_after(path, frames):
    """A process that writes there, killed once it is asked for frame `frames`."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    for _ in range(frames):
        process.stdout.readline()
        process.stdin.write("\n")
        process.stdin.flush()
    process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
@pytest.mark.parametrize(("name", "frames"), [(name, n) for name in NAMES for n in (4, 30)])
def test_a_killed_run_leaves_a_video_that_plays_and_the_next_one_finishes(tmp_path, name, frames):
    killed_after(f"{tmp_path}/{name}", frames)
    (left,) = (path for path in tmp_path.iterdir() if not path.name.startswith("."))
    assert ".unfinished-" in left.name
    assert frames - 1 <= len(read_video(left)) <= frames
    (done,) = recover(tmp_path)
    assert done.name == name.replace("clip", "clip.recovered").strip("/") and os.listdir(tmp_path) == [done.name]
    read = read_video(done)
    assert frames - 1 <= len(read) <= frames
    assert torch.allclose(read[2].mean(), torch.tensor(2 / 40), atol=0.02)
    save_video(f"{tmp_path}/{name}", grey(0, 1))
    assert len(read_video(f"{tmp_path}/{name}")) == 2 and done.exists()


def test_what_is_being_written_is_not_taken_for_a_leftover(tmp_path):
    def pieces():
        yield grey(0, 0.5)
        assert recover(tmp_path) == []
        yield grey(1)

    assert save_video(tmp_path / "clip.mp4", pieces()) == 3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("keep", [True, False])
def test_a_full_disk_keeps_what_there_is(tmp_path, name, keep, monkeypatch):
    if "gif" in name:
        real, calls = write._write_all, iter(range(100))

        def full(file, data):
            if next(calls) == 4:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(file, data)

        monkeypatch.setattr(write, "_write_all", full)
    else:
        kind = write._Folder if name == "clip/" else write._Film
        add = kind.add

        def full(self, image):
            if self.count == 3:
                raise OSError(errno.ENOSPC, "No space left on device")
            add(self, image)

        monkeypatch.setattr(kind, "add", full)
    with pytest.raises(OSError, match="full disk after 3 of 5 frames.*needs about.*Make room") as caught:
        save_video(f"{tmp_path}/{name}", grey(0, 0.2, 0.4, 0.6, 0.8), keep=keep)
    assert caught.value.errno == errno.ENOSPC
    (left,) = os.listdir(tmp_path)
    assert left == (name if keep else name.replace("clip", "clip.recovered")).strip("/")
    assert len(read_video(tmp_path / left)) == 3


def test_a_picture_is_saved_whole_or_not_at_all(tmp_path, monkeypatch):
    save_picture(tmp_path / "sheet.png", Image.new("RGB", (8, 8), "red"))

    real = Path.write_bytes

    def full(self, data):
        real(self, b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="full disk.*sheet.png"):
        save_picture(tmp_path / "sheet.png", Image.new("RGB", (8, 8), "blue"))
    assert os.listdir(tmp_path) == ["sheet.png"]
    assert torch.equal(read_video(tmp_path / "sheet.png")[0, 0, 0], torch.tensor([1.0, 0, 0]))


@pytest.mark.parametrize("link", ["same", "symlink", "hard link", "folder", "relative"])
def test_an_output_never_replaces_an_input(tmp_path, link, monkeypatch):
    folder, source = tmp_path / "in", tmp_path / "in" / "fox.png"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(source)
    other = {"same": source, "symlink": tmp_path / "a.png", "hard link": tmp_path / "b.png", "folder": folder}
    other["relative"] = "in/../in/fox.png"
    if link == "symlink":
        other[link].symlink_to(source)
    if link == "hard link":
        os.link(source, other[link])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="--out.*would replace --start"):
        check_outputs({"--out": other[link], "--preview": None}, {"--start": source, "--source": None})
    if link != "folder":  # a picture of a folder of frames
        with pytest.raises(ValueError, match="--out.*would replace --source"):
            check_outputs({"--out": other[link]}, {"--source": folder})
    check_outputs({"--out": tmp_path / "fox.mp4", "--preview": tmp_path / "sheet.png"}, {"--start": source})


@pytest.mark.parametrize("other", ["clip.mp4", "./clip.mp4", "CLIP.mp4", "clip.mp4/sheet.png"])
def test_an_output_never_replaces_another(tmp_path, other, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="--preview.*--out.*place of its own"):
        check_outputs({"--out": "clip.mp4", "--preview": other}, {})


@pytest.mark.parametrize("name", ["frame_00001.png", "notes.txt", "deep"])
def test_a_folder_of_foreign_things_is_not_emptied(tmp_path, name):
    save_video(f"{tmp_path}/clip/", grey(0, 1))
    foreign = tmp_path / "clip" / name
    if name == "deep":
        foreign.mkdir()
    elif name.endswith("png"):
        Image.new("RGB", (8, 8)).save(foreign)  # ffmpeg counts in such names
    else:
        foreign.write_text("mine")
    with pytest.raises(FileExistsError, match="new or an empty folder"):
        save_video(f"{tmp_path}/clip/", grey(0))
    assert sorted(os.listdir(tmp_path / "clip")) == sorted({"frame_00000.png", "frame_00001.png", name})


def test_a_name_of_the_greatest_length_is_written_and_a_longer_one_refused(tmp_path):
    save_video(tmp_path / f"{'n' * 251}.mp4", grey(0, 1))
    assert os.listdir(tmp_path) == [f"{'n' * 251}.mp4"]
    for name in (f"{'n' * 252}.mp4", f"{'ü' * 126}.mp4", "n" * 256):
        with pytest.raises(OSError, match="bytes.*255 are allowed"):
            check_folder(tmp_path / name)


@pytest.mark.parametrize(("fps", "delay", "rate"), [(16, 60, 100 / 6), (25, 40, 25), (60, 20, 50), (120, 20, 50)])
def test_a_gif_plays_at_the_nearest_rate_that_browsers_keep(tmp_path, fps, delay, rate):
    save_video(tmp_path / "clip.gif", grey(0, 0, 1), fps)
    with Image.open(tmp_path / "clip.gif") as image:
        assert image.n_frames == 3  # equal frames are not drawn together
        assert image.info["duration"] == delay and gif_rate(fps) == pytest.approx(rate)


def test_a_finished_mp4_begins_with_its_index_and_names_its_colours(tmp_path):
    save_video(tmp_path / "clip.mp4", grey(*torch.linspace(0, 1, 60).tolist()))
    data = (tmp_path / "clip.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat") and b"moof" not in data
    with av.open(str(tmp_path / "clip.mp4")) as file:
        context = file.streams.video[0].codec_context
        assert (context.colorspace, context.color_range) == (5, 1)


def test_pngs_keep_each_value(tmp_path):
    clip = torch.randint(0, 256, (2, 16, 16, 3), generator=torch.Generator().manual_seed(0)) / 255
    save_video(f"{tmp_path}/clip/", clip)
    assert torch.equal(read_video(tmp_path / "clip"), clip)
