"""Output files as answers."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from coordinator.files import only_file
from coordinator.records import JobRecord, StoredFile
from protocol.faults import FaultError
from protocol.work import FreeResult

FILE = StoredFile("a", "k", "text/plain", 1, "0" * 64)


@pytest.mark.parametrize("files", [(), (FILE, FILE)])
def test_exactly_one_file_is_due(files: Any) -> None:
    record = JobRecord(
        id="j", kind="video", model="m", state="succeeded", tenant="t", attempt=1, created_ms=0, params=b"", files=files
    )
    with pytest.raises(FaultError) as caught:
        only_file(record)
    assert caught.value.fault.code == "engine_protocol"


def test_ranges_and_deleted_files(http: httpx.Client, served: Any, serve: Any) -> None:
    def script(job: Any) -> None:
        job.started()
        job.upload("a.txt", b"0123456789", "text/plain")
        job.complete(FreeResult())

    serve(script, "filer", "x-filer")
    job = http.post("/v1/jobs", json={"kind": "x-filer", "model": "filer", "wait": 30}).json()
    url = job["files"][0]["url"]
    part = http.get(url, headers={"range": "bytes=2-4"})
    assert (part.status_code, part.content) == (206, b"234")
    assert http.get(f"/v1/jobs/{job['id']}/files/other").status_code == 404
    served.coordinator.parts.blobs.delete(job["id"])
    gone = http.get(url)
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "not_found")
