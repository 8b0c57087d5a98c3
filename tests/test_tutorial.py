"""The tutorial's program: network, data, training with checkpoints."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mfac.tutorial.data import Digits, ImageFolder, load_data
from mfac.tutorial.dense import load_weights
from mfac.tutorial.files import read_model
from mfac.tutorial.loop import evaluate
from mfac.tutorial.models import MobileNetV1
from mfac.tutorial.settings import TrainSettings
from mfac.tutorial.train import train

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = """
modifiers:
  - !EpochRangeModifier {end_epoch: eval(epochs)}
  - !SetLearningRateModifier {learning_rate: 0.001}
  - !MFACPruningModifier
    params: ["re:sections.4.*point.conv.weight"]
    init_sparsity: 0.5
    final_sparsity: 0.9
    start_epoch: 1
    end_epoch: 2
    num_grads: 3
    recomputations: 2
epochs: 3
"""
PRUNED = [f"sections.4.{block}.point.conv.weight" for block in (0, 1)]


@pytest.fixture
def settings(tmp_path):
    """Options for a run of seconds: a narrow network, two steps per epoch."""
    (tmp_path / "small.yaml").write_text(RECIPE)
    return {
        "recipe_path": str(tmp_path / "small.yaml"),
        "width": 0.25,
        "pretrained": "False",
        "train_batch_size": 8,
        "test_batch_size": 360,
        "max_train_steps": 2,
        "device": "cpu",
        "save_dir": str(tmp_path / "runs"),
        "logs_dir": str(tmp_path / "logs"),
        "model_tag": "tag",
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of 6 training and 2 validation images, of several modes and sizes."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 2)):
        for name in ("b", "a"):
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                shape = (40 + index, 70) if index % 2 else (70, 40 + index, 3)
                suffix = ("jpg", "PNG", "jpeg")[index % 3]
                Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(
                    root / part / name / f"{index}.{suffix}"
                )
    return root


def sparsity(state):
    weights = [state[name] for name in PRUNED]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def test_network_is_mobilenet_v1():
    model = MobileNetV1()
    assert sum(p.numel() for p in model.parameters()) == 4_231_976  # the published 4.2 million
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert [len(section) for section in model.sections] == [1, 2, 2, 6, 2]
    assert shapes["input.conv.weight"] == (32, 3, 3, 3)
    assert shapes["input.bn.weight"] == (32,)
    assert shapes["sections.0.0.depth.conv.weight"] == (32, 1, 3, 3)
    assert shapes["sections.0.0.point.conv.weight"] == (64, 32, 1, 1)
    assert shapes["sections.1.0.point.conv.weight"] == (128, 64, 1, 1)
    assert shapes["sections.3.5.point.bn.bias"] == (512,)
    assert shapes["sections.4.1.point.conv.weight"] == (1024, 1024, 1, 1)
    assert shapes["classifier.fc.weight"] == (1000, 1024)
    strides = [block.depth.conv.stride[0] for section in model.sections for block in section]
    assert strides == [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1]


def test_network_options():
    model = MobileNetV1(num_classes=7, width=0.35, stem_stride=1).eval()
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert model.sections[4][1].point.conv.weight.shape == (360, 360, 1, 1)
    for options, message in [
        ({"width": 0}, "width: expected > 0, got 0"),
        ({"num_classes": 0}, "num_classes: expected an int >= 1, got 0"),
        ({"stem_stride": 3}, "stem_stride: expected an int 1 to 2, got 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            MobileNetV1(**options)


def test_digits():
    data = load_data(train_batch_size=32)
    images, targets = next(iter(data.train))
    assert images.shape == (32, 3, 32, 32)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert targets.dtype == torch.int64
    assert (len(Digits(True)), len(Digits(False)), len(data.train)) == (1437, 360, 44)
    assert torch.equal(Digits(False)[5][0], Digits(False)[5][0])
    seen = []
    for epoch, seed in ((3, 0), (3, 0), (4, 0), (3, 1)):
        data = load_data(train_batch_size=32, seed=seed)
        data.start_epoch(epoch)
        seen.append(next(iter(data.train))[0])
    assert torch.equal(seen[0], seen[1])  # the same seed and epoch, the same batches
    assert not torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[3])
    assert not torch.equal(next(iter(data.gradients))[0], images)


def test_image_folder(folder):
    for workers in (0, 1):
        data = load_data("imagefolder", folder, image_size=32, train_batch_size=5, test_batch_size=3, workers=workers)
        batches = list(data.train)
        assert [len(targets) for _, targets in batches] == [5, 5]  # the rest is dropped
        assert batches[0][0].shape == (5, 3, 32, 32)
        assert torch.cat([targets for _, targets in data.validation]).tolist() == [0, 0, 1, 1]
    assert data.num_classes == 2
    validation = ImageFolder(folder / "val", 24, train=False)
    assert torch.equal(validation[0][0], validation[0][0])
    assert -3 < float(validation[0][0].min()) < float(validation[0][0].max()) < 3


@pytest.mark.parametrize(
    ("module", "dataset", "message"),
    [("PIL", "imagefolder", r"pillow.*pip install 'mfac-pruning\[tutorial\]'"),
     ("sklearn.datasets", "digits", r"scikit-learn.*pip install 'mfac-pruning\[demo\]'")],
)  # fmt: skip
def test_missing_packages(folder, monkeypatch, module, dataset, message):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=message):
        load_data(dataset, folder)


def test_data_errors(folder, tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    for arguments, message in [
        (("cifar",), "dataset: expected one of digits, imagenette, imagefolder, got 'cifar'"),
        (("imagenette",), "dataset_path: expected a folder .* for the dataset imagenette, got None"),
        (
            ("imagenette", "no/where"),
            "dataset_path: expected a folder .*, got no folder no/where/train",
        ),
        (("imagefolder", tmp_path), r"dataset_path: expected images .*/train/a/\*.jpeg, .*, got none"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_data(*arguments)
    with pytest.raises(ValueError, match=r"train_batch_size: expected at most .* images, 12, got 32"):
        load_data("imagefolder", folder)


def test_evaluate_restores_the_modes(unchanged):
    model = MobileNetV1(10, 0.25)
    model.sections[4].eval()
    good, bad = torch.zeros(2, 3, 32, 32), torch.zeros(2, 1, 32, 32)
    with unchanged(model), pytest.raises(RuntimeError, match="channels"):
        evaluate(model, [(good, torch.zeros(2, dtype=torch.int64)), (bad, torch.zeros(2, dtype=torch.int64))])


def test_train_writes_results_and_resumes_with_masks(settings, tmp_path):
    measurements = train(TrainSettings(**settings))
    assert [round(m.sparsity, 2) for m in measurements] == [0.5, 0.9, 0.9]
    run = tmp_path / "runs" / "tag"
    lines = [line.split(": ") for line in (run / "model.txt").read_text().splitlines()]
    assert [key for key, _ in lines[:5]] == ["epoch", "__loss__", "top1acc", "top5acc", "sparsity"]
    assert [line[0] for line in lines[5:]] == [f"sparsity of {name}" for name in PRUNED]
    for _, text in lines[5:]:
        reached, asked = text.split(", asked ")
        assert abs(float(reached) - 0.9) < 1e-3 and asked == "0.900000"
    assert (lines[0][1], float(lines[2][1])) == ("2", measurements[-1].top1)
    state = torch.load(run / "model.pt", weights_only=True)
    assert round(sparsity(state["model"]), 3) == 0.9
    rows = list(csv.DictReader((tmp_path / "logs" / "tag.csv").open()))
    assert [float(row["epoch"]) for row in rows] == [1, 2, 3]
    assert float(rows[0]["learning_rate"]) == 0.001

    with pytest.raises(ValueError, match="which has completed the recipe's 3 epochs"):
        train(TrainSettings(**settings, checkpoint_path=str(run / "checkpoint.pt")))
    longer = train(TrainSettings(**settings, checkpoint_path=str(run / "checkpoint.pt"), recipe_args="epochs=4"))
    assert [(m.epoch, round(m.sparsity, 2), m.pruned) for m in longer[3:]] == [(4, 0.9, False)]
    assert longer[:3] == measurements  # those of the run that it goes on
    after = torch.load(run / "checkpoint.pt", weights_only=True)
    assert after["epoch"] == 3
    for name in PRUNED:
        zero = state["model"][name] == 0
        assert torch.equal(after["model"][name] == 0, zero)
        assert not torch.equal(after["model"][name], state["model"][name])  # it has trained
    assert len(list(csv.DictReader((tmp_path / "logs" / "tag.csv").open()))) == 4


def test_one_shot_prunes_the_model_of_a_checkpoint(settings, tmp_path):
    train(TrainSettings(**{**settings, "recipe_args": "epochs=1"}))  # before the first pruning step
    checkpoint = str(tmp_path / "runs" / "tag" / "checkpoint.pt")
    options = {**settings, "seed": 1, "model_tag": "pruned", "one_shot": True}
    (measured,) = train(TrainSettings(**options, checkpoint_path=checkpoint))
    assert round(measured.sparsity, 2) == 0.9
    trained = torch.load(checkpoint, weights_only=True)["model"]
    pruned = torch.load(tmp_path / "runs" / "pruned" / "model.pt", weights_only=True)["model"]
    assert torch.equal(pruned["input.conv.weight"], trained["input.conv.weight"])
    options["overwrite"] = True
    for message, change in [("checkpoint_path: expected an existing file, got no.pt", {"checkpoint_path": "no.pt"}),
                            (f"width: expected 0.25, that of the network in {checkpoint}, got 0.5",
                             {"checkpoint_path": checkpoint, "width": 0.5})]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            train(TrainSettings(**{**options, **change}))


def test_resume_under_another_tag_always_leaves_a_model(settings, tmp_path):
    train(TrainSettings(**{**settings, "recipe_args": "epochs=2"}))
    checkpoint = tmp_path / "runs" / "tag" / "checkpoint.pt"
    state = torch.load(checkpoint, weights_only=True)
    torch.save({**state, "best": 101.0}, checkpoint)  # no epoch to come is better
    train(TrainSettings(**{**settings, "model_tag": "other"}, checkpoint_path=str(checkpoint)))
    folder = tmp_path / "runs" / "other"
    assert (folder / "model.txt").read_text().startswith("epoch: 2\n")
    assert torch.load(folder / "model.pt", weights_only=True)["epoch"] == 2


@pytest.mark.parametrize("killed_before", ["model.pt", "model.txt", "checkpoint.pt"])
def test_a_run_killed_between_its_last_files_repeats_the_epoch(settings, tmp_path, monkeypatch, killed_before):
    train(TrainSettings(**settings, seed=1))
    whole = torch.load(tmp_path / "runs" / "tag" / "model.pt", weights_only=True)
    replace_file = Path.replace

    def replace(self, target):
        if target.name == killed_before and (
            killed_before != "checkpoint.pt" or (target.parent / "model.txt").exists()
        ):
            raise KeyboardInterrupt
        return replace_file(self, target)

    options = {**settings, "seed": 1, "model_tag": "killed"}
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            train(TrainSettings(**options))
    train(TrainSettings(**options, resume=True))
    run = tmp_path / "runs" / "killed"
    model, checkpoint = (torch.load(run / name, weights_only=True) for name in ("model.pt", "checkpoint.pt"))
    assert (model["epoch"], checkpoint["epoch"]) == (2, 2)
    assert all(torch.equal(model["model"][name], value) for name, value in whole["model"].items())
    assert (run / "model.txt").read_bytes() == (tmp_path / "runs" / "tag" / "model.txt").read_bytes()


def test_resume_in_the_middle_prunes_the_rest(settings, tmp_path):
    train(TrainSettings(**{**settings, "recipe_args": "epochs=1"}))
    checkpoint = str(tmp_path / "runs" / "tag" / "checkpoint.pt")
    measurements = train(TrainSettings(**settings, checkpoint_path=checkpoint))
    assert [(m.epoch, round(m.sparsity, 2)) for m in measurements] == [(1, 0.5), (2, 0.9), (3, 0.9)]


def test_best_epoch_and_fractional_length(settings, tmp_path):
    train(TrainSettings(**{**settings, "recipe_args": "epochs=1.5", "save_best_after": 9}))
    text = (tmp_path / "runs" / "tag" / "model.txt").read_text()
    assert text.startswith("epoch: 1\n")  # training ended before the best counts: the last one


def test_one_shot_from_saved_weights(settings, tmp_path, capsys):
    model = MobileNetV1(1000, 0.25, 1)
    torch.save(model.state_dict(), tmp_path / "dense.pt")
    options = {**settings, "pretrained": str(tmp_path / "dense.pt"), "one_shot": True}
    (measured,) = train(TrainSettings(**options))
    assert round(measured.sparsity, 2) == 0.9
    assert "the classifier starts anew" in capsys.readouterr().out
    saved = torch.load(tmp_path / "runs" / "tag" / "model.pt", weights_only=True)["model"]
    assert round(sparsity(saved), 3) == 0.9
    assert torch.equal(saved["input.conv.weight"], model.input.conv.weight)


def test_train_on_image_folders(settings, folder):
    options = {
        **settings,
        "dataset": "imagefolder",
        "dataset_path": str(folder),
        "image_size": 32,
        "train_batch_size": 4,
    }
    measurements = train(TrainSettings(**{**options, "pretrained": None}))
    assert round(measurements[-1].sparsity, 2) == 0.9
    assert measurements[-1].top5 == 100.0  # of two classes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arch_key": "collections:nothing"}, "arch_key: expected a function 'nothing' of collections, got none"),
        ({"pretrained": "no.pt"}, "pretrained: expected an existing file, got no.pt"),
        ({"checkpoint_path": "no.pt"}, "checkpoint_path: expected an existing file, got no.pt"),
        ({"device": "abacus"}, "device: expected cpu, cuda"),
        ({"max_train_steps": 0}, "max_train_steps: expected an int >= 1, or -1 for all steps, got 0"),
        ({"max_train_steps": -5}, "max_train_steps: expected an int >= 1, or -1 for all steps, got -5"),
        ({"width": float("nan")}, "width: expected a finite number > 0, got nan"),
        ({"width": 1e300}, r"width: expected <= 64, got 1e\+300"),
        ({"seed": 10**23}, "seed: expected an int 0 to 9223372036854775807, got 1000"),
        ({"init_lr": -1.0}, "init_lr: expected >= 0, got -1.0"),
        ({"loader_num_workers": -1}, "loader_num_workers: expected an int >= 0, got -1"),
        ({"train_batch_size": 0}, "train_batch_size: expected an int >= 1, got 0"),
        ({"test_batch_size": 0}, "test_batch_size: expected an int >= 1, got 0"),
        ({"dataset_path": "FOLDER", "image_size": 0}, "image_size: expected an int >= 1, got 0"),
        ({"image_size": 64}, "image_size: expected 32 for the digits, got 64"),
        ({"dataset": "digits", "dataset_path": "FOLDER"}, "dataset_path: expected none for the digits, got "),
        ({"arch_key": "torch.nn:Identity"}, "width: expected none for another network than mobilenet, got 0.25"),
        ({"arch_key": "os.path:join"}, "arch_key: expected a function that takes num_classes, got 'os.path:join'"),
        ({"arch_key": ":join"}, "arch_key: expected package.module:function, got ':join'"),
        ({"save_dir": "FILE"}, "save_dir: expected a folder that can be written to, got .*FILE/tag: Not a directory"),
        ({"logs_dir": "FILE"}, "logs_dir: expected a folder that can be written to, got .*FILE: File exists"),
        (
            {"dataset": "imagefolder", "dataset_path": "FOLDER", "pretrained": "True", "train_batch_size": 4},
            "pretrained: expected width 1 and images of more than 64 x 64 .*, got width 0.25",
        ),
        ({"recipe_path": "no.md"}, "recipe: expected an existing file, got no.md"),
        ({"model_tag": "../tag"}, "model_tag: expected a plain folder name .*, got '../tag'"),
    ],
)
def test_train_errors(settings, folder, tmp_path, change, message):
    file = tmp_path / "FILE"
    file.touch()
    values = {"FOLDER": str(folder), "FILE": str(file)}
    change = {key: values.get(value, value) for key, value in change.items()}
    with pytest.raises(ValueError, match=message):
        train(TrainSettings(**{**settings, **change}))
    assert not (tmp_path / "runs" / "tag" / "checkpoint.pt").exists()


def test_files_that_are_not_weights(tmp_path):
    model = MobileNetV1(10, 0.25)
    (tmp_path / "text.pt").write_text("words")
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "other.pt")
    torch.save(MobileNetV1(10, 0.5).state_dict(), tmp_path / "wide.pt")
    torch.save(model, tmp_path / "model.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "wide.pt").read_bytes()[:-100])
    unreadable = "which is damaged, of another format, or holds more than tensors and plain values$"
    for name, message in [
        ("text.pt", f"pretrained: expected a state_dict, got .*text.pt, {unreadable}"),
        ("model.pt", f"pretrained: expected a state_dict, got .*model.pt, {unreadable}"),
        ("half.pt", f"pretrained: expected a state_dict, got .*half.pt, {unreadable}"),
        ("other.pt", "pretrained: expected the names of .*other.pt, in which 165 names differ, for example a"),
        ("wide.pt", r"expected shape \[8, 3, 3, 3\] of input.conv.weight, got \[16, 3, 3, 3\] in .*wide.pt"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_weights(model, read_model("pretrained", tmp_path / name)[0], tmp_path / name, 10)


def test_an_earlier_run_is_not_overwritten(settings, tmp_path):
    train(TrainSettings(**{**settings, "recipe_args": "epochs=1"}))
    before = (tmp_path / "runs" / "tag" / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match=r"model_tag: expected the name of a new run, got 'tag'.*--overwrite"):
        train(TrainSettings(**settings))
    assert (tmp_path / "runs" / "tag" / "checkpoint.pt").read_bytes() == before
    measurements = train(TrainSettings(**{**settings, "recipe_args": "epochs=1", "overwrite": True}))
    assert [m.epoch for m in measurements] == [1]
    with pytest.raises(ValueError, match="resume: expected it without --overwrite"):
        train(TrainSettings(**settings, resume=True, overwrite=True))
    with pytest.raises(ValueError, match="resume: expected --seed 0 as before, got 1"):
        train(TrainSettings(**settings, resume=True, seed=1))
