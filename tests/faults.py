"""A proxy in front of a server, which makes the network worse: refuses, cuts answers in the middle, delays, loses answers."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from urllib.parse import urlsplit

BUSY = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


class Faults:
    """Shares of the requests: `refused` with 503, `cut` in mid-answer, `lost` (done, but not answered), `delayed` by `delay` s.
    `counts` says how many of each there were. `url` is where clients go instead of the server.
    """

    def __init__(self, server: str, *, refused=0.0, cut=0.0, lost=0.0, delayed=0.0, delay=10.0, seed=0) -> None:
        parts = urlsplit(server)
        self.host, self.port = parts.hostname, parts.port
        self.shares = {"refused": refused, "cut": cut, "lost": lost, "delayed": delayed}
        self.delay, self.rng, self.counts = delay, random.Random(seed), Counter()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Faults:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0, limit=2**20))
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._ready.set()
        self._loop.run_forever()
        server.close()
        left = asyncio.all_tasks(self._loop)
        for task in left:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        self._loop.close()

    def _fault(self) -> str:
        drawn = self.rng.random()
        for fault, share in self.shares.items():
            if drawn < share:
                return fault
            drawn -= share
        return "none"

    async def _serve(self, reader, writer) -> None:
        try:
            await self._exchange(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _exchange(self, reader, writer) -> None:
        """One request of a connection, which is closed after it."""
        lines = (await reader.readuntil(b"\r\n\r\n"))[:-4].split(b"\r\n")
        headers = {line.split(b":", 1)[0].lower(): line.split(b":", 1)[1].strip() for line in lines[1:]}
        if b"expect" in headers:
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await reader.readexactly(int(headers.get(b"content-length", 0)))
        fault = self._fault()
        self.counts[fault] += 1
        if fault == "refused":
            writer.write(b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\n")
            writer.write(b"Content-Length: %d\r\n\r\n" % len(BUSY) + (b"" if lines[0].startswith(b"HEAD") else BUSY))
            await writer.drain()
            return
        if fault == "delayed":
            await asyncio.sleep(self.delay)
        kept = [line for line in lines if line.split(b":")[0].lower() not in (b"connection", b"expect")]
        there, back = await asyncio.open_connection(self.host, self.port)
        back.write(b"\r\n".join([*kept, b"Connection: close"]) + b"\r\n\r\n" + body)
        answer = await there.read()
        back.close()
        if fault == "lost":
            return
        if fault == "cut":
            head = answer.find(b"\r\n\r\n") + 4
            answer = answer[: head + (len(answer) - head) // 2]
        writer.write(answer)
        await writer.drain()
