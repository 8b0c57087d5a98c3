"""The `mfac` command: help, exit statuses, one-line errors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mfac._build import BuildError
from mfac.cli.main import main
from mfac.tutorial.settings import TrainSettings
from mfac.tutorial.train import train


def test_help_teaches(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for word in ("mfac demo", "mfac train --recipe-path", "compare", "doctor", "lint", "eval", "export"):
        assert word in text
    assert main([]) == 2
    for command, words in (
        ("train", ("--recipe-args", "num_grads=64", "--resume", "--one-shot", "0.0004", "train/CLASS/IMAGE.jpg")),
        ("compare", ("--seeds", "recipes/magnitude.md", "--train-batch-size")),
        ("demo", ("--seeds",)),
        ("lint", ("--arch-key",)),
    ):
        capsys.readouterr()
        assert main([command, "--help"]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert all(word in text for word in words)


def test_options_of_train_are_the_settings(monkeypatch):
    given = []
    monkeypatch.setattr("mfac.tutorial.train.train", given.append)
    assert main(["train", "--recipe-path", "r.md"]) == 0
    assert given.pop() == TrainSettings(recipe_path="r.md")
    every = (
        "train --recipe-path r.md --recipe-args a=1 --one-shot --arch-key mobilenet --width 0.5 --pretrained true "
        "--checkpoint-path c.pt --dataset imagenette --dataset-path d --image-size 64 --train-batch-size 32 "
        "--test-batch-size 64 --loader-num-workers 8 --init-lr 0.1 --max-train-steps 3 --device cpu --seed 1 --amp "
        "--save-dir s --model-tag t --save-best-after 2 --logs-dir l --resume --overwrite"
    )
    assert main(every.split()) == 0
    (settings,) = given
    assert (settings.pretrained, settings.width, settings.one_shot, settings.max_train_steps) == ("true", 0.5, True, 3)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "train --recipe-path no.md",
            "mfac: error: recipe: expected an existing file, got no.md; the tutorial's recipes are in ",
        ),
        (
            "train --recipe-path r.yaml --dataset imagenette",
            "mfac: error: dataset_path: expected a folder with train/<class>/ and val/<class>/ for the dataset",
        ),
    ],
)
def test_wrong_input_is_one_line(command, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text("modifiers:\n  - !EpochRangeModifier {end_epoch: 1}\n")
    assert main(command.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RuntimeError("loss: expected a finite number,\n  got nan"), "loss: expected a finite number, got nan"),
        (BuildError("no kernels\n  tried: a\n  fix: b"), "no kernels\n  tried: a\n  fix: b"),
        (MemoryError(), "memory: expected enough, got a MemoryError"),
        (MemoryError("grads: needs 9 GiB"), "grads: needs 9 GiB"),
    ],
)
def test_failures_are_said_without_a_traceback(error, text, monkeypatch, capsys):
    def fail(settings):
        raise error

    monkeypatch.setattr("mfac.tutorial.train.train", fail)
    assert main(["train", "--recipe-path", "r.yaml"]) == 1  # 2 is for wrong input
    assert capsys.readouterr().err == f"mfac: error: {text}\n"


@pytest.mark.parametrize(
    "command",
    [
        "train",
        "bake",
        "demo --seeds 0",
        "train --recipe-path r.md --max-train-steps x",
        "train --recipe-path r.md --widht 1",
    ],
)
def test_wrong_options_exit_with_2(command, capsys):
    assert main(command.split()) == 2
    assert "Error" in capsys.readouterr().err


def test_doctor(monkeypatch):
    monkeypatch.setattr("mfac.cli.doctor.main", lambda: 7)
    assert main(["doctor"]) == 7


def test_runs_as_a_module(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "mfac", "train", "--recipe-path", "no.md"], capture_output=True, text=True, check=False
    )
    folder = Path(__file__).resolve().parents[1] / "recipes"
    text = f"mfac: error: recipe: expected an existing file, got no.md; the tutorial's recipes are in {folder}\n"
    assert (run.returncode, run.stderr) == (2, text)


def test_a_pipe_whose_reader_has_ended(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    recipe = Path(__file__).resolve().parents[1] / "recipes" / "mfac.md"
    command = [sys.executable, "-m", "mfac", "lint", str(recipe)]
    run = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (run.returncode, run.stderr) == (141, "")


@pytest.mark.parametrize("command", ["--debug train --recipe-path no.md", "train --recipe-path no.md --debug"])
def test_debug_shows_the_traceback(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert "in train" in error and "ValueError: recipe: expected an existing file, got no.md" in error


@pytest.mark.parametrize(
    "tag",
    ["../x", "/x", "", ".", "..", "a/b", "a/", "a\\b", "a\0b", "a\nb", " a", "a ", "\udcff", "x" * 201, "\u202ex"],
)
def test_odd_tags_are_refused_before_anything_is_created(tag, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text("modifiers:\n  - !EpochRangeModifier {end_epoch: 1}\n")
    options = {"recipe_path": "r.yaml", "pretrained": "False", "save_dir": "runs", "model_tag": tag}
    with pytest.raises(ValueError, match="model_tag: expected a plain folder name"):
        train(TrainSettings(**options))
    assert main(["train", *(f"--{key.replace('_', '-')}={value}" for key, value in options.items())]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mfac: error: model_tag: expected a plain folder name") and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


def test_the_recipes_name_is_the_tag_only_if_it_is_a_plain_one(tmp_path):
    path = tmp_path / "...yaml"
    path.write_text("modifiers:\n  - !EpochRangeModifier {end_epoch: 1}\n")
    with pytest.raises(ValueError, match=r"model_tag: expected a plain folder name .*, got '\.\.'"):
        train(TrainSettings(recipe_path=str(path), save_dir=str(tmp_path / "runs")))
    assert not (tmp_path / "runs").exists()
