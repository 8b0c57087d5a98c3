"""The settings of pruning: each is named, documented, checked and given its default here, and nowhere else.

An entry point takes them as ``**settings: Unpack[StepSettings]``, so that type checkers and editors know them, and is
decorated with :func:`accepts`, which checks them, fills in the defaults, and gives the function the signature and
the docstring that ``help()`` shows.
"""

import dataclasses
import difflib
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, TypedDict, TypeVar, get_type_hints

import torch
from torch import Tensor, nn

from mfac.checks import check_choice, check_int, check_sparsity
from mfac.fisher import PRECISIONS, check_fisher_settings
from mfac.gradients.batches import MODES
from mfac.gradients.buffer import GradientBuffer
from mfac.ops.backend import BACKENDS
from mfac.pruning.criteria import CRITERIA
from mfac.pruning.patterns import parse_pattern
from mfac.pruning.schedule import CURVES

SCOPES = ("global", "layer")
UPDATES = ("joint", "independent", "none")

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting.

    Args:
        default: Its value where the user gives none.
        check: Takes name and value; returns the value as it is used, or raises TypeError or ValueError.
        doc: What it means, for the docstrings.
    """

    default: Any
    check: Callable[[str, Any], Any]
    doc: str


def _choice(known: Iterable[str]) -> Callable[[str, Any], str]:
    return lambda name, value: check_choice(name, value, known)


def _count(least: int = 1) -> Callable[[str, Any], int]:
    return lambda name, value: check_int(name, value, least)


def _elsewhere(name: str, value: Any) -> Any:
    return value  # checked by :class:`mfac.Schedule`, or once the model's device is known


def _optional(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    return lambda name, value: None if value is None else check(name, value)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return value


def _names(name: str, value: Any) -> list[str] | None:
    if value is None:
        return None
    if not isinstance(value, Iterable):
        raise TypeError(f"{name}: expected names of parameters or None, got {value!r}")
    return [value] if isinstance(value, str) else list(value)


def _damping(name: str, value: Any) -> float | str:
    if isinstance(value, str) and value == "auto":
        return value
    factor = check_fisher_settings(value, None)
    return value if isinstance(value, str) else factor


def _block_size(name: str, value: Any) -> int | str | None:
    if isinstance(value, str):
        if value != "auto":
            raise ValueError(f"{name}: expected an int, None or 'auto', got {value!r}")
        return value
    return None if value is None else check_int(name, value, also=", None or 'auto'")


def _pattern(name: str, value: Any) -> Any:
    parse_pattern(value)
    return value if isinstance(value, str) else [int(x) for x in value]


def _masks(name: str, value: Any) -> Any:
    if isinstance(value, str):
        return check_choice(name, value, ("nonzero",))
    if value is not None and not isinstance(value, Mapping):
        raise TypeError(f"{name}: expected name -> bool tensor, 'nonzero' or None, got {type(value).__name__}")
    return value or None


def _dtype(name: str, value: Any) -> torch.dtype:
    value = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(value, value) if value is not None else value
    if value not in (torch.float32, torch.bfloat16):
        raise TypeError(f"{name}: expected torch.float32 or torch.bfloat16, got {value!r}")
    return value


def _function(name: str, value: Any) -> Any:
    if value is not None and not callable(value):
        raise TypeError(f"{name}: expected a function or None, got {value!r}")
    return value


def _buffer(name: str, value: Any) -> Any:
    if value is not None and not isinstance(value, GradientBuffer):
        raise TypeError(f"{name}: expected a GradientBuffer, got {type(value).__name__}")
    return value


class StepSettings(TypedDict, total=False):
    """What is pruned, and how a step is made."""

    params: Annotated[
        str | Iterable[str] | None,
        Setting(
            None,
            _names,
            "What to prune: names or ``re:<regex>``; see :func:`mfac.prunable_parameters`. None: the weights of all "
            "layers that can be pruned, or the parameters of the GradientBuffer.",
        ),
    ]
    exclude: Annotated[
        str | Iterable[str] | None, Setting(None, _names, "What of it not to prune, in the same notation.")
    ]
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
    scope: Annotated[
        str,
        Setting(
            "global",
            _choice(SCOPES),
            '``"global"`` ranks all weights together (those of one key, for a dict of sparsities), ``"layer"`` each '
            "parameter by itself.",
        ),
    ]
    max_layer_sparsity: Annotated[
        float | None,
        Setting(None, _optional(check_sparsity), "Bound of the sparsity of each parameter when ranked globally."),
    ]
    criterion: Annotated[
        str,
        Setting(
            "fisher",
            _choice(CRITERIA),
            'The saliency: ``"fisher"``, or ``"magnitude"`` (the absolute value; for groups the sum of squares), which '
            "needs no gradients and then updates nothing; given gradients, they make the ``update``.",
        ),
    ]
    update: Annotated[
        str,
        Setting(
            "joint",
            _choice(UPDATES),
            '``"joint"``: the exact minimum of the quadratic model given the mask. ``"independent"``: the sum of '
            'single-weight updates, as published. ``"none"``: only zeros.',
        ),
    ]
    substeps: Annotated[
        int,
        Setting(
            8,
            _count(),
            "S: a step is made in S sub-steps of selection and update under the same gradients, so that the choice of "
            "weights knows of those that have gone before. Takes S times as long. (1 for magnitude.)",
        ),
    ]
    damping: Annotated[
        float | str,
        Setting(
            "3e-2*mean",
            _damping,
            'λ in [1e-30, 1e30]; ``"<number>*mean"``, relative to the mean square of the gradients; or ``"auto"``: '
            "the best of a few by the loss that a quarter of the gradients predicts for a step made from the others. "
            "Over several recomputations it is chosen once, and is relative to the gradients from then on.",
        ),
    ]
    block_size: Annotated[
        int | str | None,
        Setting(
            512,
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
        str, Setting("auto", _choice(BACKENDS), '``"auto"``, ``"compiled"`` (never falls back) or ``"reference"``.')
    ]
    precision: Annotated[
        str,
        Setting(
            "highest",
            _choice(PRECISIONS),
            '``"highest"``, or, for speed on a GPU, ``"high"`` or ``"medium"``; see :mod:`mfac.ops`. No effect on the '
            "CPU.",
        ),
    ]
    progress: Annotated[bool, Setting(True, _flag, "Show progress bars of what takes long.")]


class GradientSettings(TypedDict, total=False):
    """Where gradients come from and are kept."""

    num_grads: Annotated[int, Setting(256, _count(), "m, gradients of the Fisher; one batch gives one gradient.")]
    refresh: Annotated[
        int | None,
        Setting(
            None,
            _optional(_count()),
            "How many of them are new at each recomputation after the first, in [1, m], the others being kept (rolling "
            "gradients); None: a quarter. ``num_grads`` for all.",
        ),
    ]
    recomputations: Annotated[
        int,
        Setting(
            1,
            _count(),
            "R: the sparsity is reached in R steps at equal ratios of the remaining weights, with new gradients at "
            "each. A big jump at once defeats every quadratic model; collecting gradients is most of the cost, "
            "``num_grads + (R - 1) · refresh`` backward passes.",
        ),
    ]
    mode: Annotated[
        str,
        Setting(
            "eval",
            _choice(MODES),
            '``"eval"``, or ``"train"``: modules are in training mode while gradients are collected (batch statistics, '
            "the running ones staying as they are), which recurrent layers on cuDNN and detection models need.",
        ),
    ]
    forward: Annotated[
        Callable[[nn.Module, Any], Any] | None,
        Setting(
            None,
            _function,
            "For batches that are neither (inputs, targets) nor dicts: ``forward(model, batch)`` returns (outputs, "
            "targets) for ``loss_fn`` or, without one, the loss or an output that has a ``.loss``.",
        ),
    ]
    dtype: Annotated[
        torch.dtype | str, Setting(torch.float32, _dtype, "Type of the gradients, torch.float32 or torch.bfloat16.")
    ]
    grads_device: Annotated[
        torch.device | str | None,
        Setting(
            None,
            _elsewhere,
            'Where they are kept: None for the model\'s device; ``"cpu"`` if they do not fit there; ``"disk"`` or '
            '``"disk:FOLDER"`` for a memory-mapped file.',
        ),
    ]


class PruneSettings(StepSettings, GradientSettings, total=False):
    """The settings of :func:`mfac.prune`."""

    batchnorm_batches: Annotated[
        int,
        Setting(
            0, _count(0), "Re-estimate the statistics of BatchNorm from so many batches at the end; 0: leave them."
        ),
    ]


class PrunerSettings(StepSettings, GradientSettings, total=False):
    """The settings of :class:`mfac.Pruner`."""

    initial_sparsity: Annotated[float, Setting(0.0, _elsewhere, "Sparsity at the first update.")]
    start: Annotated[float, Setting(0, _elsewhere, "Time of the first update.")]
    frequency: Annotated[
        float, Setting(1, _elsewhere, "Time between updates, due at start, start + frequency, ... and end.")
    ]
    schedule: Annotated[
        str, Setting("cubic", _elsewhere, f"How sparsity rises: {', '.join(f'``{c!r}``' for c in CURVES)}.")
    ]
    buffer: Annotated[
        GradientBuffer | None,
        Setting(None, _buffer, "A :class:`GradientBuffer` that the training loop feeds, in place of ``batches``."),
    ]


@functools.cache
def definitions(settings: type) -> dict[str, Setting]:
    """Return the settings of one of the classes above, by name.

    Args:
        settings: ``StepSettings`` or another.

    Returns:
        Name -> definition.
    """
    hints = get_type_hints(settings, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items()}


def accepts(settings: type, **defaults: Any) -> Callable[[Decorated], Decorated]:
    """Give a function or class whose last parameter is ``**settings`` its checks, signature and documentation.

    The settings arrive complete and checked. ``help()`` and completion show each of them with its default, and the
    line ``settings: ...`` in the section Args of the docstring is replaced by what the settings mean.

    Args:
        settings: One of the classes above.
        defaults: Defaults that differ for this entry point.

    Returns:
        The decorator.
    """
    known = {
        name: dataclasses.replace(setting, default=defaults.get(name, setting.default))
        for name, setting in definitions(settings).items()
    }
    hints = get_type_hints(settings)

    def decorate(target: Any) -> Any:
        function = target.__init__ if isinstance(target, type) else target
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]

        @functools.wraps(function)
        def call(*args: Any, **given: Any) -> Any:
            for name in given:
                if name not in known and name not in signature.parameters:
                    close = difflib.get_close_matches(name, [*known, *signature.parameters], n=1)
                    hint = f"; did you mean {close[0]!r}?" if close else ""
                    raise TypeError(f"{target.__name__}() got an unexpected keyword argument {name!r}{hint}")
            others = {name: value for name, value in given.items() if name not in known}
            checked = {
                name: setting.check(name, given[name]) if name in given else setting.default
                for name, setting in known.items()
            }
            with torch.inference_mode(False):  # tensors made here are used outside of the caller's inference mode
                return function(*args, **others, **checked)

        keywords = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=setting.default, annotation=hints[name])
            for name, setting in known.items()
        ]
        call.__signature__ = signature.replace(parameters=[*own, *keywords])  # type: ignore[attr-defined]
        if isinstance(target, type):
            target.__init__ = call  # type: ignore[misc]
            target.__doc__ = _documented(target.__doc__ or "", known)
            return target
        call.__doc__ = _documented(function.__doc__ or "", known)
        return call

    return decorate


def _documented(doc: str, known: Mapping[str, Setting]) -> str:
    """Return a docstring with the line ``settings: ...`` replaced by an entry for each setting."""
    match = re.search(r"^( *)settings: .*\n", doc, re.MULTILINE)
    if match is None:
        return doc
    indent = match[1]
    entries = [
        textwrap.fill(
            f"{name}: {setting.doc} Default: ``{setting.default!r}``.",
            116,
            initial_indent=indent,
            subsequent_indent=indent + "    ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for name, setting in known.items()
    ]
    return doc[: match.start()] + "\n".join(entries) + "\n" + doc[match.end() :]
