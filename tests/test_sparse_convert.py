"""Conversion: what is replaced, that results stay, and that the copy can be compiled, exported, copied and pickled."""

import copy
import importlib
import pickle

import pytest
import torch
from torch import nn

import mfac
from mfac.sparse import candidates
from mfac.sparse.example import call_model, largest_difference, run_example
from mfac.sparse.graph import trace
from mfac.sparse.modules import DepthwiseConv2d, SparseConv2d, SparseLinear
from mfac.tutorial.models import MobileNetV1

convert_module = importlib.import_module("mfac.sparse.convert")  # the function has the same name
pytestmark = pytest.mark.usefixtures("one_thread")


def prune(model, sparsity=0.9):
    """Zero so many weights of all Linear layers and 1 x 1 convolutions, at random."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1)):
            layer.weight.data *= torch.rand_like(layer.weight) >= sparsity
    return model


def with_statistics(model, x):
    """The model in eval mode, its BatchNorm with statistics of its own."""
    model.train()
    with torch.no_grad():
        for _ in range(3):
            call_model(model, x)
    return model.eval()


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    return with_statistics(prune(MobileNetV1(num_classes=10, width=0.25)), x), x


@pytest.fixture
def times(monkeypatch):
    """Times that the test sets: `times[name]` milliseconds for "dense", "channels_last", "rows", "fast", ..."""
    fixed = {"dense": 2.0, "channels_last": 2.0, "rows": 1.0, "blocks": 1.5, "depthwise": 1.0, "fast": 1.0}
    fake = lambda functions, seconds=None: {name: fixed[name] for name in functions}  # noqa: E731
    monkeypatch.setattr(candidates, "fastest", fake)
    monkeypatch.setattr(convert_module, "fastest", fake)
    return fixed


class Residual(nn.Module):
    """Activations of every kind, some of which have another use, and a layer that is used twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.relu6, self.hard = nn.ReLU6(), nn.Hardtanh(0, 6)
        self.shared, self.last, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.wide = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x, scale=1.0):
        first = self.bn(self.conv(x))
        x = torch.relu(first) + first + self.hard(self.wide(x))
        x = self.relu6(self.shared(x.mean((2, 3))) * scale)
        return {"out": nn.functional.relu(self.norm(self.last(self.shared(x)))), "x": x}


@pytest.mark.parametrize("policy", ["faster", "sparse"])
@pytest.mark.parametrize("backend", ["compiled", "reference"])
def test_same_results(network, policy, backend, times, unchanged):
    model, x = network
    with unchanged(model, x), torch.no_grad():
        fast = mfac.sparse.convert(model, x, policy=policy, backend=backend)
        out, right = fast(x), model(x)
    assert largest_difference(out, right) < 1e-5 and fast.sparse_report.error < 1e-5
    assert not fast.training and not any(p.requires_grad for p in fast.parameters())
    assert len(fast.sparse_report.folded) == 27 and not [m for m in fast.modules() if isinstance(m, nn.BatchNorm2d)]
    taken = fast.sparse_report.replaced
    assert "sections.1.0.point.conv" in taken and "classifier.fc" in taken
    layer = fast.get_submodule("sections.1.0.point.conv")
    assert isinstance(layer, SparseConv2d) and layer.activation == "relu" and layer.backend == backend
    assert ("sections.0.0.depth.conv" in taken) == (policy == "faster")


def test_activations_that_are_fused_and_those_that_are_not(times):
    x = torch.randn(4, 8, 6, 6)
    model = with_statistics(prune(Residual(), 0.5), x)
    model.wide.weight.data[:, 2:] = 0
    with torch.no_grad():
        fast = mfac.sparse.convert(model, {"x": x, "scale": 0.5})
        assert largest_difference(fast(x, scale=0.5), model(x, 0.5)) < 1e-5
    activations = {name: layer.activation for name, layer in fast.named_modules() if hasattr(layer, "activation")}
    assert activations == {"conv": "none", "wide": "relu6", "last": "relu"}
    reasons = {layer.name: layer.reason for layer in fast.sparse_report.layers}
    assert reasons["shared"] == "it is called 2 times"
    assert sorted(fast.sparse_report.folded) == ["bn", "norm"]


