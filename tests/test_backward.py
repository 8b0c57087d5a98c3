"""Gradients of models that torch.autograd.grad does not see the whole of."""

import copy

import pytest
import torch
import torch.utils.checkpoint as cp
from torch import nn

from mfac import GradientBuffer, collect_gradients, prunable_parameters
from mfac.gradients.backward import Differentiator

mse = nn.functional.mse_loss
X, Y = torch.randn(5, 4), torch.randn(5, 2)


class Checkpointed(nn.Module):
    """The middle is checkpointed; it has dropout."""

    def __init__(self, reentrant=True):
        super().__init__()
        self.first, self.last, self.reentrant = nn.Linear(4, 6), nn.Linear(6, 2), reentrant
        self.middle, self.calls = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 6)), 0

    def forward(self, x):
        self.calls += 1
        return self.last(cp.checkpoint(self.middle, self.first(x), use_reentrant=self.reentrant))


class Inner(torch.autograd.Function):
    """A block whose backward runs another backward()."""

    @staticmethod
    def forward(ctx, x, module):
        ctx.save_for_backward(x)
        ctx.module = module
        with torch.no_grad():
            return module(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            ctx.module(x).backward(grad)
        return x.grad, None


class Reversible(Checkpointed):
    def forward(self, x):
        self.calls += 1
        return self.last(Inner.apply(self.first(x), self.middle))


class Shared(Reversible):
    """One weight is used inside and outside: neither part is its gradient."""

    def forward(self, x):
        hidden = self.first(x)
        return super().forward(x) + self.last(self.middle[3](hidden))


def by_hand(model, batches, mode):
    rows = []
    twin = copy.deepcopy(model).train(mode == "train")
    for x, y in batches:
        twin.zero_grad()
        mse(twin(x), y).backward()
        rows.append(torch.cat([p.grad.flatten() for p in prunable_parameters(twin).values()]))
    return torch.stack(rows)


@pytest.mark.parametrize("params", [None, "re:middle"])
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("kind", [Checkpointed, Reversible, Shared])
def test_backward_within_backward(kind, mode, params, unchanged):
    """The gradients of a plain backward(), dropout included; .grad and hooks are as before."""
    model, steps = kind(), []
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
        p.register_post_accumulate_grad_hook(lambda p: steps.append(p))
    own, batches = [p.grad for p in model.parameters()], [(X, Y), (2 * X, Y)]
    if kind is not Checkpointed:
        model.middle[2].p = 0.0  # whose backward draws again
    torch.manual_seed(4)
    expected = by_hand(model, batches, mode)
    steps.clear()
    torch.manual_seed(4)
    with unchanged(model):
        buffer = collect_gradients(model, batches, mse, 2, params=params, mode=mode, progress=False)
    columns = slice(None) if params is None else slice(36, 108)
    named = buffer.tensor if params is None else buffer.tensor.view(2, -1)[:, [*range(36), *range(42, 78)]]
    torch.testing.assert_close(named, expected[:, columns], rtol=0, atol=0)
    assert not steps and buffer.unreached == [] and model.calls == 3
    assert all(p.grad is grad for p, grad in zip(model.parameters(), own, strict=True))
    mse(model(X), Y).backward()
    assert len(steps) >= len(own)  # the hooks are back


def test_errors_leave_no_trace(unchanged):
    """Of the loss, and in backward()."""

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise KeyError("broken")

    model = Checkpointed()
    model.first.weight.grad = torch.ones(6, 4)
    with unchanged(model), pytest.raises(KeyError, match="broken"):
        collect_gradients(model, [(X, Y)], lambda out, y: mse(Broken.apply(out), y), 1, progress=False)
    assert model.last.weight.grad is None


def test_only_where_it_is_needed():
    """One pass per batch if all is reached; one more per collection if something is reached by no means."""
    model = Checkpointed(reentrant=False)
    buffer = collect_gradients(model, [(X, Y)] * 3, mse, 3, progress=False)
    assert model.calls == 3
    model.unused = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match=r"does not reach unused.weight; weights"):
        again = collect_gradients(model, [(X, Y)] * 3, mse, 3, progress=False)
    assert model.calls == 7 and again.unreached == ["unused.weight"]
    assert torch.equal(again.tensor[:, : buffer.shape[1]], buffer.tensor)


def test_other_leaves_keep_their_grad():
    """Inputs, and parameters of the loss."""
    model, head, x = Checkpointed(), nn.Linear(2, 2), X.clone().requires_grad_()
    head.weight.grad = own = torch.ones(2, 2)
    buffer = GradientBuffer(1, prunable_parameters(model))
    collect_gradients(model, [(x, Y)], lambda out, y: mse(head(out), y), 1, buffer=buffer, progress=False)
    assert head.weight.grad is own and own.eq(1).all() and x.grad is None and buffer.unreached == []


def test_other_errors_pass_through():
    model = nn.Linear(4, 2)
    differentiate = Differentiator(model, [model.weight])
    with pytest.raises(RuntimeError, match="grad can be implicitly created only for scalar outputs"):
        differentiate(lambda: model(X))
