"""Configs: what a file leaves out, what the command line changes, and what every mistake is told."""

import ast
import json
import re
from pathlib import Path

import config_reference
import pytest

from diffjax import build, cli, config
from diffjax.config import ConfigDict, base, completion, kinds, listing, meanings
from diffjax.config.fields import arguments_of, locate, present
from diffjax.data import default_config
from diffjax.models import options
from diffjax.sampling import job
from diffjax.utils import processor
from diffjax.utils.errors import UserError

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
TRAINED = sorted(file for file in EXPERIMENTS.rglob("*.py") if "train" in config.load(str(file)))
EMOJI = str(EXPERIMENTS / "emoji.py")
FINETUNE = str(EXPERIMENTS / "sd35_finetune.py")


def parse(*overrides, spec=EMOJI):
    return config.parse(spec, [f"--config.{override}" for override in overrides])[0]


def fields(settings, prefix=""):
    """The path and the value of every field that is no table."""
    for name, value in settings.items():
        path = f"{prefix}{name}"
        if hasattr(value, "items"):
            yield from fields(value, f"{path}.")
        else:
            yield path, value


@pytest.mark.parametrize("file", TRAINED, ids=lambda file: file.stem)
def test_an_experiment_is_complete_and_stays_itself(file):
    loaded = config.load(str(file))
    whole = config.complete(loaded)
    found = dict(fields(whole))
    assert found == dict(fields(loaded))
    again = (
        config.complete(whole),
        config.parse(str(file), [])[0],
        config.complete(json.loads(whole.to_json_best_effort())),
    )
    assert all(other.to_dict() == whole.to_dict() for other in again)


@pytest.mark.parametrize("spec", [*map(str, TRAINED), f"{FINETUNE}:full"], ids=lambda spec: Path(spec).stem)
def test_an_experiment_says_only_what_differs_from_its_base(spec, monkeypatch):
    said = []
    monkeypatch.setattr(kinds, "_experiment", lambda base, own: said.append((base, own)) or ConfigDict())
    config.load(spec)
    ((base, own),) = said
    whole = config.complete(kinds._over(base, own))
    for path, _ in fields(own):
        if path.split(".")[-1] not in ("name", "size") and not path.startswith("imagen"):
            assert differs(kinds._over(base, without(own, path)), whole), f"{path} is said for nothing"


def differs(settings, whole):
    """Whether a config is another one when it is complete, or lacks something."""
    try:
        return config.complete(settings) != whole
    except UserError:
        return True


def without(table, path):
    """The table without the field at a path, and without tables that had no other."""
    name, _, inner = path.partition(".")
    left = without(table[name], inner) if inner else {}
    return {**table, name: left} if left else {other: value for other, value in table.items() if other != name}


@pytest.mark.parametrize("file", TRAINED, ids=lambda file: file.stem)
def test_every_field_can_be_overridden(file):
    whole = config.complete(config.load(str(file)))
    same = [f"--config.{path}={value}" for path, value in fields(whole)]
    found, rest = config.parse(str(file), same)
    assert (found.to_dict(), rest) == (whole.to_dict(), [])


@pytest.mark.parametrize(
    "overrides, path, expected",
    [
        (["loss.weight.name=plain"], "loss.weight", {"name": "plain"}),
        (["loss.weight.name=velocity"], "loss.weight", {"name": "velocity", "floor": 0.1}),
        (["loss.weight.name=min_snr"], "loss.weight", {"name": "min_snr", "gamma": 5.0}),
        (["loss.weight.gamma=3", "loss.weight.name=min_snr"], "loss.weight", {"name": "min_snr", "gamma": 3.0}),
        (["loss.weight={'name': 'p2', 'k': 2}"], "loss.weight", {"name": "p2", "gamma": 1.0, "k": 2.0}),
        (
            ["process.name=exploding", "process.sigma_max=9"],
            "process",
            {"name": "exploding", "shift": 1.0, "sigma_min": 0.01, "sigma_max": 9.0},
        ),
        (["optimizer.schedule.name=cosine"], "optimizer.schedule", {"name": "cosine", "warmup": 100, "final": 0.0}),
        (["data.flip=True"], "data.flip", True),
        (["data.templates=('a {}', '{}')"], "data.templates", ("a {}", "{}")),
        (["text=None"], "text", None),
        (["text.name=t5"], "text", {"name": "t5", "tokens": 6, "path": ""}),
        (["low_res.size=16"], "low_res", {"size": 16, "max_level": 0.3}),
        (["dit.scan=true"], "dit.scan", True),
        (["dit.depth=2", "network=dit"], "dit.depth", 2),
        (["unet.dropout=0.1", "network=unet"], "unet.dropout", 0.1),
        (["unet.attention_head_dim=8", "network=unet"], "unet.attention_head_dim", 8),
        (["sample.threshold=0.9"], "sample.threshold", 0.9),
        (["sample.guide.name=apg", "sample.guide.momentum=-0.5"], "sample.guide", {"name": "apg", "momentum": -0.5}),
    ],
)  # fmt: skip
def test_overrides_in_any_order(overrides, path, expected):
    for order in (overrides, overrides[::-1]):
        found = completion.at(parse(*order), path)
        assert (found.to_dict() if hasattr(found, "to_dict") else found) == expected


