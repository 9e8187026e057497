"""Training against a plain loop of Adam."""

import random

import torch

from kedit.editors.control import Control
from kedit.editors.training import Training


class Steps:
    steps, seed = 12, 3


def test_rates_fall_linearly_and_the_best_validated_state_is_the_result(tmp_path):
    start, goal, losses = torch.arange(3.0), torch.tensor([1.0, 0.0, 5.0]), iter([3.0, 1.0, 2.0])

    def toy():
        return torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())

    a, b = toy()
    training = Training(
        tensors={"a": a, "b": b},
        lr={"a": 0.1, "b": 0.01},
        loss=lambda rng: (a - goal).square().sum() * rng.random() + (b * a).sum(),
        begin=lambda: None,
        every=4,
        clip=0.5,
        validate=lambda: {"loss": next(losses)},
    )
    result = training.run(Control, Steps, tmp_path / "training", "toy")

    c, d = toy()
    optimiser = torch.optim.Adam([{"params": [c], "lr": 0.1}, {"params": [d], "lr": 0.01}])
    fall = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / 12)
    for step in range(8):  # the second of three validations is the best
        optimiser.zero_grad()
        ((c - goal).square().sum() * random.Random(f"3/{step}").random() + (d * c).sum()).backward()
        torch.nn.utils.clip_grad_norm_([c, d], 0.5)
        optimiser.step()
        fall.step()
    assert torch.allclose(result["a"], c, atol=1e-6)
    assert torch.allclose(result["b"], d, atol=1e-6)
    assert not torch.allclose(result["a"], a, atol=1e-3)
