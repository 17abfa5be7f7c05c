"""LongLive 2.0 from its files: formats, settings, videos of the command line, and the network at full size."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sf_core import memory
from sf_core.autoencoders import taehv
from sf_core.checkpoints.identify import find_wan
from sf_core.checkpoints.load import CheckpointError, describe, load_checkpoint, load_model
from sf_core.checkpoints.nvfp4 import BLOCK, MAGNITUDES, dequantise
from sf_core.checkpoints.tensorfiles import TensorFile
from sf_core.cli.main import main
from sf_core.memory import MemoryPlan, advise
from sf_core.pipeline import FilePipeline, ModelFiles, Request, Runtime
from sf_core.sampling.context import Context
from sf_core.sampling.families import FAMILIES, guess_family
from sf_core.sampling.plan import Plan, cut_into_chunks, round_up_to_chunks
from sf_core.sampling.prompt_text import SCENE_CUT
from sf_core.sampling.prompts import PromptSchedule
from sf_core.sampling.rollout import rollout
from sf_core.text_encoder import TextEncoder
from sf_core.video import open_clip, read_video
from sf_core.wan.attention import FullAttention
from sf_core.wan.config import WanConfig
from sf_core.wan.model import Network, WanModel, encode_prompt, velocity
from sf_core.wan.shot_cache import ShotCache, Shots
from tests.core import test_checkpoint as checkpoints
from tests.core import test_text as texts
from tests.core import test_wan22_vae as vaes
from tests.core.goldens import FOLDER, frames_second
from tests.core.longlive2 import CONFIG, lora_tensors, model, tensors
from tests.core.test_cli import refused
from tests.core.test_cli_models import taehv_state
from tests.core.test_text import spiece, wan  # noqa: F401  fixtures

SMALL = replace(checkpoints.SMALL, channels=48)
FULL = WanConfig(dim=3072, ffn_dim=14336, heads=24, channels=48)
LONGLIVE2 = FAMILIES["longlive-2"].sampling
OTHER = tensors("h8_names_lora_nvfp4")
TAEW2_2 = taehv.Layout(channels=48, patch=2, widths=(16, 12, 8, 8), encoder_width=8)


# --- Formats ---------------------------------------------------------------------------------------------------------


def saved(state, path, key="generator", prefix="model."):
    path.parent.mkdir(parents=True, exist_ok=True)
    state = checkpoints.prefixed(state, prefix)
    torch.save({key: state} if key else state, path)
    return path


@pytest.mark.parametrize("key", ["generator", "generator_ema", "model", None])
@pytest.mark.parametrize("name", ["LongLive-2.0-5B/model_bf16.pt", "longlive2_5b.pt"])
def test_the_published_file_loads(tmp_path, key, name):
    state = checkpoints.weights(SMALL, dtype=torch.bfloat16)
    checkpoint = load_checkpoint(saved(state, tmp_path / name, key))
    assert checkpoints.same(checkpoint.state_dict, state) and checkpoint.config == SMALL
    assert (checkpoint.family, checkpoint.sampling) == ("longlive-2", LONGLIVE2)
    assert "its name says" in checkpoint.note


def test_a_generator_of_48_channels_is_longlive_2_whatever_its_name(tmp_path):
    about = describe(saved(checkpoints.weights(SMALL), tmp_path / "self_forcing_dmd.pt"))
    assert about.family == "longlive-2" and "the one family known whose latents have 48 channels" in about.note


def test_wan_2_2_itself_is_refused_and_a_family_is_taken_for_word(tmp_path):
    path = saved(checkpoints.weights(SMALL), tmp_path / "wan2.2_ti2v_5B.pt", key=None, prefix="")
    with pytest.raises(CheckpointError, match="Wan 2.2 5B .*nothing calls causal.*choose the family longlive-2"):
        describe(path)
    assert describe(path, "longlive-2").sampling == LONGLIVE2


def test_a_name_of_longlive_2_over_another_model_is_not_believed(tmp_path):
    about = describe(saved(checkpoints.weights(), tmp_path / "longlive2.pt"))
    assert about.family == "self-forcing" and about.sampling.solver == "renoise"


@pytest.mark.parametrize(
    "label", ["LongLive-2.0-5B model_bf16.pt", "longlive2.pt", "long-live-v2_4o6.pt", "LongLive_2"]
)
def test_names(label):
    assert guess_family(label).family == "longlive-2"


@pytest.mark.parametrize("label", ["longlive_base.pt", "LongLive-1.3B longlive_base.pt", "longlive-24fps.pt"])
def test_names_of_the_first_longlive(label):
    assert guess_family(label).family == "longlive"


def test_all_825_tensors_of_the_5b_model_are_known():
    names = checkpoints.prefixed(checkpoints.shapes(FULL), "generator.model.")
    found = find_wan(TensorFile((Path("model_bf16.pt"),), names, {}))
    assert found.config == FULL and found.causal and len(found.names) == 825
    assert sum(names[at].numel() for at in found.names.values()) == 4_999_787_712


@pytest.mark.skipif(not (FOLDER / "longlive2" / "longlive2_5b_names.json").exists(), reason="only in the full set")
def test_names_and_shapes_are_the_published_ones():
    theirs = json.loads((FOLDER / "longlive2" / "longlive2_5b_names.json").read_text())
    assert {f"model.{name}": list(tensor.shape) for name, tensor in checkpoints.shapes(FULL).items()} == theirs


# --- LoRA and four bits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["generator_lora", None])
@torch.no_grad()
def test_the_published_lora_is_merged(tmp_path, key):
    network = model()
    torch.save({key: lora_tensors(network)} if key else lora_tensors(network), tmp_path / "lora.pt")
    facts = {"transformer": {"num_heads": 4, "text_len": 32, "causal_ar": True}}
    save_file(network.state_dict(), tmp_path / "longlive2.safetensors", {"config": json.dumps(facts)})
    loras = [(tmp_path / "lora.pt", 2.0)]  # alpha 16 of rank 8, which the published file has equal
    merged, _ = load_model(tmp_path / "longlive2.safetensors", loras=loras)
    recorded = [name for name in OTHER if name.endswith(".merged")]
    for name in recorded:
        ours = merged.get_parameter(name.removeprefix("lora.").removesuffix("merged") + "weight")
        torch.testing.assert_close(ours, OTHER[name], atol=1e-6, rtol=0)
    x, text = frames_second(OTHER["lora.x"]), encode_prompt(merged, OTHER["lora.context"])
    flow = velocity(merged, x, 500.0, text, FullAttention(CONFIG, range(x.shape[2]), *x.shape[3:]))
    torch.testing.assert_close(frames_second(flow), OTHER["lora.flow_merged"], atol=2e-5, rtol=0)
    assert recorded


@pytest.mark.parametrize("rule", ["mse", "static_6"])
def test_four_bits_are_theirs_to_the_bit(rule):
    packed = [OTHER[f"nvfp4.{rule}.{part}"] for part in ("values", "scale_factors_u8", "amax")]
    ours, theirs = dequantise(*packed), OTHER[f"nvfp4.{rule}.dequantized_f32"]
    assert torch.equal(ours[:: len(ours) // len(theirs)], theirs)
    assert torch.equal(
        dequantise(*packed[:2], packed[2].reshape(())), ours
    )  # amax is saved with and without a dimension
    error = (ours - OTHER["nvfp4.weight_bf16"].float()).norm() / ours.norm()
    assert error < 0.1


def packed(weight):
    """A matrix [out, in] in four bits, by rows of 16, blocks ending at 6."""
    out, width = weight.shape
    amax = weight.abs().max()
    blocks = weight.unflatten(1, (-1, BLOCK))
    scales = (blocks.abs().amax(-1) * 448 / amax).to(torch.float8_e4m3fn)
    real = scales.float() * amax / (6 * 448)
    numbers = (blocks / real.unsqueeze(-1).clamp(min=1e-12)).flatten(1)
    codes = (numbers.abs().unsqueeze(-1) - torch.tensor(MAGNITUDES)).abs().argmin(-1) + 8 * (numbers < 0)
    values = (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)
    rows, across = -(-out // 128) * 128, -(-scales.shape[1] // 4) * 4
    padded = torch.zeros(rows, across).to(torch.float8_e4m3fn)
    padded[:out, : scales.shape[1]] = scales
    swizzled = padded.view(torch.uint8).view(rows // 128, 4, 32, across // 4, 4).permute(0, 3, 2, 1, 4).reshape(-1)
    metadata = torch.tensor([out, width, rows, 16 * across], dtype=torch.int32)
    return {"values": values, "scale_factors": swizzled.view(torch.float8_e4m3fn), "amax": amax, "metadata": metadata}


def in_four_bits(state):
    """The published form: the blocks' linears in four bits, all else as it is."""
    done = {}
    for name, tensor in state.items():
        if name.startswith("blocks.") and tensor.ndim == 2:
            layer = name.removesuffix("weight")
            done |= {f"{layer}quantized_weight_{part}": value for part, value in packed(tensor.float()).items()}
        else:
            done[name] = tensor
    return done