def test_another_optimizer_keeps_clip_and_schedule_alone():
    found = parse("optimizer.b1=0.8", "optimizer.name=adamw").optimizer
    assert (found.b1, found.b2, found.learning_rate, found.weight_decay) == (0.8, 0.99, 1e-3, 0.01)
    assert found.clip == 1.0 and found.schedule.final == 0.02 and "adam_learning_rate" not in found
    build.optimizer(found, 10)


def test_what_neither_an_experiment_nor_its_base_says_is_asked_for(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from diffjax.config.kinds import pixels\n"
        "def get_config(): return pixels(name='mine', data={'name': 'openmoji'}, train={'batch': 8})"
    )
    with pytest.raises(UserError, match="the config has no train.steps: add it, a whole number"):
        parse(spec=str(file))
    assert parse("train.steps=3", spec=str(file)).train.steps == 3


def test_a_table_without_a_name_is_of_the_default():
    whole = config.load(EMOJI).to_dict()
    found = config.complete(whole | {"text": {"tokens": 7}, "optimizer": {"name": "adamw", "schedule": {"warmup": 3}}})
    assert (found.text.name, found.text.tokens, found.text.width) == ("words", 7, 256)
    assert found.optimizer.schedule.to_dict() == {"name": "linear", "warmup": 3, "hold": 0.5, "final": 0.0}
    with pytest.raises(UserError, match="config key optimizer is .*: it must be a table with a name"):
        config.complete(whole | {"optimizer": {"learning_rate": 0.1}})


def test_tables_that_can_be_none_come_and_go():
    assert parse("lora=None", spec=FINETUNE).lora is None
    assert parse("lora.rank=4", spec=f"{FINETUNE}:full").lora.to_dict() == {
        "rank": 4,
        "alpha": 16.0,
        "targets": "/attn2?/",
    }
    without = str(EXPERIMENTS / "cifar10.py")
    assert (
        parse("text.tokens=7", spec=without).text.to_dict() | {"tokens": 7, "name": "words"}
        == parse("text.name=words", "text.tokens=7", spec=without).text.to_dict()
    )


def test_all_that_can_be_asked_of_a_sampling_experiment_can_be_overridden():
    arguments = ["--config.guidance=2.5", "--config.prompts=('a', 'b')", "--config.size=64", "--config.two_passes=True"]
    settings, _ = config.parse(
        str(EXPERIMENTS / "ddpm_cat256.py"), arguments, lambda: options.defaults(options.Request)
    )
    request = job.configured(settings)
    assert (request.guidance, request.prompts, request.size, request.two_passes) == (2.5, ("a", "b"), 64, True)
    assert (request.steps, request.eta) == (25, None)


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["text=None", "text.tokens=3"], "unknown config key text.tokens"),
        (["data=None"], "config key data is a table, not None"),
        (
            ["optimizer=adamw"],
            "config key optimizer is a table, not adamw: give its fields, such as --config.optimizer.name=",
        ),
        (["optimizer.name=adam"], "unknown optimizer.name adam: did you mean adamw?"),
        (["optimizer.name=adamw", "optimizer.momentum=0.9"], "unknown config key optimizer.momentum"),
        (["dit.dtype=bf16"], "unknown dit.dtype bf16: did you mean bfloat16?"),
        (["low_res.max_level=0.2"], "the config has no low_res.size: add it, a whole number"),
        (["train.ema=1"], "train.ema is 1: it must be at least 0 and below 1"),
        (["optimizer.clip=-1"], "optimizer.clip is -1: it must be at least 0"),
        (["optimizer.learning_rate=nan"], "optimizer.learning_rate is nan: it must be above 0"),
        (["loss.times.mean=inf"], "loss.times.mean is inf: it must be a finite number"),
        (["sample.num=0"], "sample.num is 0: it must be at least 1"),
        (["sample.prompts=a cat"], "config key sample.prompts takes a list such as"),
    ],
)
def test_wrong_overrides_name_field_and_remedy(overrides, said):
    with pytest.raises(UserError) as error:
        parse(*overrides)
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


