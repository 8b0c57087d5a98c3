"""Which weights go: how many of each group of parameters, and which are the lowest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType

import torch
from torch import Tensor

from mfac.model.names import matching_names
from mfac.model.targets import PrunableParameters
from mfac.pruning.patterns import parse_pattern
from mfac.pruning.schedule import between

_MOST_BYTES = 8e9  # of the scores of all ways to prune all groups


def sparsity_groups(
    names: list[str], sparsity: float | Mapping[str, float], scope: str
) -> list[tuple[list[str], float]]:
    """Split parameters into groups that are ranked together.

    Args:
        names: All chosen parameters.
        sparsity: A share for all, or shares by name or ``"re:<regex>"``.
        scope: ``"global"`` or ``"layer"``.

    Returns:
        (names, sparsity) of each group.

    Raises:
        TypeError: If a share is not a number.
        ValueError: If a share is not in [0, 1], or a key matches nothing or what another key matches.
    """
    groups: list[tuple[list[str], float]] = []
    if isinstance(sparsity, Mapping):
        taken: dict[str, str] = {}
        if not sparsity:
            raise ValueError("sparsity: expected at least one entry, got an empty dict")
        for key, value in sparsity.items():
            found = matching_names(key, names)
            if not found:
                raise ValueError(f"sparsity: {key!r} matches none of the parameters {', '.join(names[:8])}")
            for name in found:
                if name in taken:
                    raise ValueError(f"sparsity: {name!r} is matched by both {taken[name]!r} and {key!r}")
                taken[name] = key
            groups.append((found, share_of_zeros(value, f"sparsity[{key!r}]")))
    else:
        groups.append((names, share_of_zeros(sparsity, "sparsity")))
    if scope == "layer":
        groups = [([name], value) for found, value in groups for name in found]
    return groups


def share_of_zeros(value: float, name: str) -> float:
    """Check a sparsity.

    Args:
        value: What the user gave.
        name: Of the argument.

    Returns:
        A float in [0, 1].

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is not in [0, 1].
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number in [0, 1], got {value!r}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected in [0, 1], got {value!r}")
    return float(value)


