"""Frames to files and back, and what is left behind when something goes wrong."""

import gc
import os
import weakref
from contextlib import suppress

import av
import numpy as np
import pytest
import torch

from sf_core.video import check_destination, contact_sheet, destination, fitted, read_video, save_video

NAMES = ["clip.mp4", "clip.webm", "clip.gif", "clip/"]
LOSS = {"clip.mp4": 0.02, "clip.webm": 0.02, "clip.gif": 0.01, "clip/": 1 / 255}  # mean error


def moving_square(frames=12, height=48, width=64):
    """A red square on blue that moves two pixels a frame: [T, H, W, 3]."""
    clip = torch.tensor([0.1, 0.1, 0.6]).repeat(frames, height, width, 1)
    for t in range(frames):
        clip[t, 16:32, 4 + 2 * t : 20 + 2 * t] = torch.tensor([0.9, 0.1, 0.1])
    return clip


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_can_be_read(tmp_path, name):
    clip = moving_square()
    assert save_video(f"{tmp_path}/{name}", clip, fps=16) == len(clip)
    read = read_video(tmp_path / name)
    assert torch.equal(read_video(tmp_path / name, most=2), read[:2])
    assert read.shape == clip.shape and read.dtype == torch.float32
    assert (read - clip).abs().mean() < LOSS[name]
    assert os.listdir(tmp_path) == [name.strip("/")]


@pytest.mark.parametrize(("fps", "numbers"), [(32, [0, 2, 4, 6, 8, 10]), (8, [0, 0, 1, 1, 2, 2]), (16.5, range(12))])
def test_a_video_of_another_rate_keeps_its_speed(tmp_path, fps, numbers):
    save_video(tmp_path / "clip.mp4", moving_square(), fps=fps)
    read = read_video(tmp_path / "clip.mp4")
    assert torch.equal(read_video(tmp_path / "clip.mp4", len(numbers), fps=16), read[list(numbers)])
    save_video(f"{tmp_path}/frames/", moving_square(), fps=fps)
    assert len(read_video(tmp_path / "frames", fps=16)) == 12  # a folder has no rate


def test_a_video_is_fitted_as_it_is_read(tmp_path):
    save_video(tmp_path / "clip.mp4", moving_square(), fps=16)
    read = read_video(tmp_path / "clip.mp4", size=(32, 32))
    torch.testing.assert_close(read, fitted(read_video(tmp_path / "clip.mp4"), 32, 32))


def test_a_gif_keeps_the_colours_of_small_things(tmp_path):
    """Sixteen patches of four pixels in pure colours, on grain that has all the others."""
    generator = torch.Generator().manual_seed(0)
    clip = 0.25 + 0.5 * torch.rand(1, 64, 64, 3, generator=generator)
    colours = 0.05 + 0.9 * torch.rand(4, 4, 3, generator=generator).round()
    for y, x in ((2, 2), (2, 3), (3, 2), (3, 3)):
        clip[0, y::16, x::16] = colours
    save_video(tmp_path / "clip.gif", clip)
    assert (read_video(tmp_path / "clip.gif")[0, 2::16, 2::16] - colours).abs().amax() < 0.02


def test_mp4_is_what_every_player_plays(tmp_path):
    save_video(tmp_path / "clip.mp4", moving_square(), fps=16)
    with av.open(str(tmp_path / "clip.mp4")) as file:
        stream = file.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 16 and stream.frames == 12


@pytest.mark.parametrize("name", NAMES)
def test_pieces_of_any_size_make_the_same_file(tmp_path, name):
    clip = moving_square()
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    whole.mkdir()
    pieces.mkdir()
    save_video(f"{whole}/{name}", clip)
    save_video(f"{pieces}/{name}", iter(clip.split([5, 1, 6])))
    assert torch.equal(read_video(whole / name), read_video(pieces / name))


@pytest.mark.parametrize("name", NAMES)
def test_frames_are_let_go_once_written(tmp_path, name):
    made = []

    def pieces():
        for _ in range(6):
            piece = torch.rand(2, 16, 16, 3)
            made.append(weakref.ref(piece))
            yield piece
            del piece
            assert sum(reference() is not None for reference in made) <= 1

    save_video(f"{tmp_path}/{name}", pieces())
    assert len(made) == 6


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_nothing(tmp_path, name, stop):
    def pieces():
        yield moving_square()
        raise stop

    with pytest.raises(stop):
        save_video(f"{tmp_path}/{name}", pieces())
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_what_was_made_before_a_failure_can_be_kept(tmp_path, name, stop):
    def pieces():
        yield moving_square(5)
        raise stop

    with pytest.raises(stop):
        save_video(f"{tmp_path}/{name}", pieces(), keep=True)
    assert len(read_video(tmp_path / name)) == 5
    assert os.listdir(tmp_path) == [name.strip("/")]