def test_a_field_is_read_by_its_earlier_name():
    whole = config.complete(config.load("experiments/minimagen/super256.py"))
    earlier = whole.to_dict() | {"low_res": {"size": 64, "most": 0.5}}
    assert config.complete(earlier) == whole
    assert kinds.imagen(low_res={"size": 64, "most": 0.5}).low_res == whole.low_res


@pytest.mark.parametrize("file", TRAINED, ids=lambda file: file.stem)
def test_a_mistake_in_any_field_of_a_file_is_told_by_its_name(file):
    whole = config.complete(config.load(str(file))).to_dict()
    for path, value in fields(whole):
        if value is None:
            continue
        for wrong in ({"x": 1}, [object()] if isinstance(value, str) else "wrong", None):
            if (isinstance(value, str) and wrong is None) or (wrong == "wrong" and path.endswith("name")):
                continue
            broken = config.complete(whole).to_dict()
            table = broken
            for name in path.split(".")[:-1]:
                table = table[name]
            table[path.rpartition(".")[2]] = wrong
            if wrong is None and locate(base.table(whole), path) not in (str, int, float):
                continue
            with pytest.raises(UserError, match=path.rpartition(".name")[0] or path):
                config.complete(broken)


@pytest.mark.parametrize(
    "path", ["name", "data", "process", "loss.times", "optimizer", "network", "train.steps", "train.batch"]
)
def test_a_missing_field_is_named(path):
    settings = config.load(EMOJI).to_dict()
    table = settings
    for name in path.split(".")[:-1]:
        table = table[name]
    del table[path.rpartition(".")[2]]
    if path == "data":
        assert config.complete(settings).to_dict() == settings  # `train` says what an experiment needs
        return
    with pytest.raises(UserError, match=f"the config has no {path}: add it, "):
        config.complete(settings)


def test_auto_is_settled_said_and_kept(tmp_path, monkeypatch, capsys):
    settings = parse("dit.dtype=auto", "text.dtype=auto")
    monkeypatch.setattr(processor, "flags", lambda: frozenset({"avx512_bf16"}))
    begun = config.settle(settings, tmp_path)
    assert begun.dit.dtype == begun.text.dtype == "bfloat16" and begun.dit.param_dtype == "float32"
    assert "dit.dtype is bfloat16: this CPU has avx512_bf16\n" in capsys.readouterr().out
    (tmp_path / "config.json").write_text(begun.to_json_best_effort())
    monkeypatch.setattr(processor, "flags", frozenset)
    assert config.settle(settings, tmp_path) == begun
    assert "dit.dtype is bfloat16: as the run was begun\n" in capsys.readouterr().out
    assert config.settle(settings, tmp_path / "another").dit.dtype == "float32"
    assert "has none of amx_bf16, avx512_bf16, bf16\n" in capsys.readouterr().out


def read_back(lines):
    """The fields that printed lines say, and those among them that are marked."""
    said, marked = {}, {}
    for line in lines:
        for statement in ast.parse(line).body:
            path, value = ast.unparse(statement.targets[0]), ast.literal_eval(statement.value)
            said[path] = value
            if "  # * " in line:
                marked[path] = value
    return said, marked


def nested(flat):
    whole = {}
    for path, value in flat.items():
        *above, name = path.split(".")
        table = whole
        for key in above:
            table = table.setdefault(key, {})
        table[name] = value
    return whole


SHOWN = [
    *((str(file), ()) for file in TRAINED),
    (f"{FINETUNE}:full", ("prior.weight=1", "init_from.run=runs/one")),
    (str(EXPERIMENTS / "cifar10.py"), ("network=unet", "optimizer.name=adamw", "optimizer.schedule.name=cosine")),
    (EMOJI, ("sample.guide.name=apg", "sample.guide.momentum=-0.5", "process.name=discrete", "text.name=t5")),
]


@pytest.mark.parametrize("spec, overrides", SHOWN, ids=lambda part: Path(str(part)).stem)
def test_a_config_is_printed_whole_and_what_is_marked_makes_it_again(spec, overrides):
    whole = parse(*overrides, spec=spec)
    lines = list(listing.lines(whole, options.Request))
    said, marked = read_back(lines)
    assert said == dict(fields(whole))
    assert config.complete(nested(marked)) == whole.unlock()
    assert all(line.startswith(("#", "\n#")) or line.partition("  # ")[2][2:] for line in lines), "each has a meaning"
    for line in lines:
        if "  # * " in line and "= None" not in line.partition("  # * ")[2]:  # whose table the base does not have
            assert differs(without(nested(marked), line.partition(" = ")[0]), whole), line


