"""GradientBuffer: a ring buffer of gradients."""

import copy
import math
import os

import pytest
import torch
from torch import nn

import mfac.gradients.memory
from mfac import GradientBuffer, collect_gradients, prunable_parameters
from mfac.gradients.arguments import check_grads_device
from mfac.ops.arguments import check_gradients


def filled(rows, num_grads=3, dtype=torch.float32):
    buffer = GradientBuffer(num_grads, {"w": torch.zeros(2, 1)}, dtype)
    for row in rows:
        buffer.append_gradients([torch.full((2, 1), float(row))])
    return buffer


def test_ring():
    """Rows fill up in turn; when full, the oldest is overwritten."""
    assert filled([]).tensor.shape == (0, 2)
    assert filled([1, 2]).tensor[:, 0].tolist() == [1, 2]
    buffer = filled([1, 2, 3, 4, 5])
    assert buffer.tensor[:, 0].tolist() == [4, 5, 3]
    assert len(buffer) == buffer.num_grads == 3 and buffer.shape == (3, 2)
    buffer.clear()
    assert len(buffer) == 0 and buffer.shape == (0, 2)
    buffer.append_gradients([torch.full((2, 1), 9.0)])
    assert buffer.tensor[:, 0].tolist() == [9]


def test_attributes():
    assert filled([1], dtype="bfloat16").dtype == torch.bfloat16
    buffer = filled([1], num_grads=4, dtype=torch.bfloat16)
    assert (buffer.dtype, buffer.device, buffer.nbytes) == (torch.bfloat16, torch.device("cpu"), 4 * 2 * 2)
    assert repr(buffer) == "GradientBuffer(1 of 4 gradients, d=2, torch.bfloat16, 0.0 MiB, 0 skipped)"
    buffer.tensor.zero_()
    assert not buffer.tensor.any()  # a view, not a copy


def test_append(unchanged):
    """Copies the gradients, in the order of the names, and of a copy of the model just as well."""
    model = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 2))
    buffer = GradientBuffer(2, prunable_parameters(model))
    model(torch.ones(1, 2)).sum().backward()
    with unchanged(model):
        assert buffer.append(model)
    expected = torch.cat([model[0].weight.grad.flatten(), model[1].weight.grad.flatten()])
    twin = copy.deepcopy(model)
    for p, q in zip(twin.parameters(), model.parameters(), strict=True):
        p.grad = q.grad.clone()
    assert buffer.append(twin)
    model.zero_grad(set_to_none=False)
    assert torch.equal(buffer.tensor, expected.expand(2, 4))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_not_finite_is_skipped(bad, dtype):
    """1e300 is finite in float64, not as stored. The rows stay as they were."""
    buffer = filled([1, 2, 3], dtype=dtype)
    assert not buffer.append_gradients([torch.tensor([[0.0], [bad]], dtype=torch.float64)])
    assert buffer.skipped == 1
    assert buffer.append_gradients([torch.full((2, 1), 4.0)])
    assert buffer.tensor[:, 0].tolist() == [4, 2, 3]
    buffer.clear()
    assert buffer.skipped == 0


def test_append_before_backward(unchanged):
    model = nn.Linear(2, 1)
    buffer = GradientBuffer(2, prunable_parameters(model))
    with unchanged(model), pytest.raises(ValueError, match="expected a gradient for weight, got None; call"):
        buffer.append(model)
    with pytest.raises(ValueError, match="expected a parameter 'weight', got none"):
        buffer.append(nn.Sequential(model))
    many = nn.Sequential(*[nn.Linear(1, 1) for _ in range(9)])
    with pytest.raises(ValueError, match=r"gradient for 0.weight, .*, 7.weight, ... \(1 more\), got None"):
        GradientBuffer(2, prunable_parameters(many)).append(many)
    assert len(buffer) == 0 and buffer.skipped == 0


@pytest.mark.parametrize(
    ("grads", "error", "message"),
    [
        ([], ValueError, "grads: expected 1 tensors, got 0"),
        ([torch.ones(1, 2)], ValueError, r"grads: expected shape \[2, 1\] for 'w', got \[1, 2\]"),
        ([[1.0, 2.0]], TypeError, "grads: expected a tensor for 'w', got list"),
        ([torch.ones(2, 1).numpy()], TypeError, "grads: expected a tensor for 'w', got ndarray"),
    ],
)
def test_bad_gradients(grads, error, message):
    buffer = filled([1])
    with pytest.raises(error, match=message):
        buffer.append_gradients(grads)
    assert buffer.tensor.tolist() == [[1, 1]]


