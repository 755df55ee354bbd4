"""Everything here tries to get a secret or a caller's words past the net."""

from __future__ import annotations

import base64
import dataclasses
import logging
import random
import sys
import time
import traceback

import msgspec
import pytest

from protocol.link_wire import Offer
from protocol.work import LlmParams
from supervisor.observe.redact import HIDDEN, Redaction, redacted, redacted_trace, safe

KEY = "8hQ3vXk29LmZpR7tYw4cNfB6sJd1gAe5uKi0oTqVxWy"  # as token_urlsafe(32) makes them
HEX = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
WORDS = "my secret diary says"


def shown(message: str, *args: object, trace: Exception | None = None, **extra: object) -> str:
    """What every sink can get out of the record."""
    info = (type(trace), trace, trace.__traceback__) if trace else None
    record = logging.LogRecord("x", logging.INFO, __file__, 1, message, args, info)
    vars(record).update(extra)
    assert Redaction().filter(record)
    return f"{record.getMessage()}\n{logging.Formatter().format(record)}\n{vars(record)}"


@pytest.mark.parametrize(
    "line",
    [
        f"token bhw_{KEY} was refused",
        f"bhc_{KEY}",
        f"url wss://h/x?token={KEY}",
        f"key sk-proj-{KEY}",
        f"sk-{KEY[:12]}",
        f"Authorization: Bearer {KEY}",
        f"authorization: {KEY[:9]}",
        f"{{'authorization': 'Bearer {KEY}', 'x-api-key': '{KEY}'}}",
        f"[(b'authorization', b'Bearer {KEY}')]",
        f"Cookie: session={KEY[:9]}; other=1",
        f"GET /v1/blobs/a?expires=12&signature={HEX}&x=1",
        f"PUT https://s3/b?X-Amz-Signature={HEX}&X-Amz-Credential={KEY}",
        f"https://user:{KEY[:10]}@sentry.invalid/4",
        f"https://{KEY[:16]}@sentry.invalid/4",
        f"password={KEY[:8]}",
        f'{{"token": "{KEY[:8]}", "a": 1}}',
        f'{{\\"client_key\\": \\"{KEY[:8]}\\"}}',
        f"BULKHEAD_COORDINATOR_TOKEN={KEY[:8]}",
        f"hf_{KEY[:20]}",
        f"the digest-like key {HEX}",
        f"the bare key {KEY}",
        f"path /a/{KEY}/b",
        f"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiI{KEY[:8]}.{KEY}",
        f"connect to user:{KEY[:10]}@db.host:5432",
        f"https://user:pa/{KEY[:10]}@host/x",
        f"https://user:p@{KEY[:10]}@host/x",
        f"HTTPS_PROXY=http://u:{KEY[:10]}@proxy:3128",
        f"https://h/?pw={KEY[:10]}&a=b",
        f"next=%2Fx%3Ftoken%3D{KEY[:10]}",
        f"Authorization: Bearer\n {KEY}",
        f"authorization:   bearer   {KEY[:10]}",
        f"ASIA{KEY[:16]}",
        f"HF_{KEY[:20]}",
        f"npm_{KEY[:20]}",
        f"pypi-{KEY[:20]}",
        f"rk_live_{KEY[:16]}",
        f"xapp-{KEY[:16]}",
        f"https://hooks.slack.com/services/T00/B00/{KEY[:24]}",
        f"passphrase={KEY[:10]}",
        f"pwd: {KEY[:10]}",
        f"with password '{KEY[:10]}'",
        f"the token {KEY[:10]} was refused",
        f"the password is {KEY[:10]}",
        f"--token {KEY[:10]}",
        f"['--coordinator-api-key', '{KEY[:10]}']",
        f"bhw_{KEY[:20]}\n    {KEY[20:]}",
        f"-----BEGIN PGP PRIVATE KEY BLOCK-----\n{KEY}\n-----END PGP PRIVATE KEY BLOCK-----",
        f"-----BEGIN RSA PRIVATE KEY-----\n{KEY}\n{KEY}\n-----END RSA PRIVATE KEY-----",
    ],
)
def test_secrets_do_not_pass_in_any_way_of_logging(line: str) -> None:
    for text in (
        shown(line),
        shown("%s", line),
        shown("%(a)s", {"a": line}),
        shown("%r", [line]),
        shown("x", a=line),
        shown("x", a={"b": [line]}),
        shown("x", trace=ValueError(line)),
    ):
        for secret in (KEY, KEY[:20], KEY[:12], KEY[20:], HEX, HEX[:16]):
            assert secret not in text, text
        assert KEY[:8] not in text, text


@pytest.mark.parametrize("seed", range(5))
def test_random_keys_of_every_make_do_not_pass(seed: int) -> None:
    """What has no prefix is told by its randomness alone: see `RANDOM_SHARE` for how sure that is."""
    chance = random.Random(seed)
    for _ in range(200):
        raw = chance.randbytes(chance.choice((24, 32, 48)))
        for made in (raw.hex(), base64.urlsafe_b64encode(raw).decode(), base64.b64encode(raw).decode()):
            assert made not in redacted(f"using {made} now"), (seed, made)


