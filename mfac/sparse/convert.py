"""Convert a model with many zeros into one that skips them."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mfac import _build
from mfac.checks import check_choice, check_module
from mfac.sparse.backend import backend_name, select_backend
from mfac.sparse.candidates import Candidate, build, examine, fastest, measure
from mfac.sparse.example import call_model, clone_tensors, largest_difference, layers_read, run_example
from mfac.sparse.graph import Traced, first_line, tolerance, trace
from mfac.sparse.report import ConversionReport, LayerReport

POLICIES = ("faster", "sparse")
MIN_GAIN = 1.05  # a layer is replaced if dense takes at least so many times as long; less is within the noise
MIN_SPARSITY_UNTIMED = 0.5  # zeros from which on policy "sparse" replaces a layer
_MODEL_SECONDS = 1.0  # for timing the whole model in all its forms


def convert(model: nn.Module, example_inputs: Any, *, policy: str = "faster", backend: str = "auto") -> nn.Module:
    """Return a copy of a model for inference on this CPU, in which layers with many zeros run on sparse kernels.

    BatchNorm is folded into the layer before it, and ReLU or ReLU6 into the layer that it follows. Then each Linear
    and each convolution is timed on the inputs that it gets in the model, as it is (in the faster of torch's layouts)
    and on the kernels of this package, with torch's present number of threads; it is replaced where these are faster.
    Depthwise 3 x 3 convolutions, and small dense convolutions, may run on them too, so that a network stays in one
    layout (NCHW). Finally the whole model is timed: if it has not become faster, it stays dense.

    Under autocast its layers compute in the type of their weights, and return what torch's would; conversion itself
    goes by the model without autocast. The state of torch's random generator is as before at the end.

    Weights that are zero are not multiplied at all: where dense layers give NaN for an input of NaN or infinity, sparse
    ones may not.

    Args:
        model: Trained and pruned, on the CPU, float32 or bfloat16. It is not changed.
        example_inputs: What the model will get, with the batch size that it will have: a tensor, a tuple of arguments
            or a dict of keyword arguments. Of a model that can be traced they decide which optional arguments (default
            None) the copy takes: a call that gives others, or leaves one out, is a ValueError. They are not changed.
        policy: ``"faster"``: what the times say. ``"sparse"``: nothing is timed, and each layer of which at least
            half of the weights are zero is replaced, for a smaller file, or to convert on another machine.
        backend: ``"auto"``, ``"compiled"`` (an error if the kernels cannot be built) or ``"reference"``.

    Returns:
        The copy, in eval mode: a torch.fx.GraphModule if the model can be traced. ``copy.sparse_report`` is a
        :class:`ConversionReport`: print it. torch.compile and torch.export take the copy; training it is refused.

    Raises:
        TypeError: If `model` is not a module.
        ValueError: If the model is not on the CPU, or a word is not one of those above.
        RuntimeError: If a mere copy of the model computes something else than the model on the example inputs.
        BuildError: If ``backend="compiled"`` and the kernels cannot be built.

    Example:
        >>> import torch, mfac
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 8))
        >>> _ = model[0].weight.data.mul_(torch.rand(256, 256) < 0.05)
        >>> fast = mfac.sparse.convert(model, torch.randn(1, 256), policy="sparse")
        >>> fast.sparse_report.replaced
        ['0']
        >>> x = torch.randn(1, 256)
        >>> with torch.no_grad():
        ...     torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
    """
    check_module("model", model)
    check_choice("policy", policy, POLICIES)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.device.type != "cpu":
            raise ValueError(f"model: expected on the CPU, got {name} on {tensor.device}")
    select_backend(backend)  # refused here
    with torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
        return _convert(model, example_inputs, policy, backend)


def _convert(model: nn.Module, example_inputs: Any, policy: str, backend: str) -> nn.Module:
    right = run_example(model, example_inputs)
    traced = trace(model, example_inputs, right)
    candidates = find_candidates(traced, layers_read(model, example_inputs))
    report = ConversionReport(
        folded=traced.folded,
        backend=backend_name(select_backend(backend)),
        machine=_build.cpu()[0],
        threads=torch.get_num_threads(),
    )
    if traced.reason:
        report.notes.append(f"layers are replaced one by one, without folding and fusing: {traced.reason}")
    with torch.no_grad():
        if policy == "faster":
            _measure_all(traced.model, candidates, example_inputs, backend)
        forms, reasons = _choose(candidates, policy)
        dense = replace(traced, model=copy.deepcopy(traced.model)).finish()
        dense_error = largest_difference(run_example(dense, example_inputs), right)
        if not dense_error <= tolerance(model):
            raise RuntimeError(
                f"model: expected the same outputs from a copy, got a difference of {dense_error:.1e}; outputs must "
                "depend on arguments and weights alone, and be tensors or values that can be compared"
            )
        fast, report.error = dense, dense_error
        if forms:
            fast, report.error, failure = _replace_layers(traced, forms, backend, example_inputs, right)
            if not report.error <= tolerance(model):
                failure = failure or f"the outputs differ by {report.error:.1e}"
                report.notes.append(f"the whole model stays dense: with the layers above replaced, {failure}")
                reasons |= dict.fromkeys(forms, "the model does not work with it replaced")
                forms, fast, report.error = {}, dense, dense_error
        if policy == "faster":
            report.dense_ms, report.fast_ms = _compare(dense, fast, example_inputs)
            if not forms:
                report.fast_ms = report.dense_ms
            elif report.fast_ms >= report.dense_ms:
                report.notes.append(
                    f"the whole model stays dense: with the layers above replaced it takes {report.fast_ms:.2f} ms, "
                    f"without {report.dense_ms:.2f} ms"
                )
                reasons |= dict.fromkeys(forms, "faster alone, but not in the whole model")
                forms, fast, report.fast_ms, report.error = {}, dense, report.dense_ms, dense_error
    report.layers = [_layer_report(c, forms.get(c.name), reasons[c.name], fast) for c in candidates]
    fast.sparse_report = report
    return fast


def find_candidates(traced: Traced, read: Collection[str] = ()) -> list[Candidate]:
    """Return all Linear layers and 2-d convolutions of a model, subclasses too.

    Args:
        traced: The model.
        read: Layers whose weights or sizes other code reads (:func:`mfac.sparse.example.layers_read`).

    Returns:
        What is known about each, in the order of the model; a layer that is not used is not among them.
    """
    candidates = []
    for name, layer in traced.model.named_modules():
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            continue
        calls = None if traced.reason else traced.calls[name]
        whole = next((called for called in traced.calls if name.startswith(f"{called}.")), None)
        if calls != 0:
            candidates.append(examine(name, layer, traced.activations.get(name, "none"), calls))
        elif whole is not None:
            obstacle = f"it is inside of {type(traced.model.get_submodule(whole)).__name__}, called as a whole"
            candidates.append(Candidate(name, layer, obstacle=obstacle))
    for candidate in candidates:
        if candidate.name in read and not candidate.obstacle:
            candidate.obstacle = "other code reads its weights or sizes"
    return candidates


def apply_forms(traced: Traced, forms: dict[str, str], backend: str = "auto", empty: bool = False) -> nn.Module:
    """Replace layers.

    Args:
        traced: The model, which is changed.
        forms: The form of each layer to be replaced.
        backend: Of the new layers.
        empty: Leave the sparse weights out; a state dict will bring them.

    Returns:
        The model.
    """
    for name, form in forms.items():
        layer = traced.model.get_submodule(name)
        activation = traced.activations.get(name, "none")
        traced.replace(name, build(layer, form, activation, backend, empty).eval(), fuse=True)
    return traced.finish()


def _replace_layers(
    traced: Traced, forms: dict[str, str], backend: str, inputs: Any, right: list[Any]
) -> tuple[nn.Module, float, str]:
    """Replace layers; return the model, by how much it differs on the example, and why it failed, if it did."""
    try:
        fast = apply_forms(traced, forms, backend)
        return fast, largest_difference(run_example(fast, inputs), right), ""
    except Exception as error:  # of the user's forward, which may ask of a layer what only torch's has
        return traced.model, float("inf"), first_line(error)


def _measure_all(model: nn.Module, candidates: list[Candidate], inputs: Any, backend: str) -> None:
    """Run a copy of the model once, and time each layer when its turn comes, on its own input."""
    model = copy.deepcopy(model)  # a forward may leave state

    def hook(candidate: Candidate):
        def measure_once(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs.get("input")
            if candidate.dense_ms is None and isinstance(x, Tensor):
                measure(candidate, x, backend)

        return measure_once

    for c in candidates:
        if not c.obstacle:
            model.get_submodule(c.name).register_forward_pre_hook(hook(c), with_kwargs=True)
    call_model(model, clone_tensors(inputs))


def _choose(candidates: list[Candidate], policy: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return the form of each layer that is replaced, and the reason for each layer."""
    forms: dict[str, str] = {}
    reasons = {c.name: c.obstacle for c in candidates}
    usable = [c for c in candidates if not c.obstacle]
    if policy == "sparse":
        for c in usable:
            if c.formats == ["depthwise"] or c.sparsity < MIN_SPARSITY_UNTIMED:
                reasons[c.name] = (
                    f"fewer than {MIN_SPARSITY_UNTIMED:.0%} zeros" if c.formats != ["depthwise"] else "dense by nature"
                )
            else:
                forms[c.name] = c.formats[-1]
                reasons[c.name] = f"at least {MIN_SPARSITY_UNTIMED:.0%} zeros"
        return forms, reasons
    for c in usable:
        if c.dense_ms is None or not c.times:
            reasons[c.name] = "not called on the example inputs"
            continue
        form, fast_ms = c.best
        if c.dense_ms >= MIN_GAIN * fast_ms:
            forms[c.name] = form
            reasons[c.name] = f"{c.dense_ms / fast_ms:.2f}x dense"
        else:
            reasons[c.name] = f"dense is as fast or faster: {c.dense_ms / fast_ms:.2f}x"
    convolutions = [c for c in usable if isinstance(c.layer, nn.Conv2d) and c.times]
    if any(c.name in forms for c in convolutions):  # then the model runs in NCHW, whatever torch would choose
        for c in convolutions:
            form, fast_ms = c.best
            if c.name not in forms and c.nchw_ms >= MIN_GAIN * fast_ms:
                forms[c.name] = form
                reasons[c.name] = f"{c.nchw_ms / fast_ms:.2f}x dense in NCHW, its neighbours' layout"
    return forms, reasons


