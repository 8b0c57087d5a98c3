"""Pruner: saving, resuming, and a model that stays an ordinary one."""

import copy
import io

import pytest
import torch
from test_gradual import SIZES, make, make_model, mse, sgd, train, zeros
from torch import nn
from torch.distributed import checkpoint

import mfac


def test_state_dict_continues_identically():
    """Saved in the middle of the schedule and resumed by new objects: the same bits as without a break."""
    options = {"end": 10, "frequency": 3, "recomputations": 2, "initial_sparsity": 0.2}
    model = make_model()
    optimizer, pruner = sgd(model), make(model, **options)
    train(model, optimizer, pruner, range(5))
    file = io.BytesIO()
    torch.save([x.state_dict() for x in (model, optimizer, pruner)], file)
    train(model, optimizer, pruner, range(5, 13))

    file.seek(0)
    resumed = make_model()
    again = (resumed, sgd(resumed), make(resumed, **options))
    for x, state in zip(again, torch.load(file, weights_only=True), strict=True):
        x.load_state_dict(state)
    assert again[2].sparsity == pytest.approx(pruner.results[1][1].sparsity)
    train(*again, range(5, 13))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed.parameters(), strict=True))
    assert all(torch.equal(pruner.masks[name], again[2].masks[name]) for name in SIZES)
    assert [time for time, _ in again[2].results] == [6, 9, 10] and zeros(resumed) == 64


def test_state_dict_is_a_copy_and_masks_are_enforced():
    model = make_model()
    pruner = make(model, end=1)
    pruner.step()
    state = pruner.state_dict()
    with torch.no_grad():
        model[0].weight.fill_(1)
    fresh = make(model, end=1)
    fresh.load_state_dict(state)
    assert zeros(model) == 64 and fresh.sparsity == pruner.sparsity and fresh.step() is None
    state["masks"]["0.weight"].fill_(True)
    assert not fresh.masks["0.weight"].all() and not pruner.masks["0.weight"].all()


def test_model_is_ordinary():
    """No hooks, no wrappers: copies and files of the model know nothing of the Pruner."""
    model = make_model()
    keys = list(model.state_dict())
    pruner = make(model, end=3)
    pruner.step()
    pruner.step()
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    before = zeros(twin)
    pruner.step()
    assert before == zeros(twin) == zeros(loaded) < zeros(model)
    for x in (model, twin, loaded):
        assert list(x.state_dict()) == keys
        assert all(type(p) is nn.Parameter and p.is_leaf for p in x.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in x.modules())


def test_replaced_parameters():
    """load_state_dict(assign=True) gives the model other Parameters: the masks hold these too."""
    model = make_model()
    pruner = make(model, initial_sparsity=0.5, end=2, frequency=2)
    pruner.step()
    dense = {name: torch.ones_like(value) for name, value in model.state_dict().items()}
    model.load_state_dict(dense, assign=True)
    pruner.apply_masks()
    assert zeros(model) == 40
    pruner.step()
    assert zeros(model) == 64


def test_moved_model():
    """Masks follow the parameters to another device."""
    model = make_model()
    pruner = make(model, end=1)
    pruner.step()
    model.to("meta")
    assert pruner.step() is None
    assert {mask.device.type for mask in pruner.masks.values()} == {"meta"}


def test_results_hold_no_masks():
    """Only the current ones are kept, however many updates there are."""
    pruner = make(make_model(), initial_sparsity=0.5, end=2)
    results = [pruner.step(), pruner.step()]
    assert all(result.masks.keys() == SIZES.keys() for result in results)
    assert [(time, result.masks) for time, result in pruner.results] == [(1, {}), (2, {})]
    assert [result.layers for _, result in pruner.results] == [result.layers for result in results]


class Shuffled:
    """A loader that shuffles as torch's does, and notes its batches."""

    def __init__(self):
        inputs = torch.arange(24.0)[:, None].expand(24, 6)
        dataset = torch.utils.data.TensorDataset(inputs, torch.zeros(24, 2))
        self.loader, self.seen = torch.utils.data.DataLoader(dataset, batch_size=4, shuffle=True), []

    def __iter__(self):
        for batch in self.loader:
            self.seen.append(batch[0][:, 0].tolist())
            yield batch


