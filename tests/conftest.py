"""Fixtures of several tests.

With MFAC_EMULATE_CUDA=1 all tests run with the CUDA ops in the place of the CPU ops, emulated on the CPU.
"""

import os
from contextlib import contextmanager

import pytest
import torch
from build_bench import Bench

from mfac.pruning import gradual

EMULATE = os.environ.get("MFAC_EMULATE_CUDA") == "1"
if EMULATE:
    import emulation

    emulation.load()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_late_warnings():
    """A Pruner that a test leaves unfinished does not warn in another one, whenever garbage is collected."""
    yield
    for pruner in list(gradual._STEPPED):
        pruner._stepped = False


@pytest.fixture
def bench(tmp_path, monkeypatch):
    return Bench(tmp_path, monkeypatch)


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are small
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def images(tmp_path):
    """A folder with three classes of images, and the beginning of commands that train on it."""
    from program import SHORT, write_images  # with Pillow, which few tests need

    write_images(tmp_path / "data", "abc")
    (tmp_path / "r.yaml").write_text(SHORT)
    command = f"--dataset-path {tmp_path / 'data'} --image-size 66 --train-batch-size 12 "
    command += f"--width 0.2 --pretrained False --device cpu --save-dir {tmp_path / 'runs'}"
    return tmp_path / "data", f"train --recipe-path {tmp_path / 'r.yaml'} {command}".split()


@pytest.fixture
def thread_counts():
    """A function that yields 1, 2, 3 and 8 (emulated: 1), each after torch has been set to so many threads."""
    before = torch.get_num_threads()

    def each():
        for threads in (1, 2, 3, 8)[: 1 if EMULATE else 4]:
            torch.set_num_threads(threads)
            yield threads

    yield each
    torch.set_num_threads(before)


@pytest.fixture
def unchanged():
    """A context manager that fails if the body, even one that raises, leaves a trace on model, tensors or random state.

    It watches weights, buffers, `.grad`, requires_grad, the mode of every module and torch's random state; with
    `weights=False` all of these but the weights.
    """
    return _unchanged


@contextmanager
def _unchanged(model, *tensors, weights=True):
    before = _state(model, tensors, weights)
    yield
    after = _state(model, tensors, weights)
    assert before.keys() == after.keys()
    for key, value in before.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(after[key], value, rtol=0, atol=0, equal_nan=True, msg=f"{key} has changed")
        else:
            assert after[key] == value, f"{key} has changed"


def _state(model, tensors, weights):
    state = {f"buffer {name}": b.clone() for name, b in model.named_buffers()}
    state |= {f"mode of {name!r}": module.training for name, module in model.named_modules()}
    for name, p in model.named_parameters():
        if weights:
            state[f"weight {name}"] = p.detach().clone()
        state[f"grad {name}"] = None if p.grad is None else p.grad.clone()
        state[f"requires_grad {name}"] = p.requires_grad
    state |= {f"tensor {i}": t.detach().clone() for i, t in enumerate(tensors)}
    return state | {"random state": torch.get_rng_state()}
