"""Threads of the CPU, by how much there is to do."""

import pytest
import torch

from sf_core import device


@pytest.mark.parametrize("tokens, there, used", [(48, 8, 1), (108, 8, 2), (768, 8, 8), (768, 2, 2), (10**6, 1, 1)])
def test_threads_go_by_the_tokens_of_a_forward_and_never_beyond_what_there_is(monkeypatch, tokens, there, used):
    chosen = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: there)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    device.use_threads_for(tokens)
    assert chosen == [used]
