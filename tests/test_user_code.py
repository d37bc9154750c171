"""The user's own network, loss and optimizer: found beside the config, kept with the run, and read from there wherever
it goes.
"""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import toys
from PIL import Image

import diffjax
from diffjax import config as configs, user_code
from diffjax.train import loop
from diffjax.utils.errors import UserError

CONFIG = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({
        "name": "own",
        "data": {"name": "captioned_folder", "path": "PICTURES", "size": 8},
        "text": {"name": "words", "tokens": 4, "width": 8, "heads": 2, "hidden": 8},
        "process": {"name": "flow"},
        "prediction": {"name": "x0"},
        "network": "my_nets:Mixer",
        "Mixer": {"width": 8},
        "loss": {"weight": {"name": "my_parts:level", "height": 2.0}, "times": {"name": "uniform"}},
        "optimizer": {"name": "my_parts:plain_sgd", "rate": 0.01},
        "train": {"steps": 2, "batch": 8, "log_every": 1},
        "sample": {"steps": 2, "prompts": ("picture 1",)},
    })
"""
NETS = """
import jax.numpy as jnp
from flax import linen as nn
import my_layers

class Mixer(nn.Module):
    width: int = 16
    depth: int = 1

    @nn.compact
    def __call__(self, x, t, context=None, mask=None, pooled=None, label=None):
        y = nn.Dense(self.width)(x.reshape(len(x), -1)) + nn.Dense(self.width)(pooled) + t[:, None]
        for _ in range(self.depth):
            y = my_layers.bend(y)
        return nn.Dense(x[0].size)(y).reshape(x.shape) + my_layers.SHIFT
"""
LAYERS = "SHIFT = 0.0\n\ndef bend(y):\n    from my_late import bent\n    return bent(y)\n"
LATE = "import jax\n\ndef bent(y):\n    return jax.nn.silu(y)\n"
PARTS = """
import jax.numpy as jnp
import optax

def level(height=1.0):
    return lambda denoiser, t: height * jnp.ones_like(t)

def plain_sgd(factor, rate):
    return optax.sgd(lambda step: rate * factor(step))
"""


@pytest.fixture
def project(tmp_path):
    """A folder with pictures, an experiment, and the modules that it names."""
    folder = tmp_path / "a project"
    (folder / "pictures").mkdir(parents=True)
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{number}.png")
        (folder / "pictures" / f"{number}.txt").write_text(f"picture {number}")
    texts = {"own": CONFIG.replace("PICTURES", str(folder / "pictures")), "my_nets": NETS, "my_layers": LAYERS}
    for name, text in (texts | {"my_late": LATE, "my_parts": PARTS, "unrelated": "raise RuntimeError"}).items():
        (folder / f"{name}.py").write_text(text)
    return folder


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setattr(user_code, "_folders", [])
    toys.train_on_one(monkeypatch)
    monkeypatch.setattr(loop.jax, "device_count", lambda: 1)


def test_a_run_keeps_its_own_code_and_is_read_with_it_anywhere(project, tmp_path, capsys):
    settings = configs.parse(str(project / "own.py"), ["--config.Mixer.depth=2"])[0]
    loop.train(settings, tmp_path / "run")
    kept = sorted(path.name for path in (tmp_path / "run" / "code").iterdir() if path.suffix)
    assert kept == ["my_late.py", "my_layers.py", "my_nets.py", "my_parts.py"]
    before = diffjax.load(tmp_path / "run")
    assert (before.denoiser.apply.module.depth, before.denoiser.apply.module.width) == (2, 8)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    drawn = tmp_path / "drawn.npy"
    script = (
        "import diffjax, jax, numpy as np, sys; model = diffjax.load(sys.argv[1]); "
        "np.save(sys.argv[2], model.sample(jax.random.key(0), prompt='picture 1'))"
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = os.environ | {"PYTHONPATH": os.path.dirname(os.path.dirname(diffjax.__file__)), "PYTHONSAFEPATH": "1"}
    shutil.rmtree(project)
    command = [sys.executable, "-c", script, tmp_path / "moved", drawn]
    subprocess.run(command, cwd=elsewhere, env=environment, check=True)
    assert np.isfinite(np.load(drawn)).all()
    assert json.loads((tmp_path / "moved" / "config.json").read_text())["network"] == "my_nets:Mixer"


def shift_of(run):
    user_code.look_in(run / "code")
    return user_code.find("my_nets:my_layers").SHIFT


def test_two_runs_in_one_process_have_each_their_own(project, tmp_path):
    for number in (1, 2):
        (project / "my_layers.py").write_text(LAYERS.replace("0.0", f"{number}.0"))
        settings = configs.parse(str(project / "own.py"), [])[0]
        user_code.keep(settings, tmp_path / f"run{number}")
    assert [shift_of(tmp_path / f"run{number}") for number in (1, 2, 1)] == [1.0, 2.0, 1.0]
    first = user_code.find("my_nets:Mixer")
    assert user_code.find("my_nets:Mixer") is first


def test_a_run_does_not_go_on_with_other_code(project, tmp_path):
    settings = configs.parse(str(project / "own.py"), [])[0]
    user_code.keep(settings, tmp_path / "run")
    user_code.keep(settings, tmp_path / "run")
    (project / "my_layers.py").write_text(LAYERS.replace("0.0", "1.0"))
    with pytest.raises(UserError, match="my_layers.py is not what .* was begun with"):
        user_code.keep(settings, tmp_path / "run")


@pytest.mark.parametrize(
    "file, text, said",
    [
        ("my_nets.py", None, "there is no module my_nets beside the config"),
        ("my_nets.py", "import nothing_like_it", "the module my_nets cannot be imported (ModuleNotFoundError"),
        ("my_nets.py", "def (", "the module my_nets cannot be imported (SyntaxError"),
        ("my_nets.py", "1 / 0", "the module my_nets cannot be imported (ZeroDivisionError"),
        ("my_nets.py", "class Mixr: pass", "my_nets.py Mixer: did you mean Mixr?"),
        (
            "my_parts.py",
            PARTS.replace("height", "hight"),
            "unknown config key loss.weight.height: did you mean loss.weight.hight?",
        ),
        ("my_parts.py", PARTS.replace("rate):", "rate, speed):"), "the config has no optimizer.speed: add it, a value"),
    ],
)
def test_what_is_wrong_with_it_is_one_line(project, file, text, said):
    (project / file).unlink() if text is None else (project / file).write_text(text)
    with pytest.raises(UserError) as error:
        configs.parse(str(project / "own.py"), [])
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_network_that_cannot_read_the_pictures_is_said_before_anything_is_written(project, tmp_path):
    (project / "my_nets.py").write_text(NETS.replace("nn.Dense(self.width)(pooled)", "pooled[:, :3]"))
    with pytest.raises(
        UserError, match="network my_nets:Mixer cannot be made for these pictures .*: change the fields of Mixer"
    ):
        loop.train(configs.parse(str(project / "own.py"), [])[0], tmp_path / "run")
    assert not (tmp_path / "run").exists()