def test_shuffling_loader(unchanged):
    """Every collection sees another order, though torch's random state stays; resumed, the orders that were to come."""
    model, loader = make_model(), Shuffled()
    pruner = make(model, batches=loader, end=1, recomputations=3, refresh=6, corrections=0)
    state = pruner.state_dict()
    with unchanged(model, weights=False):
        pruner.step()
    orders = [loader.seen[i : i + 6] for i in (0, 6, 12)]
    assert len(loader.seen) == 18 and orders[0] != orders[1] != orders[2] != orders[0]

    torch.manual_seed(99)
    again = Shuffled()
    resumed = make(make_model(), batches=again, end=1, recomputations=3, refresh=6, corrections=0)
    resumed.load_state_dict(state)
    resumed.step()
    assert again.seen == loader.seen


def test_masks_by_hand():
    model = make_model()
    pruner = make(model, end=1)
    pruner.step()
    with torch.no_grad():
        model[2].weight.add_(1)
    pruner.apply_masks()
    assert zeros(model) == 64


def bad_state(**change):
    """A state of another Pruner of the same kind, with changes; None takes a key away."""
    state = make(make_model(), end=2, initial_sparsity=0.5).state_dict() | change
    return {key: value for key, value in state.items() if value is not None or key in {"last", "time"} - change.keys()}


MASKS = {"0.weight": torch.ones(10, 6, dtype=torch.bool), "2.weight": torch.ones(2, 10, dtype=torch.bool)}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (bad_state(last=None, calls=None), "state: expected the keys of Pruner.state_dict.., got none of calls, last"),
        (
            bad_state(masks=MASKS | {"1.weight": MASKS["0.weight"]}),
            "state: expected names among 0.weight, 2.weight, got '1.weight'",
        ),
        (
            bad_state(masks=MASKS | {"0.weight": MASKS["2.weight"]}),
            r"state\['0.weight'\]: expected bool of shape \[10, 6\], got .* \[2, 10\]",
        ),
        (
            bad_state(masks=MASKS | {"0.weight": torch.ones(10, 6)}),
            r"state\['0.weight'\]: expected bool .* got torch.float32",
        ),
        (
            bad_state(masks={"0.weight": MASKS["0.weight"]}),
            "state: expected a mask for each parameter, got none for .*2.weight",
        ),
        (bad_state(reached={"0.weight": 0.5}), r"state: expected sparsities for \[None\], got \['0.weight'\]"),
    ],
)
def test_bad_state(unchanged, state, message):
    model = make_model()
    pruner = make(model, end=2, initial_sparsity=0.5)
    pruner.step()
    before = pruner.state_dict()
    with unchanged(model), pytest.raises(ValueError, match=message):
        pruner.load_state_dict(state)
    after = pruner.state_dict()
    assert all(torch.equal(after["masks"][name], before["masks"][name]) for name in SIZES)
    assert all(after[key] == before[key] for key in ("calls", "last", "reached"))
    assert repr(after["source"]) == repr(before["source"])


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        ({"scope": "layer"}, [0.5, 0.5]),
        ({"scope": "global"}, [None, None]),
        ({"scope": "layer", "pattern": "2:4"}, [0.5, 0.5]),
    ],
)
def test_layer_sparsities_are_checked(settings, asked):
    model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 2))
    pruner = mfac.Pruner(model, sparsity=0.5, end=1, criterion="magnitude", **settings)
    assert pruner.layer_sparsities() == {"0.weight": (None, 0.0), "1.weight": (None, 0.0)}
    pruner.step()
    found = pruner.layer_sparsities()
    assert [pair[0] for pair in found.values()] == asked
    assert sum(pair[1] * n for pair, n in zip(found.values(), (32, 8), strict=True)) == 20
    with torch.no_grad():
        model[0].weight.fill_(1)
    with pytest.raises(RuntimeError, match=r"model: expected the pruned weights of '0.weight' to be zero"):
        pruner.layer_sparsities()


