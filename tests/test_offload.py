"""Gradients in host memory, page by page: the same results as in one piece."""

import pytest
import torch
from torch.nn import functional as F

import mfac
from mfac.ops import reference
from mfac.ops.backend import select_backend
from mfac.ops.offload import PagedOps

CUDA = torch.cuda.is_available()


@pytest.fixture(params=["cpu", "cuda"] if CUDA else ["cpu"])
def device(request):
    return torch.device(request.param)


@pytest.fixture(params=[1, 4 * 12 * 30 * 2, 1 << 20], ids=["a block each", "two blocks each", "one page"])
def paged(request, device):
    kernels = select_backend("auto", device)
    return kernels, PagedOps(kernels, device, request.param)


def test_every_op(paged, device):
    kernels, pages = paged
    grads, (d, block_size, damping) = torch.randn(12, 100), (100, 30, 1e-3)
    whole = grads.to(device)
    active, kept = torch.rand(d, device=device) < 0.7, torch.rand(d, device=device) < 0.4
    groups = torch.randperm(d, device=device).view(25, 4)  # in several blocks each
    subsets = torch.tensor([[0, 1], [1, 3]], device=device)
    weights, x = torch.randn(d, device=device), torch.randn(2, d, device=device)
    factor = kernels.block_factor(whole, damping, block_size, active)
    diagonal = kernels.inverse_diagonal(whole, damping, block_size, active)
    for name, arguments in {
        "block_factor": (damping, block_size, active),
        "inverse_diagonal": (damping, block_size, None),
        "inverse_product": (factor, x, damping, block_size, active),
        "joint_update": (weights, kept, damping, block_size),
        "joint_step": (weights, kept, damping, block_size),
        "independent_update": (weights, kept, diagonal, damping, block_size, active),
        "quadratic_form": (weights, damping, block_size),
        "group_saliency": (weights, groups, subsets, damping, block_size, active),
    }.items():
        results = []
        for module, g in ((kernels, whole), (pages, grads)):
            own = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
            out = getattr(module, name)(g, *own)
            results += [[*(out if isinstance(out, tuple) else (out,)), *own]]
        for one, other in zip(*results, strict=True):
            if isinstance(one, torch.Tensor):
                torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-6, msg=name)


def test_fewer_columns_than_a_block_in_the_last_page():
    grads = torch.randn(40, 65)
    pages = PagedOps(reference, torch.device("cpu"), 1)
    torch.testing.assert_close(pages.block_factor(grads, 1e-3, 32), reference.block_factor(grads, 1e-3, 32))


@pytest.mark.skipif(not CUDA, reason="no GPU")
def test_host_gradients_of_a_model_on_cuda():
    """The buffer is pinned, and the step is that of gradients on the GPU."""
    weights = []
    for place in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = torch.nn.Linear(40, 20).cuda()
        batches = [(torch.randn(8, 40), torch.randint(20, (8,))) for _ in range(8)]
        grads = mfac.collect_gradients(model, batches, F.cross_entropy, 8, grads_device=place)
        assert grads.device.type == place and grads.tensor.is_pinned() == (place == "cpu")
        mfac.prune_step(model, grads, 0.8, block_size=64)
        weights.append(model.weight.detach())
    torch.testing.assert_close(*weights)


def test_wrong_devices():
    with pytest.raises(ValueError, match="device: expected 'cpu', where the model is, or 'disk', got 'meta'"):
        mfac.GradientBuffer(2, {"w": torch.ones(3)}, device="meta")
    model, data = torch.nn.Linear(3, 2), [(torch.randn(4, 3), torch.randint(2, (4,)))]
    for device in ("dsk", "meta", 7.5):
        with pytest.raises(
            ValueError, match=f"grads_device: expected 'cpu', where the model is, or 'disk', got {device!r}"
        ):
            mfac.prune(model, data, F.cross_entropy, 0.5, grads_device=device, num_grads=1, progress=False)
        with pytest.raises(
            ValueError, match=f"grads_device: expected 'cpu', where the model is, or 'disk', got {device!r}"
        ):
            mfac.Pruner(model, data, F.cross_entropy, sparsity=0.5, end=2, num_grads=1, grads_device=device)
    with pytest.raises(ValueError, match="device: expected an available device, got 'disk'"):
        mfac.Fisher(torch.ones(2, 3), 1.0, device="disk")
    with pytest.raises(ValueError, match="precision: expected one of highest, high, medium, got 'low'"):
        mfac.prune_step(torch.nn.Linear(3, 2), torch.randn(4, 6), precision="low")
