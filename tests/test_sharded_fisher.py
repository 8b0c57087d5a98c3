"""A Fisher whose columns are spread over processes is that of one process."""

import pytest
import torch
from ranks import run_ranks
from torch import distributed as dist

from mfac.distributed.replicas import Replicas
from mfac.fisher import Fisher
from mfac.gradients.buffer import GradientBuffer
from mfac.gradients.sharded import ShardedBuffer
from mfac.sharded_fisher import ShardedFisher, fisher_of


def problem(m, d, dtype=torch.float32):
    generator = torch.Generator().manual_seed(m + d)
    rows = torch.randn(m, d, generator=generator).to(dtype)
    weights, x = torch.randn(2, d, generator=generator)
    kept, active = torch.rand(2, d, generator=generator) < torch.tensor([[0.6], [0.9]])
    return rows, weights * active, x, kept & active, active


def sharded(rows, unit, num_grads=None):
    """A buffer of these rows, given by the ranks in turn; a row of NaN in between is skipped."""
    replicas = Replicas(dist.group.WORLD)
    buffer = ShardedBuffer(num_grads or len(rows), {"w": rows[0].float()}, replicas, unit, rows.dtype)
    for first in range(0, len(rows), replicas.size):
        row = rows[min(first + replicas.rank, len(rows) - 1)]
        stored = buffer.append_round(lambda row=row: ([row], float(row[0]), 2.0), len(rows) - first)
        assert [loss for loss, _ in stored] == rows[first : first + replicas.size, 0].tolist()
        assert not buffer.append_round(lambda row=row: ([row / 0], 0.0, 0.0), 1)
    return buffer


def check_buffer():
    rows = problem(7, 1100)[0]
    buffer, whole = sharded(rows, 512, 5), GradientBuffer(5, {"w": rows[0]})
    for row in rows:
        whole.append_gradients([row])
    rank, edges = buffer.replicas.rank, buffer.edges
    assert (buffer.shape, len(buffer), buffer.names) == (whole.shape, len(whole), ["w"])
    assert torch.equal(buffer.tensor, whole.tensor[:, edges[rank] : edges[rank + 1]])
    assert buffer.mean_square == whole.mean_square
    assert torch.equal(buffer.mean(2), whole.mean(2))
    assert torch.equal(buffer.mean(), whole.mean())
    assert buffer.skipped == -(-len(rows) // buffer.replicas.size)
    for call in (lambda: buffer.append_gradients([rows[0]]), buffer.state_dict):
        with pytest.raises(ValueError, match=r"buffer: expected .*, got one that is spread over ranks"):
            call()


def test_buffer():
    run_ranks(check_buffer, 3)


def outcomes(fisher, weights, x, kept, active, groups, subsets):
    """Of every method."""
    part = fisher.replace(active=active)
    found = {"diagonal": part.inverse_diagonal(), "product": part.inverse_product(torch.stack([x, weights]))}
    found["form"] = torch.tensor(part.quadratic_form(x))
    for name in ("joint_update", "joint_step", "independent_update"):
        new = weights.clone()
        extra = (found["diagonal"],) if name == "independent_update" else ()
        got = getattr(part, name)(new, kept, *extra)
        found[name] = new
        if name == "joint_step":
            found["next"] = got[1]
        if name != "independent_update":
            found[f"{name} loss"] = torch.tensor(got[0] if name == "joint_step" else got)
    found["project"] = fisher.project(x)
    half = fisher.rows(0, fisher.shape[0] // 2).replace(damping="1e-2*mean")
    found["half"] = half.inverse_diagonal()
    found["half damping"] = torch.tensor(half.damping)
    if groups is not None:
        found["groups"] = part.group_saliency(weights, groups, subsets)
    return found


def check_methods(m, d, unit, block_size, dtype, exact):
    rows, *vectors = problem(m, d, dtype)
    buffer = sharded(rows, unit)
    groups = torch.arange(d // 4 * 4).view(-1, 4) if block_size else None
    groups = None if groups is None else torch.cat([groups, torch.tensor([[0, d - 1, d // 2, -1]])])
    subsets = torch.tensor([[0, 1], [2, 3]])
    settings = {"damping": 1e-3, "block_size": block_size}
    wanted = outcomes(Fisher(rows, **settings), *vectors, groups, subsets)
    got = outcomes(fisher_of(buffer).replace(**settings), *vectors, groups, subsets)
    for name, value in wanted.items():
        same = exact and name not in ("form", "joint_update loss", "joint_step loss", "project", "half damping", "half")
        tolerance = {"rtol": 0, "atol": 0} if same else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(
            got[name].double(), value.double(), **tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )
    return {name: value.clone() for name, value in got.items()}


@pytest.mark.parametrize(
    ("size", "m", "d", "unit", "block_size", "dtype"),
    [
        (2, 6, 1000, 64, 64, torch.float32),
        (3, 40, 1000, 64, 32, torch.bfloat16),
        (3, 6, 100, 64, 64, torch.float32),  # the first rank has no columns
        (4, 6, 90, 90, 50, torch.float32),  # only the last has some
    ],
)
def test_blocks(size, m, d, unit, block_size, dtype):
    found = run_ranks(check_methods, size, m, d, unit, block_size, dtype, True)
    assert all(torch.equal(value, found[0][name]) for other in found for name, value in other.items())


@pytest.mark.parametrize(("size", "m", "d", "unit"), [(2, 6, 1000, 1), (3, 40, 30, 1), (3, 6, 100, 64)])
def test_one_block(size, m, d, unit):
    found = run_ranks(check_methods, size, m, d, unit, None, torch.float32, False)
    assert all(torch.equal(value, found[0][name]) for other in found for name, value in other.items())


def check_refusals():
    rows = problem(4, 200)[0]
    fisher = ShardedFisher(sharded(rows, 64), 1e-3, 64)
    with pytest.raises(ValueError, match=r"block_size: expected a divisor of 64, .* parts of 2 ranks, or None, got 48"):
        fisher.replace(block_size=48)
    assert (fisher.accepts(32), fisher.accepts(48)) == (True, False)
    groups = torch.arange(200).view(-1, 4)
    with pytest.raises(ValueError, match="pattern: expected 'unstructured' for one block over 2 processes, got groups"):
        fisher.replace(block_size=None).group_saliency(rows[0], groups, torch.tensor([[0, 1]]))
    with pytest.raises(AttributeError):
        fisher.nothing  # noqa: B018


def test_refusals():
    run_ranks(check_refusals, 2)
