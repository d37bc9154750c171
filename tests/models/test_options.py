"""Options of sampling: what is made of their fields holds all of them, and says the same."""

import argparse
import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import toys

from diffjax import cli, fit_grid
from diffjax.evaluate.runs import measure
from diffjax.models import options
from diffjax.models.model import Defaults
from diffjax.models.options import Asked, Keywords, Method, Request
from diffjax.sampling import job
from diffjax.sampling.batches import Picture
from diffjax.sampling.folder import listed
from diffjax.utils.errors import UserError

WORDS = {
    "steps": ("3", 3),
    "sampler": ("ddim", "ddim"),
    "grid": ("karras", "karras"),
    "guidance": ("2.5", 2.5),
    "guide": ("apg momentum=-0.5 low=0.1", {"name": "apg", "momentum": -0.5, "low": 0.1}),
    "eta": ("0.5", 0.5),
    "num": ("2", 2),
    "batch": ("5", 5),
    "size": ("16x8", (8, 16)),
    "dtype": ("bfloat16", "bfloat16"),
    "revision": ("7", "7"),
    "variant": ("ema", "ema"),
    "quantize": ("int8", "int8"),
    "shard": ("fsdp", "fsdp"),
    "lora": ("a.safetensors", ("a.safetensors:1.0",)),
    "prompts": ("cat", ("cat",)),
    "negative_prompt": ("dog", "dog"),
    "labels": ("1", ("1",)),
    "image": ("a.png", "a.png"),
    "strength": ("0.25", 0.25),
    "mask": ("b.png", "b.png"),
    "feather": ("4", 4),
    "low_res": ("c.png", "c.png"),
    "level": ("0.1", 0.1),
    "seed": ("9", 9),
    "format": ("webdataset", "webdataset"),
    "per_file": ("20", 20),
    "two_passes": ("", True),
    "skip_layers": ("", True),
}
"""For every option what is typed, and what arrives; but for `INSTEAD`."""