class Selection:
    """The weights of a model as units that are pruned whole, and how many of them are to go.

    A unit is a weight, or a group of a :class:`Pattern`. Units are ranked within segments: all parameters, those of one
    key of a sparsity dict, or single ones. The sparsity of a segment counts the weights in whole groups only.

    Args:
        chosen: Name to parameter, in the order of the flat vector.
        sparsity: A share for all, or shares by name or ``"re:<regex>"``.
        scope: ``"global"`` or ``"layer"``.
        pattern: How weights group; see :func:`mfac.pruning.patterns.parse_pattern`.
        named: What the user wrote to choose the parameters; those under their own names must have groups.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a share or name is wrong, the scores of all ways to prune the groups would take too much
            memory, a sparsity is more than the pattern allows, or no group fits into a layer that the user named, or
            into any.
    """

    def __init__(
        self,
        chosen: PrunableParameters,
        sparsity: float | Mapping[str, float],
        scope: str,
        pattern: str | Sequence[int],
        named: Iterable[str] = (),
    ) -> None:
        """Check, and list the groups."""
        self.pattern = pattern = parse_pattern(pattern)
        self.segments = segments = sparsity_groups(list(chosen), sparsity, scope)
        named = {*named, *(sparsity if isinstance(sparsity, Mapping) else ())}
        self.sizes = {name: p.numel() for name, p in chosen.items()}
        self._units = dict(self.sizes)  # units of each parameter
        self.positions: Tensor | None = None  # [units, P]
        if pattern.size > 1:
            device = next(iter(chosen.values())).device
            groups, start = [], 0
            for name, p in chosen.items():
                groups.append(pattern.groups(p.shape, chosen.targets[name].axes) + start)
                self._units[name] = len(groups[-1])
                if len(groups[-1]) == 0 and name in named:
                    raise ValueError(f"pattern: {pattern.name} does not fit {name!r} of shape {list(p.shape)}")
                start += p.numel()
            count = sum(map(len, groups))
            num_bytes = 4 * count * pattern.num_subsets
            if num_bytes > _MOST_BYTES:
                raise ValueError(
                    f"pattern: {pattern.name} gives {count:,} groups {pattern.num_subsets:,} scores each, "
                    f"{num_bytes / 1e9:.0f} GB; expected below {_MOST_BYTES / 1e9:.0f} GB: take a smaller M"
                )
            self.positions = torch.cat(groups).to(device)
            self.subsets = pattern.subsets().to(device)
            if len(self.positions) == 0:
                shapes = ", ".join(str(list(p.shape)) for p in list(chosen.values())[:4])
                raise ValueError(f"pattern: {pattern.name} fits none of the parameters, of shapes {shapes}")
        for names, sparsity in segments:
            if sparsity > pattern.max_sparsity + 1e-9:
                raise ValueError(
                    f"sparsity: {sparsity} of {', '.join(names[:3])} is more than {pattern.max_sparsity:g}, all that "
                    f"{pattern.name} allows"
                )
        order = [name for names, _ in segments for name in names]
        self._in_order = order == list(chosen)
        self._order = order

    def _done(self, active: Tensor | None) -> Tensor | None:
        """[units] bool: pruned before, as far as the pattern goes."""
        if active is None:
            return None
        if self.positions is None:
            return ~active
        return (~active[self.positions]).sum(1) >= self.pattern.pruned

    def _counts(self, done: Tensor | None, share: float) -> tuple[list[int], list[int]]:
        """Units to be pruned and all units, for each segment, after `share` of the way from what is done."""
        flags = None if done is None else dict(zip(self._units, done.split(list(self._units.values())), strict=True))
        counts, totals = [], []
        for names, sparsity in self.segments:
            total = sum(self._units[name] for name in names)
            target = min(round(sparsity / self.pattern.max_sparsity * total), total)
            held = 0 if flags is None else sum(int(flags[name].sum()) for name in names)
            if target < held:
                what = "weights" if self.positions is None else f"groups of {self.pattern.name}"
                raise ValueError(
                    f"sparsity: {sparsity} of {total} {what} ({', '.join(names[:3])}) is {target}, but masks "
                    f"already hold {held} pruned; pruned weights stay pruned unless their mask is dropped"
                )
            most = self.pattern.max_sparsity
            now = between(most * held / max(total, 1), most * target / max(total, 1), share) / most * total
            counts.append(target if share == 1 else min(max(held, round(now)), target))
            totals.append(total)
        return counts, totals

    def select(
        self, scores: Tensor, active: Tensor | None, share: float, kernels: ModuleType, weights: Tensor | None = None
    ) -> Tensor:
        """Return the mask of all weights after pruning the lowest units.

        Args:
            scores: [d], or [units, k] for the k ways to prune a group; the smallest of them counts. Written.
            active: [d] bool: the weights not pruned before.
            share: How much of the way from ``active`` to the sparsity, in (0, 1], in the logarithm of the density.
            kernels: :mod:`mfac.ops` or :mod:`mfac.ops.reference`.
            weights: [d] float32; becomes zero where pruned, if given.

        Returns:
            [d] bool, True = kept.

        Raises:
            ValueError: If more is pruned already than the sparsity asks for.
        """
        done = self._done(active)
        counts, totals = self._counts(done, share)
        best = None
        if self.positions is not None:
            if active is not None:  # a subset must hold what is pruned already
                pruned = (~active[self.positions]).float()
                inside = torch.zeros(len(self.subsets), self.pattern.size, device=scores.device)
                inside.scatter_(1, self.subsets, 1.0)
                scores.masked_fill_(pruned @ (1 - inside).T > 0, torch.inf)
            scores, best = scores.min(1)
        if done is not None:
            scores.masked_fill_(done, -torch.inf)  # what was pruned before is so again
        if self._in_order and best is None:
            return kernels.select_smallest(scores, counts, totals, weights)
        parts = dict(zip(self._units, scores.split(list(self._units.values())), strict=True))
        values = scores if self._in_order else torch.cat([parts[name] for name in self._order])
        selected = kernels.select_smallest(values, counts, totals)
        if not self._in_order:
            chosen = selected.split([self._units[name] for name in self._order])
            keep = torch.ones_like(scores, dtype=torch.bool) if done is None else ~done
            where = dict(zip(self._units, keep.split(list(self._units.values())), strict=True))
            for name, part in zip(self._order, chosen, strict=True):
                where[name].copy_(part)
            selected = keep
        kept = selected
        if best is not None:
            kept = torch.ones(sum(self.sizes.values()), dtype=torch.bool, device=scores.device)
            if active is not None:
                kept &= active
            gone = torch.nonzero(~selected if done is None else ~selected & ~done).flatten()
            kept[self.positions[gone].gather(1, self.subsets[best[gone]])] = False
        if weights is not None:
            weights.masked_fill_(~kept, 0)
        return kept
