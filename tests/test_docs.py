"""The site is built without a warning: no link, anchor or page is missing."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(not importlib.util.find_spec("mkdocstrings"), reason="needs the extra `docs`")
def test_the_site_is_built_and_its_links_lead_somewhere(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert not built.returncode, built.stderr
    text = (tmp_path / "reference" / "command_line.html").read_text()
    assert "diffjax sample" in text and "--guidance" in text
    assert "alpha(t) x0 + sigma(t) eps" in (tmp_path / "reference" / "diffusion.html").read_text()


def test_readme_names_pages_that_are_there():
    text = (ROOT / "README.md").read_text()
    links = [part.partition(")")[0] for part in text.split("](")[1:]]
    assert links and all((ROOT / link).exists() for link in links if "://" not in link)
