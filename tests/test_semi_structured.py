"""2:4 weights as torch's semi-structured tensors: only those that keep the pattern, and only on a GPU."""

import pytest
import torch
from torch import nn

from mfac import to_semi_structured
from mfac.export.semi_structured import why_not_2_4


def two_of_four(*shape):
    weight = torch.randn(shape)
    groups = weight.view(-1, 4)
    groups.scatter_(1, torch.rand_like(groups).topk(2).indices, 0)
    return weight


def test_which_weights_are_2_4():
    weight = two_of_four(8, 16)
    assert why_not_2_4(weight) == ""
    weight[3, 8:12] = 1
    assert why_not_2_4(weight) == "expected 2:4, got 4 of 4 kept in the group that begins at [3, 8]"
    assert why_not_2_4(torch.zeros(4, 6)) == "expected a multiple of 4 inputs, got 6"


def test_on_the_cpu_nothing_is_swapped():
    model = nn.Sequential(nn.Linear(64, 64), nn.Conv2d(4, 4, 1), nn.Linear(64, 64), nn.Linear(64, 64))
    model[3].weight = model[2].weight
    before = list(model.parameters())
    result = to_semi_structured(model)
    assert result.swapped == [] and result.skipped == {
        "0.weight": "expected on CUDA, got on cpu",
        "2.weight": "expected a weight of one layer, got one that 2 layers share",
    }
    with pytest.raises(ValueError, match=r"params: expected a weight that can be semi-structured, got 0.weight: "):
        to_semi_structured(model, "0.weight")
    with pytest.raises(ValueError, match=r"params: expected weights of linear layers among 0.weight, 2.weight, got "):
        to_semi_structured(model, ["1.weight"])
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got dict"):
        to_semi_structured({})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
def test_on_a_gpu_the_outputs_are_the_same():
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256)).cuda().half().requires_grad_(False)
    model[0].weight.copy_(two_of_four(256, 256))
    inputs = torch.randn(64, 256, device="cuda", dtype=torch.half)
    wanted = model(inputs)
    with pytest.raises(ValueError, match=r"got 1.weight: expected 2:4, got "):
        to_semi_structured(model, ["0.weight", "1.weight"])
    result = to_semi_structured(model)
    assert result.swapped == ["0.weight"] and list(result.skipped) == ["1.weight"]
    assert isinstance(model[0].weight, torch.sparse.SparseSemiStructuredTensor)
    torch.testing.assert_close(model(inputs), wanted, rtol=1e-2, atol=1e-2)
