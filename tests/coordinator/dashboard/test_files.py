"""The files of the page: served to everybody, under headers that nothing may loosen, and one look with the worker's."""

from __future__ import annotations

import re
from pathlib import Path

import httpx

from coordinator.dashboard.files import FOLDER, HEADERS, files
from coordinator.testing import Running
from supervisor.control.loopback import HEADERS as WORKERS_HEADERS

WORKERS_PAGE = Path(__file__).parents[3] / "supervisor" / "control" / "ui"


def test_every_file_has_its_type_and_the_strict_headers(served: Running) -> None:
    assert set(files()) >= {"/", "/dashboard/app.js", "/dashboard/style.css", "/dashboard/icon.svg"}
    for path, file in files().items():
        answer = httpx.get(served.url + path)
        assert (path, answer.status_code, answer.headers["content-type"]) == (path, 200, file.kind)
        assert answer.content == file.data
        assert {name: answer.headers[name] for name in HEADERS} == HEADERS
        assert answer.headers["x-content-type-options"] == "nosniff"
        again = httpx.get(served.url + path, headers={"if-none-match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    assert httpx.get(served.url + "/dashboard/../keys.sqlite").status_code in (401, 404)
    assert httpx.get(served.url + "/dashboard/%2e%2e/app.py").status_code == 401


def test_nothing_on_the_page_comes_from_elsewhere_or_runs_inline() -> None:
    page = (FOLDER / "index.html").read_text()
    assert re.findall(r"(?:src|href)=\"(?!/dashboard/|#)", page) == []
    assert re.findall(r"<style|\sstyle=|\son\w+=|<script>", page) == []
    for path in FOLDER.glob("*.js"):
        text = path.read_text()
        assert re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(|new Function", text) == [], path
        assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text) == [], path


def test_both_pages_are_one_product() -> None:
    for name in ("style.css", "dom.js", "words.js", "icon.svg"):
        assert (FOLDER / name).read_bytes() == (WORKERS_PAGE / name).read_bytes(), name
    assert WORKERS_HEADERS.items() <= HEADERS.items()
