"""The demo and the dense model that it prunes."""

import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from mfac.tutorial.data import load_data
from mfac.tutorial.demo import METHODS, demo
from mfac.tutorial.dense import dense_digits
from mfac.tutorial.loop import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")


def test_dense_model_is_trained_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MFAC_CACHE_DIR", "cache")
    lines = []
    state = torch.random.get_rng_state()
    first = dense_digits(0.25, epochs=0.1, report=lines.append)
    second = dense_digits(0.25, epochs=0.1, report=lines.append)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [line.split()[0] for line in lines] == ["training", "dense", "dense"]
    assert lines[2].startswith(f"dense model from {tmp_path / 'cache'}")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    validation = load_data().validation
    assert evaluate(first, validation) == evaluate(second, validation)


def test_a_damaged_dense_model_is_trained_again(tmp_path, monkeypatch):
    monkeypatch.setenv("MFAC_CACHE_DIR", str(tmp_path))
    lines = []
    first = dense_digits(0.25, epochs=0.1, report=lines.append)
    (path,) = (tmp_path / "models").iterdir()
    os.truncate(path, path.stat().st_size - 100)
    second = dense_digits(0.25, epochs=0.1, report=lines.append)
    assert lines[2] == f"{path} is damaged and is removed" and lines[3].startswith("training the dense model once")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    dense_digits(0.25, epochs=0.1, report=lines.append)
    assert lines[-1] == f"dense model from {path}"


def test_demo_in_small(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("MFAC_CACHE_DIR", str(tmp_path / "cache"))
    runs = demo(
        tmp_path / "out",
        seeds=2,
        num_grads=2,
        width=0.25,
        dense_epochs=0.1,
        recomputations=1,
        max_train_steps=1,
    )
    assert [(run.method.label, run.seed) for run in runs] == [(m.label, s) for s in (0, 1) for m in METHODS]
    assert {round(run.measurements[-1].sparsity, 2) for run in runs} == {0.96}
    table = (tmp_path / "out" / "comparison.txt").read_text()
    assert table in capsys.readouterr().out
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert "\n".join(table.splitlines()[:2]) in readme  # the README's table is the printed one
    for method in METHODS:
        assert f"| {method.label} " in table
        assert f"| {method.label} " in readme
    with Image.open(tmp_path / "out" / "comparison.png") as image:
        assert min(image.size) > 500
    assert len(list((tmp_path / "out").glob("*.csv"))) == 6
