"""The engine: what its drivers share, and what it keeps right when things go wrong."""

import json
import warnings

import pytest
import torch
from torch import nn

import mfac

CE = nn.functional.cross_entropy
DATA = [(torch.randn(8, 5, generator=torch.Generator().manual_seed(i)), torch.arange(8) % 3) for i in range(8)]
FAST = {"num_grads": 4, "progress": False, "block_size": 32, "substeps": 2}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))


def zeros(model):
    return [int((p == 0).sum()) for p in mfac.prunable_parameters(model).values()]


def make(model, **change):
    return mfac.Pruner(model, DATA, CE, **{"sparsity": 0.9, "end": 100, "frequency": 10, **FAST, **change})


@pytest.mark.parametrize("change", [{"end": 40}, {"end": 50, "sparsity": 0.95}])
def test_resumed_past_the_new_end(change):
    """What is missing is pruned at once; only then has it finished."""
    model = net()
    pruner = make(model)
    for _ in range(50):
        pruner.step()
    later = make(model, **change)
    later.load_state_dict(pruner.state_dict())
    assert not later.finished
    later.step()
    assert later.finished and sum(zeros(model)) == round(change.get("sparsity", 0.9) * 56)
    assert later.step() is None


def test_higher_sparsity_after_a_finished_run():
    model = net()
    pruner = make(model, sparsity=0.5, end=2, frequency=1)
    for _ in range(3):
        pruner.step()
    assert pruner.finished
    later = make(model, sparsity=0.9, end=2, frequency=1)
    later.load_state_dict(pruner.state_dict())
    later.step()
    assert later.finished and sum(zeros(model)) == 50


@pytest.mark.parametrize("sparsity", [0.9, 0.95, {"0.weight": 0.8, "2.weight": 0.8}])
def test_bound_equal_to_the_sparsity(sparsity):
    """Rounding in each layer does not stand in the way; the count is exact."""
    model = net()
    bound = 0.8 if isinstance(sparsity, dict) else sparsity
    result = mfac.prune_step(model, torch.randn(4, 56), sparsity, max_layer_sparsity=bound, substeps=1)
    wanted = [28, 17] if isinstance(sparsity, dict) else None
    assert zeros(model) == wanted if wanted else sum(zeros(model)) == round(sparsity * 56)
    assert all(n - kept <= -(-bound * n // 1) for _, n, kept in result.layers)


@pytest.mark.parametrize("call", ["prune", "prune_step"])
def test_result_of_an_error_after_the_weights_are_written(call):
    """Here a warning that is an error: the result says what the model is."""
    model = net()
    with torch.no_grad():
        model[2].weight.mul_(1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="leaves no weight") as caught:
            if call == "prune":
                mfac.prune(model, DATA, CE, 0.6, recomputations=2, criterion="magnitude", update="none", **FAST)
            else:
                mfac.prune_step(model, None, 0.6, criterion="magnitude")
    result = caught.value.result
    assert [n - kept for _, n, kept in result.layers] == zeros(model) and sum(zeros(model)) > 0


def test_gradients_that_stop_reaching_a_layer():
    """An auxiliary head that is switched off: its masks stay, the rest goes on."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.aux, self.on = net(), nn.Linear(5, 3), True

        def forward(self, x):
            return self.main(x) + (self.aux(x) if self.on else 0)

    torch.manual_seed(0)
    model = Two()
    pruner = make(model, end=10, frequency=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(11):
            model.on = step < 4
            pruner.step()
            if step == 3:
                held = pruner.masks["aux.weight"].clone()
    assert torch.equal(pruner.masks["aux.weight"], held)
    assert sum(zeros(model.main)) >= round(0.9 * 56)


def test_layers_that_are_further_already():
    """scope="layer" from uneven masks: each layer rises to the end, none falls."""
    masks = {"0.weight": torch.arange(35).view(7, 5) >= 33, "2.weight": torch.ones(3, 7, dtype=torch.bool)}
    model = net()
    mfac.prune(model, DATA, CE, 0.96, scope="layer", recomputations=3, masks=masks, **FAST)
    assert zeros(model) == [34, 20]
    model = net()
    pruner = make(model, scope="layer", sparsity=0.5, end=2, frequency=1, masks=masks)
    for _ in range(3):
        pruner.step()
    assert zeros(model) == [33, 10]


def test_masks_hold_while_gradients_are_collected():
    masks = {"0.weight": torch.arange(35).view(7, 5) >= 16}
    model, seen = net(), []

    def loss_fn(out, y):
        seen.append(zeros(model)[0])
        return CE(out, y)

    mfac.prune(model, DATA, loss_fn, 0.8, masks=masks, recomputations=2, **FAST)
    assert min(seen) >= 16


def test_frontier_keeps_to_the_bound():
    grads = torch.randn(4, 64)
    points = mfac.frontier(nn.Linear(8, 8), grads, [0.3, 0.5], ["2:4", "unstructured"], max_layer_sparsity=0.7).points
    assert [point.sparsity for point in points] == pytest.approx([0.3125, 0.5, 0.3, 0.5], abs=1e-2)
    with pytest.raises(ValueError, match=r"sparsity: expected at most 0\.2 for weight, max_layer_sparsity, got 0.3"):
        mfac.frontier(nn.Linear(8, 8), grads, [0.3], max_layer_sparsity=0.2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'pattern'; did you mean 'patterns'"):
        mfac.frontier(nn.Linear(8, 8), grads, [0.3], pattern="2:4")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"results": [(1, {})]}, "values: expected what to_dict returned, got none of"),
        ({"calls": -1}, r"state\['calls'\]: expected an int >= 0"),
        ({"settings": {"newer": 1}}, "state: expected settings of this version, got 'newer'"),
    ],
)
def test_a_bad_state_changes_nothing(unchanged, change, message):
    model = net()
    pruner = make(model, end=2, frequency=1)
    pruner.step()
    state, before = pruner.state_dict() | change, pruner.state_dict()
    with unchanged(model), pytest.raises(ValueError, match=message):
        pruner.load_state_dict(state)
    assert repr(pruner.state_dict()) == repr(before)


def test_attached_once():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = mfac.Pruner(model, sparsity=0.5, end=3, criterion="magnitude")
    handle = pruner.attach(optimizer)
    with pytest.raises(ValueError, match="optimizer: expected a Pruner that is not attached"):
        pruner.attach(optimizer)
    handle.remove()
    pruner.attach(optimizer)


def test_result_through_json(tmp_path):
    """Also with a loss that is not known, and with a layer without weights."""
    model = net()
    with pytest.warns(UserWarning, match="not measured"):
        result = mfac.prune(model, iter(DATA[:5]), CE, 0.5, recomputations=2, corrections=0, **FAST)
    result.to_json(tmp_path / "result.json")
    read = mfac.PruneResult.from_dict(json.loads((tmp_path / "result.json").read_text()))
    assert str(read) == str(result)
    assert "0.00%" in str(mfac.prune_step(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 0)), torch.randn(3, 16), 0.5))


def test_a_mask_is_no_string():
    with pytest.raises(TypeError, match="masks: expected name -> bool tensor, got str"):
        mfac.apply_masks(net(), "foo")
