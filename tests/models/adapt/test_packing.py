"""Packing against a literal reading of PARD's definition, and against what the draft computes at run time."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pard_onnx.models.adapt.packing import IGNORE, Drop, pack

MASK = 99
DROPS = st.builds(
    Drop,
    segments=st.integers(1, 6),
    ratio=st.sampled_from([0.2, 0.5, 0.7, 0.9, 1.0]),
    floor=st.sampled_from([0.05, 0.2, 0.6, 1.0]),
)
SEEDS = st.integers(0, 1000)


def tokens_of(length: int) -> np.ndarray:
    return np.arange(length, dtype=np.int64) + 7  # all different, so a label tells its position


def literal(tokens: list[int], kept: list[tuple[int, int]]) -> dict[str, list]:
    """The packed sequence of the (segment, base) pairs, word for word after the module's docstring.

    A mask is known by its pair; a real token at position i is the pair (0, i).
    """
    ids, positions, labels, mask = [], [], [], []
    for segment, base in kept:
        if segment == 0:  # "the token at position i predicts x[i+1]"
            ids.append(tokens[base])
            positions.append(base)
            predicted = base + 1
        else:  # "the one of base b stands at position b + j and predicts x[b+j+1]"
            ids.append(MASK)
            positions.append(base + segment)
            predicted = base + segment + 1
        labels.append(tokens[predicted] if predicted < len(tokens) else IGNORE)
        row = []
        for other_segment, other_base in kept:
            if other_segment == 0:  # "sees x[0..b]"; a real token sees those up to itself
                row.append(other_base <= base)
            else:  # "and the masks of its own base in segments 1..j"; a real token sees none
                row.append(segment > 0 and other_base == base and 1 <= other_segment <= segment)
        mask.append(row)
    return {"ids": ids, "positions": positions, "labels": labels, "mask": mask}


@settings(deadline=None)
@given(st.integers(1, 24), DROPS, SEEDS)
def test_a_packed_sequence_is_the_literal_one(length, drop, seed):
    tokens = tokens_of(length)
    packed = pack(tokens, MASK, drop, np.random.default_rng(seed))
    kept = list(zip(packed.segments.tolist(), packed.bases.tolist(), strict=True))
    expected = literal(tokens.tolist(), kept)

    assert expected["ids"] == packed.ids.tolist()
    assert expected["positions"] == packed.positions.tolist()
    assert expected["labels"] == packed.labels.tolist()
    assert expected["mask"] == packed.mask().tolist()


@settings(deadline=None)
@given(st.integers(1, 24), DROPS, SEEDS)
def test_what_is_kept_can_be_learned(length, drop, seed):
    """Every kept pair is kept once, has its label, and finds the masks that it must attend to."""
    packed = pack(tokens_of(length), MASK, drop, np.random.default_rng(seed))
    kept = list(zip(packed.segments.tolist(), packed.bases.tolist(), strict=True))

    assert len(set(kept)) == len(kept)
    assert [base for segment, base in kept if segment == 0] == list(range(length))
    for (segment, base), label in zip(kept, packed.labels, strict=True):
        assert 0 <= segment < drop.segments
        assert {(j, base) for j in range(segment)} <= set(kept)
        assert (label == IGNORE) == (segment == 0 and base == length - 1)


@settings(deadline=None)
@given(st.integers(1, 400), DROPS, SEEDS)
def test_the_shares_are_kept_and_nested(length, drop, seed):
    usable = max(0, length - drop.segments)
    bases = drop.bases(length, np.random.default_rng(seed))

    assert len(bases) == drop.segments
    assert [len(kept) for kept in bases] == drop.counts(length)
    assert drop.counts(length)[0] == length
    for j, kept in enumerate(bases[1:], start=1):
        exact = max(drop.ratio**j, drop.floor) * usable
        assert exact - 1e-9 <= len(kept) < exact + 1 + 1e-9
        assert set(kept.tolist()) <= set(bases[j - 1].tolist())
        assert sorted(kept.tolist()) == kept.tolist()


def test_the_papers_shares():
    """K = 8, ratio 0.7, floor 0.2: 0.7, 0.49, 0.343, 0.2401, then the floor."""
    assert Drop(8, 0.7, 0.2).counts(10_008) == [10_008, 7000, 4900, 3430, 2401, 2000, 2000, 2000]


def test_every_base_is_dropped_at_times():
    drop = Drop(2, ratio=0.5, floor=0.1)
    kept = [set(drop.bases(12, np.random.default_rng(seed))[1].tolist()) for seed in range(60)]
    assert set.union(*kept) == set(range(10))  # bases 10 and 11 have no label two tokens on
    assert not set.intersection(*kept)


@settings(deadline=None)
@given(st.integers(1, 24), DROPS, SEEDS)
def test_the_same_seed_packs_the_same(length, drop, seed):
    one, two = (pack(tokens_of(length), MASK, drop, np.random.default_rng(seed)) for _ in range(2))
    for name in ("ids", "positions", "labels", "segments", "bases"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


@settings(deadline=None)
@given(st.integers(1, 24), SEEDS)
def test_one_segment_is_autoregressive_training(length, seed):
    tokens = tokens_of(length)
    packed = pack(tokens, MASK, Drop(segments=1), np.random.default_rng(seed))
    np.testing.assert_array_equal(packed.ids, tokens)
    np.testing.assert_array_equal(packed.positions, np.arange(length))
    np.testing.assert_array_equal(packed.labels, [*tokens[1:], IGNORE])
    np.testing.assert_array_equal(packed.mask(), np.tri(length, dtype=bool))


@pytest.mark.parametrize(
    "wrong", [{"segments": 0}, {"ratio": 0.0}, {"ratio": 1.1}, {"floor": 0.0}, {"floor": 1.5}, {"ratio": math.nan}]
)
def test_a_drop_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        Drop(**wrong)


def test_packing_is_inference():
    """A packed mask's logits are those of the plain causal model after x[0..b] and j masks."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, initializer_range=0.3,
        )
    ).eval()  # fmt: skip
    tokens = np.random.default_rng(0).integers(0, 90, 14)
    packed = pack(tokens, MASK, Drop(segments=4, ratio=0.8, floor=0.3), np.random.default_rng(1))
    mask = torch.where(torch.from_numpy(packed.mask()), 0.0, -torch.inf)[None, None]
    with torch.inference_mode():
        logits = model(
            input_ids=torch.from_numpy(packed.ids)[None],
            position_ids=torch.from_numpy(packed.positions)[None],
            attention_mask=mask,
        ).logits[0]
        for row, (segment, base) in enumerate(zip(packed.segments, packed.bases, strict=True)):
            run_time = [*tokens[: base + 1], *[MASK] * segment]
            expected = model(input_ids=torch.tensor([run_time])).logits[0, -1]
            torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-4)
    assert packed.segments.max() == 3
    assert logits.std() > 0.5  # far above the tolerance: a wrong mask shows