def test_a_model_in_four_bits_loads(tmp_path):
    state = checkpoints.weights(SMALL, dtype=torch.bfloat16)
    path = saved(in_four_bits(state), tmp_path / "LongLive-2.0-5B" / "model_4o6.pt")
    network, checkpoint = load_model(path, dtype=torch.float32)
    assert (checkpoint.config, checkpoint.family, checkpoint.dtype) == (SMALL, "longlive-2", torch.bfloat16)
    assert checkpoint.tensors == len(state)
    for name, tensor in network.state_dict().items():
        near = 0.15 if name.startswith("blocks.") and tensor.ndim == 2 else 0
        assert (tensor - state[name].float()).norm() <= near * tensor.norm()


def test_a_matrix_in_four_bits_without_a_part_is_refused(tmp_path):
    state = in_four_bits(checkpoints.weights(SMALL))
    del state["blocks.1.ffn.0.quantized_weight_amax"]
    with pytest.raises(CheckpointError, match="without a tensor of its kind .blocks.1.ffn.0.weight .amax"):
        describe(saved(state, tmp_path / "LongLive-2.0-5B" / "model_4o6.pt"))


def test_a_lora_goes_into_a_model_in_four_bits(tmp_path):
    state, name = checkpoints.weights(SMALL), "blocks.0.self_attn.q.weight"
    path = saved(in_four_bits(state), tmp_path / "longlive2_4o6.pt")
    pair = {"base_model.model.blocks.0.self_attn.q.lora_A.weight": torch.ones(1, 128)}
    pair |= {"base_model.model.blocks.0.self_attn.q.lora_B.weight": torch.ones(128, 1)}
    torch.save(pair, tmp_path / "lora.pt")
    plain, merged = (
        load_checkpoint(path).state_dict,
        load_checkpoint(path, loras=[(tmp_path / "lora.pt", 0.5)]).state_dict,
    )
    torch.testing.assert_close(merged[name].float(), plain[name].float() + 0.5, atol=4e-3, rtol=0)


