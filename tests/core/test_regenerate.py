"""The rule behind every golden tensor: if it moved, all of them would look wrong."""

import torch

from tests.core.regenerate import weights


def test_weights_depend_on_name_and_seed_alone():
    shapes = {"a.weight": (4, 3), "a.bias": (4,), "norm.weight": (64,), "blocks.0.modulation": (1, 6, 16)}
    drawn = weights(shapes, 1)
    assert torch.equal(weights({"a.bias": (4,)}, 1)["a.bias"], drawn["a.bias"])
    assert not torch.equal(weights(shapes, 2)["a.bias"], drawn["a.bias"])
    torch.testing.assert_close(
        drawn["a.bias"], torch.tensor([-0.056729477, -0.008730098, 0.039316673, 0.036586609]), atol=1e-7, rtol=0
    )
    assert abs(drawn["norm.weight"].mean() - 1) < 0.05
