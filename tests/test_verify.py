"""mfac.verify: zeros, patterns and sizes of files of every format, and what is asked but does not hold."""

import json
import os

import numpy as np
import pytest
import torch
from torch import nn

from mfac import Pruner, save_compressed, sparse, verify
from mfac.cli.main import main
from mfac.tutorial.models import MobileNetV1


def pruned(sparsity=0.9):
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(64, 32))
    with torch.no_grad():
        for weight in (p for p in model.parameters() if p.dim() > 1):
            weight.view(-1)[torch.randperm(weight.numel())[: round(sparsity * weight.numel())]] = 0
    return model


@pytest.fixture
def files(tmp_path):
    """A model as a state_dict, a checkpoint, of before torch 1.6, and compressed."""
    model = pruned()
    torch.save(model.state_dict(), tmp_path / "state.pt")
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "checkpoint.pt")
    torch.save(model.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_compressed(model, tmp_path / "model.safetensors")
    return [tmp_path / name for name in ("state.pt", "checkpoint.pt", "old.pt", "model.safetensors")]


def test_every_format_says_the_same(files):
    found = [verify(path, sparsity=0.9, layer_sparsity=0.9) for path in files]
    for result in found:
        assert result.ok and result.layers == found[0].layers
        assert [layer.name for layer in result.layers] == ["0.weight", "3.weight"]
        assert [layer.zeros for layer in result.layers] == [round(0.9 * 16 * 8 * 9), round(0.9 * 32 * 64)]
        assert result.sizes["file"] == result.path.stat().st_size
        assert result.sizes["compressed"] < result.sizes["zipped"] < result.sizes["dense"]
        assert {k: v for k, v in result.sizes.items() if k != "file"} == {
            k: v for k, v in found[0].sizes.items() if k != "file"
        }
    assert [result.format for result in found] == ["checkpoint"] * 3 + ["compressed safetensors"]
    assert str(found[0]).endswith("all that was asked holds")


@pytest.mark.parametrize(
    ("asked", "failure"),
    [
        ({"sparsity": 0.91}, "sparsity: expected >= 91.00 %, got 90.00 %"),
        (
            {"layer_sparsity": 0.95, "exclude": "0.weight"},
            "layer_sparsity: expected >= 95.00 %, got 89.99 % in 3.weight",
        ),
        ({"max_size": 0.1}, "max_size: expected a file of <= 10.00 % of dense, got "),
        ({"pattern": "1:8", "params": "3.weight"}, "pattern: expected 1:8 in 3.weight, got "),
        ({"pattern": [4, 4], "params": "re:0"}, r"pattern: expected [4, 4] in 0.weight, got "),
    ],
)
def test_what_does_not_hold(files, asked, failure):
    result = verify(files[0], **asked)
    assert not result.ok and result.failures[0].startswith(failure)
    assert f"failed: {failure}" in str(result)


DENSE, ZERO = torch.ones(8, 8), torch.zeros(8, 8)


@pytest.mark.parametrize(
    ("content", "read", "more"),
    [
        ({"a.weight": ZERO, "ema": {"a.weight": DENSE}}, "the top level", "ema"),
        ({"a": ZERO, "blocks": [DENSE, DENSE]}, "the top level", "blocks"),
        ({"a": (ZERO, {"b": DENSE})}, "the top level", "a"),
        ({"G": {"a": ZERO}, "D": {"a": DENSE}}, "the top level", "G, D"),
        ({"model": {"a": ZERO}, "state_dict": {"a": DENSE}}, "'model'", "state_dict"),
        ({"model": {"a": ZERO, "state_dict": {"a": ZERO}}, "ema": DENSE}, "'model.state_dict'", "ema, a"),
        ({"state_dict": {"a": ZERO}, "callbacks": {"EMA": {"shadow": [DENSE]}}}, "'state_dict'", "callbacks"),
    ],
)
def test_weights_that_are_not_read_are_refused(tmp_path, content, read, more):
    torch.save(content, tmp_path / "m.pt")
    text = (
        f"path: expected the weights of one state dict, got .*, of which {read} is read, with more weights in {more};"
    )
    with pytest.raises(ValueError, match=text):
        verify(tmp_path / "m.pt", sparsity=0.9)


@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_what_a_checkpoint_holds_beside_the_weights_is_named(tmp_path, key):
    model = pruned()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 8, 4, 4)).sum().backward()
    optimizer.step()
    pruner = Pruner(model, sparsity=0.9, end=1, criterion="magnitude")
    pruner.step()
    content = {
        key: model.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "callbacks": {"PrunerCallback": pruner.state_dict(results=True)},
        "loops": {"fit_loop": {"state_dict": {}, "epoch": 1}},
        "rng": torch.get_rng_state(),
    }
    torch.save(content, tmp_path / "m.pt")
    found = verify(tmp_path / "m.pt", sparsity=0.9)
    assert found.ok and found.part == key and found.unread == ("optimizer_states", "callbacks", "rng")
    assert f"  read: {key}\n  not read, no weights: optimizer_states, callbacks, rng\n" in str(found)