# --- Counting --------------------------------------------------------------------------------------------------------


def sizes(prefix, frames=48):
    return [(c.frames, c.given, c.held) for c in cut_into_chunks(frames, LONGLIVE2, prefix)]


def test_an_image_is_held_inside_the_first_chunk():
    assert sizes(1, 16) == [(8, False, 1), (8, False, 0)]
    assert round_up_to_chunks(9, LONGLIVE2, 1) == 16 and round_up_to_chunks(8, LONGLIVE2, 1) == 8


def test_whole_chunks_are_given_and_the_rest_is_held():
    assert sizes(16, 24) == [(8, True, 0), (8, True, 0), (8, False, 0)]
    assert sizes(19, 32) == [(8, True, 0), (8, True, 0), (8, False, 3), (8, False, 0)]
    assert round_up_to_chunks(20, LONGLIVE2, 19) == 24


def test_held_frames_come_out_as_they_were_given():
    network = WanModel(CONFIG).requires_grad_(False).initialise()
    prefix = torch.randn(1, 48, 2, 4, 4)
    sampling = replace(LONGLIVE2, chunk=4, window=12, sink=4, steps=(1000.0, 500.0))
    plan = Plan(sampling, 8, 4, 4, prefix=2)
    prompts = PromptSchedule.of(torch.randn(1, 4, CONFIG.text_dim))
    noise = lambda start, frames, step, shape: torch.randn(1, 48, frames, 4, 4)  # noqa: E731
    made = torch.cat([x0 for _, x0 in rollout(Network(network), plan, prompts, noise, prefix=prefix)], 2)
    assert made.shape[2] == 8 and torch.equal(made[:, :, :2], prefix)


