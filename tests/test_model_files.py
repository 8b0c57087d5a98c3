"""Model files of the program: what they say of their network, and what reads them."""

import json

import pytest
import torch
from program import interrupt_in, write_images

from mfac.cli.main import main
from mfac.tutorial.data import load_data
from mfac.tutorial.files import description
from mfac.tutorial.loop import evaluate
from mfac.tutorial.models import MobileNetV1

pytestmark = pytest.mark.usefixtures("one_thread")


def test_eval_and_export(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mfac.tutorial.inspect.measure", lambda model, batches: (1.0, 50.0, 90.0))
    model = MobileNetV1(10, 0.25, 1)
    with torch.no_grad():
        model.sections[4][1].point.conv.weight[:, ::2] = 0
    torch.save(model.state_dict(), tmp_path / "m.pt")
    assert main(["eval", str(tmp_path / "m.pt"), "--width", "0.25"]) == 0
    text = capsys.readouterr().out
    assert "sections.4.1.point.conv.weight: sparsity 50.00 %" in text and "top-1 50.00 %" in text
    assert main(["export", str(tmp_path / "m.pt"), "--width", "0.25", "--output", str(tmp_path / "x")]) == 0
    again = torch.load(tmp_path / "x" / "model.pt", weights_only=True)
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())
    assert "not faster" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "none.pt")]) == 2


