"""The library end to end on every device there is; CUDA variants run under `make gpu`."""

import pytest
import torch
from torch.nn import functional as F

import mfac

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def _model_and_batches(device):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 5))
    return model.to(device), [(torch.randn(8, 3, 8, 8), torch.randint(5, (8,))) for _ in range(12)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.filterwarnings("ignore:.*no compiled kernels:RuntimeWarning")
def test_prune_step(device):
    """The same masks and weights as the reference on the CPU."""
    model, batches = _model_and_batches(device)
    exact, _ = _model_and_batches("cpu")
    grads = mfac.collect_gradients(model, batches, F.cross_entropy, 12)
    assert grads.device.type == device
    result = mfac.prune_step(model, grads, 0.7, block_size=300)
    expected = mfac.prune_step(exact, grads.tensor.cpu(), 0.7, block_size=300, backend="reference")
    for name, mask in result.masks.items():
        assert torch.equal(mask.cpu(), expected.masks[name])
    for weight, other in zip(model.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(weight.cpu(), other, rtol=1e-4, atol=1e-6)  # the policy's 1e-4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.filterwarnings("ignore:.*no compiled kernels:RuntimeWarning")
def test_pruner(device):
    model, batches = _model_and_batches(device)
    pruner = mfac.Pruner(model, batches, F.cross_entropy, sparsity=0.9, end=0, num_grads=12, recomputations=3)
    pruner.step()
    zeros = sum(int((p == 0).sum()) for p in pruner.params.values())
    assert zeros == round(0.9 * sum(p.numel() for p in pruner.params.values()))
