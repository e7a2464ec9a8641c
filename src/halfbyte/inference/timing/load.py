"""What a model is timed at: no torch, since engines are timed that have none."""

import random
from typing import NamedTuple


class Load(NamedTuple):
    """So many sequences at a time: each reads a prompt, and answers with so many tokens."""

    batch: int
    prompt: int
    tokens: int

    @property
    def length(self) -> int:
        """Tokens of a sequence at its end."""
        return self.prompt + 1 + self.tokens

    @property
    def context(self) -> int:
        """Tokens of a sequence when half of the answer is there."""
        return self.prompt + self.tokens // 2

    def prompts(self, vocabulary: int) -> list[list[int]]:
        """Any tokens: how fast they are read does not depend on what they say."""
        drawn = random.Random(0)
        return [[drawn.randrange(vocabulary) for _ in range(self.prompt)] for _ in range(self.batch)]


class Seconds(NamedTuple):
    """What a load took."""

    first: float
    """Until the first token."""
    decode: float
    """All tokens that follow."""
