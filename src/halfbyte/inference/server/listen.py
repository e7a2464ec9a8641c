"""A server that listens until it is told to end."""

import logging
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import FrameType
from typing import Any

import uvicorn

from halfbyte.inference.model import Answering
from halfbyte.inference.sampling import Sampling
from halfbyte.inference.server.app import Api
from halfbyte.inference.server.port import url
from halfbyte.inference.server.responses import TokenNames
from halfbyte.inference.server.scheduler import Scheduler

TEMPERATURE = 1.0
"""Where nobody says another: as OpenAI has it."""
GRACE = 10
"""Seconds that answers have to reach their clients after the end."""
KEPT = 30
"""Seconds that a connection without requests is kept."""


@dataclass(frozen=True)
class Serving:
    """How a model is served."""

    name: str
    log: Callable[[str], None]
    """Takes a line for each request."""
    key: str | None
    slots: int
    queue: int


class Server(uvicorn.Server):
    """Answers over HTTP until a signal comes, or `end` is called: then answers that are under way end too."""

    def __init__(self, answering: Answering, asked: Serving):
        self._scheduler = Scheduler(answering, asked.slots, asked.queue)
        self._asked = asked
        api = Api(
            answering=answering,
            scheduler=self._scheduler,
            name=asked.name,
            key=asked.key,
            sampling=sampling_of(answering),
            log=asked.log,
            names=TokenNames(answering.tokenizer),
            started=int(time.time()),
        )
        super().__init__(
            uvicorn.Config(
                api.app(),
                loop="asyncio",
                http="h11",
                ws="none",
                lifespan="off",
                log_level=logging.WARNING,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEPT,
                timeout_graceful_shutdown=GRACE,
            )
        )

    def answer(self, listener: socket.socket) -> None:
        """Until the end. Raises what ended the thread of the model, if anything did."""
        with ThreadPoolExecutor(1) as pool:
            working = pool.submit(self._scheduler.run)
            working.add_done_callback(lambda _: self.end())
            try:
                self.run([listener])
            except KeyboardInterrupt:  # the signal again, after it was obeyed
                pass
            finally:
                self._scheduler.stop()
        working.result()

    def end(self) -> None:
        """Take no more requests, and tell those that wait."""
        self._scheduler.stop()
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        for listener in sockets or ():
            self._asked.log(f"{self._asked.name} is served at {url(listener)}/v1")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Of Ctrl-C, and of what ends services."""
        self.end()
        super().handle_exit(sig, frame)


def sampling_of(answering: Answering) -> Callable[[Mapping[str, Any]], Sampling]:
    """Makes of words of a request what they say, and else what the model's makers or the protocol say."""
    otherwise = {} if answering.checkpoint.generation.get("do_sample") else {"temperature": TEMPERATURE}
    return lambda words: answering.sampling(
        otherwise | {name: value for name, value in words.items() if value is not None}
    )
