"""mfac.frontier: predictions that prune_step then makes true."""

import csv

import oracle
import pytest
import torch
from torch import nn

import mfac


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8))


GRADS = oracle.gradients(40, 16 * 12 + 12 * 8)


def test_points_are_what_prune_step_predicts(unchanged):
    model = make_model()
    with unchanged(model, GRADS):
        result = mfac.frontier(model, GRADS, [0.8, 0.3, 0.5], ["unstructured", "2:4", [2, 2]])
    assert [(p.pattern, p.target) for p in result.points] == [
        ("unstructured", 0.3), ("unstructured", 0.5), ("unstructured", 0.8), ("2:4", 0.3), ("2:4", 0.5),
        ("[2, 2]", 0.3), ("[2, 2]", 0.5), ("[2, 2]", 0.8),
    ]  # fmt: skip
    for point in result.points:
        pattern = [2, 2] if point.pattern == "[2, 2]" else point.pattern
        step = mfac.prune_step(make_model(), GRADS, point.target, pattern=pattern)
        assert (step.sparsity, step.predicted_loss_increase) == (point.sparsity, point.predicted_loss_increase)
    by_target = {(p.pattern, p.target): p.predicted_loss_increase for p in result.points}
    assert by_target["unstructured", 0.3] < by_target["unstructured", 0.5] < by_target["unstructured", 0.8]
    assert by_target["unstructured", 0.5] < by_target["2:4", 0.5]  # fewer choices cost more


def test_auto_is_chosen_once():
    result = mfac.frontier(make_model(), GRADS, [0.3, 0.8], damping="auto", block_size="auto")
    step = mfac.prune_step(make_model(), GRADS, 0.8, damping="auto", block_size="auto")
    assert (result.damping, result.block_size) == (step.damping, step.block_size)
    assert result.points[1].predicted_loss_increase == step.predicted_loss_increase


def test_table_csv_and_plot(tmp_path):
    result = mfac.frontier(make_model(), GRADS, [0.25, 0.5], ["unstructured", "2:4"])
    lines = str(result).splitlines()
    assert lines[0].split() == ["pattern", "target", "sparsity", "predicted", "loss", "increase"]
    assert len(lines) == 5 and lines[3].split()[:3] == ["2:4", "25.00%", "25.00%"]
    result.to_csv(tmp_path / "points.csv")
    rows = list(csv.DictReader((tmp_path / "points.csv").open()))
    assert [float(row["sparsity"]) for row in rows] == [0.25, 0.5, 0.25, 0.5]
    result.plot(tmp_path / "points.png")
    assert (tmp_path / "points.png").read_bytes()[:4] == b"\x89PNG"


def test_masks():
    masks = mfac.prune_step(make_model(), GRADS, 0.5).masks
    result = mfac.frontier(make_model(), GRADS, [0.6], masks=masks)
    assert result.points[0].sparsity == pytest.approx(0.6, abs=2e-3)
    with pytest.raises(ValueError, match="expected at least 144 of 288 weights"):
        mfac.frontier(make_model(), GRADS, [0.4], masks=masks)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grads": None}, ValueError, "grads: expected gradients, got None"),
        ({"sparsities": []}, ValueError, "sparsities: expected some up to 1 for unstructured, got"),
        ({"sparsities": [0.8], "patterns": ["2:4"]}, ValueError, r"sparsities: expected some up to 0[.]5 for 2:4"),
        ({"sparsities": [0.5, 1.5]}, ValueError, r"sparsities: expected in \[0, 1\], got 1.5"),
        ({"sparsities": [-0.5]}, ValueError, r"sparsities: expected in \[0, 1\], got -0.5"),
        ({"patterns": "3:2"}, ValueError, "pattern: expected N:M"),
        ({"patterns": []}, ValueError, "patterns: expected at least one, got none"),
        ({"patterns": ["3:2"]}, ValueError, "pattern: expected N:M"),
        ({"damping": 0}, ValueError, "damping: expected a number in"),
        ({"update": "both"}, ValueError, "update: expected one of joint, independent, none, auto, got 'both'"),
    ],
)
def test_bad_input(change, error, message, unchanged):
    model = make_model()
    with unchanged(model), pytest.raises(error, match=message):
        mfac.frontier(model, **{"grads": GRADS, "sparsities": [0.5], **change})


def test_times_of_the_converted_model(tmp_path, unchanged):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 8))
    grads, x = torch.randn(8, 512 * 520) * 0.01, torch.randn(1, 512)
    with unchanged(model):
        result = mfac.frontier(model, grads, [0.5, 0.99], ["unstructured", [4, 1]], example_inputs=x, progress=False)
    assert result.dense_milliseconds > 0 and all(0 < point.milliseconds for point in result.points)
    lines = str(result).splitlines()
    assert lines[0].split()[-1] == "ms" and lines[-1] == f"dense: {result.dense_milliseconds:.2f} ms"
    result.to_csv(tmp_path / "points.csv")
    rows = list(csv.DictReader((tmp_path / "points.csv").open()))
    assert [float(row["milliseconds"]) for row in rows] == [point.milliseconds for point in result.points]
    result.plot(tmp_path / "points.png")
    assert (tmp_path / "points.png").read_bytes()[:4] == b"\x89PNG"
