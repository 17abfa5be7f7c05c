"""The shipped parts of the built-in model: they load, understand prompts and follow them, or say what is wrong."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from sf_core import tiny
from sf_core.cli import evaluate
from sf_core.cli.main import main
from sf_core.sampling.config import PRESETS
from sf_core.sampling.noise import SeededNoise
from sf_core.tiny import data, detect
from sf_core.tiny.autoencoder import LatentDenoiser
from tests.core.rolling import roll_out


@pytest.fixture(scope="module")
def text():
    return tiny.load_text_encoder()


def test_shipped_model_follows_prompts(text):
    clips, prompts = evaluate.ask(24, seed=1)
    videos = evaluate.generate(tiny.load_transformer(), tiny.load_autoencoder(), text.encode(prompts), seed=7)
    scores = evaluate.score(videos, clips)[0]
    assert scores["colour"] >= 0.95 and scores["background"] >= 0.95
    assert scores["shape"] >= 0.75 and scores["motion"] >= 0.7
    assert scores["residual"] < 0.05


def test_a_video_that_starts_from_a_picture_shows_it_and_follows_the_prompt(text):
    clips, prompts = evaluate.ask(16, seed=2)
    vae, picture = tiny.load_autoencoder(), data.render(clips, 1)  # [B, 1, 64, 64, 3]
    prompt, noise = text.encode(prompts), SeededNoise(0)
    latents = roll_out(tiny.load_transformer(), PRESETS["tiny"], prompt, noise, 10, 8, 8, prefix=vae.encode(picture))
    frames = vae.decode(latents)[:, : evaluate.WINDOW]
    assert (frames[:, 0] - picture[:, 0]).abs().mean() < 0.03
    shares = {name: found.float().mean() for name, found in detect.matches(detect.read(frames), clips).items()}
    assert min(shares["colour"], shares["background"]) >= 0.9 and min(shares["shape"], shares["motion"]) >= 0.75


def test_a_background_that_is_not_named_is_black(text):
    prompts = text.encode(["a red circle moves right"] * 2)
    videos = evaluate.generate(tiny.load_transformer(), tiny.load_autoencoder(), prompts)
    assert detect.read_background(next(videos)).tolist() == [0, 0]


def test_weights_are_small():
    assert sum((tiny.WEIGHTS / f"{part}.safetensors").stat().st_size for part in tiny.PARTS) < 8e6


def test_prompts_are_padded_with_zeros_and_read_without_case(text):
    embeds = text.encode(["A RED circle!", "a red circle"])
    assert embeds.shape == (2, 16, 128)
    assert torch.equal(embeds[0], embeds[1])
    assert embeds[:, 3:].abs().max() == 0 and embeds[:, :3].abs().amax(-1).min() > 0
    assert text.null(3).shape == (3, 16, 128) and not text.null(3).any()


def test_unknown_words_are_left_out_and_told(text):
    assert torch.equal(text.encode(["a shiny red circle, please"]), text.encode(["a red circle"]))
    assert text.unknown("a shiny red circle, please") == ["shiny", "please"]


def test_long_prompts_are_cut_and_told(text):
    prompt = "red circle " * 10
    assert text.encode([prompt]).shape == (1, 16, 128)
    assert len(text.truncated(prompt)) == 4 and text.truncated("a red circle") == []


@pytest.mark.parametrize("prompt", ["", "   ", "\N{PARTY POPPER}", "dragon", "a dragon in the castle", "x" * 5000])
def test_prompts_that_describe_nothing_are_refused(text, prompt):
    with pytest.raises(ValueError, match=r"Got the prompt .*recognises nothing.*circle.*Describe one shape") as error:
        text.encode([prompt])
    assert len(str(error.value)) < 800


def test_missing_weights_are_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="Got no file .*nowhere.safetensors.*train tiny"):
        tiny.load_transformer(path=tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("part", tiny.PARTS)
def test_corrupt_weights_are_told(tmp_path, part):
    whole = (tiny.WEIGHTS / f"{part}.safetensors").read_bytes()
    load = dict(zip(tiny.PARTS, (tiny.load_transformer, tiny.load_autoencoder, tiny.load_text_encoder)))
    for content in (whole[: len(whole) // 2], b"", b"not weights at all", bytes(100)):
        broken = tmp_path / f"{part}.safetensors"
        broken.write_bytes(content)
        with pytest.raises(ValueError, match="not a whole safetensors file.*train tiny"):
            load[part](path=broken)


def test_a_part_in_place_of_another_is_told(tmp_path):
    other = tmp_path / "other.safetensors"
    shutil.copy(tiny.WEIGHTS / "text_encoder.safetensors", other)
    with pytest.raises(ValueError, match="do not fit|metadata entry"):
        tiny.load_autoencoder(path=other)
    with pytest.raises(ValueError, match="metadata entry 'wan'"):
        tiny.load_transformer(path=other)


def test_evaluation_prints_a_table_and_a_sheet(tmp_path):
    sheet = tmp_path / "sheet.png"
    assert main(["evaluate", "--prompts", "2", "--sheet", str(sheet)]) == 0
    assert sheet.stat().st_size > 1000


@pytest.mark.parametrize(
    "arguments, message",
    [(["--prompts", "0"], "whole number from 1"), (["--sheet", "nowhere/sheet.png"], "a folder that exists"),
     (["--model", "nowhere.safetensors"], "Got no file nowhere.safetensors")],
)  # fmt: skip
def test_evaluation_refuses_impossible_requests(capsys, arguments, message):
    assert main(["evaluate", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_blur_lowers_sharpness_and_size_does_not():
    clips = data.draw(8, torch.Generator().manual_seed(0))
    frames = data.render(clips, 2)
    blurred = torch.nn.functional.avg_pool2d(frames.flatten(0, 1).movedim(-1, 1), 3, 1).movedim(1, -1)
    sharp, soft = detect.sharpness(frames), detect.sharpness(blurred.unflatten(0, (8, 2)))
    assert (soft < 0.7 * sharp).all()
    assert detect.sharpness(frames.repeat(1, 1, 2, 2, 1)) == pytest.approx(sharp, rel=0.1)


def uneven(across: float, within: float) -> torch.Tensor:
    """A picture [64, 64, 1] whose neighbours differ by so much across the lines between latent pixels and elsewhere."""
    place = torch.arange(1, data.SIZE)
    steps = torch.where(place % 8 == 0, across, within) * (-1.0) ** (place + place // 8)
    ramp = torch.cat([torch.zeros(1), steps.cumsum(0)])
    return (ramp[:, None] + ramp)[..., None]


@pytest.mark.parametrize("background", data.BACKGROUNDS)
def test_grid_and_spread_of_a_background_are_those_it_was_given(background):
    """On checkers too, whose tiles are no grid; the shape does not count."""
    clips = replace(
        data.draw(2, torch.Generator().manual_seed(0)),
        background=torch.tensor([data.BACKGROUNDS.index(background)] * 2),
    )
    frames = data.render(clips, 3)
    assert detect.grid(frames, clips).tolist() == pytest.approx([1, 1], abs=0.01)
    assert detect.spread(frames, clips).tolist() == pytest.approx([0, 0], abs=0.01)
    unseen = 0.5 / 255
    for across, within in ((0.02, 0.005), (0.005, 0.005), (0.004, 0.02)):
        given = detect.grid(frames + uneven(across, within), clips)
        assert given.tolist() == pytest.approx([(across + unseen) / (within + unseen)] * 2, rel=0.03)
    squares = 0.03 * (-1.0) ** (torch.arange(data.SIZE) // 8)
    spread = detect.spread(frames + (squares[:, None] * squares / 0.03)[..., None], clips)
    assert spread.tolist() == pytest.approx([255 * 0.03] * 2, rel=0.05)


def test_shapes_are_found_where_they_were_drawn():
    clips = data.draw(8, torch.Generator().manual_seed(3))
    x, y, scale = data.trajectory(clips, torch.arange(9.0))
    radius = torch.tensor(list(data.SIZES.values()))[clips.size][:, None] * scale
    for frames, off in ((data.render(clips, 9), 0.02), (tiny.load_autoencoder().decode(encoded(clips)), 1.0)):
        found = detect.fit_shapes(frames, clips)
        for one, drawn in zip(found, (x, y, radius), strict=True):
            apart = (one - drawn + data.SIZE / 2) % data.SIZE - data.SIZE / 2
            assert apart.abs().max() < off


def encoded(clips: data.Clips) -> torch.Tensor:
    return tiny.load_autoencoder().encode(data.render(clips, 9))


def test_backgrounds_of_rollouts_are_nearly_flat(text):
    clips, prompts = evaluate.ask(20, seed=0)
    videos = evaluate.generate(tiny.load_transformer(), tiny.load_autoencoder(), text.encode(prompts))
    scores = evaluate.score(videos, clips)[0]
    assert scores["grid"] <= 1.8 and scores["spread"] <= 2  # 5.6 and 4.3 without the denoiser


@torch.no_grad()
def test_a_new_denoiser_sets_latents_near_even_ones_to_these_and_leaves_others():
    denoiser = LatentDenoiser()
    vae = tiny.load_autoencoder()
    still = data.surfaces()[:, None, None, None].expand(-1, 1, 8, 8, 3)
    denoiser.surfaces.copy_(vae.encode(still).flatten(1))
    denoiser.scale.fill_(10)
    generator = torch.Generator().manual_seed(0)
    even = denoiser.surfaces[torch.randint(14, (1, 4, 8, 8), generator=generator)].movedim(-1, 2)  # [1, 4, C, 8, 8]
    noise = torch.randn(even.shape, generator=generator)
    near, flat, _ = denoiser(even + 0.1 * noise, None)
    far, other, _ = denoiser(even + 100 * noise, None)
    assert torch.allclose(near, even, atol=1e-2) and flat.min() > 0.99
    assert torch.allclose(far, even + 100 * noise, atol=0.1) and other.max() < 0.01


def test_a_model_is_evaluated_as_its_file_says_it_is_sampled(tmp_path, capsys):
    """With the words that were trained along, beside it."""
    state, metadata = tiny.read(tiny.WEIGHTS / "transformer.safetensors")
    frame_wise = {**json.loads(metadata["sampling"]), "chunk": 1}
    save_file(state, tmp_path / "model.safetensors", {**metadata, "sampling": json.dumps(frame_wise)})
    words, about = tiny.read(tiny.WEIGHTS / "text_encoder.safetensors")
    save_file({name: torch.zeros_like(value) for name, value in words.items()}, tmp_path / "t.safetensors", about)
    results = {}
    for name in ("model.safetensors", "text_encoder.safetensors"):
        if name.startswith("text"):
            (tmp_path / "t.safetensors").rename(tmp_path / name)
        assert main(["evaluate", "--prompts", "2", "--json", "--model", str(tmp_path / "model.safetensors")]) == 0
        results[name] = json.loads(capsys.readouterr().out)[0]["windows"][0]["residual"]
    assert main(["evaluate", "--prompts", "2", "--json"]) == 0
    chunk_wise = json.loads(capsys.readouterr().out)[0]["windows"][0]["residual"]
    assert len({chunk_wise, *results.values()}) == 3
