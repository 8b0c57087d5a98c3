"""GradientBuffer: saving, loading, copies."""

import copy
import io
import math
import pickle

import pytest
import torch
from test_buffer import filled

from mfac import GradientBuffer
from mfac.ops.arguments import check_gradients


def same(one, other):
    assert torch.equal(one.tensor, other.tensor)
    for name in ("names", "num_grads", "dtype", "device", "skipped", "reached", "_next"):
        assert getattr(one, name) == getattr(other, name), name
    for name in ("mean_square", "loss", "samples"):
        assert repr(getattr(one, name)) == repr(getattr(other, name)), name  # NaN among them


@pytest.mark.parametrize("rows", [[], [1, 2], [1, 2, 3, 4, 5]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict(rows, dtype):
    """A file that torch.load reads without pickle; the copy goes on as the original does."""
    buffer = filled([*rows, math.nan], dtype=dtype)
    buffer.loss, buffer.samples = 0.5, 32.0
    file = io.BytesIO()
    torch.save(buffer.state_dict(), file)
    file.seek(0)
    other = filled([9, 9, 9], dtype=dtype)
    other.load_state_dict(torch.load(file, weights_only=True))
    same(buffer, other)
    for x in (buffer, other):
        x.append_gradients([torch.full((2, 1), 7.0)])
    same(buffer, other)


@pytest.mark.parametrize("device", [None, "disk"])
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("rows", [[1, 2], [1, 2, 3, 4]])
def test_copies_have_rows_of_their_own(device, copied, rows):
    buffer = GradientBuffer(3, {"w": torch.zeros(2, 1)}, device=device)
    for row in rows:
        buffer.append_gradients([torch.full((2, 1), float(row))])
    other = copied(buffer)
    same(buffer, other)
    other.append_gradients([torch.full((2, 1), 7.0)])
    other.reached.add("x")
    assert not (buffer.tensor == 7).any() and buffer.reached == {"w"} and "x" not in buffer.reached
    assert buffer.mean_square == check_gradients(buffer.tensor)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "state: expected the keys of GradientBuffer.state_dict"),
        (filled([1]).state_dict() | {"names": ["v"]}, r"state\['names'\]: expected \['w'\], got \['v'\]"),
        (filled([1]).state_dict() | {"shapes": [[2]]}, r"state\['shapes'\]: expected \[\[2, 1\]\], got \[\[2\]\]"),
        (filled([1], num_grads=4).state_dict(), r"state\['num_grads'\]: expected 3, got 4"),
        (
            filled([1], dtype=torch.bfloat16).state_dict(),
            r"state\['rows'\]: expected torch.float32, got torch.bfloat16",
        ),
        (filled([1]).state_dict() | {"next": 0}, r"state\['next'\]: expected an int 1 to 1, got 0"),
        (filled([1, 2, 3]).state_dict() | {"next": 3}, r"state\['next'\]: expected an int 0 to 2, got 3"),
        (filled([1]).state_dict() | {"next": -1}, r"state\['next'\]: expected an int 1 to 1, got -1"),
        (filled([1]).state_dict() | {"skipped": -1}, r"state\['skipped'\]: expected an int >= 0, got -1"),
        (filled([1]).state_dict() | {"reached": ["v"]}, r"state\['reached'\]: expected some of \['w'\], got \['v'\]"),
        (filled([1]).state_dict() | {"names": 3}, r"state\['names'\]: expected \['w'\], got 3"),
        (filled([1]).state_dict() | {"rows": torch.ones(4, 2)}, r"state\['rows'\]: expected \[<= 3, 2\], got \[4, 2\]"),
    ],
)
def test_bad_state(state, message):
    buffer = filled([1, 2])
    before = copy.deepcopy(buffer)
    with pytest.raises(ValueError, match=message):
        buffer.load_state_dict(state)
    same(buffer, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"next": "1"}, r"state\['next'\]: expected an int, got '1'"),
        ({"next": None}, r"state\['next'\]: expected an int, got None"),
        ({"rows": [[1.0, 2.0]]}, r"state\['rows'\]: expected a tensor, got list"),
        ({"rows": None}, r"state\['rows'\]: expected a tensor, got NoneType"),
        ({"skipped": 1.5}, r"state\['skipped'\]: expected an int, got 1.5"),
        ({"reached": "w"}, r"state\['reached'\]: expected a list of names, got str"),
        ({"loss": None}, r"state\['loss'\]: expected a number, got None"),
    ],
)
def test_state_of_other_types(change, message):
    buffer = filled([1, 2])
    before = copy.deepcopy(buffer)
    with pytest.raises(TypeError, match=message):
        buffer.load_state_dict(filled([1]).state_dict() | change)
    with pytest.raises(TypeError, match="state: expected a mapping, got list"):
        buffer.load_state_dict([])
    same(buffer, before)