def test_every_argument_of_every_choice_has_a_meaning_and_no_other():
    choices = {"process": base.NEW, "prediction": base.NEW, "text": base.NEW, "optimizer": base.LAST}
    found = [present(table[name]) for name, table in choices.items()]
    found += [base.LAST["optimizer"].common["schedule"], *map(base.LAST["loss"].fields.get, ("weight", "times"))]
    for choice in found:
        for name, maker in choice.makers.items():
            known = choice.arguments.get(name, {})
            assert set(known) == set(arguments_of(maker, name, known, choice.given).fields), name
    for name in build.NETWORKS:
        assert set(base.network(name).fields) == set(meanings.NETWORKS[name]), name
        assert base.network(name).meaning == meanings.ABOUT[name]
    assert list(base.DATA) == list(base.data().fields) and set(base.DATA) == set(default_config())


def test_fields_of_ones_own_are_printed_by_the_name_of_what_they_are_of(tmp_path):
    (tmp_path / "own_shown.py").write_text(
        "import jax.numpy as jnp\n"
        "def level(height, width=2): return None\n"
        "def net(depth=3, dtype=jnp.bfloat16): return None\n"
        "def any_net(**fields): return None\n"
    )
    (tmp_path / "mine.py").write_text(
        "from diffjax.config.kinds import pixels\n"
        "def get_config(network='net'): return pixels(name='mine', data={'name': 'openmoji'},"
        "    network=f'own_shown:{network}',"
        "    loss={'weight': {'name': 'own_shown:level', 'height': 1.5}}, train={'steps': 1, 'batch': 1},"
        "    **({'any_net': {'deep': 1}} if network == 'any_net' else {}))"
    )
    lines = list(listing.lines(parse(spec=str(tmp_path / "mine.py")), options.Request))
    shown = {line.partition(" = ")[0]: line.partition("  # ")[2] for line in lines}
    assert shown["loss.weight.height"] == "* an argument of own_shown:level"
    assert shown["net.depth"] == "  an argument of own_shown:net"
    assert shown["net.dtype"] == "  a dtype of own_shown:net; one of float32, bfloat16, float16, auto"
    said, _ = read_back(listing.lines(parse(spec=f"{tmp_path / 'mine.py'}:any_net"), options.Request))
    assert said["any_net.deep"] == 1


def test_what_only_samples_is_printed_and_what_is_no_experiment_is_told(capsys, tmp_path):
    spec = str(EXPERIMENTS / "ddpm_cat256.py")
    assert cli.main(["config", "--config", spec, "--config.size=64"]) == 0
    said, marked = read_back(capsys.readouterr().out.splitlines())
    assert set(said) == set(options.names(options.Request)) and marked["size"] == 64 and "eta" not in marked
    (tmp_path / "mine.py").write_text("def get_config(which): return {word: {} for word in which.split('_')}")
    for which, told in {
        "train": "the config has no data: begin with one of the experiments",
        "data": "the config has no train, nor a model to draw with: begin with one of the experiments",
        "model_prompt": "unknown config key prompt: did you mean prompts?",
    }.items():
        assert cli.main(["config", "--config", f"{tmp_path / 'mine.py'}:{which}"]) == 2
        assert told in capsys.readouterr().err


def test_the_config_of_a_run_is_printed(tmp_path, capsys):
    (tmp_path / "config.json").write_text(parse("train.steps=7").to_json_best_effort())
    assert cli.main(["config", "--run", str(tmp_path)]) == 0
    said, marked = read_back(capsys.readouterr().out.splitlines())
    assert said == dict(fields(parse("train.steps=7"))) and marked["train.steps"] == 7
    assert cli.main(["config", "--run", str(tmp_path / "none")]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_the_page_is_what_the_base_says_and_its_commands_are_read(tmp_path):
    page = config_reference.PAGE.read_text(encoding="utf-8")
    assert page == config_reference.page(page), "run: python scripts/config_reference.py"
    for path, _ in fields(config.load(EMOJI)):
        assert f"`{path}`" in page
    (example, *_) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "mine.py").write_text(example)
    assert parse(spec=str(tmp_path / "mine.py")).data.path == "pictures"
    commands = [line.split() for line in page.splitlines() if line.startswith("    diffjax train")]
    overrides = [[word for word in words if word.startswith("--config.")] for words in commands]
    found = [config.parse(EMOJI, words)[0] for words in overrides]
    assert (found[0].train.steps, found[0].data.flip) == (1000, True)
    assert found[1].optimizer.name == "adamw" and found[2].text is None
    assert found[2].loss.weight.to_dict() == {"name": "plain"}
