"""A disk that is really full: a small file system in memory, mounted where that is permitted."""

import errno
import os
import re
import subprocess
from pathlib import Path

import av
import pytest
import torch
from PIL import Image

from sf_core.video import DiskFullError, read_video, save_picture, save_video, write
from tests.core.test_cli import PROMPT, refused

LENGTH = 2000


@pytest.fixture
def disk(tmp_path):
    """disk(400): a folder with room for so many KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(kib):
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no file system can be mounted here: {error}")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True)


def noise(count):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield torch.rand(1, 8, 8, 3, generator=generator).repeat_interleave(8, 1).repeat_interleave(8, 2)


def mib(text):
    number, unit = text.split()
    return float(number) * {"KiB": 1 / 1024, "MiB": 1, "GiB": 1024}[unit]


@pytest.mark.parametrize("name", ["clip.mp4", "clip.webm", "clip.gif", "clip/"])
@pytest.mark.parametrize("keep", [True, False])
def test_what_fits_stays_and_plays_and_the_room_is_told(disk, name, keep, tmp_path):
    folder = disk(400)
    with pytest.raises(DiskFullError, match="full disk after .* of 2000 frames.*Make room") as caught:
        save_video(f"{folder}/{name}", noise(LENGTH), keep=keep, length=LENGTH)
    made, kept = map(int, re.search(r"after (\d+) of 2000 frames\. (\d+) of them", str(caught.value)).groups())
    assert made - 2 <= kept <= made < LENGTH
    (left,) = os.listdir(folder)
    assert left == (name if keep else name.replace("clip", "clip.recovered")).strip("/")
    assert len(read_video(folder / left)) == kept
    if not (folder / left).is_dir():
        with av.open(str(folder / left)) as file:  # to its end, without an error
            assert sum(1 for _ in file.decode(video=0)) == kept
    needed = mib(re.search(r"needs about ([\d.]+ \w+)", str(caught.value))[1])
    whole = disk_needed(tmp_path, name)
    assert 0.75 * whole < needed < 1.4 * whole, (needed, whole)


def disk_needed(folder, name):
    """MiB that the whole video takes while it is written: what stays, and the copy along with it."""
    frames, copy = 300, 0

    def watched():
        nonlocal copy
        yield from noise(frames)
        copy = sum(write._size(path) for path in folder.iterdir() if path.name.startswith(name[:4] + ".unfinished"))

    save_video(f"{folder}/{name}", watched())
    whole = write._size(folder / name) if Path(name).suffix in write.PLAYABLE else 0
    return (whole + (copy or write._size(folder / name))) / 2**20 * LENGTH / frames


def test_a_disk_that_is_full_from_the_start_leaves_nothing(disk):
    folder = disk(64)
    (folder / "other").write_bytes(bytes(60 * 1024))
    for name in ("clip.mp4", "clip.webm", "clip.gif", "clip/"):
        with pytest.raises(DiskFullError, match="too early to keep any"):
            save_video(f"{folder}/{name}", torch.rand(40, 256, 256, 3))
        assert os.listdir(folder) == ["other"], name


def test_a_picture_says_what_it_needs_and_what_is_kept(disk):
    folder = disk(64)
    noisy = Image.effect_noise((512, 512), 90)
    with pytest.raises(DiskFullError, match=r"needs 2\d\d KiB\. The video is whole.*Make room") as caught:
        save_picture(folder / "sheet.png", noisy, "The video is whole in 'a.mp4'. ")
    assert caught.value.errno == errno.ENOSPC and os.listdir(folder) == []


@pytest.mark.parametrize("name", ["clip.mp4", "clip.webm", "clip.gif", "clip/"])
def test_generate_keeps_what_it_made(disk, capsys, name):
    folder = disk(100)
    line = refused(capsys, "generate", PROMPT, "--out", f"{folder}/{name}", "--frames", "801", "--seed", "0")
    assert re.search(r"error: Got a full disk after \d+ of 801 frames", line) and "needs about" in line
    (left,) = os.listdir(folder)
    assert left.startswith("clip.recovered") and str(folder / left) in line
    assert len(read_video(folder / left)) == int(re.search(r"(\d+) of them", line)[1])


def test_generate_keeps_the_video_where_its_contact_sheet_has_no_room(disk, capsys, tmp_path):
    folder, out = disk(4), tmp_path / "clip.mp4"
    (folder / "other").write_bytes(bytes(4096))
    line = refused(capsys, "generate", PROMPT, "--out", str(out), "--frames", "21", "--preview", f"{folder}/a.png")
    assert re.search(r"error: Got a full disk while writing .*a\.png', which needs \d+ KiB\. The video is whole", line)
    assert len(read_video(out)) == 21 and os.listdir(folder) == ["other"]
