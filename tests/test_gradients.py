"""GradientBuffer and collect_gradients."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mfac import GradientBuffer, collect_gradients, prunable_parameters

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


# ---- collect_gradients


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


def test_parameter_used_in_some_batches():
    """Where the loss does not reach a parameter, its gradient is zero."""

    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            return self.a(x) if x[0, 0] > 0 else self.b(x)

    x = torch.ones(1, 4)
    buffer = collect_gradients(Sometimes(), [(x, torch.zeros(1, 2)), (-x, torch.zeros(1, 2))], mse, 2)
    a, b = buffer.tensor.split(8, dim=1)
    assert a[0].any() and not a[1].any() and not b[0].any() and b[1].any()


def test_progress(capfd):
    collect_gradients(make_model(), make_batches(2), mse, 2)
    assert capfd.readouterr() == ("", "")
    collect_gradients(make_model(), make_batches(2), mse, 2, progress=True)
    assert "gradients: 100%" in capfd.readouterr().err


def broken_loss(outputs, targets):
    torch.randn(3)
    raise KeyError("broken")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_grads": 0}, ValueError, "num_grads: expected an int >= 1, got 0"),
        ({"num_grads": 2.0}, ValueError, "num_grads: expected an int >= 1, got 2.0"),
        ({"num_grads": True}, ValueError, "num_grads: expected an int >= 1, got True"),
        ({"dtype": torch.float16}, TypeError, "dtype: expected torch.float32 or torch.bfloat16, got torch.float16"),
        ({"params": ["nope"]}, ValueError, "params: 'nope' matches no parameter"),
        ({"batches": []}, ValueError, "batches: expected batches for 4 gradients or more, got none left"),
        ({"batches": iter(make_batches(2))}, ValueError, "got 2 left; pass a list or DataLoader"),
        ({"batches": 5}, TypeError, "batches: expected an iterable of batches, got int"),
        (
            {"batches": [torch.ones(2, 4)]},
            TypeError,
            r"batches: expected pairs \(inputs, targets\) or dicts, got Tensor",
        ),
        ({"batches": [(1, 2, 3)]}, TypeError, "batches: expected pairs .* got tuple"),
        ({"batches": [spoiled(b) for b in make_batches(16)]}, ValueError, "16 gradients are not finite, only 0 are"),
        ({"loss_fn": None}, TypeError, "loss_fn: expected a function, got None"),
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


@pytest.mark.parametrize("alone", [False, True])
def test_unused_parameter(unchanged, alone):
    model = make_model()
    model.unused = nn.Linear(2, 2)
    model.forward = lambda x: model[:4](x)
    params = ["unused.weight"] if alone else None
    with (
        unchanged(model),
        pytest.raises(ValueError, match=r"does not depend on 'unused\.weight'; leave it out of params"),
    ):
        collect_gradients(model, make_batches(3), mse, 3, params=params)


# ---- GradientBuffer


def filled(rows, num_grads=3, dtype=torch.float32):
    buffer = GradientBuffer(num_grads, {"w": torch.zeros(2, 1)}, dtype)
    for row in rows:
        buffer.append_gradients([torch.full((2, 1), float(row))])
    return buffer


def test_ring():
    """Rows fill up in turn; when full, the oldest is overwritten."""
    assert filled([]).tensor.shape == (0, 2)
    assert filled([1, 2]).tensor[:, 0].tolist() == [1, 2]
    buffer = filled([1, 2, 3, 4, 5])
    assert buffer.tensor[:, 0].tolist() == [4, 5, 3]
    assert len(buffer) == buffer.num_grads == 3 and buffer.shape == (3, 2)
    buffer.clear()
    assert len(buffer) == 0 and buffer.shape == (0, 2)
    buffer.append_gradients([torch.full((2, 1), 9.0)])
    assert buffer.tensor[:, 0].tolist() == [9]


def test_attributes():
    buffer = filled([1], num_grads=4, dtype=torch.bfloat16)
    assert (buffer.dtype, buffer.device, buffer.nbytes) == (torch.bfloat16, torch.device("cpu"), 4 * 2 * 2)
    assert repr(buffer) == "GradientBuffer(1 of 4 gradients, d=2, torch.bfloat16, 0.0 MiB, 0 skipped)"
    buffer.tensor.zero_()
    assert not buffer.tensor.any()  # a view, not a copy


def test_append(unchanged):
    """Copies the gradients, in the order of the names, and of a copy of the model just as well."""
    model = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 2))
    buffer = GradientBuffer(2, prunable_parameters(model))
    model(torch.ones(1, 2)).sum().backward()
    with unchanged(model):
        assert buffer.append(model)
    expected = torch.cat([model[0].weight.grad.flatten(), model[1].weight.grad.flatten()])
    twin = copy.deepcopy(model)
    for p, q in zip(twin.parameters(), model.parameters(), strict=True):
        p.grad = q.grad.clone()
    assert buffer.append(twin)
    model.zero_grad(set_to_none=False)
    assert torch.equal(buffer.tensor, expected.expand(2, 4))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_not_finite_is_skipped(bad, dtype):
    """1e300 is finite in float64, not as stored. The rows stay as they were."""
    buffer = filled([1, 2, 3], dtype=dtype)
    assert not buffer.append_gradients([torch.tensor([[0.0], [bad]], dtype=torch.float64)])
    assert buffer.skipped == 1
    assert buffer.append_gradients([torch.full((2, 1), 4.0)])
    assert buffer.tensor[:, 0].tolist() == [4, 2, 3]
    buffer.clear()
    assert buffer.skipped == 0


def test_append_before_backward(unchanged):
    model = nn.Linear(2, 1)
    buffer = GradientBuffer(2, prunable_parameters(model))
    with unchanged(model), pytest.raises(ValueError, match="expected a gradient for 'weight', got None; call"):
        buffer.append(model)
    with pytest.raises(ValueError, match="expected a parameter 'weight', got none"):
        buffer.append(nn.Sequential(model))
    assert len(buffer) == 0 and buffer.skipped == 0


@pytest.mark.parametrize(
    ("grads", "error", "message"),
    [
        ([], ValueError, "grads: expected 1 tensors, got 0"),
        ([torch.ones(1, 2)], ValueError, r"grads: expected shape \[2, 1\] for 'w', got \[1, 2\]"),
        ([[1.0, 2.0]], TypeError, "grads: expected a tensor for 'w', got list"),
        ([torch.ones(2, 1).numpy()], TypeError, "grads: expected a tensor for 'w', got ndarray"),
    ],
)
def test_bad_gradients(grads, error, message):
    buffer = filled([1])
    with pytest.raises(error, match=message):
        buffer.append_gradients(grads)
    assert buffer.tensor.tolist() == [[1, 1]]


P = {"w": torch.zeros(2)}


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((0, P), ValueError, "num_grads: expected an int >= 1, got 0"),
        ((-1, P), ValueError, "num_grads: expected an int >= 1, got -1"),
        ((1.5, P), ValueError, "num_grads: expected an int >= 1, got 1.5"),
        ((2, {}), ValueError, "params: expected at least one parameter, got none"),
        ((2, [torch.zeros(2)]), TypeError, "params: expected name -> parameter, got list"),
        ((2, {"w": 3}), TypeError, r"params\['w'\]: expected a tensor, got int"),
        ((2, P, torch.float64), TypeError, "dtype: expected torch.float32 or torch.bfloat16, got torch.float64"),
        (
            (2, P | {"v": torch.zeros(2, device="meta")}),
            ValueError,
            "params: expected on one device, got cpu, meta",
        ),
    ],
)
def test_bad_buffer(args, error, message):
    with pytest.raises(error, match=message):
        GradientBuffer(*args)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"buffer": torch.zeros(4, 6)}, TypeError, "buffer: expected a GradientBuffer, got Tensor"),
        ({"params": "weight"}, ValueError, "params: expected None with a buffer"),
        ({"num_grads": 5}, ValueError, "num_grads: expected at most the 4 rows of the buffer, got 5"),
        ({"num_grads": 0}, ValueError, "num_grads: expected an int >= 1, got 0"),
        ({"model": torch.nn.Sequential(torch.nn.Linear(3, 2))}, ValueError, "params: 'weight' matches no parameter"),
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
