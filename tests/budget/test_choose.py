"""What is chosen, against trying everything."""

import itertools
import random

import pytest

from halfbyte.budget.solve import Option, choose


@pytest.fixture(scope="module")
def units() -> list[dict[str, Option]]:
    numbers = random.Random(0)
    return [{name: Option(numbers.randrange(10, 99), numbers.random() ** 4) for name in "abcd"} for _ in range(6)]


def least_bytes(units) -> int:
    return sum(min(option.size_bytes for option in unit.values()) for unit in units)


def every(units):
    for names in itertools.product(*units):
        options = [unit[name] for unit, name in zip(units, names, strict=True)]
        yield sum(o.size_bytes for o in options), sum(o.loss for o in options)


def total(units, names):
    options = [unit[name] for unit, name in zip(units, names, strict=True)]
    return sum(o.size_bytes for o in options), sum(o.loss for o in options)


@pytest.mark.parametrize("more", [0, 3, 20, 60, 10_000])
def test_nothing_within_the_bytes_loses_less(units, more):
    most = least_bytes(units) + more
    size, loss = total(units, choose(units, most_bytes=most))
    assert size <= most
    assert loss == pytest.approx(min(loss for size, loss in every(units) if size <= most), rel=1e-3)


@pytest.mark.parametrize("more", [1.01, 1.5, 3, 100])
def test_nothing_that_loses_as_little_is_smaller(units, more):
    most = more * sum(min(option.loss for option in unit.values()) for unit in units)
    size, loss = total(units, choose(units, most_loss=most))
    assert loss <= most * (1 + 1e-6)
    assert size == min(size for size, loss in every(units) if loss <= most)


def test_what_nothing_holds_to_is_told(units):
    assert choose(units, most_bytes=least_bytes(units) - 1) is None
    assert choose(units, most_bytes=-1) is None
    assert choose(units, most_loss=1e-9) is None


def test_the_solver_prints_nothing(capfd):
    """HiGHS printed a line of its own about these, where it presolved."""
    numbers, units = random.Random(13), []
    for _ in range(43):
        weights, loss = numbers.choice([10_000, 30_000, 90_000, 400_000]), 10 ** numbers.uniform(-6, -4)
        units.append(
            {
                str(bits): Option(
                    int(weights * bits * numbers.uniform(0.99, 1.01)),
                    loss * 4 ** (4 - bits) * numbers.uniform(0.8, 1.25),
                )
                for bits in (2.1, 2.6, 3.1, 3.4, 4.25, 4.5, 5.5, 6.5, 8.5)
            }
        )
    assert choose(units, most_loss=0.003)
    assert capfd.readouterr() == ("", "")
