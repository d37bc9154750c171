"""However an experiment is made, and whatever its network is conditioned on, it is the same one."""

import gc
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_encoder
import toys
from PIL import Image

from diffjax import config as configs, data
from diffjax.train import record
from diffjax.train.experiment import Experiment
from diffjax.utils.errors import UserError

TOY = Path(toys.__file__).with_name("toy_experiment.py")
SUPER = Path(__file__).parents[2] / "experiments" / "minimagen" / "emoji_tiny_super64.py"
WORDS = {"name": "words", "tokens": 6, "width": 8, "depth": 1, "heads": 2, "hidden": 8}
KINDS = ("nothing", "class", "words", "frozen", "low-res")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight pictures of two classes with captions, and a frozen text encoder."""
    folder, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(8):
        path = folder / "pictures" / ("cat", "heart")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
        path.with_suffix(".txt").write_text(f"a red {path.parent.name}")
    (folder / "encoder").mkdir()
    tiny_encoder.write(folder / "encoder")
    return folder


@pytest.fixture(autouse=True)
def own_home(folder, monkeypatch):
    monkeypatch.setenv("DIFFJAX_HOME", str(folder / "home"))


def settings(kind, folder):
    """A config, conditioned on something or on nothing."""
    config = configs.load(str(SUPER if kind == "low-res" else TOY))
    config.data.update(name="captioned_folder", path=str(folder / "pictures"), size=16)
    if kind == "class":
        config.data.name, config.classes = "class_folder", 2
    elif kind == "words":
        config.text = WORDS
    elif kind == "frozen":
        config.text = {"name": "minilm", "path": str(folder / "encoder"), "tokens": 6}
    elif kind == "low-res":
        config.low_res.size = 8
    config.sample.prompts = ("a cat",)
    config.train.batch = 4
    return configs.complete(config)


def shapes(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, np.dtype(leaf.dtype)), tree)


@pytest.mark.parametrize("kind", KINDS)
def test_begun_recalled_and_before_its_data(kind, folder, tmp_path):
    config = settings(kind, folder)
    with record.claim(tmp_path, config):
        begun = Experiment.begin(config, tmp_path, data.load(config.data))
    before = Experiment.before_data(config, begun.tokenize if begun.text else None)
    made = (begun, Experiment.recall(tmp_path), before)
    batches = begun.batches((0, 1))
    batch = {name: np.asarray(rows) for name, rows in next(batches).items()}
    batches.close()
    params = [shapes(jax.eval_shape(each.init, jax.random.key(0))) for each in made]
    assert params[0] == params[1] == params[2]
    for each in made:
        assert shapes(each.batch_shapes(4)) == shapes({name: batch[name] for name in begun.reads})
        assert (each.shape, len(each.classes), each.defaults()) == (begun.shape, len(begun.classes), begun.defaults())


@pytest.mark.parametrize("kind", KINDS)
def test_a_recalled_experiment_has_the_very_parameters(kind, folder, tmp_path):
    config = settings(kind, folder)
    with record.claim(tmp_path, config):
        begun = Experiment.begin(config, tmp_path, data.load(config.data))
    recalled = Experiment.recall(tmp_path)
    assert recalled.data is None and recalled.classes == begun.classes
    jax.tree.map(np.testing.assert_array_equal, recalled.seen._asdict(), begun.seen._asdict())
    params = [each.init(jax.random.key(3)) for each in (begun, recalled)]
    assert jax.tree.all(jax.tree.map(np.array_equal, *params))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_rehearsed(kind, folder):
    config = settings(kind, folder)
    Experiment.before_data(config).rehearse()
    config.sample.grid = "leading"
    with pytest.raises(UserError, match="counts the steps of a table"):
        Experiment.before_data(config).rehearse()


def test_what_does_not_fit_is_one_line_and_leaves_the_garbage_collector_on(folder):
    with pytest.raises(UserError, match="do not go together .ValueError: no such shape.: change one"):
        with Experiment.before_data(settings("nothing", folder)).fitting():
            assert not gc.isenabled()
            raise ValueError("no such shape")
    assert gc.isenabled()


def test_an_experiment_of_no_run_is_not_recalled(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        Experiment.recall(tmp_path)
