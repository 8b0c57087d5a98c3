"""What the tests of models and training programs share: exact zeros, and the result of the plain loop."""

import copy

import torch
from torch import nn

import mfac

SETTINGS = {"damping": "3e-2*mean", "block_size": 64, "substeps": 2}
PLAIN = {"corrections": 0, "final_corrections": 0}  # of mfac.prune: steps under the quadratic model alone


def plain_gradients(model, batches, loss_of, names):
    """One gradient per batch, as anyone would write it: eval mode, backward, .grad; [m, d]."""
    model, rows = copy.deepcopy(model).eval(), []
    params = dict(model.named_parameters(remove_duplicate=False))
    for p in params.values():
        p.requires_grad_(True)
    for batch in batches:
        model.zero_grad(set_to_none=True)
        loss_of(model, batch).backward()
        grads = [params[n].grad if params[n].grad is not None else torch.zeros_like(params[n]) for n in names]
        rows.append(torch.cat([g.float().reshape(-1) for g in grads]))
    return torch.stack(rows)


def check_zeros(model, result, sparsity):
    """Exactly round(sparsity · n) zeros, where the masks say."""
    params = dict(model.named_parameters(remove_duplicate=False))
    assert sum(int((~mask).sum()) for mask in result.masks.values()) == round(
        sparsity * sum(mask.numel() for mask in result.masks.values())
    )
    for name, mask in result.masks.items():
        assert torch.equal(params[name] != 0, mask), name


def check_against_plain_loop(model, batches, loss_of, *, sparsity=0.5, loss_fn=None, names=None, **settings):
    """Prune by batches, and a copy by gradients of the plain loop: the same masks and weights. Returns the result.

    Corrections then leave a copy as sparse as it is.
    """
    twin = copy.deepcopy(model)
    names = list(mfac.prunable_parameters(model, settings.get("params"))) if names is None else names
    grads = plain_gradients(model, batches, loss_of, names)
    settings = {**SETTINGS, **settings}
    source = {key: settings.pop(key) for key in ("forward", "mode") if key in settings}
    result = mfac.prune(
        model,
        batches,
        loss_fn,
        sparsity,
        num_grads=len(batches),
        recomputations=1,
        progress=False,
        **PLAIN,
        **settings,
        **source,
    )
    expected = mfac.prune_step(twin, grads, sparsity, **settings)
    assert list(result.masks) == list(expected.masks) == names
    for name, mask in expected.masks.items():
        assert torch.equal(result.masks[name], mask), name
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6, msg=name)
    check_zeros(model, result, sparsity)
    corrected = copy.deepcopy(model)
    options = {"num_grads": len(batches), "recomputations": 1, "progress": False, **settings, **source}
    options.update(masks=result.masks, corrections=1, final_corrections=2, correction_batches=2)
    again = mfac.prune(corrected, batches, loss_fn, sparsity, **options)
    assert all(torch.equal(again.masks[name], mask) for name, mask in result.masks.items())
    check_zeros(corrected, again, sparsity)
    return result


def classify(model, batch):
    """Cross entropy of (inputs, targets)."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1])