def test_dense_where_dense_is_faster(network, times):
    model, x = network
    times["dense"] = times["channels_last"] = 0.9
    fast = mfac.sparse.convert(model, x)
    assert fast.sparse_report.replaced == []
    assert "dense is as fast or faster: 0.90x" in str(fast.sparse_report)


def test_neighbours_stay_in_one_layout(network, times):
    """A layer that torch does faster in NHWC only is replaced if others make the network NCHW."""
    model, x = network
    times |= {"channels_last": 0.9, "dense": 2.0, "fast": 0.5}
    assert mfac.sparse.convert(model, x).sparse_report.replaced == ["classifier.fc"]
    times["rows"] = 0.5
    report = mfac.sparse.convert(model, x).sparse_report
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert reasons["sections.1.0.point.conv"] == "1.80x dense"
    assert reasons["sections.1.0.depth.conv"] == "2.00x dense in NCHW, its neighbours' layout"


def test_the_whole_model_stays_dense_if_it_is_not_faster(network, times):
    model, x = network
    times["fast"] = 3.0
    fast = mfac.sparse.convert(model, x)
    assert fast.sparse_report.replaced == [] and not [m for m in fast.modules() if isinstance(m, SparseConv2d)]
    assert "the whole model stays dense" in str(fast.sparse_report)
    assert not [m for m in fast.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        assert largest_difference(fast(x), model(x)) < 1e-5


def test_real_times():
    """A layer of which nearly all is zero gains, and the report has the times."""
    model = prune(nn.Sequential(nn.Linear(1024, 2048)), 0.98)
    report = mfac.sparse.convert(model, torch.randn(16, 1024)).sparse_report
    assert report.replaced == ["0"] and report.fast_ms < report.dense_ms
    assert report.layers[0].bytes < report.layers[0].dense_bytes / 20


def test_a_layer_that_is_not_called():
    class Spare(nn.Sequential):
        def forward(self, x):
            return self[0](x)

    model, x = prune(Spare(nn.Linear(16, 8), nn.Linear(8, 8))), torch.randn(2, 16)
    for policy in ("faster", "sparse"):
        fast = mfac.sparse.convert(model, x, policy=policy)
        assert [layer.name for layer in fast.sparse_report.layers] == ["0"]


def test_layers_inside_of_a_module_that_is_called_as_a_whole():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = prune(nn.Sequential(nn.TransformerEncoder(layer, 1), nn.Linear(16, 4))).eval()
    report = mfac.sparse.convert(model, torch.randn(2, 3, 16), policy="sparse").sparse_report
    assert report.replaced == ["1"] and [layer.name.rpartition(".")[2] for layer in report.layers] == [
        "out_proj", "linear1", "linear2", "1",
    ]  # fmt: skip
    assert report.layers[1].reason == "it is inside of TransformerEncoder, called as a whole"
    assert sum(layer.dense_bytes for layer in report.layers) > 4 * 2 * 16 * 32


def test_layers_below_what_is_replaced():
    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.norm = prune(nn.Linear(64, 64)), nn.BatchNorm1d(64)
            self.f.extra, self.norm.extra = nn.Linear(64, 4), nn.Linear(64, 4)

        def forward(self, x):
            return self.norm(self.f(x))

    report = mfac.sparse.convert(Adapted().eval(), torch.randn(2, 64), policy="sparse").sparse_report
    assert report.replaced == ["f"]


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Linear(8, 8)

    def forward(self, x):
        x = torch.relu(self.first(x)).mean((2, 3))
        return self.second(x) if x.sum() > 0 else x


def test_a_model_that_cannot_be_traced():
    model, x = prune(Branching()), torch.randn(2, 3, 5, 5)
    fast = mfac.sparse.convert(model, x, policy="sparse")
    assert isinstance(fast, Branching) and isinstance(fast.second, SparseLinear) and fast.first.activation == "none"
    note = "layers are replaced one by one, without folding and fusing: torch.fx cannot trace it"
    assert note in str(fast.sparse_report)
    with torch.no_grad():
        assert largest_difference(fast(x), model(x)) < 1e-5


class Suspicious(nn.Module):
    """Traced, it does something else."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x) * (1.0 if isinstance(x, torch.Tensor) else 2.0)


def test_a_model_whose_trace_does_something_else():
    model, x = Suspicious(), torch.randn(2, 4)
    traced = trace(model, x, run_example(model, x))
    assert "the traced model differs" in traced.reason and isinstance(traced.model, Suspicious)


class Unfused(nn.Module):
    """A convolution with a use beside its BatchNorm, and clamps that are no ReLU6."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.one, self.two = (
            nn.Conv2d(3, 4, 1),
            nn.BatchNorm2d(4),
            nn.Linear(4, 4),
            nn.Linear(4, 4),
        )

    def forward(self, x):
        x = self.conv(x)
        x = (self.norm(x) + x).mean((2, 3))
        return nn.functional.hardtanh(self.two(nn.functional.hardtanh(self.one(x), -0.5, 6.0)), 0.0, 0.5)