def test_names_of_one_memory_in_two_layouts_are_two_weights(tmp_path):
    weight = torch.ones(8, 8)
    weight[:, ::2] = 0
    torch.save({"a": weight, "b": weight.T, "c": weight}, tmp_path / "m.pt")
    found = verify(tmp_path / "m.pt", pattern="2:4")
    assert [(layer.name, not layer.breaks) for layer in found.layers] == [("a", True), ("b", False)]


def test_rounding_lets_no_layer_pass_that_no_pruning_gives(tmp_path):
    torch.save({f"{i}.weight": torch.ones(2, 2) for i in range(10)}, tmp_path / "m.pt")
    failures = verify(tmp_path / "m.pt", sparsity=0.9, layer_sparsity=0.9, pattern=[8, 1]).failures
    assert failures[0] == "sparsity: expected >= 90.00 %, got 0.00 %" and len(failures) == 11
    weight = torch.ones(8, 10)  # at 55 % 5.5 of its 10 blocks go
    weight[:, :5] = 0
    torch.save({"w": weight}, tmp_path / "m.pt")
    assert verify(tmp_path / "m.pt", sparsity=0.55, layer_sparsity=0.55, pattern=[8, 1]).ok
    weight[:, 4] = 1
    torch.save({"w": weight}, tmp_path / "m.pt")
    assert len(verify(tmp_path / "m.pt", sparsity=0.55, layer_sparsity=0.55, pattern=[8, 1]).failures) == 2


def test_sparsity_of_layers_that_were_pruned_together(tmp_path):
    weights = torch.ones(32, 27), torch.ones(64, 288)  # at 90 % 17366.4 of both, 777.6 and 16588.8 of each
    weights[0].view(-1)[:700] = weights[1].view(-1)[:16666] = 0
    torch.save(dict(zip("ab", weights, strict=True)), tmp_path / "m.pt")
    assert verify(tmp_path / "m.pt", sparsity=0.9).ok
    weights[1].view(-1)[0] = 1
    torch.save(dict(zip("ab", weights, strict=True)), tmp_path / "m.pt")
    assert not verify(tmp_path / "m.pt", sparsity=0.9).ok


def test_sparsity_is_exact_up_to_the_rounding_of_each_layer(tmp_path):
    weight = torch.ones(10, 33)
    weight.view(-1)[: round(0.95 * 330)] = 0  # 313.5 rounds to 314
    torch.save({"w": weight}, tmp_path / "m.pt")
    assert verify(tmp_path / "m.pt", sparsity=314 / 330).ok
    weight.view(-1)[313] = 1
    torch.save({"w": weight}, tmp_path / "m.pt")
    assert verify(tmp_path / "m.pt", sparsity=0.95).ok and not verify(tmp_path / "m.pt", sparsity=0.955).ok


def test_layers_that_were_ranked_together(tmp_path):
    """25.2 of 28 weights are 25; each by itself would be 12.6 of 14, 13."""
    first, second = torch.ones(2, 7), torch.ones(2, 7)
    first.view(-1)[:13] = second.view(-1)[:12] = 0
    torch.save({"a": first, "b": second}, tmp_path / "m.pt")
    assert verify(tmp_path / "m.pt", sparsity=0.9).ok
    second.view(-1)[0] = 1
    torch.save({"a": first, "b": second}, tmp_path / "m.pt")
    assert not verify(tmp_path / "m.pt", sparsity=0.9).ok


