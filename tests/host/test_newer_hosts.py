"""ComfyUI after 0.27, which is not run here: stand-ins for what it does otherwise, each of which broke or slowed us."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch


@pytest.fixture(scope="module")
def latent():
    return {"samples": torch.zeros(1, 16, 9, 4, 4)}


# --- A feed-forward with a forward of its own ------------------------------------------------------------------------


class WanFeedForward(torch.nn.Sequential):
    """Two layers under the names they always had, and one call for both and the activation, which is not traced."""

    def forward(self, x):
        return linear_with_activation(self[2], self[0](x))


@torch.compiler.disable
def linear_with_activation(layer, x):
    return layer(torch.nn.functional.gelu(x, approximate="tanh"))


@pytest.fixture
def newer_blocks(tiny):
    """The built-in model's blocks with such feed-forwards."""
    blocks = tiny.model.model.diffusion_model.blocks
    for block in blocks:
        block.ffn.__class__ = WanFeedForward
    yield blocks
    for block in blocks:
        block.ffn.__class__ = torch.nn.Sequential


@pytest.fixture
def compiled_frames(sample, monkeypatch):
    """compiled_frames() samples with a backend that counts, and gives (latents, how many pieces were compiled)."""
    from any_folder_name.nodes.host import generation
    from any_folder_name.sf_core.wan.compile import compile_ops
    from torch._dynamo.testing import CompileCounter

    def run(**changes):
        torch._dynamo.reset()
        counter = CompileCounter()
        monkeypatch.setattr(generation, "compile_ops", lambda mode: compile_ops(mode, backend=counter))
        return sample(compile="default", **changes), counter.frame_count

    yield run
    torch._dynamo.reset()


@pytest.fixture
def plain_pieces(compiled_frames):
    """How many pieces are compiled of blocks with a plain feed-forward: before, between and after two attentions."""
    return compiled_frames()[1]


def test_its_feed_forward_does_not_break_a_compiled_block(sample, compiled_frames, plain_pieces, newer_blocks):
    plain = sample()
    latents, pieces = compiled_frames()
    assert 3 <= pieces <= plain_pieces
    torch.testing.assert_close(latents, plain, atol=2e-3, rtol=1e-3)
    assert all(type(block.ffn) is WanFeedForward for block in newer_blocks)


def test_a_plain_rollout_calls_its_feed_forward(sample, newer_blocks, monkeypatch):
    calls = []
    forward = WanFeedForward.forward
    monkeypatch.setattr(WanFeedForward, "forward", lambda self, x: calls.append(1) or forward(self, x))
    sample()
    assert len(calls) % len(newer_blocks) == 0 and calls


def test_an_int8_feed_forward_stays_whole_when_compiled(compiled_frames, newer_blocks, monkeypatch):
    """One kernel computes activation and product there."""
    calls = []
    forward = WanFeedForward.forward
    monkeypatch.setattr(
        WanFeedForward, "forward", torch.compiler.disable(lambda self, x: calls.append(1) or forward(self, x))
    )
    for block in newer_blocks:
        monkeypatch.setattr(block.ffn[2].weight, "_layout_cls", "TensorWiseINT8Layout", raising=False)
    _, pieces = compiled_frames()
    assert calls and pieces > 3


def test_a_lora_acts_in_compiled_blocks_of_it(tiny, sample, compiled_frames, newer_blocks):
    patched = tiny.model.clone()
    key = "diffusion_model.blocks.0.ffn.2.weight"
    weight = tiny.model.model.diffusion_model.blocks[0].ffn[2].weight
    patched.add_patches({key: ("diff", (torch.ones(weight.shape) * 0.02,))})
    patched.add_patches({"diffusion_model.blocks.0.modulation": ("diff", (torch.ones(1, 6, weight.shape[0]) * 0.1,))})
    plain = sample(model=patched)
    torch.testing.assert_close(compiled_frames(model=patched)[0], plain, atol=2e-3, rtol=1e-3)
    assert not torch.allclose(plain, sample(), atol=1e-2)


