"""Each fault of the benchmark `faults` once, at a random point: the run ends bit for bit, or says what is wrong."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "eval" / "benchmarks" / "faults.py"


@pytest.mark.slow
def test_every_fault_once():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--rounds", "5", "--seed", "3", "--no_store"],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "5 rounds, lost 0" in done.stdout
    assert done.stdout.count("bit for bit") == 5
