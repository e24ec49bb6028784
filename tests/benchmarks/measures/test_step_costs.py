"""How step costs are measured: widths after a warm-up, models in turn."""

from pard_onnx.benchmarks.measures.step_costs import measure, measure_interleaved


def test_measuring_takes_every_width_after_a_warm_up() -> None:
    seen: list[int] = []
    costs = measure(seen.append, (2, 1), repeats=3)
    assert seen == [2, 1] * 4
    assert [width for width, _ in costs.points] == [1, 2]


def test_models_take_turns() -> None:
    calls: list[tuple[str, int]] = []
    steps = [lambda width, name=name: calls.append((name, width)) for name in "ab"]
    found = measure_interleaved(steps, (1, 4), 2)
    assert [[width for width, _ in curve.points] for curve in found] == [[1, 4], [1, 4]]
    assert calls[4:] == [("a", 1), ("b", 1), ("a", 4), ("b", 4)] * 2
