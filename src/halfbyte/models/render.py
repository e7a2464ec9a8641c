"""Run by `chats` as a program of its own: a chat template and chats come in, texts go out, as lines of JSON."""

import json
import sys
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

REFUSALS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)
"""What a stranger's template may raise; its RecursionError is a RuntimeError."""
OWN, TIMES = 65_536, 16
"""Characters that a template may make of one chat: its own words, and so many times what it was given. A tokenizer
takes a second for a million."""


def main() -> None:
    """Read requests from standard input, and write what they ask for to standard output: a line of JSON for each."""
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """Chats as texts, and those that the template refuses."""
    texts, refused = [], []
    for number, chat in enumerate(asked["chats"]):
        try:
            (text,), _ = render_jinja_template(
                conversations=[chat],
                chat_template=asked["template"],
                tools=asked["tools"][number],
                add_generation_prompt=asked["to_answer"],
                **asked["variables"],
            )
            given = len(json.dumps([chat, asked["tools"][number]]))
            if len(text) > OWN + TIMES * given:
                raise ValueError(f"it makes {len(text)} characters of one chat")
            texts.append(text)
        except REFUSALS as error:
            texts.append(None)
            refused.append((number, f"{error or type(error).__name__}"))
    return {"texts": texts, "refused": refused}


if __name__ == "__main__":
    main()