@pytest.mark.filterwarnings("ignore")  # of torch.distributed.checkpoint, without processes
def test_torch_distributed_checkpoint(tmp_path):
    """It loads into the state of a new Pruner, keys that are missing there being left out."""
    model = make_model()
    pruner = make(model, end=3)
    for _ in range(3):
        pruner.step()
    checkpoint.save({"pruner": pruner.state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    fresh = make(make_model(), end=3)
    state = {"pruner": fresh.state_dict()}
    checkpoint.load(state, checkpoint_id=tmp_path, no_dist=True)
    fresh.load_state_dict(state["pruner"])
    assert fresh.sparsity == pruner.sparsity > 0 and fresh.finished
    assert all(torch.equal(mask, fresh.masks[name]) for name, mask in pruner.masks.items())
    unpruned = make(make_model(), end=3)
    unpruned.load_state_dict(make(make_model(), end=3).state_dict())
    assert unpruned.masks == {} and unpruned.sparsity == 0


@pytest.mark.parametrize("count", range(4, 120, 9))
def test_an_interrupted_update_goes_on_after_loading_as_before(count):
    """It is still joint though less than half of the weights are left to prune, and makes its last correction."""
    calls = []

    def interrupted(outputs, targets):
        calls.append(1)
        if len(calls) == count:
            raise KeyboardInterrupt
        return mse(outputs, targets)

    options = {"start": 1, "end": 1, "sparsity": 0.9, "recomputations": 3, "final_corrections": 1}
    model = make_model()
    pruner = make(model, **options, loss_fn=interrupted)
    try:
        pruner.step()
    except KeyboardInterrupt:
        pass
    else:
        return  # the update takes fewer losses
    twin = make_model()
    twin.load_state_dict(model.state_dict())
    other = make(twin, **options)
    other.load_state_dict(pruner.state_dict())
    plans = [one.plan() for one in (pruner, other)]
    made = [one.step() for one in (pruner, other)]
    assert plans[0] == plans[1] and [update.gradients for update in plans[0]] == [
        sum(step.new_gradients for step in made[0].steps)
    ]
    assert pruner.finished and other.finished and len(other.results) == 1
    assert [step.step_length for step in made[0].steps] == [step.step_length for step in made[1].steps]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_state_of_the_middle_of_an_update():
    """As a signal handler saves it; copies are possible then, too."""
    states, copies = [], []

    def loss_fn(outputs, targets):
        if pruner.sparsity > 0 and not states:
            states.append(pruner.state_dict())
            copies.append(copy.deepcopy((model, pruner)))
        return mse(outputs, targets)

    options = {"end": 1, "start": 1, "sparsity": 0.9, "recomputations": 3, "damping": "auto"}
    model = make_model()
    pruner = make(model, **options, loss_fn=loss_fn)
    pruner.step()
    twin, other = copies[0]
    loaded = make(twin, **options)
    loaded.load_state_dict(states[0])
    assert 0 < loaded.sparsity == other.sparsity < 0.9
    other.step()
    assert other.sparsity == 0.9 and other.finished


def test_a_plan_after_loading_into_another_schedule():
    """Of what is past there is nothing in it."""
    model = make_model()
    pruner = make(model, end=10, sparsity=0.6, schedule="linear")
    train(model, sgd(model), pruner, range(3))
    other = make(model, end=10, sparsity=0.95)
    other.load_state_dict(pruner.state_dict())
    assert [update.time for update in other.plan()] == [4, 5, 6, 7, 8, 9, 10]
    done = make(model, end=3, sparsity=0.6)
    done.load_state_dict(pruner.state_dict())
    assert [update.time for update in done.plan()] == [3]
    made = done.step()
    assert done.finished and [update.gradients for update in done.plan()] == [] and made is not None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"began": None}, TypeError, r"state\['began'\]: expected sparsities by key, got NoneType"),
        ({"began": {"": 2.0}}, ValueError, r"state\['began'\]: expected in \[0, 1\], got 2.0"),
        ({"unreached": ["nope"]}, ValueError, "state: expected parameters 0.weight, 2.weight, got nope"),
    ],
)
def test_bad_state_of_an_interrupted_update(change, error, message):
    state = make(make_model()).state_dict() | change
    with pytest.raises(error, match=message):
        make(make_model()).load_state_dict(state)
