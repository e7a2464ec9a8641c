"""Why a model is as fast as it is, in words: each reason is a function of what was measured and known."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from halfbyte.report.types import Machine, Pace, Products, Runtime, Spread

SMALLER, FASTER = 0.9, 1.1
"""Of the original's bytes, and times its speed: less and more than these is said to be so."""
LARGE_HEAD = 1 / 3
"""Of what a token reads."""
COMPUTING = 0.3
"""Of the arithmetic that a machine is able to: beyond it decoding no longer waits for memory alone."""
REACHED = 0.75
"""Of the bandwidth: little is left to gain."""
FEW_PRODUCTS = 0.6
"""Of a step's time, below which the rest of it counts."""
UNSTEADY = 0.25
"""Between the slowest and the fastest repeat, as a share of the median."""


@dataclass(frozen=True)
class Facts:
    """What is known of a model in an engine at one load."""

    batch: int = 1
    size_ratio: float | None = None
    """Of its bytes to the original's."""
    decode_ratio: float | None = None
    bandwidth_share: float | None = None
    arithmetic_share: float | None = None
    products: Sequence[Products] = ()
    head_share: float = 0.0
    products_share: float | None = None
    unsteady: float = 0.0
    """How far repeats of it, or of the machine's bandwidth, are apart."""
    threads: int = 1
    cores: int | None = None

    @classmethod
    def of(cls, row: Runtime, pace: Pace, original: Runtime | None, machine: Machine) -> "Facts":
        """Of a load of a model, which is measured."""
        return cls(
            pace.batch,
            row.size_bytes / original.size_bytes if original else None,
            pace.decode_ratio,
            pace.decode_share,
            pace.decode_arithmetic_share,
            row.products,
            row.head_bytes / row.read_bytes if row.read_bytes else 0.0,
            pace.products_share,
            max(_apart(pace.decode), _apart(machine.bandwidth)),
            machine.threads,
            machine.cores,
        )

    @property
    def is_only_smaller(self) -> bool:
        """Whether it is smaller than the original, and not faster."""
        if self.size_ratio is None or self.decode_ratio is None:
            return False
        return self.size_ratio < SMALLER and self.decode_ratio < FASTER


def _apart(spread: Spread) -> float:
    return (spread.high - spread.low) / spread.median if spread.median else 0.0


def decoded_at_load(facts: Facts) -> str | None:
    """No kernel multiplies its grid as it is."""
    grids, share = _share(facts, "held")
    return share and (
        f"no kernel multiplies by {grids} as it is: {share} of the linears' bytes were decoded to 16 bits as they were "
        "loaded, and are read as if they had never been quantized"
    )


def decoded_each_time(facts: Facts) -> str | None:
    """The same, where memory has no room for decoded weights."""
    grids, share = _share(facts, "decoded")
    return share and (
        f"no kernel multiplies by {grids} as it is: {share} of the linears' bytes are decoded to 16 bits for each "
        "product, which takes longer than the product"
    )


def rounded_activations(facts: Facts) -> str | None:
    """What linears read is rounded by the reference."""
    grids, share = _share(facts, "rounded")
    return share and (
        f"activations are rounded as it runs, and weights decoded for each product ({grids}, {share} of the linears' "
        "bytes): that is the reference, which shows what an engine computes and not how fast"
    )


def multiplied_in_float32(facts: Facts) -> str | None:
    """Kernels of bfloat16 are faster where there are any."""
    grids, share = _share(facts, "packed, in float32")
    return share and (
        f"products with {grids} are taken in float32: this processor multiplies no vectors of bfloat16, or the levels "
        "are none; --activations int8 may be faster"
    )


def large_head(facts: Facts) -> str | None:
    """Smaller linears change little."""
    if facts.head_share < LARGE_HEAD:
        return None
    return f"the head is {facts.head_share:.0%} of what a token reads of the weights"


def bound_by_arithmetic(facts: Facts) -> str | None:
    """Many sequences are multiplied with each weight that is read."""
    share = facts.arithmetic_share or 0.0
    if share < COMPUTING or share < (facts.bandwidth_share or 0.0):
        return None
    return (
        f"at batch {facts.batch} decoding computes more than it reads ({share:.0%} of the measured arithmetic, "
        f"{facts.bandwidth_share or 0.0:.0%} of the bandwidth): fewer bytes help little"
    )


def mostly_outside(facts: Facts) -> str | None:
    """The rest of a step takes the time."""
    if facts.products_share is None or facts.products_share >= FEW_PRODUCTS:
        return None
    return (
        f"at batch {facts.batch} products take {facts.products_share:.0%} of a step; the rest is attention, norms and "
        "Python, which smaller weights do not shorten: the model is small for this machine"
    )


def bound_by_bandwidth(facts: Facts) -> str | None:
    """It is as fast as memory lets it be."""
    if (facts.bandwidth_share or 0.0) < REACHED:
        return None
    return (
        f"at batch {facts.batch} decoding reads {facts.bandwidth_share:.0%} of the bandwidth that was measured: fewer "
        "bytes alone would make it faster"
    )


def few_threads(facts: Facts) -> str | None:
    """Other cores, and their share of the memory's channels, stand idle."""
    if facts.cores is None or facts.threads >= facts.cores:
        return None
    return f"{facts.threads} of {facts.cores} cores were used: more --threads read from more channels of the memory"


def busy_machine(facts: Facts) -> str | None:
    """Repeats differ."""
    if facts.unsteady < UNSTEADY:
        return None
    return (
        f"repeats differ by {facts.unsteady:.0%}: other programs were using the processor or the memory, so what is "
        "measured is less than the machine can"
    )


def _share(facts: Facts, way: str) -> tuple[str, str | None]:
    """The grids that are multiplied so, and the share of all linears' bytes."""
    rows = [row for row in facts.products if row.way == way]
    whole = sum(row.size_bytes for row in facts.products)
    names = ", ".join(dict.fromkeys(row.grid for row in rows if row.grid))
    return names, f"{sum(row.size_bytes for row in rows) / whole:.0%}" if rows and whole else None


OF_SPEED: tuple[Callable[[Facts], str | None], ...] = (
    decoded_at_load,
    decoded_each_time,
    rounded_activations,
    multiplied_in_float32,
    mostly_outside,
    large_head,
    bound_by_arithmetic,
    bound_by_bandwidth,
)
OF_THE_RUN = (few_threads, busy_machine)
"""True of whatever ran then."""


def reasons(loads: Sequence[Facts]) -> list[str]:
    """Of all loads of a model, each once."""
    found = [text for facts in loads for reason in OF_SPEED if (text := reason(facts))]
    smaller = next((facts for facts in loads if facts.is_only_smaller), None)
    if smaller:
        said = f"{smaller.size_ratio:.0%} of the original's bytes, but {smaller.decode_ratio:.2f} times as fast"
        found = [f"{said} at batch {smaller.batch}", *(found or ["what was measured does not say why"])]
    return list(dict.fromkeys(found))


def of_the_run(loads: Sequence[Facts]) -> list[str]:
    """What is to be known of all numbers."""
    worst = max(loads, key=lambda facts: facts.unsteady)
    return [text for reason in OF_THE_RUN if (text := reason(worst))]
