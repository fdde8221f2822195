"""Arithmetic that was not meant to change has not: see `golden_record`."""

import golden_record
import pytest


@pytest.mark.parametrize("name", golden_record.RUNS)
def test_runs_reproduce_the_golden_record(name, tmp_path):
    where, expected = golden_record.read(name)
    found = golden_record.run(name, tmp_path / "run")
    assert [key for key, _ in found] == [key for key, _ in expected]
    if where == golden_record.environment():
        assert found == expected
    else:
        for (key, value), (_, wanted) in zip(found, expected):
            assert value == pytest.approx(wanted, rel=1e-5, abs=1e-6), key