P = {"w": torch.zeros(2)}


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((0, P), ValueError, "num_grads: expected an int >= 1, got 0"),
        ((-1, P), ValueError, "num_grads: expected an int >= 1, got -1"),
        ((1.5, P), TypeError, "num_grads: expected an int, got 1.5"),
        ((2, {}), ValueError, "params: expected at least one parameter, got none"),
        ((2, [torch.zeros(2)]), TypeError, "params: expected a mapping of names to parameters, got list"),
        ((2, {"w": 3}), TypeError, r"params\['w'\]: expected a tensor, got int"),
        ((2, P, torch.float64), TypeError, "dtype: expected torch.float32 or torch.bfloat16, got torch.float64"),
        ((2, P, "nn"), TypeError, "dtype: expected torch.float32 or torch.bfloat16, got 'nn'"),
        (
            (2, P | {"v": torch.zeros(2, device="meta")}),
            ValueError,
            "params: expected on one device, got cpu, meta",
        ),
        ((2, P, torch.float32, "disk:/no/such/folder"), ValueError, "device: expected 'disk:<folder>' with a folder"),
        (
            (2, P, torch.float32, "disks"),
            ValueError,
            "device: expected 'cpu', where the model is, or 'disk', got 'disks'",
        ),
    ],
)
def test_bad_buffer(args, error, message):
    with pytest.raises(error, match=message):
        GradientBuffer(*args)


# ---- missing gradients, scale


def test_missing_gradients_are_zeros():
    """One rule for append and collect_gradients: None counts as zeros, and `reached` says who has had a gradient."""
    model = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 2))
    buffer = GradientBuffer(2, prunable_parameters(model))
    assert buffer.reached == set() and buffer.unreached == ["0.weight", "1.weight"]
    model[1](torch.ones(1, 1)).sum().backward()
    assert buffer.append(model)
    assert buffer.tensor.tolist() == [[0, 0, 1, 1]]
    assert buffer.reached == {"1.weight"} and buffer.unreached == ["0.weight"]
    assert buffer.append_gradients([torch.ones(1, 2), None])
    assert buffer.tensor[1].tolist() == [1, 1, 0, 0] and buffer.unreached == []
    assert buffer.append_gradients([None, None]) and buffer.tensor[0].tolist() == [0, 0, 0, 0]
    buffer.clear()
    assert buffer.reached == set()


def one_weight(grad):
    model = nn.Linear(1, 1, bias=False)
    model.weight.grad = torch.full((1, 1), grad)
    return model


@pytest.mark.parametrize("scale", [4, 4.0, torch.tensor(4.0), torch.tensor(4, dtype=torch.float64)])
def test_scale(scale, unchanged):
    model = one_weight(6.0)
    buffer = GradientBuffer(1, prunable_parameters(model))
    with unchanged(model):
        assert buffer.append(model, scale)
    assert buffer.tensor.item() == 1.5


def test_scale_of_a_grad_scaler(unchanged):
    """Right before unscale_, under the scale that made the gradients; overflow is skipped and counted."""
    model = nn.Linear(3, 2)
    buffer, scaler = GradientBuffer(4, prunable_parameters(model)), torch.amp.GradScaler("cpu", init_scale=2.0**16)
    loss = model(torch.ones(1, 3)).square().sum()
    expected = torch.autograd.grad(loss, model.weight, retain_graph=True)[0]
    scaler.scale(loss).backward()
    with unchanged(model):
        assert buffer.append(model, scale=scaler)
        assert buffer.append(model, scale=torch.tensor(scaler.get_scale()))
    assert torch.equal(buffer.tensor, expected.reshape(1, -1).expand(2, -1))
    model.weight.grad[0, 0] = math.inf
    assert not buffer.append(model, scale=scaler) and buffer.skipped == 1
    model.weight.grad.fill_(8)
    assert buffer.append(model, scale=torch.amp.GradScaler("cpu", enabled=False)) and buffer.tensor[2, 0] == 8


def test_scale_of_accumulated_gradients():
    """The summed losses of k micro-batches, divided by k, are their mean."""
    model, x = nn.Linear(4, 1), torch.randn(8, 4)
    buffer = GradientBuffer(2, prunable_parameters(model))
    for part in x.split(2):
        model(part).square().mean().backward()
    buffer.append(model, scale=4)
    model.zero_grad()
    model(x).square().mean().backward()
    buffer.append(model)
    torch.testing.assert_close(buffer.tensor[0], buffer.tensor[1])


