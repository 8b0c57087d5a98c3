"""Protocol of a batch: trees of tensors, losses, modes."""

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from types import MappingProxyType

import pytest
import torch
from torch import nn

from mfac import collect_gradients, reestimate_batchnorm
from mfac.gradients.batches import batch_loss, evaluation, model_device, move_batch, num_samples, run_model

mse = nn.functional.mse_loss
CPU, META = torch.device("cpu"), torch.device("meta")
Pair = namedtuple("Pair", "first second")


class Encoding(UserDict):
    """As tokenizers make them: moved in place by a method of its own."""

    def to(self, device):
        self.data = {key: value.to(device) for key, value in self.data.items()}
        return self


class Graph:
    """Not a container, but with a method `to`."""

    def __init__(self, x):
        self.x = x

    def to(self, device):
        return Graph(self.x.to(device))


def test_move_batch():
    """At any depth and by whatever can be moved; what was given stays where it is."""
    x = torch.ones(3)
    packed = nn.utils.rnn.pack_sequence([torch.ones(2, 1), torch.ones(1, 1)])
    plain = type("Plain", (dict,), {})(a=x)
    batch = (
        {"a": [x, (x, 5)], "b": Pair(x, "text")},
        Encoding(x=x),
        UserDict(y={"z": x}),
        plain,
        OrderedDict(w=x),
        Graph(x),
        packed,
        None,
    )
    moved = move_batch(batch, META)
    tree, encoding, user, subclass, ordered, graph, sequence, nothing = moved
    tensors = [tree["a"][0], tree["a"][1][0], tree["b"].first, encoding["x"], user["y"]["z"], subclass["a"], graph.x]
    assert {t.device for t in [*tensors, ordered["w"], sequence.data]} == {META}
    assert tree["a"][1][1] == 5 and tree["b"].second == "text" and nothing is None
    kinds = (dict, Encoding, UserDict, type(plain), OrderedDict, Graph, type(packed), type(None))
    assert tuple(map(type, moved)) == kinds
    assert {t.device for t in (batch[1]["x"], batch[2]["y"]["z"], plain["a"], batch[5].x, packed.data)} == {CPU}
    assert move_batch(x, CPU) is x


def test_inference_tensors_are_copied():
    with torch.inference_mode():
        batch = {"x": torch.ones(2)}, UserDict(y=torch.ones(2))
    moved = move_batch(batch, CPU)
    assert not moved[0]["x"].is_inference() and not moved[1]["y"].is_inference()


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        ((torch.ones(5, 2), torch.ones(3)), 5),
        ({"id": 3, "x": torch.ones(4)}, 4),
        (Encoding(x=torch.ones(6, 1)), 6),
        (({"x": torch.tensor(1.0), "y": torch.ones(7)}, None), 7),
        ((1, "a"), 1),
    ],
)
def test_num_samples(batch, count):
    assert num_samples(batch) == count


@dataclass(frozen=True, slots=True)
class Frozen:
    x: torch.Tensor
    label: str = "a"


@dataclass
class Outer:
    inner: Frozen
    rest: dict
    count: int = 3


def test_dataclasses_and_immutable_mappings():
    """Moved at any depth, copies of their own types; one without anything to move is passed through."""
    x, plain = torch.ones(4, 2), Frozen("no tensor")
    batch = Outer(Frozen(x), {"y": MappingProxyType({"z": x})}), plain, MappingProxyType({"w": [x]})
    outer, same, proxy = moved = move_batch(batch, META)
    assert [t.device for t in (outer.inner.x, outer.rest["y"]["z"], proxy["w"][0])] == [META] * 3
    assert tuple(map(type, moved)) == (Outer, Frozen, MappingProxyType) and type(outer.rest["y"]) is MappingProxyType
    assert same is plain and outer.count == 3 and outer.inner.label == "a"
    assert batch[0].inner.x is x and batch[2]["w"][0] is x
    assert num_samples(batch) == num_samples(batch[0]) == num_samples(MappingProxyType({"a": UserDict(b=x)})) == 4
    with torch.inference_mode():
        made = Frozen(torch.ones(2))
    assert not move_batch(made, CPU).x.is_inference()
    buffer = collect_gradients(
        nn.Linear(2, 1), [Frozen(x)], None, 1, forward=lambda model, batch: model(batch.x).sum(), progress=False
    )
    assert buffer.samples == 4


