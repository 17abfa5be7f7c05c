"""Clips, pictures and folders are read as a player or viewer shows them."""

import os
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image

from sf_core.video import open_clip, read_video, save_video
from sf_core.video.clip import _orientation

RED, BLUE = (255, 0, 0), (0, 0, 255)


def film(path, images, times=None, rate=16, aspect=None, colours=(2, 0), transfer=None):
    """An H.264 file of uint8 images, shown from `times` (seconds) on."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=rate, options={"crf": "1"})
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.colorspace, context.color_range = colours
        if transfer:
            context.color_trc = transfer
        if aspect:
            context.sample_aspect_ratio = aspect
        if times:
            context.time_base = Fraction(1, 90000)
        for i, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if colours[0] != 2:
                if colours[0] not in list(Colorspace):
                    pytest.skip("this PyAV cannot make such a clip")
                frame = frame.reformat(
                    format="yuv420p", dst_colorspace=Colorspace(colours[0]), dst_color_range=ColorRange(colours[1])
                )
                frame.colorspace, frame.color_range = colours
            if times:
                frame.pts, frame.time_base = round(times[i] * 90000), Fraction(1, 90000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def plain(colour, height=64, width=64):
    return np.full((height, width, 3), colour, np.uint8)


def halves():
    """Red above blue: [96, 64, 3]."""
    return np.concatenate([plain(RED, 48), plain(BLUE, 48)])


def turned(path, matrix):
    """Gives an mp4 a display matrix."""
    data = bytearray(path.read_bytes())
    a, b, c, d = (value << 16 for value in matrix)
    struct.pack_into(">9i", data, data.find(b"tkhd") + 44, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def near(pixel, colour, by=0.03):
    return torch.allclose(pixel, torch.tensor(colour) / 255, atol=by)


@pytest.mark.parametrize(
    ("times", "duration"),
    [
        ([i / 30 for i in range(60)] + [2 + i / 15 for i in range(30)], 4.0),
        ([i / 32 for i in range(16)] + [0.5 + i / 2 for i in range(8)], 4.5),
        ([0, 1, 1.25], 1.28),
    ],
)
def test_a_clip_of_changing_rate_keeps_its_times(tmp_path, times, duration):
    film(tmp_path / "clip.mp4", [plain(int(250 * t / max(times))) for t in times], times, 30)
    clip = open_clip(tmp_path / "clip.mp4")
    read = read_video(tmp_path / "clip.mp4", fps=16)
    assert (
        len(read) == clip.count(16) and abs(len(read) / 16 - duration) < 0.5
    )  # muxers differ in how long the last one is held
    shown = [max(t for t in times if t <= i / 16 + 1e-3) / max(times) * 250 / 255 for i in range(len(read))]
    assert np.abs(read.mean((1, 2, 3)).numpy() - shown).max() < 0.02
    assert clip.count() == len(times) == len(read_video(tmp_path / "clip.mp4"))


@pytest.mark.parametrize("name", ["held.gif", "held.png", "held.webp"])
def test_an_animation_holds_its_pictures_as_long_as_it_says(tmp_path, name):
    images = [Image.new("RGB", (16, 16), (level,) * 3) for level in (0, 100, 200)]
    options = {"lossless": True} if name == "held.webp" else {}
    images[0].save(tmp_path / name, save_all=True, append_images=images[1:], duration=[100, 500, 200], **options)
    clip = open_clip(tmp_path / name)
    assert (clip.kind, clip.width, clip.height) == ("animation", 16, 16) and clip.duration == pytest.approx(0.8)
    levels = (read_video(tmp_path / name, fps=10)[:, 0, 0, 0] * 255).round().int().tolist()
    assert levels == [0, 100, 100, 100, 100, 100, 200, 200] and clip.count(10) == 8
    assert len(read_video(tmp_path / name)) == 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["photo.jpg", "photo.png"])
def test_a_photo_is_turned_as_it_says(tmp_path, orientation, name):
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's names of what the viewer's turn undoes
    want = Image.fromarray(halves())
    stored = want if orientation == 1 else want.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / name, exif=exif, quality=95)
    read = read_video(tmp_path / name)[0]
    clip = open_clip(tmp_path / name)
    assert read.shape == (96, 64, 3) and (clip.height, clip.width) == (96, 64)
    assert near(read[8, 32], RED) and near(read[88, 32], BLUE)


@pytest.mark.parametrize(
    ("matrix", "shape", "red", "blue"),
    [
        ((0, 1, -1, 0), (64, 96), (32, 90), (32, 5)),
        ((0, -1, 1, 0), (64, 96), (32, 5), (32, 90)),
        ((-1, 0, 0, -1), (96, 64), (90, 32), (5, 32)),
        ((1, 0, 0, -1), (96, 64), (90, 32), (5, 32)),
    ],
)
def test_a_clip_is_turned_by_its_display_matrix(tmp_path, matrix, shape, red, blue):
    film(tmp_path / "clip.mp4", [halves()] * 3)
    turned(tmp_path / "clip.mp4", matrix)
    read, clip = read_video(tmp_path / "clip.mp4"), open_clip(tmp_path / "clip.mp4")
    assert read.shape[1:3] == shape == (clip.height, clip.width)
    assert near(read[0][red], RED, 0.06) and near(read[0][blue], BLUE, 0.06)


def test_pixels_that_are_not_square_are_made_so(tmp_path):
    film(tmp_path / "clip.mp4", [plain(100)] * 3, aspect=Fraction(3, 2))
    assert read_video(tmp_path / "clip.mp4").shape == (3, 64, 96, 3)
    assert open_clip(tmp_path / "clip.mp4").width == 96


@pytest.mark.parametrize("colours", [(1, 1), (5, 1), (9, 1), (1, 2), (5, 2)])
def test_a_clip_is_read_with_its_own_matrix_and_range(tmp_path, colours):
    film(tmp_path / "clip.mp4", [plain((200, 30, 60))] * 3, colours=colours)
    assert near(read_video(tmp_path / "clip.mp4")[1, 32, 32], (200, 30, 60), 0.02)


@pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG")])
def test_high_dynamic_range_is_refused(tmp_path, transfer, name):
    film(tmp_path / "clip.mp4", [plain(100)] * 3, colours=(9, 1), transfer=transfer)
    with pytest.raises(ValueError, match=f"high dynamic range .{name}.*Convert it"):
        read_video(tmp_path / "clip.mp4")


def test_what_is_transparent_lies_on_white(tmp_path):
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[..., 1] = 255
    pixels[:4] = (255, 0, 0, 128)
    Image.fromarray(pixels).save(tmp_path / "alpha.png")
    read = read_video(tmp_path / "alpha.png")[0]
    assert near(read[0, 0], (255, 127, 127), 0.001) and near(read[7, 0], (255, 255, 255), 0)


def test_pictures_of_more_than_8_bits_keep_their_values(tmp_path):
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "float.tif")
    Image.fromarray((values * 65535).astype(np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray((values * 65535).astype(np.uint16)).save(tmp_path / "deep.tif")
    for name, by in (("float.tif", 0), ("deep.png", 2e-5), ("deep.tif", 2e-5)):
        read = read_video(tmp_path / name)[0]
        assert np.abs(read.numpy() - values[..., None]).max() <= by, name


def test_a_colour_png_of_16_bits_keeps_its_values(tmp_path):
    values = np.arange(8 * 8 * 3, dtype=np.uint16).reshape(8, 8, 3) * 300
    encoder = av.CodecContext.create("png", "w")
    encoder.width = encoder.height = 8
    encoder.pix_fmt, encoder.time_base = "rgb48be", Fraction(1, 1)
    frame = av.VideoFrame.from_ndarray(values, format="rgb48le").reformat(format="rgb48be")
    (tmp_path / "deep.png").write_bytes(b"".join(map(bytes, [*encoder.encode(frame), *encoder.encode(None)])))
    assert np.abs(read_video(tmp_path / "deep.png")[0].numpy() * 65535 - values).max() < 1


def test_a_folder_is_read_in_natural_order_without_its_litter(tmp_path):
    for i in range(12):
        Image.new("RGB", (8, 8), (i * 20,) * 3).save(tmp_path / f"f{i}.{('png', 'PNG', 'bmp', 'TIFF')[i % 4]}")
    (tmp_path / "._f3.png").write_bytes(b"\0\5\x16\7" + bytes(99))
    for name in ("Thumbs.db", ".DS_Store", "desktop.ini", "notes.txt"):
        (tmp_path / name).write_bytes(b"litter")
    clip = open_clip(tmp_path)
    assert (clip.kind, clip.count(16), clip.width) == ("folder", 12, 8)
    assert (read_video(tmp_path)[:, 0, 0, 0] * 255).round().tolist() == [i * 20 for i in range(12)]


def test_what_a_file_is_goes_by_its_content(tmp_path):
    film(tmp_path / "a.mp4", [plain(100)] * 3)
    os.rename(tmp_path / "a.mp4", tmp_path / "a.png")
    Image.new("RGB", (8, 8), RED).save(tmp_path / "b.gif")
    Image.new("RGB", (8, 8), RED).save(tmp_path / "c.mp4", "PNG")
    kinds = [open_clip(tmp_path / name).kind for name in ("a.png", "b.gif", "c.mp4")]
    assert kinds == ["film", "picture", "picture"] and len(read_video(tmp_path / "a.png")) == 3
    assert near(read_video(tmp_path / "c.mp4")[0, 0, 0], RED, 0)


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + bytes(64)
M3U8 = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nother.ts\n#EXT-X-ENDLIST\n"
PNG = b"\x89PNG\r\n\x1a\n" + bytes(40)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("page.jpg", b"<html>404</html>", "save it as mp4 or PNG|holds no pictures"),
        ("empty.mp4", b"", "save it as mp4 or PNG"),
        ("photo.jpg", HEIC, "HEIC.*pip install pillow-heif"),
        ("list.mp4", M3U8, "save it as mp4 or PNG|holds no pictures"),
        ("cut.png", PNG, "holds no frames|Save it again"),
        ("notes.txt", b"words\n" * 200, "save it as mp4 or PNG|holds no pictures"),
    ],
)
def test_what_cannot_be_read_is_told_in_a_sentence(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises((OSError, ValueError), match=words):
        read_video(tmp_path / name)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "photo.png", "photo.jpg", "photo.tif"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_file_that_was_cut_is_told_or_read_in_part(tmp_path, name, share):
    noise = torch.rand(12, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    if name.startswith("clip"):
        save_video(tmp_path / name, noise)
    else:
        Image.fromarray((noise[0] * 255).byte().numpy()).save(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(share * len(data))])
    try:
        assert 0 < len(read_video(tmp_path / name)) <= 12
    except (OSError, ValueError) as error:
        assert str(error).startswith("Got ")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="not there"):
        open_clip(tmp_path / "clip.mp4")


def test_no_more_is_decoded_than_is_taken(tmp_path, monkeypatch):
    from sf_core.video import clip as module

    film(tmp_path / "clip.mp4", [plain(i) for i in range(100)])
    decoded, real = [], module._shown
    monkeypatch.setattr(module, "_shown", lambda *given: decoded.append(1) or real(*given))
    clip = open_clip(tmp_path / "clip.mp4")
    assert len(next(clip.frames())) == 16 and len(decoded) <= 18
    seen = []
    read_video(tmp_path / "clip.mp4", most=20, on_frame=seen.append)
    assert seen == [16, 4] and len(decoded) <= 40
    assert sum(map(len, clip.frames(fps=8, size=(32, 32)))) == clip.count(8) == 50


@pytest.mark.parametrize("matrix", [(0, 1, -1, 0), (0, -1, 1, 0), (-1, 0, 0, -1), (1, 0, 0, 1)])
def test_side_data_that_this_pyav_has_no_name_for_hides_no_rotation(tmp_path, matrix):
    class Frame:
        @property
        def side_data(self):
            raise ValueError("31 is not a valid Type")

    film(tmp_path / "clip.mp4", [halves()])
    turned(tmp_path / "clip.mp4", matrix)
    with av.open(str(tmp_path / "clip.mp4")) as file:
        frame, other = next(file.decode(video=0)), Frame()
    other.rotation = frame.rotation
    assert _orientation(other) == _orientation(frame)


def edited(path, entries):
    """Gives an mp4 an edit list of (frames of duration, first media time in frames, -1 for an empty one) at 16 fps."""
    data = path.read_bytes()
    timescale = int.from_bytes(data[(at := data.find(b"mvhd") + 16) : at + 4], "big")
    media = int.from_bytes(data[(at := data.find(b"mdhd") + 16) : at + 4], "big")
    start = data.find(b"edts") - 4
    end = start + int.from_bytes(data[start : start + 4], "big")
    body = b"".join(
        struct.pack(">IiI", length * timescale // 16, first * media // 16 if first >= 0 else -1, 1 << 16)
        for length, first in entries
    )
    elst = struct.pack(">I4sII", 16 + len(body), b"elst", 0, len(entries)) + body
    edts = struct.pack(">I4s", 8 + len(elst), b"edts") + elst
    grown, data = len(edts) - (end - start), bytearray(data[:start] + edts + data[end:])
    for name in (b"moov", b"trak"):  # the sizes of what it lies in
        at = data.find(name) - 4
        data[at : at + 4] = (int.from_bytes(data[at : at + 4], "big") + grown).to_bytes(4, "big")
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("entries", "numbers"),
    [
        ([(16, 0)], range(16)),
        ([(8, 4)], range(4, 12)),
        ([(12, 4)], range(4, 16)),
        ([(4, 12)], range(12, 16)),
        ([(8, -1), (16, 0)], range(16)),
        ([(4, 0), (4, 8)], [0, 1, 2, 3, 8, 9, 10, 11]),
    ],
)
def test_an_edit_list_shows_what_a_player_shows(tmp_path, entries, numbers):
    shades = [plain((16 * i,) * 3) for i in range(16)]
    with av.open(str(tmp_path / "clip.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=16, options={"crf": "1", "bf": "0", "g": "4"})
        stream.height = stream.width = 64
        stream.pix_fmt = "yuv420p"
        for shade in shades:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(shade, format="rgb24")))
        file.mux(stream.encode())
    edited(tmp_path / "clip.mp4", entries)
    clip = open_clip(tmp_path / "clip.mp4")
    for fps in (None, 16):
        read = read_video(tmp_path / "clip.mp4", fps=fps)
        seen = [round(float(frame.mean()) * 255 / 16) for frame in read]
        assert seen == list(numbers) and clip.count(fps) == len(seen)
