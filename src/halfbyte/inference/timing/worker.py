"""The program in which one engine has one model: a line of JSON says which of its methods is called and with what, and
a line of JSON is what that returns.

Its own peak of memory is the engine's, and what kills the engine kills nothing else.
"""

import json
import os
import sys
from pkgutil import resolve_name
from typing import TextIO

from halfbyte.devices import peak_of_process
from halfbyte.errors import HalfbyteError
from halfbyte.surroundings import arrange

OURS = "ours"
"""The second word, where the engine is halfbyte's."""


def main() -> None:
    """Ends with its input, so with who started it."""
    home, whose = sys.argv[1:]
    if whose == OURS:
        arrange()
    answers = _own_output()
    engine = resolve_name(home)()
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = getattr(engine, asked.pop("method"))(**asked)
            answer = {"answer": answer, "memory_bytes": peak_of_process()}
        except HalfbyteError as error:
            answer = {"refused": str(error)}
        print(json.dumps(answer), file=answers, flush=True)


def _own_output() -> TextIO:
    """Standard output; what libraries print there goes where errors go."""
    own = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return own


if __name__ == "__main__":
    main()
