"""Layout of charts: ticks, smoothing, and values that cannot be drawn."""

from dreamfleet.trainers.report.charts import Chart, Line, lay_out, smooth, ticks


def test_charts_have_round_ticks_and_skip_values_that_are_not_finite() -> None:
    assert ticks(0, 800) == [0, 200, 400, 600, 800]
    assert ticks(0.1083, 0.1432) == [0.11, 0.12, 0.13, 0.14]
    assert smooth([(0, 1.0), (1, 1.0)]) == [(0, 1.0), (1, 1.0)]
    assert lay_out(Chart("empty", [Line("nothing", [])]), last_step=10) is None
    flat = lay_out(Chart("flat", [Line("rate", [(1, 5e-6), (2, 5e-6)])], from_zero=True), last_step=2)
    odd = lay_out(Chart("x", [Line("y", [(1, float("nan")), (2, 0.0)])]), last_step=2)
    many = lay_out(Chart("many", [Line("loss", [(s, 1.0 + s % 7) for s in range(100_000)])]), last_step=1e5)
    assert "nan" not in repr(odd).lower()
    assert "nan" not in repr(flat).lower() and "inf" not in repr(flat).lower()
    assert len(repr(many)) < 60_000
