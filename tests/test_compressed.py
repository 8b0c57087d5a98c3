"""Compressed safetensors: every bit comes back, in less than 8 % of the size at 95 %, and damaged files are refused."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import mfac
from mfac import load_compressed, save_compressed
from mfac.export.codes import CODES, decode, encode, plan
from mfac.export.compressed import CompressedFile
from mfac.tutorial.models import MobileNetV1

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.int8, torch.int64]


def raw(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8).tolist()


def sparse(*shape, sparsity, dtype=torch.float32):
    weight = torch.randint(1, 100, shape).to(dtype)
    weight.view(-1)[torch.randperm(weight.numel())[: round(sparsity * weight.numel())]] = 0
    return weight


@settings(deadline=None, max_examples=60)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    sparsity=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    code=st.sampled_from(sorted(CODES)),
    seed=st.integers(0, 9),
)
def test_every_code_gives_back_every_bit(shape, sparsity, dtype, code, seed):
    torch.manual_seed(seed)
    weight = sparse(*shape, sparsity=sparsity, dtype=dtype)
    again = decode(code, encode(weight, code))
    assert (again.dtype, again.shape, raw(again)) == (dtype, weight.shape, raw(weight))


@pytest.mark.parametrize("gap", [0, 13, 14, 15, 16, 29, 30, 31, 254, 255, 256, 509, 510, 511])
@pytest.mark.parametrize("code", ["gaps4", "gaps8"])
def test_gaps_around_the_largest_digit(code, gap):
    weight = torch.zeros(2 * gap + 1)
    weight[gap] = 1
    for tensor in (weight, weight[gap:], weight[: gap + 1], torch.zeros(gap + 1)):
        assert torch.equal(decode(code, encode(tensor, code)), tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.97])
def test_negative_zeros_and_nan_payloads(dtype, sparsity, tmp_path):
    weight = sparse(64, 3, 5, 5, sparsity=sparsity, dtype=dtype)
    weight[:3] = -0.0
    as_int = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    weight[5].view(as_int).copy_(torch.full((3, 5, 5), torch.inf, dtype=dtype).view(as_int) + 5)  # NaN, payload 5
    assert bool(weight[5].isnan().all())
    with pytest.warns(UserWarning, match=r"model: 225 elements are -0.0, which are stored as values are; tensor.add_"):
        written = save_compressed({"weight": weight}, tmp_path / "w.safetensors")
    assert written.codes["weight"] != "dense" and written.ratio < 1
    assert raw(load_compressed(tmp_path / "w.safetensors")["weight"]) == raw(weight)


def test_the_smallest_code_is_chosen_and_the_plan_is_kept():
    chosen = {}
    for sparsity in (0.1, 0.6, 0.9, 0.97):
        weight = sparse(512, 512, sparsity=sparsity)
        chosen[sparsity] = plan(weight)
        parts = encode(weight, chosen[sparsity].code)
        shapes = {part: (entry.dtype, entry.shape) for part, entry in chosen[sparsity].parts.items()}
        assert {part: (t.dtype, tuple(t.shape)) for part, t in parts.items()} == shapes
        sizes = [sum(t.nbytes for t in encode(weight, code).values()) for code in CODES]
        assert chosen[sparsity].nbytes == min(sizes)
    assert [p.code for p in chosen.values()] == ["bitmask", "bitmask", "gaps4", "gaps8"]
    for tensor in (torch.ones(64, 64), torch.tensor(0.0), torch.zeros(0, 4), torch.zeros(4, 4)):
        assert plan(tensor).code == "dense"


def test_a_model_of_mobilenets_shapes_at_95_per_cent(tmp_path):
    model = MobileNetV1(1000)
    with torch.no_grad():
        for weight in (p for p in model.parameters() if p.dim() > 1):
            weight.view(-1)[torch.randperm(weight.numel())[: round(0.95 * weight.numel())]] = 0
    written = save_compressed(model, tmp_path / "m.safetensors")
    assert written.nbytes == (tmp_path / "m.safetensors").stat().st_size
    assert written.dense == sum(t.nbytes for t in model.state_dict().values())
    assert written.ratio < 0.07
    again = load_compressed(tmp_path / "m.safetensors")
    assert list(again) == list(model.state_dict())
    assert all(raw(again[key]) == raw(value) for key, value in model.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_shared_empty_strided_and_scalar_tensors(tmp_path):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.BatchNorm1d(64))
    model[1].weight = model[0].weight
    weight = sparse(64, 64, sparsity=0.9)
    state = model.state_dict() | {
        "empty": torch.zeros(0, 3),
        "t": weight.t(),
        "expanded": torch.ones(1, 3).expand(4, 3),
    }
    written = save_compressed(state, tmp_path / "m.safetensors", metadata={"note": "x"})
    again = load_compressed(tmp_path / "m.safetensors")
    assert again.keys() == state.keys() and again["1.weight"] is again["0.weight"]
    for key, value in state.items():
        assert torch.equal(again[key], value) and again[key].dtype == value.dtype
    assert written.codes["t"] == "gaps4" and written.codes["1.weight"] == "dense"
    file = CompressedFile(tmp_path / "m.safetensors")
    assert file.metadata == {"format": "pt", "note": "x"} and file.aliases == {"1.weight": "0.weight"}
    model.load_state_dict({key: again[key] for key in model.state_dict()})


def test_names_that_the_code_would_give(tmp_path):
    state = {"w": sparse(64, 64, sparsity=0.9), "w.shape": torch.ones(3), "v": sparse(64, 64, sparsity=0.9)}
    save_compressed(state, tmp_path / "m.safetensors")
    assert CompressedFile(tmp_path / "m.safetensors").codes == {"w": "dense", "w.shape": "dense", "v": "gaps4"}
    again = load_compressed(tmp_path / "m.safetensors")
    assert all(torch.equal(again[key], state[key]) for key in state)


def test_other_programs_safetensors(tmp_path):
    """What is dense is read by the library of that name, and its files are read here."""
    state = {"a": torch.randn(4, 4), "b": torch.arange(3), "c": torch.tensor(True), "d": sparse(64, 64, sparsity=0.5)}
    save_compressed(state, tmp_path / "ours.safetensors")
    theirs = load_file(tmp_path / "ours.safetensors")
    assert torch.equal(theirs["a"], state["a"]) and theirs["d.bitmask"].shape == (64, 8)
    assert theirs["d.row_offsets"].tolist() == [0, *(state["d"] != 0).sum(1).cumsum(0).tolist()][:-1]
    save_file(state, tmp_path / "theirs.safetensors")
    again = load_compressed(tmp_path / "theirs.safetensors")
    assert all(torch.equal(again[key], state[key]) for key in state)
    # compressed-tensors' layout, without our metadata
    save_file(
        {f"d.{part}": tensor for part, tensor in encode(state["d"], "bitmask").items()}, tmp_path / "c.safetensors"
    )
    assert torch.equal(load_compressed(tmp_path / "c.safetensors")["d"], state["d"])


@pytest.mark.parametrize(
    ("state", "error"),
    [
        ([1], "model: expected a torch.nn.Module or a dict of tensors, got list"),
        ({1: torch.ones(1)}, "model: expected names as keys, got 1"),
        ({"a": 3}, "model: expected plain tensors, got int as 'a'"),
        (
            {"a": torch.ones(2, 2).to_sparse()},
            "model: expected dense tensors of a dtype .* got 'a' of torch.float32 and",
        ),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "got 'a' of torch.complex64"),
        ({"a": torch.ones(2, device="meta")}, "got 'a' on the meta device"),
    ],
)
def test_what_cannot_be_stored(state, error, tmp_path):
    with pytest.raises(TypeError, match=error):
        save_compressed(state, tmp_path / "m.safetensors")
    assert not any(tmp_path.iterdir())


def test_tensors_that_share_a_part_of_their_memory(tmp_path):
    whole = torch.ones(4, 4)
    for part in (whole[1:], whole[:2], whole.view(-1), whole.t(), whole.view(torch.int32)):
        with pytest.raises(ValueError, match="model: expected tensors that share all of their memory or none, got"):
            save_compressed({"a": whole, "b": part}, tmp_path / "m.safetensors")
    rows = {"a": whole[:2], "b": whole[2:]}  # apart
    save_compressed(rows, tmp_path / "m.safetensors")
    assert torch.equal(load_compressed(tmp_path / "m.safetensors")["b"], rows["b"])
    with pytest.raises(ValueError, match="metadata: expected keys other than 'mfac', which is the format's own"):
        save_compressed(rows, tmp_path / "m.safetensors", metadata={"mfac": "1"})
    with pytest.raises(ValueError, match=r"path: expected a file that can be written, got .*: No such file"):
        save_compressed(rows, tmp_path / "no" / "m.safetensors")


def written(tmp_path, tensors, metadata=None):
    save_file(tensors, tmp_path / "m.safetensors", metadata)
    return tmp_path / "m.safetensors"


def test_contradictions_in_a_file(tmp_path):
    weight = sparse(16, 16, sparsity=0.8)
    for code, (first, *_) in CODES.items():
        about = json.dumps({"version": 1, "codes": {"w": code}, "aliases": {}})
        good = {f"w.{part}": tensor for part, tensor in encode(weight, code).items()}
        assert torch.equal(load_compressed(written(tmp_path, good, {"mfac": about}))["w"], weight)
        changes = {
            "w.compressed": good["w.compressed"][1:],
            "w.shape": torch.tensor([16, 17]),
            f"w.{first}": good[f"w.{first}"][:-1],
        }
        for key, value in changes.items():
            path = written(tmp_path, good | {key: value.contiguous()}, {"mfac": about})
            with pytest.raises(ValueError, match=r"path: expected a compressed model, got .* 'w' of which is wrong: "):
                load_compressed(path)
        for key in good:
            path = written(tmp_path, {k: v for k, v in good.items() if k != key}, {"mfac": about})
            with pytest.raises(ValueError, match=f"'w' of which is wrong: it has no part '{key[2:]}'"):
                load_compressed(path)
    huge = good | {"w.shape": torch.tensor([2**40, 2**20])}
    with pytest.raises(ValueError, match="does not describe the 1152921504606846976 elements"):
        load_compressed(written(tmp_path, huge, {"mfac": about}))
    for text in (
        "[]",
        "{",
        '{"version": 2, "codes": {}, "aliases": {}}',
        '{"version": 1, "codes": {"w": 1}, "aliases": {}}',
    ):
        with pytest.raises(ValueError, match=r"expected a compressed model of version 1, got .*, which says "):
            load_compressed(written(tmp_path, good, {"mfac": text}))
    about = json.dumps({"version": 1, "codes": {}, "aliases": {"w.shape": "x"}})
    with pytest.raises(ValueError, match="it is said to be the same as 'x'"):
        load_compressed(written(tmp_path, good, {"mfac": about}))


def test_files_that_are_no_safetensors(tmp_path):
    save_compressed({"a": torch.ones(4, 4), "b": torch.ones(2)}, tmp_path / "m.safetensors")
    good = (tmp_path / "m.safetensors").read_bytes()
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])

    def of(header, data=good[8 + length :]):
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + data

    entry = header["a"]
    bad = {
        "its first 8 bytes": [b"", b"abc", b"\xff" * 20, good[: length // 2]],
        "its header is not JSON": [good[:8] + b"\xff" + good[9:], good[:8] + b"[" * length + good[8 + length :]],
        "its header is not a table": [of([1]), of(header | {"__metadata__": {"a": 1}})],
        "'a' has no known dtype, shape and place": [
            of(header | {"a": entry | change})
            for change in (
                {"dtype": "C64"},
                {"shape": [4, 5]},
                {"shape": [-4, -4]},
                {"shape": 3},
                {"data_offsets": [0]},
            )
        ],
        "begins at byte": [of(header | {"a": entry | {"data_offsets": [4, 68]}})],
        "its header describes": [good[:-1], good + b"x"],
    }
    for error, contents in bad.items():
        for content in contents:
            (tmp_path / "bad.safetensors").write_bytes(content)
            with pytest.raises(ValueError, match=rf"path: expected a safetensors file, got .*: .*{error}"):
                load_compressed(tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=r"path: expected a file that can be read, got .*: No such file"):
        load_compressed(tmp_path / "none.safetensors")


def test_files_of_converted_models_are_refused(tmp_path):
    model = nn.Sequential(nn.Linear(64, 64))
    fast = mfac.sparse.convert(model, torch.randn(1, 64), policy="sparse")
    mfac.sparse.save(fast, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"path: expected a file of mfac\.save_compressed, got .* mfac\.sparse\.load"):
        load_compressed(tmp_path / "model.safetensors")
