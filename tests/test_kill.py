"""What is killed at random instants goes on and ends as if nobody had killed it: a slice of `scripts/kill_test.py`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"

CUTS = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import kill_test
from diffjax.utils import files

folder = Path(sys.argv[2])
seen = set()
for at in range(1, 12):
    for seed in range(6):
        place = folder / f"{at}-{seed}"
        (place / "aside").mkdir(parents=True)
        (place / "file").write_bytes(b"old" * 100)

        def work():
            kill_test.PowerCut(at, seed, place / "aside")
            WRITE
            return 0

        ended = kill_test.forked(work, place / "log")
        content = (place / "file").read_bytes()
        seen.add("old" if content == b"old" * 100 else "new" if content == b"new" * 200 else "neither")
print(sorted(seen))
"""

ATOMIC = 'files.write_atomic(place / "file", b"new" * 200)'
HASTY = '(place / "part").write_bytes(b"new" * 200); os.replace(place / "part", place / "file")'


@pytest.mark.parametrize(("write", "seen"), [(ATOMIC, ["new", "old"]), (HASTY, ["neither", "new", "old"])])
def test_a_file_is_old_or_new_wherever_the_power_goes(tmp_path, write, seen):
    """A write that is not synced before it is renamed is neither: the cut finds what it is for."""
    command = [sys.executable, "-c", CUTS.replace("WRITE", write), str(SCRIPTS), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip() == str(seen), done.stderr


@pytest.mark.slow
def test_some_kills(tmp_path):
    command = [sys.executable, str(SCRIPTS / "kill_test.py"), "--out", str(tmp_path), "--runs", "12"]
    done = subprocess.run(command, capture_output=True, text=True)
    told = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    assert len(told) == 12 and not done.returncode, done.stdout
