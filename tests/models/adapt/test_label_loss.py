"""The loss of labels and its gradient against torch's own operators."""

import pytest

pytest.importorskip("torch")

import torch
from torch.autograd import grad
from torch.nn.functional import cross_entropy, kl_div

from pard_onnx.models.adapt import label_loss as module
from pard_onnx.models.adapt.label_loss import Teaching, label_loss

LABELS = 70


@pytest.fixture(autouse=True, params=[1, 1 << 12, 1 << 30])
def block(request, monkeypatch):
    """Blocks of one row, of some, and of all."""
    monkeypatch.setitem(module.BLOCK, "cpu", request.param)


def logits(rows: int, count: int = LABELS, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, rows, generator=torch.Generator().manual_seed(rows)).mul(3).to(dtype).requires_grad_()


def labels() -> torch.Tensor:
    return torch.randint(0, 128, (LABELS,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cross_entropy_is_torchs(dtype):
    ours, wanted = logits(140, dtype=dtype), labels()
    total, surprise = label_loss(ours, wanted)
    expected = cross_entropy(ours.float(), wanted, reduction="none")
    torch.testing.assert_close(total, expected.sum())
    torch.testing.assert_close(surprise, expected.detach())
    assert not surprise.requires_grad
    torch.testing.assert_close(grad(5 * total, ours)[0], grad(5 * expected.sum(), ours)[0], rtol=2e-2, atol=1e-5)


@pytest.mark.parametrize(("rows", "target_rows"), [(140, 140), (128, 140), (140, 128)])
def test_a_taught_loss_is_torchs(rows, target_rows):
    ours, wanted, rng = logits(rows), labels(), torch.Generator().manual_seed(4)
    told = logits(target_rows, 9).detach()
    places, weights = torch.randint(0, 9, (LABELS,), generator=rng), torch.rand(LABELS, generator=rng)
    total, surprise = label_loss(ours, wanted, Teaching(told, places, weights, 0.3, 0.7))
    both = min(rows, target_rows)
    drafted, taught = ours.log_softmax(-1), told[places, :both].log_softmax(-1)
    expected_surprise = cross_entropy(drafted, wanted, reduction="none")
    divergence = kl_div(drafted[:, :both], taught, reduction="none", log_target=True).sum(-1)
    expected = ((0.3 * expected_surprise + 0.7 * divergence) * weights).sum()
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(surprise, expected_surprise.detach())
    torch.testing.assert_close(grad(5 * total, ours)[0], grad(5 * expected, ours)[0])


def test_no_label_is_no_loss():
    empty = torch.zeros(0, 140, requires_grad=True)
    total, surprise = label_loss(empty, torch.zeros(0, dtype=torch.int64))
    assert total.item() == 0 and surprise.shape == (0,)
    assert grad(total, empty)[0].shape == (0, 140)
