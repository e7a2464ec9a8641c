"""Speed by a roofline: what memory and arithmetic allow at most, and no engine reaches whole."""

from halfbyte.sizing.choices import Kernel
from halfbyte.sizing.devices import Device
from halfbyte.sizing.memory import Weights


def decode_tokens(
    weights: Weights, parameters: Weights, cache_bytes: int, batch: int, cards: int, device: Device, kernel: Kernel
) -> float | None:
    """Tokens of all sequences in a second: each step reads weights and cache once, and multiplies by what a token
    needs. None where the bandwidth is not known."""
    if not device.bandwidth:
        return None
    reading = (weights.read(batch) + cache_bytes) / (device.bandwidth * 1e9 * cards)
    rate = device.arithmetic(kernel.computes)
    multiplying = 2 * parameters.of_token * batch / (rate * cards) if rate else 0.0
    return batch / max(reading, multiplying)


def prefill_tokens(parameters: Weights, cards: int, device: Device, kernel: Kernel) -> float | None:
    """Tokens of a prompt in a second, its attention left out. None where the arithmetic is not known."""
    rate = device.arithmetic(kernel.computes)
    return rate * cards / (2 * parameters.of_token) if rate else None
