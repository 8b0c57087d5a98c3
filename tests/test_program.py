"""The program as its users see it: killed and resumed runs, comparisons, lint, damaged images."""

import gc
import json
import os
import shutil
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
from program import OPTIONS, RECIPE, SHORT, interrupt_in, weights, write_images

from mfac.cli.main import main
from mfac.tutorial.data import load_data
from mfac.tutorial.models import MobileNetV1

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPES = Path(__file__).parent / "recipes"


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
    assert main([*command.split(), "killed", "--resume"]) == 0
    said = f"nothing is left to do for {checkpoint}, which has completed the recipe's 4 epochs\n"
    assert capsys.readouterr().out == said


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
    error = "comparison.json is of one with other train_batch_size; take another --save-dir"
    assert error in capsys.readouterr().err
    assert main(["compare", "no.md"]) == 2


def test_an_interrupted_comparison_goes_on_with_its_run(tmp_path, images, monkeypatch, capsys, recwarn):
    folder, command = images
    command = ["compare", str(tmp_path / "r.yaml"), *command[3:]]
    stale = tmp_path / "runs" / "r-0" / "checkpoint.pt"
    stale.parent.mkdir(parents=True)
    stale.touch()  # of another run of this name
    assert main([*command, "--max-train-steps=0"]) == 2  # before anything is written
    assert main(command) == 2
    assert f"runs of these names, got {stale.parent}, which holds one that is not of this" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["r-0"]
    stale.unlink()
    with monkeypatch.context() as patch:
        interrupt_in(patch, 1)
        assert main(command) == 130
    captured = capsys.readouterr()
    assert "after 1 epochs: the same command again goes on from there" in captured.out
    gc.collect()
    assert "ends before its last update" not in captured.err + "".join(str(w.message) for w in recwarn)
    more = shutil.copy(folder / "train" / "a" / "0.jpg", folder / "train" / "a" / "more.jpg")
    assert main(command) == 2
    assert "whose comparison.json is of one with other images" in capsys.readouterr().err
    Path(more).unlink()
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


def test_only_what_is_as_before_is_resumed(tmp_path, images, monkeypatch, capsys):
    """And the time goes on."""
    folder, command = images
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
    more = shutil.copy(folder / "train" / "a" / "0.jpg", folder / "train" / "a" / "more.jpg")
    assert main([*command, "--resume"]) == 2
    error = "resume: expected the 24 training and 6 validation images of before, got 25 and 6"
    assert error in capsys.readouterr().err
    Path(more).unlink()
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


def test_another_recipe_is_not_resumed(tmp_path, capsys):
    (tmp_path / "r.yaml").write_text("rate: 0.1\n" + RECIPE.replace("init_lr: 1e-3", "init_lr: eval(rate)"))
    command = f"train --recipe-path {tmp_path / 'r.yaml'} --save-dir {tmp_path} --logs-dir {tmp_path} {OPTIONS}".split()
    assert main([*command, "--recipe-args", "rate=0.001"]) == 0
    assert main([*command, "--resume"]) == 2
    assert "resume: expected the recipe and the --recipe-args of before" in capsys.readouterr().err
    assert main([*command, "--resume", "--one-shot"]) == 2
    assert len((tmp_path / "r.csv").read_text().splitlines()) == 1 + 7
