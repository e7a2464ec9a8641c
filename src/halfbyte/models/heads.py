"""Whether a model's head is its embedding, as Transformers reads config.json and the file, which may disagree.

What says that they are one while the file has both, and different ones, is not followed: the head is the file's. A head
that is said to be of its own, and of which there is no tensor, would be filled at random.
"""

import torch

from halfbyte.errors import BadCheckpoint, Unsupported
from halfbyte.models import roles
from halfbyte.models.checkpoint import Checkpoint

TIE = "tie_word_embeddings"
ROWS = 4096
"""Of the head and the embedding that are compared at a time."""


def is_tied(checkpoint: Checkpoint) -> bool:
    """Whether the head shares the embedding's values."""
    in_config = checkpoint.config.get(TIE, checkpoint.text_config.get(TIE))
    head = next(filter(roles.is_head, checkpoint.tensors()), None)
    if head is not None and (in_config is False or not _is_embedding(checkpoint, head)):
        return False
    return bool(_by_default(checkpoint) if in_config is None else in_config)


def settled(checkpoint: Checkpoint) -> Checkpoint:
    """With a config that says what is so, for those who go by it alone. Raises BadCheckpoint for a head that would be
    random."""
    in_config = checkpoint.config.get(TIE, checkpoint.text_config.get(TIE))
    if checkpoint.tied:
        return checkpoint
    if not any(map(roles.is_head, checkpoint.tensors())):
        _require_head(checkpoint)
    elif in_config is not False:
        return settled_as(checkpoint, tied=False)
    return checkpoint


def settled_as(checkpoint: Checkpoint, tied: bool) -> Checkpoint:
    """With a config that says so."""
    config = {**checkpoint.config, TIE: tied}
    if TIE in checkpoint.text_config and "text_config" in config:
        config["text_config"] = {**checkpoint.text_config, TIE: tied}
    return checkpoint.replaced(config=config)


def tie(checkpoint: Checkpoint) -> tuple[str, str]:
    """Of a checkpoint whose head is its embedding: that tensor, and what Transformers would call one of the head's own.
    Raises BadCheckpoint or Unsupported."""
    from halfbyte.models import mapping, skeleton  # Transformers takes seconds to import

    model = skeleton.outline(checkpoint)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    called = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
    names = mapping.Names(model)
    looked_up = called.get(id(embedding.weight))
    tensor = next((t for t in checkpoint.tensors() if looked_up and names.find(t)[0] == looked_up), None)
    if head is None or tensor is None:
        raise Unsupported(f"'{checkpoint.model_type}' ({type(model).__name__}) has no head that is its embedding")
    return tensor, called[id(head.weight)]


def _is_embedding(checkpoint: Checkpoint, head: str) -> bool:
    """Whether the tensor is the embedding once more."""
    a = checkpoint.entries.get(head)
    b = next(
        (e for name, e in checkpoint.entries.items() if roles.EMBEDDING.match(name) and roles.block_of(name) is None),
        None,
    )
    if a is None or b is None or head in checkpoint.parts or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return all(
        torch.equal(a.read(i, min(i + ROWS, a.shape[0])), b.read(i, min(i + ROWS, a.shape[0])))
        for i in range(0, a.shape[0], ROWS)
    )


def _by_default(checkpoint: Checkpoint) -> bool:
    """What the family's configuration says where config.json says nothing."""
    if checkpoint.model_type in roles.TIED:
        return True
    try:
        return bool(checkpoint.settings().tie_word_embeddings)
    except (ValueError, KeyError, OSError, AttributeError, TypeError, Unsupported):
        return True  # a model that Transformers does not know: what has no head of its own is tied


def _require_head(checkpoint: Checkpoint) -> None:
    from halfbyte.models import mapping, skeleton  # Transformers takes seconds to import

    try:
        model = skeleton.outline(checkpoint)
    except (BadCheckpoint, Unsupported):
        return
    head = model.get_output_embeddings()
    names = mapping.Names(model)
    read = {names.find(tensor)[0] for tensor in checkpoint.tensors()}
    called = [
        name for name, p in model.named_parameters(remove_duplicate=False) if head is not None and p is head.weight
    ]
    if called and not read.intersection(called):
        raise BadCheckpoint(
            f"{checkpoint.path} lacks the head: config.json says that it is not the embedding ({TIE} is false), and "
            f"there is no '{called[0]}', which "
            f"Transformers would fill at random; set {TIE} to true if the model was made so"
        )