def test_scale_of_half_precision():
    """Divided in float32: 1e-3 / 2**16 is zero in float16."""
    model = one_weight(1e-3).half()
    model.weight.grad = torch.full((1, 1), 1e-3, dtype=torch.float16)
    buffer = GradientBuffer(1, prunable_parameters(model))
    buffer.append(model, 2.0**16)
    assert buffer.tensor.item() == model.weight.grad.float().item() / 2**16 > 0


@pytest.mark.parametrize(
    ("scale", "error", "message"),
    [
        (0, ValueError, "scale: expected a finite number > 0, got 0"),
        (-1.0, ValueError, "scale: expected a finite number > 0, got -1.0"),
        (math.inf, ValueError, "scale: expected a finite number, got inf"),
        (torch.tensor(math.nan), ValueError, "scale: expected a finite number, got tensor"),
        ("2", TypeError, "scale: expected a number, got '2'"),
        (torch.ones(2), TypeError, "scale: expected a number, got tensor"),
        (True, TypeError, "scale: expected a number, got True"),
    ],
)
def test_bad_scale(scale, error, message, unchanged):
    model = one_weight(6.0)
    buffer = GradientBuffer(1, prunable_parameters(model))
    with unchanged(model), pytest.raises(error, match=message):
        buffer.append(model, scale)
    assert len(buffer) == 0 and buffer.reached == set()


def test_sparse_gradients():
    model = nn.Embedding(4, 2, sparse=True)
    buffer = GradientBuffer(1, dict(model.named_parameters()))
    model(torch.tensor([1, 1, 3])).sum().backward()
    assert buffer.append(model, scale=2)
    assert buffer.tensor.view(4, 2)[:, 0].tolist() == [0, 1, 0, 0.5]


# ---- norms and version


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mean_square_has_the_digits_of_the_rows(dtype):
    """Of the rows as stored, whatever was overwritten, squares past float32 among them."""
    buffer = GradientBuffer(5, {"a": torch.zeros(7, 11), "b": torch.zeros(3)}, dtype)
    assert math.isnan(buffer.mean_square)
    for row in range(8):
        magnitude = 1e25 if row == 6 else 10.0**-row
        buffer.append_gradients([magnitude * torch.randn(7, 11), torch.randn(3)])
        assert buffer.mean_square == check_gradients(buffer.tensor)
    assert buffer.mean_square > 1e40


def test_version_changes_with_the_rows():
    buffer = filled([1])
    versions = [buffer.version]
    for change in (
        lambda: buffer.append_gradients([torch.ones(2, 1)]),
        lambda: buffer.load_state_dict(filled([1, 2]).state_dict()),
        buffer.clear,
    ):
        change()
        versions.append(buffer.version)
    assert versions == sorted(set(versions))
    buffer.append_gradients([torch.full((2, 1), math.nan)])
    assert buffer.version == versions[-1]


class Interrupting(torch.Tensor):
    """A gradient whose first copy is interrupted by Ctrl-C."""

    count = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.copy_:
            cls.count += 1
            if cls.count == 1:
                raise KeyboardInterrupt
        return super().__torch_function__(func, types, args, kwargs or {})


def test_interrupted_in_the_middle_of_a_row():
    buffer = GradientBuffer(1, {"a": torch.zeros(2), "b": torch.zeros(2)})
    buffer.append_gradients([torch.ones(2), torch.ones(2)])
    Interrupting.count = 0
    with pytest.raises(KeyboardInterrupt):
        buffer.append_gradients([torch.full((2,), 3.0), torch.full((2,), 3.0).as_subclass(Interrupting)])
    assert buffer.tensor.tolist() == [[3, 3, 3, 3]] and buffer.mean_square == check_gradients(buffer.tensor)


# ---- places and contexts


def test_rows_on_disk(tmp_path):
    """A CPU tensor in a file without a name: nothing is in the folder, even while it is used."""
    buffer = GradientBuffer(3, {"w": torch.zeros(2, 500)}, device=f"disk:{tmp_path}")
    assert buffer.device == torch.device("cpu") and os.listdir(tmp_path) == []
    mapped = [line for line in open("/proc/self/maps") if str(tmp_path) in line]
    assert len(mapped) == 1 and "(deleted)" in mapped[0] and "rw-s" in mapped[0]
    for row in (1.0, 2.0, 3.0, 4.0):
        assert buffer.append_gradients([torch.full((2, 500), row)])
    assert buffer.tensor[:, 0].tolist() == [4, 2, 3]
    assert mfac.Fisher(buffer, 1.0).mean_square == buffer.mean_square
    assert GradientBuffer(1, P, torch.bfloat16, "disk").device == torch.device("cpu")
    del buffer
    assert not any(str(tmp_path) in line for line in open("/proc/self/maps"))


