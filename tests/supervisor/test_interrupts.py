"""Ctrl-C, bare and wrapped."""

from __future__ import annotations

import pytest

from supervisor.interrupts import is_interrupt


@pytest.mark.parametrize(
    ("error", "interrupt"),
    [
        (KeyboardInterrupt(), True),
        (BaseExceptionGroup("nursery", [BaseExceptionGroup("inner", [KeyboardInterrupt()])]), True),
        (ValueError(), False),
        (ExceptionGroup("nursery", [ValueError()]), False),
    ],
)
def test_an_interrupt_is_recognised(error: BaseException, interrupt: bool):
    assert is_interrupt(error) is interrupt
