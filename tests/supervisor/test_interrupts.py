"""Commands end with one sentence: refusals, and a Ctrl-C, bare and wrapped."""

from __future__ import annotations

import pytest

from supervisor.errors import ExitCode, NoPermission
from supervisor.interrupts import INTERRUPTED, ended, is_interrupt


def while_a_class_is_made(cause: BaseException) -> BaseException:
    """As an import meets it: up to Python 3.11, what a field raises is wrapped."""

    class Field:
        def __set_name__(self, owner: type, name: str) -> None:
            raise cause

    try:
        type("Made", (), {"field": Field()})
    except BaseException as error:
        return error
    raise AssertionError("a class was made")


@pytest.mark.parametrize(
    ("error", "interrupt"),
    [
        (KeyboardInterrupt(), True),
        (BaseExceptionGroup("nursery", [BaseExceptionGroup("inner", [KeyboardInterrupt()])]), True),
        (while_a_class_is_made(KeyboardInterrupt()), True),
        (while_a_class_is_made(ValueError()), False),
        (RuntimeError("ours"), False),
        (ValueError(), False),
        (ExceptionGroup("nursery", [ValueError()]), False),
    ],
)
def test_an_interrupt_is_recognised(error: BaseException, interrupt: bool):
    assert is_interrupt(error) is interrupt


def raising(error: BaseException):
    def command() -> int:
        raise error

    return command


def test_a_command_ends_with_its_own_code(capsys):
    assert ended(lambda: 3, "stopped") == 3
    assert capsys.readouterr().err == ""


def test_a_refusal_is_its_sentence_and_its_code(capsys):
    assert ended(raising(NoPermission("It cannot be written.")), "stopped") == ExitCode.NO_PERMISSION
    assert capsys.readouterr().err == "It cannot be written.\n"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), BaseExceptionGroup("nursery", [KeyboardInterrupt()])])
def test_an_interrupt_says_what_it_means(capsys, error: BaseException):
    assert ended(raising(error), "run it again") == INTERRUPTED
    assert capsys.readouterr().err == "\nrun it again\n"


def test_a_mistake_of_ours_keeps_its_traceback():
    with pytest.raises(ValueError, match="ours"):
        ended(raising(ValueError("ours")), "stopped")
