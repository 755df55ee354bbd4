from __future__ import annotations

from supervisor.observe.figures import amount, counted, span

GIB = 2**30


def test_numbers_for_people() -> None:
    assert [span(s) for s in (0, 0.004, 0.0996, 0.24, 1, 3.25, 59.9, 75.4)] == [
        "0.000 s",
        "0.004 s",
        "0.100 s",
        "0.24 s",
        "1.0 s",
        "3.2 s",
        "59.9 s",
        "75 s",
    ]
    assert [amount(n) for n in (1, 61 * 2**20, 4 * GIB)] == ["1 MiB", "61 MiB", "4.0 GiB"]
    assert [counted(n, "job") for n in (0, 1, 2)] == ["0 jobs", "1 job", "2 jobs"]
    assert [counted(n, "process", "processes") for n in (1, 2)] == ["1 process", "2 processes"]
