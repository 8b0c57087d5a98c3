"""The engine that every entry point drives: a model, its masks, and steps under the quadratic model of the loss.

One file, somewhat long: all that changes the state of a model being pruned is in one place, so that one can see that
what an error leaves behind is whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from mfac.checks import check_int, warn
from mfac.distributed.models import find_replicas
from mfac.distributed.shards import check_all_sharded, local, part_of, reshard, whole
from mfac.fisher import Fisher
from mfac.gradients.buffer import GradientBuffer, check_grads_device
from mfac.gradients.sharded import ShardedBuffer
from mfac.gradients.source import GradientSource
from mfac.interrupts import write_whole
from mfac.model.names import NameTable, named_parameters, shorten
from mfac.model.targets import prunable_parameters
from mfac.ops.backend import backend_name, select_backend
from mfac.pruning.auto import BLOCK_SIZES, MIN_GRADS, Candidate, choose_settings, loss_at
from mfac.pruning.correction import FIRST_LENGTH, MOMENTUM, Correction, Descent, correct
from mfac.pruning.criteria import CRITERIA
from mfac.pruning.gradients import Gradients, check_grads
from mfac.pruning.masks import check_masks, complete_masks, count_kept, flatten_masks, merge_masks, sparsity_of
from mfac.pruning.quadratic import Plan, prune_vector, timed
from mfac.pruning.result import PruneResult, PruneStep
from mfac.pruning.schedule import num_halvings
from mfac.pruning.selection import Selection, Sparsities, parse_sparsity
from mfac.pruning.settings import least_num_grads, num_grads_at
from mfac.sharded_fisher import ShardedFisher, fisher_of


def split_evenly(count: int, parts: int) -> list[int]:
    """Return ``count`` in at most so many parts, as equal as can be, none empty."""
    parts = min(parts, count)
    return [count * (i + 1) // parts - count * i // parts for i in range(parts)]


# What may differ between ranks: where and how they compute, and what is shown.
_OWN = ("process_group", "progress", "backend", "grads_device")
_WARN_SPARSITY = 0.01  # of a model without masks


class Engine:
    """The state of one model being pruned: its parameters, the sparsities asked for, masks and results.

    Parameters are looked up by their canonical names at each use: the model may be moved, wrapped or compiled, or have
    its parameters replaced. At any time the model is pruned as far as the masks say, also after an error.

    Args:
        model: Its weights are written.
        sparsity: A number, or a dict by name or ``"re:<regex>"``; parameters that no key matches stay dense.
        settings: The checked :class:`~mfac.pruning.settings.StepSettings`.
        names: Parameters to prune where the settings name none: those of the gradients.
        only_keys: Leave out parameters that no key of ``sparsity`` matches, instead of letting them take part in the
            update.

    Attributes:
        given: The settings as the user wrote them.
        settings: What holds now: within a run with what ``"auto"`` has chosen in its place.
        masks: Name -> bool tensor, True = kept; empty while nothing is pruned.
        sparsities: Key -> sparsity that was asked for; see :data:`~mfac.pruning.selection.Sparsities`.
        zeros: Sparsity of the model when it came, if there were no masks.
        reached: Key -> sparsity that the masks were made for.
        unreached: Names of parameters that no gradient has reached so far: under a criterion that needs gradients they
            stay dense, and do not count.
        result: What the last step or run did; None before the first.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a value or name is wrong, or the pattern fits no layer or not one that the user named.
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float | Mapping[str, float],
        settings: Mapping[str, Any],
        names: Sequence[str] | None = None,
        only_keys: bool = False,
    ) -> None:
        """Check the arguments; the model is not touched."""
        given, masks = settings["params"], settings["masks"]
        self.model, self.replicas = find_replicas(model, settings["process_group"])
        shared = {name: x for name, x in settings.items() if name not in _OWN}
        self.replicas.check_arguments({"sparsity": sparsity, **shared, "grads": names})
        self.given = {name: x for name, x in settings.items() if name not in ("masks", "buffer")}
        self.given["progress"] = settings["progress"] and self.replicas.rank == 0
        self.settings = self.given
        model = self.model
        chosen = prunable_parameters(model, names if given is None else given, settings["exclude"])
        table = NameTable.of_model(model)
        self.sparsities, members = parse_sparsity(sparsity, list(chosen), table, settings["scope"])
        if only_keys and given is None and names is None and isinstance(sparsity, Mapping):
            chosen = prunable_parameters(model, [name for part in members.values() for name in part])
        if self.replicas.lockstep:
            check_all_sharded(chosen)
        self.names = list(chosen)
        self.replicas.together(lambda: _check_parameters(chosen))  # the weights of one rank may be NaN
        self.device = next(iter(chosen.values())).device
        written = [*(given or ()), *(sparsity if isinstance(sparsity, Mapping) else ())]
        self._named = {name for entry in written if not entry.startswith("re:") for name in table.find(entry)}
        self._chosen, self._members = chosen, members
        self.selection = self.selection_for(settings.get("pattern", "unstructured"))
        self.selection.check_sparsities(self.sparsities)
        select_backend(settings["backend"], self.device)  # refused here rather than after an hour
        self.masks: dict[str, Tensor] = {}
        if masks == "nonzero":
            self.masks = {name: whole(p) != 0 for name, p in chosen.items()}
        elif masks is not None:
            self.masks = complete_masks(check_masks("masks", masks, chosen, table), chosen)
        self.zeros = 0.0 if self.masks else _sparsity_of_weights(chosen)
        self.reached: Sparsities = self.selection.reached(flatten_masks(self.masks, chosen))
        self.unreached: frozenset[str] = frozenset()
        self.result: PruneResult | None = None
        if not self.replicas.lockstep:
            every = {name: p for name, p in named_parameters(model).items() if p.is_floating_point()}
            self.replicas.check_same("model: expected the same weights on all ranks, got others", every)
        self._fisher: tuple[Any, int | None, Fisher | ShardedFisher] | None = (
            None  # gradients, their version, their Fisher
        )

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and files hold: nothing that belongs to a run."""
        return {**self.__dict__, "settings": self.given, "_fisher": None}

    def selection_for(self, pattern: str | Sequence[int]) -> Selection:
        """Return how the parameters are selected under a pattern.

        Args:
            pattern: See :func:`mfac.pruning.patterns.parse_pattern`.

        Returns:
            The selection, with the bound per layer of the settings.
        """
        settings = self.settings
        return Selection(self._chosen, self._members, pattern, self._named, settings["max_layer_sparsity"])

    @property
    def params(self) -> dict[str, nn.Parameter]:
        """The parameters as they are now."""
        reshard(self.model)
        every = named_parameters(self.model)
        for name in self.names:
            if name not in every:
                raise ValueError(f"model: expected the parameter {name!r} that it had before, got none of that name")
            before, now = list(self._chosen[name].shape), list(every[name].shape)
            if now != before:
                raise ValueError(f"model: expected {name!r} of shape {before}, as before, got {now}")
        return {name: every[name] for name in self.names}

    @property
    def kernels(self) -> ModuleType:
        """What computes: :mod:`mfac.ops.compiled` or :mod:`mfac.ops.reference`."""
        return select_backend(self.settings["backend"], self.device)

    @property
    def sparsity(self) -> float:
        """Sparsity of the masks, over all chosen parameters."""
        return sparsity_of(self.masks)

    @property
    def mask_sparsities(self) -> Sparsities:
        """Key -> sparsity of the masks, over the parameters that gradients reach."""
        return self.selection.reached(flatten_masks(self.masks, self.params), self.unreached)

    def reached_names(self, key: str | None) -> list[str]:
        """Return the names of a key's parameters that gradients reach."""
        return [name for name in dict(self.selection.segments)[key] if name not in self.unreached]

    def start_sparsity(self, key: str | None, final: float) -> float:
        """Return the sparsity of a key now; the final one if the masks hold as many weights as that rounds to."""
        reached = self.reached[key]
        size = sum(self.selection.sizes[name] for name in self.reached_names(key))
        return final if abs(reached - final) * size <= 0.5 * self.selection.pattern.pruned else reached

    def warn_of_zeros(self) -> None:
        """Warn of a model that was sparse when it came, but has no masks: its zeros would come back."""
        if self.zeros > _WARN_SPARSITY and not self.masks:
            warn(
                f"model: {self.zeros:.1%} of the weights are zero, but there are no masks to keep them so; "
                "masks='nonzero' goes on from what is zero, masks= from an earlier result"
            )

    def hold(self, masks: Mapping[str, Tensor]) -> bool:
        """Count further weights as pruned, so that the next step goes on from them.

        Args:
            masks: Name -> bool tensor, True = kept, of some of the parameters.

        Returns:
            Whether there are any that were not pruned before.

        Raises:
            TypeError: If it is not a mapping.
            ValueError: If a name, type or shape does not fit.
        """
        params, earlier = self.params, self.reached
        given = check_masks("masks", masks, params, NameTable.of_model(self.model))
        before = complete_masks(self.masks, params)
        merged = merge_masks([before, complete_masks(given, params)])
        if all(torch.equal(merged[name], mask) for name, mask in before.items()):
            return False
        self.masks = merged
        self.reached = self.mask_sparsities
        for key in earlier:
            for value in (earlier[key], self.sparsities[key]):  # the exact sparsity, where it rounds to as many weights
                if self.start_sparsity(key, value) == value:
                    self.reached[key] = value
                    break
        return True

    def check_reached(self) -> None:
        """Check that the masks do not hold more than is asked for.

        Raises:
            ValueError: If they do.
        """
        self.selection.check_reached(flatten_masks(self.masks, self.params), self.sparsities)

    def apply_masks(self) -> None:
        """Set the pruned weights to zero."""
        if not self.masks:
            return
        with torch.no_grad():
            for name, p in self.params.items():
                self.masks[name] = self.masks[name].to(p.device)
                local(p).masked_fill_(~part_of(self.masks[name], p), 0)

    def fisher(self, grads: Gradients) -> Fisher | ShardedFisher:
        """Return the Fisher of gradients, which are checked once for each version of a buffer.

        Args:
            grads: A buffer, a tensor [m, d], or m dicts name -> gradient.

        Returns:
            The Fisher, with placeholders for damping and block size; :meth:`choose` sets the real ones.

        Raises:
            ValueError: If the gradients are spread over other processes than the model.
        """
        version = grads.version if isinstance(grads, GradientBuffer) else None
        if self._fisher is None or self._fisher[0] is not grads or self._fisher[1] != version:
            checked, settings = check_grads(grads, self.params, self.device), self.settings
            if isinstance(checked, ShardedBuffer) and checked.replicas.size != self.replicas.size:
                raise ValueError(
                    f"grads: expected gradients of the {self.replicas.size} processes that prune, got those of "
                    f"{checked.replicas.size}; pass process_group=, or the DistributedDataParallel model"
                )
            if isinstance(checked, ShardedBuffer) and not checked.replicas.matches(self.replicas):
                raise ValueError(
                    "grads: expected gradients of the same processes and kind of model (sharded or replicated), got "
                    "those of others"
                )
            options = {"backend": settings["backend"], "precision": settings["precision"], "device": self.device}
            self._fisher = grads, version, fisher_of(checked, **options)
        return self._fisher[2]

    def _prepare(
        self, grads: Gradients | None, sparsities: Sparsities, selection: Selection | None = None
    ) -> tuple[dict[str, nn.Parameter], Tensor, Tensor | None, Plan]:
        """Return the parameters as they are now, the weights [d], zero where pruned, the mask [d], and the step."""
        params, settings = self.params, self.settings
        device, selection = _check_parameters(params), selection or self.selection
        if device != self.device:  # the model was moved
            self.device, self._fisher = device, None
        selection.to(device)
        active, criterion = flatten_masks(self.masks, params), CRITERIA[settings["criterion"]]
        weights = torch.cat([whole(p).reshape(-1).to(device, torch.float32) for p in params.values()])
        if active is not None:
            weights.masked_fill_(~active, 0)
        substeps = settings["substeps"]
        plan = Plan(
            selection=selection,
            sparsities=sparsities,
            criterion=criterion,
            update=self.with_update(self.reached, sparsities)["update"],
            substeps=criterion.num_substeps(
                selection.num_substeps(active, sparsities) if substeps == "auto" else substeps
            ),
            kernels=self.kernels,
            dense=frozenset(grads.unreached if criterion.needs_gradients and isinstance(grads, GradientBuffer) else ()),
        )
        return params, weights, active, plan

    def choose(
        self,
        grads: Gradients,
        sparsities: Sparsities,
        measure: Callable[[], float] | None = None,
        progress: bool = False,
        selection: Selection | None = None,
    ) -> tuple[Fisher, list[Candidate]]:
        """Turn damping and block size of the settings into numbers, for a step to ``sparsities``.

        Args:
            grads: The gradients of the step.
            sparsities: Key -> sparsity.
            measure: Returns the loss of the model as it is, by which ``"auto"`` judges; None: it only predicts.
            progress: Show a progress bar of ``"auto"``.
            selection: Another than that of the settings.

        Returns:
            The Fisher with these settings, and the candidates that ``"auto"`` tried.
        """
        with torch.no_grad():
            params, weights, active, plan = self._prepare(grads, sparsities, selection)
            return self._choose(grads, params, weights, active, plan, measure, progress)

    def _choose(
        self,
        grads: Gradients,
        params: Mapping[str, Tensor],
        weights: Tensor,
        active: Tensor | None,
        plan: Plan,
        measure: Callable[[], float] | None,
        progress: bool,
    ) -> tuple[Fisher, list[Candidate]]:
        settings = self.settings
        loss_with = None
        if measure is not None:
            measure()  # of the model as it is: batches whose loss is finite now are the judges
            loss_with = partial(loss_at, params, measure)
        return choose_settings(
            self.fisher(grads), weights, active, plan, settings["damping"], settings["block_size"], loss_with, progress
        )

    def predict(
        self, grads: Gradients, fisher: Fisher, sparsities: Sparsities, selection: Selection
    ) -> tuple[Tensor, Tensor, float | None]:
        """Predict a step without touching the model.

        Args:
            grads: The gradients of the step.
            fisher: Their Fisher, from :meth:`choose`.
            sparsities: Key -> sparsity.
            selection: Units and segments.

        Returns:
            The weights after it, [d] float32; its mask, [d] bool; and ½ δᵀFδ.
        """
        with torch.no_grad():
            _, weights, active, plan = self._prepare(grads, sparsities, selection)
            kept, loss = prune_vector(weights, active, fisher, plan)
        return weights, kept, loss

    def step(
        self,
        grads: Gradients | None,
        sparsities: Sparsities,
        measure: Callable[[], float] | None = None,
        progress: bool = False,
    ) -> PruneResult:
        """Prune the model in one step, under one set of gradients.

        Args:
            grads: Gradients; None for a criterion that needs none.
            sparsities: Key -> sparsity.
            measure: See :meth:`choose`.
            progress: Show a progress bar of ``"auto"``.

        Returns:
            The result, which is also ``self.result``.

        Raises:
            TypeError: If the gradients are of the wrong type.
            ValueError: If gradients are missing or do not fit, or the sparsity is below what the masks hold.
            RuntimeError: If the update is not finite. Model, masks and result are unchanged then, as after any error
                before the weights are written.
        """
        criterion = self.settings["criterion"]
        if grads is None and CRITERIA[criterion].needs_gradients:
            raise ValueError(f"grads: expected gradients for criterion={criterion!r}, got None")
        seconds: dict[str, float] = {}
        fisher, candidates = None, []
        with torch.no_grad(), timed(seconds, "total"):
            params, weights, active, plan = self._prepare(grads, sparsities)
            if grads is not None:
                with timed(seconds, "settings"):
                    fisher, candidates = self._choose(grads, params, weights, active, plan, measure, progress)
            kept, loss = prune_vector(weights, active, fisher, plan, seconds)
            advice = "" if fisher is None else f" with damping={fisher.damping:g}; raise the damping"
            sizes = [p.numel() for p in params.values()]
            parts = zip(params, kept.split(sizes), strict=True)
            masks = {name: part.view(params[name].shape).clone() for name, part in parts}
            result = PruneResult(
                masks=masks,
                layers=count_kept(masks),
                sparsity=sparsity_of(masks),
                predicted_loss_increase=loss,
                damping=None if fisher is None else fisher.damping,
                block_size=None if fisher is None else fisher.block_size,
                substeps=plan.substeps,
                candidates=candidates,
                seconds=seconds,
                backend=backend_name(plan.kernels),
            )
            self.replicas.check_same(
                "grads: expected the same gradients on all ranks, or those of collect_gradients with their process "
                "group, got new weights", {"weights": weights, "mask": kept},
            )  # fmt: skip
            self._commit(params, weights.split(sizes), result, sparsities, plan.dense, advice)
        self._warn_of_empty_layers(result.layers, sparsities)
        return result

    def _commit(
        self,
        params: Mapping[str, Tensor],
        weights: Sequence[Tensor],
        result: PruneResult,
        sparsities: Sparsities,
        unreached: frozenset[str],
        advice: str,
    ) -> None:
        """Write weights, masks and result, all or nothing, also if it is interrupted."""
        new = {}
        for (name, p), flat in zip(params.items(), weights, strict=True):
            # In the parameter's own type: a weight that did not move keeps all its digits, and float16 may overflow.
            values = flat.view(p.shape)
            old = whole(p)
            same = result.masks[name] & (old.float() == values)
            new[name] = torch.where(same, old, values).to(p.dtype)
        if not all(torch.isfinite(x).all() for x in new.values()):
            raise RuntimeError(f"update: expected finite weights, got NaN or infinity{advice}")
        for name, x in new.items():
            if self._chosen.targets[name].divides_by_zero(x):
                raise RuntimeError(
                    f"update: expected weights whose norms are not zero, got {name!r} with a part pruned whole that is "
                    "divided by its norm; remove the weight norm, prune less, or leave it out with exclude="
                )

        def write() -> None:
            for name, x in new.items():
                local(params[name]).copy_(part_of(x, params[name]))
            self.masks, self.reached, self.result = dict(result.masks), dict(sparsities), result
            self.unreached = unreached

        write_whole(write)
        torch.clear_autocast_cache()

    def _warn_of_empty_layers(self, layers: list[tuple[str, int, int]], sparsities: Sparsities) -> None:
        """Warn of parameters that a global ranking has emptied; none of those whose sparsity was to be 1."""
        meant = {name for key, names in self._members.items() if sparsities[key] == 1 for name in names}
        empty = [name for name, n, kept in layers if kept == 0 and n > 0 and name not in meant]
        if empty and self.settings["scope"] == "global":
            warn(
                f"sparsity: scope='global' leaves no weight in {shorten(empty, 3)}, which may cut the network in two; "
                "max_layer_sparsity= bounds the sparsity of each layer"
            )

    def source(self, batches: Any, loss_fn: Callable[[Any, Any], Tensor] | None) -> GradientSource:
        """Return a source of gradients with the settings.

        Args:
            batches: Iterable of batches.
            loss_fn: Loss of (outputs, targets), or None.

        Returns:
            The source; no batch is drawn yet.

        Raises:
            TypeError: If an argument is of the wrong type.
            ValueError: If a value is wrong, or the model is one of several processes.
        """
        settings = self.settings
        check_grads_device("grads_device", settings["grads_device"], self.device)
        if self.chooses and least_num_grads(settings["num_grads"]) < MIN_GRADS:
            raise ValueError(f"num_grads: expected at least {MIN_GRADS} for 'auto', got {settings['num_grads']}")
        if settings["refresh"] is not None:
            check_int("refresh", settings["refresh"], 1, least_num_grads(settings["num_grads"]))
        count = num_grads_at(settings["num_grads"], self.selection.overall(self.reached))
        return GradientSource(
            batches,
            loss_fn,
            num_grads=count,
            refresh=self.num_refresh(count),
            dtype=settings["dtype"],
            device=settings["grads_device"],
            mode=settings["mode"],
            forward=settings["forward"],
            replicas=self.replicas,
            unit=self._shard_unit(),
        )

    def _shard_unit(self) -> int:
        """Columns of the Fisher that have to be on one rank: those of a block."""
        block_size = self.settings["block_size"]
        return max(BLOCK_SIZES) if block_size == "auto" else block_size or 1

    def resize(self, source: GradientSource) -> None:
        """Let a source collect as many gradients as the settings say for the sparsity now; all are new then."""
        count = num_grads_at(self.settings["num_grads"], self.selection.overall(self.reached))
        if count != source.num_grads:
            source.resize(count, self.num_refresh(count))

    def with_update(self, start: Sparsities, end: Sparsities) -> dict[str, Any]:
        """Return the settings with the update that ``"auto"`` stands for on the way between two sparsities."""
        auto = "joint" if num_halvings(start, end) > 1 + 1e-9 else "none"  # half of them: none, whatever the rounding
        return {**self.settings, "update": auto} if self.settings["update"] == "auto" else self.settings

    @property
    def chooses(self) -> bool:
        """Whether ``"auto"`` has a damping or block size to choose."""
        return "auto" in (self.settings["damping"], self.settings["block_size"])

    def num_refresh(self, num_grads: int) -> int:
        """Return how many of m gradients are new at each recomputation; with corrections more come at the end."""
        given = self.settings["refresh"]
        return max(1, num_grads // (8 if self.corrections else 4)) if given is None else given

    def num_backward_passes(self, num_grads: int, refresh: int, recomputations: int, corrections: int) -> int:
        """Return how many gradients an update takes: m, those renewed on its way, and those of final corrections."""
        part = split_evenly(refresh, corrections)[-1] if corrections else 0
        return num_grads + (recomputations - 1) * refresh + self.settings["final_corrections"] * part

    def takes_gradients(self, update: str) -> bool:
        """Return whether gradients would change anything: they choose the weights, or move those that are kept."""
        return (
            CRITERIA[self.settings["criterion"]].needs_gradients or update != "none" or self.num_corrections(update) > 0
        )

    @property
    def storage(self) -> torch.device | Path:
        """Where gradients are kept."""
        return check_grads_device("grads_device", self.settings["grads_device"], self.device)

    @property
    def corrections(self) -> int:
        """Corrections at each recomputation, as :meth:`num_corrections` of the settings."""
        return self.num_corrections(self.settings["update"])

    def num_corrections(self, update: str) -> int:
        """Return the corrections at each recomputation. Unasked only the joint update is given any."""
        given = self.settings["corrections"]
        return int(update in ("joint", "auto")) if given is None else given

    def correct(
        self,
        grads: Gradients,
        measure: Callable[[], float],
        newest: int | None = None,
        descent: Descent | None = None,
        progress: bool = False,
    ) -> Correction:
        """Move the kept weights S by -η F_SS⁻¹ ḡ_S, the linear term that the last step's model left out.

        Args:
            grads: The gradients of that step.
            measure: Returns the loss that judges a step length.
            newest: ḡ is the mean of so many newest rows of a buffer; None: of all rows.
            descent: From the corrections before; written.
            progress: Show a progress bar.

        Returns:
            What was done.
        """
        with torch.no_grad():
            params, result = self.params, self.result
            kept = flatten_masks(self.masks, params)
            fisher = self.fisher(grads).replace(active=kept, damping=result.damping, block_size=result.block_size)
            buffered = isinstance(grads, GradientBuffer)
            mean = grads.mean(newest) if buffered else fisher.grads.mean(0, dtype=torch.float32)
            direction = fisher.inverse_product(mean.to(self.device)).masked_fill_(~kept, 0)
            descent = descent or Descent()
            if descent.direction is not None:
                direction.add_(descent.direction.masked_fill_(~kept, 0), alpha=MOMENTUM)
            length, start = float(direction.norm()), descent.step_length
            if not 0 < length < math.inf:
                return Correction(0.0, math.nan, math.nan, 0)
            if start is None:  # moves the weights by some share of their length
                start = FIRST_LENGTH * math.hypot(*(float(whole(p).norm()) for p in params.values())) / length
            done = correct(params, direction, measure, start, progress)
            if done.evaluations == 1:
                warn(
                    "corrections: expected batches of finite loss to judge them, got none; the weights stay as they are"
                )
            descent.direction = direction if done.step_length else None
            descent.step_length = done.step_length or descent.step_length
            return done

    def release(self) -> None:
        """Let the gradients of the last step go."""
        self._fisher = None

    def leave_result(self, error: BaseException, steps: Sequence[PruneStep] = ()) -> None:
        """Put what the masks say into ``error.result``, and a note about it into its traceback.

        Args:
            error: What interrupted a step or run.
            steps: The steps that were made.
        """
        result = self.result or PruneResult(
            masks=dict(self.masks),
            layers=count_kept(self.masks),
            sparsity=self.sparsity,
            backend=backend_name(self.kernels),
        )
        result.steps = list(steps)
        error.result = result  # type: ignore[attr-defined]
        if hasattr(error, "add_note"):  # Python 3.11
            error.add_note(
                f"mfac: the model is pruned to {result.sparsity:.1%}, as error.result.masks says; "
                "masks=error.result.masks goes on from there"
            )


def _sparsity_of_weights(params: Mapping[str, Tensor]) -> float:
    return sum(int((whole(p) == 0).sum()) for p in params.values()) / max(sum(p.numel() for p in params.values()), 1)


def _check_parameters(params: Mapping[str, Tensor]) -> torch.device:
    devices = {p.device for p in params.values()}
    if len(devices) > 1:
        raise ValueError(f"model: expected parameters on one device, got {', '.join(sorted(map(str, devices)))}")
    if torch.device("meta") in devices:
        raise ValueError("model: expected parameters with data, got them on the meta device")
    for name, p in params.items():
        if not p.is_floating_point():
            raise TypeError(f"model: expected floating point parameters, got {p.dtype} for {name!r}")
        if not torch.isfinite(whole(p)).all():
            raise ValueError(f"model: expected finite weights, got NaN or infinity in {name!r}")
    return devices.pop()
