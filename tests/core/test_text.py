"""UMT5: every file format gives the embeddings of the published arithmetic, and a file that is none says so."""

import io
import pickle
import re
import socket
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sf_core import text_encoder as text
from sf_core.text_encoder import ScaledLinear, bytes_loaded, clean, load_text_encoder

pytest.importorskip("transformers", reason="UMT5 is transformers' network: pip install transformers")
sentencepiece = pytest.importorskip("sentencepiece", reason="tokenizers are trained with sentencepiece")

BLOCKS, WIDTH, HEADS, HEAD_DIM, FFN, BUCKETS = 3, 24, 4, 8, 40, 32
PROMPTS = ["a red circle moves right", "", "two blue squares turn slowly on a white background, then a circle stops"]
FP8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def spiece():
    """A sentencepiece model with UMT5's special rows: 0 padding, 1 end, 2 unknown."""
    sentences = [*PROMPTS, "a green triangle and 2 circles", "it's a & b <c>; every word: moves, stops, turns!"] * 20
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, vocab_size=80, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2, num_threads=1,
    )  # fmt: skip
    return model.getvalue()


@pytest.fixture(scope="module")
def wan(spiece):
    """Random weights under Wan's names. The position biases are as large as the scores they are added to."""
    generator = torch.Generator().manual_seed(5)
    rows = sentencepiece.SentencePieceProcessor(model_proto=spiece).get_piece_size() + 7

    def normal(*shape, std):
        return std * torch.randn(*shape, generator=generator)

    weights = {"token_embedding.weight": normal(rows, WIDTH, std=1), "norm.weight": 1 + normal(WIDTH, std=0.1)}
    for block in (f"blocks.{i}." for i in range(BLOCKS)):
        for norm in ("norm1", "norm2"):
            weights[f"{block}{norm}.weight"] = 1 + normal(WIDTH, std=0.1)
        for layer in "qkv":
            weights[f"{block}attn.{layer}.weight"] = normal(HEADS * HEAD_DIM, WIDTH, std=WIDTH**-0.5)
        weights[f"{block}attn.o.weight"] = normal(WIDTH, HEADS * HEAD_DIM, std=(HEADS * HEAD_DIM) ** -0.5)
        weights[f"{block}pos_embedding.embedding.weight"] = normal(BUCKETS, HEADS, std=1)
        weights[f"{block}ffn.gate.0.weight"] = normal(FFN, WIDTH, std=WIDTH**-0.5)
        weights[f"{block}ffn.fc1.weight"] = normal(FFN, WIDTH, std=WIDTH**-0.5)
        weights[f"{block}ffn.fc2.weight"] = normal(WIDTH, FFN, std=FFN**-0.5)
    return weights


def hugging_face(wan):
    """The same weights under transformers' names, written out the other way round than the loader does it."""
    names = {"shared": "token_embedding", "encoder.final_layer_norm": "norm"}
    for i in range(BLOCKS):
        attention, feed_forward, block = f"encoder.block.{i}.layer.0.", f"encoder.block.{i}.layer.1.", f"blocks.{i}."
        names |= {f"{attention}SelfAttention.{layer}": f"{block}attn.{layer}" for layer in "qkvo"}
        names |= {
            attention + "SelfAttention.relative_attention_bias": block + "pos_embedding.embedding",
            attention + "layer_norm": block + "norm1",
            feed_forward + "layer_norm": block + "norm2",
            feed_forward + "DenseReluDense.wi_0": block + "ffn.gate.0",
            feed_forward + "DenseReluDense.wi_1": block + "ffn.fc1",
            feed_forward + "DenseReluDense.wo": block + "ffn.fc2",
        }
    return {f"{ours}.weight": wan[f"{theirs}.weight"] for ours, theirs in names.items()}


def bytes_tensor(data):
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def comfy_file(path, wan, spiece, **extra):
    save_file({**hugging_face(wan), "spiece_model": bytes_tensor(spiece), **extra}, path)
    return path


def wan_file(path, wan, spiece):
    torch.save(wan, path)
    (path.parent / "google" / "umt5-xxl").mkdir(parents=True, exist_ok=True)
    (path.parent / "google" / "umt5-xxl" / "spiece.model").write_bytes(spiece)
    return path


