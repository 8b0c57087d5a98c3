"""The program as its users see it: killed and resumed runs, comparisons, lint, eval, export, damaged images."""

import gc
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mfac
from mfac.cli.main import main
from mfac.tutorial.data import Batches, load_data
from mfac.tutorial.files import description
from mfac.tutorial.loop import evaluate
from mfac.tutorial.models import MobileNetV1

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPES = Path(__file__).parent / "recipes"
RECIPE = """
modifiers:
  - !EpochRangeModifier {end_epoch: 4}
  - !LearningRateFunctionModifier {lr_func: cosine, init_lr: 1e-3, final_lr: 0, end_epoch: 4}
  - !MFACPruningModifier
    params: ["re:sections.4.*point.conv.weight"]
    init_sparsity: 0.25
    final_sparsity: 0.9
    start_epoch: 0.5
    end_epoch: 2.5
    update_frequency: 0.5
    num_grads: 3
    recomputations: 2
    corrections: 1
    correction_batches: 2
"""
OPTIONS = "--width 0.25 --pretrained False --train-batch-size 8 --test-batch-size 360 --max-train-steps 4 --device cpu"


SHORT = """
modifiers:
  - !EpochRangeModifier {end_epoch: 2}
  - !GMPruningModifier
    params: ["re:sections.4.*point.conv.weight"]
    init_sparsity: 0.5
    final_sparsity: 0.9
    start_epoch: 0
    end_epoch: 2
    update_frequency: 1
"""


def write_images(root, classes):
    random = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 2)):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 256, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{index}.jpg")


@pytest.fixture
def images(tmp_path):
    """A folder with three classes of images, and the beginning of commands that train on it."""
    write_images(tmp_path / "data", "abc")
    (tmp_path / "r.yaml").write_text(SHORT)
    command = f"--dataset-path {tmp_path / 'data'} --image-size 66 --train-batch-size 12 "
    command += f"--width 0.2 --pretrained False --device cpu --save-dir {tmp_path / 'runs'}"
    return tmp_path / "data", f"train --recipe-path {tmp_path / 'r.yaml'} {command}".split()


def interrupt_in(monkeypatch, epoch):
    """Let Ctrl-C come in the second step of an epoch."""
    batches, counter = Batches.__iter__, itertools.count()

    def iterate(self):
        wanted = self.loader.drop_last and next(counter) == epoch
        for index, batch in enumerate(batches(self)):
            if wanted and index == 1:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(Batches, "__iter__", iterate)


def weights(path):
    return torch.load(path, weights_only=True)["model"]