INSTEAD = {"closed_form": None, "each_prompt": None, "each_label": None}
"""What is given in place of others."""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in that has a file of adapters, and what arrives of the options there."""
    monkeypatch.chdir(tmp_path)
    Path("a.safetensors").write_bytes(b"")
    placed = {name: str(tmp_path / WORDS[name][1]) for name in ("image", "mask", "low_res")}
    return {name: value for name, (_, value) in WORDS.items()} | placed | {"lora": (f"{tmp_path}/a.safetensors:1.0",)}


def flag(name):
    return f"--{ {'prompts': 'prompt', 'labels': 'label'}.get(name, name).replace('_', '-') }"


def test_every_option_is_asked_for_on_the_command_line(here):
    words = [word for name, (typed, _) in WORDS.items() for word in (flag(name), *typed.split())]
    args = cli.parse(["sample", "--model", "some/model", "--out", "x", *words])
    assert dataclasses.asdict(job.requested(args)) == {"model": "some/model", **INSTEAD, **here}


def test_files_say_what_each_picture_is_of(tmp_path):
    (tmp_path / "prompts.txt").write_text("red heart\n\npizza\nred heart\n")
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    files = ["--each-prompt", str(tmp_path / "prompts.txt"), "--each-label", str(tmp_path / "labels.txt")]
    command = ["sample", "--model", "some/model", "--out", "x", *files]
    request = job.requested(cli.parse(command))
    assert request.each == [("red heart", "cat"), ("pizza", "dog"), ("red heart", "cat")] and request.num == 3
    assert request.texts == ["red heart", "pizza"]
    assert [*listed(job.requested(cli.parse([*command, "--num", "4"])))] == [
        Picture(0, "red heart", "cat"),
        Picture(1, "pizza", "dog"),
        Picture(2, "red heart", "cat"),
        Picture(3, "red heart", "cat"),
    ]
    with pytest.raises(UserError, match="leave other prompts and labels out"):
        job.requested(cli.parse([*command, "--prompt", "cat"]))


def test_what_is_not_asked_for_is_the_model_s_own():
    args = cli.parse(["sample", "--model", "some/model", "--out", "x", "--num", "1"])
    assert job.requested(args) == Request("some/model")


def test_every_option_is_a_field_of_a_sampling_experiment(here, tmp_path):
    (tmp_path / "config.py").write_text(
        "from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({'model': 'some/model'})\n"
    )
    typed = {name: repr(value) if isinstance(value, tuple | dict) else value for name, value in here.items()}
    words = [f"--config.{name}={value}" for name, value in typed.items() if name != "guide"]
    args = cli.parse(["sample", "--config", "config.py", "--out", "x", *words])
    asked = dataclasses.asdict(job.requested(args))
    assert asked == {"model": "some/model", **INSTEAD, **here, "guide": None}


@pytest.mark.parametrize(("command", "of"), [("sample", Request), ("plan", Asked), ("evaluate", Method)])
def test_a_command_has_every_option_of_its_class_and_explains_it(command, of):
    actions = {action.dest: action for action in cli._parsers()[1][command]._actions}
    asked = {*options.names(of)} - {"closed_form"}  # a table, which only a config has
    assert asked <= actions.keys()
    assert all(actions[name].help for name in asked)


def test_the_keywords_are_the_fields_of_a_method():
    fields = {field.name: field.type for field in dataclasses.fields(Method)}
    assert fields == {name: kind.__forward_arg__ for name, kind in Keywords.__annotations__.items()}


def test_the_recipe_of_a_job_holds_every_option_and_its_pictures_the_method(tmp_path):
    model = toys.model(text=True).replace(name=str(tmp_path))
    request = job.completed(Request("x", prompts=("cat",)), model)
    recipe = job.recipe_of(request, model)
    assert set(options.names(Request)) <= recipe.keys()
    assert {name: recipe[name] for name in model.defaults.said()} == model.defaults.said()
    assert request == job.completed(request, model)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda model: model.sample(jax.random.key(0), stpes=3),
            "unknown argument of sample stpes: did you mean steps",
        ),
        (lambda model: model.sample(jax.random.key(0), promt="a"), "argument of sample promt: did you mean prompt"),
        (lambda model: model.recipe(samplr="ddim"), "unknown argument of recipe samplr: did you mean sampler"),
        (lambda model: model.recipe(strenth=0.5), "unknown argument of recipe strenth: did you mean strength"),
        (lambda model: measure("run", gidance=2.0), "unknown argument of measure gidance: did you mean guidance"),
    ],
)
def test_an_unknown_keyword_names_the_nearest(call, said):
    with pytest.raises(UserError, match=said):
        call(toys.model())


def test_a_method_wins_over_defaults_and_keywords_over_both():
    model = toys.model(sampler="ddim", steps=5)
    method = Method(steps=3)
    assert (len(model.recipe().grid), len(model.recipe(method).grid)) == (5, 3)
    assert len(model.recipe(method, steps=2).grid) == 2 and len(model.recipe(method, sampler="heun").grid) == 3


def test_the_own_guide_is_taken_only_with_guidance():
    own = Defaults(guidance=3.0, guide={"name": "apg"})
    assert own.but(Method()).guide == own.but(Method(guidance=2.0)).guide == {"name": "apg"}
    assert own.but(Method(guidance=0.0)).guide is own.but(Method(guidance=lambda denoise: denoise)).guide is None
    assert own.but(Method(guide="cfg")).guide == own.but(Method(guidance=0.0, guide="cfg")).guide == "cfg"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"steps": 0}, "--steps is 0: it must be at least 1"),
        ({"num": 0}, "--num is 0"),
        ({"eta": 1.5}, "--eta is 1.5: it must be a number from 0 to 1"),
        ({"guidance": -1.0}, "guidance is -1.0: give a scale above 1"),
        ({"guide": {"name": "abg"}}, "unknown guide abg: did you mean apg"),
    ],
)
@pytest.mark.parametrize("of", [Asked, lambda **asked: Request("x", **asked)], ids=["Asked", "Request"])
def test_what_cannot_be_is_refused_when_it_is_asked_for(of, asked, said):
    with pytest.raises(UserError, match=said):
        of(**asked)


def test_flags_can_be_changed_by_a_command():
    parser = argparse.ArgumentParser()
    options.add_flags(parser, Method, ("steps", "sampler"), sampler={"default": "unipc"})
    args = parser.parse_args(["--steps", "4"])
    assert options.given(Method, args) == {"steps": 4, "sampler": "unipc"} and not hasattr(args, "eta")


def test_a_grid_is_fitted_to_the_whole_method(monkeypatch):
    asked = []
    monkeypatch.setattr("diffjax.loading.load", lambda name, **_: toys.model(text=True))
    monkeypatch.setattr(cli.interrupt, "command", cli.contextlib.nullcontext)
    monkeypatch.setattr("diffjax.parallel.devices.start", lambda: None)

    def fit(model, method, **_):
        asked.append(method)
        raise UserError("enough")

    monkeypatch.setattr(fit_grid, "fit", fit)
    words = ["--steps", "4", "--guidance", "2", "--guide", "apg", "momentum=0.5"]
    assert cli.main(["fit-grid", "--model", "x", *words]) == 2
    guide = {"name": "apg", "momentum": 0.5}
    assert asked == [Method(steps=4, sampler="unipc", guidance=2.0, guide=guide)]


def test_options_import_nothing_slow():
    code = "import sys; from diffjax.models import options; sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
