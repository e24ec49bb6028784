"""The check of quality: it measures what the graphs do, and judges a loss by role, bits and what is accepted."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pard_onnx.export.exporter import Job, export
from pard_onnx.export.verify.perplexity import ACCEPTED, ROWS, judge, losses_of, measure
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.demo import TARGET
from pard_onnx.models.devices import DEVICES, form_for
from pard_onnx.models.errors import Failure, PardWarning
from pard_onnx.models.manifest import Manifest, Source, TextQuality
from pard_onnx.quantize.quantizer import QuantizationRequest
from pard_onnx.quantize.recipes import named_recipe

Tiny = Callable[..., Path]


@given(st.integers(0, 2**31), st.integers(2, 300))
def test_losses_are_torchs(seed: int, ids: int) -> None:
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(9, ids)) * 30).astype(np.float32)
    wanted = rng.integers(0, ids, 9)
    expected = torch.nn.functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(wanted), reduction="none")
    np.testing.assert_allclose(losses_of(logits, wanted), expected.numpy(), rtol=1e-4, atol=1e-5)


def test_a_row_that_is_not_finite_is_an_infinite_loss() -> None:
    logits = np.zeros((3, 4), np.float32)
    logits[1, 2] = np.nan
    assert np.isinf(losses_of(logits, np.zeros(3, np.int64))).tolist() == [False, True, False]


@pytest.mark.parametrize("role", ("target", "draft"))
@pytest.mark.parametrize(
    ("device", "options"),
    (("cpu", {}), ("cpu", {"attention": "portable"}), ("npu", {"static": True})),
    ids=("fused", "portable", "static"),
)
def test_an_export_in_floats_predicts_as_its_checkpoint_does(
    tmp_path: Path, tiny: Tiny, role: str, device: str, options: dict[str, object]
) -> None:
    """In every kind of graph; windows begin with an empty KV cache."""
    checkpoint = Checkpoint.open(tiny(tmp_path / "model", "qwen2", role))
    form = form_for(DEVICES[device], **options)  # type: ignore[arg-type]
    job = Job(checkpoint, Source("tiny"), tmp_path / "out", "fp32", form=form, capacity=96)
    found = export(job).quality
    assert found is not None and found.rows >= ROWS and found.top1_agreement > 0.99
    assert abs(found.loss) < 1e-4
    assert Manifest.read(tmp_path / "out").quality == found


def test_the_checks_text_is_not_read_while_calibrating() -> None:
    from pard_onnx.export.verify.perplexity import TEXT
    from pard_onnx.quantize.calibration.text import read_text_file

    text, calibration = TEXT.read_text(encoding="utf-8"), "\n".join(read_text_file().texts)
    lines = [line.strip() for line in text.splitlines() if len(line.strip()) > 60]
    assert len(lines) > 20 and not [line for line in lines if line in calibration]


def manifest_of(tmp_path: Path, tiny: Tiny, role: str, recipe: str) -> Manifest:
    order = QuantizationRequest(named_recipe(recipe))
    checkpoint = Checkpoint.open(tiny(tmp_path / "model", role=role))
    job = Job(checkpoint, Source("tiny"), tmp_path / "out", named_recipe(recipe).precision, order=order, verify=False)
    return export(job)


def of_loss(loss: float, perplexity: float = 10.0) -> TextQuality:
    return TextQuality(ROWS, perplexity, perplexity * (1 + loss), 0.9)


@pytest.mark.parametrize(
    ("recipe", "quiet", "told", "better"),
    (
        ("int4-rtn", 0.029, 0.031, "--quality good"),
        ("int4-good", 0.029, 0.031, "--quality best"),
        ("int4-best", 0.029, 0.031, "--precision int8"),
        ("int8-smooth", 0.009, 0.011, "--quality best"),
        ("int8-best", 0.009, 0.011, "--precision fp32"),
    ),
)
def test_a_loss_is_told_with_what_loses_less(
    tmp_path: Path, tiny: Tiny, recipe: str, quiet: float, told: float, better: str
) -> None:
    manifest = manifest_of(tmp_path, tiny, "target", recipe)
    assert judge(of_loss(quiet), manifest, accept_loss=False) is None
    text = judge(of_loss(told), manifest, accept_loss=False)
    assert text is not None and text.startswith(recipe) and better in text and f"{told:.1%}" in text
    assert judge(of_loss(told, perplexity=1e6), manifest, accept_loss=False) is None  # an untrained model


def test_a_large_loss_fails_for_targets_alone(tmp_path: Path, tiny: Tiny) -> None:
    target = manifest_of(tmp_path / "a", tiny, "target", "int4-rtn")
    assert judge(of_loss(ACCEPTED), target, accept_loss=False) is not None
    for loss in (ACCEPTED + 0.01, float("inf"), float("nan")):
        with pytest.raises(Failure, match=r"--accept-loss"):
            judge(of_loss(loss), target, accept_loss=False)
        assert judge(of_loss(loss), target, accept_loss=True) is not None
        draft = replace(target, role="draft")
        assert "accepted less often" in (judge(of_loss(loss), draft, accept_loss=False) or "")


def test_the_export_stops_or_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the shipped target, whose int4 is taken for a much worse one."""
    from pard_onnx.export.verify import perplexity

    checkpoint = Checkpoint.open(TARGET)
    order = QuantizationRequest(named_recipe("int4-rtn"))
    job = Job(checkpoint, Source("demo-target"), tmp_path / "out", "int4", order=order)
    true = measure

    def worse(*arguments: object) -> TextQuality:
        found = true(*arguments)  # type: ignore[arg-type]
        return replace(found, perplexity=found.reference_perplexity * 1.5)

    monkeypatch.setattr(perplexity, "measure", worse)
    with pytest.raises(Failure, match=r"by 50\.0%, .* more than 25%: less is lost by --quality good; --accept-loss"):
        export(job)
    assert not (tmp_path / "out").exists()
    with pytest.warns(PardWarning, match="less is lost by --quality good"):
        manifest = export(replace(job, accept_loss=True))
    assert manifest.quality is not None and manifest.quality.loss == pytest.approx(0.5)
