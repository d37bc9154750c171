"""Configs drawn at random: legal ones train, sample, convert and load again; illegal ones get one line.

By default some illegal ones; `--slow -s` draws 300 of each and prints the counts.
"""

import random

import jax
import numpy as np
import pytest
from PIL import Image

import diffjax
from diffjax import config as configs
from diffjax.convert import convert_model
from diffjax.evaluate import runs
from diffjax.train import loop
from diffjax.utils.errors import UserError

SIZE = 8
NETWORKS = {
    "dit": {"patch": 4, "width": 8, "depth": 1, "heads": 2, "hidden": 8, "rank": 2},
    "unet": {"block_out_channels": (8,), "norm_num_groups": 4, "layers_per_block": 1}
    | {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "attention_head_dim": 4},
    "imagen": {"dim": 8, "mults": (1,), "blocks": (1,), "attention": (False,), "cross_attention": (True,)}
    | {"heads": 2, "head_dim": 4, "groups": 4},
    "subpixel": {"patch": 4, "width": 8, "depth": 1, "groups": 4},
}
PROCESSES = [
    {"name": "flow"},
    {"name": "cosine"},
    {"name": "linear"},
    {"name": "exploding"},
    {"name": "flow", "shift": 2.0},
]
PROCESSES += [{"name": "discrete", "steps": 50}, {"name": "discrete", "betas": "squared_cosine", "steps": 20}]
WEIGHTS = ["plain", "x0", "velocity", "min_snr", "sigmoid", "edm", "p2"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for number in range(8):
        (folder / f"class {number % 2}").mkdir(exist_ok=True)
        path = folder / f"class {number % 2}" / f"{number}.png"
        Image.fromarray(draw.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(path)
        path.with_suffix(".txt").write_text(f"picture {number}")
    return folder


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    one, mesh = jax.devices()[:1], loop.devices.data_mesh
    monkeypatch.setattr(loop.devices, "data_mesh", lambda devices=one: mesh(devices))
    for name, found in {"device_count": 1, "local_device_count": 1, "local_devices": one}.items():
        monkeypatch.setattr(jax, name, lambda found=found: found)


def legal(number, pictures):
    """A small config that can be trained, drawn by its number."""
    draw = random.Random(number)
    network, kind = draw.choice(list(NETWORKS)), draw.choice(["text", "classes", "neither"])
    kind = "neither" if network == "subpixel" else kind
    process = dict(draw.choice(PROCESSES))
    table = process["name"] == "discrete"
    stage = network == "subpixel" or (network == "imagen" and draw.random() < 0.3)
    predictions = (
        ["eps", "x0", "v", "edm"] if process["name"] in ("exploding", "linear", "discrete") else ["x0", "v", "edm"]
    )
    predictions += ["flow"] if process["name"] in ("flow", "cosine") else []
    optimizer = draw.choice([{"name": "adamw"}, {"name": "muon", "momentum": 0.9}])
    return {
        "name": f"random{number}",
        "seed": draw.randrange(2**31),
        "data": {"name": "class_folder" if kind == "classes" else "captioned_folder", "path": str(pictures)}
        | {"size": SIZE, "flip": draw.random() < 0.5, "templates": draw.choice([("{}",), ("a {}", "{} and {}")])},
        "classes": 2 if kind == "classes" else 0,
        "text": {"name": "words", "tokens": 4, "width": 8, "heads": 2, "hidden": 8} if kind == "text" else None,
        "low_res": {"size": SIZE // 2} if stage else None,
        "process": process,
        "prediction": {"name": draw.choice(predictions)},
        "network": network,
        network: NETWORKS[network] | {"dtype": draw.choice(["auto", "float32", "bfloat16"])},
        "loss": {"weight": {"name": draw.choice(WEIGHTS)}}
        | {"times": {"name": draw.choice(["uniform", "logit_normal"] + ["table"] * table)}}
        | {"uniforms": draw.choice(["antithetic", "independent"]), "drop": draw.choice([0.1, 0.5])},
        "optimizer": optimizer
        | {"clip": draw.choice([0.0, 1.0]), "schedule": {"name": draw.choice(["linear", "cosine"]), "warmup": 0}},
        "train": {"steps": 2, "batch": 8, "log_every": 1}
        | {"accumulate": draw.choice([1, 2]), "ema": draw.choice([0.0, 0.9])},
        "sample": {"steps": 2, "num": 2, "sampler": draw.choice(["ddim", "ddpm", "dpmpp_2m", "heun", "unipc"])}
        | {"grid": draw.choice(["uniform", "logsnr", "karras"] + ["trailing"] * table)}
        | {"guidance": draw.choice([1.0, 2.0]), "clip": draw.choice([0.0, 1.0])}
        | {"prompts": draw.choice([(), ("picture 1",)])},
    }  # fmt: skip


def live(settings, folder):
    """Train, sample, convert, and load again."""
    run = folder / "run"
    loop.train(settings, run)
    model = diffjax.load(run)
    told = {"prompt": "picture 1"} if settings["text"] else {"label": 1} if settings["classes"] else {}
    if settings["low_res"]:
        told["low_res"] = np.zeros((1, SIZE // 2, SIZE // 2, 3), np.float32)
    images = model.sample(jax.random.key(0), num=1, **told)
    assert images.shape == (1, SIZE, SIZE, 3) and np.isfinite(images).all()
    published = settings["network"] == "unet" and settings["process"]["name"] == "discrete"
    published = published and settings["prediction"]["name"] in ("eps", "x0", "v") and not settings["text"]
    convert_model(str(run), folder / "out", "diffusers" if published else "orbax")
    if published:
        again = diffjax.load(folder / "out")
        one, other = (jax.tree.leaves(some.denoiser.params) for some in (model, again))
        assert sorted(float(np.abs(leaf).sum()) for leaf in one) == sorted(float(np.abs(leaf).sum()) for leaf in other)
    if settings["text"] or settings["low_res"]:
        runs.measure(run, num=2)


def count_legal(numbers, pictures, folder):
    lived = 0
    for number in numbers:
        settings = legal(number, pictures)
        try:
            live(settings, folder / str(number))
        except Exception as error:
            raise AssertionError(f"config {number}: {settings}") from error
        lived += 1
        jax.clear_caches()
    return lived


def places(settings, prefix=""):
    for name, value in settings.items():
        yield f"{prefix}{name}", value
        if isinstance(value, dict):
            yield from places(value, f"{prefix}{name}.")


def illegal(number, pictures):
    """A legal config with one mistake drawn by the number, and what was done to it."""
    draw = random.Random(-1 - number)
    settings = configs.complete(legal(number, pictures)).to_dict()
    path, value = draw.choice(
        [(path, value) for path, value in places(settings) if value is not None and path != "name"]
    )
    if path.startswith("data.") and isinstance(value, str) and path != "data.name":
        path, value = "data.size", settings["data"]["size"]
    wrong = [{"no such": 1}, [[]] if isinstance(value, str) else "no such"]
    wrong += [None] if isinstance(value, dict) and path not in ("text", "low_res") else []
    wrong += [float("nan"), float("inf")] if isinstance(value, float) else []
    wrong += [-1, 0.5] if type(value) is int and not path.startswith(settings["network"]) else []
    wrong += (
        ["no such"]
        if path.endswith("name")
        or path in ("network", "loss.uniforms", "sample.sampler", "sample.grid", "train.parallel", "train.shard")
        else []
    )
    wrong = draw.choice(wrong)
    table = settings
    for name in path.split(".")[:-1]:
        table = table[name]
    if isinstance(value, dict) and isinstance(wrong, dict):
        wrong = value | wrong
    table[path.rpartition(".")[2]] = wrong
    return settings, f"{path} = {wrong!r}"


def count_illegal(numbers, pictures, folder):
    told = 0
    for number in numbers:
        settings, what = illegal(number, pictures)
        with pytest.raises(UserError) as error:
            loop.train(settings, folder / str(number))
            pytest.fail(f"config {number} was trained with {what}")
        assert "\n" not in str(error.value) and not (folder / str(number) / "config.json").exists(), what
        told += 1
    return told


def test_a_few_illegal_configs_are_one_line(pictures, tmp_path):
    assert count_illegal(range(60), pictures, tmp_path) == 60


@pytest.mark.slow
def test_many_legal_configs_live(pictures, tmp_path):
    lived = count_legal(range(300), pictures, tmp_path)
    print(f"{lived} of 300 legal configs trained, drew, were converted and loaded again")


@pytest.mark.slow
def test_many_illegal_configs_are_one_line(pictures, tmp_path):
    print(f"{count_illegal(range(300), pictures, tmp_path)} of 300 illegal configs were refused in one line")