# --- At full size ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full():
    return WanModel(FULL, device="meta", dtype=torch.bfloat16)


def test_one_chunk_through_the_full_network(full):
    plan = Plan(LONGLIVE2, 32, 44, 80)
    with torch.device("meta"):
        prompts = PromptSchedule.of(torch.empty(1, 512, 4096, dtype=torch.bfloat16))
        context = Context(Network(full, torch.bfloat16), plan, prompts)
        *_, last = plan.chunks
        for chunk in plan.chunks[:-1]:
            context.cache.chunk(chunk.start, chunk.frames)
        context.enter(last)
        x0 = context.predict(torch.empty(1, 48, 8, 44, 80), plan.steps(last)[0])
    assert x0.shape == (1, 48, 8, 44, 80)
    assert (context.attend.begin, context.attend.end) == (0, 28160) and context.cache.tokens == 880
    assert context.cache.nbytes == 2 * 30 * 28160 * 3072 * 2


def full_plan(**changes):
    plan = Plan(LONGLIVE2, 128, 44, 80)
    return MemoryPlan(FULL, plan, torch.bfloat16, weights=10 * 10**9, decoder=memory.WAN22_VAE, **changes)


def test_memory_of_the_release_settings():
    plan = full_plan()
    assert (plan.width, plan.height, plan.window) == (1280, 704, 32)
    assert plan.use.cache == 10_380_902_400
    assert plan.use.decoder > 2 * 704_688_668
    tiled, small = replace(plan, tile=32), replace(plan, decoder=memory.TAEHV22)
    assert small.total < tiled.total < plan.total
    sentence = advise(plan, plan.total - 2**30)
    assert "--tile 512" in sentence and "--taehv instead of --vae" in sentence


@pytest.mark.parametrize("step", [1, 8])
def test_shorter_windows_hold_sink_pin_and_chunk(step):
    plan = full_plan()
    assert plan.shortest_window == 24
    window = plan.longest_window(plan.total - 1, step)
    assert window == 24 and plan.with_window(window).total < plan.total
    assert plan.longest_window(2**30, step) is None
    assert "--window 24" in advise(plan, plan.with_window(24).total)


def test_a_cut_needs_no_second_reading_of_the_window():
    files = {"prompt": "0: a\n4s: b\n8s cut: c", "frames": 381, "width": 1280, "height": 704, "sampling": LONGLIVE2}
    assert not Request(**files, fps=24, space=16).rereads
    assert Request(**files | {"sampling": FAMILIES["longlive"].sampling}).rereads


