"""Models that people have: for each, zeros are exact, and the result is that of gradients from a plain loop."""

import pytest
import torch
from torch import nn
from works_with import SETTINGS, check_against_plain_loop, check_zeros, classify

import mfac

CE = nn.functional.cross_entropy


def vectors(count=6, features=12, classes=4):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(4, features, generator=generator), torch.randint(classes, (4,), generator=generator))
        for _ in range(count)
    ]


def images(count=6, channels=3, size=8, classes=4):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(4, channels, size, size, generator=generator), torch.randint(classes, (4,), generator=generator))
        for _ in range(count)
    ]


def tokens(count=6, length=10, vocabulary=32):
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(vocabulary, (2, length), generator=generator) for _ in range(count)]
    return [{"input_ids": x, "labels": x} for x in ids]


def loss_of_output(model, batch):
    return model(**batch).loss


def test_gpt2():
    """Conv1D layers are [in, out]; the head is tied to the embedding and stays dense; the output has its loss."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    result = check_against_plain_loop(model, tokens(), loss_of_output)
    assert not any("lm_head" in name or "wte" in name for name in result.masks)
    assert "transformer.h.0.attn.c_attn.weight" in result.masks and len(result.masks) == 8
    model = transformers.GPT2LMHeadModel(config)
    result = mfac.prune(model, tokens(), sparsity=0.5, pattern="2:4", num_grads=6, recomputations=1, progress=False)
    weight = model.transformer.h[0].attn.c_attn.weight  # [in, out]: groups of 4 inputs lie in a column
    assert ((weight.T.reshape(-1, 4) == 0).sum(1) == 2).all()
    assert result.sparsity == 0.5


def test_bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    model = transformers.BertForSequenceClassification(config)
    batches = [{"input_ids": b["input_ids"], "labels": b["labels"][:, 0] % 3} for b in tokens()]
    batches = [transformers.BatchEncoding(batch) for batch in batches]
    result = check_against_plain_loop(model, batches, loss_of_output)
    assert "bert.encoder.layer.1.intermediate.dense.weight" in result.masks


def test_vit():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4,
        num_labels=4,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)
    batches = [{"pixel_values": x, "labels": y} for x, y in images()]
    result = check_against_plain_loop(model, batches, loss_of_output)
    assert any("projection" in name for name in result.masks)  # the convolution that makes patches


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.lstm, self.head = nn.Embedding(32, 8), nn.LSTM(8, 12, batch_first=True), nn.Linear(12, 4)

    def forward(self, ids):
        return self.head(self.lstm(self.embedding(ids))[0][:, -1])


def test_lstm():
    """By default only the head; the recurrent weights if they are named."""
    batches = [(b["input_ids"], b["labels"][:, 0] % 4) for b in tokens()]
    result = check_against_plain_loop(Recurrent(), batches, classify, loss_fn=CE)
    assert list(result.masks) == ["head.weight"]
    model = Recurrent()
    result = check_against_plain_loop(model, batches, classify, loss_fn=CE, params=["re:lstm.weight", "head.weight"])
    assert list(result.masks) == ["lstm.weight_ih_l0", "lstm.weight_hh_l0", "head.weight"]
    result = mfac.prune(
        Recurrent(), batches, CE, 0.5, params="re:lstm.weight", pattern="2:4", num_grads=6, recomputations=1,
        progress=False,
    )  # fmt: skip
    assert ((~result.masks["lstm.weight_ih_l0"]).view(-1, 4).sum(1) == 2).all()


def upsampling(groups):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 8, 2, 2, groups=groups), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_and_grouped_convolutions(groups):
    result = check_against_plain_loop(upsampling(groups), images(), classify, loss_fn=CE)
    assert list(result.masks) == ["0.weight", "2.weight", "4.weight", "7.weight"]
    model = upsampling(groups)
    mfac.prune(model, images(), CE, 0.5, pattern="2:4", num_grads=6, recomputations=1, progress=False)
    weight = model[2].weight  # [in, out / groups, 2, 2]: four inputs of one group, for each output and position
    quads = weight.view(8 // 4, 4, *weight.shape[1:])
    assert ((quads == 0).sum(1) == 2).all()


def test_tied_embeddings():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.body, self.head = nn.Embedding(32, 8), nn.Linear(8, 8), nn.Linear(8, 32, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids):
            return self.head(torch.tanh(self.body(self.embedding(ids)))).mean(1)

    batches = [(b["input_ids"], b["labels"][:, 0]) for b in tokens()]
    result = check_against_plain_loop(Tied(), batches, classify, loss_fn=CE)
    assert list(result.masks) == ["body.weight"]
    model = Tied()
    result = mfac.prune(
        model, batches, CE, 0.5, params="head.weight", num_grads=6, recomputations=1, progress=False, **SETTINGS
    )
    assert list(result.masks) == ["embedding.weight"] and model.head.weight is model.embedding.weight
    check_zeros(model, result, 0.5)


def mlp():
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def test_frozen_layers(unchanged):
    model = mlp()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    result = check_against_plain_loop(model, vectors(), classify, loss_fn=CE)
    assert list(result.masks) == ["2.weight", "4.weight"] and torch.equal(model[0].weight, before)
    assert not model[0].weight.requires_grad
    frozen = mlp().requires_grad_(False)
    with unchanged(frozen), pytest.raises(ValueError, match="frozen"):
        mfac.prune(frozen, vectors(), CE, 0.5, progress=False)
    result = check_against_plain_loop(frozen, vectors(), classify, loss_fn=CE, params="0.weight")
    assert list(result.masks) == ["0.weight"]


@pytest.mark.parametrize("style", ["parametrization", "hook"])
def test_weight_norm(style):
    """Pruned through the direction v, whose zeros are those of the weight."""
    if style == "hook":
        norm, name = torch.nn.utils.weight_norm, "0.weight_v"
    else:
        norm, name = torch.nn.utils.parametrizations.weight_norm, "0.parametrizations.weight.original1"
    model = mlp()
    norm(model[0])
    result = mfac.prune(model, vectors(), CE, 0.5, num_grads=6, recomputations=1, progress=False, **SETTINGS)
    assert name in result.masks
    check_zeros(model, result, 0.5)
    model(vectors()[0][0])  # the old style computes the weight here
    assert torch.equal(model[0].weight != 0, result.masks[name])


def test_bfloat16_weights():
    model = mlp().bfloat16()
    batches = [(x.bfloat16(), y) for x, y in vectors()]
    result = check_against_plain_loop(model, batches, classify, loss_fn=CE)
    assert model[0].weight.dtype == torch.bfloat16 and len(result.masks) == 3


def test_channels_last():
    torch.manual_seed(0)
    models = [upsampling(1) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    models[1].to(memory_format=torch.channels_last)
    results = [check_against_plain_loop(model, images(), classify, loss_fn=CE) for model in models]
    assert all(torch.equal(results[0].masks[name], mask) for name, mask in results[1].masks.items())
    assert models[1][0].weight.is_contiguous(memory_format=torch.channels_last)


def test_detector_in_training_mode():
    """A model whose loss exists in training mode only; running statistics stay."""

    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))

        def forward(self, x, y):
            out = self.body(x)
            return {"loss": CE(out, y)} if self.training else out

    model = Detector().eval()
    mean = model.body[1].running_mean.clone()
    result = mfac.prune(
        model, [{"x": x, "y": y} for x, y in vectors()], sparsity=0.5, mode="train", num_grads=6, recomputations=1,
        progress=False, **SETTINGS,
    )  # fmt: skip
    check_zeros(model, result, 0.5)
    assert torch.equal(model.body[1].running_mean, mean) and not model.training


def test_weights_that_the_loss_does_not_reach():
    """They stay dense and do not count; a warning says so before the work."""

    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = mlp(), nn.Linear(5, 5)

        def forward(self, x):
            return self.used(x)

    model = Unused()
    with pytest.warns(UserWarning, match="unused.weight"):
        result = mfac.prune(model, vectors(), CE, 0.5, num_grads=6, recomputations=2, progress=False, **SETTINGS)
    assert result.masks["unused.weight"].all() and (model.unused.weight != 0).all()
    used = sum(mask.numel() for name, mask in result.masks.items() if name != "unused.weight")
    assert sum(int((~mask).sum()) for mask in result.masks.values()) == round(0.5 * used)


def test_emptied_layers_are_announced_or_prevented():
    torch.manual_seed(0)
    model = mlp()
    with torch.no_grad():
        model[2].weight.mul_(1e-4)
    with pytest.warns(UserWarning, match="scope='global' leaves no weight in 2.weight"):
        mfac.prune_step(model, None, 0.7, criterion="magnitude")
    model = mlp()
    with torch.no_grad():
        model[2].weight.mul_(1e-4)
    result = mfac.prune_step(model, None, 0.7, criterion="magnitude", max_layer_sparsity=0.8)
    shares = [1 - kept / n for _, n, kept in result.layers]
    assert shares[1] == pytest.approx(0.8, abs=1 / 256) and max(shares) <= 0.8
    assert sum(n - kept for _, n, kept in result.layers) == round(0.7 * sum(n for _, n, _ in result.layers))


def test_numbers_of_numpy_and_of_torch():
    import numpy as np

    results = []
    for s, b, m in ((0.5, 64, 6), (np.float64(0.5), np.int64(64), torch.tensor(6))):
        torch.manual_seed(0)
        results.append(
            mfac.prune(mlp(), vectors(), CE, s, block_size=b, num_grads=m, recomputations=1, progress=False).masks
        )
    assert all(torch.equal(mask, results[1][name]) for name, mask in results[0].items())
    with pytest.raises(TypeError, match="num_grads: expected an int, got True"):
        mfac.prune(mlp(), vectors(), CE, 0.5, num_grads=True)