def test_model_device():
    assert model_device(nn.Linear(2, 2, device="meta")) == META and model_device(nn.ReLU()) == CPU


Outputs = namedtuple("Outputs", "loss logits")


class Model(nn.Module):
    """Takes x and, like those of transformers, y: then its outputs have the loss."""

    def __init__(self, outputs=Outputs):
        super().__init__()
        self.layer, self.outputs = nn.Linear(4, 2), outputs

    def forward(self, x, y=None):
        x = x["x"] if isinstance(x, dict) else x
        out = self.layer(x)
        return out if y is None else self.outputs(mse(out, y), out)


X, Y = torch.randn(5, 4), torch.randn(5, 2)


@pytest.mark.parametrize(
    ("batch", "loss_fn", "forward"),
    [
        ((X, Y), mse, None),
        ([X, Y], mse, None),
        (({"x": X}, {"y": [Y]}), lambda out, targets: mse(out, targets["y"][0]), None),
        ({"x": X}, lambda out, batch: mse(out, Y) if batch["x"] is X else None, None),
        ({"x": X, "y": Y}, lambda out, batch: out.loss, None),
        ({"x": X, "y": Y}, None, None),
        (UserDict(x=X, y=Y), None, None),
        (Encoding(x=X, y=Y), lambda out, batch: mse(out.logits, batch["y"]), None),
        ((X, 0, Y), mse, lambda model, batch: (model(batch[0]), batch[2])),
        ((X, 0, Y), None, lambda model, batch: mse(model(batch[0]), batch[2])),
        ((X, 0, Y), None, lambda model, batch: model(batch[0], batch[2])),
        (X, None, lambda model, x: {"loss": mse(model(x), Y)}),
    ],
)
def test_losses(batch, loss_fn, forward, unchanged):
    """Of all kinds of batches and models the same, and so are the gradients."""
    model = Model()
    expected = mse(model.layer(X), Y)
    assert torch.equal(batch_loss(model, batch, loss_fn, forward), expected)
    with unchanged(model):
        grads = collect_gradients(model, [batch], loss_fn, 1, forward=forward)
    assert torch.equal(grads.tensor[0], torch.autograd.grad(expected, model.layer.weight)[0].flatten())
    assert grads.loss == expected.item() and grads.samples == 5


def test_losses_by_key():
    model = Model(lambda loss, logits: {"loss": loss, "logits": logits})
    assert torch.equal(batch_loss(model, {"x": X, "y": Y}, None), mse(model.layer(X), Y))


@pytest.mark.parametrize(
    ("batch", "loss_fn", "forward", "error", "message"),
    [
        ((X, Y, 1), mse, None, TypeError, r"batches: expected pairs \(inputs, targets\) or dicts without forward=, got "
                                          "tuple of 3"),
        ((X,), mse, None, TypeError, "forward=, got tuple of 1"),
        (X, mse, None, TypeError, "forward=, got Tensor"),
        ("ab", mse, None, TypeError, "forward=, got str"),
        ((X, Y), None, None, TypeError, r"loss_fn: expected a function, got None and outputs without .loss \(Tensor\)"),
        ({"x": X}, None, None, TypeError, r"loss_fn: expected a function, got None and outputs without .loss"),
        (X, mse, lambda model, x: model(x), TypeError, r"forward: expected a pair \(outputs, targets\)"),
        (X, None, lambda model, x: (model(x), Y), TypeError, r"outputs without .loss \(tuple\)"),
        (X, None, lambda model, x: {"loss": 1.0}, TypeError, "outputs.loss: expected a tensor, got float"),
        (X, None, lambda model, x: model(x), ValueError, r"forward: expected a scalar, got shape \[5, 2\]"),
        ((X, Y), lambda out, y: 1.0, None, TypeError, "loss_fn: expected a tensor, got float"),
        ((X, Y), lambda out, y: out, None, ValueError, r"loss_fn: expected a scalar, got shape \[5, 2\]"),
    ],
)  # fmt: skip
def test_errors(batch, loss_fn, forward, error, message, unchanged):
    model = Model()
    with unchanged(model), pytest.raises(error, match=message):
        collect_gradients(model, [batch], loss_fn, 1, forward=forward)


