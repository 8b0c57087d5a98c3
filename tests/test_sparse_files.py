"""Files of converted models: compressed, complete, and read without dense weights."""

import copy
import pickle

import pytest
import torch
from test_sparse_convert import Branching, network, prune, times  # noqa: F401  # fixtures
from torch import nn

import mfac
from mfac.files.container import write_tensors
from mfac.sparse.formats import CONVERTED, slice_matrix
from mfac.sparse.modules import SparseLinear
from mfac.tutorial.models import MobileNetV1

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("backend", ["compiled", "reference"])
def test_round_trip(network, times, tmp_path, suffix, backend):  # noqa: F811
    model, x = network
    fast, path = mfac.sparse.convert(model, x), tmp_path / f"model.{suffix}"
    mfac.sparse.save(fast, path)
    with torch.device("meta"):
        skeleton = MobileNetV1(num_classes=10, width=0.25)
    again = mfac.sparse.load(skeleton, path, backend=backend)
    assert [p.is_meta for p in skeleton.parameters()].count(False) == 0
    with torch.no_grad():
        if backend == "compiled":
            assert torch.equal(again(x), fast(x))
        torch.testing.assert_close(again(x), model(x), rtol=1e-4, atol=1e-5)
    assert again.state_dict().keys() == fast.state_dict().keys()


def test_a_model_that_stayed_dense(network, times, tmp_path):  # noqa: F811
    model, x = network
    times["fast"] = 3.0
    fast = mfac.sparse.convert(model, x)
    mfac.sparse.save(fast, tmp_path / "model.pt")
    again = mfac.sparse.load(MobileNetV1(num_classes=10, width=0.25), tmp_path / "model.pt")
    with torch.no_grad():
        assert torch.equal(again(x), fast(x))


def test_size(tmp_path):
    model = prune(nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512)))
    mfac.sparse.save(mfac.sparse.convert(model, torch.randn(1, 512), policy="sparse"), tmp_path / "model.pt")
    assert (tmp_path / "model.pt").stat().st_size < 2 * 512 * 512 * 4 / 6


def test_a_model_that_cannot_be_traced(tmp_path):
    fast = mfac.sparse.convert(prune(Branching()), torch.randn(2, 3, 5, 5), policy="sparse")
    mfac.sparse.save(fast, tmp_path / "model.pt")
    again, x = mfac.sparse.load(Branching(), tmp_path / "model.pt"), torch.randn(2, 3, 5, 5)
    assert torch.equal(again(x), fast(x))


def test_a_state_dict_alone():
    """Its tensors are the compressed ones; another matrix of the same shape fits, one of another shape does not."""
    one, other = (nn.Sequential(prune(nn.Linear(300, 200), s)) for s in (0.95, 0.8))
    one, other = (mfac.sparse.convert(m, torch.randn(1, 300), policy="sparse") for m in (one, other))
    one.load_state_dict(other.state_dict())
    x = torch.randn(3, 300)
    assert torch.equal(one(x), other(x))
    small = SparseLinear(100, 300, slice_matrix(torch.eye(100, 300), "rows"), torch.ones(100), "none")
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.pointers"):
        one.load_state_dict(nn.Sequential(small).state_dict())


def test_wrong_files(network, tmp_path):  # noqa: F811
    model, x = network
    path = tmp_path / "model.pt"
    torch.save(model.state_dict(), path)
    with pytest.raises(ValueError, match=r"path: expected a file of mfac.sparse.save, got .*model.pt without"):
        mfac.sparse.load(model, path)
    mfac.sparse.save(mfac.sparse.convert(model, x, policy="sparse"), path)
    with pytest.raises(ValueError, match=r"model: expected the layers of .*, got none of that name for 'sections"):
        mfac.sparse.load(nn.Linear(2, 2), path)
    with pytest.raises(ValueError, match=r"model: expected the network of .*, got another: out_channels of 'input"):
        mfac.sparse.load(MobileNetV1(num_classes=10, width=0.5), path)
    with pytest.raises(ValueError, match=r"model: expected one that torch\.fx can trace, as was the one in"):
        mfac.sparse.load(Branching(), path)


