"""Functions of the C library by name, without the module ctypes, whose import takes as long as all the layers do.

What does the work is its C half, which is imported in a tenth of the time; an interpreter that has another one gets
the whole module.
"""

from __future__ import annotations

import struct

TYPE_CHECKING = False  # what start.py says of `typing`
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Function = Callable[..., int]

try:
    import _ctypes

    class _Int(_ctypes._SimpleCData):  # type: ignore[type-arg]
        _type_ = "i"

    class _Long(_ctypes._SimpleCData):  # type: ignore[type-arg]
        _type_ = "l"

    class _Word(_ctypes._SimpleCData):  # type: ignore[type-arg]
        _type_ = "L"

    class _Bytes(_ctypes._SimpleCData):  # type: ignore[type-arg]
        _type_ = "z"

    # The GIL is kept: `clone` must return into an interpreter that nobody else could have touched.
    _FLAGS = _ctypes.FUNCFLAG_CDECL | _ctypes.FUNCFLAG_PYTHONAPI | _ctypes.FUNCFLAG_USE_ERRNO

    class _Quick(_ctypes.CFuncPtr):
        _flags_ = _FLAGS
        _restype_ = _Int

    class _QuickLong(_ctypes.CFuncPtr):
        _flags_ = _FLAGS
        _restype_ = _Long

    _SELF = _ctypes.dlopen(None, 0)  # type: ignore[arg-type]
    get_errno = _ctypes.get_errno

    def _found(name: str, long: bool) -> Any:
        return (_QuickLong if long else _Quick)(_ctypes.dlsym(_SELF, name))

except (ImportError, AttributeError):
    import ctypes

    _Word, _Bytes = ctypes.c_ulong, ctypes.c_char_p  # type: ignore[assignment,misc]
    get_errno = ctypes.get_errno

    def _found(name: str, long: bool) -> Any:
        found = ctypes.PyDLL(None, use_errno=True)[name]
        found.restype = ctypes.c_long if long else ctypes.c_int
        return found


def function(name: str, *, long: bool = False) -> Function:
    """A function of the C library or of Python's own C interface; it takes integers, bytes and None for NULL.

    Args:
        long: it returns a long, not an int.

    Raises:
        OSError, AttributeError: there is none of this name.
    """
    found = _found(name, long)
    return lambda *args: int(found(*[_Bytes(arg) if isinstance(arg, bytes) else _Word(arg or 0) for arg in args]))


def address(data: bytes) -> int:
    """Where bytes lie; they must be kept for as long as somebody looks there."""
    return int(struct.unpack("P", bytes(memoryview(_Bytes(data))))[0])
