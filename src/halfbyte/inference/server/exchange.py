"""One request and its answer: what the thread of the model tells of it, as a client gets it."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Container, Coroutine, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import Request as Http
from starlette.responses import JSONResponse, StreamingResponse
from starlette.responses import Response as HttpResponse

from halfbyte.errors import BadRequest, HalfbyteError
from halfbyte.inference.generation import Piece
from halfbyte.inference.server.refusal import Refusal
from halfbyte.inference.server.responses import END, Response, Said, TokenNames, event
from halfbyte.inference.server.scheduler import Accepted, Busy, Done, Event, Job, Stopped

Result = TypeVar("Result")

RETRY = 2
"""Seconds after which a client may ask again."""
HUNG_UP = 499
"""What logs call the status of an answer that nobody waited for."""


class TooLong(BadRequest):
    """A prompt that leaves no room for the answer."""


class Exchange:
    """One request and its answer, as the thread of the model tells of it."""

    def __init__(
        self,
        http: Http,
        ends: Container[int],
        names: TokenNames,
        paths: Mapping[str, str],
        log: Callable[[str], None],
    ):
        """`paths` of this machine are told to no client, but names in their place."""
        self._http, self._ends, self._names, self._paths, self._log_line = http, ends, names, paths, log
        self._began = time.perf_counter()
        self._events: asyncio.Queue[Accepted | Said | Done | HalfbyteError] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def tell(self, happened: Event) -> None:
        """Called by the thread of the model, in which the tokenizer is used."""
        told = self._said(happened) if isinstance(happened, Piece) else happened
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._events.put_nowait, told)

    def _said(self, piece: Piece) -> Said:
        return self._names.said(piece, any(token in self._ends for token in piece.tokens))

    def refusal(self, error: HalfbyteError) -> Refusal:
        """As a client reads it, and a line of the log."""
        reason = str(error)
        for path, name in self._paths.items():
            reason = reason.replace(path, name)
        if isinstance(error, Busy | Stopped):
            made = Refusal(503, reason, code="overloaded", headers={"Retry-After": str(RETRY)})
        elif isinstance(error, TooLong):
            made = Refusal(400, reason, code="context_length_exceeded")
        else:
            made = Refusal(400 if isinstance(error, BadRequest) else 500, reason)
        self._log(made.status, str(error))
        return made

    async def whole(self, job: Job, response: Response) -> HttpResponse:
        """The answer when it is whole."""
        try:
            collected = await self._unless_gone(self._collected())
        finally:
            job.drop()
        if collected is None:
            return self._nobody()
        said, done = collected
        self._log(200, done=done)
        return JSONResponse(response.whole(said, done))

    async def streamed(self, job: Job, response: Response, with_usage: bool) -> HttpResponse:
        """The answer as it comes. What is wrong with the request is said by the status."""
        first = None
        try:
            first = await self._unless_gone(self._events.get())
        finally:
            if first is None:
                job.drop()
        if first is None:
            return self._nobody()
        if isinstance(first, HalfbyteError):
            raise self.refusal(first)
        return Stream(self._pieces(response, with_usage), job, self._nobody)

    async def _unless_gone(self, wanted: Coroutine[Any, Any, Result]) -> Result | None:
        """What is waited for; None as soon as the client has hung up."""
        result, gone = asyncio.create_task(wanted), asyncio.create_task(self._hung_up())
        try:
            await asyncio.wait({result, gone}, return_when=asyncio.FIRST_COMPLETED)
            return result.result() if result.done() else None
        finally:
            result.cancel()
            gone.cancel()

    async def _hung_up(self) -> None:
        while (await self._http.receive())["type"] != "http.disconnect":
            pass

    def _nobody(self) -> HttpResponse:
        self._log(HUNG_UP, "the client hung up")
        return HttpResponse(status_code=HUNG_UP)

    async def _collected(self) -> tuple[list[Said], Done]:
        said: list[Said] = []
        while not isinstance(happened := await self._events.get(), Done):
            if isinstance(happened, HalfbyteError):
                raise self.refusal(happened)
            if isinstance(happened, Said):
                said.append(happened)
        return said, happened

    async def _pieces(self, response: Response, with_usage: bool) -> AsyncIterator[bytes]:
        unknown = {"usage": None} if with_usage else {}
        if opening := response.opening():
            yield event(response.piece(opening) | unknown)
        while not isinstance(happened := await self._events.get(), Done):
            if isinstance(happened, HalfbyteError):
                yield event(self.refusal(happened).body)
                return
            if isinstance(happened, Said) and (happened.text or happened.logprobs):
                yield event(response.piece(response.choice(happened)) | unknown)
        yield event(response.piece(response.closing(), happened.finish_reason) | unknown)
        if with_usage:
            yield event(response.counts(happened))
        self._log(200, done=happened)
        yield END

    def _log(self, status: int, reason: str = "", done: Done | None = None) -> None:
        seconds = time.perf_counter() - self._began
        if done is not None:
            speed = done.completion_tokens / max(done.seconds, 1e-9)
            reason = (
                f"{done.prompt_tokens} + {done.completion_tokens} tokens, {done.finish_reason}, {speed:.1f} tokens/s "
                "while it had its turn"
            )
        self._log_line(f"{self._http.url.path} {status} {seconds:.2f} s: {reason}")


class Stream(StreamingResponse):
    """An answer in pieces; however it ends, its slot is given back."""

    def __init__(self, pieces: AsyncIterator[bytes], job: Job, hung_up: Callable[[], object]):
        super().__init__(pieces, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._job, self._hung_up = job, hung_up

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """As ASGI has it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            if not self._job.is_dropped:
                self._hung_up()
            self._job.drop()
