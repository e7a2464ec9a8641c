"""What chats in the default calibration are good for: the loss on held-out chats and on held-out text, with them and
without.

    python benchmarks/chats.py MODEL --wikitext wikitext-2-test.txt

The held-out chats are made of WikiText-2's articles: a user asks for a subject, and its paragraphs are the answers.
"""

import argparse
import json
import re
import tempfile
from itertools import pairwise
from pathlib import Path

import halfbyte
from halfbyte import demo

KINDS = {"with chats": "default", "without": str(demo.CALIBRATION)}
TITLE = re.compile(r"^ = ([^=<]+) = $", re.MULTILINE)
SHORTEST = 200
"""Characters of a paragraph that is an answer."""


def chats(text: str) -> list[dict]:
    """One for each article whose title and first paragraphs are whole: the test split has <unk> for rare words."""
    found = []
    titles = [*TITLE.finditer(text)]
    for title, after in pairwise([*(m.span() for m in titles), (len(text), len(text))]):
        body = text[title[1] : after[0]].split("\n")
        answers = [_plain(line) for line in body if len(line) > SHORTEST and "<unk>" not in line]
        name = _plain(text[slice(*title)].strip(" ="))
        asked = (f"Tell me about {name}.", *["What else is known?", "Go on."] * len(answers))
        messages = [
            {"role": role, "content": words}
            for question, answer in zip(asked, answers, strict=False)
            for role, words in (("user", question), ("assistant", answer))
        ]
        found += [{"messages": messages}] if messages else []
    return found


def _plain(text: str) -> str:
    """Without the spaces around marks of WikiText-2's tokenised form."""
    text = re.sub(r" @([-,.])@ ", r"\1", text.strip())
    text = re.sub(r" ([,.;:!?%)\]]|'s\b|n't\b)", r"\1", text)
    return re.sub(r"([(\[$]) ", r"\1", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--wikitext", type=Path, required=True)
    parser.add_argument("--grid", default="int4-g64")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=2)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        spoken = Path(home) / "chats.jsonl"
        spoken.write_text("\n".join(map(json.dumps, chats(a.wikitext.read_text(encoding="utf-8")))), encoding="utf-8")
        for seed in range(a.seeds):
            made = [Path(home) / f"{name}-{seed}" for name in KINDS]
            for out, source in zip(made, KINDS.values(), strict=True):
                sampling = {"source": source, "samples": a.samples, "seed": seed}
                report = halfbyte.quantize(a.model, out, method="gptq", grid=a.grid, calibration=sampling)
                seen = report["calibration"]
                print(f"{out.name}: {seen['windows'][0]} windows, {seen['chats']} of chats", flush=True)
            for text in (str(spoken), "heldout"):
                rows = halfbyte.evaluate(made, a.model, text=text, windows=a.windows)["models"]
                for name, row in zip(KINDS, rows, strict=True):
                    print(f"{Path(text).stem}, {name}: KL {row['kl']:.5f} ± {row['kl_error']:.5f}", flush=True)
                print(f"  difference: {rows[1]['kl_minus_first']}", flush=True)


if __name__ == "__main__":
    main()