@pytest.mark.parametrize("epoch", [0, 2])
def test_a_killed_run_goes_on_to_the_same_weights(tmp_path, epoch, capsys):
    """SIGKILL in the middle of an epoch, then --resume: bit for bit the weights of a run that was left alone."""
    (tmp_path / "r.yaml").write_text(RECIPE)
    command = f"train --recipe-path {tmp_path / 'r.yaml'} --save-dir {tmp_path} {OPTIONS} --model-tag"
    assert main([*command.split(), "whole"]) == 0
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    slow = (  # an hour a batch from the second batch of that epoch on
        "import itertools, sys, time\nimport mfac.tutorial.data as data\nfrom mfac.cli.main import main\n"
        "batches, counter = data.Batches.__iter__, itertools.count()\n"
        "def iterate(self):\n"
        f"    wait = self.loader.drop_last and next(counter) == {epoch}\n"
        "    for i, batch in enumerate(batches(self)):\n"
        "        time.sleep(3600 * (wait and i == 1))\n"
        "        yield batch\n"
        "data.Batches.__iter__ = iterate\nmain(sys.argv[1:])\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, "-c", slow, *command.split(), "killed"], env=environment)
    for _ in range(600):
        if checkpoint.exists() and torch.load(checkpoint, weights_only=True)["epoch"] == epoch - 1:
            break
        assert child.poll() is None
        time.sleep(0.1)
    time.sleep(0.5)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert torch.load(checkpoint, weights_only=True)["epoch"] == epoch - 1
    assert main([*command.split(), "killed", "--resume"]) == 0
    whole, resumed = weights(tmp_path / "whole" / "checkpoint.pt"), weights(checkpoint)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    capsys.readouterr()
    assert main([*command.split(), "killed", "--resume"]) == 2
    error = f"resume: expected a run that is not finished, got {checkpoint}, which has completed the recipe's 4 epochs"
    assert error in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    (tmp_path / "r.yaml").write_text(RECIPE)
    command = f"train --recipe-path {tmp_path / 'r.yaml'} --save-dir {tmp_path} {OPTIONS} --model-tag a".split()

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("mfac.tutorial.train.fit", interrupt)
    assert main(command) == 130
    assert "the same command with --resume goes on from there" in capsys.readouterr().out
    monkeypatch.undo()
    assert main([*command, "--resume"]) == 0


def test_compare(tmp_path, capsys):
    """The two recipes of the tutorial in their original spelling, on JPEGs; started again, it goes on."""
    write_images(tmp_path / "data", "ab")
    recipes = [tmp_path / "original_magnitude.md", tmp_path / "original_mfac.md"]
    for path in recipes:
        path.write_text((RECIPES / path.name).read_text().replace("num_grads: 256", "num_grads: 8"))
    command = f"compare {recipes[0]} {recipes[1]} --save-dir {tmp_path / 'out'} --dataset imagenette --dataset-path "
    command += f"{tmp_path / 'data'} --image-size 32 --train-batch-size 4 --width 0.1 --pretrained False --device cpu"
    assert main(command.split()) == 0
    text = capsys.readouterr().out
    assert "| original_magnitude " in text and "| original_mfac " in text and "96.4 %" in text
    assert (tmp_path / "out" / "comparison.txt").read_text() in text
    with Image.open(tmp_path / "out" / "comparison.png") as image:
        assert min(image.size) > 500
    record = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert len(record["runs"]) == 2 and (tmp_path / "out" / "original-mfac-0.csv").exists()
    record["runs"].pop()
    (tmp_path / "out" / "comparison.json").write_text(json.dumps(record))
    before = (tmp_path / "out" / "original-magnitude-0" / "checkpoint.pt").stat().st_mtime_ns
    assert main(command.split()) == 0
    assert (tmp_path / "out" / "original-magnitude-0" / "checkpoint.pt").stat().st_mtime_ns == before
    assert main(command.replace("--train-batch-size 4", "--train-batch-size 2").split()) == 2
    assert "save_dir: expected an empty folder, or one of a comparison with the same options" in capsys.readouterr().err
    assert main(["compare", "no.md"]) == 2


def test_an_interrupted_comparison_goes_on_with_its_run(tmp_path, images, monkeypatch, capsys, recwarn):
    _, command = images
    command = ["compare", str(tmp_path / "r.yaml"), *command[3:]]
    stale = tmp_path / "runs" / "r-0" / "checkpoint.pt"
    stale.parent.mkdir(parents=True)
    stale.touch()  # of another run of this name
    assert main([*command, "--max-train-steps=0"]) == 2  # before anything is written
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["r-0"]
    with monkeypatch.context() as patch:
        interrupt_in(patch, 1)
        assert main(command) == 130
    captured = capsys.readouterr()
    assert "after 1 epochs: the same command again goes on from there" in captured.out
    gc.collect()
    assert "ends before its last update" not in captured.err + "".join(str(w.message) for w in recwarn)
    assert main(command) == 0
    assert "going on with epoch 1" in capsys.readouterr().out
    record = json.loads((tmp_path / "runs" / "comparison.json").read_text())
    assert [measured["epoch"] for measured in record["runs"][0]["measurements"]] == [0.5, 1.0, 2.0]
    assert main([*command, "--loader-num-workers", "1"]) == 2  # other images


def test_lint(tmp_path, capsys):
    recipe = str(RECIPES / "original_mfac.md")
    assert main(["lint", recipe]) == 0
    text = capsys.readouterr().out
    assert "MFACPruningModifier" in text and "num_grads=256" in text and "names of parameters are not checked" in text
    assert main(["lint", recipe, "--arch-key", "mobilenet"]) == 0
    path = tmp_path / "wrong.md"
    path.write_text(Path(recipe).read_text().replace("sections.1.0.point", "sections.1.0.pointt"))
    assert main(["lint", str(path), "--arch-key", "mobilenet"]) == 2
    error = capsys.readouterr().err
    assert f"{path} line " in error and "did you mean 'sections.1.0.point.conv.weight'" in error
    torch.save(MobileNetV1(10, 0.1).state_dict(), tmp_path / "w.pt")
    assert main(["lint", recipe, "--checkpoint-path", str(tmp_path / "w.pt")]) == 0
    assert main(["lint", str(RECIPES / "everything.yaml"), "--strict"]) == 2


def test_an_end_that_training_does_not_reach_is_said(tmp_path, capsys):
    path = tmp_path / "late.yaml"
    path.write_text(RECIPE.replace("end_epoch: 2.5", "end_epoch: 9"))
    warnings.simplefilter("always")
    warning = f"{path} line 5: !MFACPruningModifier: end_epoch: expected at most the 4 epochs of training, which will "
    warning += "end at a sparsity of 76.8 %, not 90.0 %, got 9"
    assert main(["lint", str(path)]) == 0
    assert capsys.readouterr().err == f"warning: {warning}\n"
    assert main(["lint", str(path), "--strict"]) == 2
    assert capsys.readouterr().err == f"mfac: error: {warning}\n"
    assert main(f"plan --recipe-path {path} --save-dir {tmp_path} {OPTIONS}".split()) == 0
    assert capsys.readouterr().err.count(warning) == 1


def test_training_needs_a_length(tmp_path, capsys):
    path = tmp_path / "constant.yaml"
    path.write_text("modifiers:\n  - !ConstantPruningModifier {params: __ALL_PRUNABLE__}\n")
    assert main(["lint", str(path), "--arch-key", "mobilenet"]) == 0
    assert "1 modifiers, no length of training" in capsys.readouterr().out
    for command in ("train", "plan"):
        assert main(f"{command} --recipe-path {path} --save-dir {tmp_path} {OPTIONS}".split()) == 2
        assert "recipe: expected a length of training, !EpochRangeModifier" in capsys.readouterr().err
    assert not (tmp_path / "constant").exists()


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


def test_only_what_is_as_before_is_resumed(tmp_path, images, monkeypatch, capsys):
    """And the time goes on."""
    _, command = images
    with monkeypatch.context() as patch:
        interrupt_in(patch, 1)
        assert main(command) == 130
    path = tmp_path / "runs" / "r" / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    state["measurements"][-1]["seconds"] = 1000.0
    torch.save(state, path)
    for option, error in [
        ("--loader-num-workers=1", "resume: expected --loader-num-workers 0 as before, got 1"),
        ("--dataset=imagenette", f"dataset: expected imagefolder, that of the network in {path}, got imagenette"),
    ]:
        assert main([*command, "--resume", option]) == 2
        assert error in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    measured = torch.load(path, weights_only=True)["measurements"]
    assert measured[:2] == state["measurements"] and 1000 < measured[2]["seconds"] < 2000
    assert main([*command, "--model-tag", "shot", "--one-shot"]) == 0
    assert main([*command, "--model-tag", "shot", "--resume"]) == 2
    assert "resume: expected " in capsys.readouterr().err


def test_a_run_without_an_epoch_does_not_keep_its_name(images, monkeypatch, capsys):
    """Nothing is lost where the first epoch was interrupted, or met a damaged image."""
    folder, command = images
    with monkeypatch.context() as patch:
        interrupt_in(patch, 0)
        assert main(command) == 130
    image = folder / "train" / "a" / "0.jpg"
    whole = image.read_bytes()
    image.write_bytes(whole[:100])
    assert main(command) == 2
    assert "dataset_path: expected an image, got " in capsys.readouterr().err
    image.write_bytes(whole)
    assert main(command) == 0
    assert main(command) == 2
    assert "model_tag: expected the name of a new run, got 'r'" in capsys.readouterr().err


def test_a_recipe_that_does_not_fit_replaces_nothing(tmp_path, images):
    _, command = images
    assert main(command) == 0
    before = (tmp_path / "runs" / "r" / "model.pt").read_bytes()
    (tmp_path / "r.yaml").write_text(SHORT.replace("sections.4", "sections.5"))
    assert main([*command, "--overwrite"]) == 2
    assert (tmp_path / "runs" / "r" / "model.pt").read_bytes() == before


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named(tmp_path, workers):
    for part in ("train", "val"):
        (tmp_path / part / "a").mkdir(parents=True)
        (tmp_path / part / ".cache").mkdir()
        Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / part / "a" / "0.webp")
    whole = (tmp_path / "train" / "a" / "0.webp").read_bytes()
    data = load_data("imagefolder", tmp_path, image_size=32, train_batch_size=1, workers=workers)
    assert len(list(data.train)) == 1 and data.num_classes == 1
    (tmp_path / "train" / "a" / "0.webp").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"dataset_path: expected an image, got .*0.webp, which cannot be read"):
        list(data.train)
    (tmp_path / "val" / "b").mkdir()
    with pytest.raises(ValueError, match=r"dataset_path: expected images .*val/b/\*.jpeg, .*, got none"):
        load_data("imagefolder", tmp_path, image_size=32, train_batch_size=1)


