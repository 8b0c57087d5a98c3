"""ONNX: BatchNorm folded, zeros exact, outputs those of torch; and the formats of `mfac export`."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import mfac
from mfac.cli.main import main
from mfac.export.onnx import _difference
from mfac.tutorial.models import MobileNetV1

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.usefixtures("one_thread")


class Network(nn.Module):
    """Each kind of layer that takes in a BatchNorm, one that is not taken in, and products with three axes."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.up, self.up_bn = nn.ConvTranspose2d(8, 16, 2, 2, groups=2), nn.BatchNorm2d(16)
        self.alone = nn.BatchNorm2d(16)
        self.square = nn.Linear(16, 16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = self.up_bn(self.up(torch.relu(self.bn(self.conv(x)))))
        x = self.alone(torch.relu(x)).mean((2, 3))
        return self.fc(torch.relu(self.square(x[:, None].expand(-1, 3, -1)))), x


def trained(model, sparsity=0.9):
    """Statistics and weights as after training, zeros among them, and scales below 0 too."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_()
                layer.running_var.uniform_(0.5, 2)
                layer.weight.uniform_(-2, 2)
                layer.bias.normal_()
        for weight in (p for p in model.parameters() if p.dim() > 1):
            weight.masked_fill_(torch.rand_like(weight) < sparsity, 0)
    return model.train()


def test_a_model_with_all_kinds_of_layers(tmp_path, unchanged):
    model, inputs = trained(Network()), torch.randn(3, 3, 8, 8)
    with unchanged(model, inputs):
        written = mfac.export_onnx(model, inputs, tmp_path / "m.onnx")
    assert written.error < 1e-5 and written.batchnorms == 1
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert [node.op_type for node in graph.node].count("BatchNormalization") == 1
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param  # any batch
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for name in ("conv", "up", "square", "fc"):
        weight, array = model.get_parameter(f"{name}.weight").detach(), torch.tensor(stored[f"{name}.weight"])
        array = array if name in ("conv", "up") else array.T
        assert torch.equal(array == 0, weight == 0) and not bool(((array == 0) & array.signbit()).any())
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]
    torch.save(model.state_dict(), tmp_path / "m.pt")
    result = mfac.verify(tmp_path / "m.onnx", zeros_of=tmp_path / "m.pt")
    assert result.ok and result.format == "ONNX"
    zeros = sum(int((w == 0).sum()) for w in model.parameters() if w.dim() > 1)
    assert sum(layer.zeros for layer in result.layers) == zeros
    pattern = mfac.verify(tmp_path / "m.onnx", pattern="1:16", params="fc.weight").failures
    assert "got " in pattern[0] and "of 16 kept in the group that begins at [0, " in pattern[0]  # [in, out] in the file


def test_a_recurrent_model_whose_weights_are_renamed(tmp_path):
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(8, 8, batch_first=True)

        def forward(self, x):
            return self.lstm(x)[0][:, -1]

    written = mfac.export_onnx(trained(Last()), torch.randn(3, 4, 8), tmp_path / "m.onnx")
    assert written.error < 1e-5
    assert mfac.verify(tmp_path / "m.onnx", sparsity=0.8).ok


def test_tied_weights_fixed_batches_and_bfloat16(tmp_path):
    tied = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    tied[2].weight = tied[0].weight
    mfac.export_onnx(trained(tied), torch.randn(2, 3, 16), tmp_path / "tied.onnx")
    assert [layer.name for layer in mfac.verify(tmp_path / "tied.onnx", sparsity=0.8).layers] == ["0.weight"]
    fixed = nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (2, 8)), nn.Linear(8, 4))
    assert mfac.export_onnx(fixed, torch.randn(2, 8), tmp_path / "fixed.onnx").error < 1e-5
    model, inputs = trained(nn.Sequential(nn.Linear(64, 64))).bfloat16(), torch.randn(2, 64).bfloat16()
    with pytest.raises(ValueError, match=r"check: expected False for bfloat16, .*, got True and 0.weight"):
        mfac.export_onnx(model, inputs, tmp_path / "bf16.onnx")
    mfac.export_onnx(model, inputs, tmp_path / "bf16.onnx", check=False)
    (layer,) = mfac.verify(tmp_path / "bf16.onnx", sparsity=0.8).layers
    assert layer.dtype == torch.bfloat16 and layer.zeros == int((model[0].weight == 0).sum())


def test_what_is_not_exported(tmp_path, monkeypatch):
    model, inputs, path = nn.Linear(4, 4), torch.randn(2, 4), tmp_path / "m.onnx"
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got dict"):
        mfac.export_onnx({}, inputs, path)
    with pytest.raises(ValueError, match=r"inputs: expected tensors of two samples or more, got shape \[1, 4\] as"):
        mfac.export_onnx(model, inputs[:1], path)
    with pytest.raises(ValueError, match=r"path: expected a file in an existing folder, got .*none"):
        mfac.export_onnx(model, inputs, tmp_path / "none" / "m.onnx")
    monkeypatch.setattr("mfac.export.onnx._difference", lambda *arguments: 1e-3)
    with pytest.raises(RuntimeError, match=r"model: expected ONNX Runtime's outputs within 0.0001 of torch's, got 0"):
        mfac.export_onnx(model, inputs, path)
    assert not any(tmp_path.iterdir())  # a file that is not the model is not left behind
    nan = nn.Linear(4, 4)
    nan.bias.data[1] = torch.nan
    with pytest.raises(ValueError, match="model: expected finite weights, got NaN or infinity in bias"):
        mfac.export_onnx(nan, inputs, path)

    class Odd(nn.Module):
        def forward(self, x):
            raise TypeError("no graph of this\nand more")

    with pytest.raises(RuntimeError, match=r"model: expected one that torch.onnx exports, got "):
        mfac.export_onnx(Odd(), inputs, path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"onnxruntime is not installed; .*pip install 'mfac-pruning\[onnx\]'"):
        mfac.export_onnx(model, inputs, path)
    assert mfac.export_onnx(model, inputs, path, check=False).error is None


@pytest.mark.parametrize("fill", [-1e9, -torch.inf, torch.nan])
def test_masked_outputs_do_not_hide_a_difference(tmp_path, fill):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return self.fc(x).masked_fill(torch.arange(8) < 3, fill), self.fc(x) * 1e6

    model, x, path = Masked(), torch.randn(4, 8), tmp_path / "m.onnx"
    assert mfac.export_onnx(model, x, path).error < 1e-5
    model.fc.bias.data += 0.1
    assert _difference(pytest.importorskip("onnxruntime"), model, (x,), path) > 1e-2


def test_the_formats_of_the_command(tmp_path, capsys):
    model = trained(MobileNetV1(10, 0.25, 1))
    with torch.no_grad():
        model.classifier.fc.weight.mul_(torch.ones(10, 1)).masked_fill_(torch.rand(10, 1) < 0.5, -0.0)
    torch.save(model.state_dict(), tmp_path / "m.pt")
    command = ["export", str(tmp_path / "m.pt"), "--width", "0.25", "--output", str(tmp_path / "x")]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "BatchNorm folded, within " in text and "not faster" in text and "% of dense; mfac.load_compressed" in text
    names = ["model.compressed.safetensors", "model.onnx", "model.pt", "model.safetensors", "network.json"]
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == names
    compressed = mfac.load_compressed(tmp_path / "x" / names[0])
    plain = load_file(tmp_path / "x" / "model.safetensors")
    for key, value in model.state_dict().items():
        assert torch.equal(compressed[key], value) and torch.equal(plain[key], value)
    assert not bool((compressed["classifier.fc.weight"].signbit() & (compressed["classifier.fc.weight"] == 0)).any())
    for name in names[:-1]:
        assert main(["verify", str(tmp_path / "x" / name), "--zeros-of", str(tmp_path / "m.pt")]) == 0
    assert main([*command[:-1], str(tmp_path / "y"), "--format", "compressed"]) == 0
    assert [path.name for path in (tmp_path / "y").iterdir()] == names[:1]
    description = mfac.export.compressed.CompressedFile(tmp_path / "y" / names[0]).metadata["network"]
    assert json.loads(description)["width"] == 0.25
    capsys.readouterr()
    assert main([*command, "--format", "tflite"]) == 2
    assert "format: expected one of pt, safetensors, compressed, onnx, got 'tflite'" in capsys.readouterr().err


def test_without_the_packages(tmp_path, monkeypatch, capsys):
    torch.save(MobileNetV1(10, 0.1, 1).state_dict(), tmp_path / "m.pt")
    command = ["export", str(tmp_path / "m.pt"), "--width", "0.1", "--output", str(tmp_path / "x")]
    monkeypatch.setattr("mfac.tutorial.export.find_spec", lambda package: None if package == "onnxscript" else 1)
    assert main(command) == 0
    assert "no ONNX file: onnxscript is not installed; install it with: pip install 'mfac-pruning[onnx]'" in (
        capsys.readouterr().out
    )
    assert main([*command, "--format", "onnx"]) == 1
    monkeypatch.setitem(sys.modules, "onnx", None)
    (tmp_path / "m.onnx").touch()
    assert main(["verify", str(tmp_path / "m.onnx")]) == 2  # 1 would be an answer
    assert capsys.readouterr().err.count("install it with: pip install 'mfac-pruning[onnx]'") == 2


def test_damaged_files(tmp_path):
    mfac.export_onnx(nn.Linear(64, 64), torch.randn(2, 64), tmp_path / "m.onnx")
    whole = (tmp_path / "m.onnx").read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2]):
        (tmp_path / "m.onnx").write_bytes(content)
        with pytest.raises(ValueError, match="path: expected an ONNX file, got "):
            mfac.verify(tmp_path / "m.onnx")