@pytest.mark.parametrize(
    "line",
    [
        f"prompt={WORDS} x",
        f"prompt='{WORDS}'",
        f'{{"prompt": "{WORDS}"}}',
        f'{{"prompt": "a \\" {WORDS}"}}',
        f'{{"body": "{{\\"prompt\\": \\"{WORDS}\\"}}"}}',
        f"messages=[{{'role': 'user', 'content': '{WORDS}'}}]",
        f'{{"messages": [\n {{"content": "{WORDS}"}}\n]}}',
        f"LlmParams(messages=(Message(role='user', content='{WORDS}'),), n=1)",
        f"input=['{WORDS}', '{WORDS}']",
        f"params=LlmParams(x='{WORDS}')",
        f"params=b'{WORDS}'",
        f"Request(params={{'a': '{WORDS}'}})",
        f"Prompt: {WORDS}",
        f"the prompt was '{WORDS}'",
        f"id 0 | prompt = {WORDS}",
        f"[type=string_type, input_value='{WORDS}', input_type=str]",
        f'{{"completion": "{WORDS}"}}',
        f'{{"arguments": "{{\\"q\\": \\"{WORDS}\\"}}"}}',
        f'{{"args": {{"who": "{WORDS}"}}}}',
        f"transcript='{WORDS}'",
    ],
)
def test_callers_words_do_not_pass_as_text(line: str) -> None:
    for text in (shown(line), shown("%s", line), shown("x", note=line), shown("x", trace=RuntimeError(line))):
        assert WORDS not in text


@dataclasses.dataclass
class Ask:
    prompt: str
    n: int = 1


class Asked(msgspec.Struct):
    messages: list[str]
    model: str


def test_callers_words_do_not_pass_as_values() -> None:
    packed = msgspec.msgpack.encode({"prompt": WORDS})
    llm = msgspec.convert({"messages": [{"role": "user", "content": WORDS}]}, LlmParams)
    offer = Offer(kind="llm", model="m", params=msgspec.Raw(packed))
    for value in (Ask(WORDS), Asked([WORDS], "m"), llm, offer, packed, {"prompt": WORDS}, [{"params": {"a": WORDS}}]):
        for text in (
            shown("got %s", value),
            shown("got %r", value),
            shown("x", value=value),
            shown("%(v)s", {"v": value}),
        ):
            assert WORDS not in text
    for name in ("prompt", "messages", "input", "params", "Prompt"):
        assert WORDS not in shown("x", **{name: WORDS})
        assert WORDS not in shown("%(" + name + ")s", {name: WORDS})
    assert safe("abcd", "prompt") == "[hidden, 4 long]"


def test_names_of_secrets_hide_their_values_whatever_they_look_like() -> None:
    for name in ("token", "api_key", "client_key", "password", "worker_token", "authorization", "dsn"):
        assert safe("short", name) == HIDDEN
        assert "short" not in shown("x", **{name: "short"})
        assert "short" not in shown("%s", {name: "short"})


def test_a_secret_is_known_by_the_name_before_it() -> None:
    for name in ("accessToken", "apiKey", "x-api-key", "passphrase", "HF_TOKEN", "clientKeys"):
        assert "short" not in shown("x", **{name: "short"})
        assert "short" not in shown("x", headers=[(name, "short")])
        assert "short" not in shown("x", headers=[(name.encode(), b"short")])
        assert "short" not in shown("x", command=["run", f"--{name}", "short"])
        assert "short" not in shown("%s: %s", name, "short")
        assert "short" not in shown("%s", ["a", name, "short"])
    assert safe(["job", "short", 3]) == ["job", "short", 3]


def test_secrets_and_words_over_several_items_do_not_pass() -> None:
    """The tail of an engine's stderr is a list of lines."""
    tail = ["-----BEGIN PRIVATE KEY-----", KEY[:12], KEY[12:24], "-----END PRIVATE KEY-----", "the end"]
    told = safe({"stderr_tail": tail})["stderr_tail"]
    assert told[-1] == "the end"
    assert not any(KEY[:12] in line or KEY[12:24] in line for line in told)
    assert WORDS not in shown("x", stderr=["prompt:", WORDS])
    assert KEY[20:] not in shown("x", lines=[f"bhw_{KEY[:20]}", KEY[20:]])


def test_a_key_in_the_place_of_a_name_does_not_pass() -> None:
    for name in ("job", "model", "engine"):
        assert KEY not in shown("x", **{name: f"bhw_{KEY}"})
        assert KEY[:20] not in shown("x", **{name: f"hf_{KEY[:20]}"})


def test_notes_and_groups_of_exceptions_are_redacted() -> None:
    inner = ValueError(f"token={KEY[:8]}")
    inner.add_note(f"tried with password '{KEY[8:18]}'")
    text = shown("failed", trace=ExceptionGroup("several", [RuntimeError(f"https://u:{KEY[18:30]}@h"), inner]))
    assert "2 sub-exceptions" in text
    for part in (KEY[:8], KEY[8:18], KEY[18:30]):
        assert part not in text


