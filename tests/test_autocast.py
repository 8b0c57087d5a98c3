"""Mixed precision: pruning inside of a torch.autocast block, and steps that a GradScaler skips."""

import math

import pytest
import torch
from test_works_with_training import CE, batches, mlp

import mfac


def test_inside_of_autocast():
    """Its copies of the weights do not outlive the weights: as if each forward pass had a block of its own.

    Also if the model has a block of its own within.
    """
    options = {"num_grads": 6, "recomputations": 3, "final_corrections": 2, "progress": False}
    x = batches()[0][0]

    def forward(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return CE(model(batch[0]), batch[1])

    expected, model = mlp(), mlp()
    wanted = mfac.prune(expected, batches(), None, 0.8, forward=forward, **options)
    decorated = mlp()
    decorated.forward = torch.autocast("cpu", torch.bfloat16)(decorated.forward)
    with torch.autocast("cpu", torch.bfloat16):
        other = mfac.prune(decorated, batches(), CE, 0.8, **options)
    assert [step.step_length for step in other.steps] == [step.step_length for step in wanted.steps]
    with torch.autocast("cpu", torch.bfloat16):
        model.eval()(x)
        result = mfac.prune(model, batches(), CE, 0.8, **options)
        inside = model.eval()(x)
    assert [step.step_length for step in result.steps] == [step.step_length for step in wanted.steps]
    assert any(step.step_length for step in result.steps)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), expected.parameters(), strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(inside, expected.eval()(x))


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_grad_scaler_skips(fused):
    """A fused optimizer is called then too."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    pruner = mfac.Pruner(model, sparsity=0.5, end=2, criterion="magnitude")
    pruner.attach(optimizer)
    scaler, sparsities = torch.amp.GradScaler("cpu", init_scale=1024.0), []
    for (x, y), factor in zip(batches(), (math.inf, 1.0, 1.0), strict=False):
        optimizer.zero_grad()
        scaler.scale(CE(model(x), y) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        sparsities.append(pruner.sparsity)
    assert sparsities[0] == 0 < sparsities[1] < sparsities[2] and pruner.finished