def hugging_face_folder(path, wan, spiece):
    path.mkdir()
    weights = hugging_face(wan)
    half = len(weights) // 2
    for shard, names in enumerate((list(weights)[:half], list(weights)[half:]), 1):
        save_file({name: weights[name] for name in names}, path / f"model-{shard:05}-of-00002.safetensors")
    (path / "spiece.model").write_bytes(spiece)
    return path


def scaled_fp8(weights, scale_name="scale_weight", rows=False):
    """Attention and feed-forward layers in float8 with scales, as in ComfyUI's fp8_scaled files."""
    out = {}
    for name, weight in weights.items():
        if not re.search(r"\.(q|k|v|o|wi_0|wi_1|wo)\.weight$", name):
            out[name] = weight.half() if name == "shared.weight" else weight
            continue
        scale = (weight.abs().amax(1) if rows else weight.abs().amax()) / 448
        out[name] = (weight / (scale[:, None] if rows else scale)).to(FP8)
        out[name.removesuffix("weight") + scale_name] = scale
    return out


def load(path, **options):
    return load_text_encoder(path, **{"dtype": torch.float32, **options})


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, wan, spiece):
    return load(comfy_file(tmp_path_factory.mktemp("comfy") / "umt5.safetensors", wan, spiece))


def close(got, expected):
    """Equal but for rounding: a mapped tensor lies where the file has it, and matmuls round by alignment."""
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)


def position_bucket(distance):
    """key - query -> row of the bias: 16 rows a direction, 8 exact, the others logarithmic up to 128 tokens."""
    far = abs(distance)
    if far >= 8:
        far = min(15, 8 + int(8 * torch.log(torch.tensor(far / 8)) / torch.log(torch.tensor(16.0))))
    return far + (16 if distance > 0 else 0)


def norm(x, weight):
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def umt5(wan, ids):
    """The published arithmetic, straight from Wan's names: ids [L] -> [L, WIDTH]."""
    buckets = torch.tensor([[position_bucket(key - query) for key in range(len(ids))] for query in range(len(ids))])
    x = wan["token_embedding.weight"][ids]
    for i in range(BLOCKS):
        block = {name.removeprefix(f"blocks.{i}."): weight for name, weight in wan.items()}
        y = norm(x, block["norm1.weight"])
        q, k, v = ((y @ block[f"attn.{layer}.weight"].T).view(-1, HEADS, HEAD_DIM) for layer in "qkv")
        bias = block["pos_embedding.embedding.weight"][buckets]  # [query, key, head]
        scores = torch.einsum("qnd,knd->qkn", q, k) + bias
        x = x + torch.einsum("qkn,knd->qnd", scores.softmax(1), v).flatten(1) @ block["attn.o.weight"].T
        y = norm(x, block["norm2.weight"])
        gate = torch.nn.functional.gelu(y @ block["ffn.gate.0.weight"].T, approximate="tanh")
        x = x + (gate * (y @ block["ffn.fc1.weight"].T)) @ block["ffn.fc2.weight"].T
    return norm(x, wan["norm.weight"])


# Embeddings


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_encoder_computes_the_published_arithmetic(encoder, wan, prompt):
    ids = encoder.tokens(prompt)
    embeds = encoder.encode([prompt])[0]
    torch.testing.assert_close(embeds[: len(ids)], umt5(wan, ids), atol=1e-5, rtol=1e-5)


def test_all_formats_give_the_same_embeddings(tmp_path, encoder, wan, spiece):
    expected = encoder.encode(PROMPTS)
    for path in (
        wan_file(tmp_path / "models_t5_umt5-xxl-enc-bf16.pth", wan, spiece),
        hugging_face_folder(tmp_path / "umt5-xxl", wan, spiece),
    ):
        close(load(path).encode(PROMPTS), expected)


def test_folders_as_wan_and_diffusers_lay_them_out(tmp_path, encoder, wan, spiece):
    wan_file(tmp_path / "models_t5_umt5-xxl-enc-bf16.pth", wan, spiece)
    pipeline = tmp_path / "pipeline"
    pipeline.mkdir()
    hugging_face_folder(pipeline / "text_encoder", wan, spiece)
    (pipeline / "tokenizer").mkdir()
    (pipeline / "text_encoder" / "spiece.model").rename(pipeline / "tokenizer" / "spiece.model")
    for folder in (tmp_path, pipeline, pipeline / "text_encoder"):
        close(load(folder).encode(PROMPTS), encoder.encode(PROMPTS))


