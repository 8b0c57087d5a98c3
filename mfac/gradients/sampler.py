"""Copies of samplers: their state is copied, what they draw from is shared."""

from __future__ import annotations

import copy
import types
import warnings
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from mfac.gradients.seeds import SeedKind, derive_seed

_SHARED = (Dataset, DataLoader, nn.Module, types.ModuleType)  # large, or impossible to copy
_ATOMIC = (int, float, complex, str, bytes, type(None), type, types.FunctionType, types.BuiltinFunctionType, np.number)
_COLLECTIONS = (list, tuple, set, frozenset, deque)
_OF_A_PROCESS = ({"num_replicas", "rank"}, {"num_processes", "process_index"})
_DATA = ("data_source", "dataset")  # attributes in which samplers keep what they draw from


def copy_sampler(sampler: Any, dataset: Any, seed: int | None = None, passes: int = 0) -> Any:
    """Copy a sampler with everything that it holds, at any depth, except data sets and models.

    Args:
        sampler: A sampler, a batch sampler, or any iterable of indices.
        dataset: What it draws from, which is shared.
        seed: Seeds the attribute ``generator`` of each sampler for a pass; None: generators keep their state.
        passes: Number of the pass. Samplers that shuffle by epoch are told it, if there is a seed.

    Returns:
        The copy.

    Raises:
        Exception: Of any type, if the sampler holds something that cannot be copied.
    """
    memo = {id(dataset): dataset}
    holders: list[Any] = []
    _prepare(sampler, memo, holders, set())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # copies of itertools, in Python 3.12 and 3.13
        new = copy.deepcopy(sampler, memo)
    if seed is not None:
        copies = [memo[id(holder)] for holder in holders if id(holder) in memo]
        seedable = [x for x in copies if isinstance(vars(x).get("generator", 0), (torch.Generator, type(None)))]
        for index, x in enumerate(seedable):
            x.generator = torch.Generator() if x.generator is None else x.generator
            x.generator.manual_seed(derive_seed(seed, SeedKind.SAMPLER, passes, index))
        for x in reversed(copies):  # the outer ones last
            if callable(getattr(x, "set_epoch", None)):
                x.set_epoch(passes)
    return new


def splits_by_process(sampler: Any, dataset: Any) -> bool:
    """Return whether a sampler gives each process its part of one order, which all of them have to draw alike.

    Args:
        sampler: A sampler, a batch sampler, or any iterable of indices.
        dataset: What it draws from.

    Returns:
        Whether it, or one that it holds, knows its process: torch's DistributedSampler, accelerate's BatchSamplerShard.
    """
    holders: list[Any] = []
    _prepare(sampler, {id(dataset): dataset}, holders, set())
    return any(names <= set(vars(holder)) for holder in holders for names in _OF_A_PROCESS)


def _prepare(value: Any, memo: dict[int, Any], holders: list[Any], seen: set[int]) -> None:
    """Enter into the memo of a deepcopy what it would not copy well, and list the objects that have attributes."""
    if isinstance(value, _ATOMIC) or id(value) in memo or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, _SHARED):
        memo[id(value)] = value
    elif isinstance(value, torch.Generator):
        memo[id(value)] = torch.Generator(value.device)
        memo[id(value)].set_state(value.get_state())
    elif isinstance(value, types.MethodType):
        _prepare(value.__self__, memo, holders, seen)
    elif type(value) in _COLLECTIONS:
        if all(isinstance(item, _ATOMIC) for item in value):  # without a call per item, as a deepcopy has
            memo[id(value)] = copy.copy(value)
        else:
            for item in value:
                _prepare(item, memo, holders, seen)
    elif isinstance(value, dict):
        for item in value.values():
            _prepare(item, memo, holders, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, (torch.Tensor, np.ndarray)):
        holders.append(value)
        for name, item in vars(value).items():
            if name in _DATA and id(item) not in memo:
                memo[id(item)] = copy.copy(item) if isinstance(item, (list, dict, set, deque, np.ndarray)) else item
            _prepare(item, memo, holders, seen)