def convolution(inputs=16, size=1, stride=1, padding=0, activation=nn.ReLU, norm=True):
    layers = [nn.Conv2d(inputs, 64, size, stride, padding), nn.BatchNorm2d(64), activation(), nn.Conv2d(64, 8, 1)]
    return nn.Sequential(*[layer for layer in layers if norm or not isinstance(layer, nn.BatchNorm2d)])


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"inputs": 32}, r"shape of '0' is \[64, 16\] there, \[64, 32\] here"),
        ({"size": 3}, r"shape of '0' is \[64, 16\] there, \[64, 144\] here"),
        ({"stride": 2}, r"stride of '0' is \[1, 1\] there, \[2, 2\] here"),
        ({"padding": 1}, r"padding of '0' is \[0, 0\] there, \[1, 1\] here"),
        ({"activation": nn.GELU}, r"activation of '0' is 'relu' there, 'none' here"),
    ],
)
def test_another_network_of_the_same_names(tmp_path, suffix, other, text):
    path = tmp_path / f"model.{suffix}"
    fast = mfac.sparse.convert(prune(convolution().eval(), 0.9), torch.randn(1, 16, 8, 8), policy="sparse")
    mfac.sparse.save(fast, path)
    mfac.sparse.load(convolution(), path)
    with pytest.raises(ValueError, match=rf"model: expected the network of .*, got another: {text}"):
        mfac.sparse.load(convolution(**other), path)
    with pytest.raises(ValueError, match=r"model: expected the layers of .*, got ReLU for '.'|got none of that name"):
        mfac.sparse.load(convolution(norm=False), path)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_damaged_files(tmp_path, suffix):
    path = tmp_path / f"model.{suffix}"
    fast = mfac.sparse.convert(prune(convolution().eval(), 0.9), torch.randn(1, 16, 8, 8), policy="sparse")
    mfac.sparse.save(fast, path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"path: expected a .*, got .*model.{suffix}"):
        mfac.sparse.load(convolution(), path)
    with pytest.raises(ValueError, match=r"path: expected an existing file, got .*none"):
        mfac.sparse.load(convolution(), tmp_path / "none")


@pytest.mark.parametrize("part", ["traced", "state_dict", "layers"])
def test_files_without_a_part(tmp_path, part):
    path = tmp_path / "model.pt"
    mfac.sparse.save(mfac.sparse.convert(prune(nn.Linear(64, 64)), torch.randn(1, 64), policy="sparse"), path)
    content = torch.load(path)
    del (content if part == "state_dict" else content[CONVERTED])[part]
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"path: expected a file of mfac.sparse.save, got .* without its description"):
        mfac.sparse.load(nn.Linear(64, 64), path)


def test_a_description_that_is_no_json(tmp_path):
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"weight": torch.ones(2, 2)}, {CONVERTED: "{"})
    with pytest.raises(ValueError, match=r"path: expected JSON as mfac.sparse in .*, got Expecting"):
        mfac.sparse.load(nn.Linear(2, 2), path)


@pytest.mark.parametrize("backend", ["compiled", "reference"])
def test_rows_that_are_left_out(tmp_path, backend):
    """What no row of the file writes must not be read from memory."""
    path = tmp_path / "model.pt"
    mfac.sparse.save(
        mfac.sparse.convert(nn.Sequential(prune(nn.Linear(64, 64))), torch.randn(1, 64), policy="sparse"), path
    )
    content = torch.load(path)
    for change in (lambda order: order.fill_(-1), lambda order: order[:1].fill_(int(order[1]))):
        damaged = {**content, "state_dict": copy.deepcopy(content["state_dict"])}
        change(damaged["state_dict"]["0.order"])
        torch.save(damaged, path)
        with pytest.raises(ValueError, match=r"0\.order: expected each of 64 rows once, got others"):
            mfac.sparse.load(nn.Sequential(nn.Linear(64, 64)), path, backend=backend)
    torch.save({**content, "state_dict": {1: "rows"}}, path)
    with pytest.raises(ValueError, match=r"path: expected a file of mfac.sparse.save, got .* without its description"):
        mfac.sparse.load(nn.Sequential(nn.Linear(64, 64)), path)


