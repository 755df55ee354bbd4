"""What replicas tell each other, in one direction per connection: from who connected to who listens.

A WebSocket message is a msgpack array of frames; a frame is an array that begins with its letter. The hello is in the
headers of the upgrade. Nothing here is needed for a job to be done: a frame that is lost costs a second, after which
the database is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from coordinator.records import WorkerView
from protocol.framing import UNDECODABLE
from protocol.link_wire import MAX_MESSAGE_BYTES, Capabilities

MAX_BATCH_BYTES = 256 * 2**10  # frames that are gathered go out together, up to about this
# A frame holds at most one message of a worker, which is within the link's bound, and a little around it.
MAX_PEER_MESSAGE = MAX_MESSAGE_BYTES + MAX_BATCH_BYTES
SECRET_CHARS = 16  # at least
PATH = "/replica"
UPLOADS = "/replica/uploads/{worker}/{job}"  # takes what another replica passes on
FROM, TO = "x-bulkhead-from", "x-bulkhead-to"  # headers: who connects, and whom it believes to reach

_Name = Annotated[str, Meta(max_length=256)]
_Number = Annotated[int, Meta(ge=0)]


class Frame(msgspec.Struct, frozen=True, array_like=True, tag_field="f"):
    """Base of all frames."""


class StartedFrame(Frame, frozen=True, tag="s"):
    """The attempt's work began."""

    job: _Name
    attempt: _Number


class ChunkFrame(Frame, frozen=True, tag="c"):
    """One piece of the attempt's output; `seq` is the worker's number of it."""

    job: _Name
    attempt: _Number
    seq: _Number
    data: bytes


class ProgressFrame(Frame, frozen=True, tag="p"):
    """How far the attempt is."""

    job: _Name
    attempt: _Number
    n: int
    total: int | None
    phase: str
    text: str


class EndedFrame(Frame, frozen=True, tag="e"):
    """The job ended: its row says how. `chunks`: how many its last attempt has streamed, -1 when that is not known."""

    job: _Name
    chunks: int = -1


class StopFrame(Frame, frozen=True, tag="x"):
    """The job's row went on without this attempt, which a worker of yours holds."""

    job: _Name
    attempt: _Number
    reason: str


class WatchFrame(Frame, frozen=True, tag="w"):
    """Somebody at the sender follows this job, which came in elsewhere; `on` false: not any more."""

    job: _Name
    on: bool


class RemoteWorker(msgspec.Struct, frozen=True):
    """A worker as the replica tells of it that it is connected to; `refuses` are jobs that it will never take."""

    view: WorkerView
    capabilities: Capabilities
    draining: bool = False
    revision: int = 1
    refuses: tuple[str, ...] = ()


class FleetFrame(Frame, frozen=True, tag="f"):
    """Workers that are connected to the sender. With `first`, all that it told before is void."""

    workers: tuple[RemoteWorker, ...]
    first: bool = True


class JoinedFrame(Frame, frozen=True, tag="j"):
    """This worker has just connected to the sender: a session of it elsewhere is a dead one."""

    worker: _Name


class OrderFrame(Frame, frozen=True, tag="o"):
    """A message for a worker of yours, in the link's words; one for the worker "" is for you yourself."""

    worker: _Name
    message: bytes


class AnswerFrame(Frame, frozen=True, tag="a"):
    """A worker's answer to the sender's `Order`, in the link's words."""

    worker: _Name
    message: bytes


AnyFrame = (
    StartedFrame
    | ChunkFrame
    | ProgressFrame
    | EndedFrame
    | StopFrame
    | WatchFrame
    | FleetFrame
    | JoinedFrame
    | OrderFrame
    | AnswerFrame
)


class FrameError(Exception):
    """A message is no array of frames."""


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[AnyFrame]).decode


def encode(frame: Frame) -> bytes:
    """One frame."""
    return _encode(frame)


def message(frames: Sequence[bytes]) -> bytes:
    """Encoded frames as one message; an array's head, and then they themselves."""
    count = len(frames)
    if count < 16:
        head = bytes([0x90 | count])
    elif count < 2**16:
        head = b"\xdc" + count.to_bytes(2, "big")
    else:
        head = b"\xdd" + count.to_bytes(4, "big")
    return head + b"".join(frames)


def decode(data: bytes) -> list[AnyFrame]:
    """The frames of a message. Raises FrameError."""
    try:
        return _decode(data)
    except UNDECODABLE as error:
        raise FrameError(str(error)) from None
