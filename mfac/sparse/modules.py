"""The layers of a converted model: inference only, weights as buffers in compressed form."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from mfac._build import BuildError
from mfac.checks import check_choice, check_int
from mfac.sparse import compiled, reference
from mfac.sparse.backend import backend_name, select_backend
from mfac.sparse.formats import PARTS, SlicedMatrix, has_all_rows, slice_matrix

ACTIVATIONS = ("none", "relu", "relu6")


class _Layer(nn.Module):
    """What the layers share: the activation, the choice of the kernels, and the refusal of gradients."""

    def __init__(self, activation: str, backend: str = "auto") -> None:
        super().__init__()
        self.activation = check_choice("activation", activation, ACTIVATIONS)
        self._requested = backend
        self.backend = backend_name(select_backend(backend))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        try:
            self.backend = backend_name(select_backend(self._requested))
        except BuildError:  # the module was pickled elsewhere
            self.backend = backend_name(select_backend())

    def _call(self, op: str, x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        """Call an inference op; under autocast in the type of the weight, with the result that torch's layers have."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError(
                f"input: expected no gradient, got a tensor that requires one: {type(self).__name__} is for inference; "
                "call it under torch.no_grad()"
            )
        function = getattr(compiled if self.backend == "compiled" else reference, op)
        device = weight.device.type
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return function(x, weight, *rest)
        with torch.autocast(device, enabled=False):
            return function(x.to(weight.dtype), weight, *rest).to(torch.get_autocast_dtype(device))