# --- The attention that a layer prefers ------------------------------------------------------------------------------


@pytest.mark.parametrize("compile", ["off", "default"])
def test_layers_tell_the_attention_that_they_prefer(tiny, sample, compiled_frames, monkeypatch, compile):
    from any_folder_name.nodes.host import model as host

    told, plain = [], sample()
    attention = host.optimized_attention

    def newer(*args, preferred_attention=None, **options):
        told.append((options["transformer_options"]["block_index"], preferred_attention))
        return attention(*args, **options)

    monkeypatch.setattr(host, "optimized_attention", newer)
    blocks = tiny.model.model.diffusion_model.blocks
    for index, block in enumerate(blocks):
        for name in ("self_attn", "cross_attn"):
            monkeypatch.setattr(getattr(block, name), "comfy_attention", f"{name} {index}", raising=False)
    latents = sample() if compile == "off" else compiled_frames()[0]
    torch.testing.assert_close(latents, plain, atol=2e-3, rtol=1e-3)
    assert set(told) == {(i, f"{name} {i}") for i in range(len(blocks)) for name in ("self_attn", "cross_attn")}
    assert told[0::2] == [(i, f"self_attn {i}") for i, _ in told[0::2]]  # first itself, then the prompt


def test_layers_that_prefer_none_tell_nothing(sample, monkeypatch):
    from any_folder_name.nodes.host import model as host

    attention, told = host.optimized_attention, []
    monkeypatch.setattr(
        host, "optimized_attention", lambda *args, **options: told.append(options.keys()) or attention(*args, **options)
    )
    sample()
    assert told and not any("preferred_attention" in options for options in told)


# --- Memory ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def little_memory(monkeypatch):
    """A machine with 1 GB free and much swap."""
    from any_folder_name.nodes.host import memory

    monkeypatch.setattr(memory.management, "get_free_memory", lambda device: 1024**3)
    monkeypatch.setattr(memory.psutil, "swap_memory", lambda: SimpleNamespace(free=64 * 1024**3))
    return memory


def test_swap_is_no_room_for_frames_where_the_host_counts_its_container(little_memory, monkeypatch):
    frames = {"frames": 1000, "pixels": 832 * 480, "remedy": "Make a smaller video."}
    little_memory.check_frames(**frames)
    newer = ModuleType("comfy.system_memory")
    newer.__spec__ = SimpleNamespace(name=newer.__name__)
    monkeypatch.setitem(sys.modules, "comfy.system_memory", newer)
    with pytest.raises(ValueError, match=r"Got 1000 frames .*; 1\.0 GiB are free\. Make a smaller video\."):
        little_memory.check_frames(**frames)
    little_memory.check_frames(10, 832 * 480, "")


def test_a_rollout_never_enters_the_forward_in_which_the_host_plans_its_memory(tiny, sample, monkeypatch):
    """What is allocated in there has to be given back there: a KV cache would outlive it."""
    from comfy.model_base import BaseModel

    def planned(*args, **kwargs):
        raise AssertionError("the host's own forward")

    monkeypatch.setattr(BaseModel, "apply_model", planned)
    monkeypatch.setattr(BaseModel, "_apply_model", planned)
    monkeypatch.setattr(type(tiny.model.model.diffusion_model), "forward", planned)
    assert sample().isfinite().all()


# --- Node ids --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("node_id", ["7", "57:3", "a1b2c3:9", 7])
def test_node_ids_are_sent_as_strings(pack, monkeypatch, node_id):
    from queue import Queue

    from any_folder_name.nodes.host import progress

    sent = []
    server = SimpleNamespace(
        client_id="me", sockets={"me": None}, messages=Queue(),
        send_sync=lambda event, data, client: sent.append(data["node"]),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=server)))
    node = SimpleNamespace(hidden=SimpleNamespace(unique_id=node_id))
    progress.send(node, "self_forcing.frames", dict)
    progress.say(node, "a line")
    assert sent == [str(node_id)] * 2