def test_plan(tmp_path, capsys, monkeypatch):
    (tmp_path / "r.yaml").write_text(RECIPE)
    command = f"plan --recipe-path {tmp_path / 'r.yaml'} --save-dir {tmp_path} {OPTIONS}".split()
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "5 updates of 2 parameters with 98,304 weights" in text
    assert "epoch 0.5: to 25.00 % in 2 recomputations, 4 gradients (0.00 GiB), about" in text
    assert "sections.4.1.point.conv.weight: 90.00 %" in text
    assert not (tmp_path / "r").exists()
    monkeypatch.setattr("mfac.gradients.memory.free_bytes", lambda storage: 1000)
    assert main(command) == 1
    assert "mfac: error: grads: expected 0.00" in capsys.readouterr().err


def test_plan_of_a_pruner():
    pruner = mfac.Pruner(
        torch.nn.Linear(16, 4), [()] * 4, torch.nn.functional.mse_loss, sparsity=0.9, end=2, schedule="linear",
        num_grads={0.0: 16, 0.4: 32}, recomputations="auto", initial_sparsity=0.1, start=1,
    )  # fmt: skip
    updates = [(u.time, u.recomputations, u.num_grads, u.gradients, u.nbytes) for u in pruner.plan()]
    assert updates == [(1, 1, 16, 16, 16 * 64 * 4), (2, 6, 16, 16 + 5 * 2, 16 * 64 * 4)]


