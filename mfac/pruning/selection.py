"""Which weights go: how many of each group of parameters, and which are the lowest."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from types import ModuleType

import torch
from torch import Tensor

from mfac.checks import check_sparsity
from mfac.model.names import NameTable, shorten
from mfac.model.targets import PrunableParameters
from mfac.pruning.patterns import parse_pattern
from mfac.pruning.schedule import interpolate_sparsity, num_halvings

_MAX_SUBSTEPS = 16  # of "auto"
_MAX_SCORE_BYTES = 8e9  # of the scores of all subsets of all groups

Segment = tuple[str | None, list[str]]  # key and names of parameters that are ranked together
# By key: a key of the user's dict, None if it was one number, or a parameter's name if each is ranked by itself.
Sparsities = dict[str | None, float]


def parse_sparsity(
    sparsity: float | Mapping[str, float], names: Sequence[str], table: NameTable, scope: str
) -> tuple[Sparsities, dict[str | None, list[str]]]:
    """Understand the sparsity that the user asks for.

    Args:
        sparsity: A sparsity for all parameters, or a dict of them by name or ``"re:<regex>"``.
        names: Of all chosen parameters.
        table: What a user may write for them.
        scope: ``"global"``, or ``"layer"`` to rank each parameter by itself.

    Returns:
        Key -> sparsity, and key -> names of the parameters that are ranked together.

    Raises:
        TypeError: If a sparsity is not a number.
        ValueError: If a sparsity is not in [0, 1], or a key matches nothing or what another key matches.
    """
    if not isinstance(sparsity, Mapping):
        return _by_scope({None: check_sparsity("sparsity", sparsity)}, {None: list(names)}, scope)
    if not sparsity:
        raise ValueError("sparsity: expected at least one entry, got an empty dict")
    sparsities: Sparsities = {}
    members: dict[str | None, list[str]] = {}
    taken: dict[str, str] = {}
    for key, value in sparsity.items():
        found = [name for name in table.find(key, "sparsity") if name in names]
        if not found:
            raise ValueError(f"sparsity: expected names among {shorten(names)}, got {key!r}")
        for name in found:
            if name in taken:
                raise ValueError(f"sparsity: expected one key for {name!r}, got both {taken[name]!r} and {key!r}")
            taken[name] = key
        sparsities[key], members[key] = check_sparsity(f"sparsity[{key!r}]", value), found
    return _by_scope(sparsities, members, scope)


def _by_scope(
    sparsities: Sparsities, members: dict[str | None, list[str]], scope: str
) -> tuple[Sparsities, dict[str | None, list[str]]]:
    if scope == "global":
        return sparsities, members
    each = {name: key for key, names in members.items() for name in names}
    return {name: sparsities[key] for name, key in each.items()}, {name: [name] for name in each}


class Selection:
    """The weights of a model as units that are pruned whole, and the segments in which they are ranked.

    A unit is a weight, or a group of a :class:`Pattern`. Units are ranked within segments: all parameters, those of one
    key of a sparsity dict, or single ones. The sparsity of a segment counts the weights in whole groups only.

    Args:
        chosen: Name to parameter, in the order of the flat vector.
        members: Key -> names, from :func:`parse_sparsity`.
        pattern: How weights group; see :func:`mfac.pruning.patterns.parse_pattern`.
        named: Parameters that the user chose by their names; these must have groups.
        max_layer_sparsity: Bound of the sparsity of a parameter; None: no bound.

    Attributes:
        positions: [units, P] int64, positions in the flat vector of the weights of each group; None if P = 1.
        subsets: [k, pruned] int64, the subsets of a group that may be pruned; only if P > 1.
        segments: (key, names) of each.
        sizes: Name -> weights.

    Raises:
        ValueError: If no group fits into a layer that the user named, or into any, or the scores of all subsets
            would take too much memory.
    """

    def __init__(
        self,
        chosen: PrunableParameters,
        members: Mapping[str | None, Sequence[str]],
        pattern: str | Sequence[int],
        named: Collection[str] = (),
        max_layer_sparsity: float | None = None,
    ) -> None:
        """List the groups."""
        self.pattern = pattern = parse_pattern(pattern)
        self.max_layer_sparsity = max_layer_sparsity
        self.segments = list(members.items())
        self.sizes = {name: p.numel() for name, p in chosen.items()}
        self._units = dict(self.sizes)  # units of each parameter
        self.positions: Tensor | None = None
        if pattern.size > 1:
            groups, start = [], 0
            for name, p in chosen.items():
                groups.append(pattern.groups(p.shape, chosen.targets[name].axes) + start)
                self._units[name] = len(groups[-1])
                if len(groups[-1]) == 0 and name in named:
                    raise ValueError(
                        f"pattern: expected one that fits {name!r} of shape {list(p.shape)}, got {pattern.name}"
                    )
                start += p.numel()
            count = sum(map(len, groups))
            if 4 * count * pattern.num_subsets > _MAX_SCORE_BYTES:
                raise ValueError(
                    f"pattern: expected below {_MAX_SCORE_BYTES / 1e9:.0f} GB of scores, got "
                    f"{4e-9 * count * pattern.num_subsets:.0f} GB for {count:,} groups of {pattern.name} with "
                    f"{pattern.num_subsets:,} subsets each; take a smaller M"
                )
            if count == 0:
                shapes = ", ".join(str(list(p.shape)) for p in list(chosen.values())[:4])
                raise ValueError(f"pattern: expected one that fits a parameter, of shapes {shapes}, got {pattern.name}")
            device = next(iter(chosen.values())).device
            self.positions = torch.cat(groups).to(device)
            self.subsets = pattern.subsets().to(device)

    def to(self, device: torch.device) -> None:
        """Move the positions to where the model is now."""
        if self.positions is not None and self.positions.device != device:
            self.positions, self.subsets = self.positions.to(device), self.subsets.to(device)

    def check_sparsities(self, sparsities: Sparsities) -> None:
        """Check that the pattern and the bound per layer allow these sparsities.

        Args:
            sparsities: Key -> sparsity.

        Raises:
            ValueError: If one is too high.
        """
        for key, names in self.segments:
            for bound, what in (
                (self.pattern.max_sparsity, f"all that {self.pattern.name} allows"),
                (self.max_layer_sparsity, "max_layer_sparsity"),
            ):
                if bound is not None and sparsities[key] > bound + 1e-9:
                    raise ValueError(
                        f"sparsity: expected at most {bound:g} for {shorten(names, 3)}, {what}, got {sparsities[key]}"
                    )

    def check_reached(self, active: Tensor | None, sparsities: Sparsities) -> None:
        """Check that no more is pruned already than is asked for.

        Args:
            active: [d] bool: the weights not pruned before.
            sparsities: Key -> sparsity.

        Raises:
            ValueError: If it is.
        """
        self._counts(self.segments, self._done(active), sparsities, 1, strict=True)

    def reached(self, active: Tensor | None, dense: Collection[str] = ()) -> Sparsities:
        """Return key -> sparsity of the units that are pruned in ``active`` [d] bool, ``dense`` parameters left out."""
        held = {key: 0 for key, _ in self.segments}
        total = dict(held)
        done = self._by_name(self._done(active))
        for key, members in self.segments:
            names = [name for name in members if name not in dense]
            total[key] += sum(self._units[name] for name in names)
            held[key] += sum(int(done[name].sum()) for name in names) if done else 0
        return {key: self.pattern.max_sparsity * held[key] / max(total[key], 1) for key in held}

    def overall(self, sparsities: Sparsities) -> float:
        """Return the sparsity of all parameters together."""
        sizes = {key: sum(self.sizes[name] for name in names) for key, names in self.segments}
        return sum(size * sparsities[key] for key, size in sizes.items()) / max(sum(self.sizes.values()), 1)

    def num_substeps(self, active: Tensor | None, sparsities: Sparsities) -> int:
        """Return the sub-steps of ``"auto"``: in proportion to how often the weights of a segment are halved.

        Args:
            active: [d] bool: the weights not pruned before.
            sparsities: Key -> sparsity after the step.

        Returns:
            A number in [1, 16]: 2, 4 or 8 for each halving, by the pattern.
        """
        substeps = self.pattern.substeps_per_halving * num_halvings(self.reached(active), sparsities)
        return round(min(max(substeps, 1), _MAX_SUBSTEPS))

    def _by_name(self, units: Tensor | None) -> dict[str, Tensor]:
        """Views of the part of each parameter; empty without a tensor."""
        return {} if units is None else dict(zip(self._units, units.split(list(self._units.values())), strict=True))

    def _done(self, active: Tensor | None) -> Tensor | None:
        """[units] bool: pruned before, as far as the pattern goes."""
        if active is None:
            return None
        if self.positions is None:
            return ~active
        return (~active[self.positions]).sum(1) >= self.pattern.pruned

    def _counts(
        self,
        segments: Sequence[Segment],
        done: Tensor | None,
        sparsities: Sparsities,
        share: float,
        strict: bool = False,
    ) -> list[int]:
        """Units to be pruned in each segment after `share` of the way from what is done, which is never undone.

        Returns:
            A count for each segment.

        Raises:
            ValueError: If it is strict, and more is done in a segment than its sparsity asks for.
        """
        flags, counts, most = self._by_name(done), [], self.pattern.max_sparsity
        for key, names in segments:
            total = sum(self._units[name] for name in names)
            target = min(round(sparsities[key] / most * total), total)
            held = sum(int(flags[name].sum()) for name in names) if flags else 0
            if strict and target < held:
                what = "weights" if self.positions is None else f"groups of {self.pattern.name}"
                raise ValueError(
                    f"sparsity: expected at least {held} of {total} {what} of {shorten(names, 3)}, pruned already, "
                    f"got {sparsities[key]}, which is {target}; pruned weights stay pruned unless their mask is dropped"
                )
            target = max(target, held)
            now = interpolate_sparsity(most * held / max(total, 1), most * target / max(total, 1), share) / most * total
            counts.append(target if share == 1 else min(max(held, round(now)), target))
        return counts

    def select(
        self,
        scores: Tensor,
        active: Tensor | None,
        sparsities: Sparsities,
        share: float,
        kernels: ModuleType,
        weights: Tensor | None = None,
        dense: Collection[str] = (),
    ) -> Tensor:
        """Return the mask of all weights after pruning the lowest units.

        Args:
            scores: [d], or [units, k] for the k subsets of a group; the smallest of them counts. Written.
            active: [d] bool: the weights not pruned before.
            sparsities: Key -> sparsity.
            share: How much of the way from ``active`` to the sparsity, in (0, 1], in the logarithm of the density.
            kernels: :mod:`mfac.ops.compiled` or :mod:`mfac.ops.reference`.
            weights: [d] float32; becomes zero where pruned, if given.
            dense: Names of parameters that stay as they are, and do not count.

        Returns:
            [d] bool, True = kept.

        Raises:
            ValueError: If nothing can be pruned, or the bound per layer stands against the sparsity.
        """
        done, best = self._done(active), None
        if self.positions is not None:
            if active is not None:  # a subset must hold what is pruned already
                pruned = (~active[self.positions]).float()
                inside = torch.zeros(len(self.subsets), self.pattern.size, device=scores.device)
                inside.scatter_(1, self.subsets, 1.0)
                scores.masked_fill_(pruned @ (1 - inside).T > 0, torch.inf)
            scores, best = scores.min(1)
        if done is not None:
            scores.masked_fill_(done, -torch.inf)  # what was pruned before is so again
        segments = [(key, [name for name in names if name not in dense]) for key, names in self.segments]
        segments = [(key, names) for key, names in segments if names]
        if not segments:
            raise ValueError(f"sparsity: expected weights reached by gradients, got {shorten(sorted(dense), 4)}")
        counts = self._counts(segments, done, sparsities, share)
        order = [name for _, names in segments for name in names]
        sizes = [sum(self._units[name] for name in names) for _, names in segments]
        if self.max_layer_sparsity is not None:
            self._bound_layers(scores, done, segments, counts, kernels)
        if best is None and order == list(self.sizes):
            return kernels.select_smallest(scores, counts, sizes, weights)
        selected = torch.ones_like(scores, dtype=torch.bool) if done is None else ~done
        parts, where = self._by_name(scores), self._by_name(selected)
        values = torch.cat([parts[name] for name in order])
        chosen = kernels.select_smallest(values, counts, sizes).split([self._units[name] for name in order])
        for name, part in zip(order, chosen, strict=True):
            where[name].copy_(part)
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

    def _bound_layers(
        self,
        scores: Tensor,
        done: Tensor | None,
        segments: Sequence[Segment],
        counts: Sequence[int],
        kernels: ModuleType,
    ) -> None:
        """Raise to infinity the scores of all units of a parameter but the lowest that the bound lets go.

        The k smallest of what is left are those that a greedy choice in the order of the scores would take, passing
        over parameters that are full.

        Raises:
            ValueError: If so few may go that a segment cannot reach its sparsity.
        """
        flags, parts = self._by_name(done), self._by_name(scores)
        for (_, names), count in zip(segments, counts, strict=True):
            share = min(1.0, self.max_layer_sparsity / self.pattern.max_sparsity)
            held = [int(flags[name].sum()) if flags else 0 for name in names]
            for rounding in (math.floor, math.ceil):  # up to one unit more in each, where rounding stands in the way
                units = [rounding(round(share * self._units[name], 6)) for name in names]
                limits = list(map(max, units, held))
                if sum(limits) >= count:
                    break
            if sum(limits) < count:
                raise ValueError(
                    f"max_layer_sparsity: expected a bound by which {count} units of {shorten(names, 3)} can go, as "
                    f"sparsity asks, got {self.max_layer_sparsity:g}, by which {sum(limits)} can"
                )
            values = torch.cat([parts[name] for name in names])
            beyond = kernels.select_smallest(values, limits, [self._units[name] for name in names])
            for name, part in zip(names, beyond.split([self._units[name] for name in names]), strict=True):
                parts[name].masked_fill_(part, torch.inf)
