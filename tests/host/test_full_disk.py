"""Self Forcing Stream in a server whose output folder is on a disk that gets full."""

import re
import subprocess

import pytest

from tests.host.server import running
from tests.host.test_stream_survives import FRAMES, frames_in, stream_prompt


def test_stream_keeps_what_fits_on_the_disk(server):
    folder = server.base / "output"
    told = server.error_of(stream_prompt("x"))
    match = re.search(
        rf"full disk after (\d+) of {FRAMES} frames\. (\d+) of them, .*needs about [\d.]+ MiB.*room", told
    )
    assert match, told
    (left,) = [path for path in folder.iterdir() if path.name.startswith("x")]
    assert left.name == "x_00001_.mp4" and str(left) in told
    made, kept = map(int, match.groups())
    assert made - 2 <= kept <= made and frames_in(left) == kept


@pytest.fixture(scope="module")
def server(comfyui, tmp_path_factory):
    base = tmp_path_factory.mktemp("comfyui")
    disk = base / "output"
    disk.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    try:
        with running(comfyui, base) as server:
            yield server
    finally:
        subprocess.run(["umount", "-l", str(disk)], capture_output=True)
