"""`halfbyte support --engine`: what one engine loads, as lines for a terminal."""

import pytest

import tiny
from halfbyte.engines.engines import ENGINES
from halfbyte.engines.verdicts import Word
from halfbyte.targets.table import TARGETS


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_is_told_in_80_columns(engine):
    result = tiny.halfbyte("support", "--engine", engine)
    assert result.code == 0
    lines = result.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith(f"{ENGINES[engine].title} (--engine {engine})")
    for container in TARGETS:  # each has a section, or is refused whole
        assert f"\n{container}, read in\n" in result.out or container in result.out.partition("refused, all of it:")[2]
    for container, support in ENGINES[engine].support.items():
        section = result.out.partition(f"\n{container}, read in\n")[2].partition("\n\n")[0]
        assert any(word in section for word in (Word.TESTED, Word.DOCUMENTED))
        assert (Word.TESTED in section) <= bool(support.tested)


def test_vllm_is_told_in_all_three_words():
    out = tiny.halfbyte("support", "--engine", "vLLM").out
    section = out.partition("\ncompressed-tensors, read in\n")[2].partition("\n\n")[0]
    tested, documented, refused = (section.index(f"  {word}") for word in Word)
    assert (
        tested
        < section.index("int4-g128")
        < documented
        < section.index("mxfp4")
        < refused
        < section.index("mxfp6-e2m3")
    )
    assert "the 335 of vLLM 0.33.0" in " ".join(section.split())


def test_an_unknown_engine_is_refused():
    tiny.refused(tiny.halfbyte("support", "--engine", "olama"), "unknown engine 'olama'; did you mean ollama")
