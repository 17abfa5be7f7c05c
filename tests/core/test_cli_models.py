"""generate and info with small random files in the formats of the real ones."""

import gc
import json
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sf_core import memory, pipeline
from sf_core.autoencoders import taehv, wan_vae
from sf_core.checkpoints.load import dequantised, load_checkpoint
from sf_core.cli import generate
from sf_core.cli.main import main
from sf_core.pipeline import FilePipeline, ModelFiles, Runtime, load_fp8_model
from sf_core.sampling.families import FAMILIES
from sf_core.sampling.noise import SeededNoise
from sf_core.sampling.plan import Plan
from sf_core.video import read_video
from sf_core.wan.attention import sdpa
from sf_core.wan.config import WanConfig
from sf_core.wan.fp8 import E4M3, Fp8Linear
from tests.core import test_checkpoint as checkpoints
from tests.core import test_text as texts
from tests.core import test_vae as vaes
from tests.core.regenerate import weights
from tests.core.rolling import roll_out
from tests.core.test_cli import refused
from tests.core.test_text import spiece, wan  # noqa: F401  fixtures

ROOT = Path(__file__).parents[2]
PROMPT = "a red circle moves right"
SIZE = ("--width", "32", "--height", "48", "--frames", "13")
TAEHV = taehv.Layout(widths=(16, 12, 8, 8), encoder_width=8)


def taehv_state(layout=TAEHV):
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in taehv.TAEHV(layout).state_dict().items()}
    return weights(shapes, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, spiece, wan):  # noqa: F811
    """The files a user has, small: models, an autoencoder of each kind, the text encoder with and without tokenizer."""
    folder = tmp_path_factory.mktemp("files")
    state = checkpoints.weights()
    torch.save({"generator_ema": checkpoints.fsdp(state), "step": 3}, folder / "self_forcing_dmd.pt")
    half = {name: tensor.bfloat16() for name, tensor in state.items()}
    save_file(half, folder / "longlive.safetensors", checkpoints.CAUSAL)
    quantised, scales = checkpoints.float8(half)
    save_file(quantised | checkpoints.legacy(scales, False)[0], folder / "self_forcing_fp8_scaled.safetensors")
    torch.save(vaes.autoencoder(vaes.SMALL).state_dict(), folder / "Wan2.1_VAE.pth")
    save_file(taehv_state(), folder / "taew2_1.safetensors")
    texts.comfy_file(folder / "umt5.safetensors", wan, spiece)
    torch.save(wan, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    (folder / "spiece.model").write_bytes(spiece)
    return folder


@pytest.fixture
def files(folder, monkeypatch):
    """The names of the files, short: the working directory is theirs."""
    monkeypatch.chdir(folder)
    return folder


MODEL = ("--model", "self_forcing_dmd.pt", "--text-encoder", "umt5.safetensors")
VAE, TINY = ("--vae", "Wan2.1_VAE.pth"), ("--taehv", "taew2_1.safetensors")


@pytest.fixture
def make(files, tmp_path, capsys):
    """make(*options) -> what was printed as JSON, the frames, and what was said besides."""

    def run(*options, name="clip/", size=SIZE):
        out = f"{tmp_path}/{name}"
        assert main(["generate", PROMPT, "--out", out, "--json", *size, *options]) == 0
        captured = capsys.readouterr()
        return json.loads(captured.out), read_video(out), captured.err

    return run


# --- Videos ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", [VAE, TINY], ids=["vae", "taehv"])
def test_files_make_a_video(make, decoder):
    report, frames, said = make(*MODEL, *decoder, name="clip.mp4")
    assert frames.shape == (13, 48, 32, 3)
    assert report["model"] == "self_forcing_dmd.pt" and report["latent_frames"] == 6
    assert report["sampling"]["window"] == 21 and report["sampling"]["shift"] == 5
    assert 'Sampled as self-forcing: its name says "self-forcing"' in said
    assert report["seconds"].keys() == {"load", "prompt", "rollout", "decode", "write", "first_frames", "total"}


def test_safetensors_with_wans_own_text_encoder(make):
    model = ("--model", "longlive.safetensors", "--text-encoder", "models_t5_umt5-xxl-enc-bf16.pth")
    report, frames, _ = make(*model, "--tokenizer", "spiece.model", *TINY)
    assert frames.shape == (13, 48, 32, 3) and (report["sampling"]["window"], report["sampling"]["sink"]) == (12, 3)


def test_frames_are_those_of_the_parts_put_together(make, files):
    _, frames, _ = make(*MODEL, *VAE)
    embeds = texts.load_text_encoder("umt5.safetensors").encode([PROMPT]).float()
    model, checkpoint = checkpoints.load_model("self_forcing_dmd.pt")
    latents = roll_out(model, checkpoint.sampling, embeds, SeededNoise(0), 6, 6, 4)
    expected = vaes.autoencoder(vaes.SMALL).decode(latents[:, :, :4])[0]
    torch.testing.assert_close(frames, expected, atol=1 / 255, rtol=0)


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--family", "reward-forcing"], {"window": 9, "sink": 3, "pinned": True}),
        (["--preset", "demo"], {"shift": 8.0, "window": None}),
        (["--window", "4", "--steps", "2"], {"window": 4, "steps": [1000, 500], "shift": 5.0}),
    ],
)
def test_family_preset_and_options_decide_the_sampling(make, options, expected):
    report, _, _ = make(*MODEL, *TINY, *options)
    assert {name: report["sampling"][name] for name in expected} == expected


