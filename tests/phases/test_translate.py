from __future__ import annotations

import io
import sys

import pytest

from rest_jax import errors
from rest_jax.phases import translate
from rest_jax.phases.lineage import PolicyName
from tests.phases import places


def test_lines_of_a_file_end_at_newlines_alone(tmp_path):
    """Characters at which `str.splitlines` would cut do not end a line: line numbers have to agree."""
    path = tmp_path / "in.txt"
    path.write_bytes("eins\r\n\nzwei\x0bdrei\u2028vier\nfünf".encode())
    assert list(translate._lines(str(path))) == ["eins", "", "zwei\x0bdrei\u2028vier", "fünf"]


def test_standard_input_is_read_line_by_line(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("eins\n\nzwei"))
    assert list(translate._lines("-")) == ["eins", "", "zwei"]


def test_the_newest_sealed_policy_is_taken(tmp_path):
    place = places.workspace(tmp_path)
    with pytest.raises(errors.MissingInputError, match="policy/bc is missing"):
        translate.newest_policy(place)
    for name in ("bc", "g2_i1", "g10_i1", "g1_i2"):
        places.put_policy(place, name)
    (place.run_dir / "policy" / "g11_i1").mkdir()  # not finished
    assert translate.newest_policy(place) == PolicyName(10, 1)
