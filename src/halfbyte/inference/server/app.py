"""The server's paths: requests in, answers out."""

import asyncio
import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as Http
from starlette.responses import JSONResponse
from starlette.responses import Response as HttpResponse
from starlette.routing import Route

from halfbyte.errors import BadRequest
from halfbyte.inference.model import Answering
from halfbyte.inference.sampling import Sampling
from halfbyte.inference.server.exchange import HUNG_UP, Exchange, TooLong
from halfbyte.inference.server.refusal import Refusal, error_body
from halfbyte.inference.server.requests import Asked, ChatRequest, CompletionRequest, Request, read
from halfbyte.inference.server.responses import ChatResponse, CompletionResponse, Response, TokenNames
from halfbyte.inference.server.scheduler import Busy, Job, Scheduler, Stopped

BODY, BODY_PER_TOKEN = 1 << 20, 32
"""Bytes that a request may have: so many for each token that the model reads, or the first of these if that is more."""
SECONDS = 60
"""That a client may take to send its request."""


@dataclass(frozen=True)
class Api:
    """What the paths answer with."""

    answering: Answering
    scheduler: Scheduler
    name: str
    """Of the model."""
    key: str | None
    """That clients have to have."""
    sampling: Callable[[Mapping[str, Any]], Sampling]
    """How tokens are chosen, of the words of a request. Raises BadRequest."""
    log: Callable[[str], None]
    """Takes a line for each request."""
    names: TokenNames
    started: int

    def app(self) -> Starlette:
        """As a server of ASGI runs it."""
        routes = [
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completion, methods=["POST"]),
        ]
        return Starlette(routes=routes, exception_handlers={Refusal: _refused, HTTPException: _no_path, 500: _failed})

    async def health(self, http: Http) -> HttpResponse:
        """Whether it answers, and how much there is to do."""
        status = 503 if self.scheduler.is_stopped else 200
        busy = {"running": self.scheduler.running, "waiting": self.scheduler.waiting}
        return JSONResponse({"status": "ok" if status == 200 else "stopped", **busy}, status)

    async def models(self, http: Http) -> HttpResponse:
        """The one that there is."""
        self._require_key(http)
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, http: Http) -> HttpResponse:
        """That one by its name."""
        self._require_key(http)
        self._require_model(http.path_params["name"])
        return JSONResponse(self._model())

    async def chat(self, http: Http) -> HttpResponse:
        """The next message of a chat."""
        asked = await self._asked(http, ChatRequest)
        return await self._answer(http, asked, ChatResponse(self.name), lambda: self._rendered(asked))

    async def completion(self, http: Http) -> HttpResponse:
        """The continuation of a text."""
        asked = await self._asked(http, CompletionRequest)
        return await self._answer(http, asked, CompletionResponse(self.name), lambda: self._read(asked.prompt))

    def _read(self, prompt: str | list[int]) -> list[int]:
        return self.answering.encode(prompt) if isinstance(prompt, str) else prompt

    def _rendered(self, asked: ChatRequest) -> list[int]:
        """Raises BadRequest, also for tools of which the model would not be told."""
        tokens = self.answering.render(asked.chat, asked.offered_tools)
        if asked.offered_tools and tokens == self.answering.render(asked.chat):
            raise BadRequest("the model's chat template takes no tools; leave them out")
        return tokens

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": "model",
            "created": self.started,
            "owned_by": "halfbyte",
            "max_model_len": self.answering.context,
        }

    def _require_key(self, http: Http) -> None:
        given = http.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if self.key is not None and not hmac.compare_digest(given, self.key.encode()):
            raise Refusal(
                401,
                "this server asks for its key: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _require_model(self, name: str | None) -> None:
        if name not in (None, self.name):
            raise Refusal(404, f"there is no model '{name:.120}'; this is {self.name}", "model", "model_not_found")

    async def _asked(self, http: Http, kind: type[Request]) -> Request:
        self._require_key(http)
        if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refusal(415, "the body has to be JSON, with the header Content-Type: application/json")
        asked = read(kind, await _body(http, max(BODY, BODY_PER_TOKEN * self.answering.context)))
        self._require_model(asked.model)
        return asked

    async def _answer(
        self, http: Http, asked: Asked, response: Response, tokens: Callable[[], list[int]]
    ) -> HttpResponse:
        paths = {str(self.answering.checkpoint.path): self.name}
        exchange = Exchange(http, self.answering.ends, self.names, paths, self.log)
        try:
            sampling = self.sampling(asked.sampling)
        except BadRequest as error:
            raise Refusal(400, str(error), str(error).partition(":")[0]) from None

        def prompt() -> list[int]:
            found = tokens()
            _require_room(found, sampling.max_tokens, self.answering.context)
            return found

        job = Job(prompt, sampling, exchange.tell)
        try:
            self.scheduler.submit(job)
        except (Busy, Stopped) as error:
            raise exchange.refusal(error) from None
        if asked.stream:
            with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
            return await exchange.streamed(job, response, with_usage)
        return await exchange.whole(job, response)


def _require_room(tokens: list[int], most: int | None, context: int) -> None:
    """Raise TooLong where the model cannot hold the prompt and the answer that is asked for."""
    if len(tokens) >= context:
        raise TooLong(f"the prompt has {len(tokens)} tokens, and the context has {context} with the answer; give less")
    if most and len(tokens) + most > context:
        raise TooLong(
            f"the prompt has {len(tokens)} tokens and the answer may have {most}, and the context has {context}; ask "
            f"for max_tokens of {context - len(tokens)} at most, or give less"
        )


async def _body(http: Http, most: int) -> bytes:
    """All of it. Raises Refusal for one that is too long, or takes too long."""
    body = bytearray()
    long = Refusal(413, f"the body has more than {most} bytes, which is all that is read here")
    if int(http.headers.get("content-length", 0)) > most:  # which the server of HTTP has looked at
        raise long
    try:
        async with asyncio.timeout(SECONDS):
            async for chunk in http.stream():
                body += chunk
                if len(body) > most:
                    raise long
    except TimeoutError:
        raise Refusal(408, f"the body did not come within {SECONDS} s") from None
    except ClientDisconnect:
        raise Refusal(HUNG_UP, "the client hung up") from None
    return bytes(body)


async def _refused(http: Http, refusal: Exception) -> HttpResponse:
    if not isinstance(refusal, Refusal):
        raise refusal
    return JSONResponse(refusal.body, refusal.status, refusal.headers)


async def _no_path(http: Http, error: Exception) -> HttpResponse:
    if not isinstance(error, HTTPException):
        raise error
    message = f"{http.method} {http.url.path:.120}: {error.detail}"
    return JSONResponse(error_body(error.status_code, message), error.status_code, error.headers)


async def _failed(http: Http, error: Exception) -> HttpResponse:
    return JSONResponse(error_body(500, "this is a bug of halfbyte; its log says where it happened"), 500)
