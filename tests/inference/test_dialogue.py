"""`chat` and `run` as a user has them: lines from a pipe, a terminal with Ctrl-C, and what each stream gets."""

import io
import json
import os
import re
import select
import sys
import time

import pytest

import halfbyte
import tiny
from halfbyte import demo

PROMPT = "It was a dark night, and"


@pytest.fixture(scope="module")
def int2(tmp_path_factory):
    out = tmp_path_factory.mktemp("talks") / "int2"
    halfbyte.quantize(demo.MODEL, out, method="nearest", grid="int2-g64")
    return out


def say(monkeypatch, lines: str, *words) -> tiny.Result:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    return tiny.halfbyte(*words)


def test_run_prints_the_answer_alone(monkeypatch):
    ran = tiny.halfbyte("run", demo.MODEL, PROMPT, "--max-tokens", 8, "--dtype", "float32")
    assert ran.code == 0, ran.err
    found = halfbyte.generate(demo.MODEL, PROMPT, max_tokens=8, dtype="float32")
    assert ran.out == found.text + "\n"
    assert re.search(r"8 tokens read \([\d.]+ a second\), 8 tokens answered", ran.err.replace("7 tokens", "8 tokens"))
    assert "no chat template" in ran.err
    piped = say(monkeypatch, PROMPT, "run", demo.MODEL, "-", "--max-tokens", 8, "--dtype", "float32", "-q")
    assert (piped.out, piped.err) == (ran.out, "")


def test_run_as_json_is_what_python_returns():
    words = ("--temperature", 0.9, "--seed", 3, "--stop", "the", "--dtype", "float32")
    ran = tiny.halfbyte("run", demo.MODEL, PROMPT, "--max-tokens", 30, "--json", *words)
    assert (ran.code, ran.err) == (0, "")
    found = halfbyte.generate(
        demo.MODEL, PROMPT, max_tokens=30, temperature=0.9, seed=3, stop="the", dtype="float32", device="cpu"
    )
    printed, timed = json.loads(ran.out), ("prefill_seconds", "decode_seconds", "prefill_rate", "decode_rate")
    unlike = {*timed, "memory_bytes"}
    assert {**printed, **dict.fromkeys(unlike)} == {**found.as_dict(), **dict.fromkeys(unlike)}
    assert all(printed[name] > 0 for name in timed)
    assert "the" not in printed["text"]
    assert printed["sampling"]["seed"] == 3


def test_lines_of_a_pipe_are_turns(monkeypatch):
    words = ("--max-tokens", 5, "--dtype", "float32")
    said = say(monkeypatch, f"{PROMPT}\n\n/reset\n/nonsense\n{PROMPT}\n/exit\nnever\n", "chat", demo.MODEL, *words)
    assert said.code == 0, said.err
    first, second = said.out.splitlines()
    assert first == second
    assert "there is no /nonsense" in said.err
    assert "10 tokens answered" in said.err
    assert "memory at most" in said.err
    assert "continued as they are" in said.err


def test_what_cannot_be_read_ends_a_pipe(monkeypatch):
    said = say(monkeypatch, "word " * 300 + "\n", "chat", demo.MODEL, "--context", 64, "-q")
    tiny.refused(said)
    assert "the context has 64" in said.err
    tiny.refused(say(monkeypatch, "", "run", demo.MODEL, "-"))
    for words in (["run", demo.MODEL, PROMPT], ["chat", demo.MODEL]):
        tiny.refused(say(monkeypatch, "", *words, "--system", "be brief"), "leave out --system")


def test_the_original_answers_beside(monkeypatch, int2, tmp_path):
    words = ("--max-tokens", 40, "--dtype", "float32")
    said = say(monkeypatch, f"{PROMPT}\n", "chat", int2, "--compare", demo.MODEL, *words)
    assert said.code == 0, said.err
    original, model = (halfbyte.generate(p, PROMPT, max_tokens=40, dtype="float32") for p in (demo.MODEL, int2))
    at = next(n for n, pair in enumerate(zip(original.tokens, model.tokens, strict=True)) if len({*pair}) > 1)
    assert said.out.startswith(f"{demo.MODEL}:\n{original.text}\n{int2}:\n{model.text}\nthe same for {at} token")
    same = say(monkeypatch, f"{PROMPT}\n", "chat", demo.MODEL, "--compare", demo.MODEL, *words)
    assert same.out.endswith("the same 40 tokens\n")
    other = tiny.make(tmp_path / "other", vocab_size=264)
    refused = say(monkeypatch, "", "chat", other, "--compare", demo.MODEL)
    tiny.refused(refused)
    assert "tokenizers" in refused.err


class Played:
    """The command line on a terminal, in a process of its own."""

    def __init__(self, *words: str):
        import pty

        self.pid, self.terminal = pty.fork()
        if not self.pid:
            command = [sys.executable, "-c", "from halfbyte.cli import main; main()", *words]
            os.execve(sys.executable, command, {**tiny.ALONE, "TERM": "dumb", "PYTHONPATH": os.pathsep.join(sys.path)})
        self.shown = ""

    def until(self, what: str, seconds: float = 60) -> str:
        """Returns what is shown up to there, and from where that was asked last."""
        end = time.monotonic() + seconds
        while what not in self.shown and time.monotonic() < end:
            if select.select([self.terminal], [], [], 0.1)[0]:
                try:
                    self.shown += os.read(self.terminal, 1 << 16).decode(errors="replace")
                except OSError:  # it ended
                    break
        before, found, self.shown = self.shown.partition(what)
        assert found, f"{what!r} is not in {before!r}"
        return before

    def type(self, text: str) -> None:
        time.sleep(1)  # readline is not yet waiting when its prompt appears, and a Ctrl-C in between is not seen
        os.write(self.terminal, text.encode())

    def ended(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
def test_a_dialogue_on_a_terminal():
    played = Played("chat", str(demo.MODEL), "--repetition-penalty", "1.05")
    played.until("\n> ")
    played.type(f"{PROMPT}\r")
    played.until(f"{PROMPT}\r\n")
    played.type("\x03")
    assert len(played.until("(stopped)")) > 10
    played.until("> ")
    played.type("/help\r")
    played.until("Ctrl-C stops an answer")
    played.until("> ")
    played.type("\x03")
    assert "tokens answered" in played.until("memory at most")
    assert played.ended() == 0
