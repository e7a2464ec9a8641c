"""What Ollama is told of a GGUF beside what the file says (format: docs/modelfile.mdx of ollama/ollama).

It finds the prompt format by the file's chat template where it knows that, and ends at the tokens that the file says
end a text.
"""

from collections.abc import Mapping

from halfbyte.targets.gguf.head import Value

ENDS = ("eos", "eot", "eom")


def text(name: str, metadata: Mapping[str, Value]) -> str:
    """A Modelfile that lies beside the GGUF `name`."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    numbers = [metadata[key].value for end in ENDS if (key := f"tokenizer.ggml.{end}_token_id") in metadata]
    stops = dict.fromkeys(tokens.value[number] for number in numbers if tokens and number < len(tokens.value))
    return "\n".join([f"FROM ./{name}", *(f"PARAMETER stop {_quoted(stop)}" for stop in stops)]) + "\n"


def _quoted(word: str) -> str:
    return f'"""{word}"""' if '"' in word else f'"{word}"'