def test_the_first_place_that_breaks_a_pattern(tmp_path):
    weight = torch.ones(8, 8, 3, 3)
    weight[:, 1::4] = weight[:, 2::4] = 0
    torch.save({"conv.weight": weight}, tmp_path / "m.pt")
    assert verify(tmp_path / "m.pt", pattern="2:4", sparsity=0.5).ok
    weight[5, 6, 1, 2] = 1
    torch.save({"conv.weight": weight, "odd": torch.ones(4, 3)}, tmp_path / "m.pt")
    (failure,) = verify(tmp_path / "m.pt", pattern="2:4").failures  # 3 inputs do not fill a group of 4
    assert failure == "pattern: expected 2:4 in conv.weight, got 3 of 4 kept in the group that begins at [5, 4, 1, 2]"


def test_blocks_count_as_a_whole(tmp_path):
    weight = torch.ones(8, 8)
    weight[:4] = 0
    torch.save({"w": weight}, tmp_path / "m.pt")
    assert verify(tmp_path / "m.pt", pattern=[4, 1], sparsity=0.5).ok
    weight[6, 3] = 0
    torch.save({"w": weight, "i": weight.to(torch.int8)}, tmp_path / "m.pt")
    result = verify(tmp_path / "m.pt", pattern=[4, 1], layer_sparsity=0.5)
    assert result.failures == ["pattern: expected [4, 1] in w, got 3 of 4 kept in the group that begins at [4, 3]"]
    assert [layer.zeros for layer in result.layers] == [32, 32]  # an integer is 0 by rounding, too


def test_what_is_not_finite(tmp_path):
    large = torch.full((4, 4), 1e300, dtype=torch.float64)
    torch.save({"w": large}, tmp_path / "m.pt")
    assert verify(tmp_path / "m.pt").ok
    save_compressed({"w": torch.ones(4, 4).to(torch.float8_e5m2)}, tmp_path / "m.safetensors")
    assert verify(tmp_path / "m.safetensors").ok
    state = pruned().state_dict()
    state["1.running_var"][3] = torch.nan
    torch.save(state, tmp_path / "m.pt")
    expected = ["weights: expected finite values, got NaN or infinity in 1.running_var"]
    assert verify(tmp_path / "m.pt").failures == expected
    torch.save({"w": torch.ones(4, 4), "x": torch.full((2,), complex(1, float("nan")))}, tmp_path / "m.pt")
    assert verify(tmp_path / "m.pt").failures == ["weights: expected finite values, got NaN or infinity in x"]


def test_zeros_of_another_file(files, tmp_path):
    assert verify(files[0], zeros_of=files[3]).ok
    state = torch.load(files[0], weights_only=True)
    zeros = (state["3.weight"] == 0).nonzero()
    state["3.weight"][tuple(zeros[7])] = 1
    state["new.weight"] = torch.ones(2, 2)
    state["0.weight"] = state["0.weight"][:8]
    torch.save(state, tmp_path / "m.pt")
    place = zeros[7].tolist()
    assert verify(tmp_path / "m.pt", zeros_of=files[0]).failures == [
        "zeros_of: expected 0.weight of shape [16, 8, 3, 3], got [8, 8, 3, 3]",
        f"zeros_of: expected its zeros in 3.weight, got 1 other values, the first at {place}",
        "zeros_of: expected new.weight in the other file too, got 0.weight, 3.weight",
    ]
    torch.save({"0.weight": torch.load(files[0], weights_only=True)["0.weight"]}, tmp_path / "part.pt")
    missing = "zeros_of: expected 3.weight in this file too, got 0.weight"
    assert verify(tmp_path / "part.pt", zeros_of=files[0]).failures == [missing]
    assert verify(tmp_path / "part.pt", zeros_of=files[0], params="0.weight").ok
    torch.save({"0.weight": torch.ones(16, 8, 3, 3), "3.weight": torch.ones(32, 64)}, tmp_path / "dense.pt")
    failure = f"zeros_of: expected pruned weights, got none with zeros in {tmp_path / 'dense.pt'}"
    assert verify(files[0], zeros_of=tmp_path / "dense.pt").failures == [failure]
    with pytest.raises(ValueError, match=r"zeros_of: expected an existing file, got none.pt"):
        verify(files[0], zeros_of="none.pt")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_quantized_and_sparse_tensors(tmp_path):
    weight = pruned()[3].weight.detach()
    symmetric = torch.quantize_per_tensor(weight, 0.01, 0, torch.qint8)
    channel = torch.quantize_per_channel(weight, torch.full((32,), 0.01), torch.arange(32), 0, torch.quint8)
    state = {
        "s.weight": symmetric,
        "packed": (channel, torch.ones(32)),
        "csr": weight.to_sparse_csr(),
        "coo": weight.to_sparse(),
    }
    torch.save(state, tmp_path / "m.pt")
    result = verify(tmp_path / "m.pt", sparsity=0.85)
    assert result.ok and [layer.name for layer in result.layers] == list(state)
    assert all(layer.zeros >= int((weight == 0).sum()) for layer in result.layers)
    assert [layer.dtype for layer in result.layers[:2]] == [torch.int8, torch.uint8]