def test_batchnorm_follows_the_same_protocol():
    """Targets are not used; trees and forward= serve."""

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(x["x"] if isinstance(x, dict) else x)

    means = []
    for batch, forward in (
        ((X, None), None),
        (({"x": X}, "anything"), None),
        (UserDict(x=X), None),
        ((1, X, 2), lambda model, batch: model(batch[1])),
    ):
        model = Named().eval()
        with torch.inference_mode():
            reestimate_batchnorm(model, [batch], 1, forward=forward)
        means.append(model.norm.running_mean)
    torch.testing.assert_close(means[0], X.mean(0))
    assert all(torch.equal(mean, means[0]) for mean in means)
    with pytest.raises(TypeError, match="forward: expected a function or None, got 1"):
        reestimate_batchnorm(model, [(X, None)], 1, forward=1)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_evaluation(mode, unchanged):
    """Every mode is set inside; everything is as before outside, also after an error and under inference mode."""
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    model[1].eval()
    model[0].requires_grad_(False)
    with torch.inference_mode(), unchanged(model), pytest.raises(KeyError):
        with evaluation(model, [model[0].weight], mode, seed=3):
            assert {m.training for m in model.modules()} == {mode == "train"}
            assert model[0].weight.requires_grad and not model[0].bias.requires_grad
            assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
            first = torch.randn(3)
            model(X)
            raise KeyError
    with evaluation(model, seed=3):
        assert torch.equal(torch.randn(3), first)


class Stateful(nn.Module):
    """Writes buffers in every mode: in place, by replacing them, and one that was None."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("last", torch.zeros(1, 4))
        self.register_buffer("cache", None)
        self.register_buffer("expanded", torch.zeros(1, 4).expand(3, 4))

    def forward(self, x):
        self.count.add_(1)
        self.last.data.copy_(x[:1])
        self.cache, self.expanded = x.clone(), self.expanded + 1
        return self.layer(x)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_buffers_are_restored(mode, unchanged):
    model = Stateful()
    own = dict(model._buffers)
    with unchanged(model):
        collect_gradients(model, [(X, Y)] * 2, mse, 2, mode=mode, progress=False)
    assert all(model._buffers[name] is b for name, b in own.items())


def test_statistics_are_kept_and_other_buffers_restored():
    model = nn.Sequential(Stateful(), nn.BatchNorm1d(2))
    before = model[1].running_mean.clone()
    reestimate_batchnorm(model, [(X, None)], 1)
    assert model[0].count == 0 and model[0].cache is None and not torch.equal(model[1].running_mean, before)


def test_requires_grad_that_train_changes(unchanged):
    """A frozen backbone whose train() freezes it again."""

    class Backbone(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)
            self[0].requires_grad_(not mode)
            return self

    model = Backbone(nn.Linear(4, 3), nn.Linear(3, 2))
    for frozen in (True, False):
        model[0].requires_grad_(not frozen)
        for mode in ("eval", "train"):
            with unchanged(model):
                collect_gradients(model, [(X, Y)], mse, 1, params="1.weight", mode=mode, progress=False)


def test_layers_that_merge_weights_in_eval_mode():
    """As loralib's do: training goes on with what they train."""

    class Merging(nn.Linear):
        merged = False

        def train(self, mode=True):
            super().train(mode)
            if self.merged == mode:
                self.weight.data.add_(-1.0 if mode else 1.0)
                self.merged = not mode
            return self

    model = nn.Sequential(Merging(4, 4), nn.Sequential(Merging(4, 2)))
    with torch.no_grad():
        model[0].weight.zero_()
    model[1].eval()
    with evaluation(model):
        assert model[0].merged and bool((model[0].weight == 1).all())
    assert not model[0].merged and not model[0].weight.any()
    assert model[1][0].merged and [m.training for m in model.modules()] == [True, True, False, False]


def test_run_model_returns_what_forward_does():
    assert run_model(Model(), X, lambda model, batch: (model, batch))[1] is X