def test_embeddings_named_after_the_encoder_alone_are_found(tmp_path, encoder, wan, spiece):
    weights = hugging_face(wan)
    weights["encoder.embed_tokens.weight"] = weights.pop("shared.weight")
    save_file({**weights, "spiece_model": bytes_tensor(spiece)}, tmp_path / "umt5.safetensors")
    close(load(tmp_path / "umt5.safetensors").encode(PROMPTS), encoder.encode(PROMPTS))


@pytest.mark.parametrize("block", range(BLOCKS))
def test_every_block_has_its_own_position_bias(tmp_path, encoder, wan, spiece, block):
    name = f"blocks.{block}.pos_embedding.embedding.weight"
    without = load(comfy_file(tmp_path / "umt5.safetensors", wan | {name: torch.zeros_like(wan[name])}, spiece))
    assert (without.encode(PROMPTS) - encoder.encode(PROMPTS)).abs().max() > 0.1


def test_neighbours_in_the_batch_and_padding_change_nothing(encoder):
    short, long = PROMPTS[0], PROMPTS[2]
    embeds = encoder.encode([short, long])
    assert torch.equal(embeds[:1], encoder.encode([short]))
    ids = encoder.tokens(short)
    padded = torch.tensor([ids + [0] * 40])
    with torch.no_grad():
        masked = encoder.model(input_ids=padded, attention_mask=(torch.arange(len(ids) + 40) < len(ids))[None].long())
    torch.testing.assert_close(masked.last_hidden_state[0, : len(ids)], embeds[0, : len(ids)], atol=1e-5, rtol=1e-5)


def test_embeddings_are_zero_behind_the_prompt(encoder):
    embeds = encoder.encode(PROMPTS)
    assert embeds.shape == (3, 512, WIDTH) and (encoder.text_len, encoder.text_dim) == (512, WIDTH)
    for row, prompt in zip(embeds, PROMPTS):
        used = len(encoder.tokens(prompt))
        assert row[:used].abs().sum(-1).min() > 0 and not row[used:].any()


def test_bfloat16_stays_near_float32(tmp_path, encoder, wan, spiece):
    half = load_text_encoder(comfy_file(tmp_path / "umt5.safetensors", wan, spiece)).encode(PROMPTS)
    expected = encoder.encode(PROMPTS)
    assert half.dtype == torch.bfloat16
    assert (half.float() - expected).norm() < 0.03 * expected.norm()


def test_one_string_is_not_taken_for_a_list_of_letters(encoder):
    with pytest.raises(TypeError, match="list of prompts"):
        encoder.encode("a red circle")


# float8


@pytest.mark.parametrize("rows", [False, True], ids=["one scale", "a scale per row"])
@pytest.mark.parametrize("scale_name", ["scale_weight", "weight_scale"])
def test_scaled_float8_gives_what_its_widened_weights_give(tmp_path, wan, spiece, scale_name, rows):
    quantized = scaled_fp8(hugging_face(wan), scale_name, rows)
    plain = {}
    for name, weight in quantized.items():
        if not name.endswith(scale_name):
            scale = quantized.get(name.removesuffix("weight") + scale_name, torch.ones(1))
            plain[name] = weight.float() * (scale[:, None] if rows and len(scale.shape) and len(scale) > 1 else scale)
    notes = {"scaled_fp8": torch.zeros(2, dtype=FP8), "spiece_model": bytes_tensor(spiece)}
    notes["encoder.block.0.layer.0.SelfAttention.q.scale_input"] = torch.ones(())
    save_file(quantized | notes, tmp_path / "fp8.safetensors")
    save_file(plain | notes, tmp_path / "plain.safetensors")
    small, large = load(tmp_path / "fp8.safetensors"), load(tmp_path / "plain.safetensors")
    torch.testing.assert_close(small.encode(PROMPTS), large.encode(PROMPTS), atol=2e-5, rtol=1e-4)


def test_scaled_float8_weights_stay_float8(tmp_path, encoder, wan, spiece):
    save_file({**scaled_fp8(hugging_face(wan)), "spiece_model": bytes_tensor(spiece)}, tmp_path / "fp8.safetensors")
    small = load(tmp_path / "fp8.safetensors")
    layers = [module for module in small.model.modules() if isinstance(module, ScaledLinear)]
    assert len(layers) == 7 * BLOCKS and all(layer.quantized.dtype == FP8 for layer in layers)
    assert not any(isinstance(module, torch.nn.Linear) for module in small.model.modules())
    expected = encoder.encode(PROMPTS)
    assert (small.encode(PROMPTS) - expected).norm() < 0.15 * expected.norm()