def sliced(weight):
    """A matrix in slices of four rows, as a converted model has it, computed row by row."""
    rows, inputs = weight.shape
    lists = [[(c, float(v)) for c, v in enumerate(row) if v] for row in weight]
    order = torch.arange(-(-rows // 4) * 4).view(-1, 4).flip(0).flatten()
    order = torch.where(order < rows, order, -1)
    values, columns, pointers = [], [], [0]
    for group in order.view(-1, 4).tolist():
        entries = [lists[row] if row >= 0 else [] for row in group]
        for step in range(max(map(len, entries))):
            entry = [e[step] if step < len(e) else (inputs, 0.0) for e in entries]
            columns.append([c for c, _ in entry])
            values.append([v for _, v in entry])
        pointers.append(len(values))
    shape = torch.tensor([rows, inputs // 4, 2, 2])
    parts = {"values": torch.tensor(values), "columns": torch.tensor(columns, dtype=torch.int16), "shape": shape}
    return parts | {"pointers": torch.tensor(pointers, dtype=torch.int32), "order": order.int()}


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_converted_model(tmp_path, suffix):
    weight = torch.randn(10, 32).masked_fill(torch.rand(10, 32) < 0.7, 0)
    parts = sliced(weight)
    path = tmp_path / f"m.{suffix}"

    def save(parts):
        state = {f"conv.{part}": tensor for part, tensor in parts.items()} | {"fc.weight": torch.ones(2, 2)}
        save_compressed(state, path) if suffix == "safetensors" else torch.save({"state_dict": state}, path)
        torch.save({"conv.weight": weight.view(10, 8, 2, 2), "fc.weight": torch.ones(2, 2)}, tmp_path / "dense.pt")

    save(parts)
    result = verify(path, zeros_of=tmp_path / "dense.pt")
    assert result.ok and result.format.endswith("of a converted model")
    assert [(layer.name, layer.shape) for layer in result.layers] == [
        ("conv.weight", (10, 8, 2, 2)),
        ("fc.weight", (2, 2)),
    ]
    assert result.layers[0].zeros == int((weight == 0).sum())
    state = {f"conv.{part}": tensor for part, tensor in parts.items() if part != "shape"}
    described = {"layers": {"conv": "rows"}, "shapes": {"conv": [10, 8, 2, 2]}}
    if suffix == "pt":
        torch.save({"state_dict": state, "mfac.sparse": described}, path)
    else:
        save_compressed(state, path, metadata={"mfac.sparse": json.dumps(described)})
    assert verify(path).layers[0] == result.layers[0]
    for change, error in (
        ({"shape": torch.tensor([10, 7])}, "it has columns beyond 7"),
        ({"shape": torch.tensor([10, 2**40])}, "columns of torch.int16 do not number 1099511627776 inputs"),
        ({"shape": torch.tensor([20, 32])}, "12 rows in 3 slices are not those of the shape"),
        ({"values": parts["values"][1:]}, "do not fit the pointers"),
        ({"order": parts["order"].flip(0).clamp(max=5)}, "the order of its rows has gaps"),
        ({"shape": torch.tensor(3)}, "it does not say the shape of the weight"),
    ):
        save(parts | change)
        with pytest.raises(ValueError, match=f"path: expected a converted model, got .*, whose layer 'conv' .*{error}"):
            verify(path)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"params": "4.weight"}, "params: expected names of weights in .*0.weight, 3.weight.*, got '4.weight'"),
        ({"exclude": "re:.*"}, "exclude: expected to leave a weight of .*, got all excluded"),
        ({"sparsity": 95}, r"sparsity: expected in \[0, 1\], got 95"),
        ({"max_size": 0}, "max_size: expected a finite number > 0, got 0"),
        ({"pattern": "4:2"}, "pattern: expected N:M with 1 <= N < M"),
    ],
)
def test_wrong_arguments(files, arguments, error):
    with pytest.raises(ValueError, match=error):
        verify(files[0], **arguments)


