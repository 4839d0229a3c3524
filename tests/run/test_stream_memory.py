"""Many long streams at once are read in bounded memory: by a process of their own, whose peak nothing else made."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "streams.py"


@pytest.mark.heavy
def test_sixty_four_long_streams_need_little_memory() -> None:
    command = [sys.executable, str(BENCHMARK), "64", "1500000"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    figures = json.loads(ended.stdout)
    assert figures["streams"] * figures["mb_each"] == 96
    assert figures["stored_mb"] < 3
    assert figures["grown_mb"] < 60
