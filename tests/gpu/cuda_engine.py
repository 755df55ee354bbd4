"""An engine that uses CUDA by itself, through the driver API: kind `x-cuda`, inside the real sandbox.

Parameters: {"do": "triple"} runs a small kernel and checks its answer; {"do": "spin"} starts one that never ends;
{"do": "fill"} allocates until there is no memory left, and fails with CUDA's own words. Load option `hold_bytes` is
allocated at the load and kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engines.runtime.contract import Case, Claims, Engine, Fixture, Job, LoadProgress, Model, Outcome, Ready, refuse
from engines.telemetry.cuda import Cuda, CudaError
from protocol.work import FreeResult

WORDS = 4096
CHUNK = 2**30
FOREVER = 2**62


class CudaEngine(Engine):
    name = "cuda-test"
    kinds = ("x-cuda",)

    @classmethod
    def probe(cls, backend: str) -> Claims:
        return Claims(versions={}, devices=("cuda",))

    @classmethod
    def fixture(cls, backend: str) -> Fixture:
        case = Case(kind="x-cuda", params={"do": "triple"}, check=lambda _result, _files: "")
        return Fixture(model=Model(name="cuda-test"), cases=(case,))

    def load(self, model: Model, scratch: Path, progress: LoadProgress) -> Ready:
        self._cuda = Cuda()
        self._cuda.count()
        self._cuda.open()
        progress(1, 2, "load")
        self._kernel = self._cuda.kernel()
        self._memory = self._cuda.allocate(4 * WORDS)
        self._cuda.triple(self._kernel, self._memory, WORDS)  # whatever it needs is allocated from now on
        if hold := int(model.options.get("hold_bytes", 0)):
            self._cuda.allocate(hold)
        return Ready(device="cuda:0", slots=1, schema={"type": "object"}, versions={})

    def validate(self, kind: str, params: Any) -> None:
        if params.get("do") not in ("triple", "spin", "fill"):
            raise refuse("invalid_parameter", "do: expected triple, spin or fill.", "do")

    def run(self, job: Job) -> Outcome:
        self._cuda.use()
        job.progress(1, 2, "on the GPU")
        if job.params["do"] == "fill":
            self._fill(job)
        self._cuda.triple(self._kernel, self._memory, WORDS, FOREVER if job.params["do"] == "spin" else 0)
        return Outcome(body=FreeResult(output={"ok": True}))

    def _fill(self, job: Job) -> None:
        size = CHUNK
        while True:
            try:
                self._cuda.allocate(size)
                job.progress(2, None, "fill")
            except CudaError:
                if size <= 2**20:
                    raise
                size //= 2


ENGINE = CudaEngine
