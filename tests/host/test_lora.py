"""LoRAs and their relatives: what our merge makes of a weight is what ComfyUI's own loader makes of it."""

import ast
import itertools
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.host.test_models import wan_weights

LAYER = "blocks.0.ffn.0"
SHAPES = {"linear": (24, 16), "square": (16, 16), "kernel": (24, 16, 3, 3)}
RANK = 4


@pytest.fixture(scope="module")
def read_lora(pack):
    return sys.modules[f"{pack.__name__}.sf_core.checkpoints.lora"].read_lora


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * 0.3


def low_rank(out, width, *kernel):
    return {"lora_up.weight": numbers(out, RANK, *[1] * len(kernel)), "lora_down.weight": numbers(RANK, width, *kernel)}


def with_mid(out, width, *kernel):
    ones = [1] * len(kernel)
    return {
        "lora_up.weight": numbers(out, RANK, *ones), "lora_down.weight": numbers(RANK, width, *ones),
        "lora_mid.weight": numbers(RANK, RANK, *kernel),
    }  # fmt: skip


def loha(out, width, *kernel):
    columns = width * torch.Size(kernel).numel()
    sides = {f"hada_w{n}_a": numbers(out, RANK, seed=n) for n in (1, 2)}
    return sides | {f"hada_w{n}_b": numbers(RANK, columns, seed=n) for n in (1, 2)}


def loha_with_core(out, width, *kernel):
    parts = {f"hada_t{n}": numbers(RANK, RANK, *kernel, seed=n) for n in (1, 2)}
    parts |= {f"hada_w{n}_a": numbers(RANK, out, seed=n) for n in (1, 2)}
    return parts | {f"hada_w{n}_b": numbers(RANK, width, seed=n) for n in (1, 2)}