@pytest.mark.parametrize("options", [[], ["--fp8"]], ids=["plain", "fp8"])
def test_offloaded_blocks_make_the_same_frames(make, options):
    report, frames, _ = make(*MODEL, *TINY, *options, "--offload")
    _, expected, _ = make(*MODEL, *TINY, *options, name="other/")
    assert report["offload"] and torch.equal(frames, expected)


def test_every_rule_can_be_asked_for(make):
    report, frames, _ = make(
        *MODEL, *TINY, "--window", "6", "--sink", "3", "--pinned", "--position-range", "9", "--sink-decay", "0.9",
        "--bank", "2", "--bank-interval", "1", "--bank-selected", "3", "--rope-jitter", "0.5",
    )  # fmt: skip
    asked = {"position_range": 9, "sink_decay": 0.9, "rope_jitter": 0.5}
    assert {name: report["sampling"][name] for name in asked} == asked
    assert report["sampling"]["bank"]["frames"] == 2 and report["sampling"]["bank"]["selected"] == 3
    assert frames.shape == (13, 48, 32, 3)
    rolled, _, _ = make(*MODEL, *TINY, "--sampler", "rolling", "--preset", "fast", name="other/")
    assert (rolled["sampling"]["sampler"], rolled["sampling"]["window"]) == ("rolling", 12)


def test_a_file_with_a_network_for_its_memory(make, files):
    """Its frames are those of both networks, and not of the one that denoises alone."""
    state, memory = checkpoints.weights(), checkpoints.weights(seed=1)
    named = {
        f"{n.rpartition('.')[0]}.memory_{n.rpartition('.')[2]}" if n.startswith("blocks.") else f"memory_{n}": t
        for n, t in memory.items()
    }
    torch.save({"generator_ema": state | named}, "sgf-plus_chunkwise.pt")
    torch.save({"generator_ema": state}, "self-gradient-forcing_chunkwise.pt")
    text = ("--text-encoder", "umt5.safetensors", *TINY)
    report, both, said = make("--model", "sgf-plus_chunkwise.pt", *text)
    assert "Sampled as sgf-plus" in said and report["sampling"]["position_range"] == 12
    _, one, _ = make("--model", "self-gradient-forcing_chunkwise.pt", *text, name="other/")
    assert torch.equal(both[:1], one[:1]) and not torch.equal(both, one)


def test_a_form_that_only_comfyui_computes_with_is_refused(files, capsys):
    marked(files / "Wan2.1-T2V-1.3B-Self-Forcing-NVFP4.safetensors")
    model = ("--model", "Wan2.1-T2V-1.3B-Self-Forcing-NVFP4.safetensors", "--text-encoder", "umt5.safetensors")
    assert main(["generate", PROMPT, "--out", "clip.mp4", *SIZE, *model, *TINY]) != 0
    assert "quantised as nvfp4; only ComfyUI's own layers compute with that" in capsys.readouterr().err
    assert main(["info", model[1]]) == 0
    shown = capsys.readouterr().out
    assert "family    self-forcing" in shown and "Quantised as nvfp4" in shown