def test_what_is_not_folded_or_fused():
    model, x = Unfused().eval(), torch.randn(2, 3, 5, 5)
    traced = trace(model, x, run_example(model, x))
    assert (traced.reason, traced.folded, traced.activations) == ("", [], {})


def test_layers_that_stay_and_why():
    class Own(nn.Linear):
        pass

    model = nn.Sequential(
        Own(8, 8), nn.Linear(8, 8), nn.Linear(8, 8).double(), nn.Conv2d(8, 8, 3, padding="same"),
        nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 5, groups=8), nn.Linear(40_000, 1), nn.Linear(4, 4),
        nn.Conv2d(8, 8, 1, padding_mode="circular"), nn.Conv2d(8, 8, 3, 3, padding=1, groups=8),
        nn.Conv2d(8, 8, 3, (1, 2), padding=1, groups=8),
    )  # fmt: skip
    model[7].register_forward_hook(lambda *a: None)
    found = convert_module.find_candidates(trace(model))
    assert [c.obstacle.partition(" (")[0] for c in found] == [
        "it is a Own, a class of its own", "0% zeros, fewer than 30%", "torch.float64, neither float32 nor bfloat16",
        "its padding or dilation has no kernel", "its groups have no kernel", "its groups have no kernel",
        "it has more than 32766 inputs per output", "it has hooks", "its padding or dilation has no kernel",
        "its groups have no kernel", "its groups have no kernel",
    ]  # fmt: skip


def test_what_dense_layers_can_become():
    model = nn.Sequential(
        nn.Conv2d(64, 64, 3), nn.Conv2d(256, 300, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Linear(64, 64),
    )  # fmt: skip
    assert [c.formats for c in convert_module.find_candidates(trace(model))] == [["blocks"], [], ["depthwise"], []]


def test_blocks_of_four_rows(times):
    times |= {"rows": 1.0, "blocks": 0.5}
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[0].weight.data *= (torch.rand(16, 64) < 0.1).repeat_interleave(4, 0)
    model[1].weight.data *= torch.rand(64, 64) < 0.1
    report = mfac.sparse.convert(model, torch.randn(3, 64)).sparse_report
    assert [layer.format for layer in report.layers] == ["blocks", "rows"]


def test_bfloat16(network, times):
    model, x = copy.deepcopy(network[0]).bfloat16(), network[1].bfloat16()
    with torch.no_grad():
        fast = mfac.sparse.convert(model, x)
        assert fast(x).dtype == torch.bfloat16 and len(fast.sparse_report.replaced) > 20
        assert largest_difference(fast(x), model(x)) < 5e-2


@pytest.mark.parametrize("backend", ["compiled", "reference"])
def test_autocast(backend, times):
    model = prune(nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 32), nn.Unflatten(1, (8, 2, 2)), nn.Conv2d(8, 8, 1)))
    x = torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        fast = mfac.sparse.convert(model, x, policy="sparse", backend=backend)
    assert fast.sparse_report.replaced == ["0", "1", "3"] and fast.sparse_report.error < 1e-5
    with torch.no_grad():
        right, layer = model(x), fast.get_submodule("0")
        exact = layer(x).bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(x), exact)  # the products are in float32
            out = fast(x)
        assert out.dtype == torch.bfloat16 and largest_difference(out.float(), right) < 2e-2


def test_shapes_alone(times):
    fast = mfac.sparse.convert(nn.Sequential(prune(nn.Linear(64, 64))), torch.randn(1, 64), policy="sparse")
    with torch.no_grad():
        assert copy.deepcopy(fast).to("meta")(torch.empty(5, 64, device="meta")).shape == (5, 64)
        again = mfac.sparse.convert(nn.Sequential(fast, nn.ReLU()), torch.randn(1, 64), policy="sparse")
    assert again.sparse_report.notes == []


