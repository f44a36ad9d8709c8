"""Numbers formatted for people."""

from dreamfleet.trainers.report import formatting


def test_numbers_have_units_and_significant_digits() -> None:
    assert [formatting.seconds(x) for x in (0.25, 7.04, 59.6, 214, 7800, 4e5)] == [
        "0.25 s", "7.0 s", "1 min 00 s", "3 min 34 s", "2 h 10 min", "4 d 15 h",
    ]  # fmt: skip
    assert [formatting.size(x) for x in (512, 4200, 23_400_000, 123_456_789, 2e12)] == [
        "512 B", "4.2 kB", "23.4 MB", "123 MB", "2.0 TB",
    ]  # fmt: skip
    assert [formatting.number(x) for x in (0, 12, 0.08312, 5e-6, 1.25e-6, 31.25, 0.1, -0.0151)] == [
        "0", "12", "0.0831", "5e-6", "1.25e-6", "31.2", "0.1", "\N{MINUS SIGN}0.0151",
    ]  # fmt: skip
    assert formatting.number(6400) == formatting.number(6400.4) == "6\N{NARROW NO-BREAK SPACE}400"
    assert formatting.number(1e38) == "1e38" and formatting.number(1.5e15 + 0.5) == "1.5e15"
    assert [formatting.share(x) for x in (0.004, 0.12, 0, 2e-4)] == ["0.4 %", "12 %", "0 %", "< 0.1 %"]