def _compare(dense: nn.Module, fast: nn.Module, inputs: Any) -> tuple[float, float]:
    """Return the milliseconds of the dense model, in the faster of torch's layouts, and of the converted one."""
    inputs, dense, fast = clone_tensors(inputs), copy.deepcopy(dense), copy.deepcopy(fast)  # calls may change them
    variants = {"dense": lambda: call_model(dense, inputs), "fast": lambda: call_model(fast, inputs)}
    if isinstance(inputs, Tensor) and inputs.dim() == 4:
        last = copy.deepcopy(dense).to(memory_format=torch.channels_last)
        moved = inputs.contiguous(memory_format=torch.channels_last)
        variants["channels_last"] = lambda: call_model(last, moved)
    times = fastest(variants, _MODEL_SECONDS)
    return min(times["dense"], times.get("channels_last", float("inf"))), times["fast"]


def _bytes(module: nn.Module) -> int:
    return sum(t.nbytes for t in [*module.parameters(), *module.buffers()])


def _layer_report(c: Candidate, form: str | None, reason: str, fast: nn.Module) -> LayerReport:
    """Return the line of a layer."""
    return LayerReport(
        name=c.name,
        kind=c.kind,
        sparsity=c.sparsity,
        format=form or "dense",
        reason=reason,
        dense_ms=c.dense_ms,
        fast_ms=c.best[1] if c.times else None,
        dense_bytes=_bytes(c.layer),
        bytes=_bytes(fast.get_submodule(c.name) if form else c.layer),
    )