def marked(path):
    """A model with one layer in nvfp4, as ComfyUI marks it."""
    state = checkpoints.weights(dtype=torch.bfloat16)
    layer, mark = "blocks.0.ffn.0", torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    state[f"{layer}.weight"] = torch.zeros(64, 64, dtype=torch.uint8)
    scales = {"weight_scale": torch.zeros(64, 8, dtype=torch.uint8), "weight_scale_2": torch.ones(())}
    save_file(state | {f"{layer}.{name}": t for name, t in {"comfy_quant": mark, **scales}.items()}, path)


def test_a_lora_is_merged_into_the_model(make, files):
    q = "blocks.0.ffn.0"
    pair = {
        f"base_model.model.{q}.lora_A.weight": torch.ones(2, 128),
        f"base_model.model.{q}.lora_B.weight": torch.ones(64, 2),
    }
    torch.save({"generator_lora": pair}, files / "lora.pt")
    _, plain, _ = make(*MODEL, *TINY)
    report, frames, said = make(*MODEL, *TINY, "--lora", "lora.pt", "--lora-strength", "0.5", name="lora/")
    assert report["loras"] == [{"file": "lora.pt", "strength": 0.5}] and "With lora.pt merged into it" in said
    assert not torch.equal(frames, plain)
    _, same, _ = make(*MODEL, *TINY, "--lora", "lora.pt", "--lora-strength", "0", name="none/")
    assert torch.equal(same, plain)


@pytest.fixture
def two_loras(files):
    for name, layer in (("one.pt", "blocks.0.ffn.0"), ("two.pt", "blocks.1.ffn.0")):
        generator = torch.Generator().manual_seed(len(layer))
        pair = {"A": torch.randn(2, 128, generator=generator), "B": torch.randn(64, 2, generator=generator)}
        torch.save({f"base_model.model.{layer}.lora_{part}.weight": t for part, t in pair.items()}, files / name)
    return ("--lora", "one.pt", "--lora", "two.pt")


def test_several_loras_are_merged_each_with_its_strength(make, two_loras):
    report, both, said = make(*MODEL, *TINY, *two_loras, "--lora-strength", "0.5")
    assert report["loras"] == [{"file": "one.pt", "strength": 0.5}, {"file": "two.pt", "strength": 1.0}]
    assert "With one.pt merged into it, strength 0.5. With two.pt merged into it, strength 1." in said
    _, first, _ = make(*MODEL, *TINY, *two_loras, "--lora-strength", "0.5", "--lora-strength", "0", name="first/")
    _, alone, _ = make(*MODEL, *TINY, *two_loras[:2], "--lora-strength", "0.5", name="alone/")
    assert torch.equal(first, alone) and not torch.equal(both, alone)
    report, _, _ = make(*MODEL, *TINY, name="none/")
    assert report["loras"] == []


@pytest.mark.parametrize("strengths, loras", [(3, 2), (1, 0)])
def test_more_strengths_than_loras_are_refused(two_loras, tmp_path, capsys, strengths, loras):
    given = [*two_loras[: 2 * loras], *["--lora-strength", "1"] * strengths]
    line = refused(capsys, "generate", PROMPT, "--out", f"{tmp_path}/clip.mp4", *SIZE, *MODEL, *TINY, *given)
    assert f"Got --lora-strength {strengths} times for {loras} LoRAs" in line


def test_no_lora_is_replaced_by_an_output(two_loras, files, capsys):
    (files / "clip.mp4").write_bytes((files / "two.pt").read_bytes())
    given = ("--lora", "one.pt", "--lora", "clip.mp4")
    line = refused(capsys, "generate", PROMPT, "--out", "clip.mp4", *SIZE, *MODEL, *TINY, *given)
    assert "would replace --lora 2 'clip.mp4'" in line
    (files / "clip.mp4").unlink()


