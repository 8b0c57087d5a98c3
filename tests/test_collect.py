"""collect_gradients: gradients of batches, and no trace on the model."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mfac import GradientBuffer, collect_gradients
from mfac.ops.arguments import check_gradients

mse = nn.functional.mse_loss


def make_model():
    """Batch norm and dropout, in a mixture of modes, one parameter frozen, one with a gradient."""
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2))
    with torch.no_grad():
        model[1].running_mean.normal_()
    model[1].eval()
    model[3].weight.requires_grad_(False)
    model[0].weight.grad = torch.ones(3, 4)
    return model


TWO = ["0.weight", "3.weight"]  # one of them is frozen


def make_batches(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(5, 4, generator=generator), torch.randn(5, 2, generator=generator)) for _ in range(count)]


def by_hand(model, batches, names, loss_fn=mse):
    """Rows by plain backward() on a copy in eval mode."""
    rows = []
    for inputs, targets in batches:
        twin = copy.deepcopy(model).requires_grad_(True).eval()
        twin.zero_grad()
        loss_fn(twin(inputs), targets).backward()
        params = dict(twin.named_parameters())
        rows.append(torch.cat([params[name].grad.flatten() for name in names]))
    return torch.stack(rows)


class Loader:
    """A loader that counts how often it is started; a batch that is None is all NaN."""

    def __init__(self, batches):
        self.batches, self.starts = batches, 0

    def __iter__(self):
        self.starts += 1
        return iter(self.batches)


def spoiled(batch):
    return torch.full_like(batch[0], math.nan), batch[1]


def test_equals_autograd_by_hand(unchanged):
    """Bit for bit: the same operations in the same order. So dropout is off, batch norm uses its running statistics."""
    model, batches = make_model(), make_batches(3)
    with unchanged(model):
        buffer = collect_gradients(model, batches, mse, 3, params=["0.weight", "3.weight"])
    assert buffer.names == ["0.weight", "3.weight"]  # a frozen one too, if it is named
    assert buffer.shape == (3, 18) and buffer.skipped == 0
    assert torch.equal(buffer.tensor, by_hand(model, batches, buffer.names))


def test_dict_batches(unchanged):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x, y):
            return mse(self.layer(x), y)

    model, batches = Named(), make_batches(2)
    with unchanged(model):
        buffer = collect_gradients(model, [{"x": x, "y": y} for x, y in batches], lambda loss, batch: loss * 2, 2)
    expected = by_hand(model.layer, batches, ["weight"], lambda out, y: mse(out, y) * 2)
    assert torch.equal(buffer.tensor, expected)


def test_params_and_bfloat16():
    model, batches = make_model(), make_batches(2)
    names = ["0.bias", "3.weight", "3.bias"]
    buffer = collect_gradients(model, batches, mse, 2, params=["3.bias", "3.weight", "0.bias"], dtype=torch.bfloat16)
    assert buffer.names == names and buffer.dtype == torch.bfloat16
    assert torch.equal(buffer.tensor, by_hand(model, batches, names).bfloat16())


def test_without_grad_mode(unchanged):
    model = make_model()
    with torch.no_grad(), unchanged(model):
        assert collect_gradients(model, make_batches(2), mse, 2).shape == (2, 12)  # without the frozen one
        assert not torch.is_grad_enabled()


def test_shuffling_loader(unchanged):
    """A loader that draws from torch's random state leaves none of it used."""
    inputs, targets = make_batches(1)[0]
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=1, shuffle=True)
    model = make_model()
    with unchanged(model):
        assert len(collect_gradients(model, loader, mse, 5)) == 5


def test_short_loader_is_used_again():
    model, loader = make_model(), Loader(make_batches(2))
    with pytest.warns(UserWarning, match="2 batches for 5 gradients; they are used again") as caught:
        buffer = collect_gradients(model, loader, mse, 5)
    assert len(caught) == 1 and loader.starts == 3
    assert torch.equal(buffer.tensor, by_hand(model, (loader.batches * 3)[:5], buffer.names))