class _SparseLayer(_Layer):
    """A layer with a compressed matrix W [outputs, inputs]."""

    values: Tensor
    columns: Tensor
    pointers: Tensor
    order: Tensor
    bias: Tensor | None

    def __init__(
        self,
        outputs: int,
        inputs: int,
        matrix: SlicedMatrix | None,
        bias: Tensor | None,
        activation: str,
        backend: str = "auto",
    ) -> None:
        super().__init__(activation, backend)
        self.shape = [check_int("outputs", outputs), check_int("inputs", inputs)]
        if matrix is None:  # no weights yet: load_state_dict brings them
            matrix = slice_matrix(torch.empty(0, inputs), "rows")
        for name in PARTS:
            self.register_buffer(name, getattr(matrix, name))
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @property
    def format(self) -> str:
        """``"rows"`` or ``"blocks"`` (:mod:`mfac.sparse.formats`)."""
        return "blocks" if self.columns.dim() == 1 else "rows"

    @property
    def sparsity(self) -> float:
        """The share of zeros in W."""
        return 1 - int(torch.count_nonzero(self.values)) / (self.shape[0] * self.shape[1])

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        """Take weights with another number of entries than those that are here."""
        for name in PARTS:
            given, own = state_dict.get(prefix + name), getattr(self, name)
            if isinstance(given, Tensor) and given.shape != own.shape:
                if name in ("pointers", "order") and own.numel() > 1:  # of another matrix; refused by name
                    continue
                setattr(self, name, own.new_empty(given.shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        order = state_dict.get(f"{prefix}order")
        if isinstance(order, Tensor) and not order.is_meta and not has_all_rows(order, self.shape[0]):
            args[-1].append(f"{prefix}order: expected each of {self.shape[0]} rows once, got others")  # error messages

    def extra_repr(self) -> str:
        """Return what stands in the brackets of the module's text."""
        bias = "" if self.bias is not None else ", bias=False"
        return (
            f"{self.shape[1]}, {self.shape[0]}, sparsity={self.sparsity:.3f}, format={self.format}, "
            f"activation={self.activation}, {self.backend}{bias}"
        )


class SparseLinear(_SparseLayer):
    """A linear layer with sparse weights: activation(x Wᵀ + bias).

    Args:
        outputs: N, features of the result.
        inputs: K, features of ``x``.
        matrix: W [N, K] in slices (:func:`mfac.sparse.formats.slice_matrix`); None: no weights until a state dict is
            loaded.
        bias: [N], or None.
        activation: ``"none"``, ``"relu"`` or ``"relu6"``.
        backend: ``"auto"``, ``"compiled"`` or ``"reference"``.

    Raises:
        TypeError: If N or K is not an int.
        ValueError: If N or K is below 1, or activation or backend is another word.

    Example:
        >>> import torch
        >>> from mfac.sparse.formats import slice_matrix
        >>> from mfac.sparse.modules import SparseLinear
        >>> matrix = slice_matrix(torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, -3.0]]), "rows")
        >>> layer = SparseLinear(2, 3, matrix, None, "relu")
        >>> layer(torch.ones(1, 3))
        tensor([[2., 0.]])
    """

    def forward(self, input: Tensor) -> Tensor:  # the name that torch gives it; some models pass it by name
        """Return activation(x Wᵀ + bias), [..., N], for an input x [..., K]."""
        return self._call(
            "linear", input, self.values, self.columns, self.pointers, self.order, self.bias, self.shape,
            self.activation,
        )  # fmt: skip


class SparseConv2d(_SparseLayer):
    """A convolution with sparse weights, in NCHW.

    Args:
        outputs: N, channels of the result.
        channels: Channels of ``x``.
        kernel: Height and width of the kernel.
        stride: Stride along both.
        padding: Zeros added at both ends of both.
        matrix: W [N, channels · height · width of the kernel] in slices; None: no weights until a state dict is loaded.
        bias: [N], or None.
        activation: ``"none"``, ``"relu"`` or ``"relu6"``.
        backend: ``"auto"``, ``"compiled"`` or ``"reference"``.

    Raises:
        TypeError: If a number is not an int.
        ValueError: If a number is out of range, or activation or backend is another word.
    """

    def __init__(
        self,
        outputs: int,
        channels: int,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        matrix: SlicedMatrix | None,
        bias: Tensor | None,
        activation: str = "none",
        backend: str = "auto",
    ) -> None:
        inputs = check_int("channels", channels) * math.prod(check_int("kernel", size) for size in kernel)
        super().__init__(outputs, inputs, matrix, bias, activation, backend)
        self.kernel, self.stride = list(kernel), [check_int("stride", size) for size in stride]
        self.padding = [check_int("padding", size, 0) for size in padding]

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution [n, N, ...], contiguous, of [n, channels, height, width] or of one image."""
        images = input if input.dim() == 4 else input.unsqueeze(0)
        out = self._call(
            "conv2d", images, self.values, self.columns, self.pointers, self.order, self.bias, self.shape,
            self.kernel, self.stride, self.padding, self.activation,
        )  # fmt: skip
        return out if input.dim() == 4 else out.squeeze(0)

    def extra_repr(self) -> str:
        """Return what stands in the brackets of the module's text."""
        return f"kernel={self.kernel}, stride={self.stride}, padding={self.padding}, {super().extra_repr()}"


class DepthwiseConv2d(_Layer):
    """A depthwise 3 x 3 convolution with padding 1, dense, in the layout of :class:`SparseConv2d`.

    Args:
        weight: [channels, 1, 3, 3].
        bias: [channels], or None.
        stride: 1 or 2.
        activation: ``"none"``, ``"relu"`` or ``"relu6"``.
        backend: ``"auto"``, ``"compiled"`` or ``"reference"``.

    Raises:
        TypeError: If the stride is not an int.
        ValueError: If the stride is neither 1 nor 2, or activation or backend is another word.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self, weight: Tensor, bias: Tensor | None, stride: int, activation: str = "none", backend: str = "auto"
    ) -> None:
        super().__init__(activation, backend)
        self.stride = check_int("stride", stride, 1, 2)
        self.register_buffer("weight", weight.detach().clone(memory_format=torch.contiguous_format))
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of [n, channels, height, width], or of one image; contiguous."""
        images = input if input.dim() == 4 else input.unsqueeze(0)
        out = self._call("depthwise_conv2d", images, self.weight, self.bias, self.stride, self.activation)
        return out if input.dim() == 4 else out.squeeze(0)

    def extra_repr(self) -> str:
        """Return what stands in the brackets of the module's text."""
        return f"{len(self.weight)}, stride={self.stride}, activation={self.activation}, {self.backend}"
