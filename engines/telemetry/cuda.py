"""Whether CUDA itself works here, by trying it through the driver API. Standard library only.

NVML answering proves nothing for CUDA: nvidia-uvm may be loaded seconds later, and a GPU that needs a reset is
still listed. `exercise` goes the whole way: context, allocation, a small kernel, and its answer read back.
"""

from __future__ import annotations

import ctypes
from typing import Any

_LIBRARIES = ("libcuda.so.1", "/usr/lib/wsl/lib/libcuda.so.1")
_WORDS = 4096
_NO_SUCH_LIBRARY = "libcuda.so.1 is not installed"

# out[i] = i * 3 for i < n, then `spin` rounds of nothing: PTX 6.0 for sm_50, which every driver since 2018 compiles
# for whatever GPU it finds.
PTX = b"""
.version 6.0
.target sm_50
.address_size 64
.visible .entry triple(.param .u64 out, .param .u32 n, .param .u64 spin)
{
    .reg .pred %p<3>;
    .reg .b32 %r<7>;
    .reg .b64 %rd<8>;
    ld.param.u64 %rd1, [out];
    ld.param.u32 %r1, [n];
    ld.param.u64 %rd5, [spin];
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %ntid.x;
    mov.u32 %r4, %tid.x;
    mad.lo.s32 %r5, %r2, %r3, %r4;
    setp.ge.u32 %p1, %r5, %r1;
    @%p1 bra DONE;
    mul.lo.s32 %r6, %r5, 3;
    cvta.to.global.u64 %rd2, %rd1;
    mul.wide.u32 %rd3, %r5, 4;
    add.s64 %rd4, %rd2, %rd3;
    st.volatile.global.u32 [%rd4], %r6;
    mov.u64 %rd6, 0;
AGAIN:
    setp.ge.u64 %p2, %rd6, %rd5;
    @%p2 bra DONE;
    ld.volatile.global.u32 %r6, [%rd4];
    st.volatile.global.u32 [%rd4], %r6;
    add.s64 %rd6, %rd6, 1;
    bra AGAIN;
DONE:
    ret;
}
"""


class CudaError(Exception):
    """A call of the driver API failed; the text names the call and CUDA's own name for the fault."""


class Cuda:
    """libcuda with its return codes turned into `CudaError`. One context; `use` brings it to another thread."""

    def __init__(self) -> None:
        self._library = _load()
        self._context = ctypes.c_void_p()

    def call(self, name: str, *args: Any) -> None:
        """Call by name; raises CudaError."""
        if code := getattr(self._library, name)(*args):
            raise CudaError(f"{name} failed: {self._name(code)}")

    def count(self) -> int:
        """cuInit, and how many devices CUDA counts."""
        self.call("cuInit", 0)
        count = ctypes.c_int(0)
        self.call("cuDeviceGetCount", ctypes.byref(count))
        return count.value

    def open(self, ordinal: int = 0) -> None:
        """A context on one device."""
        device = ctypes.c_int(0)
        self.call("cuDeviceGet", ctypes.byref(device), ordinal)
        self.call("cuCtxCreate_v2", ctypes.byref(self._context), 0, device)

    def use(self) -> None:
        """Make the context that of the calling thread: it belongs to the one that called `open` until then."""
        self.call("cuCtxSetCurrent", self._context)

    def close(self) -> None:
        """Destroy the context."""
        self.call("cuCtxDestroy_v2", self._context)

    def allocate(self, size_bytes: int) -> int:
        """Device memory; raises CudaError with CUDA_ERROR_OUT_OF_MEMORY when there is too little."""
        pointer = ctypes.c_uint64(0)
        self.call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(size_bytes))
        return pointer.value

    def kernel(self, image: bytes = PTX, name: bytes = b"triple") -> ctypes.c_void_p:
        """Compile PTX for this device and return one of its functions."""
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuModuleLoadData", ctypes.byref(module), image + b"\0")
        self.call("cuModuleGetFunction", ctypes.byref(function), module, name)
        return function

    def free(self, pointer: int) -> None:
        """Give device memory back."""
        self.call("cuMemFree_v2", ctypes.c_uint64(pointer))

    def triple(self, function: ctypes.c_void_p, pointer: int, count: int, spin: int = 0) -> None:
        """Run `out[i] = 3 i` on the device and check the answer. Raises CudaError.

        Args:
            pointer: device memory for `count` 4-byte words.
            spin: rounds that each thread goes on for; 2**62 is for ever.
        """
        out = ctypes.c_uint64(pointer)
        words = (out, ctypes.c_uint32(count), ctypes.c_uint64(spin))
        given = (ctypes.c_void_p * 3)(*(ctypes.cast(ctypes.pointer(word), ctypes.c_void_p) for word in words))
        self.call("cuLaunchKernel", function, (count + 127) // 128, 1, 1, 128, 1, 1, 0, None, given, None)
        self.call("cuCtxSynchronize")
        answer = (ctypes.c_uint32 * count)()
        self.call("cuMemcpyDtoH_v2", answer, out, ctypes.c_size_t(4 * count))
        wrong = [index for index in range(count) if answer[index] != 3 * index]
        if wrong:
            raise CudaError(f"the kernel computed {answer[wrong[0]]} where {3 * wrong[0]} is right")

    def _name(self, code: int) -> str:
        name = ctypes.c_char_p()
        if self._library.cuGetErrorName(code, ctypes.byref(name)) == 0 and name.value:
            return f"{name.value.decode()} ({code})"
        return f"error {code}"


def _load() -> Any:
    for name in _LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise CudaError(_NO_SUCH_LIBRARY)


def cuda_error() -> str:
    """Why CUDA does not work here although NVML lists a GPU; "" when `cuInit` succeeds and counts one."""
    try:
        return "" if Cuda().count() else "CUDA counts no device (is CUDA_VISIBLE_DEVICES empty?)"
    except CudaError as error:
        return str(error)


def exercise() -> str:
    """Context, memory, a kernel and its answer on CUDA's first visible device; "" when all is well, else why not."""
    try:
        cuda = Cuda()
        if not cuda.count():
            return "CUDA counts no device"
        cuda.open()
        memory = cuda.allocate(4 * _WORDS)
        cuda.triple(cuda.kernel(), memory, _WORDS)
        cuda.free(memory)
        cuda.close()
    except CudaError as error:
        return str(error)
    return ""
