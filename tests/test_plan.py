"""Plans: the updates to come, of a Pruner and of `mfac plan`."""

import pytest
import torch
from program import OPTIONS, RECIPE

import mfac
from mfac.cli.main import main

pytestmark = pytest.mark.usefixtures("one_thread")


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