def test_a_traceback_is_redacted_with_its_source_lines_and_causes() -> None:
    try:
        try:
            raise ValueError(f"token={KEY}")
        except ValueError as error:
            raise RuntimeError("outer") from error
    except RuntimeError as error:
        text = shown("failed", trace=error)
    assert "RuntimeError: outer" in text
    assert KEY not in text


def test_a_traceback_keeps_its_shape_whatever_its_source_lines_say() -> None:
    try:
        # What a mapping of callers' words looks like in the source must not hide the end of the traceback.
        raise KeyError(dict(messages=[WORDS], prompt={"a": WORDS}))
    except KeyError as error:
        text = shown("failed", trace=error)
    lines = text.splitlines()
    assert any(line.startswith("KeyError: ") for line in lines)
    assert sum(line.startswith('  File "') for line in lines) == 1
    assert WORDS not in text


def test_callers_words_over_many_lines_of_an_exception_do_not_pass() -> None:
    for words in (f'{{"messages": [\n    {{"content": "{WORDS}"}}\n]}}', f"prompt='one\n    {WORDS}'"):
        text = redacted_trace("".join(traceback.format_exception(ValueError(words))))
        assert text.startswith("ValueError: ")
        assert WORDS not in text


@pytest.mark.parametrize(
    "line",
    [
        "the coordinator answers at http://127.0.0.1:8080",
        "taken job_01kab3c4d5e6f7g8h9jkmnpqrs#2",
        "GPU-3f2a1b4c-12ab-34cd-56ef-0123456789ab has no room",
        "/home/somebody/.local/share/bulkhead-worker/instances/an-engine-with-a-long-name/attempt",
        "SIGTERM: draining for at most 60 s; once more stops at once",
        "[coordinator]: the token_file or the certificates cannot be read",
        "killed by SIGSEGV while it ran a job; restarts in 1.5 s",
        "generated 128 tokens: 40.1 tokens/s",
        "Basic checks passed",
        "model Qwen3-Coder-30B-A3B-Instruct-Q4_K_M.gguf is loaded",
        "unavailable(EPERM) landlock verified seccomp",
        "llm job failed after 1.2 s: engine_crashed, the engine's fault",
        "chat loaded on cuda:0 in 3.2 s, 4.1 GiB",
        "the token_file token.txt is missing; the token is not valid",
        "prompt eval time = 12.5 ms / 128 tokens",
        "the prompt's length is 5, the context's is 4096",
        "https://huggingface.co/org/model-7b/resolve/main/a.gguf",
        "https://host:8080/path/@scope/name",
        "give it with --token-file /etc/bulkhead/token",
        "bhw_ is how our tokens begin\nTraceback",
        "12:30:45 user@host logged in",
    ],
)
def test_what_people_need_stays(line: str) -> None:
    assert redacted(line) == line


def test_a_digest_is_still_recognised() -> None:
    assert redacted(f"the digest is {HEX}") == "the digest is 9f86d081…"
    assert redacted(f"it has the sha256 {HEX}") == f"it has the sha256 {HEX}"  # people compare these
    assert HEX not in redacted(f"the sha256 of api_key={HEX}")


def test_names_stay_however_long() -> None:
    name = "Meta-Llama-3.1-8B-Instruct-Q4_K_M-2025-aB3dE5fG7hJ9kL1mN3pQ5"
    assert safe(name, "model") == name


def test_logging_never_raises() -> None:
    class Hostile:
        def __str__(self) -> str:
            raise OSError("no")

    assert "cannot be formatted: OSError" in shown("%s", Hostile())
    assert "cannot be formatted: TypeError" in shown("%d and %d", 1)
    assert "[hidden, 3 long]" in shown("%(prompt)s %%", {"prompt": "abc"})
    deep: list[object] = []
    for _ in range(50):
        deep = [deep]
    assert "[list]" in shown("x", deep=deep)
    assert "ValueError" in shown("x", trace=ValueError())
    assert sys.exc_info() == (None, None, None)


def test_it_is_fast_enough_on_long_hostile_lines() -> None:
    for line in (
        "a" * 20_000,
        "prompt" * 3000,
        "key=" * 5000,
        '"' * 20_000,
        "token: '" + "\\" * 10_000,
        "A1b" * 7000,
        "://" * 7000,
        "-----BEGIN PRIVATE KEY-----" * 800,
        "-" * 20_000,
        "--a-" * 5000,
        "--token " * 2500,
        "a:" * 10_000 + "@",
        "a://b:c/" * 2500,
        "http://a:" + "b" * 20_000,
        "password is " * 1700,
        "the token " + "a" * 20_000,
        "prompt " * 2900,
        "prompt:" * 2900,
        "authorization: bearer " * 900,
        "bhw_aaaa\n" * 2200,
        "token%3d" * 2500,
    ):
        began = time.process_time()
        redacted(line)
        assert time.process_time() - began < 5, line[:20]  # 0.07 on a quiet box; what goes back and forth takes minutes
