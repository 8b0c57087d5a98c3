"""The settings of pruning; :mod:`mfac.settings` says how they are used."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, TypedDict

from torch import Tensor

from mfac.checks import check_choice, check_int, check_sparsity
from mfac.fisher import DEFAULT_BLOCK_SIZE, DEFAULT_DAMPING, PRECISIONS
from mfac.gradients.buffer import GradientBuffer
from mfac.gradients.settings import CommonSettings, ForwardSettings, SourceSettings
from mfac.ops.arguments import check_block_size, check_damping
from mfac.ops.backend import BACKENDS
from mfac.pruning.criteria import CRITERIA
from mfac.pruning.patterns import parse_pattern
from mfac.pruning.schedule import CURVES
from mfac.settings import Setting, checked_later, count_from, definitions, one_of, optional

SCOPES = ("global", "layer")
UPDATES = ("joint", "independent", "none", "auto")
_MAX_ROUNDS = 10_000  # of sub-steps and of recomputations; more would only run for days


def _damping(name: str, value: Any) -> float | str:
    if isinstance(value, str) and value == "auto":
        return value
    factor = check_damping(name, value)
    return value if isinstance(value, str) else factor


def _block_size(name: str, value: Any) -> int | str | None:
    if isinstance(value, str):
        if value != "auto":
            raise ValueError(f"{name}: expected an int, None or 'auto', got {value!r}")
        return value
    return check_block_size(name, value, also=", None or 'auto'")


def _substeps(name: str, value: Any) -> int | str:
    if isinstance(value, str):
        return check_choice(name, value, ("auto",))
    return check_int(name, value, 1, _MAX_ROUNDS, also=" or 'auto'")


def _recomputations(name: str, value: Any) -> int | str:
    if isinstance(value, str):
        return check_choice(name, value, ("auto",))
    return check_int(name, value, 1, _MAX_ROUNDS, also=" or 'auto'")


def _num_grads(name: str, value: Any) -> int | dict[float, int]:
    if not isinstance(value, Mapping):
        return check_int(name, value)
    counts = {check_sparsity(name, key): check_int(name, count) for key, count in value.items()}
    if 0.0 not in counts:
        raise ValueError(f"{name}: expected {{sparsity: number}} with the sparsity 0.0, got {value!r:.80}")
    return dict(sorted(counts.items()))


def num_grads_at(num_grads: int | Mapping[float, int], sparsity: float) -> int:
    """Return the number of gradients for an update that starts from a sparsity.

    Args:
        num_grads: m, or m by the sparsity from which on it counts.
        sparsity: The sparsity now.

    Returns:
        m.
    """
    if not isinstance(num_grads, Mapping):
        return num_grads
    return num_grads[max(key for key in num_grads if key <= sparsity)]


def least_num_grads(num_grads: int | Mapping[float, int]) -> int:
    """Return the smallest number of gradients that :func:`num_grads_at` may give."""
    return min(num_grads.values()) if isinstance(num_grads, Mapping) else num_grads


def _initial_sparsity(name: str, value: Any) -> float | str:
    if isinstance(value, str):
        return check_choice(name, value, ("current",))
    return check_sparsity(name, value)


def _pattern(name: str, value: Any) -> Any:
    parse_pattern(value)
    return value if isinstance(value, str) else [int(x) for x in value]


def _masks(name: str, value: Any) -> Any:
    if isinstance(value, str):
        return check_choice(name, value, ("nonzero",))
    if value is not None and not isinstance(value, Mapping):
        raise TypeError(f"{name}: expected name -> bool tensor, 'nonzero' or None, got {type(value).__name__}")
    return value or None


def _buffer(name: str, value: Any) -> Any:
    if value is not None and not isinstance(value, GradientBuffer):
        raise TypeError(f"{name}: expected a GradientBuffer, got {type(value).__name__}")
    return value


class MethodSettings(CommonSettings, total=False):
    """How a step is made."""

    scope: Annotated[
        str,
        Setting(
            "global",
            one_of(SCOPES),
            '``"global"`` ranks all weights together (those of one key, for a dict of sparsities), ``"layer"`` each '
            "parameter by itself.",
        ),
    ]
    max_layer_sparsity: Annotated[
        float | None,
        Setting(None, optional(check_sparsity), "Bound of the sparsity of each parameter when ranked globally."),
    ]
    criterion: Annotated[
        str,
        Setting(
            "fisher",
            one_of(CRITERIA),
            'The saliency: ``"fisher"``, or ``"magnitude"`` (the absolute value; for groups the sum of squares), which '
            "needs no gradients and then updates nothing; with batches the ``update`` is that of their "
            "gradients, which are collected only where it is not none.",
        ),
    ]
    update: Annotated[
        str,
        Setting(
            "joint",
            one_of(UPDATES),
            '``"joint"``: the exact minimum of the quadratic model given the mask. ``"independent"``: the sum of '
            'single-weight updates, as published. ``"none"``: only zeros. ``"auto"``: joint where more than half of '
            "the weights (of any key, if sparsities are a dict) go at once, else none: training makes up for small "
            "steps by itself, and ends lower if each of many moves all weights.",
        ),
    ]
    substeps: Annotated[
        int | str,
        Setting(
            "auto",
            _substeps,
            "S: a step is made in S sub-steps of selection and update under the same gradients, so that each selection "
            "accounts for the weights already removed. Each costs less than the one before, and all together keep up "
            'to 1 GiB of small matrices meanwhile. ``"auto"``: 2 for each halving of the weights, 4 for N:M and 8 for '
            "blocks, at least 1 and at most 16: 5 from dense to 0.8, 1 for each of 16 recomputations to 0.9. (Always 1 "
            "where scores do not change between them, as for magnitude.)",
        ),
    ]
    damping: Annotated[
        float | str,
        Setting(
            DEFAULT_DAMPING,
            _damping,
            'λ in [1e-30, 1e30]; ``"<number>*mean"``, relative to the mean square of the gradients; or ``"auto"``: '
            "that of some ten trial steps whose loss on 16 fresh batches is the lowest. Without batches, and over "
            "several recomputations: the default, unless steps computed from three quarters of the gradients show, on "
            "the remaining quarter, that another value is clearly better; it is chosen once, and is relative to the "
            "gradients from then on.",
        ),
    ]
    block_size: Annotated[
        int | str | None,
        Setting(
            DEFAULT_BLOCK_SIZE,
            _block_size,
            'B, columns per block of F; None for the full matrix; ``"auto"`` as for ``damping``. ``"auto"`` takes as '
            "long as some 10 steps, for both together.",
        ),
    ]
    masks: Annotated[
        Mapping[str, Tensor] | str | None,
        Setting(
            None,
            _masks,
            "Where to start from: name -> bool tensor, True = kept, from an earlier result (parameters without a mask "
            'are dense), or ``"nonzero"``: what is zero in the model is pruned. What is pruned stays pruned, and the '
            "Fisher is restricted to the rest.",
        ),
    ]
    backend: Annotated[
        str, Setting("auto", one_of(BACKENDS), '``"auto"``, ``"compiled"`` (never falls back) or ``"reference"``.')
    ]
    precision: Annotated[
        str,
        Setting(
            "highest",
            one_of(PRECISIONS),
            '``"highest"``, or, for speed on a GPU or a CPU with AMX, ``"high"`` or ``"medium"``; see :mod:`mfac.ops`.',
        ),
    ]


class StepSettings(MethodSettings, total=False):
    """What is pruned together, and how a step is made."""

    pattern: Annotated[
        str | Sequence[int],
        Setting(
            "unstructured",
            _pattern,
            '``"unstructured"``; ``"N:M"`` (N kept of M neighbouring input channels); ``"block4"`` (4 of them '
            "together); or ``[rows, cols]`` (blocks of output by input channels). Convolutions are grouped at each "
            "position of the kernel. Groups are scored as such, ½ w_Pᵀ ([F⁻¹]_PP)⁻¹ w_P. Weights that do not fill a "
            "group stay dense, and the sparsity counts the weights in whole groups: 0.5 for all groups of 2:4, less "
            "for some of them.",
        ),
    ]


class GradientSettings(TypedDict, total=False):
    """How many gradients, and how often they are renewed."""

    num_grads: Annotated[
        int | Mapping[float, int],
        Setting(
            256,
            _num_grads,
            "m, gradients of the Fisher; one batch gives one gradient. Or {sparsity: m}, with 0.0 among the keys: m "
            "counts for updates that start from that sparsity or more.",
        ),
    ]
    refresh: Annotated[
        int | None,
        Setting(
            None,
            optional(count_from()),
            "How many of them are new at each recomputation after the first, in [1, m], the others being kept (rolling "
            "gradients); None: a quarter, or an eighth where ``corrections`` may be made. ``num_grads`` for all.",
        ),
    ]
    recomputations: Annotated[
        int | str,
        Setting(
            1,
            _recomputations,
            "R: the sparsity is reached in R steps at equal ratios of the remaining weights, with new gradients at "
            "each. A big jump at once defeats every quadratic model; collecting gradients is most of the cost, "
            '``num_grads + (R - 1) · refresh`` backward passes before the final corrections. ``"auto"``: 2 for each '
            "halving of the weights, rounded, at least 1 and at most 16: 1 from dense to 35 %, 7 from there to 95 %.",
        ),
    ]


class JudgeSettings(TypedDict, total=False):
    """What judges a natural-gradient correction."""

    correction_batches: Annotated[
        int, Setting(8, count_from(), "Batches, new ones each time, whose mean loss judges a correction.")
    ]


class CorrectionSettings(JudgeSettings, total=False):
    """The linear term of the quadratic model: natural-gradient corrections of the kept weights."""

    corrections: Annotated[
        int | None,
        Setting(
            0,
            optional(count_from(0, _MAX_ROUNDS)),
            "Natural-gradient corrections at each recomputation. The quadratic model assumes that the gradient is "
            "zero, which pruning makes false; so the kept weights S are moved by -η F_SS⁻¹ ḡ_S, with ḡ the mean of the "
            "newest gradients and η the best of a few by the loss of ``correction_batches``, or 0 if none lowers it. "
            "With more than one, the ``refresh`` new gradients come in as many parts, each followed by a correction; "
            "the first recomputation makes one. "
            "0: none. None: one where the update is joint, and none elsewhere.",
        ),
    ]
    final_corrections: Annotated[
        int,
        Setting(
            0,
            count_from(0, _MAX_ROUNDS),
            "As many more at the end, under the final masks, each with new gradients, as many as a part has; none "
            "without ``corrections``.",
        ),
    ]


class PruneStepSettings(StepSettings, JudgeSettings, ForwardSettings, total=False):
    """The settings of :func:`mfac.prune_step`."""


class PruneSettings(StepSettings, GradientSettings, CorrectionSettings, SourceSettings, total=False):
    """The settings of :func:`mfac.prune`."""

    batchnorm_batches: Annotated[
        int,
        Setting(
            0,
            count_from(0),
            "Re-estimate the statistics of BatchNorm from so many batches at the end, and keep the new ones if they do "
            "not raise the loss; 0: leave them.",
        ),
    ]


def _in_training(name: str, default: Any) -> Setting:
    """Return a setting of :func:`mfac.prune` with another default."""
    return replace(definitions(PruneSettings)[name], default=default)


class PrunerSettings(StepSettings, GradientSettings, CorrectionSettings, SourceSettings, total=False):
    """The settings of :class:`mfac.Pruner`. Four have other defaults than in `prune`, because training follows."""

    update: Annotated[str, _in_training("update", "auto")]
    recomputations: Annotated[int | str, _in_training("recomputations", "auto")]
    corrections: Annotated[int | None, _in_training("corrections", None)]
    correction_batches: Annotated[int, _in_training("correction_batches", 4)]
    initial_sparsity: Annotated[
        float | str,
        Setting(
            0.0,
            _initial_sparsity,
            'Sparsity at the first update; ``"current"``: that of the ``masks``, of each key by itself.',
        ),
    ]
    start: Annotated[float, Setting(0, checked_later, "Time of the first update, which gives ``initial_sparsity``.")]
    frequency: Annotated[
        float, Setting(1, checked_later, "Time between updates, due at start, start + frequency, ... and end.")
    ]
    schedule: Annotated[
        str, Setting("cubic", one_of(CURVES), f"How sparsity rises: {', '.join(f'``{c!r}``' for c in CURVES)}.")
    ]
    buffer: Annotated[
        GradientBuffer | None,
        Setting(None, _buffer, "A :class:`GradientBuffer` that the training loop feeds, in place of ``batches``."),
    ]
