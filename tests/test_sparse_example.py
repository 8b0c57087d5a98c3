"""What the example inputs tell of a model: masked outputs, state, optional arguments, layers that other code reads."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from test_sparse_convert import prune
from torch import nn

import mfac
from mfac.sparse.example import largest_difference
from mfac.sparse.modules import SparseLinear

pytestmark = pytest.mark.usefixtures("one_thread")
INF, NAN = torch.inf, torch.nan


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)


def convert(model, inputs):
    """The model without gradients, and its conversion."""
    model = prune(model.eval().requires_grad_(False), 0.8)
    return model, mfac.sparse.convert(model, inputs, policy="sparse")


@dataclass
class Output:
    logits: torch.Tensor


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([1.0, NAN, -INF], [1.0, NAN, -INF], 0.0),
        ([1.0, NAN], [1.0, 2.0], INF),
        ([1.0, INF], [1.0, -INF], INF),
        ([1.5, 2.0, -1e9, -1e9, -1e9], [1.0, 2.0, -1e9, -1e9, -1e9], 0.25),
        ([0.0, 4.0], [1e-6, 4.0], 1.0),
        ([0.0, 3.0, 4.0], [1e-6, 3.0, 4.0], 1e-6 / 3),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([], [], 0.0),
    ],
)
def test_largest_difference(one, other, expected):
    one, other = torch.tensor(one), torch.tensor(other)
    assert largest_difference(one, other) == pytest.approx(expected)
    assert largest_difference({"out": Output(one)}, {"out": Output(other)}) == pytest.approx(expected)


def test_differences_of_other_values():
    x = torch.ones(2)
    assert largest_difference((x, "a", None, 2.0), (x, "a", None, 2.0)) == 0
    assert largest_difference((x, 2.0), (x, 1.0)) == 1
    for other in ((x,), (x, "b"), (x, 1), (x.double(), "a"), (x[:1], "a"), (x, object())):
        assert largest_difference((x, "a"), other) == INF
    assert largest_difference(x + 1j, x + 2j) == pytest.approx(0.5)


@pytest.mark.parametrize("fill", [-1e9, -INF, NAN])
def test_a_masked_output_hides_no_wrong_trace(fill):
    class Masked(Layers):
        def forward(self, x):
            scale = 1.0 if isinstance(x, torch.Tensor) else 2.0
            return Output((self.a(x) * scale).masked_fill(torch.arange(16) < 3, fill))

    x = torch.randn(4, 16)
    model, fast = convert(Masked(), x)
    assert "the traced model differs" in str(fast.sparse_report)
    torch.testing.assert_close(fast(x).logits, model(x).logits, equal_nan=True)


def test_a_forward_on_the_instance():
    x, model = torch.randn(4, 16), nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    model[0].forward = lambda x, layer=model[0]: 2 * F.linear(x, layer.weight, layer.bias)
    model, fast = convert(model, x)
    assert fast.sparse_report.replaced == ["2"] and "its forward is replaced on the instance" in str(fast.sparse_report)
    torch.testing.assert_close(fast(x), model(x))


class Watchful(Layers):
    """Fails with one of its layers replaced, although it reads none of its attributes."""

    def forward(self, x):
        return self.a(x) if x.sum() != 0 and not isinstance(self.a, SparseLinear) else None.missing


class Changed(Layers):
    """Computes something else with one of its layers replaced."""

    def forward(self, x):
        return self.a(x) * (len(list(self.parameters())) if x.sum() != 0 else 1)


@pytest.mark.parametrize(
    ("kind", "text"), [(Watchful, "replaced, AttributeError: 'NoneType' object"), (Changed, "the outputs differ")]
)
def test_a_model_that_does_not_work_with_its_layers_replaced(kind, text):
    x = torch.randn(4, 16)
    model, fast = convert(kind(), x)
    assert fast.sparse_report.replaced == []
    assert text in str(fast.sparse_report) and "the whole model stays dense" in str(fast.sparse_report)
    assert torch.equal(fast(x), model(x))


def test_outputs_that_cannot_be_compared():
    class Objects(Layers):
        def forward(self, x):
            return self.a(x), object()

    with pytest.raises(RuntimeError, match="model: expected the same outputs from a copy, got a difference of inf"):
        convert(Objects(), torch.randn(4, 16))


def test_random_numbers():
    class Noisy(Layers):
        def forward(self, x):
            return F.dropout(self.a(x), 0.5, training=True)

    _, fast = convert(Noisy(), torch.randn(4, 16))
    assert fast.sparse_report.replaced == ["a"] and fast.sparse_report.notes == []


class Functional(Layers):
    def forward(self, x):
        return self.b(F.linear(self.a(input=x), self.a.weight.t()))


class Branching(Functional):
    def forward(self, x):
        return super().forward(x) if x.sum() != 0 else x


@pytest.mark.parametrize("kind", [Functional, Branching])
def test_a_weight_that_other_code_reads(kind):
    x = torch.randn(4, 16)
    model, fast = convert(kind(), x)
    assert fast.sparse_report.replaced == ["b"] and "other code reads its weights or sizes" in str(fast.sparse_report)
    torch.testing.assert_close(fast(x), model(x))


@pytest.mark.parametrize("policy", ["faster", "sparse"])
def test_transformer_encoder(policy):
    layer, x = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True), torch.randn(2, 5, 16)
    model = prune(nn.TransformerEncoder(layer, 2).eval().requires_grad_(False))
    fast = mfac.sparse.convert(model, x, policy=policy)
    reasons = {line.name: line.reason for line in fast.sparse_report.layers}
    assert reasons["layers.1.linear1"] == "other code reads its weights or sizes"
    assert torch.equal(fast(x), model(x))


def test_an_argument_by_name():
    class Named(Layers):
        def forward(self, x):
            return self.a(input=x)

    x = torch.randn(4, 16)
    model, fast = convert(Named(), x)
    assert fast.sparse_report.replaced == ["a"]
    torch.testing.assert_close(fast(x), model(x))
    assert mfac.sparse.convert(model, x).sparse_report.layers[0].dense_ms is not None


class Attribute(Layers):
    def __init__(self):
        super().__init__()
        self.last = None

    def forward(self, x):
        last = x if self.last is None else self.last
        self.last = self.a(x)
        return self.b(x) + last


class Buffer(Layers):
    def __init__(self):
        super().__init__()
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x):
        self.last.add_(1)
        return self.a(x) * self.last


class Assigned(Buffer):
    def forward(self, x):
        self.last = self.a(x).mean(0) + self.last
        return self.last


class History(Attribute):
    def __init__(self):
        super().__init__()
        self.last = []

    def forward(self, x):
        self.last.append(self.a(x))
        return torch.stack(list(self.last)).sum(0)


@pytest.mark.parametrize("kind", [Attribute, Buffer, Assigned, History])
@pytest.mark.parametrize("policy", ["faster", "sparse"])
def test_state(kind, policy):
    """Results stay the same call after call, from the state that the model had before the conversion."""
    x, model = torch.randn(4, 16), prune(kind().eval().requires_grad_(False), 0.8)
    fast = mfac.sparse.convert(model, x, policy=policy)
    assert "its forward changes last" in str(fast.sparse_report)
    for x in torch.randn(3, 4, 16):
        torch.testing.assert_close(fast(x), model(x))


def test_state_outside_of_the_modules():
    class Cache:
        def __init__(self):
            self.calls = 0

    class Cached(Layers):
        def __init__(self):
            super().__init__()
            self.cache = Cache()

        def forward(self, x):
            self.cache.calls += 1
            return self.a(x) * self.cache.calls

    model, fast = convert(Cached(), torch.randn(4, 16))
    assert "the traced model differs" in str(fast.sparse_report)
    for x in torch.randn(3, 4, 16):
        torch.testing.assert_close(fast(x), model(x))


class Optional(Layers):
    def forward(self, x, scale=1.0, condition=None, *, mask=None, mask_1=1.0):
        x = x * mask_1 if mask is None else x * mask
        x = self.a(x) * scale
        return torch.tanh(x) if condition is None else x + self.b(condition)


def test_optional_arguments(tmp_path):
    x = torch.randn(4, 16)
    model, without = convert(Optional(), x)
    inputs = {"x": x, "condition": x}
    with_it = mfac.sparse.convert(model, inputs, policy="sparse")
    assert without.sparse_report.notes == with_it.sparse_report.notes == []
    mfac.sparse.save(without, tmp_path / "model.pt")
    for fast in (without, mfac.sparse.load(Optional(), tmp_path / "model.pt")):
        torch.testing.assert_close(fast(x, scale=0.5), model(x, 0.5))
        torch.testing.assert_close(fast(x, 0.5, condition=None), model(x, 0.5))
        with pytest.raises(ValueError, match=r"condition: expected None, as in the example_inputs of the conv.*Tensor"):
            fast(x, condition=x)
    torch.testing.assert_close(with_it(**inputs), model(**inputs))
    with pytest.raises(ValueError, match=r"condition: expected a value, as in the example_inputs .*, got None"):
        with_it(x)
    exported = torch.export.export(with_it, (x, 1.0, x))
    torch.testing.assert_close(exported.module()(x, 1.0, x), model(**inputs))
    compiled = torch.compile(without, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("policy", ["faster", "sparse"])
def test_example_inputs_are_not_changed(policy):
    class InPlace(Layers):
        def forward(self, x):
            return self.a(x.sub_(1.0))

    x = torch.randn(4, 16)
    before, model = x.clone(), prune(InPlace())
    assert mfac.sparse.convert(model, x, policy=policy).sparse_report.error < 1e-5
    assert torch.equal(x, before)


def test_nan_outputs():
    class Logarithm(Layers):
        def forward(self, x):
            return torch.log(self.a(x))

    x = torch.randn(4, 16)
    model, fast = convert(Logarithm(), x)
    assert fast.sparse_report.replaced == ["a"] and fast.sparse_report.error < 1e-4 and bool(fast(x).isnan().any())
    model, fast = convert(model, torch.full((4, 16), NAN))  # sparse kernels skip products of NaN and zero
    assert fast.sparse_report.replaced == [] and "the outputs differ by inf" in str(fast.sparse_report)


def test_hooks_on_a_traced_module_are_kept():
    x, seen, model = torch.randn(4, 16), [], nn.Sequential(nn.Linear(16, 16))
    model.register_forward_hook(lambda *_: seen.append(1))
    _, fast = convert(model, x)
    seen.clear()
    fast(x)
    assert seen == [1] and "hooks or a replaced forward on the model" in str(fast.sparse_report)
