"""One real job of each kind through a real supervisor, each answer checked. Started by scripts/demo.

Everything a client does here goes over HTTP: the official `openai` client where it has a method, httpx where it
has none. Exit code 0 only when every row of the table is right.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import openai

from engines.diffusion.checks import wrong_file
from engines.piper import tones

ROOT = Path(__file__).resolve().parents[1]
ENGINES = ROOT / "engines"
READY_S = 120
OK, WRONG = "ok", "WRONG"


class Wrong(Exception):
    """An answer came, and it is not right."""


def check(right: bool, sentence: str) -> None:
    """Raise Wrong unless `right`."""
    if not right:
        raise Wrong(sentence)


# ---- the worker


def config(out: Path, listen: str) -> Path:
    """Write a worker.toml that serves the fixture models."""
    fixtures = {
        "chat": ("llm", ENGINES / "llm/fixture/chat-q8_0.gguf"),
        "embed": ("embed", ENGINES / "embed/fixture/tiny-embed-onnx"),
        "whisper": ("whisper", ENGINES / "whisper/fixture/whisper-tiny-test"),
        "voice": ("piper", ENGINES / "piper/fixture/tone-text.onnx"),
        "image": ("image", ENGINES / "image/fixture/tiny-sd-onnx"),
        "video": ("video", ENGINES / "image/fixture/tiny-sd-onnx"),
    }
    lines = [
        "# The demo's worker: six tiny models in the real formats.",
        "config_version = 1",
        f'[coordinator]\nurl = "embedded"\nlisten = "{listen}"',
        f'[worker]\nname = "demo"\nstate_dir = {json.dumps(str(out / "state"))}',
    ]
    for name, (engine, path) in fixtures.items():
        lines.append(f'[[models]]\nname = "{name}"\nengine = "{engine}"\npath = {json.dumps(str(path))}')
    # The operator, not the caller, names the program.
    program = [sys.executable, "-c", "import sys; print('hello', sys.argv[1])", "{who}"]
    lines.append(f'[[models]]\nname = "greet"\nengine = "command"\noptions = {{ argv = {json.dumps(program)} }}')
    path = out / "worker.toml"
    path.write_text("\n\n".join(lines) + "\n")
    return path


@contextlib.contextmanager
def worker(out: Path, listen: str) -> Iterator[tuple[str, str, subprocess.Popen[bytes]]]:
    """Run the supervisor; yields base URL and key. Ends it with SIGTERM, as a service manager would."""
    log = (out / "supervisor.log").open("wb")
    argv = [str(Path(sys.executable).with_name("supervisor")), "run", "--config", str(config(out, listen))]
    process = subprocess.Popen(argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        url, key = wait_ready(process, out)
        yield url, key, process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        log.close()
    if code != 0:
        raise SystemExit(f"The supervisor ended with exit code {code}; see {out / 'supervisor.log'}")


def wait_ready(process: subprocess.Popen[bytes], out: Path) -> tuple[str, str]:
    """Wait until the coordinator answers and all models are announced."""
    endpoint = out / "state" / "endpoint.json"
    until, seen = time.monotonic() + READY_S, -1
    while time.monotonic() < until:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError, ValueError, httpx.HTTPError):
            told = json.loads(endpoint.read_text())
            key = Path(told["client_key_file"]).read_text().strip()
            answer = httpx.get(f"{told['url']}/v1/models", headers={"Authorization": f"Bearer {key}"})
            count = len(answer.json()["data"])
            if count != seen:
                seen = count
                note(f"  {count} of 7 models proved and announced")
            if count == 7:
                return told["url"], key
        time.sleep(0.1)
    tail = (out / "supervisor.log").read_text(errors="replace").splitlines()[-15:]
    raise SystemExit("The worker did not come up. Its last words:\n" + "\n".join(tail))


# ---- one job of each kind


class Jobs:
    """The jobs; each method asks, checks, leaves its artefact in `out`, and returns what to show."""

    def __init__(self, url: str, key: str, out: Path) -> None:
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=120)
        self.http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=120)
        self.out = out

    def llm(self) -> str:
        """Chat: count to 12."""
        messages = [{"role": "user", "content": "count to 12"}]
        answer = self.client.chat.completions.create(model="chat", messages=messages, temperature=0)
        text = (answer.choices[0].message.content or "").strip()
        (self.out / "chat.txt").write_text(text + "\n")
        check(text.split() == [str(n) for n in range(1, 13)], f"counted {text!r}")
        return f"{text}  ({answer.usage.completion_tokens} tokens)"

    def llm_stream(self) -> str:
        """The same as a stream."""
        messages = [{"role": "user", "content": "count to 20"}]
        stream = self.client.chat.completions.create(model="chat", messages=messages, temperature=0, stream=True)
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
        text = "".join(pieces).strip()
        check(text.split() == [str(n) for n in range(1, 21)], f"counted {text!r}")
        check(sum(bool(piece) for piece in pieces) > 5, "did not come in pieces")
        return f"20 numbers in {sum(bool(piece) for piece in pieces)} pieces"

    def embedding(self) -> str:
        """The text that shares words with the question ranks first."""
        texts = ["the red car is fast", "a fast red car", "the moon and the sun"]
        answer = self.client.embeddings.create(model="embed", input=texts)
        rows = np.array([item.embedding for item in answer.data])
        near, far = float(rows[0] @ rows[1]), float(rows[0] @ rows[2])
        (self.out / "embeddings.json").write_text(json.dumps(rows.tolist()))
        check(np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-3), "rows are not of length 1")
        check(near > far + 0.2, f"near {near:.2f}, far {far:.2f}")
        return f"near {near:.2f} > far {far:.2f}, {rows.shape[1]} dimensions"

    def audio_stt(self) -> str:
        """The transcript is the spoken digits."""
        clip = ENGINES / "whisper/fixture/digits.flac"
        with clip.open("rb") as file:
            answer = self.client.audio.transcriptions.create(model="whisper", file=file, language="en")
        (self.out / "transcript.txt").write_text(answer.text + "\n")
        check(answer.text.strip() == "three one four", f"heard {answer.text!r}")
        return f"heard {answer.text.strip()!r}"

    def audio_tts(self) -> str:
        """The speech decodes back to its text, tone by tone."""
        text = "hello world"
        answer = self.client.audio.speech.create(model="voice", voice="default", input=text, response_format="wav")
        path = self.out / "speech.wav"
        path.write_bytes(answer.read())
        heard = tones.decode_file(path, ENGINES / "piper/fixture/tone-text.onnx.json")
        check(heard.split() == text.split(), f"decodes to {heard!r}")
        return f"{path.stat().st_size} bytes decode to {heard.strip()!r}"

    def image(self) -> str:
        """The image shows the asked colour and shape."""
        answer = self.client.images.generate(
            model="image",
            prompt="a red circle",
            size="256x256",
            response_format="b64_json",
            extra_body={"seed": 7, "steps": 10},
        )
        path = self.out / "red-circle.png"
        path.write_bytes(base64.b64decode(answer.data[0].b64_json or ""))
        wrong = wrong_file(path, "red", "circle", (256, 256), "png")
        check(not wrong, wrong)
        return "256x256, red, round"

    def video(self) -> str:
        """The video decodes to the asked number of frames."""
        import av

        body = {"model": "video", "prompt": "the blue square", "size": "256x256", "seconds": "2", "fps": 12, "seed": 3}
        made = self.http.post("/v1/videos", json=body).raise_for_status().json()
        until = time.monotonic() + 120
        while made["status"] not in ("completed", "failed") and time.monotonic() < until:
            time.sleep(0.05)
            made = self.http.get(f"/v1/videos/{made['id']}").raise_for_status().json()
        check(made["status"] == "completed", f"video is {made['status']}: {made.get('error')}")
        path = self.out / "blue-square.webm"
        path.write_bytes(self.http.get(f"/v1/videos/{made['id']}/content").raise_for_status().content)
        with av.open(str(path)) as container:
            frames = list(container.decode(video=0))
        check(len(frames) == 24, f"{len(frames)} frames instead of 24")
        middle = frames[12].to_ndarray(format="rgb24")[128, 128]
        check(middle[2] > 150 > middle[0], f"the middle is {middle.tolist()}, not blue")
        return f"24 frames {frames[0].width}x{frames[0].height}, the middle is blue"

    def command(self) -> str:
        """The operator's own program ran with the caller's argument."""
        body = {"kind": "command", "model": "greet", "params": {"args": {"who": "world"}}}
        job = self.http.post("/v1/jobs", json=body).raise_for_status().json()
        until = time.monotonic() + 60
        while job["state"] in ("queued", "running") and time.monotonic() < until:
            time.sleep(0.05)
            job = self.http.get(f"/v1/jobs/{job['id']}").raise_for_status().json()
        check(job["state"] == "succeeded", f"job is {job['state']}: {job.get('error') or job.get('fault')}")
        result = self.http.get(f"/v1/jobs/{job['id']}/result").raise_for_status().json()
        check("hello world" in json.dumps(result), f"printed {result}")
        return "exit code 0, printed 'hello world'"


def note(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def run_all(jobs: Jobs) -> bool:
    """Run every job twice (the first one loads the model), print the table; True when all are right."""
    rows: list[tuple[str, str, str, str, str]] = []
    plan: list[tuple[str, Callable[[], str]]] = [
        ("llm", jobs.llm),
        ("llm (streamed)", jobs.llm_stream),
        ("embedding", jobs.embedding),
        ("audio_stt", jobs.audio_stt),
        ("audio_tts", jobs.audio_tts),
        ("image", jobs.image),
        ("video", jobs.video),
        ("command", jobs.command),
    ]
    for kind, job in plan:
        note(f"  {kind} …")
        rows.append(one(kind, job))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    print(f"\n{'kind':{widths[0]}}  {'':{widths[1]}}  {'first':>{widths[2]}}  {'warm':>{widths[3]}}  answer")
    for row in rows:
        print(f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]:>{widths[3]}}  {row[4]}")
    print("\nfirst: with loading the model. warm: the same job again.")
    return all(row[1] == OK for row in rows)


def one(kind: str, job: Callable[[], str]) -> tuple[str, str, str, str, str]:
    """One row of the table."""
    times = []
    try:
        for _ in range(2):
            began = time.monotonic()
            shown = job()
            times.append(f"{(time.monotonic() - began) * 1000:.0f} ms")
    except (Wrong, openai.OpenAIError, httpx.HTTPError, KeyError) as error:
        return (kind, WRONG, *[*times, "-", "-"][:2], f"{type(error).__name__}: {error}")
    return (kind, OK, times[0], times[1], shown)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__.splitlines()[0])
    parser.add_argument("--serve", action="store_true", help="stay up and print base URL and key")
    parser.add_argument("--out", type=Path, default=ROOT / "demo-out", help="folder for artefacts (%(default)s)")
    parser.add_argument("--listen", default="127.0.0.1:0", help="HOST:PORT (a free port)")
    args = parser.parse_args()
    out = args.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    note("Starting the supervisor, the embedded coordinator and the engines' probes…")
    with worker(out, args.listen) as (url, key, process):
        note("One job of each kind:")
        right = run_all(Jobs(url, key, out))
        print(f"\nArtefacts are in {os.path.relpath(out)}/")
        if args.serve:
            serve(url, key, process)
    return 0 if right else 1


def serve(url: str, key: str, process: subprocess.Popen[bytes]) -> None:
    """Stay up until Ctrl-C or SIGTERM."""
    print(f"\nBase URL: {url}/v1\nAPI key:  {key}\n\nTry:\n")
    print(f"  curl {url}/v1/chat/completions -H 'Authorization: Bearer {key}' -H 'Content-Type: application/json' \\")
    print('    -d \'{"model": "chat", "messages": [{"role": "user", "content": "count to 5"}]}\'\n')
    print("Ctrl-C ends it.", flush=True)
    over = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: over.set())
    while not over.wait(0.5) and process.poll() is None:
        pass


if __name__ == "__main__":
    sys.exit(main())
