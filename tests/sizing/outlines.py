"""Models of which only headers exist, with the tensors that Transformers' own model of a config has."""

from functools import cache
from pathlib import Path

import torch
import transformers
import yaml

from halfbyte.containers.safetensors import Entry
from halfbyte.models.headers import HeaderCheckpoint

GIB = 1 << 30
PUBLISHED = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text())


def config_of(name: str) -> dict:
    """A model's settings; patterns of layers are written out."""
    config = dict(PUBLISHED["models"][name])
    if config.get("layer_types") == "sliding 5 full 1":
        kinds = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(config["num_hidden_layers"])]
        config["layer_types"] = kinds
    if config.get("hybrid_override_pattern"):
        config["hybrid_override_pattern"] = "".join("*" if i % 11 == 5 else "ME"[i % 2] for i in range(88))
    return config


@cache
def outline(name: str) -> HeaderCheckpoint:
    """In bfloat16."""
    config = config_of(name)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if config.get("tie_word_embeddings") else set()
    entries = {
        tensor: Entry(tuple(value.shape), torch.bfloat16, Path("model.safetensors"), 0)
        for tensor, value in model.state_dict().items()
        if tensor not in tied and "inv_freq" not in tensor
    }
    whole = {**config, "architectures": [type(model).__name__], "torch_dtype": "bfloat16"}
    return HeaderCheckpoint(Path(name), whole, entries)