def test_unscaled_float8_under_wans_names(tmp_path, wan, spiece):
    save_file({name: weight.to(FP8) for name, weight in wan.items()}, tmp_path / "fp8.safetensors")
    (tmp_path / "spiece.model").write_bytes(spiece)
    widened = {name: weight.to(FP8).float() for name, weight in wan.items()}
    expected = load(comfy_file(tmp_path / "plain.safetensors", widened, spiece)).encode(PROMPTS)
    torch.testing.assert_close(load(tmp_path / "fp8.safetensors").encode(PROMPTS), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["float32", "float8", "wan float8", "with a decoder", "folder"])
def test_what_it_will_take_is_told_from_the_header(tmp_path, monkeypatch, wan, spiece, kind, dtype):
    path = tmp_path / "umt5.safetensors"
    if kind == "folder":
        path = hugging_face_folder(tmp_path / "umt5", wan, spiece)
        (path / "another_model.safetensors").write_bytes(bytes(10**6))
    else:
        state = scaled_fp8(hugging_face(wan)) if kind == "float8" else hugging_face(wan)
        state = {name: weight.to(FP8) for name, weight in wan.items()} if kind == "wan float8" else state
        state |= {"decoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(999)} if "decoder" in kind else {}
        save_file({**state, "spiece_model": bytes_tensor(spiece)}, path)
    model = load_text_encoder(path, dtype=dtype).model
    scales = [layer.scale.nbytes for layer in model.modules() if isinstance(layer, ScaledLinear)]
    taken = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) - sum(scales)
    monkeypatch.setattr(text, "map_tensors", pytest.fail)
    assert bytes_loaded(path, dtype) == taken


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
@pytest.mark.parametrize("name", ["umt5.pth", "umt5.safetensors"])
def test_weights_of_the_wanted_type_stay_in_the_mapped_file(tmp_path, wan, spiece, name):
    path = (wan_file if name == "umt5.pth" else comfy_file)(tmp_path / name, wan, spiece)
    model = load(path).model
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    mapped = [range(*(int(end, 16) for end in line[0].split("-"))) for line in lines]
    for parameter in model.parameters():
        assert any(parameter.data_ptr() in part for part in mapped)


def test_the_vocabulary_is_held_once(encoder):
    assert encoder.model.encoder.embed_tokens.weight is encoder.model.shared.weight


# Tokens


@pytest.mark.parametrize(
    "prompt, cleaned",
    [
        ("  a \n\t red\u00a0circle  ", "a red circle"),
        ("salt &amp;amp; pepper &lt;3", "salt & pepper <3"),
        ("it\u2019s \u201cred\u201d &ldquo;x&rdquo;", 'it\'s "red" "x"'),
        ("", ""),
    ],
)
def test_prompts_are_cleaned_as_wan_cleans_them(prompt, cleaned):
    assert clean(prompt) == cleaned


def test_a_prompt_ends_with_the_end_token(encoder):
    assert encoder.tokens("") == [1]
    assert encoder.tokens("a red circle")[-1] == 1
    assert encoder.tokens("a   red\ncircle ") == encoder.tokens("a red circle")


def test_a_long_prompt_is_cut_at_512_tokens_and_says_what_it_loses(encoder):
    long = encoder.tokens("red circle " * 600)
    assert len(long) == 512 and long[-1] == 1
    assert encoder.encode(["red circle " * 600]).shape == (1, 512, WIDTH)
    assert set(encoder.truncated("red circle " * 600)) == {"red", "circle"}
    assert encoder.truncated(PROMPTS[2]) == []


def tokenizer_json(spiece):
    """The same vocabulary as Hugging Face stores it; with padding and truncation, which are not wanted here."""
    tokenizers = pytest.importorskip("tokenizers", reason="comes with transformers")
    pieces = sentencepiece.SentencePieceProcessor(model_proto=spiece)
    vocabulary = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.get_piece_size())]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, unk_id=2))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = tokenizers.decoders.Metaspace(prepend_scheme="always")
    tokenizer.enable_padding(length=32)
    tokenizer.enable_truncation(16)
    return tokenizer.to_str()