def lokr(out, width, *kernel):
    return {"lokr_w1": numbers(4, 2), "lokr_w2": numbers(out // 4, width // 2, *kernel)}


def lokr_in_halves(out, width, *kernel):
    columns = width // 2 * torch.Size(kernel).numel()
    return {
        "lokr_w1_a": numbers(4, 3), "lokr_w1_b": numbers(3, 2),
        "lokr_w2_a": numbers(out // 4, RANK), "lokr_w2_b": numbers(RANK, columns),
    }  # fmt: skip


def lokr_half_whole(out, width, *kernel):
    parts = lokr_in_halves(out, width, *kernel)
    return {"lokr_w1": numbers(4, 2)} | {name: part for name, part in parts.items() if "w2" in name}


def lokr_other_half_whole(out, width, *kernel):
    return {"lokr_w1_a": numbers(4, 3), "lokr_w1_b": numbers(3, 2), "lokr_w2": lokr(out, width, *kernel)["lokr_w2"]}


def lokr_with_core(out, width, *kernel):
    return {
        "lokr_w1": numbers(4, 2), "lokr_t2": numbers(RANK, RANK, *kernel),
        "lokr_w2_a": numbers(RANK, out // 4), "lokr_w2_b": numbers(RANK, width // 2),
    }  # fmt: skip


def glora(out, width, *kernel):
    ones, columns = [1] * len(kernel), torch.Size(kernel).numel() * width
    return {
        "a1.weight": numbers(width, RANK, *ones), "a2.weight": numbers(RANK, width, *ones),
        "b1.weight": numbers(out, RANK), "b2.weight": numbers(RANK, columns),
    }  # fmt: skip


def first_glora(out, width):
    return {
        "a1.weight": numbers(RANK, width), "a2.weight": numbers(width, RANK),
        "b1.weight": numbers(RANK, width), "b2.weight": numbers(out, RANK),
    }  # fmt: skip


def oft(out, width, *kernel):
    return {"oft_blocks": numbers(out // 4, 4, 4)}


def boft(out, width, *kernel):
    return {"oft_blocks": numbers(2, out // 4, 4, 4), "rescale": 1 + numbers(out, 1, *[1] * len(kernel))}


KINDS = (
    low_rank, with_mid, loha, loha_with_core, lokr, lokr_in_halves, lokr_half_whole, lokr_other_half_whole,
    glora, first_glora, oft, boft,
)  # fmt: skip
ONLY_WITH_KERNEL = {with_mid, loha_with_core}


def lengths(shape):
    """Lengths of DoRA, of rows and of columns."""
    out, width, *kernel = shape
    return {
        "rows": 1 + numbers(out, *[1] * (len(shape) - 1)),
        "columns": 1 + numbers(1, width, *[1] * len(kernel)),
    }


CASES = [
    (kind, shape, alpha, dora, strength)
    for kind, shape, alpha, dora, strength in itertools.product(
        KINDS, SHAPES, (None, 1.0, 3.0), (None, "rows", "columns"), (1.0, 0.6, -0.5)
    )
    if not (kind in ONLY_WITH_KERNEL and shape != "kernel")
    and not (kind is first_glora and shape == "kernel")
    and not (kind in (oft, boft) and dora)  # lengths over rotations are read by nobody
    and not (kind is boft and alpha is None)  # ComfyUI fails
    and not (dora == "columns" and shape == "square")  # cannot be told from rows by their first size: see below
]


def comfyui_merges(tensors, weight, strength):
    """A weight with a file's tensors for LAYER in it, as ComfyUI computes it."""
    import comfy.lora

    patches = comfy.lora.load_lora(tensors, {LAYER: "w"}, log_missing=True)
    return comfy.lora.calculate_weight([(strength, patches["w"], 1.0, None, None)], weight.clone(), "w")


def we_merge(read_lora, folder, tensors, weight, strength, metadata=None):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "lora.safetensors", metadata)
    lora = read_lora(folder / "lora.safetensors", {f"{LAYER}.weight": weight})
    assert lora.left_out == []
    return lora.adapters[f"{LAYER}.weight"].added_to(weight, strength)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_merged_weight_is_comfyuis(read_lora, tmp_path, caplog, kind):
    cases = [case for case in CASES if case[0] is kind]
    for _, shape, alpha, dora, strength in cases:
        weight = numbers(*SHAPES[shape], seed=5)
        tensors = {f"{LAYER}.{name}": part for name, part in kind(*SHAPES[shape]).items()}
        if alpha is not None:
            tensors[f"{LAYER}.alpha"] = torch.tensor(alpha)
        if dora is not None:
            tensors[f"{LAYER}.dora_scale"] = lengths(SHAPES[shape])[dora]
        theirs = comfyui_merges(tensors, weight, strength)
        ours = we_merge(read_lora, tmp_path, tensors, weight, strength)
        what = f"{shape}, alpha {alpha}, lengths of {dora}, strength {strength}"
        torch.testing.assert_close(ours, theirs, atol=5e-6, rtol=5e-6, msg=f"{what}: {(ours - theirs).abs().max()} off")
        assert (theirs - weight).norm() > 1e-3 * weight.norm(), what
    assert cases and "ERROR" not in caplog.text


def test_lokr_with_a_core_is_that_with_its_product_whole(read_lora, tmp_path):
    """ComfyUI computes the product, and then fails."""
    shape, core = SHAPES["kernel"], lokr_with_core(*SHAPES["kernel"])
    product = torch.einsum("abhw,br,ap->prhw", core["lokr_t2"], core["lokr_w2_b"], core["lokr_w2_a"])
    whole = {f"{LAYER}.lokr_w1": core["lokr_w1"], f"{LAYER}.lokr_w2": product.contiguous()}
    parts = {f"{LAYER}.{name}": part for name, part in core.items()}
    weight = numbers(*shape)
    for alpha, strength in ((None, 1.0), (2.0, 0.5)):
        theirs = comfyui_merges(whole, weight, strength * (1 if alpha is None else alpha / RANK))
        told = {} if alpha is None else {f"{LAYER}.alpha": torch.tensor(alpha)}
        ours = we_merge(read_lora, tmp_path, parts | told, weight, strength)
        torch.testing.assert_close(ours, theirs, atol=5e-6, rtol=5e-6)


@pytest.mark.parametrize("kind", [with_mid, loha_with_core], ids=lambda kind: kind.__name__)
def test_kernels_of_three_dimensions_are_those_of_two_side_by_side(read_lora, tmp_path, kind):
    """ComfyUI knows two; a patch embedding has three."""
    flat, deep = (24, 16, 1, 6), (24, 16, 1, 2, 3)
    parts = {f"{LAYER}.{name}": part for name, part in kind(*flat).items()}
    weight = numbers(*flat)
    theirs = comfyui_merges(parts, weight, 1.0)
    kernels = {
        name: part.reshape(*part.shape[:2], 1, 2, 3) if part.shape[2:] == (1, 6) else part.reshape(*part.shape, 1)
        if part.ndim == 4 else part
        for name, part in parts.items()
    }  # fmt: skip
    ours = we_merge(read_lora, tmp_path, kernels, weight.reshape(deep), 1.0)
    torch.testing.assert_close(ours.reshape(flat), theirs, atol=5e-6, rtol=5e-6)


def test_pefts_magnitudes_are_the_lengths_of_rows_with_the_adapter_in_them(read_lora, tmp_path):
    weight, parts = numbers(24, 16), low_rank(24, 16)
    down, up, lengths = parts["lora_down.weight"], parts["lora_up.weight"], 1 + numbers(24)
    whole = weight + 2 * up @ down
    expected = whole * (lengths / torch.linalg.norm(whole, dim=1)).unsqueeze(1)
    tensors = {f"base_model.model.{LAYER}.lora_{half}.weight": part for half, part in (("A", down), ("B", up))}
    config = {"lora_adapter_metadata": json.dumps({"lora_alpha": 2 * RANK})}
    for name in ("lora_magnitude_vector", "lora_magnitude_vector.weight", "lora_magnitude_vector.default.weight"):
        full = tensors | {f"base_model.model.{LAYER}.{name}": lengths}
        ours = we_merge(read_lora, tmp_path, full, weight, 1.0, config)
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-6)
        half = we_merge(read_lora, tmp_path, full, weight, 0.5, config)
        torch.testing.assert_close(half, (weight + expected) / 2, atol=1e-6, rtol=1e-6)


# --- Names -----------------------------------------------------------------------------------------------------------

OLD = {"down": "lora_down.weight", "up": "lora_up.weight"}
NAMES = {
    "diffusion_model, A and B": ("diffusion_model.", ".", "lora_A.weight", "lora_B.weight"),
    "diffusion_model, down and up": ("diffusion_model.", ".", "lora_down.weight", "lora_up.weight"),
    "an adapter's name": ("diffusion_model.", ".", "lora_A.default.weight", "lora_B.default.weight"),
    "no weight": ("diffusion_model.", ".", "lora_A", "lora_B"),
    "lora.down": ("diffusion_model.", ".", "lora.down.weight", "lora.up.weight"),
    "lora_linear_layer": ("diffusion_model.", ".", "lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    "kohya": ("lora_unet_", "_", "lora_down.weight", "lora_up.weight"),
    "Wan Fun": ("lora_unet__", "_", "lora_down.weight", "lora_up.weight"),
}


@pytest.fixture(scope="module")
def plain(tiny):
    """The built-in model's weights in float32 under Wan's names."""
    state = tiny.model.model.state_dict()
    return {name.removeprefix("diffusion_model."): weight.float() for name, weight in state.items()}


def all_layers(plain):
    return [name.removesuffix(".weight") for name, w in plain.items() if name.endswith(".weight") and w.ndim == 2]


def check_whole_file(tiny, plain, read_lora, folder, tensors):
    """The same weights change by the same numbers as in ComfyUI, and nothing of the file is left out."""
    import comfy.lora
    import comfy.lora_convert

    keys = comfy.lora.model_lora_keys_unet(tiny.model.model, {})
    theirs = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(tensors)), keys)
    save_file(tensors, folder / "lora.safetensors")
    ours = read_lora(folder / "lora.safetensors", plain)
    assert ours.left_out == []
    assert {f"diffusion_model.{name}" for name in ours.adapters} == set(theirs)
    for name, adapter in ours.adapters.items():
        patch = (0.7, theirs[f"diffusion_model.{name}"], 1.0, None, None)
        expected = comfy.lora.calculate_weight([patch], plain[name].clone(), name)
        torch.testing.assert_close(adapter.added_to(plain[name], 0.7), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES.keys())
def test_every_naming_of_comfyuis_loader_is_read(tiny, plain, read_lora, tmp_path, names):
    prefix, dot, down, up = names
    tensors = {}
    for layer in all_layers(plain):
        out, width = plain[f"{layer}.weight"].shape
        at = prefix + layer.replace(".", dot)
        tensors |= {f"{at}.{down}": numbers(RANK, width), f"{at}.{up}": numbers(out, RANK)}
        tensors[f"{at}.alpha"] = torch.tensor(2.0)
    check_whole_file(tiny, plain, read_lora, tmp_path, tensors)


@pytest.mark.parametrize("prefix, dot", [("diffusion_model.", "."), ("lora_unet_", "_")])
@pytest.mark.parametrize("kind", [loha, lokr, lokr_in_halves, glora, oft], ids=lambda kind: kind.__name__)
def test_relatives_of_lora_over_the_whole_model_are_read(tiny, plain, read_lora, tmp_path, kind, prefix, dot):
    layers = [
        layer for layer in all_layers(plain) if ".".join(layer.split(".")[2:]) in ("self_attn.q", "ffn.0", "ffn.2")
    ]
    tensors = {
        f"{prefix}{layer.replace('.', dot)}.{name}": part.clone()
        for layer in layers
        for name, part in kind(*plain[f"{layer}.weight"].shape).items()
    }
    check_whole_file(tiny, plain, read_lora, tmp_path, tensors)


def test_differences_and_replacements_of_all_that_comfyui_changes_are_read(tiny, plain, read_lora, tmp_path):
    at = "diffusion_model."
    tensors = {
        f"{at}blocks.0.norm3.diff": plain["blocks.0.norm3.weight"] * 0.1,
        f"{at}blocks.0.norm3.diff_b": plain["blocks.0.norm3.bias"] + 0.1,
        f"{at}blocks.1.norm3.w_norm": plain["blocks.1.norm3.weight"] * 0.2,
        f"{at}blocks.1.norm3.b_norm": plain["blocks.1.norm3.bias"] + 0.2,
        f"{at}blocks.1.modulation.diff": plain["blocks.1.modulation"] * 0.5,
        f"{at}head.modulation.set_weight": plain["head.modulation"] + 1,
        f"{at}patch_embedding.diff": plain["patch_embedding.weight"] * 0.5,
        f"{at}blocks.0.ffn.0.bias.diff": plain["blocks.0.ffn.0.bias"] + 1,
        f"{at}blocks.0.self_attn.norm_q.set_weight": plain["blocks.0.self_attn.norm_q.weight"] * 2,
    }
    check_whole_file(tiny, plain, read_lora, tmp_path, tensors)


# --- The nodes -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(comfyui, tmp_path, monkeypatch):
    """Models folders with a small float32 model in them."""
    import folder_paths

    for kind in ("diffusion_models", "loras"):
        (tmp_path / kind).mkdir()
        extensions = folder_paths.folder_names_and_paths[kind][1]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(tmp_path / kind)], extensions))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    save_file(wan_weights(), tmp_path / "diffusion_models" / "self_forcing.safetensors")
    return tmp_path


def load(call, lora, strength=1.0):
    return call("LoadModel", "self_forcing.safetensors", "auto", "auto", lora, strength)


def for_layer(parts, layer="blocks.0.ffn.0"):
    return {f"diffusion_model.{layer}.{name}": part for name, part in parts.items()}


def test_loras_of_the_loader_and_of_stock_loaders_behind_it_add_up(call, folder):
    import nodes

    def stock(model, name, strength):
        return nodes.LoraLoaderModelOnly().load_lora_model_only(model, name, strength)[0]

    files = {
        "first.safetensors": low_rank(256, 128),
        "second.safetensors": lokr(256, 128),
        "third.safetensors": loha(256, 128),
    }
    for name, parts in files.items():
        save_file(for_layer(parts), folder / "loras" / name)
    strengths = dict(zip(files, (1.0, 0.5, -0.25)))
    chained = load(call, "first.safetensors", 1.0)
    for name in ("second.safetensors", "third.safetensors"):
        chained = stock(chained, name, strengths[name])
    behind = load(call, "none")
    for name, strength in strengths.items():
        behind = stock(behind, name, strength)
    key = "diffusion_model.blocks.0.ffn.0.weight"
    weights = [model.patch_weight_to_device(key, return_weight=True) for model in (chained, behind)]
    torch.testing.assert_close(*weights, atol=1e-5, rtol=1e-5)
    plain = wan_weights()["blocks.0.ffn.0.weight"]
    assert (weights[0].float() - plain).norm() > 0.1 * plain.norm()


def of_another_width():
    return for_layer(low_rank(512, 256))


BAD = {
    "another model": of_another_width,
    "half": lambda: {name: part for name, part in for_layer(low_rank(256, 128)).items() if "up" in name},
    "half of LoHa": lambda: {name: part for name, part in for_layer(loha(256, 128)).items() if "w1" in name},
    "a kind not read": lambda: for_layer({"oft_R.weight": numbers(2, 6)}),
    "other layers": lambda: for_layer(low_rank(8, 8), "double_blocks.0.img_attn.qkv"),
    "no tensors": dict,
    "a model": lambda: wan_weights(),
    "a VAE": lambda: {"decoder.middle.0.residual.0.gamma": torch.ones(2)},
    "integers": lambda: {name: part.to(torch.int8) for name, part in for_layer(low_rank(256, 128)).items()},
    "twice": lambda: for_layer(low_rank(256, 128)) | {
        f"other.{name}": part.clone() for name, part in for_layer(low_rank(256, 128)).items()
    },
}  # fmt: skip


@pytest.mark.parametrize("make", BAD.values(), ids=BAD.keys())
def test_what_the_node_says_of_a_bad_lora_is_in_words_of_the_node(call, folder, make):
    save_file(make(), folder / "loras" / "bad.safetensors")
    with pytest.raises(ValueError, match=r"^Got bad\.safetensors") as caught:
        load(call, "bad.safetensors")
    assert words_of_the_command_line(str(caught.value)) == []


def test_a_float8_model_and_a_lora_is_refused_in_words_of_the_node(call, folder):
    weights = {
        name: w.to(torch.float8_e4m3fn) if name.startswith("blocks.") and w.ndim == 2 else w
        for name, w in wan_weights().items()
    }
    save_file(weights, folder / "diffusion_models" / "self_forcing.safetensors")
    save_file(for_layer(low_rank(256, 128)), folder / "loras" / "good.safetensors")
    with pytest.raises(ValueError, match="float8 model") as caught:
        load(call, "good.safetensors")
    assert words_of_the_command_line(str(caught.value)) == []


def words_of_the_command_line(text):
    """Options, and what is typed to run the engine."""
    return re.findall(r"(?<![\w-])--\w[\w-]*|python -m", text)


def test_no_message_that_a_node_can_give_names_an_option(pack):
    """Of nodes/ and of the engine, but for the pipeline and what is above it, which nodes do not call."""
    root = Path(pack.__file__).parent
    for path in (*root.glob("nodes/**/*.py"), *root.glob("sf_core/**/*.py")):
        if path.relative_to(root).parts[1] in ("cli", "training", "pipeline.py", "memory.py") or path.stem == "convert":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        raised = [node for node in ast.walk(tree) if isinstance(node, (ast.Raise, ast.Call))]
        said = [part.value for node in raised for part in ast.walk(node) if isinstance(part, ast.Constant)]
        assert [text for text in said if isinstance(text, str) and words_of_the_command_line(text)] == [], path


def test_what_is_left_out_of_a_lora_stands_on_the_node(call, folder, caplog):
    caplog.set_level("INFO")
    tensors = for_layer(low_rank(256, 128)) | for_layer(low_rank(8, 8), "blocks.0.cross_attn.k_img")
    save_file(tensors | for_layer(low_rank(512, 128), "blocks.1.ffn.0"), folder / "loras" / "some.safetensors")
    load(call, "some.safetensors")
    assert "2 parts of it do not fit this model and are left out, such as diffusion_model.blocks.0" in caplog.text