def test_what_a_stopped_video_was_made_with_is_freed_at_once(tmp_path):
    class Cache:
        pass

    made = []

    def pieces():
        cache = Cache()
        made.append(weakref.ref(cache))
        yield moving_square(3)
        raise KeyboardInterrupt

    gc.disable()  # without waiting for it
    try:
        with suppress(KeyboardInterrupt):
            save_video(tmp_path / "clip.mp4", pieces(), keep=True)
        assert made[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("name", NAMES)
def test_a_failure_before_the_first_frame_leaves_nothing_to_keep(tmp_path, name):
    def pieces():
        raise RuntimeError("the real reason")
        yield

    with pytest.raises(RuntimeError, match="the real reason"):
        save_video(f"{tmp_path}/{name}", pieces(), keep=True)
    assert os.listdir(tmp_path) == []


def test_metadata_is_kept_in_the_container(tmp_path):
    save_video(tmp_path / "clip.mp4", moving_square(3), metadata={"prompt": '{"1": "a red circle"}'})
    with av.open(str(tmp_path / "clip.mp4")) as file:
        assert file.metadata["prompt"] == '{"1": "a red circle"}'


@pytest.mark.parametrize("name", NAMES)
def test_a_failure_keeps_the_earlier_video(tmp_path, name):
    save_video(f"{tmp_path}/{name}", moving_square())
    before = read_video(tmp_path / name)

    def pieces():
        yield 1 - moving_square()
        raise RuntimeError

    with pytest.raises(RuntimeError):
        save_video(f"{tmp_path}/{name}", pieces())
    assert torch.equal(read_video(tmp_path / name), before)
    assert os.listdir(tmp_path) == [name.strip("/")]


@pytest.mark.parametrize("name", NAMES)
def test_an_earlier_video_is_replaced(tmp_path, name):
    save_video(f"{tmp_path}/{name}", moving_square(12))
    save_video(f"{tmp_path}/{name}", moving_square(5))
    assert len(read_video(tmp_path / name)) == 5


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="new or an empty folder"):
        save_video(f"{tmp_path}/", moving_square())
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_a_name_without_suffix_is_a_folder(tmp_path):
    save_video(tmp_path / "frames", moving_square(3))
    assert sorted(os.listdir(tmp_path / "frames")) == ["frame_00000.png", "frame_00001.png", "frame_00002.png"]


@pytest.mark.parametrize("name", ["clip.avi", "clip.png", "clip"])
def test_impossible_names_say_what_to_use(tmp_path, name):
    (tmp_path / "clip").write_text("a file, not a folder")
    with pytest.raises((ValueError, OSError), match=r"\.mp4, \.webm or \.gif|new or an empty folder"):
        check_destination(tmp_path / name)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="Make it first"):
        check_destination(tmp_path / "missing" / "clip.mp4")


def test_a_folder_that_cannot_be_written_to_is_told(tmp_path, monkeypatch):
    def refuse(path, *_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(destination.os, "open", refuse)
    with pytest.raises(PermissionError, match="Read-only file system.*another folder"):
        check_destination(tmp_path / "clip.mp4")


def test_a_missing_codec_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(av, "codecs_available", set())
    with pytest.raises(ValueError, match="libx264.*use .gif"):
        check_destination(tmp_path / "clip.mp4")
    check_destination(tmp_path / "clip.gif")


@pytest.mark.parametrize("name", NAMES)
def test_no_frames_is_an_error(tmp_path, name):
    with pytest.raises(ValueError, match="at least one"):
        save_video(f"{tmp_path}/{name}", iter([]))
    assert os.listdir(tmp_path) == []


def test_odd_sizes_are_refused_where_the_codec_cannot(tmp_path):
    with pytest.raises(ValueError, match="even sizes"):
        save_video(tmp_path / "clip.mp4", torch.rand(2, 15, 16, 3))
    save_video(tmp_path / "clip.gif", torch.rand(2, 15, 16, 3))
    assert os.listdir(tmp_path) == ["clip.gif"]


@pytest.mark.parametrize("fps", [0, -1, 5000])
def test_impossible_rates_are_refused(tmp_path, fps):
    with pytest.raises(ValueError, match="1 to 1000"):
        save_video(tmp_path / "clip.mp4", moving_square(), fps)


def test_frames_of_another_shape_are_refused(tmp_path):
    with pytest.raises(ValueError, match="height, width, 3"):
        save_video(tmp_path / "clip.mp4", torch.rand(1, 3, 16, 16))


def test_an_empty_folder_holds_no_video(tmp_path):
    with pytest.raises(ValueError, match="no frames"):
        read_video(tmp_path)


def test_contact_sheet_shows_every_frame_in_order():
    colours = torch.eye(3)[:, None, None, :].expand(3, 16, 16, 3)
    sheet = contact_sheet(colours, labels=[0, 5, 9], columns=2)
    pixels = torch.from_numpy(np.array(sheet)).long()  # [H, W, 3]
    tile, line, gap = 128, 16, 4
    for i, colour in enumerate(torch.eye(3)):
        row, column = divmod(i, 2)
        y = row * (tile + line + gap) + line + tile // 2
        x = gap + column * (tile + gap) + tile // 2
        assert torch.equal(pixels[y, x], (colour * 255).long())
    assert sheet.size == (2 * (tile + gap) + gap, 2 * (tile + line + gap) + gap)