def test_files_without_weights(tmp_path):
    torch.save({"a": 1, "b": torch.ones(3)}, tmp_path / "m.pt")
    (tmp_path / "text.pt").write_text("no weights")
    os.mkfifo(tmp_path / "pipe.pt")
    for name, error in (
        ("none.pt", "path: expected an existing file, got "),
        ("pipe.pt", "path: expected an existing file, got "),
        ("m.pt", "path: expected a file with weights of layers, got .*, which has none"),
        ("text.pt", "path: expected a checkpoint, a safetensors file or an ONNX file .*, got .*, which is damaged"),
    ):
        with pytest.raises(ValueError, match=error):
            verify(tmp_path / name)


def test_the_command(files, capsys, monkeypatch):
    path = str(files[3])
    assert main(["verify", path, "--sparsity", "0.9", "--max-size", "0.5"]) == 0
    text = capsys.readouterr().out
    assert "compressed safetensors, 2 weights, sparsity 90.00 %" in text and "all that was asked holds" in text
    assert main(["verify", path, "--sparsity", "0.95"]) == 1
    captured = capsys.readouterr()
    assert "failed: sparsity: expected >= 95.00 %, got 90.00 %" in captured.out and captured.err == ""
    assert main(["verify", path, "--pattern", "4,1", "--exclude", "re:0", "--zeros-of", str(files[0])]) == 1
    assert "pattern: expected [4, 1] in 3.weight" in capsys.readouterr().out
    assert main(["verify", path, "--pattern", "4,x"]) == 2
    assert "pattern: expected 'unstructured', 'block4', 'N:M' such as '2:4', or [rows, cols], got '4,x'" in (
        capsys.readouterr().err
    )
    monkeypatch.setattr("mfac.export.verify.open_weights", lambda *_: (_ for _ in ()).throw(ImportError("onnx: none")))
    assert main(["verify", path]) == 2 and capsys.readouterr().err == "mfac: error: onnx: none\n"
    assert main(["verify", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert all(word in text for word in ("--zeros-of", "N:M, block4, or R,C", "0.95", "int8.onnx"))


def test_a_large_layer_is_read_one_at_a_time(tmp_path):
    """A compressed MobileNet, from end to end, by names of the tutorial."""
    model = MobileNetV1(10, 0.25)
    with torch.no_grad():
        for weight in (p for p in model.parameters() if p.dim() > 1):
            weight.masked_fill_(torch.rand_like(weight) < 0.95, 0)
    save_compressed(model, tmp_path / "m.safetensors")
    assert verify(tmp_path / "m.safetensors", sparsity=0.94).ok


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_files_of_mfac_sparse(tmp_path, suffix):
    """As mfac.sparse.save writes them: the weights of convolutions of 1 x 1 and 3 x 3, and of a linear layer."""
    torch.manual_seed(0)
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    layers = nn.Conv2d(8, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 1), *pooled, nn.Linear(64, 40)
    model = nn.Sequential(*layers).eval()
    weights = {f"{index}.weight": layer.weight for index, layer in enumerate(layers) if hasattr(layer, "weight")}
    for weight in weights.values():
        weight.data.mul_(torch.rand_like(weight) < 0.1)
    fast = sparse.convert(model, torch.randn(1, 8, 14, 14), policy="sparse")
    sparse.save(fast, tmp_path / f"model.{suffix}")
    found = verify(tmp_path / f"model.{suffix}", sparsity=0.85)
    assert not found.failures
    assert {layer.name: (list(layer.shape), layer.zeros) for layer in found.layers} == {
        name: (list(weight.shape), int((weight == 0).sum())) for name, weight in weights.items()
    }


def test_types_that_onnx_does_not_know(tmp_path):
    onnx = pytest.importorskip("onnx")
    tensors = {name: onnx.numpy_helper.from_array(np.ones((2, 2), np.float32), name) for name in ("w", "other")}
    tensors["other"].data_type = 67
    info = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2, 2]) for name in ("x", "y")]
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = onnx.helper.make_graph([node], "graph", info[:1], info[1:], list(tensors.values()))
    (tmp_path / "m.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    with pytest.raises(ValueError, match=r"path: expected an ONNX file, got .*m\.onnx"):
        verify(tmp_path / "m.onnx")
