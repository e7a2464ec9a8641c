"""What becomes of the KV cache: scales that the source has go along where engines read them; those asked for have their place."""

from halfbyte.containers import GGUF
from halfbyte.containers import kv as layout
from halfbyte.containers.container import Container
from halfbyte.containers.kv import KVGrid
from halfbyte.containers.safetensors import Spec
from halfbyte.errors import Unsupported
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.targets.plan import Job


def plan(job: Job) -> None:
    """Fill in the job's cache and the tensors that its scales will be. Raises Unsupported for one that the container does not hold."""
    if job.recipe.kv:
        job.kv = KVGrid.parse(job.recipe.kv)
        require(job.container, job.kv)
        job.scales = _to_find(job.checkpoint, job.kv)
    elif cache := job.checkpoint.kv:
        try:
            require(job.container, cache.grid)
        except Unsupported as reason:
            job.dropped |= dict.fromkeys(job.checkpoint.kv_scales, str(reason))
            return
        job.kv, job.scales = cache.grid, layout.specs(cache)


def require(container: Container, grid: KVGrid) -> None:
    """Raise Unsupported unless engines read the scales of such a cache beside this container's weights."""
    if isinstance(container, GGUF):
        raise Unsupported(f"a GGUF stores nothing of a KV cache: llama.cpp chooses it as it starts, {layout.LLAMA_CPP}")
    layout.config({"quant_method": container.name}, grid)


def _to_find(checkpoint: Checkpoint, grid: KVGrid) -> dict[str, Spec]:
    from halfbyte.models import kv  # needs the model's code, as finding the scales does

    return layout.specs(kv.blank(checkpoint, grid))