def test_one_image_without_a_batch(times):
    model = prune(nn.Sequential(nn.Conv2d(8, 9, 1), nn.Conv2d(9, 9, 3, padding=1, groups=9)))
    x = torch.randn(8, 5, 4)
    with torch.no_grad():
        fast = mfac.sparse.convert(model, x)
        assert [type(m) for m in fast.children()] == [SparseConv2d, DepthwiseConv2d]
        assert largest_difference(fast(x), model(x)) < 1e-5


def test_compile_export_copy_and_pickle(network, times):
    model, x = network
    fast = mfac.sparse.convert(model, x)
    with torch.no_grad():
        right = fast(x)
        assert torch.equal(copy.deepcopy(fast)(x), right)
        assert torch.equal(pickle.loads(pickle.dumps(fast))(x), right)
        assert torch.equal(torch.compile(fast, backend="aot_eager", fullgraph=True)(x), right)
        exported = torch.export.export(fast, (x,))
        assert torch.equal(exported.module()(x), right)
    names = {str(node.target) for node in exported.graph.nodes}
    assert {"mfac_sparse.conv2d.default", "mfac_sparse.linear.default", "mfac_sparse.depthwise_conv2d.default"} <= names


@pytest.mark.parametrize("backend", ["compiled", "reference"])
def test_any_batch_size_after_export(backend):
    model, x = prune(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))), torch.randn(3, 16)
    fast = mfac.sparse.convert(model, x, policy="sparse", backend=backend)
    exported = torch.export.export(fast, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    x = torch.randn(11, 16)
    assert torch.equal(exported.module()(x), fast(x))


def test_copies_keep_the_backend(monkeypatch):
    model = nn.Sequential(prune(nn.Linear(64, 64)))
    for backend, other in (("reference", "compiled"), ("compiled", "reference")):
        fast = mfac.sparse.convert(model, torch.randn(1, 64), policy="sparse", backend=backend)
        monkeypatch.setenv("MFAC_BACKEND", other)
        for copied in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            assert [m.backend for m in copied.modules() if isinstance(m, SparseLinear)] == [backend]
        monkeypatch.delenv("MFAC_BACKEND")
    monkeypatch.setenv("MFAC_BACKEND", "reference")
    saved = pickle.dumps(mfac.sparse.convert(model, torch.randn(1, 64), policy="sparse"))
    monkeypatch.delenv("MFAC_BACKEND")  # as on another machine, which has a compiler
    assert [m.backend for m in pickle.loads(saved).modules() if isinstance(m, SparseLinear)] == ["compiled"]


@pytest.mark.parametrize("policy", ["faster", "sparse"])
def test_random_numbers_of_the_program(policy, unchanged):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = prune(nn.Linear(64, 64))

        def forward(self, x):
            return self.fc(x) + torch.rand_like(x)

    model, x = Noisy(), torch.randn(1, 64)
    with unchanged(model):
        mfac.sparse.convert(model, x, policy=policy)


def test_training_is_refused(network):
    fast = mfac.sparse.convert(*network, policy="sparse")
    with pytest.raises(RuntimeError, match="input: expected no gradient, got a tensor that requires one: SparseConv2d"):
        fast.get_submodule("sections.1.0.point.conv")(torch.randn(1, 16, 4, 4, requires_grad=True))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (({}, None), TypeError, "model: expected a torch.nn.Module, got dict"),
        ((nn.Linear(2, 2, device="meta"), None), ValueError, "model: expected on the CPU, got weight on meta"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        mfac.sparse.convert(*arguments)


def test_words():
    model, x = nn.Linear(2, 2), torch.randn(1, 2)
    with pytest.raises(ValueError, match="policy: expected one of faster, sparse, got 'fast'"):
        mfac.sparse.convert(model, x, policy="fast")
    with pytest.raises(ValueError, match="backend: expected one of auto, compiled, reference, got 'cuda'"):
        mfac.sparse.convert(model, x, backend="cuda")
    with pytest.raises(ValueError, match="activation: expected one of none, relu, relu6, got 'gelu'"):
        SparseLinear(2, 2, None, None, "gelu")
