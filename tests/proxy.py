"""A TCP proxy that makes a network misbehave, between a real client and a real broker."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import socket
import struct
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, NamedTuple, Self

from brokers import HOST, free_port

CHUNK = 65536
SLICES_PER_SECOND = 20
LONG = 1000  # bytes: such an answer carries records
# Kafka's numbers for kinds of requests
PRODUCE, FETCH, LIST_OFFSETS, METADATA, API_VERSIONS, INIT_PRODUCER_ID, SASL_AUTHENTICATE = 0, 1, 2, 3, 18, 22, 36
ID_ERROR_AT = 13  # in an answer to INIT_PRODUCER_ID, behind its length, number, tags and throttle time
EVENT_ID = b"event_id"  # a record's header; one byte with twice the value's length follows, then the value
Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Request(NamedTuple):
    """A whole request that a client has written to a connection; `at` is on the monotonic clock."""

    at: float
    connection: int
    kind: int
    event_ids: tuple[str, ...]  # in order; none of compressed records


class Proxy:
    """`host`:`port` -> 127.0.0.1:`target_port`; each fault holds, for open connections too, until the next.

    `target_port` may be changed: it is where the next connection goes. A fault replaces the one before;
    `passthrough()` ends it. `connections` counts those accepted so far, `dropped` the responses lost, `flipped` the
    bytes changed. While `recording`, `requests` are all that clients have written, whatever became of them (none of
    TLS).
    """

    def __init__(self, target_port: int, port: int | None = None, host: str = HOST) -> None:
        self.target_port = target_port
        self.host = host
        self.port = port or free_port()
        self.connections = 0
        self.dropped = 0
        self.flipped = 0
        self.recording = False
        self.requests: list[Request] = []
        self._talks: set[_Talk] = set()
        self._reset()
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._cutter: asyncio.Task[None] | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"proxy-{self.port}", daemon=True)
        self._thread.start()
        self._do(self._listen())

    def _reset(self) -> None:
        self._delay = 0.0
        self._loss = 0.0
        self._rate = 0.0
        self._closing = False
        self._hanging = False
        self._flips = 0
        self._late: tuple[float, float, int | None] = 0, 0, None
        self._start = 0.0
        self._fatal: Callable[[bytes], bool] = lambda _: False
        self._fatal_times = sys.maxsize
        self._resetting = False
        self._id_error, self._id_errors = b"", 0

    # What it has seen

    def handed_over(self) -> Counter[str]:
        """How often each event has been written to a connection."""
        return Counter(name for request in list(self.requests) for name in request.event_ids)

    def count(self, kind: int) -> int:
        """How many requests of a kind were written."""
        return sum(request.kind == kind for request in list(self.requests))

    def unanswered(self, kind: int) -> bool:
        """Whether such a request waits for its answer at this moment."""
        return bool(self._do(self._unanswered(kind)))

    # The faults

    def passthrough(self) -> None:
        """No fault. What a black hole has swallowed comes through now, as TCP would send it again."""
        self._do(self._change())

    def refuse(self) -> None:
        """Nobody listens any more, and open connections end: a broker that went away."""
        self._do(self._change(listen=False))

    def accept_and_close(self) -> None:
        """As Docker's port proxy does while the broker inside is not up."""
        self._do(self._change(_closing=True))

    def hang(self) -> None:
        """Connections are accepted, nothing goes through."""
        self._do(self._change(_hanging=True))

    def delay(self, seconds: float) -> None:
        """In each direction; how much goes through in a second stays the same."""
        self._do(self._change(_delay=seconds))

    def answer_late(self, least: float, most: float | None = None, kind: int | None = None) -> None:
        """Each answer, or each to such a request, comes between `least` and `most` seconds late."""
        self._do(self._change(_late=(least, least if most is None else most, kind)))

    def start_late(self, seconds: float) -> None:
        """Nothing that the broker says comes through in the first seconds of a connection: a slow TLS handshake."""
        self._do(self._change(_start=seconds))

    def end_at(self, kind: int, times: int = 1, reset: bool = False) -> None:
        """The next requests of that kind are not passed on: each time the connection ends, or is reset."""
        self._do(self._change(_fatal=lambda request: _kind(request) == kind, _fatal_times=times, _resetting=reset))

    def stand_in(self) -> None:
        """As a proxy that knows Kafka's protocol and whose broker is away: ApiVersions is answered (it must be there
        for that), at anything else the connection ends."""
        self._do(self._change(_fatal=lambda request: _kind(request) != API_VERSIONS))

    def end_at_words(self, words: bytes) -> None:
        """Where a request has these in it: as a broker that refuses a password without a word."""
        self._do(self._change(_fatal=lambda request: words in request))

    def refuse_producer_ids(self, error: int, times: int = sys.maxsize) -> None:
        """The answers to so many requests for one say that error (a number of Kafka's; versions 2 and later)."""
        self._do(self._change(_id_error=error.to_bytes(2), _id_errors=times))

    def drop_responses(self, probability: float, seed: int = 0) -> None:
        """The broker has done what was asked, the connection breaks before the client hears of it.

        A response cannot get lost alone: TCP has no holes, and a client that misses one number in the
        order of its requests gives the connection up. Not for TLS, where responses cannot be seen.
        """
        self._random = random.Random(seed)
        self._do(self._change(_loss=probability))

    def flip(self, times: int, seed: int = 0) -> None:
        """One byte in each of the next long answers, somewhere in its second half: past the heads, among records."""
        self._random = random.Random(seed)
        self._do(self._change(_flips=times))

    def cut(self, unanswered: int | None = None) -> None:
        """Resets all connections once; the fault of the moment goes on.

        With a kind: as soon as such a request waits for its answer. A client that has one of them on its way at a time
        has then written no other that is not among `requests`.
        """
        self._do(self._cut(unanswered))

    def cut_every(self, seconds: float) -> None:
        self._do(self._change(cut_every=seconds))

    def slow(self, bytes_per_second: float) -> None:
        """For each connection and direction."""
        self._do(self._change(_rate=bytes_per_second))

    def close(self) -> None:
        if self._loop.is_closed():
            return
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # How

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _change(self, listen: bool = True, cut_every: float = 0, **fault: Any) -> None:
        if self._cutter is not None:
            self._cutter.cancel()
            self._cutter = None
        self._reset()
        for name, value in fault.items():
            setattr(self, name, value)
        await (self._listen() if listen else self._unlisten())
        if not listen or self._closing:
            await self._cut()
        if cut_every:
            self._cutter = asyncio.create_task(self._cut_again(cut_every))

    async def _listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, self.host, self.port)

    async def _unlisten(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _unanswered(self, kind: int) -> bool:
        return any(kind in talk.waiting for talk in self._talks)

    async def _cut(self, unanswered: int | None = None) -> None:
        while unanswered is not None and not await self._unanswered(unanswered):
            await asyncio.sleep(0.002)
        for writer in list(self._open):
            writer.transport.abort()

    async def _cut_again(self, seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds)
            await self._cut()

    async def _end(self) -> None:
        await self._change(listen=False)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        self._open.add(writer)
        try:
            if not self._closing:
                await self._join((reader, writer))
        except (OSError, asyncio.CancelledError):  # cancelled only by close(); the server would log it
            pass
        finally:
            self._forget(writer)
            self._tasks.discard(task)

    async def _join(self, client: Stream) -> None:
        talk = _Talk(self.connections, client[1], self._loop.time())
        await self._pass_gate()
        broker = await asyncio.open_connection(HOST, self.target_port)
        self._open.add(broker[1])
        self._talks.add(talk)
        pumps = [
            asyncio.create_task(self._pump(client[0], broker[1], talk, responses=False)),
            asyncio.create_task(self._pump(broker[0], client[1], talk, responses=True)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._talks.discard(talk)
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            self._forget(broker[1])

    def _forget(self, writer: asyncio.StreamWriter) -> None:
        self._open.discard(writer)
        writer.close()

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, talk: _Talk, responses: bool
    ) -> None:
        """Reading and writing apart, so that a delay is a delay and not a limit of one chunk at a time."""
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(256)
        reading = asyncio.create_task(self._read(source, queue, None if responses else talk))
        try:
            await (self._write_answers(queue, sink, talk) if responses else self._write(queue, sink))
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _read(
        self, source: asyncio.StreamReader, queue: asyncio.Queue[tuple[float, bytes]], talk: _Talk | None
    ) -> None:
        """`talk`: of what a client says."""
        chunk = b" "
        while chunk:
            with contextlib.suppress(ConnectionError):
                chunk = b""
                chunk = await source.read(CHUNK)
            if talk and self._ends(talk, chunk):
                chunk = b""
            await queue.put((self._loop.time(), chunk))

    def _ends(self, talk: _Talk, chunk: bytes) -> bool:
        """Take note of the requests in it; True when the connection ends here."""
        for frame in talk.hear(chunk):
            if self.recording:
                event_ids = _event_ids(frame)
                self.requests.append(Request(self._loop.time(), talk.connection, _kind(frame), event_ids))
            if self._fatal_times > 0 and self._fatal(frame):
                self._fatal_times -= 1
                talk.end(self._resetting)
                return True
        return False

    async def _write(self, queue: asyncio.Queue[tuple[float, bytes]], sink: asyncio.StreamWriter) -> None:
        while True:
            arrived, chunk = await queue.get()
            if not chunk:
                return
            await self._sleep_until(arrived + self._delay)
            await self._pass_gate()
            await self._send(sink, chunk)

    async def _write_answers(
        self, queue: asyncio.Queue[tuple[float, bytes]], sink: asyncio.StreamWriter, talk: _Talk
    ) -> None:
        while True:
            arrived, chunk = await queue.get()
            if not chunk:
                return
            await self._sleep_until(max(arrived + self._delay, talk.began + self._start))
            for piece, kind in talk.answers(chunk):
                least, most, late = self._late
                if kind is not None and late in (None, kind):
                    await self._sleep_until(arrived + random.uniform(least, most))
                await self._pass_gate()
                if kind is not None and self._loss and self._random.random() < self._loss:
                    self.dropped += 1
                    return
                if kind == INIT_PRODUCER_ID and self._id_errors > 0:
                    self._id_errors -= 1
                    piece = piece[:ID_ERROR_AT] + self._id_error + piece[ID_ERROR_AT + 2 :]
                await self._send(sink, self._with_a_flip(piece) if self._flips and len(piece) > LONG else piece)

    async def _sleep_until(self, moment: float) -> None:
        await asyncio.sleep(max(0, moment - self._loop.time()))

    def _with_a_flip(self, chunk: bytes) -> bytes:
        self._flips -= 1
        self.flipped += 1
        place = self._random.randrange(len(chunk) // 2, len(chunk))
        return chunk[:place] + bytes([chunk[place] ^ 1 << self._random.randrange(8)]) + chunk[place + 1 :]

    async def _send(self, sink: asyncio.StreamWriter, chunk: bytes) -> None:
        while self._rate and chunk:
            size = max(1, int(self._rate / SLICES_PER_SECOND))
            sink.write(chunk[:size])
            chunk = chunk[size:]
            await sink.drain()
            await asyncio.sleep(1 / SLICES_PER_SECOND)
        sink.write(chunk)
        await sink.drain()

    async def _pass_gate(self) -> None:
        while self._hanging:
            await asyncio.sleep(0.02)


class _Talk:
    """What goes over one connection: the requests in what a client says, and which of them each answer is for."""

    def __init__(self, connection: int, client: asyncio.StreamWriter, began: float) -> None:
        self.began = began
        self.waiting: deque[int] = deque()  # kinds of requests, unanswered
        self.connection = connection
        self._client = client
        self._heard = b""
        self._frames = _Frames()

    def hear(self, chunk: bytes) -> Iterator[bytes]:
        """The requests that are whole with this chunk."""
        self._heard += chunk
        while self._heard[:1] == b"\0" and len(self._heard) >= (end := 4 + int.from_bytes(self._heard[:4])) > 8:
            frame, self._heard = self._heard[4:end], self._heard[end:]
            self.waiting.append(_kind(frame))
            yield frame
        if self._heard[:1] not in (b"", b"\0"):  # TLS
            self._heard = b""

    def answers(self, chunk: bytes) -> Iterator[tuple[bytes, int | None]]:
        """Its pieces: each with the kind of request that it begins to answer, or None. Once the next is asked for, it
        has been sent."""
        starts = self._frames.starts(chunk)
        for start, end in itertools.pairwise(sorted({0, *starts, len(chunk)})):
            begins = start in starts and bool(self.waiting)
            yield chunk[start:end], self.waiting[0] if begins else None
            if begins:
                self.waiting.popleft()

    def end(self, reset: bool) -> None:
        """The client's connection; by a reset, as a firewall does it, or as one that is closed."""
        linger = struct.pack("ii", reset, 0)
        self._client.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._client.transport.abort()


def _kind(request: bytes) -> int:
    return int.from_bytes(request[:2])


def _event_ids(request: bytes) -> tuple[str, ...]:
    values = (rest[1 : 1 + rest[0] // 2] for rest in request.split(EVENT_ID)[1:])
    return tuple(value.decode() for value in values)


class _Frames:
    """Finds where Kafka's frames (four bytes of length, big endian, then the body) begin in a stream of chunks."""

    def __init__(self) -> None:
        self._header = b""
        self._body = 0

    def starts(self, chunk: bytes) -> list[int]:
        found = []
        at = 0
        while at < len(chunk):
            if self._body:
                step = min(self._body, len(chunk) - at)
                self._body -= step
            else:
                if not self._header:
                    found.append(at)
                step = min(4 - len(self._header), len(chunk) - at)
                self._header += chunk[at : at + step]
                if len(self._header) == 4:
                    self._body, self._header = int.from_bytes(self._header), b""
            at += step
        return found


# --- peers that are no Kafka ----------------------------------------------------------------------


class Peer:
    """Whoever listens at 127.0.0.1:`port` instead of Kafka.

    It says `first` unasked, reads a request, says `answer`, and ends the connection; with `stays` it holds it open.
    """

    def __init__(self, first: bytes = b"", answer: bytes = b"", stays: bool = False) -> None:
        self._first = first
        self._answer = answer
        self._stays = stays
        self._server = socket.create_server((HOST, free_port()))
        self._open: list[socket.socket] = []
        self.port: int = self._server.getsockname()[1]
        threading.Thread(target=self._serve, name=f"peer-{self.port}", daemon=True).start()

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for one in (self._server, *self._open):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._server.accept()
                self._open.append(connection)
                threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection.sendall(self._first)
            connection.recv(CHUNK)
            connection.sendall(self._answer)
            if not self._stays:
                connection.close()


@contextlib.contextmanager
def unanswered(host: str = HOST, port: int = 0) -> Iterator[int]:
    """A port where a connection is never made, as behind a firewall that drops packets: its backlog is full."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.socket())
        server.bind((host, port or free_port()))
        server.listen(0)
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                waiting.connect(server.getsockname())
        yield server.getsockname()[1]