def test_iterator_goes_on():
    batches = iter(make_batches(5))
    model = make_model()
    collect_gradients(model, batches, mse, 3)
    assert torch.equal(next(batches)[0], make_batches(5)[3][0])


def test_nan_batches_are_replaced():
    model, batches = make_model(), make_batches(4)
    batches[1] = spoiled(batches[1])
    buffer = collect_gradients(model, batches, mse, 3)
    assert buffer.skipped == 1 and len(buffer) == 3
    assert torch.equal(buffer.tensor, by_hand(model, [batches[i] for i in (0, 2, 3)], buffer.names))


class Sometimes(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x):
        return self.a(x) if x[0, 0] > 0 else self.b(x)


def test_parameter_used_in_some_batches():
    """Where the loss does not reach a parameter, its gradient is zero; there is a warning after the first batch."""
    x, y = torch.ones(1, 4), torch.zeros(1, 2)
    message = "the loss of the first batch does not reach b.weight; weights that no batch reaches stay dense"
    with pytest.warns(UserWarning, match=message) as caught:
        buffer = collect_gradients(Sometimes(), [(x, y), (-x, y)], mse, 2)
    assert len(caught) == 1 and buffer.unreached == []
    a, b = buffer.tensor.split(8, dim=1)
    assert a[0].any() and not a[1].any() and not b[0].any() and b[1].any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # not again for the same buffer
        collect_gradients(Sometimes(), [(x, y), (-x, y)], mse, 2, buffer=buffer)


def test_unreached_parameters(unchanged):
    """No error: the buffer says which they are. The warning names eight of them."""
    model = make_model().requires_grad_(True)
    model.unused = nn.Sequential(*[nn.Linear(2, 2) for _ in range(9)])
    model.forward = lambda x: model[:4](x)
    message = r"does not reach unused.0.weight, unused.1.weight, .*, unused.7.weight, ... \(1 more\); weights"
    with unchanged(model), pytest.warns(UserWarning, match=message):
        buffer = collect_gradients(model, make_batches(3), mse, 3)
    assert buffer.unreached == [f"unused.{i}.weight" for i in range(9)]
    assert buffer.shape == (3, 54) and not buffer.tensor[:, 18:].any() and buffer.tensor[:, :18].all(1).any()


def test_no_parameter_is_reached(unchanged):
    """Refused after the first batch, which backward() does not reach either; not after all."""
    model, calls = make_model(), []
    model.unused = nn.Linear(2, 2)
    model.forward = lambda x: calls.append(1) or model[:4](x)
    message = "params: expected parameters that the loss depends on, got unused.weight$"
    with unchanged(model), pytest.raises(ValueError, match=message):
        collect_gradients(model, make_batches(3), mse, 3, params=["unused.weight"])
    assert len(calls) == 2


def test_progress(capfd, monkeypatch):
    monkeypatch.setattr("mfac.progress._SECONDS", 0)
    collect_gradients(make_model(), make_batches(2), mse, 2, progress=False)
    assert capfd.readouterr() == ("", "")
    collect_gradients(make_model(), make_batches(2), mse, 2)
    assert "gradients: 2 of 2 in 00:00" in capfd.readouterr().err


