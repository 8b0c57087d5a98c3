"""Processes that do things together; each test runs in real ones."""

import itertools
import os

import pytest
import torch
from ranks import run_ranks
from torch import distributed as dist

from mfac.distributed.replicas import ALONE, Replicas, shard_edges


def collectives():
    replicas = Replicas(dist.group.WORLD)
    rank, edges = replicas.rank, [0, 2, 2, 5]
    assert replicas.together(lambda: (rank, -1.5), 2) == [(0, -1.5), (1, -1.5), (2, -1.5)]
    assert replicas.sums(lambda: [rank, 1], 2) == [3, 3]
    whole = torch.arange(10.0).view(2, 5)
    own = whole[:, edges[rank] : edges[rank + 1]]
    assert torch.equal(replicas.gather_columns(own, edges), whole)
    assert replicas.add(torch.tensor([rank, 1.0])).tolist() == [3, 3]
    row = (torch.arange(5) + 10 * rank).bfloat16() if rank != 1 else None
    got = replicas.exchange_rows(row, [0, 2], edges, torch.empty(0, dtype=torch.bfloat16))
    rows = torch.stack([torch.arange(5), torch.arange(5) + 20]).bfloat16()
    assert torch.equal(got, rows[:, edges[rank] : edges[rank + 1]])
    same = {"weight": torch.ones(3), "mask": torch.tensor([True, False])}
    replicas.check_same("model: same?", same)
    texts = []
    for name, x in (("weight", torch.tensor([1.0, 1.0, 1 + rank * 1e-7])), ("mask", torch.tensor([rank == 1, True]))):
        with pytest.raises(ValueError, match=f"model: same\\?, of which '{name}' differs between ranks") as caught:
            replicas.check_same("model: same?", same | {name: x})
        texts.append(str(caught.value))
    return texts


def test_collectives():
    texts = run_ranks(collectives, 3)
    assert texts[0] == texts[1] == texts[2]


class UsersError(Exception):
    pass


def fail_on_one(kind):
    replicas = Replicas(dist.group.WORLD)

    def work():
        if replicas.rank == 1:
            if kind is None:
                os._exit(0)
            raise kind("too bad")

    replicas.together(work)


@pytest.mark.parametrize(
    ("kind", "name", "text"),
    [
        (ValueError, "ValueError", "rank 1: too bad"),
        (KeyboardInterrupt, "KeyboardInterrupt", "rank 1: too bad"),
        (UsersError, "RuntimeError", "rank 1: UsersError: too bad"),
    ],
)
def test_an_error_of_one_rank_is_one_of_all(kind, name, text):
    assert run_ranks(fail_on_one, 3, kind, fails=(0, 1, 2)) == [(name, text), (kind.__name__, "too bad"), (name, text)]


def test_a_killed_rank_is_an_error_of_the_others():
    first, killed, last = run_ranks(fail_on_one, 3, None, fails=(0, 2))
    assert killed is None
    for name, text in (first, last):
        assert name == "RuntimeError"
        assert text.startswith("process_group: expected all 3 ranks to take part, but one has stopped")


def test_one_process():
    assert ALONE.together(lambda: [1.0], 1) == [(1.0,)]
    assert ALONE.gather(torch.ones(2)).shape == (1, 2)
    with pytest.raises(ZeroDivisionError):
        ALONE.together(lambda: 1 / 0)


@pytest.mark.parametrize("d", [1, 7, 64, 1000])
@pytest.mark.parametrize("unit", [1, 64, 512])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_edges(d, unit, size):
    edges = shard_edges(d, unit, size)
    assert len(edges) == size + 1
    assert edges == sorted(edges)
    assert edges[0] == 0 and edges[-1] == d
    assert all(edge % unit == 0 for edge in edges[:-1])
    widths = [b - a for a, b in itertools.pairwise(edges)]
    assert max(widths) - min(widths) <= 2 * unit