def test_a_tokenizer_may_be_given_as_file_or_folder(tmp_path, encoder, wan, spiece):
    save_file(hugging_face(wan), tmp_path / "umt5.safetensors")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "spiece.model").write_bytes(spiece)
    (tmp_path / "b" / "tokenizer.json").write_text(tokenizer_json(spiece), encoding="utf-8")
    for tokenizer in ("a", "b", "a/spiece.model", "b/tokenizer.json"):
        other = load(tmp_path / "umt5.safetensors", tokenizer=tmp_path / tokenizer)
        for prompt in PROMPTS:
            assert other.tokens(prompt) == encoder.tokens(prompt), tokenizer
        assert other.truncated("red circle " * 600) == encoder.truncated("red circle " * 600)


def test_without_a_tokenizer_the_error_says_which_one(tmp_path, wan):
    save_file(hugging_face(wan), tmp_path / "umt5.safetensors")
    with pytest.raises(ValueError, match=r"carries no tokenizer.*spiece.model or tokenizer.json of google/umt5-xxl"):
        load(tmp_path / "umt5.safetensors")
    with pytest.raises(ValueError, match="no file, nor a folder with one"):
        load(tmp_path / "umt5.safetensors", tokenizer=tmp_path / "nowhere")


@pytest.mark.parametrize("name, content", [("spiece.model", b"no model"), ("tokenizer.json", b"{}")])
def test_a_broken_tokenizer_is_named(tmp_path, wan, name, content):
    save_file(hugging_face(wan), tmp_path / "umt5.safetensors")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*Give as tokenizer"):
        load(tmp_path / "umt5.safetensors")


def test_another_models_tokenizer_is_refused(tmp_path, wan, spiece):
    many = dict(wan, **{"token_embedding.weight": torch.randn(2000, WIDTH)})
    with pytest.raises(ValueError, match="for a text encoder of 2000: it is another model's"):
        load(comfy_file(tmp_path / "umt5.safetensors", many, spiece))


# Errors


def t5(wan):
    weights = hugging_face(wan)
    return {name: w for name, w in weights.items() if "attention_bias" not in name or ".block.0." in name}


OTHER_FILES = {
    "a Wan diffusion model": {"patch_embedding.weight": torch.ones(1), "blocks.0.self_attn.q.weight": torch.ones(1)},
    "a CLIP encoder": {"text_model.encoder.layers.0.self_attn.q_proj.weight": torch.ones(1)},
    "the Wan 2.1 VAE": {"decoder.middle.0.residual.0.gamma": torch.ones(1)},
    "a language model": {"model.layers.0.self_attn.q_proj.weight": torch.ones(1)},
    "a LoRA": {"lora_unet_blocks_0.lora_down.weight": torch.ones(1)},
    r"no text encoder known here \(its first tensors: x\)": {"x": torch.ones(1)},
}


@pytest.mark.parametrize("kind", OTHER_FILES)
def test_another_models_file_is_called_what_it_is(tmp_path, kind):
    save_file(OTHER_FILES[kind], tmp_path / "file.safetensors")
    with pytest.raises(ValueError, match=f"{kind}.*Needed is the UMT5-XXL encoder"):
        load(tmp_path / "file.safetensors")


def test_a_checkpoint_of_nested_dicts_is_called_what_it_is(tmp_path):
    torch.save({"generator_ema": {"model.patch_embedding.weight": torch.ones(1)}, "step": 3}, tmp_path / "dmd.pt")
    with pytest.raises(ValueError, match="a Wan diffusion model"):
        load(tmp_path / "dmd.pt")


def test_the_t5_of_flux_is_not_taken_for_umt5(tmp_path, wan, spiece):
    save_file({**t5(wan), "spiece_model": bytes_tensor(spiece)}, tmp_path / "t5xxl_fp16.safetensors")
    with pytest.raises(ValueError, match="a T5 encoder .*not UMT5"):
        load(tmp_path / "t5xxl_fp16.safetensors")


def test_missing_tensors_are_counted(tmp_path, wan, spiece):
    weights = {name: weight for name, weight in wan.items() if "blocks.2.ffn" not in name}
    wan_file(tmp_path / "umt5.pth", weights, spiece)
    with pytest.raises(ValueError, match=r"lacks 3 of .* the first encoder.block.2.*Download it again"):
        load(tmp_path / "umt5.pth")


