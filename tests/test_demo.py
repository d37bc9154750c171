import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from diffjax.utils import image

ROOT = Path(__file__).parents[1]
MEASURED = {"num": 4, "among": 9, "top1": 0.75, "class": 1.0, "psnr": 25.04}


@pytest.mark.parametrize("num", [1, 6])
def test_the_sheet_of_the_demo(tmp_path, num):
    random = np.random.default_rng(0)
    pictures = random.integers(0, 256, (num, 32, 32, 3), np.uint8)
    entries = [{"file": f"{i}.png", "prompt": f"a purple panda {i}"} for i in range(num)]
    for entry, picture in zip(entries, pictures):
        image.write_png(tmp_path / entry["file"], picture)
    (tmp_path / "manifest.json").write_text(json.dumps({"images": entries}))
    (tmp_path / "evaluation.json").write_text(json.dumps(MEASURED | {"held_out_prompts": MEASURED | {"num": 3}}))
    held_out = random.integers(0, 256, (50, 1100, 3), np.uint8)
    image.write_png(tmp_path / "held_out.png", held_out)
    command = [sys.executable, ROOT / "scripts" / "demo_sheet.py", tmp_path, tmp_path, tmp_path / "sheet.png"]
    subprocess.run(command, check=True)
    sheet, _ = image.read_png(tmp_path / "sheet.png")
    assert (sheet[:256, :256] == pictures[0].repeat(8, axis=0).repeat(8, axis=1)).all()
    rows = np.flatnonzero((sheet[:, 500] == held_out[0, 500]).all(axis=-1))
    assert any((sheet[row : row + 50, :1100] == held_out).all() for row in rows)


def test_the_figures_of_the_demo():
    figures = runpy.run_path(str(ROOT / "scripts" / "demo_sheet.py"))["figures"]
    assert figures(MEASURED | {"held_out_prompts": MEASURED | {"num": 3}}) == [
        "3 held-out pairs: 75.0% find their own picture among 9, the colour is right in 100.0%, PSNR 25.0 dB",
        "4 training prompts: 75.0% find their own picture among 9, the colour is right in 100.0%, PSNR 25.0 dB",
    ]


def test_the_demo_says_what_to_do_next_in_three_lines():
    said = (ROOT / "scripts" / "demo.sh").read_text().partition("Next, in")[2].splitlines()
    assert sum(line.startswith("    diffjax ") for line in said) == 3