def broken_loss(outputs, targets):
    torch.randn(3)
    raise KeyError("broken")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_grads": 0}, ValueError, "num_grads: expected an int >= 1, got 0"),
        ({"num_grads": 2.0}, TypeError, "num_grads: expected an int, got 2.0"),
        ({"num_grads": True}, TypeError, "num_grads: expected an int, got True"),
        ({"dtype": torch.float16}, TypeError, "dtype: expected torch.float32 or torch.bfloat16, got torch.float16"),
        ({"dtype": "nn"}, TypeError, "dtype: expected torch.float32 or torch.bfloat16, got 'nn'"),
        ({"grads_device": "gpu"}, ValueError, "grads_device: expected 'cpu', where the model is, or 'disk', got 'gpu'"),
        ({"params": ["nope"]}, ValueError, "params: expected names among .*, got 'nope'"),
        ({"batches": []}, ValueError, "batches: expected more batches, got none"),
        ({"batches": iter(make_batches(2))}, ValueError, "got an end after 2, .*; pass a list or DataLoader"),
        ({"batches": 5}, TypeError, "batches: expected an iterable of batches, got int"),
        (
            {"batches": [torch.ones(2, 4)]},
            TypeError,
            r"batches: expected pairs \(inputs, targets\) or dicts without forward=, got Tensor",
        ),
        ({"batches": [(1, 2, 3)]}, TypeError, "batches: expected pairs .* got tuple"),
        (
            {"batches": [spoiled(b) for b in make_batches(16)]},
            ValueError,
            "expected finite gradients, got 16 with NaN or infinity and 0 finite",
        ),
        ({"loss_fn": None}, TypeError, r"loss_fn: expected a function, got None and outputs without .loss \(Tensor\)"),
        ({"loss_fn": 3}, TypeError, "loss_fn: expected a function or None, got 3"),
        ({"forward": 3}, TypeError, "forward: expected a function or None, got 3"),
        ({"mode": "test"}, ValueError, "mode: expected one of eval, train, got 'test'"),
        ({"mode": None}, ValueError, "mode: expected one of eval, train, got None"),
        ({"loss_fn": lambda out, y: 1.0}, TypeError, "loss_fn: expected a tensor, got float"),
        ({"loss_fn": lambda out, y: out - y}, ValueError, r"loss_fn: expected a scalar, got shape \[5, 2\]"),
        ({"loss_fn": lambda out, y: mse(out, y).detach()}, ValueError, "loss_fn: expected a loss that depends"),
        ({"loss_fn": broken_loss}, KeyError, "broken"),
        ({"model": nn.BatchNorm1d(4)}, ValueError, "model: expected at least one Linear or ConvNd layer"),
        ({"model": nn.Linear}, TypeError, "model: expected a torch.nn.Module"),
    ],
)
def test_bad_input(unchanged, change, error, message):
    args = {"model": make_model(), "batches": make_batches(4), "loss_fn": mse, "num_grads": 4} | change
    watched = args["model"] if isinstance(args["model"], nn.Module) else make_model()
    with unchanged(watched), pytest.raises(error, match=message):
        collect_gradients(**args)


class Interrupt:
    """A loss that ends in Ctrl-C at its third call."""

    def __init__(self):
        self.calls = 0

    def __call__(self, outputs, targets):
        self.calls += 1
        torch.randn(2)
        if self.calls == 3:
            raise KeyboardInterrupt
        return mse(outputs, targets)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_interrupted(unchanged, mode):
    """The rows so far are valid, and the model is as it was."""
    model, batches = make_model(), make_batches(6)
    buffer = collect_gradients(model, batches, mse, 4)
    before = buffer.tensor.clone()
    with unchanged(model), pytest.raises(KeyboardInterrupt):
        collect_gradients(model, batches[3:], Interrupt(), 3, buffer=buffer, mode=mode)
    assert torch.equal(buffer.tensor[2:], before[2:]) and not torch.equal(buffer.tensor[:2], before[:2])
    assert buffer.mean_square == check_gradients(buffer.tensor)
    if mode == "eval":
        assert torch.equal(buffer.tensor[:2], by_hand(model, batches[3:5], buffer.names))


def test_train_mode(unchanged):
    """Batch statistics and dropout; running statistics and their counts are put back bit for bit."""
    model, batches = make_model(), make_batches(3)
    with unchanged(model):
        buffer = collect_gradients(model, batches, mse, 3, mode="train", params=TWO)
    model[2].p = 0.0
    with unchanged(model):
        exact = collect_gradients(model, batches, mse, 3, mode="train", params=TWO)
    rows = []
    for inputs, targets in batches:
        twin = copy.deepcopy(model).requires_grad_(True).train()
        twin.zero_grad()
        mse(twin(inputs), targets).backward()
        rows.append(torch.cat([twin[0].weight.grad.flatten(), twin[3].weight.grad.flatten()]))
    assert torch.equal(exact.tensor, torch.stack(rows))
    assert not torch.equal(buffer.tensor, exact.tensor)  # dropout
    with pytest.raises(KeyError), unchanged(model):
        collect_gradients(model, batches, broken_loss, 3, mode="train")


