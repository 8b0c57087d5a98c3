"""Progress bars: a bar on a terminal, whole lines elsewhere."""

import io
import logging

import pytest
import torch
from torch import nn
from tqdm import tqdm

import mfac
from mfac import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch, stream):
    written = stream()
    monkeypatch.setattr("sys.stderr", written)
    monkeypatch.setattr(progress, "_SECONDS", 0)
    with progress.progress_bar(True, "gradients", 3) as bar:
        for _ in range(3):
            bar.update()
    text = written.getvalue()
    if stream is Terminal:
        assert "\r" in text and "gradients" in text
    else:
        assert "\r" not in text and "\ngradients: 1 of 3 in 00:00, " in text


def test_short_work_writes_no_line(monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr("sys.stderr", written)
    with progress.progress_bar(True, "gradients", 3) as bar:
        bar.update(3)
        tqdm.write("said meanwhile", file=written)
    assert written.getvalue() == "said meanwhile\n"


def test_an_update_is_announced(caplog):
    caplog.set_level(logging.INFO, "mfac")
    model, batches = nn.Linear(4, 2), [(torch.randn(4, 4), torch.randn(4, 2)) for _ in range(4)]
    options = {"num_grads": 4, "refresh": 2, "recomputations": 2, "progress": False}
    pruner = mfac.Pruner(model, batches, nn.functional.mse_loss, sparsity=0.75, start=1, end=2, **options)
    for _ in range(2):
        pruner.step()
    assert [record.message.partition("; about")[0].partition(", in about")[0] for record in caplog.records] == [
        "pruning from 0.0 % to 75.0 % in 2 recomputations, from 6 gradients",
        "4 gradients took 0 s",
    ]
