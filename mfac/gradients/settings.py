"""The settings of what is pruned and of where gradients come from."""

from collections.abc import Callable, Iterable
from typing import Annotated, Any, TypedDict

import torch
from torch import nn
from torch.distributed import ProcessGroup

from mfac.checks import check_function
from mfac.gradients.arguments import check_dtype
from mfac.gradients.batches import MODES
from mfac.model.targets import names_of
from mfac.settings import Setting, check_flag, checked_later, one_of


class CommonSettings(TypedDict, total=False):
    """The settings of every entry point."""

    params: Annotated[
        str | Iterable[str] | None,
        Setting(
            None,
            names_of,
            "What to prune: names or ``re:<regex>``; see :func:`mfac.prunable_parameters`. None: the weights of all "
            "layers that can be pruned, or the parameters of the GradientBuffer.",
        ),
    ]
    exclude: Annotated[
        str | Iterable[str] | None, Setting(None, names_of, "Parameters to leave out, written as in ``params``.")
    ]
    progress: Annotated[bool, Setting(True, check_flag, "Show progress bars; of several processes, the first one's.")]
    process_group: Annotated[
        ProcessGroup | None,
        Setting(
            None,
            checked_later,
            "Processes that hold copies of the model and prune them alike, each with batches of its own; see "
            "docs/guides/distributed.md. None: those of a DistributedDataParallel model, else this process by itself.",
        ),
    ]


class ForwardSettings(TypedDict, total=False):
    """How the model is run."""

    mode: Annotated[
        str,
        Setting(
            "eval",
            one_of(MODES),
            '``"eval"``, or ``"train"``: modules are in training mode while gradients are collected and losses '
            "measured (batch statistics, the running ones staying as they are), which recurrent layers on cuDNN and "
            "detection models need.",
        ),
    ]
    forward: Annotated[
        Callable[[nn.Module, Any], Any] | None,
        Setting(
            None,
            check_function,
            "For batches that are neither (inputs, targets) nor dicts: ``forward(model, batch)`` returns (outputs, "
            "targets) for ``loss_fn`` or, without one, the loss or an output that has a ``.loss``.",
        ),
    ]


class SourceSettings(ForwardSettings, total=False):
    """How gradients are computed and where they are kept."""

    dtype: Annotated[
        torch.dtype | str,
        Setting(torch.float32, check_dtype, "Type of the gradients, torch.float32 or torch.bfloat16."),
    ]
    grads_device: Annotated[
        torch.device | str | None,
        Setting(
            None,
            checked_later,
            'Where they are kept: None for the model\'s device; ``"cpu"`` if they do not fit there; ``"disk"`` or '
            '``"disk:FOLDER"`` for a memory-mapped file.',
        ),
    ]


class CollectSettings(CommonSettings, SourceSettings, total=False):
    """The settings of :func:`mfac.collect_gradients`."""
