"""docs/extend.md: its diffs apply to the package as it is, and what they add works."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

USE = """
import jax, jax.numpy as jnp, numpy as np
import diffjax
assert "{folder}" in diffjax.__file__
from diffjax.diffusion import analytic, guide, process; from diffjax import build, config, data
from diffjax.diffusion.denoise import Apply, Denoiser
from diffjax.models.model import Model
from diffjax.diffusion.predict import X0

settings = data.default_config()
settings.name, settings.size = "discs", 32
discs = data.load(settings)
assert len(discs) == 8 and ("red disc",) in discs.captions()

network = build.network({{"network": "mixer", "classes": 0, "mixer": {{"width": 16}}}})
params = network.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), jnp.zeros(1))["params"]
model = Model(Denoiser(process.Flow(), X0(), params, Apply(network)), (32, 32, 3))
drawn = model.sample(jax.random.key(0), num=1, steps=4, sampler="averaged")
assert drawn.shape == (1, 32, 32, 3) and np.isfinite(drawn).all()

from diffjax import cli
from diffjax.sampling import job
how = ["--model", "x", "--sampler", "averaged", "--clip", "0.1"]
request = job.requested(cli.parse(["sample", *how, "--out", "y"]))
model = model.replace(name="x")
recipe = job.recipe_of(job.completed(request, model), model)
assert request.clip == recipe["clip"] == 0.1
assert cli.parse(["plan", *how]).clip == cli.parse(["evaluate", "--run", "x", *how[2:]]).clip == 0.1
drawn = [model.sample(jax.random.key(0), steps=4, clip=clip) for clip in (None, 0.1)]
assert abs(drawn[0]).max() > 0.1 >= abs(drawn[1]).max()

mixture = analytic.Mixture(process.Flow(), jnp.zeros(2), jnp.asarray([[-1.0], [1.0]]), jnp.full((2, 1), 0.1))
sure, unsure = jnp.asarray([[0.0, -9.0]] * 3), jnp.zeros((3, 2))
x, cond = jnp.asarray([[-1.0], [0.0], [2.0]]), {{"cond": {{"logits": sure}}, "null": {{"logits": unsure}}}}
plain, told = guide.Cautious(mixture, 1.0)(x, 0.5, cond), mixture(x, 0.5, cond["cond"])
np.testing.assert_allclose(plain.x0, told.x0, rtol=1e-6)
assert not np.allclose(guide.Cautious(mixture, 4.0)(x, 0.5, cond).x0, told.x0)
"""


def test_diffs_apply_and_work(tmp_path):
    shutil.copytree(ROOT / "diffjax", tmp_path / "diffjax", ignore=shutil.ignore_patterns("__pycache__"))
    diffs = re.findall(r"```diff\n(.*?)```", (ROOT / "docs" / "extend.md").read_text(), re.DOTALL)
    assert len(diffs) == 5
    assert re.findall(r"\+\+\+ b/(\S+)", diffs[3]) == ["diffjax/models/model.py", "diffjax/models/options.py"]
    for diff in diffs:
        subprocess.run(["git", "apply", "-C1", "-"], input=diff, text=True, cwd=tmp_path, check=True)
    script = tmp_path / "use.py"
    script.write_text(USE.format(folder=tmp_path.name))
    subprocess.run([sys.executable, script], cwd=tmp_path, check=True, env=_environment(tmp_path))


def _environment(folder):
    return {**os.environ, "PYTHONPATH": str(folder), "DIFFJAX_HOME": str(folder / "home"), "XLA_FLAGS": ""}
