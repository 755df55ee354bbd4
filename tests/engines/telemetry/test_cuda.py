"""CUDA by the driver API, against a scripted libcuda; the real one runs in tests/gpu."""

from __future__ import annotations

import ctypes
import re
from typing import Any

import pytest

from engines.telemetry import cuda


class Library:
    """libcuda with given return codes; the kernel computes in Python what its PTX says."""

    def __init__(self, wrong: bool = False, count: int = 1, **codes: int) -> None:
        self._codes, self._count, self._wrong = codes, count, wrong
        self._memory: dict[int, Any] = {}
        self.called: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*args: Any) -> int:
            self.called.append(name)
            if code := self._codes.get(name, 0):
                return code
            if act := getattr(type(self), f"_{name}", None):
                act(self, *args)
            return 0

        return call

    def cuGetErrorName(self, code: int, out: Any) -> int:
        names = {2: b"CUDA_ERROR_OUT_OF_MEMORY", 999: b"CUDA_ERROR_UNKNOWN"}
        out._obj.value = names.get(code)
        return 0 if code in names else 1

    def _cuDeviceGetCount(self, out: Any) -> None:
        out._obj.value = self._count

    def _cuMemAlloc_v2(self, out: Any, size: Any) -> None:
        out._obj.value = 4096 * (len(self._memory) + 1)
        self._memory[out._obj.value] = (ctypes.c_uint32 * (size.value // 4))()

    def _cuLaunchKernel(self, _function: Any, blocks: int, *rest: Any) -> None:
        given = rest[-2]
        out = ctypes.cast(given[0], ctypes.POINTER(ctypes.c_uint64))[0]
        count = ctypes.cast(given[1], ctypes.POINTER(ctypes.c_uint32))[0]
        assert blocks * 128 >= count
        for index in range(count):
            self._memory[out][index] = 3 * index + (self._wrong and index == 5)

    def _cuMemcpyDtoH_v2(self, answer: Any, out: Any, size: Any) -> None:
        ctypes.memmove(answer, self._memory[out.value], size.value)


def use(monkeypatch, library: Any) -> None:
    monkeypatch.setattr(cuda.ctypes, "CDLL", lambda _name: library)


@pytest.mark.parametrize(
    ("library", "said"),
    [
        (Library(), ""),
        (Library(cuInit=999), "cuInit failed: CUDA_ERROR_UNKNOWN (999)"),
        (Library(cuInit=12345), "cuInit failed: error 12345"),
        (Library(count=0), "CUDA counts no device (is CUDA_VISIBLE_DEVICES empty?)"),
    ],
)
def test_cuda_is_tried_and_not_believed(monkeypatch, library, said):
    use(monkeypatch, library)
    assert cuda.cuda_error() == said


@pytest.mark.parametrize(
    ("library", "said"),
    [
        (Library(), ""),
        (Library(count=0), "CUDA counts no device"),
        (Library(wrong=True), "the kernel computed 16 where 15 is right"),
        (Library(cuCtxCreate_v2=2), "cuCtxCreate_v2 failed: CUDA_ERROR_OUT_OF_MEMORY (2)"),
        (Library(cuModuleLoadData=209), "cuModuleLoadData failed: error 209"),
        (Library(cuCtxSynchronize=999), "cuCtxSynchronize failed: CUDA_ERROR_UNKNOWN (999)"),
    ],
)
def test_a_trial_goes_the_whole_way_and_checks_the_answer(monkeypatch, library, said):
    use(monkeypatch, library)
    assert cuda.exercise() == said


def test_a_trial_leaves_nothing_allocated(monkeypatch):
    library = Library()
    use(monkeypatch, library)
    cuda.exercise()
    assert library.called.count("cuMemFree_v2") == library.called.count("cuMemAlloc_v2") == 1
    assert library.called[-1] == "cuCtxDestroy_v2"


def test_a_missing_libcuda_is_named(monkeypatch):
    def absent(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(cuda.ctypes, "CDLL", absent)
    assert cuda.cuda_error() == cuda.exercise() == "libcuda.so.1 is not installed"


def test_the_kernel_declares_what_it_uses():
    """PTX is only compiled on a GPU box: here at least every register and label it names is declared."""
    text = cuda.PTX.decode()
    for kind in ("p", "r", "rd"):
        (bound,) = (int(number) for number in re.findall(rf"\.reg \.\w+ %{kind}<(\d+)>", text))
        used = {int(number) for number in re.findall(rf"%{kind}(\d+)", text)}
        assert max(used) < bound
    assert {*re.findall(r"bra (\w+)", text)} == {*re.findall(r"^(\w+):", text, re.MULTILINE)}
