"""A file of losses that a killed run goes on with."""

import pytest

from halfbyte.budget.ledger import Ledger
from halfbyte.errors import BadRequest


def test_what_was_found_is_read_again(tmp_path):
    path = tmp_path / "new" / "x.jsonl"
    Ledger(path, "a").add({"w": {"q4_k": 0.1}, "v": {"q4_k": 0.3}})
    Ledger(path, "a").add({"w": {"q5_k": 1 / 3}})
    assert Ledger(path, "a").losses == {"w": {"q4_k": 0.1, "q5_k": 1 / 3}, "v": {"q4_k": 0.3}}


def test_a_line_that_was_cut_is_written_anew(tmp_path):
    path = tmp_path / "x.jsonl"
    Ledger(path, "a").add({"w": {"q4_k": 0.1}, "v": {"q4_k": 0.3}})
    for cut in range(len(path.read_bytes())):
        other = tmp_path / f"{cut}.jsonl"
        other.write_bytes(path.read_bytes()[:cut])
        known = Ledger(other, "a").losses
        Ledger(other, "a").add({"u": {"q4_k": 0.5}})
        assert Ledger(other, "a").losses == {**known, "u": {"q4_k": 0.5}}


def test_that_of_another_model_is_not_taken_and_not_lost(tmp_path):
    path = tmp_path / "x.jsonl"
    Ledger(path, "a").add({"w": {"q4_k": 0.1}})
    before = path.read_bytes()
    with pytest.raises(BadRequest, match="of another model, method, calibration or kind"):
        Ledger(path, "b")
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["a book\n", "[1]\n", '{"of": "a"}\n{"weight": "w"}\n', '{"of": "a"}\n7\n'])
def test_another_file_is_no_ledger(tmp_path, text):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(BadRequest, match="is no file of sensitivities"):
        Ledger(path, "a")
    assert path.read_text() == text