def test_check_grads_device(tmp_path, monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 1)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert check_grads_device("x", None, cuda) == check_grads_device("x", "cuda", cuda) == cuda
    assert check_grads_device("x", "cpu", cuda) == check_grads_device("x", None, cpu) == cpu
    assert check_grads_device("x", "disk", cpu) == check_grads_device("x", f"disk:{tmp_path}", cuda) == tmp_path
    (tmp_path / "file").touch()
    for bad in ("disk:" + str(tmp_path / "file"), "disk:" + str(tmp_path / "none")):
        with pytest.raises(ValueError, match=f"x: expected 'disk:<folder>' with a folder .* got '{bad}'"):
            check_grads_device("x", bad, cpu)
    with pytest.raises(ValueError, match="x: expected 'cuda:1', where the model is, 'cpu' or 'disk', got 'cuda:0'"):
        check_grads_device("x", "cuda:0", cuda)


def test_refused_before_it_is_allocated(monkeypatch):
    monkeypatch.setattr(mfac.gradients.memory, "free_bytes", lambda place: 100)
    with pytest.raises(MemoryError, match=r"for 10 gradients of 9 weights in torch\.float32"):
        GradientBuffer(10, {"w": torch.zeros(9)})
    assert GradientBuffer(2, {"w": torch.zeros(9)}).nbytes == 72


def test_other_default_type_and_device():
    model = nn.Linear(2, 1, bias=False)
    model(torch.ones(1, 2)).sum().backward()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):  # as set_default_device, which torch 2.8 cannot take back
            buffer = GradientBuffer(2, prunable_parameters(model))
            assert buffer.append(model, scale=2.0)
            other = copy.deepcopy(buffer)
            other.load_state_dict(buffer.state_dict())
    finally:
        torch.set_default_dtype(before)
    for x in (buffer, other):
        assert (x.dtype, x.device, x.tensor.tolist()) == (torch.float32, torch.device("cpu"), [[0.5, 0.5]])
        assert x.mean_square == check_gradients(x.tensor)


def test_made_and_fed_in_inference_mode():
    """The rows are ordinary tensors: they can be written outside."""
    model = nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.ones(1, 2)
    with torch.inference_mode():
        buffer = GradientBuffer(2, prunable_parameters(model))
        assert buffer.append(model, scale=2)
        twin = copy.deepcopy(buffer)
    for x in (buffer, twin):
        assert not x.tensor.is_inference() and x.append(model) and len(x) == 2
        assert x.tensor.tolist() == [[0.5, 0.5], [1, 1]] and x.mean_square == check_gradients(x.tensor)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_numbers_that_rows_cannot_hold(dtype, unchanged):
    """Complex and integer parameters are refused by name, wherever they come from."""

    class Model(torch.nn.Module):
        def __init__(self, dtype):
            super().__init__()
            self.layer = torch.nn.Linear(4, 2)
            self.extra = torch.nn.Parameter(torch.ones(2, dtype=dtype), requires_grad=False)

        def forward(self, x):
            return self.layer(x) * self.extra.abs()

    model, batches = Model(dtype), [(torch.randn(3, 4), torch.randn(3, 2))]
    options = {"loss_fn": torch.nn.functional.mse_loss, "num_grads": 1, "progress": False}
    message = f"expected real floating-point numbers, got {dtype}"
    with unchanged(model), pytest.raises(TypeError, match=rf"params\['extra'\]: {message}"):
        collect_gradients(model, batches, params=["extra", "layer.weight"], **options)
    with pytest.raises(TypeError, match=rf"params\['extra'\]: {message}"):
        GradientBuffer(1, dict(model.named_parameters()))
    buffer = GradientBuffer(1, dict(Model(torch.float32).named_parameters()))
    with unchanged(model), pytest.raises(TypeError, match=rf"model\['extra'\]: {message}"):
        collect_gradients(model, batches, buffer=buffer, **options)
    with pytest.raises(TypeError, match=r"grads\['extra'\]: expected real floating-point numbers, got torch.complex64"):
        buffer.append_gradients([torch.ones(2, dtype=torch.complex64), None, None])
    assert not buffer.reached and not len(buffer)
    assert list(collect_gradients(model, batches, **options).names) == ["layer.weight"]
