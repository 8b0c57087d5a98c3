"""The networks of the program: names of other packages, functions, and the weights of timm's MobileNet."""

import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mfac.cli.main import main
from mfac.tutorial.models import MobileNetV1, build_model, mobilenet_from_timm

pytestmark = pytest.mark.usefixtures("one_thread")


def small(num_classes):
    return nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(512, num_classes))


class TimmLike(nn.Module):
    """MobileNetV1 under timm's names and with its activation, written independently of ours."""

    def __init__(self, num_classes=10):
        super().__init__()
        self.conv_stem, self.bn1 = nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32)
        inputs, sections = 32, []
        for section, (count, outputs) in enumerate([(1, 64), (2, 128), (2, 256), (6, 512), (2, 1024)]):
            blocks = []
            for block in range(count):
                stride = 2 if section and not block else 1
                layers = {
                    "conv_dw": nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False),
                    "bn1": nn.BatchNorm2d(inputs),
                    "conv_pw": nn.Conv2d(inputs, outputs, 1, bias=False),
                    "bn2": nn.BatchNorm2d(outputs),
                }
                blocks.append(nn.ModuleDict(layers))
                inputs = outputs
            sections.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*sections)
        self.classifier = nn.Linear(1024, num_classes)

    def forward(self, x):
        x = nn.functional.relu6(self.bn1(self.conv_stem(x)))
        for section in self.blocks:
            for block in section:
                x = nn.functional.relu6(block["bn1"](block["conv_dw"](x)))
                x = nn.functional.relu6(block["bn2"](block["conv_pw"](x)))
        return self.classifier(x.mean((2, 3)))


def timm_model():
    """timm's own network if it is installed, else the stand-in."""
    try:
        import timm
    except Exception:  # also what a torchvision for another torch raises
        return TimmLike()
    return timm.create_model("mobilenetv1_100", num_classes=10)


def test_weights_of_timm_give_the_same_outputs():
    torch.manual_seed(0)
    theirs = timm_model().train()
    with torch.no_grad():
        for module in theirs.modules():
            if isinstance(module, nn.BatchNorm2d):  # activations on both sides of 6, statistics other than 0 and 1
                module.weight.uniform_(0.5, 8)
                module.bias.normal_()
        theirs(torch.randn(8, 3, 96, 96))
    ours = MobileNetV1(10, relu6=True).eval()
    ours.load_state_dict(mobilenet_from_timm(theirs.state_dict()))
    x = torch.randn(4, 3, 96, 96)
    with torch.no_grad():
        expected, found = theirs.eval()(x), ours(x)
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    with pytest.raises(ValueError, match=r"state: expected the names of timm's mobilenetv1_100, got 'fc.weight'"):
        mobilenet_from_timm({"fc.weight": torch.zeros(1)})


def test_pretrained_mobilenet(monkeypatch):
    """The classifier for other classes is new, and the images are normalised as timm's."""
    source = TimmLike(num_classes=1000)
    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=lambda name, pretrained: source))
    built = build_model("mobilenet", 10, pretrained=True)
    described = {"arch_key": "mobilenet", "num_classes": 10, "width": 1, "stem_stride": 2, "relu6": True}
    described |= {"image_size": 224, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    assert asdict(built.spec) == described
    assert torch.equal(built.model.input.conv.weight, source.conv_stem.weight)
    assert built.model.classifier.fc.weight.shape == (10, 1024)
    again = build_model("mobilenet", 10, image_size=32, described=described)
    assert again.model.sections[0][0].depth.relu6 and again.model.input.conv.stride == (2, 2)
    assert asdict(again.spec) == {**described, "image_size": 32}
    with pytest.raises(ValueError, match="pretrained: expected width 1 and images of more than 64 x 64"):
        build_model("mobilenet", 10, width=0.5, pretrained=True)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="timm, which has the pretrained weights, is not installed: pip install timm"):
        build_model("mobilenet", 10, pretrained=True)


def test_names_of_other_packages(monkeypatch):
    def get_model(name, num_classes=1000, weights=None):
        return small(num_classes)

    vision = SimpleNamespace(list_models=lambda: ["net"], get_model=get_model)
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(models=vision))
    monkeypatch.setitem(sys.modules, "timm", None)
    assert isinstance(build_model("net", 10).model, nn.Sequential)
    assert build_model("net", 10, pretrained=True).model[3].weight.shape == (10, 512)
    with pytest.raises(ValueError, match=r"arch_key: .* torchvision or timm .not installed: timm., or .*, got 'other'"):
        build_model("other", 10)
    model = small(10)
    model.pretrained_cfg = {"mean": (0.1,) * 3, "std": (0.2,) * 3}
    timm = SimpleNamespace(is_model=lambda name: name == "other", create_model=lambda name, **options: model)
    monkeypatch.setitem(sys.modules, "timm", timm)
    assert build_model("other", 10).spec.mean == (0.1,) * 3
    with pytest.raises(ValueError, match="arch_key: expected mobilenet, a name of torchvision or timm"):
        build_model("none", 10)


def test_a_function_of_ones_own(tmp_path, monkeypatch, capsys):
    """A whole run of the program; random weights are warned of."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_network.py").write_text(
        "from torch import nn\n\n\ndef net(num_classes):\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(512, num_classes))\n"
    )
    (tmp_path / "r.yaml").write_text(
        "modifiers:\n  - !EpochRangeModifier {end_epoch: 1}\n"
        "  - !GMPruningModifier {params: __ALL_PRUNABLE__, final_sparsity: 0.5, start_epoch: 0, end_epoch: 1}\n"
    )
    command = f"train --recipe-path {tmp_path / 'r.yaml'} --arch-key own_network:net --pretrained False --device cpu "
    command += f"--save-dir {tmp_path} --max-train-steps 2 --export"
    assert main(command.split()) == 0
    captured = capsys.readouterr()
    assert "warning: pretrained: the recipe prunes random weights" in captured.err
    assert "sparsity of 3.weight: 0.500000, asked 0.500000" in captured.out
    assert main(["eval", str(tmp_path / "r" / "model.pt"), "--arch-key", "own_network:net"]) == 0
    exported = torch.load(tmp_path / "r" / "exported" / "model.pt", weights_only=True)
    assert int((exported["3.weight"] == 0).sum()) == 2560
    assert main(["train", "--recipe-path", str(tmp_path / "r.yaml"), "--arch-key", "no.such:net"]) == 1


def test_a_file_does_not_make_the_program_import(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "evilmod.py").write_text("raise SystemExit('imported')\n")
    path = tmp_path / "m.pt"
    torch.save({"model": small(10).state_dict(), "network": {"arch_key": "evilmod:make", "num_classes": 10}}, path)
    recipe = tmp_path / "r.yaml"
    recipe.write_text("modifiers:\n  - !EpochRangeModifier {end_epoch: 1}\n")
    for command in (f"eval {path}", f"export {path}", f"train --recipe-path {recipe} --pretrained {path}"):
        assert main(command.split()) == 2
        error = "arch_key: expected --arch-key evilmod:make to be given, because a file must not make the program run"
        assert error in capsys.readouterr().err
    assert "evilmod" not in sys.modules