def test_size_is_wans_unless_told(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(generate, "available_memory", lambda device: 1)
    line = refused(capsys, "generate", PROMPT, "--out", f"{tmp_path}/clip.mp4", *MODEL, *VAE)
    assert "Got 832 x 480 pixels with a window of 21 latent frames" in line


def test_text_encoder_is_gone_before_the_model_comes(make, monkeypatch):
    encoders, load = [], pipeline.load_text_encoder
    monkeypatch.setattr(pipeline, "load_text_encoder", lambda *args: encoders.append(load(*args)) or encoders[0])
    load_model = FilePipeline.load_model

    def when_the_model_comes(source):
        encoder = weakref.ref(encoders.pop())
        gc.collect()
        assert encoder() is None
        return load_model(source)

    monkeypatch.setattr(FilePipeline, "load_model", when_the_model_comes)
    make(*MODEL, *TINY)


def file_pipeline(vae, runtime=None, model="longlive.safetensors"):
    """The pipeline of a model and an autoencoder in the working directory; its name says of which kind it is."""
    files = ModelFiles(Path(model), Path("umt5.safetensors"), Path(vae), "tae" in vae)
    return FilePipeline(files, runtime or Runtime("cpu"))


def test_the_text_encoder_goes_where_it_fits_once_loaded(files, monkeypatch):
    loaded, gpu = texts.bytes_loaded("umt5.safetensors"), torch.device("cuda")
    assert loaded < 0.6 * Path("umt5.safetensors").stat().st_size  # float32 on the disk
    source = file_pipeline("taew2_1.safetensors", Runtime(gpu))
    monkeypatch.setattr(pipeline, "load_text_encoder", lambda path, tokenizer, device: torch.device(device))
    for room, device in ((loaded + 1, gpu), (loaded, torch.device("cpu")), (None, gpu)):
        there = room and room + pipeline.TEXT_ENCODER_WORK
        monkeypatch.setattr(pipeline, "available_memory", lambda device, there=there: there)
        assert source.load_text_encoder() == device


def test_words_without_room_are_told(files, tmp_path, capsys):
    argv = ["generate", "a red circle " * 500, "--out", f"{tmp_path}/clip.gif", *SIZE, *MODEL, *TINY]
    assert main(argv) == 0
    assert "text encoder has no room for these words" in capsys.readouterr().err


# --- Precision and speed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [[], [*MODEL, *TINY]], ids=["built-in", "files"])
@pytest.mark.parametrize("option", ["--fp8", "--fp8-cache"])
def test_float8_is_near_and_not_the_same(make, model, option):
    _, exact, _ = make(*model)
    report, near, _ = make(*model, option, name="near/")
    assert report[option.strip("-").replace("-", "_")] is True
    assert 0 < (near - exact).abs().mean() < 0.03


def test_float8_file_stays_float8_and_means_the_same(files):
    checkpoint = load_checkpoint("self_forcing_fp8_scaled.safetensors")
    model = load_fp8_model(checkpoint, torch.device("cpu"), torch.float32)
    layers = [layer for layer in model.blocks.modules() if isinstance(layer, Fp8Linear)]
    assert len(layers) == 2 * 10 and all(layer.weight.dtype == E4M3 for layer in layers)
    assert not any(isinstance(layer, torch.nn.Linear) for layer in model.blocks.modules())
    plain = checkpoints.WanModel(checkpoint.config)
    plain.load_state_dict(dequantised(checkpoint.state_dict, torch.float32))
    torch.testing.assert_close(checkpoints.forward(model), checkpoints.forward(plain), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("fp8", [False, True])
def test_a_file_with_a_few_float8_layers(files, fp8):
    half = {name: tensor.bfloat16() for name, tensor in checkpoints.weights().items()}
    save_file(half | {"blocks.1.ffn.0.weight": half["blocks.1.ffn.0.weight"].to(E4M3)}, files / "mixed.safetensors")
    source = file_pipeline("taew2_1.safetensors", Runtime("cpu", torch.bfloat16, fp8), "mixed.safetensors")
    layers = [layer for layer in source.load_model().blocks.modules() if isinstance(layer, Fp8Linear)]
    assert len(layers) == (2 * 10 if fp8 else 1)
    (files / "mixed.safetensors").unlink()


def test_float8_file_makes_a_video(make):
    model = ("--model", "self_forcing_fp8_scaled.safetensors", "--text-encoder", "umt5.safetensors")
    report, frames, _ = make(*model, *TINY, "--fp8", "--dtype", "bfloat16")
    assert frames.shape == (13, 48, 32, 3) and report["dtype"] == "bfloat16"


@pytest.mark.parametrize("model", [[], [*MODEL, *TINY]], ids=["built-in", "files"])
def test_compiling_is_shown_and_changes_nothing(make, monkeypatch, model):
    compiled, plain = [], generate.compile_ops("off")
    monkeypatch.setattr(generate, "compile_ops", lambda mode: compiled.append(mode) or plain)
    _, exact, said = make(*model)
    assert "compiling" not in said
    _, frames, said = make(*model, "--compile", "max-autotune", name="compiled/")
    assert compiled == ["off", "max-autotune"] and torch.equal(frames, exact)
    assert re.search(r"compiling, then chunk 1/\d.*chunk 2/", said, re.DOTALL), said


@pytest.mark.parametrize("model", [[], [*MODEL, *TINY]], ids=["built-in", "files"])
def test_the_chosen_attention_is_used(make, monkeypatch, model):
    used = []

    def counted(*args):
        used.append(args)
        return sdpa(*args)

    monkeypatch.setattr(generate, "attention_kernel", lambda name, device, dtype: counted if name == "sage" else sdpa)
    _, exact, _ = make(*model)
    assert not used
    _, frames, _ = make(*model, "--attention", "sage", name="sage/")
    assert used and torch.equal(frames, exact)


def test_tiles_change_nothing(make):
    size = ("--width", "128", "--height", "16", "--frames", "5")
    _, whole, _ = make(*MODEL, *VAE, size=size)
    _, tiled, _ = make(*MODEL, *VAE, "--tile", "64", name="tiled/", size=size)
    torch.testing.assert_close(tiled, whole, atol=1 / 255, rtol=0)


# --- Memory ----------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_before_it_is_loaded(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(generate, "available_memory", lambda device: 2 * 2**30)
    monkeypatch.setattr(pipeline, "load_text_encoder", pytest.fail)
    line = refused(capsys, "generate", PROMPT, "--out", f"{tmp_path}/clip.mp4", *MODEL, *VAE)
    assert re.search(r"decoder 8.*cpu has 2\.0 GiB\. Use --taehv instead of --vae \(1.2 GiB\)", line), line
    assert os.listdir(tmp_path) == []


def test_out_of_memory_frees_everything_and_says_what_helps(files, tmp_path, capsys, monkeypatch):
    alive, load_model = [], FilePipeline.load_model

    def remembered(source):
        model = load_model(source)
        alive.append(weakref.ref(model))
        return model

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(FilePipeline, "load_model", remembered)
    monkeypatch.setattr(wan_vae.DecoderStream, "decode", full)
    line = refused(capsys, "generate", PROMPT, "--out", f"{tmp_path}/clip.mp4", *SIZE, *MODEL, *VAE)
    assert "Got out of memory on cpu" in line and "--taehv instead of --vae (" in line
    gc.collect()
    assert [reference() for reference in alive] == [None]
    assert os.listdir(tmp_path) == []


def plan(sampling=FAMILIES["longlive"].sampling, cache_dtype=None, **changes):
    video = Plan(sampling, 21, 60, 104, cache_dtype=cache_dtype)
    facts = {"weights": 2_837_993_600, "decoder": memory.WAN_VAE} | changes
    return memory.MemoryPlan(WanConfig(), video, torch.bfloat16, **facts)


def test_full_size_plans():
    whole = plan()
    assert 9.5 < whole.total / 2**30 < 11
    assert whole.weights_fp8 < 0.52 * whole.weights
    small = plan(decoder=memory.TAEHV, fp8=True, cache_dtype=E4M3)
    assert small.total < 5 * 2**30


def test_sinks_that_move_along_are_counted():
    moving = plan(sampling=FAMILIES["longlive-infinity"].sampling)
    assert moving.use.cache - plan().use.cache == 3 * 30 * 1560 * 1536 * 2  # keys of three frames


@pytest.mark.parametrize("limit", [9.5, 8, 7, 5, 3.5])
def test_every_option_that_is_suggested_fits(limit):
    room = int(limit * 2**30)
    sentence = memory.advise(plan(), room)
    told = [float(number) for number in re.findall(r"\(([\d.]+) GiB\)", sentence)]
    assert told and all(number <= limit + 0.05 for number in told), sentence


def test_single_options_first_then_together_then_a_smaller_size():
    alone = "Use --tile 256 (7.2 GiB), --taehv instead of --vae (6.5 GiB), --offload (7.9 GiB), or a smaller size."
    assert memory.advise(plan(), 8 * 2**30) == alone
    assert "--fp8-cache + --fp8 + --taehv instead of --vae (" in memory.advise(plan(), 4 * 2**30)
    assert re.match(r"Use a smaller size: even .* is too much", memory.advise(plan(), 2**30))


# --- Errors ----------------------------------------------------------------------------------------------------------

WRONG = {
    "no model file": (["--model", "none.pt"], "does not exist"),
    "a text file for the model": (["--model", "notes.txt"], "a text file"),
    "an autoencoder for the model": (["--model", "Wan2.1_VAE.pth"], "Wan 2.1 text-to-video model is needed"),
    "no text encoder file": (["--text-encoder", "none.safetensors"], "none.safetensors, which does not exist"),
    "a model for the text encoder": (["--text-encoder", "longlive.safetensors"], "Wan diffusion model"),
    "no tokenizer": (["--text-encoder", "alone/models_t5_umt5-xxl-enc-bf16.pth"], "Give as tokenizer"),
    "no autoencoder file": (["--vae", "none.pth"], "does not exist"),
    "a TAEHV for the VAE": (
        ["--vae", "taew2_1.safetensors"],
        "Got taew2_1.*, a TAEHV; the Wan 2.1 VAE is .*models/vae_approx",
    ),
    "a VAE for the TAEHV": (
        ["--taehv", "Wan2.1_VAE.pth"],
        "the Wan 2.1 VAE; a TAEHV .* is needed.*models/vae[.]",
    ),
    "a TAEHV of Wan 2.2": (["--taehv", "taew2_2.safetensors"], "48 channels; the model makes 16"),
    "a text file for the autoencoder": (["--vae", "notes.txt"], "a text file"),
    "a model for the LoRA": (
        ["--lora", "longlive.safetensors"],
        "a Wan diffusion model; a LoRA .* is needed",
    ),
    "an unknown family": (["--family", "stable-forcing"], "known are self-forcing"),
    "tiles with TAEHV": (["--taehv", "taew2_1.safetensors", "--tile", "256"], "Leave --tile out"),
    "tiles that are too small": (["--vae", "Wan2.1_VAE.pth", "--tile", "32"], "Use 64 or more"),
    "an attention kernel without a GPU": (["--attention", "sage"], "needs a CUDA GPU"),
}


@pytest.fixture
def odd_files(files, wan):  # noqa: F811
    (files / "notes.txt").write_text("These are not weights.")
    (files / "alone").mkdir(exist_ok=True)
    torch.save(wan, files / "alone" / "models_t5_umt5-xxl-enc-bf16.pth")
    save_file(taehv_state(taehv.Layout(48, 2, (16, 12, 8, 8), 8)), files / "taew2_2.safetensors")


@pytest.mark.parametrize("options, remedy", WRONG.values(), ids=WRONG.keys())
def test_wrong_files_are_refused_in_one_line(odd_files, tmp_path, capsys, options, remedy):
    given = {name: value for name, value in zip(MODEL[::2], MODEL[1::2]) if name not in options}
    decoder = () if {"--vae", "--taehv"} & set(options) else TINY
    argv = [part for pair in given.items() for part in pair]
    line = refused(capsys, "generate", PROMPT, "--out", f"{tmp_path}/clip.mp4", *SIZE, *argv, *decoder, *options)
    assert re.search(remedy, line), line
    assert os.listdir(tmp_path) == []


def test_a_missing_package_is_named(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    line = refused(capsys, "generate", PROMPT, "--out", f"{tmp_path}/clip.mp4", *SIZE, *MODEL, *TINY)
    assert "pip install transformers" in line


def test_the_built_in_model_imports_nothing_heavy(tmp_path):
    script = (
        "import sys; from sf_core.cli.main import main; "
        f"assert main(['generate', '{PROMPT}', '--frames', '1', '--out', 'clip/']) == 0; "
        "print([name for name in ('transformers', 'torch._dynamo', 'torch._inductor') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


# --- info ------------------------------------------------------------------------------------------------------------


def test_info_says_what_a_file_is(files, capsys):
    assert main(["info", "longlive.safetensors"]) == 0
    out = capsys.readouterr().out
    for part in ("longlive.safetensors", "bfloat16", "layers 2, dim 128", "text 512 x 24", "longlive: steps"):
        assert part in out
    assert "832 x 480, window 12" in out and "TAEHV" in out and "its name says" in out


def test_info_tells_the_memory_of_a_size_and_window(files, capsys):
    assert main(["info", "self_forcing_dmd.pt", "--width", "640", "--height", "384", "--window", "6"]) == 0
    out = capsys.readouterr().out
    cache = 6 * 2 * 2 * (640 // 16) * (384 // 16) * 128 * 2  # frames, keys and values, layers, tokens, dim, bytes
    assert "640 x 384, window 6" in out and re.search(rf"cache +{round(cache / 2**20)} MiB", out)
    assert "weights under generator_ema" in out and "float32" in out


@pytest.mark.parametrize(
    "argv, remedy",
    [
        (["Wan2.1_VAE.pth"], "model is needed"),
        (["notes.txt"], "a text file"),
        (["none.pt"], "does not exist"),
        (["longlive.safetensors", "--family", "best"], "known are"),
        (["longlive.safetensors", "--width", "100"], "multiple of 16"),
        (["longlive.safetensors", "--window", "2"], "window of at least"),
    ],
)
def test_info_refuses_other_files_in_one_line(odd_files, capsys, argv, remedy):
    assert remedy in refused(capsys, "info", *argv)


def test_lighttae_reads_the_latents_of_the_wan_vae():
    autoencoder = taehv.TAEHV.from_state_dict(taehv_state())
    latents = torch.randn(1, 16, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    light = pipeline.LightDecoderStream(autoencoder).decode(latents)
    assert torch.equal(light, taehv.DecoderStream(autoencoder).decode(wan_vae.from_model_space(latents)))


@pytest.mark.parametrize("kind", ["vae", "vae in tiles", "taehv", "lighttae"])
def test_a_clip_is_encoded_in_pieces_to_the_latents_of_the_whole(files, monkeypatch, kind):
    tiny, light = "tae" in kind, kind == "lighttae"
    name = {"taehv": "taew2_1.safetensors", "lighttae": "lighttaew2_1.safetensors"}.get(kind, "Wan2.1_VAE.pth")
    save_file(taehv_state(), files / "lighttaew2_1.safetensors")
    tile = 8 if "tiles" in kind else None
    source = file_pipeline(name, Runtime("cpu", torch.float32, tile=tile))
    frames = torch.rand(1, 41, 64 if tile else 16, 16, 3, generator=torch.Generator().manual_seed(0))

    whole, given = source.load_autoencoder(), []
    if tiny:
        expected = whole.encode(torch.cat([frames[:, :1].expand(-1, 3, -1, -1, -1), frames], 1))
        expected = wan_vae.to_model_space(expected) if light else expected
    else:
        expected = whole.encode(frames, tile)
    for stream in (wan_vae.EncoderStream, taehv.EncoderStream):
        encode = stream.encode
        monkeypatch.setattr(stream, "encode", lambda s, x, run=encode: given.append(x.shape[1]) or run(s, x))
    latents = source.encode(source.load_autoencoder(), pipeline.fit_length(frames[0], 41))
    assert torch.equal(latents, expected) and latents.shape[2] == 11
    assert max(given) == pipeline.PIECE and sum(given) == 41 + 3 * tiny


def test_the_file_name_tells_lighttae_from_taew(files):
    kinds = {"lighttaew2_1.safetensors": pipeline.LightDecoderStream, "taew.safetensors": taehv.DecoderStream}
    for name, kind in kinds.items():
        save_file(taehv_state(), files / name)
        source = file_pipeline(name)
        assert type(source.decoder_stream(source.load_autoencoder())) is kind