def test_integer_weights_are_refused(tmp_path, wan, spiece):
    name = "encoder.block.1.layer.0.SelfAttention.k.weight"
    comfy_file(tmp_path / "int8.safetensors", wan, spiece, **{name: torch.zeros(HEADS * HEAD_DIM, WIDTH).byte()})
    with pytest.raises(ValueError, match=f"whose {name} is torch.uint8.*use the fp16 or fp8_scaled file"):
        load(tmp_path / "int8.safetensors")


@pytest.mark.parametrize("shape", [(), (4,), (0, 4), (4, 0)])
def test_sizes_that_cannot_be_told_are_refused(tmp_path, wan, spiece, shape):
    for name in text.SIZED:
        comfy_file(tmp_path / "odd.safetensors", wan, spiece, **{name: torch.ones(shape)})
        with pytest.raises(ValueError, match=f"whose {re.escape(name)} is no matrix"):
            bytes_loaded(tmp_path / "odd.safetensors")


def test_block_scales_are_refused(tmp_path, wan, spiece):
    weights = scaled_fp8(hugging_face(wan), "weight_scale")
    weights["encoder.block.1.layer.0.SelfAttention.k.weight_scale"] = torch.ones(HEADS * HEAD_DIM, 2)
    save_file({**weights, "spiece_model": bytes_tensor(spiece)}, tmp_path / "mx.safetensors")
    with pytest.raises(ValueError, match="Got 64 scales for the 32 rows"):
        load(tmp_path / "mx.safetensors")


def damaged(tmp_path, wan, spiece):
    whole = comfy_file(tmp_path / "whole.safetensors", wan, spiece).read_bytes()
    archive = wan_file(tmp_path / "whole.pth", wan, spiece).read_bytes()
    torch.save(wan, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    return {
        "cut.safetensors": whole[: len(whole) // 2],
        "cut.pth": archive[: len(archive) // 2],
        "empty.safetensors": b"",
        "old.pth": (tmp_path / "old.pth").read_bytes(),
        "pointer.safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 6735906897\n",
    }


def test_damaged_files_are_refused(tmp_path, wan, spiece):
    for name, content in damaged(tmp_path, wan, spiece).items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.*is needed"):
            load(tmp_path / name)


def test_a_gguf_file_is_refused(tmp_path):
    (tmp_path / "umt5.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(ValueError, match="a GGUF file"):
        load(tmp_path / "umt5.gguf")


class Intruder:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def test_code_in_a_pickle_is_not_run(tmp_path):
    mark = tmp_path / "ran"
    torch.save({"token_embedding.weight": Intruder(mark)}, tmp_path / "bad.pth")
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Intruder(mark)))
    with zipfile.ZipFile(tmp_path / "bad.pth") as archive:
        assert any(name.endswith("data.pkl") for name in archive.namelist())
    for name in ("bad.pth", "bare.pth"):
        with pytest.raises(ValueError, match="not opened because that could run code"):
            load(tmp_path / name)
    assert not mark.exists()


def test_paths_that_hold_nothing(tmp_path):
    with pytest.raises(ValueError, match="nowhere.safetensors, which does not exist"):
        load(tmp_path / "nowhere.safetensors")
    with pytest.raises(ValueError, match="the folder .* with no model"):
        load(tmp_path)


def test_float16_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"overflows. Use torch.bfloat16 or torch.float32"):
        load(tmp_path, dtype=torch.float16)


@pytest.mark.parametrize("package", ["transformers", "sentencepiece", "tokenizers"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, wan, spiece, package):
    save_file(hugging_face(wan), tmp_path / "umt5.safetensors")
    name, content = (
        ("tokenizer.json", tokenizer_json(spiece).encode()) if package == "tokenizers" else ("spiece.model", spiece)
    )
    (tmp_path / name).write_bytes(content)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"needs the package {package}.*pip install {package}"):
        load(tmp_path / "umt5.safetensors")


def test_nothing_is_looked_up_on_the_network(tmp_path, monkeypatch, wan, spiece):
    def refuse(*_):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert load(hugging_face_folder(tmp_path / "umt5-xxl", wan, spiece)).encode(PROMPTS).isfinite().all()
