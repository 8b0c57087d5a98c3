"""The engine that every entry point drives: a model, its masks, and steps under the quadratic model of the loss."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from mfac.checks import warn
from mfac.fisher import Fisher
from mfac.gradients.buffer import GradientBuffer, check_grads_device
from mfac.gradients.source import GradientSource
from mfac.model.distributed import refuse_distributed, refuse_sharded
from mfac.model.names import NameTable, named_parameters
from mfac.model.targets import prunable_parameters
from mfac.ops import compiled
from mfac.ops.backend import select_backend
from mfac.pruning.auto import choose_settings
from mfac.pruning.criteria import CRITERIA
from mfac.pruning.masks import check_masks, flatten_masks
from mfac.pruning.quadratic import Plan, prune_vector, timed
from mfac.pruning.result import PruneResult, PruneStep
from mfac.pruning.schedule import interpolate_targets
from mfac.pruning.selection import Selection, Targets, parse_sparsity

_NOTABLE_ZEROS = 0.01  # sparsity of a model without masks from which on a warning is due


class Engine:
    """A model to be pruned: what of it, to which sparsity, what is pruned already, and what that has cost.

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
        masks: Name -> bool tensor, True = kept; empty while nothing is pruned.
        targets: Key -> sparsity that was asked for; the key is None for a single number.
        reached: Key -> sparsity that the masks were made for.
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
        refuse_sharded(model)
        given = settings["params"]
        chosen = prunable_parameters(model, names if given is None else given, settings["exclude"])
        table = NameTable.of_model(model)
        self.targets, members = parse_sparsity(sparsity, list(chosen), table)
        if only_keys and given is None and names is None and None not in members:
            found = [name for name in chosen if any(name in part for part in members.values())]
            chosen = prunable_parameters(model, found)
        self.model, self.names, self.settings = model, list(chosen), dict(settings)
        self.device = _check_parameters(chosen)
        self._chosen, self._members = chosen, members
        written = [*(given or ()), *(key for key in self.targets if key is not None)]
        self._named = {name for entry in written if not entry.startswith("re:") for name in table.find(entry)}
        self.selection = self.select_by(settings["pattern"])
        self.selection.check_targets(self.targets)
        select_backend(settings["backend"], self.device)  # refused here rather than after an hour
        self.masks: dict[str, Tensor] = {}
        if settings["masks"] is not None:
            masks = check_masks("masks", settings["masks"], chosen, table)
            self.masks = {n: masks[n].to(p.device) if n in masks else torch.ones_like(p, dtype=torch.bool)
                          for n, p in chosen.items()}  # fmt: skip
        else:
            self._warn_of_zeros()
        self.reached: Targets = self.selection.reached(flatten_masks(self.masks, chosen))
        self.result: PruneResult | None = None
        self._fisher: tuple[Any, int | None, Fisher] | None = None  # gradients, their version, their Fisher

    def select_by(self, pattern: str | Sequence[int]) -> Selection:
        """Return how the parameters are selected under a pattern."""
        settings = self.settings
        return Selection(
            self._chosen, self._members, settings["scope"], pattern, self._named, settings["max_layer_sparsity"]
        )

    @property
    def params(self) -> dict[str, nn.Parameter]:
        """The parameters as they are now."""
        every = named_parameters(self.model)
        missing = [name for name in self.names if name not in every]
        if missing:
            raise ValueError(f"model: expected a parameter {missing[0]!r}, which it had before, got none of that name")
        return {name: every[name] for name in self.names}

    @property
    def kernels(self) -> ModuleType:
        """What computes: :mod:`mfac.ops.compiled` or :mod:`mfac.ops.reference`."""
        return select_backend(self.settings["backend"], self.device)

    @property
    def sparsity(self) -> float:
        """Sparsity of the masks, over all chosen parameters."""
        if not self.masks:
            return 0.0
        return 1 - sum(int(m.sum()) for m in self.masks.values()) / sum(m.numel() for m in self.masks.values())

    def _warn_of_zeros(self) -> None:
        """Warn of a sparse model that comes without masks: its zeros would come back."""
        weights = sum(p.numel() for p in self._chosen.values())
        zeros = sum(int((p == 0).sum()) for p in self._chosen.values())
        if zeros > _NOTABLE_ZEROS * weights:
            warn(
                f"model: {zeros / weights:.1%} of the weights are zero, but there are no masks to keep them so; "
                "masks='nonzero' goes on from what is zero, masks= from an earlier result"
            )

    def fisher(self, grads: GradientBuffer | Tensor | Sequence[Mapping[str, Tensor]]) -> Fisher:
        """Return the Fisher of gradients in the order of the parameters, which are checked once.

        Args:
            grads: A buffer, a tensor [m, d], or m dicts name -> gradient.

        Returns:
            It, with a damping of 1 for the whole vector; :func:`choose_settings` sets the real one.

        Raises:
            TypeError: If it is none of these.
            ValueError: If names, shapes or devices do not fit, or a number is not finite.
        """
        version = grads.version if isinstance(grads, GradientBuffer) else None
        if self._fisher is None or self._fisher[0] is not grads or self._fisher[1] != version:
            matrix, settings = _gradient_matrix(grads, self.params, self.device), self.settings
            options = {"backend": settings["backend"], "precision": settings["precision"], "device": self.device}
            self._fisher = grads, version, Fisher(matrix, 1.0, **options)
        return self._fisher[2]

    def _plan(self, targets: Targets, grads: Any, selection: Selection | None = None) -> Plan:
        settings, criterion = self.settings, CRITERIA[self.settings["criterion"]]
        unreached = grads.unreached if isinstance(grads, GradientBuffer) else ()
        return Plan(
            selection=selection or self.selection,
            targets=targets,
            criterion=criterion,
            update=settings["update"],
            substeps=criterion.num_substeps(settings["substeps"]),
            kernels=self.kernels,
            dense=frozenset(unreached),
        )

    def _weights(self, params: Mapping[str, Tensor], active: Tensor | None) -> Tensor:
        """The weights as one float32 vector [d], zero where pruned before."""
        weights = torch.cat([p.detach().reshape(-1).to(self.device, torch.float32) for p in params.values()])
        return weights if active is None else weights.masked_fill_(~active, 0)

    def _refresh_device(self) -> dict[str, nn.Parameter]:
        """Follow a model that was moved; return its parameters."""
        params = self.params
        device = _check_parameters(params)
        if device != self.device:
            self.device, self._fisher = device, None
        self.selection.to(device)
        return params

    def predict(
        self,
        grads: GradientBuffer | Tensor | Sequence[Mapping[str, Tensor]],
        fisher: Fisher,
        targets: Targets,
        selection: Selection,
    ) -> tuple[float, float]:
        """Return (sparsity, ½ δᵀFδ) of a step, without touching the model."""
        params = self._refresh_device()
        with torch.no_grad():
            active = flatten_masks(self.masks, params)
            plan = self._plan(targets, grads, selection)
            kept, loss = prune_vector(self._weights(params, active), active, fisher, plan)
        return 1 - int(kept.sum()) / len(kept), loss

    def choose(
        self, grads: Any, targets: Targets, progress: bool = False, selection: Selection | None = None
    ) -> tuple[Fisher, list]:
        """Return the Fisher with the damping and block size of the settings, for a step to ``targets``."""
        params = self._refresh_device()
        with torch.no_grad():
            active = flatten_masks(self.masks, params)
            plan, settings = self._plan(targets, grads, selection), self.settings
            weights = self._weights(params, active)
            return choose_settings(
                self.fisher(grads), weights, active, plan, settings["damping"], settings["block_size"], progress
            )

    def step(self, grads: GradientBuffer | Tensor | Sequence[Mapping[str, Tensor]] | None, targets: Targets,
             progress: bool = False) -> PruneResult:  # fmt: skip
        """Prune the model to the targets in one step, under one set of gradients.

        Args:
            grads: Gradients; None for a criterion that needs none.
            targets: Key -> sparsity.
            progress: Show a progress bar of ``"auto"``.

        Returns:
            The result, which is also ``self.result``.

        Raises:
            TypeError: If the gradients are of the wrong type.
            ValueError: If gradients are missing or do not fit, or the sparsity is below what the masks hold.
            RuntimeError: If the update is not finite. The model and masks are unchanged then, as after any error.
        """
        settings, params = self.settings, self._refresh_device()
        if grads is None and CRITERIA[settings["criterion"]].needs_gradients:
            raise ValueError(f"grads: expected gradients for criterion={settings['criterion']!r}, got None")
        seconds: dict[str, float] = {}
        fisher, candidates = None, []
        with torch.no_grad(), timed(seconds, "total"):
            active = flatten_masks(self.masks, params)
            plan, weights = self._plan(targets, grads), self._weights(params, active)
            if grads is not None:
                with timed(seconds, "settings"):
                    fisher, candidates = choose_settings(
                        self.fisher(grads), weights, active, plan, settings["damping"], settings["block_size"], progress
                    )
            kept, loss = prune_vector(weights, active, fisher, plan, seconds)
            advice = "" if fisher is None else f" with damping={fisher.damping:g}; raise the damping"
            self._commit(params, weights, kept, targets, advice)
        layers = [(name, mask.numel(), int(mask.sum())) for name, mask in self.masks.items()]
        self._warn_of_empty_layers(layers, targets)
        self.result = PruneResult(
            masks=dict(self.masks),
            layers=layers,
            sparsity=1 - int(kept.sum()) / len(kept),
            predicted_loss_increase=loss,
            damping=None if fisher is None else fisher.damping,
            block_size=None if fisher is None else fisher.block_size,
            candidates=candidates,
            seconds=seconds,
            backend="compiled" if self.kernels is compiled else "reference",
        )
        return self.result

    def _commit(
        self, params: Mapping[str, Tensor], weights: Tensor, kept: Tensor, targets: Targets, advice: str
    ) -> None:
        """Write weights [d] and masks, all or nothing, also if it is interrupted."""
        sizes, new, masks = [p.numel() for p in params.values()], {}, {}
        for (name, p), a, k in zip(params.items(), weights.split(sizes), kept.split(sizes), strict=True):
            # In the parameter's own type: a weight that did not move keeps all its digits, and float16 may overflow.
            a, masks[name] = a.view(p.shape).to(p.device), k.view(p.shape).to(p.device, copy=True)
            new[name] = torch.where(masks[name] & (p.detach().float() == a), p.detach(), a).to(p.dtype)
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
                params[name].detach().copy_(x)
            self.masks, self.reached = masks, dict(targets)

        try:
            write()
        except BaseException:  # Ctrl-C in the middle: half of a step must not stay
            write()
            raise

    def _warn_of_empty_layers(self, layers: list[tuple[str, int, int]], targets: Targets) -> None:
        """Warn of parameters that a global ranking has emptied; none of those whose sparsity was to be 1."""
        whole = {name for key, names in self._members.items() if targets[key] == 1 for name in names}
        empty = [name for name, n, kept in layers if kept == 0 and n > 0 and name not in whole]
        if empty and self.settings["scope"] == "global":
            more = f" and {len(empty) - 3} more" if len(empty) > 3 else ""
            warn(
                f"sparsity: scope='global' leaves no weight in {', '.join(empty[:3])}{more}, which may cut the network "
                "in two; max_layer_sparsity= bounds the sparsity of each layer"
            )

    def source(self, batches: Any, loss_fn: Any, announce: bool = False) -> GradientSource:
        """Return a source of gradients with the settings.

        Args:
            batches: Iterable of batches.
            loss_fn: Loss of (outputs, targets), or None.
            announce: Warn if there are fewer batches than gradients.

        Returns:
            It; nothing is drawn yet.

        Raises:
            TypeError: If an argument is of the wrong type.
            ValueError: If a value is wrong, or the model is one of several processes.
        """
        refuse_distributed(self.model)
        settings = self.settings
        check_grads_device("grads_device", settings["grads_device"], self.device)
        m, refresh = settings["num_grads"], settings["refresh"]
        if refresh is not None and refresh > m:
            raise ValueError(f"refresh: expected 1 to num_grads = {m}, got {refresh}")
        return GradientSource(
            batches,
            loss_fn,
            num_grads=m,
            refresh=max(1, m // 4) if refresh is None else refresh,
            dtype=settings["dtype"],
            device=settings["grads_device"],
            mode=settings["mode"],
            forward=settings["forward"],
            announce=announce,
        )

    def run(
        self,
        grads: GradientSource | GradientBuffer | None,
        targets: Targets,
        recomputations: int,
        *,
        finish: Any = None,
        progress: bool = False,
    ) -> PruneResult:
        """Prune to the targets in R steps at equal ratios of the remaining weights, with new gradients at each.

        Args:
            grads: Where gradients come from; a buffer serves for all steps.
            targets: Key -> sparsity.
            recomputations: R.
            finish: Called after the last step; returns the loss then.
            progress: Show progress bars.

        Returns:
            The result of the last step, with all steps of this run; also ``self.result``.

        Raises:
            BaseException: Whatever a step, the model or the batches raise, with the result so far, or None, as
            ``error.result``. The model is pruned as far as the masks say: call again to go on.
            ValueError: If the targets are below what the masks hold; nothing is done then.
        """
        self.selection.check_reached(flatten_masks(self.masks, self._refresh_device()), targets)
        began, origin, settings = time.perf_counter(), dict(self.reached), dict(self.settings)
        steps: list[PruneStep] = []
        candidates: list[Any] = []
        seconds = {"gradients": 0.0}
        self.result = None
        try:
            with tqdm(total=recomputations, desc="pruning", disable=not progress) as bar:
                for r in range(1, recomputations + 1):
                    with timed(seconds, "gradients"):
                        start = time.perf_counter()
                        is_source = isinstance(grads, GradientSource)
                        buffer = grads.collect(self.model, self.names, progress) if is_source else grads
                    if steps and buffer is not None:
                        steps[-1].loss_after = buffer.loss
                    if r == 1 and buffer is not None and "auto" in (settings["damping"], settings["block_size"]):
                        with timed(seconds, "settings"):
                            candidates = self._settle(buffer, targets, progress)
                    result = self.step(buffer, interpolate_targets(origin, targets, r / recomputations))
                    for stage, value in result.seconds.items():
                        seconds[stage] = seconds.get(stage, 0.0) + value
                    steps.append(_describe(result, buffer, grads, r, time.perf_counter() - start))
                    result.steps, result.candidates, result.seconds = steps, candidates or result.candidates, seconds
                    bar.set_postfix(
                        sparsity=f"{result.sparsity:.1%}", loss=f"{steps[-1].loss_before:.3f}", refresh=False
                    )
                    bar.update()
            if finish is not None:
                steps[-1].loss_after = finish()
        except BaseException as error:
            error.result = self.result
            raise
        finally:
            self.settings, self._fisher = settings, None  # "auto" as the user wrote it; the gradients may go
        seconds["total"] = time.perf_counter() - began
        return self.result

    def _settle(self, buffer: GradientBuffer, targets: Targets, progress: bool) -> list[Any]:
        """Replace "auto" in the settings of this run by what it chooses for its end; return the candidates."""
        fisher, candidates = self.choose(buffer, targets, progress)
        if self.settings["damping"] == "auto":
            self.settings["damping"] = f"{fisher.damping / fisher.mean_square!r}*mean"
        self.settings["block_size"] = fisher.block_size
        return candidates


def _describe(result: PruneResult, buffer: GradientBuffer | None, grads: Any, r: int, seconds: float) -> PruneStep:
    """Return the record of the r-th step of a run."""
    increase, fresh, loss = result.predicted_loss_increase, 0, math.nan
    if buffer is not None:
        loss, fresh = buffer.loss, len(buffer)
        if increase is not None and math.isfinite(buffer.samples):
            increase *= buffer.samples
    if isinstance(grads, GradientSource):
        fresh = grads.num_grads if r == 1 else grads.refresh
    return PruneStep(
        sparsity=result.sparsity,
        damping=result.damping,
        block_size=result.block_size,
        new_gradients=fresh,
        loss_before=loss,
        predicted_loss_increase=increase,
        loss_after=math.nan,
        seconds=seconds,
    )


def _check_parameters(params: Mapping[str, Tensor]) -> torch.device:
    devices = {p.device for p in params.values()}
    if len(devices) > 1:
        raise ValueError(f"model: expected parameters on one device, got {', '.join(sorted(map(str, devices)))}")
    if torch.device("meta") in devices:
        raise ValueError("model: expected parameters with data, got them on the meta device")
    for name, p in params.items():
        if not p.is_floating_point():
            raise TypeError(f"model: expected floating point parameters, got {p.dtype} for {name!r}")
        if not torch.isfinite(p).all():
            raise ValueError(f"model: expected finite weights, got NaN or infinity in {name!r}")
    return devices.pop()


def _gradient_matrix(
    grads: GradientBuffer | Tensor | Sequence[Mapping[str, Tensor]], params: Mapping[str, Tensor], device: torch.device
) -> Tensor | GradientBuffer:
    d = sum(p.numel() for p in params.values())
    if isinstance(grads, Sequence) and not isinstance(grads, str):
        grads = _buffer_of_rows(grads, params)
    if isinstance(grads, GradientBuffer):
        if grads.names != list(params):
            raise ValueError(
                f"grads: expected the parameters {', '.join(params)}, got a buffer of {', '.join(grads.names[:8])}"
            )
        if len(grads) == 0:
            raise ValueError("grads: expected at least one gradient, got an empty GradientBuffer")
    elif not isinstance(grads, Tensor):
        raise TypeError(f"grads: expected a GradientBuffer, a tensor or a list of dicts, got {type(grads).__name__}")
    if grads.device not in (device, torch.device("cpu")):
        raise ValueError(f"grads: expected on {device} like the model, or on the CPU, got {grads.device}")
    shape = tuple(grads.shape)
    if len(shape) != 2 or shape[1] != d:
        raise ValueError(f"grads: expected [m, {d}] for these parameters, got shape {list(shape)}")
    return grads


def _buffer_of_rows(rows: Sequence[Mapping[str, Tensor]], params: Mapping[str, Tensor]) -> GradientBuffer:
    buffer = GradientBuffer(max(len(rows), 1), params)
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise TypeError(f"grads[{index}]: expected a dict name -> gradient, got {type(row).__name__}")
        row = NameTable(params).translate(f"grads[{index}]", row)
        if set(row) != set(params):
            wrong = sorted(set(row) ^ set(params))[:4]
            raise ValueError(f"grads[{index}]: expected the names {', '.join(params)}; missing or unknown: {wrong}")
        if not buffer.append_gradients([row[name] for name in params]):
            raise ValueError(f"grads[{index}]: expected finite numbers, got NaN or infinity")
    return buffer
