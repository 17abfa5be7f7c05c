"""Self Forcing Stream in a server that is killed: what was made so far is a file that plays."""

import signal
import time

import pytest

from tests.host.server import running

FRAMES = 20_001


def stream_prompt(file: str) -> dict:
    """A video that takes minutes, written to `file`."""

    def node(name: str, **inputs) -> dict:
        return {"class_type": f"SelfForcing{name}", "inputs": inputs}

    size = {"width": 64, "height": 64, "frames": FRAMES, "seconds": 0.0, "fps": 16.0, "batch_size": 1}
    return {
        "1": node("LoadTiny"),
        "2": node("Prompt", clip=["1", 1], text="a red circle bounces"),
        "3": node("Latent", **size),
        "4": node(
            "Stream", model=["1", 0], positive=["2", 0], latent=["3", 0], vae=["1", 2], seed=0, fps=16.0,
            preset="auto", file=file, keep=81, steps=0, chunk=0, window=0, sink=-1,
        ),
    }  # fmt: skip


def frames_in(path) -> int:
    import av

    with av.open(str(path)) as video:
        return sum(1 for _ in video.decode(video=0))


@pytest.mark.parametrize(
    ("how", "seconds"),
    [(signal.SIGKILL, 0.2), (signal.SIGKILL, 1.0), (signal.SIGKILL, 3.0), (signal.SIGTERM, 0.5), (signal.SIGINT, 2.0)],
)
def test_a_killed_server_leaves_a_file_that_plays(pack, comfyui, tmp_path, how, seconds):
    from any_folder_name.sf_core.video import recover

    with running(comfyui, tmp_path) as server:
        server.queue(stream_prompt("video/x"))
        folder, deadline = tmp_path / "output" / "video", time.monotonic() + 120
        while not (folder.is_dir() and any(path.stat().st_size > 2000 for path in folder.iterdir())):
            assert time.monotonic() < deadline, "nothing was written"
            time.sleep(0.05)
        time.sleep(seconds)
        server.process.send_signal(how)
        if how == signal.SIGINT:
            time.sleep(1)
            server.process.kill()
        server.process.wait(60)
    (left,) = [path for path in folder.iterdir() if not path.name.startswith(".")]
    assert left.name.startswith("x_00001_") and left.suffix == ".mp4"
    made = frames_in(left)
    assert 8 <= made < FRAMES  # the first chunk, but for its last frame
    recovered = recover(folder) or [left]  # what the next run in that folder does
    assert frames_in(recovered[0]) >= made - 1
    assert [path.name for path in folder.iterdir()] == [recovered[0].name]