@pytest.mark.parametrize("one_shot", [[], ["--one-shot"]])
def test_a_model_file_says_which_network_it_is(tmp_path, images, capsys, one_shot):
    folder, command = images
    assert main([*command, *one_shot]) == 0
    path = tmp_path / "runs" / "r" / "model.pt"
    assert main(["export", str(path), "--output", str(tmp_path / "x"), "--format", "pt"]) == 0
    network = json.loads((tmp_path / "x" / "network.json").read_text())
    described = {"arch_key": "mobilenet", "num_classes": 3, "width": 0.2, "stem_stride": 2, "relu6": False}
    described |= {"image_size": 66, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    assert network == described
    model = MobileNetV1(3, network["width"], network["stem_stride"], network["relu6"])
    model.load_state_dict(torch.load(tmp_path / "x" / "model.pt", weights_only=True))
    capsys.readouterr()
    assert main(["eval", str(path), "--dataset-path", str(folder)]) == 0
    data = load_data("imagefolder", folder, image_size=66, train_batch_size=1)
    loss, top1, _ = evaluate(model, data.validation)
    assert f"loss {loss:.4f}, top-1 {top1:.2f} %" in capsys.readouterr().out
    write_images(tmp_path / "four", "abcd")
    for options, error in [
        (f"--dataset-path {folder} --width 0.25", f"width: expected 0.2, that of the network in {path}, got 0.25"),
        (f"--dataset-path {folder} --image-size 64", "image_size: expected 66, that of the network in "),
        (f"--dataset-path {folder} --arch-key no.such:net", "arch_key: expected mobilenet, that of the network in "),
        ("--dataset digits", f"image_size: expected 66, that of the network in {path}, got 32, that of the digits"),
        ("", "dataset_path: expected a folder with train/<class>/ and val/<class>/ for the dataset imagefolder"),
        (f"--dataset-path {tmp_path / 'four'}", f"dataset: expected images of 3 classes, those of {path}, got 4 in "),
    ]:
        assert main(["eval", str(path), *options.split()]) == 2
        assert capsys.readouterr().err.startswith(f"mfac: error: {error}")
    state = torch.load(path, weights_only=True)
    torch.save({"model": state["model"]}, path)  # without its description: the options say it
    assert main(["eval", str(path), "--dataset-path", str(folder)]) == 2
    assert "(another width or number of classes?)" in capsys.readouterr().err
    options = f"--width 0.2 --image-size 66 --dataset-path {folder}".split()
    assert main(["eval", str(path), *options]) == 0
    assert f"loss {loss:.4f}, top-1 {top1:.2f} %" in capsys.readouterr().out


def test_an_older_file_is_read_by_its_options(tmp_path, images, monkeypatch, capsys):
    """Its network says only mean, std and relu6: without options, all commands take the stride and size of before."""
    folder, command = images
    command[command.index("66")] = "64"
    with monkeypatch.context() as patch:
        interrupt_in(patch, 1)
        assert main(command) == 130
    path = tmp_path / "runs" / "r" / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    described = state["network"]
    state["network"] = {name: described[name] for name in ("mean", "std", "relu6")}
    state["settings"] |= {name: described[name] for name in ("arch_key", "width", "dataset", "image_size")}
    torch.save(state, path)
    assert main(["export", str(path), "--output", str(tmp_path / "x"), "--format", "pt"]) == 0
    network = json.loads((tmp_path / "x" / "network.json").read_text())
    assert (network["width"], network["stem_stride"], network["image_size"]) == (0.2, 1, 64)
    assert main(["eval", str(path), "--dataset-path", str(folder)]) == 0
    start = f"train --recipe-path {tmp_path / 'r.yaml'} --save-dir {tmp_path / 'runs'} --dataset-path {folder} --resume"
    start += " --device cpu --train-batch-size 12"
    assert main([*start.split(), "--image-size", "224"]) == 2
    assert f"image_size: expected 64, that of the network in {path}, got 224" in capsys.readouterr().err
    assert main(start.split()) == 0
    assert torch.load(path, weights_only=True)["network"] == described
    state["network"], state["settings"] = {}, {"arch_key": "mobilenet", "dataset": "digits", "image_size": 224}
    digits = {"arch_key": "mobilenet", "dataset": "digits", "image_size": 32, "stem_stride": 1}
    assert description(state, "checkpoint_path", path) == digits


def test_what_export_writes_is_read_with_its_description(tmp_path, images, capsys):
    folder, command = images
    network = {"arch_key": "mobilenet", "num_classes": 3, "width": 0.2, "stem_stride": 1, "relu6": True}
    network |= {"image_size": 66, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    path, exported = tmp_path / "m.pt", tmp_path / "x" / "model.pt"
    torch.save({"model": MobileNetV1(3, 0.2, 1, True).state_dict(), "network": network}, path)
    assert (
        main(["export", str(path), "--output", str(exported.parent), *"--format pt --format compressed".split()]) == 0
    )
    packed = exported.with_name("model.compressed.safetensors")
    capsys.readouterr()
    assert main(["export", str(path), "--output", str(exported.parent), "--format", "pt"]) == 0
    assert "also holds model.compressed.safetensors, which this export does not write" in capsys.readouterr().err
    losses = []
    for file in (path, exported, packed):
        assert main(["eval", str(file), "--dataset-path", str(folder)]) == 0
        losses.append(capsys.readouterr().out)
    assert losses[0] == losses[1] == losses[2]
    beside = exported.with_name("network.json")
    beside.rename(tmp_path / "away.json")  # a safetensors file holds the description itself
    assert main(["export", str(packed), "--output", str(tmp_path / "y"), "--format", "pt"]) == 0
    (tmp_path / "away.json").rename(beside)
    assert json.loads((tmp_path / "y" / "network.json").read_text()) == network
    command[command.index("False")] = str(exported)
    assert main([*command, "--one-shot"]) == 0
    trained = torch.load(tmp_path / "runs" / "r" / "model.pt", weights_only=True)["network"]
    assert (trained["stem_stride"], trained["relu6"], trained["mean"]) == (1, True, (0.1, 0.2, 0.3))
    for text in ("[]", "{", "\xff"):
        beside.write_text(text, encoding="latin-1")
        assert main(["eval", str(exported), "--dataset-path", str(folder)]) == 2
        error = f"checkpoint_path: expected a description of the network in {beside}, got "
        assert error in capsys.readouterr().err


def test_the_fields_of_a_description_are_checked(tmp_path, capsys):
    path, beside = tmp_path / "m.pt", tmp_path / "x" / "network.json"
    weights = {"fc.weight": torch.zeros(3, 2)}
    beside.parent.mkdir()
    torch.save(weights, beside.with_name("m.pt"))
    numbers = "3 numbers in [1e-06, 1e+06]"
    for field, value, wanted in [
        ("std", [0, 0, 0], numbers),
        ("std", [1, 1, float("nan")], numbers),
        ("mean", [0.5], "3 numbers in [-1e+06, 1e+06]"),
        ("mean", "abc", "3 numbers in [-1e+06, 1e+06]"),
        ("relu6", "False", "True or False"),
        ("image_size", -5, "an int >= 1"),
        ("width", "a", "a number > 0, at most 64,"),
        ("width", None, "a number > 0, at most 64,"),
        ("stem_stride", 3, "1 or 2"),
        ("num_classes", "3", "an int >= 1"),
        ("num_classes", True, "an int >= 1"),
        ("dataset", "cifar", "one of digits, imagenette, imagefolder"),
        ("arch_key", 1, "the name of a network"),
    ]:
        torch.save({"model": weights, "network": {field: value}}, path)
        beside.write_text(json.dumps({field: value}))
        for file, said_in in ((path, path), (beside.with_name("m.pt"), beside)):
            assert main(["eval", str(file)]) == 2
            error = f"checkpoint_path: expected {wanted} as {field} of the network in {said_in}, got {value!r}"
            assert error in capsys.readouterr().err
    other = {"arch_key": "net", "width": None, "stem_stride": None}
    assert description({"network": other}, "checkpoint_path", path) == other


def test_weights_are_trained_on_as_the_network_that_they_are_of(tmp_path, images, capsys):
    """Without options as in the file; at another image size with the same stride."""
    folder, command = images
    assert main([*command, "--model-tag", "dense"]) == 0
    dense = str(tmp_path / "runs" / "dense" / "model.pt")
    start = f"train --recipe-path {tmp_path / 'r.yaml'} --save-dir {tmp_path / 'runs'} --pretrained {dense} "
    start = f"{start} --device cpu --dataset-path {folder} --train-batch-size 24".split()
    for tag, options, size in (("same", [], 66), ("smaller", ["--image-size", "32"], 32)):
        assert main([*start, "--model-tag", tag, *options]) == 0
        network = torch.load(tmp_path / "runs" / tag / "model.pt", weights_only=True)["network"]
        assert (network["width"], network["stem_stride"], network["image_size"]) == (0.2, 2, size)
        assert network["dataset"] == "imagefolder"
    assert main([*start, "--width", "0.25"]) == 2
    assert f"width: expected 0.2, that of the network in {dense}, got 0.25" in capsys.readouterr().err


def test_files_without_usable_weights(tmp_path, capsys):
    state = MobileNetV1(10, 0.35, 1).state_dict()
    state["input.conv.weight"][0] = torch.nan
    torch.save(state, tmp_path / "nan.pt")
    torch.save({}, tmp_path / "dict.pt")
    torch.save([1], tmp_path / "list.pt")
    finite = "checkpoint_path: expected finite weights, got NaN or infinity in input.conv.weight"
    for name, error in (("nan", finite), *((name, "expected a model of `mfac train`") for name in ("dict", "list"))):
        for command in ("eval", "export"):
            assert main([command, str(tmp_path / f"{name}.pt")]) == 2
            assert error in capsys.readouterr().err
    torch.save(MobileNetV1(10, 0.35, 1).state_dict(), tmp_path / "m.pt")
    assert main(["export", str(tmp_path / "m.pt"), "--output", str(tmp_path / "m.pt" / "x")]) == 2
    assert "output: expected a folder that can be written to, got " in capsys.readouterr().err
