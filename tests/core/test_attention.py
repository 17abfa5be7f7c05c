"""Attention kernels by name, with stand-ins for packages that need a GPU."""

import sys
from types import ModuleType

import pytest
import torch

from sf_core.wan.attention import KERNELS, attention_kernel, sdpa

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def tokens(seed):
    return torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(seed))  # [B, N, L, D]


def flash(version):
    """flash_attn_func as that version has it: [B, L, N, D] in and out; 3 gives the log-sum-exp beside it."""

    def flash_attn_func(q, k, v):
        assert q.shape == (2, 5, 3, 8)
        out = sdpa(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
        return (out, torch.zeros(2, 3, 5)) if version == 3 else out

    return flash_attn_func


def sageattn(q, k, v, tensor_layout):
    assert tensor_layout == "HND"
    return sdpa(q, k, v)


@pytest.fixture
def install(monkeypatch):
    """install("flash_attn", flash_attn_func=...) makes a module that can be imported; the others cannot."""
    for name in ("flash_attn_interface", "flash_attn", "sageattention"):
        monkeypatch.setitem(sys.modules, name, None)

    def put(name, **functions):
        module = ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)

    return put


@pytest.mark.parametrize(
    "name, module, function",
    [
        ("flash", "flash_attn_interface", {"flash_attn_func": flash(3)}),
        ("flash", "flash_attn", {"flash_attn_func": flash(2)}),
        ("sage", "sageattention", {"sageattn": sageattn}),
    ],
)
def test_kernels_agree_with_torchs(install, name, module, function):
    install(module, **function)
    q, k, v = tokens(0), tokens(1), tokens(2)
    attention = attention_kernel(name, CUDA, torch.bfloat16)
    torch.testing.assert_close(attention(q, k, v), sdpa(q, k, v))
    with pytest.raises(ValueError, match="Use sdpa"):
        attention(q, k, v, torch.ones(5, 5, dtype=torch.bool))


@pytest.mark.parametrize("name, package", [("flash", "pip install flash-attn"), ("sage", "pip install sageattention")])
def test_a_missing_package_is_named(install, name, package):
    with pytest.raises(ImportError, match=package):
        attention_kernel(name, CUDA, torch.bfloat16)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("device, dtype", [(CPU, torch.bfloat16), (CUDA, torch.float32)])
def test_only_torchs_runs_anywhere(name, device, dtype):
    if name == "sdpa":
        assert attention_kernel(name, device, dtype) is sdpa
        return
    with pytest.raises(ValueError, match="needs a CUDA GPU and bfloat16"):
        attention_kernel(name, device, dtype)