def test_a_plan_is_what_happens():
    """Also with final corrections, and where the mask is rounded to below a key of num_grads."""
    torch.manual_seed(0)
    model = torch.nn.Linear(16, 16, bias=False)
    data = [(torch.randn(8, 16), torch.randn(8, 16)) for _ in range(4)]
    pruner = mfac.Pruner(
        model, data, torch.nn.functional.mse_loss, sparsity=0.9, initial_sparsity=0.7, start=1, end=2, progress=False,
        num_grads={0.0: 4, 0.7: 16}, recomputations=2, corrections=1, final_corrections=3,
    )  # fmt: skip
    planned = [(update.num_grads, update.gradients) for update in pruner.plan()]
    for _ in range(2):
        pruner.step()
    made = [sum(step.new_gradients for step in result.steps) for _, result in pruner.results]
    assert [gradients for _, gradients in planned] == made and [m for m, _ in planned] == [4, 16]


def test_another_recipe_is_not_resumed(tmp_path, capsys):
    (tmp_path / "r.yaml").write_text("rate: 0.1\n" + RECIPE.replace("init_lr: 1e-3", "init_lr: eval(rate)"))
    command = f"train --recipe-path {tmp_path / 'r.yaml'} --save-dir {tmp_path} --logs-dir {tmp_path} {OPTIONS}".split()
    assert main([*command, "--recipe-args", "rate=0.001"]) == 0
    assert main([*command, "--resume"]) == 2
    assert "resume: expected the recipe and the --recipe-args of before" in capsys.readouterr().err
    assert main([*command, "--resume", "--one-shot"]) == 2
    assert len((tmp_path / "r.csv").read_text().splitlines()) == 1 + 7
