"""Texts in several languages, and whether a loss is that of a language which the calibration text has not."""

import pytest

import halfbyte
import tiny
from halfbyte import demo
from halfbyte.errors import BadRequest
from halfbyte.evaluation.languages import ALIKE, shared

ENGLISH = demo.CALIBRATION.read_text(encoding="utf-8")[:300_000]


@pytest.mark.parametrize("name", demo.TEXTS)
def test_languages_are_told_apart(name):
    found = shared(demo.TEXTS[name].read_text(encoding="utf-8"), ENGLISH)
    assert (found > ALIKE) == (name in ("heldout", "multilingual-en"))


def test_a_text_of_no_letters_is_in_no_other_language():
    assert shared("123 456", ENGLISH) == 1.0


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("languages")
    tiny.make(home / "model")
    calibration = {"source": str(demo.TEXTS["multilingual-en"]), "samples": 4, "length": 64}
    halfbyte.quantize(home / "model", home / "out", grid="int3-g32", calibration=calibration)
    return home


@pytest.mark.slow
def test_one_name_stands_for_all(home):
    result = tiny.halfbyte(
        "eval", home / "out", "--against", home / "model", "--text", "multilingual", "--length", 64, "--windows", 1
    )
    assert result.code == 0
    assert all(f"tokens of {code} (multilingual-{code})" in result.out for code in demo.LANGUAGES)
    with pytest.raises(BadRequest, match="one text in each of 17 languages"):
        halfbyte.evaluate(home / "out", home / "model", "multilingual")


def test_how_much_of_a_text_the_calibration_has(home, tmp_path):
    own = halfbyte.evaluate(home / "out", home / "model", "multilingual-en", length=64, windows=2).models[0]
    other = halfbyte.evaluate(home / "out", home / "model", "multilingual-ru", length=64, windows=2).models[0]
    assert own.in_calibration == 1.0
    assert other.in_calibration < 0.01
    halfbyte.quantize(home / "model", tmp_path / "nearest", method="nearest", grid="int3-g32")
    assert (
        halfbyte.evaluate(tmp_path / "nearest", home / "model", length=64, windows=1).models[0].in_calibration is None
    )


@pytest.mark.slow
def test_a_loss_in_a_language_that_the_calibration_has_not_is_named(tmp_path):
    halfbyte.quantize(demo.MODEL, tmp_path / "out", grid="int3-g128", calibration={"samples": 16, "length": 256})
    for name in ("multilingual-en", "multilingual-he", "heldout"):
        row = halfbyte.evaluate(tmp_path / "out", demo.MODEL, name, length=256, windows=4).models[0]
        said = [finding for finding in row.findings if "another language than the calibration's" in finding]
        assert len(said) == (name == "multilingual-he")