class Attention(nn.Module):
    """A module with children whose number of heads no tensor says, and a number in the forward."""

    def __init__(self, heads=2, scale=0.5, branches=False):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(64, heads, batch_first=True), nn.Linear(64, 64)
        self.scale, self.branches = scale, branches

    def forward(self, x):
        if self.branches and x.sum() > 1e9:
            return x
        return self.head(self.scale * self.attention(x, x, x)[0])


def followed_by(*layers):
    return nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), *layers)


@pytest.mark.parametrize(
    ("one", "other", "text"),
    [
        (followed_by(nn.GroupNorm(4, 16)), followed_by(nn.GroupNorm(8, 16)), "num_groups of '1' is 4 there, 8 here"),
        (followed_by(nn.LeakyReLU()), followed_by(nn.LeakyReLU(0.3)), "negative_slope of '1' is 0.01 there, 0.3 here"),
        (followed_by(nn.GELU()), followed_by(nn.GELU("tanh")), "approximate of '1' is 'none' there, 'tanh' here"),
        (followed_by(nn.Hardtanh(-1, 1)), followed_by(nn.Hardtanh(-2, 1)), "min_val of '1' is -1 there, -2 here"),
        (
            followed_by(nn.Upsample(scale_factor=2)),
            followed_by(nn.Upsample(scale_factor=2, mode="bilinear")),
            "mode of '1' is 'nearest' there, 'bilinear' here",
        ),
        (
            nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect")),
            nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular")),
            "padding_mode of '0' is 'reflect' there, 'circular' here",
        ),
        (Attention(), Attention(8), "num_heads of 'attention' is 2 there, 8 here"),
        (Attention(), Attention(scale=2), "step 3 of '' is call_function mul .0.5, .* there, .* mul .2,"),
        (Attention(branches=True), Attention(8, branches=True), "num_heads of 'attention' is 2 there, 8 here"),
        (Attention(branches=True), Attention(scale=2, branches=True), "scale of '' is 0.5 there, 2 here"),
    ],
)
def test_settings_that_no_tensor_says(tmp_path, one, other, text):
    x = torch.randn(2, 5, 64) if isinstance(one, Attention) else torch.randn(1, 16, 8, 8)
    for layer in (module for module in one.modules() if type(module) in (nn.Linear, nn.Conv2d)):
        layer.weight.data.mul_(torch.rand_like(layer.weight) < 0.1)
    fast = mfac.sparse.convert(one, x, policy="sparse")
    mfac.sparse.save(pickle.loads(pickle.dumps(fast)), tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(mfac.sparse.load(one, tmp_path / "model.safetensors")(x), fast(x))
    with pytest.raises(ValueError, match=f"model: expected the network of .*, got another: {text}"):
        mfac.sparse.load(other, tmp_path / "model.safetensors")


def test_a_file_of_an_earlier_version(tmp_path):
    fast = mfac.sparse.convert(prune(convolution().eval(), 0.9), torch.randn(1, 16, 8, 8), policy="sparse")
    mfac.sparse.save(fast, tmp_path / "model.pt")
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    content["mfac.sparse"]["modules"] = {"0": "SparseConv2d, shape=[64, 16]"}
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(
        ValueError, match=r"path: expected a file of this version of mfac.sparse.save, got .*model.pt of"
    ):
        mfac.sparse.load(convolution(), tmp_path / "model.pt")


@pytest.mark.parametrize("settings", [{"padding_mode": "reflect"}, {"dilation": 2}])
def test_a_layer_that_would_not_be_replaced(tmp_path, settings):
    one, other = (nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, **given)) for given in ({}, settings))
    one[0].weight.data.mul_(torch.rand_like(one[0].weight) < 0.1)
    mfac.sparse.save(mfac.sparse.convert(one, torch.randn(1, 16, 8, 8), policy="sparse"), tmp_path / "model.pt")
    with pytest.raises(
        ValueError, match=r"model: expected the layers of .*, got '0' that is not replaced: its padding"
    ):
        mfac.sparse.load(other, tmp_path / "model.pt")