class Replacing(nn.Module):
    """A module that puts another tensor in the place of its buffer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        return self.layer(x)


def test_train_mode_and_replaced_buffers(unchanged):
    model = Replacing()
    own = model.calls
    with unchanged(model):
        collect_gradients(model, make_batches(2), mse, 2, mode="train")
    assert model.calls is own


@pytest.mark.parametrize("caller", [torch.no_grad, torch.inference_mode])
def test_callers_without_grad(unchanged, caller):
    """Batches made in inference mode serve too."""
    model, batches = make_model(), make_batches(2)
    expected = by_hand(model, batches, ["0.weight", "3.weight"])
    with caller(), unchanged(model):
        given = [(x.clone(), y.clone()) for x, y in batches]
        buffer = collect_gradients(model, given, mse, 2, params=TWO)
        assert given[0][0].is_inference() == (caller is torch.inference_mode)
    assert torch.equal(buffer.tensor, expected) and not buffer.tensor.is_inference()


def test_other_default_type_and_device():
    model, batches = make_model(), make_batches(2)
    expected = by_hand(model, batches, ["0.weight", "3.weight"])
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):  # as set_default_device, which torch 2.8 cannot take back
            buffer = collect_gradients(model, batches, mse, 2, params=TWO)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(buffer.tensor, expected)


def test_names_in_an_order_of_their_own():
    """The columns are those of the buffer, in whatever order it was made."""
    model, batches = make_model(), make_batches(2)
    names = ["3.weight", "0.weight"]
    buffer = GradientBuffer(2, {name: model.get_parameter(name) for name in names})
    collect_gradients(model, batches, mse, 2, buffer=buffer)
    assert torch.equal(buffer.tensor, by_hand(model, batches, names))


def test_seeds_follow_the_random_state():
    """Another random state, other batches of a loader that shuffles; the same, the same."""
    x = torch.arange(32.0)[:, None].expand(32, 4).contiguous()
    loader = DataLoader(TensorDataset(x, torch.zeros(32, 2)), batch_size=2, shuffle=True)
    model = make_model()
    first, again = (collect_gradients(model, loader, mse, 16).tensor for _ in range(2))
    torch.rand(1)
    other = collect_gradients(model, loader, mse, 16).tensor
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"buffer": torch.zeros(4, 6)}, TypeError, "buffer: expected a GradientBuffer, got Tensor"),
        ({"params": "weight"}, ValueError, "params: expected None with a buffer"),
        ({"dtype": "bfloat16"}, ValueError, "dtype: expected torch.float32, that of the buffer, got torch.bfloat16"),
        ({"grads_device": "disk"}, ValueError, "grads_device: expected None or cpu, that of the buffer, got 'disk'"),
        ({"num_grads": 5}, ValueError, "num_grads: expected at most the 4 rows of the buffer, got 5"),
        ({"num_grads": 0}, ValueError, "num_grads: expected an int >= 1, got 0"),
        (
            {"model": torch.nn.Sequential(torch.nn.Linear(3, 2))},
            ValueError,
            "params: expected names among .*, got 'weight'",
        ),
    ],
)
def test_a_buffer_to_go_on_with(options, error, message):
    model, loss_fn = torch.nn.Linear(3, 2), torch.nn.functional.cross_entropy
    batches = [(torch.randn(5, 3), torch.randint(2, (5,))) for _ in range(6)]
    buffer = collect_gradients(model, batches[:4], loss_fn, 4)
    first = buffer.tensor.clone()
    arguments = {"model": model, "batches": batches[4:], "loss_fn": loss_fn, "num_grads": 2, "buffer": buffer}
    with pytest.raises(error, match=message):
        collect_gradients(**{**arguments, **options})
    assert collect_gradients(**arguments) is buffer
    assert torch.equal(buffer.tensor[2:], first[2:]) and not torch.equal(buffer.tensor[:2], first[:2])
    losses = [loss_fn(model(x), y).item() for x, y in batches[4:]]
    assert buffer.loss == pytest.approx(sum(losses) / 2) and buffer.samples == 5