# --- Videos ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory, spiece, wan):  # noqa: F811
    folder = tmp_path_factory.mktemp("longlive2")
    saved(checkpoints.weights(SMALL), folder / "LongLive-2.0-5B" / "model_bf16.pt")
    torch.save(vaes.autoencoder(vaes.SMALL).state_dict(), folder / "Wan2.2_VAE.pth")
    save_file(taehv_state(TAEW2_2), folder / "taew2_2.safetensors")
    texts.comfy_file(folder / "umt5.safetensors", wan, spiece)
    pixels = torch.randint(256, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(pixels.numpy()).save(folder / "image.png")
    return folder


@pytest.fixture
def make(folder, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(folder)

    def run(*options, prompt="a boat on a lake", size=("--width", "64", "--height", "32", "--frames", "61")):
        out = f"{tmp_path}/clip{len(list(tmp_path.iterdir()))}/"
        files = ("--model", "LongLive-2.0-5B/model_bf16.pt", "--text-encoder", "umt5.safetensors")
        assert main(["generate", prompt, "--out", out, "--json", *size, *files, *options]) == 0
        captured = capsys.readouterr()
        return json.loads(captured.out), read_video(out), captured.err

    return run


VAE, TAEHV = ("--vae", "Wan2.2_VAE.pth"), ("--taehv", "taew2_2.safetensors")
SCENES = "0: a boat on a lake\n@1 cut: a castle\n@3: the castle at night"


@pytest.mark.parametrize("decoder", [VAE, TAEHV], ids=["vae", "taehv"])
def test_a_video(make, decoder):
    report, frames, said = make(*decoder)
    assert frames.shape == (61, 32, 64, 3) and report["fps"] == 24 and report["latent_frames"] == 16
    assert report["sampling"]["solver"] == "unipc" and "Sampled as longlive-2" in said


def test_an_image_is_the_first_frame(make):
    start = ("--start", "image.png", "--steps", "2")
    _, frames, _ = make(*VAE, *start)
    _, again, _ = make(*VAE, *start, "--seed", "7")
    vae = vaes.autoencoder(vaes.SMALL)
    image = open_clip(Path("image.png")).frames((32, 64), 24, 1)
    expected = vae.decode(vae.encode(next(iter(image))[None]))[0, 0]
    torch.testing.assert_close(frames[0], expected, atol=1 / 255, rtol=0)
    assert torch.equal(frames[0], again[0]) and not torch.equal(frames[1:], again[1:])


def test_scenes_change_where_the_prompt_says(make, monkeypatch):
    words, shots = [], []
    encode, begin = TextEncoder.encode, ShotCache.begin_shot
    monkeypatch.setattr(ShotCache, "begin_shot", lambda self, frame: (shots.append(frame), begin(self, frame)))
    monkeypatch.setattr(TextEncoder, "encode", lambda self, prompts: words.extend(prompts) or encode(self, prompts))
    size = ("--width", "64", "--height", "32", "--frames", "125")
    _, plain, said = make(*TAEHV, "--steps", "1", prompt=SCENES, size=size)
    assert shots == [8] and words == ["a boat on a lake", SCENE_CUT + "a castle", "a castle", "the castle at night"]
    assert "starts with frame 29 (1.21 s)" in said
    written = SCENES.replace("@1 cut: a castle", f"@1: {SCENE_CUT}a castle")
    _, again, _ = make(*TAEHV, "--steps", "1", prompt=written, size=size)
    assert torch.equal(plain, again) and shots == [8, 8]


def test_sizes_are_multiples_of_32(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    files = ("--model", "LongLive-2.0-5B/model_bf16.pt", "--text-encoder", "umt5.safetensors", *VAE)
    line = refused(capsys, "generate", "a boat", "--out", "x.mp4", *files, "--width", "80", "--height", "32")
    assert "Got 80 x 32 pixels; this model's videos are multiples of 32 wide and high. Use 64 x 32" in line


def test_the_wrong_autoencoder_is_named(folder, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(folder)
    save_file(taehv_state(), tmp_path / "taew2_1.safetensors")
    files = ("--model", "LongLive-2.0-5B/model_bf16.pt", "--text-encoder", "umt5.safetensors")
    taew = ("--taehv", str(tmp_path / "taew2_1.safetensors"))
    size = ("--width", "64", "--height", "32")
    line = refused(capsys, "generate", "a boat", "--out", "x.mp4", *files, *taew, *size)
    assert "latents of 16 channels; the model makes 48. Get taew2_2" in line


def test_a_model_of_48_channels_has_its_own_size_and_length(folder):
    files = ModelFiles(
        folder / "LongLive-2.0-5B" / "model_bf16.pt", folder / "umt5.safetensors", folder / "Wan2.2_VAE.pth"
    )
    request = FilePipeline(files, Runtime("cpu")).request("a boat")
    assert (request.width, request.height, request.frames, request.fps) == (1280, 704, 125, 24)
    assert request.plan().frames == 32 and (request.plan().height, request.plan().width) == (44, 80)


def test_info_counts_with_the_wan_2_2_vae(folder, capsys):
    assert main(["info", str(folder / "LongLive-2.0-5B" / "model_bf16.pt"), "--width", "1280", "--height", "704"]) == 0
    told = capsys.readouterr().out
    assert "latent channels 48" in told and "longlive-2" in told and "--tile 512" in told


def test_shots_do_not_go_back():
    with pytest.raises(ValueError, match="jump of -8 latent frames"):
        Shots(jump=-8)
