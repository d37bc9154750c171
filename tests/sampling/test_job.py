import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import toys

from diffjax import build, cli, loading
from diffjax.parallel import devices
from diffjax.sampling import batches, job
from diffjax.sampling.folder import Background, Gallery, file_name, read_manifest, sheet_columns
from diffjax.sampling.job import Request
from diffjax.text.learned import CaptionTokenizer, Prompts, TextTransformer
from diffjax.text.reading import Reworded
from diffjax.utils import image
from diffjax.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("optimized")

TWO = ("red heart", "pizza")


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)


@pytest.fixture
def models(monkeypatch, tmp_path_factory):
    """Models that `generate` loads, by name."""
    texts, classes = toys.model(text=True, steps=11), toys.model(classes=("cat", "dog"))
    found = {"texts": texts, "classes": classes, "plain": toys.model()}
    folder = tmp_path_factory.mktemp("runs")

    def load(name, *_, **__):
        (folder / Path(name).name).mkdir(exist_ok=True)
        return found[Path(name).name].replace(name=str(folder / Path(name).name), revision="7")

    monkeypatch.setattr(loading, "load", load)
    return found


def pictures(folder):
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.png")}


def test_a_job_writes_pictures_a_sheet_and_a_manifest(models, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    job.generate(Request("texts", prompts=TWO, num=3, seed=5), out)
    names = [f"000_red-heart_{i:04d}.png" for i in range(3)] + [f"001_pizza_{i:04d}.png" for i in range(3)]
    assert sorted(path.name for path in out.iterdir()) == sorted([*names, "grid.png", "manifest.json"])
    expected = image.to_uint8(models["texts"].sample(jax.random.key(5), num=3, prompt="pizza"))
    found, text = image.read_png(out / names[4])
    assert (found == expected[1]).all()
    told = {"prompt": "pizza", "number": "1", "seed": "5", "sampler": "dpmpp_2m", "steps": "11", "guidance": "2.0"}
    assert told.items() <= text.items() and text["model"] == "texts" and text["revision"] == "7"
    manifest = read_manifest(out / "manifest.json")
    assert [entry["file"] for entry in manifest["images"]] == names and len(manifest["images"][0]["sha256"]) == 64
    assert manifest["recipe"]["batch"] == 4 and manifest["recipe"]["grid"] == "logsnr"
    assert {"packages", "device", "command", "time"} <= manifest["made_by"].keys()
    assert "6 images in" in capsys.readouterr().out


def test_a_manifest_replays_to_the_same_bytes(models, tmp_path, capsys):
    how = {"steps": 5, "sampler": "ddim", "eta": 0.4, "guidance": 3.0}
    request = Request("texts", prompts=TWO, num=2, negative_prompt="blue", **how)
    job.generate(request, tmp_path / "first")
    assert job.replay(tmp_path / "first" / "manifest.json", tmp_path / "second")
    assert pictures(tmp_path / "first") == pictures(tmp_path / "second")
    assert "4 of 4 images: the same" in capsys.readouterr().out


def test_a_manifest_from_before_an_option_was_known_is_replayed_and_gone_on_with(models, tmp_path, capsys):
    request = Request("texts", prompts=TWO, steps=5, sampler="ddim", guidance=3.0)
    job.generate(request, tmp_path / "first")
    path = tmp_path / "first" / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in ("two_passes", "feather", "variant", "lora", "level", "labels"):
        del manifest["recipe"][name]
    path.write_text(json.dumps(manifest))
    assert job.replay(path, tmp_path / "second")
    job.generate(request, tmp_path / "first")
    assert "has 2 images already" in capsys.readouterr().out
    with pytest.raises(UserError, match="two_passes is false there and true here"):
        job.generate(dataclasses.replace(request, two_passes=True), tmp_path / "first")


def test_a_replay_with_another_model_is_refused(models, tmp_path):
    job.generate(Request("texts", prompts=TWO), tmp_path / "first")
    models["texts"] = toys.model(text=True, steps=11, seed=1)
    with pytest.raises(UserError, match="checksum is .* there and .* here"):
        job.replay(tmp_path / "first" / "manifest.json", tmp_path / "second")
    assert not (tmp_path / "second").exists()


def test_a_replay_tells_which_pictures_differ(models, tmp_path, capsys):
    job.generate(Request("plain"), tmp_path / "first")
    manifest = json.loads((tmp_path / "first" / "manifest.json").read_text())
    manifest["images"][0]["sha256"] = "0"
    (tmp_path / "first" / "changed.json").write_text(json.dumps(manifest))
    assert not job.replay(tmp_path / "first" / "changed.json", tmp_path / "second")
    assert "0 of 1 image: the same, byte for byte; not 0000.png" in capsys.readouterr().out


def test_the_same_command_draws_what_is_missing_and_more(models, tmp_path, capsys):
    job.generate(Request("plain", num=6), tmp_path)
    before = pictures(tmp_path)
    (tmp_path / "0004.png").unlink()
    kept = (tmp_path / "0003.png").stat().st_mtime_ns
    job.generate(Request("plain", num=6), tmp_path)
    assert pictures(tmp_path) == before and (tmp_path / "0003.png").stat().st_mtime_ns == kept
    job.generate(Request("plain", num=6), tmp_path)
    assert "has 6 images already: nothing to draw" in capsys.readouterr().out
    job.generate(Request("plain", num=9), tmp_path)
    more = pictures(tmp_path)
    assert len(more) == 10 and all(more[f"{i:04d}.png"] == before[f"{i:04d}.png"] for i in range(6))


def test_another_recipe_is_refused_unless_it_may_overwrite(models, tmp_path):
    job.generate(Request("texts", prompts=TWO, steps=5), tmp_path)
    before = pictures(tmp_path)
    with pytest.raises(UserError, match=r"prompts is .*pizza.* there.* seed is 0 there and 1 here; steps is 5"):
        job.generate(Request("texts", prompts=("pizza",), seed=1, steps=6), tmp_path)
    assert pictures(tmp_path) == before
    job.generate(Request("texts", prompts=("pizza",), seed=1, steps=6), tmp_path, overwrite=True)
    assert sorted(pictures(tmp_path)) == ["000_pizza_0000.png", "grid.png"]


def test_other_peoples_pictures_are_not_overwritten(models, tmp_path):
    (tmp_path / "0000.png").write_text("mine")
    with pytest.raises(UserError, match="was not drawn by diffjax"):
        job.generate(Request("plain"), tmp_path)
    assert (tmp_path / "0000.png").read_text() == "mine"


class Killed(BaseException):
    pass


def kill_after(monkeypatch, steps):
    """The job dies when a batch has made so many steps."""
    take = job.Job.take

    def dying(self, stage):
        take(self, stage)
        if stage.done >= steps:
            raise Killed

    monkeypatch.setattr(job.Job, "take", dying)


def write_at_once(monkeypatch):
    monkeypatch.setattr(Background, "offer", lambda self, kind, function, *arguments: function(*arguments))


@pytest.mark.parametrize("sampler", ["dpmpp_2m_sde", "unipc"])
def test_a_killed_job_goes_on_to_the_same_bits(models, tmp_path, monkeypatch, sampler):
    request = Request("texts", prompts=TWO, num=3, sampler=sampler)
    job.generate(request, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 6)
        write_at_once(patch)
        job.generate(request, tmp_path / "killed", preview=2, save_seconds=0)
    assert list((tmp_path / "killed" / ".state").glob("*.npz")) and not pictures(tmp_path / "killed")
    assert (tmp_path / "killed" / "preview" / "000_red-heart_0000.png").exists()
    begun, take = [], job.Job.take
    noting = lambda self, stage: (begun.append(stage.done - stage.made), take(self, stage))
    monkeypatch.setattr(job.Job, "take", noting)
    job.generate(request, tmp_path / "killed")
    assert begun[0] == 6
    assert pictures(tmp_path / "killed") == pictures(tmp_path / "whole")
    assert not (tmp_path / "killed" / ".state").exists() and not (tmp_path / "killed" / "preview").exists()


def test_ctrl_c_keeps_the_state(models, tmp_path, monkeypatch):
    request = Request("texts", prompts=TWO, num=3)
    job.generate(request, tmp_path / "whole")
    take = job.Job.take

    def interrupted(self, stage):
        take(self, stage)
        if stage.done == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(job.Job, "take", interrupted)
        job.generate(request, tmp_path / "stopped")
    (state,) = (tmp_path / "stopped" / ".state").glob("*.npz")
    with np.load(state) as file:
        assert json.loads(str(file["about"]))["done"] == 2
    job.generate(request, tmp_path / "stopped")
    assert pictures(tmp_path / "stopped") == pictures(tmp_path / "whole")


def test_a_damaged_state_is_not_used(models, tmp_path, caplog):
    job.generate(Request("plain"), tmp_path / "whole")
    out = tmp_path / "out"
    gallery = job.generate(Request("plain"), out)
    (out / "0000.png").unlink()
    (out / ".state").mkdir()
    (out / ".state" / "0000.npz").write_bytes(b"PK damaged")
    job.generate(Request("plain"), out)
    assert "drawn from their first step" in caplog.text
    assert pictures(out) == pictures(tmp_path / "whole") and gallery.missing() == []


def test_previews_come_every_few_steps_and_go(models, tmp_path, monkeypatch):
    shown = []
    show = job.Job.show
    monkeypatch.setattr(job.Job, "show", lambda self, stage: (show(self, stage), shown.append(stage.done)))
    write_at_once(monkeypatch)
    job.generate(Request("texts", prompts=TWO), tmp_path, preview=4)
    assert shown == [4, 8]
    assert not (tmp_path / "preview").exists()
    shown.clear()
    job.generate(Request("texts", prompts=TWO, seed=1), tmp_path / "none", preview=0)
    assert shown == []


def test_previews_change_neither_pictures_nor_programs(models, tmp_path):
    request = Request("texts", prompts=TWO, num=3)
    job.generate(request, tmp_path / "without", preview=0)
    before = batches._advance._cache_size()
    job.generate(request, tmp_path / "with", preview=1)
    assert batches._advance._cache_size() == before
    assert pictures(tmp_path / "with") == pictures(tmp_path / "without")


def test_nothing_is_compiled_for_another_prompt_seed_guidance_eta_or_number(models, tmp_path, compilations):
    models["texts"] = toys.model(text=True, size=6)
    job.generate(Request("texts", prompts=("a",), sampler="ddim"), tmp_path / "first", preview=1)
    before = compilations()
    assert before > 0
    how = {"sampler": "ddim", "guidance": 4.0, "eta": 0.7}
    request = Request("texts", prompts=TWO, num=5, seed=8, negative_prompt="no", **how)
    job.generate(request, tmp_path / "second", preview=2)
    assert compilations() == before


def test_two_passes_of_guidance_show_the_network_half_the_rows(models, tmp_path, monkeypatch):
    rows, call = [], toys.Net.__call__
    monkeypatch.setattr(
        toys.Net, "__call__", lambda self, x, *told, **named: rows.append(len(x)) or call(self, x, *told, **named)
    )
    models["texts"] = toys.model(text=True, size=10)
    for two_passes, seen in ((False, {8}), (True, {4})):
        rows.clear()
        job.generate(Request("texts", prompts=("pizza",), two_passes=two_passes), tmp_path / str(two_passes), preview=0)
        assert set(rows) == seen
    once, twice = (image.read_png(tmp_path / name / "000_pizza_0000.png")[0].astype(int) for name in ("False", "True"))
    assert np.abs(once - twice).max() <= 1


def test_labels_and_pictures_of_nothing(models, tmp_path):
    job.generate(Request("classes", labels=("dog", "0"), num=2), tmp_path / "labels")
    expected = image.to_uint8(models["classes"].sample(jax.random.key(0), num=2, label="dog"))
    assert (image.read_png(tmp_path / "labels" / "000_dog_0001.png")[0] == expected[1]).all()
    job.generate(Request("plain", num=2, batch=2), tmp_path / "plain")
    assert sorted(pictures(tmp_path / "plain")) == ["0000.png", "0001.png", "grid.png"]


def test_a_picture_is_changed_where_the_mask_is_white(models, tmp_path):
    known = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    mask = np.zeros((8, 8, 1), np.uint8)
    mask[4:] = 255
    image.write_png(tmp_path / "known.png", known)
    image.write_png(tmp_path / "mask.png", mask)
    request = Request("plain", image=str(tmp_path / "known.png"), mask=str(tmp_path / "mask.png"))
    gallery = job.generate(request, tmp_path / "out")
    found, _ = image.read_png(tmp_path / "out" / "0000.png")
    assert (found[:4] == known[:4]).all() and (found[4:] != known[4:]).any()
    assert gallery.recipe["strength"] == 1.0 and gallery.recipe["files"].keys() == {"image", "mask"}
    weak = Request("plain", image=str(tmp_path / "known.png"))
    assert job.generate(weak, tmp_path / "weak").recipe["strength"] == 0.6


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"model": "plain", "steps": 0}, "--steps is 0"),
        ({"model": "plain", "num": 0}, "--num is 0"),
        ({"model": "plain", "batch": 0}, "--batch is 0"),
        ({"model": "plain", "seed": -1}, "--seed is -1"),
        ({"model": "plain", "strength": 0.5}, "give the picture with --image"),
        ({"model": "plain", "prompts": ("a cat",)}, "without text: leave the prompt out"),
        ({"model": "plain", "guidance": 2.0}, "leave the guidance out"),
        ({"model": "plain", "two_passes": True}, "--two-passes is about guidance"),
        ({"model": "plain", "image": "nowhere.png"}, "no picture that can be read"),
        ({"model": "plain", "sampler": "unipcc"}, "did you mean unipc"),
        ({"model": "plain", "grid": "kerras"}, "did you mean karras"),
        ({"model": "plain", "sampler": "unipc", "eta": 1.0}, "deterministic"),
        ({"model": "classes", "labels": ("cow",)}, "give one of cat, dog"),
        ({"model": "plain", "seed": 2**64}, "from 0 to 2\\^64 - 1"),
        ({"model": "texts", "labels": ("3",)}, "without classes"),
    ],
)
def test_bad_input_is_said_before_anything_is_written(models, tmp_path, asked, said):
    with pytest.raises(UserError, match=said):
        job.generate(Request(**asked), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_loses_nothing(models, tmp_path, monkeypatch):
    request = Request("plain", num=6)
    job.generate(request, tmp_path / "whole")
    replace = os.replace

    def full(source, target):
        if Path(target).name in ("0002.png", "0005.png"):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="0002.png: No space left on device; free some"):
        patch.setattr(os, "replace", full)
        job.generate(request, tmp_path / "full")
    assert "0001.png" in pictures(tmp_path / "full")
    job.generate(request, tmp_path / "full")
    assert pictures(tmp_path / "full") == pictures(tmp_path / "whole")


def test_a_manifest_that_is_none_is_said(tmp_path):
    (tmp_path / "other.json").write_text("[1]")
    (tmp_path / "broken.json").write_text("{")
    for name in ("missing.json", "other.json", "broken.json"):
        with pytest.raises(UserError, match="manifest"):
            job.replay(tmp_path / name, tmp_path / "out")


def test_names_say_what_they_are_of():
    assert file_name(3, ("Ein Löwe, schläft!", None), 12) == "003_ein-löwe-schläft_0012.png"
    assert file_name(0, (None, None), 2) == "0002.png"
    assert file_name(0, ("x/../../y", "cat"), 0) == "000_x-y-cat_0000.png"
    assert len(file_name(1, ("word " * 100, None), 0)) < 60


def test_the_sheet_is_about_square():
    assert [sheet_columns(*of) for of in ((1, 8), (1, 1), (64, 1), (8, 2), (3, 8))] == [3, 1, 8, 4, 8]


def test_the_sheet_of_many_pictures_shows_the_first(models, tmp_path, monkeypatch):
    from diffjax.sampling import folder

    monkeypatch.setattr(folder, "ON_SHEET", 4)
    job.generate(Request("plain", num=7), tmp_path)
    sheet, _ = image.read_png(tmp_path / "grid.png")
    assert sheet.shape == (2 * image.VISIBLE + image.GAP, 2 * image.VISIBLE + image.GAP, 3)


def test_a_gallery_reads_only_its_own_states(models, tmp_path):
    drawing = job.prepared(job.completed(Request("plain"), models["plain"]), models["plain"])
    part = drawing.parts([batches.Picture(0), batches.Picture(1)])[0]
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), drawing.blank(part))
    named = {batches.Picture(i): f"{i:04d}.png" for i in range(2)}
    gallery = Gallery(tmp_path, {}, named)
    gallery.save([part._replace(done=3, state=state)])
    (found,) = gallery.saved(drawing.blank)
    assert found.done == 3 and found.pictures == part.pictures
    assert jax.tree.structure(found.state) == jax.tree.structure(state)
    assert Gallery(tmp_path, {}, {batches.Picture(0): "0000.png"}).saved(drawing.blank) == []


def test_the_command_line(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(devices, "start", lambda: None)
    (tmp_path / "texts").mkdir()
    (tmp_path / "prompts.txt").write_text("red heart\n\n  pizza \n")
    run = ["sample", "--run", str(tmp_path / "texts"), "--prompt-file", str(tmp_path / "prompts.txt")]
    assert cli.main([*run, "--num", "2", "--guidance", "3", "--out", str(tmp_path / "out")]) == 0
    recipe = read_manifest(tmp_path / "out" / "manifest.json")["recipe"]
    assert (recipe["prompts"], recipe["num"], recipe["guidance"]) == (["red heart", "pizza"], 2, 3.0)
    again = ["sample", "--replay", str(tmp_path / "out" / "manifest.json"), "--out", str(tmp_path / "again")]
    assert cli.main(again) == 0
    assert pictures(tmp_path / "out") == pictures(tmp_path / "again")
    assert cli.main([*again, "--steps", "3", "--prompt", "a"]) == 2
    assert "--replay takes prompts, steps from the manifest: leave them out" in capsys.readouterr().err


def test_quality_fills_in_what_is_not_given(models, tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "start", lambda: None)
    (tmp_path / "plain").mkdir()
    run = ["sample", "--run", str(tmp_path / "plain"), "--num", "1", "--quality", "draft"]
    assert cli.main([*run, "--out", str(tmp_path / "draft")]) == 0
    assert cli.main([*run, "--steps", "3", "--sampler", "ddim", "--out", str(tmp_path / "own")]) == 0
    recipes = [read_manifest(tmp_path / name / "manifest.json")["recipe"] for name in ("draft", "own")]
    assert {name: recipes[0][name] for name in build.QUALITIES["draft"]} == build.QUALITIES["draft"]
    assert [recipes[1][name] for name in ("steps", "sampler", "grid")] == [3, "ddim", build.QUALITIES["draft"]["grid"]]


def test_a_sampling_experiment(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(devices, "start", lambda: None)
    experiment = Path(__file__).parents[2] / "experiments" / "ddpm_cat256.py"
    command = [
        "sample",
        "--config",
        str(experiment),
        "--config.model=plain",
        "--config.steps=2",
        "--out",
        str(tmp_path / "out"),
    ]
    assert cli.main(command) == 0
    recipe = read_manifest(tmp_path / "out" / "manifest.json")["recipe"]
    assert (recipe["num"], recipe["steps"], recipe["sampler"]) == (4, 2, build.QUALITIES["good"]["sampler"])
    assert cli.main([*command, "--seed", "1", "--num", "1", "--overwrite"]) == 0
    recipe = read_manifest(tmp_path / "out" / "manifest.json")["recipe"]
    assert (recipe["num"], recipe["steps"], recipe["seed"]) == (1, 2, 1)
    assert cli.main(["train", "--config", str(experiment), "--workdir", str(tmp_path / "run")]) == 2
    assert "has nothing to train" in capsys.readouterr().err
    trained = experiment.with_name("emoji.py")
    assert cli.main(["sample", "--config", str(trained), "--out", str(tmp_path / "out")]) == 2
    assert "names no published model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--run", "nowhere"], "there is no run nowhere: train one with"),
        (["--run", ".", "--prompt-file", "none.txt"], "cannot read none.txt: No such file"),
        (["--run", ".", "--prompt-file", "empty.txt"], "empty.txt is empty: write one prompt on a line"),
        (["--run", ".", "--prompt-file", "binary.txt"], "binary.txt is no text in UTF-8"),
        (["--run", ".", "--steps", "0"], "--steps is 0"),
        (["--run", ".", "--steps", "many"], "invalid int value"),
        (["--run", ".", "--preview", "-1"], "--preview is -1"),
        (["--run", ".", "--stepps", "3"], "did you mean --steps"),
        (["--run", ".", "--model", "x"], "not allowed with"),
        ([], "one of the arguments --run"),
    ],
)
def test_a_wrong_command_is_one_line(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe")
    assert cli.main(["sample", "--out", "out", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


SCRIPT = """
import sys, time
sys.path.insert(0, sys.argv[1])
import toys
from diffjax import loading
from diffjax.sampling import job
model = toys.model().replace(name="toy")
loading.load = lambda *_, **__: model
take = job.Job.take
job.Job.take = lambda self, stage: (take(self, stage), time.sleep(1))
job.generate(job.Request("toy", num=3, steps=40, sampler="dpmpp_2m_sde"), sys.argv[2], save_seconds=0)
"""


def test_kill_9_then_the_same_command(models, tmp_path, monkeypatch):
    command = [sys.executable, "-c", SCRIPT, str(Path(toys.__file__).parent), str(tmp_path / "killed")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    state = tmp_path / "killed" / ".state" / "0000.npz"
    while not state.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert state.exists() and not pictures(tmp_path / "killed")
    monkeypatch.setattr(loading, "load", lambda *_, **__: models["plain"].replace(name="toy"))
    for name in ("killed", "whole"):
        job.generate(Request("toy", num=3, steps=40, sampler="dpmpp_2m_sde"), tmp_path / name)
    assert pictures(tmp_path / "killed") == pictures(tmp_path / "whole")


@pytest.fixture
def reader(models):
    """A model that knows the words of three captions, as `models["texts"]`."""
    tokenizer = CaptionTokenizer.train(["red heart", "pizza", "rocket"], 4)
    text = TextTransformer(tokenizer.size, width=8, heads=2, hidden=8)
    params = text.init(jax.random.key(0), **tokenizer(["pizza"]))["params"]
    models["texts"] = models["texts"].replace(text=Prompts(params, text, tokenizer))
    return models["texts"]


def test_prompts_are_read_as_the_captions_say_and_the_manifest_holds_it(reader, tmp_path, capsys):
    with pytest.warns(Reworded, match='"hearts, red" is read as "red heart"') as said:
        job.generate(Request("texts", prompts=("a pizza!", "hearts, red", "rocket")), tmp_path / "free")
    assert [str(warning.message) for warning in said] == [
        '"a pizza!" is read as "pizza"',
        '"hearts, red" is read as "red heart"',
    ]
    job.generate(Request("texts", prompts=("pizza", "red heart", "rocket")), tmp_path / "plain")
    free, plain = (read_manifest(tmp_path / name / "manifest.json") for name in ("free", "plain"))
    assert free["recipe"]["read"] == {"a pizza!": "pizza", "hearts, red": "red heart"} and "read" not in plain["recipe"]
    for entry, other in zip(free["images"], plain["images"]):
        pixels, told = image.read_png(tmp_path / "free" / entry["file"])
        assert (pixels == image.read_png(tmp_path / "plain" / other["file"])[0]).all()
        assert told["prompt"] == entry["prompt"] and told.get("read") == free["recipe"]["read"].get(entry["prompt"])
    with pytest.warns(Reworded):
        assert job.replay(tmp_path / "free" / "manifest.json", tmp_path / "again")
        found = reader.sample(jax.random.key(0), num=2, prompt="a pizza!")
    assert (found == reader.sample(jax.random.key(0), num=2, prompt="pizza")).all()


@pytest.mark.parametrize(
    ("prompts", "said"), [(("pizza", "a zebra"), "no caption has a word of"), (("  ",), "a prompt is empty")]
)
def test_a_prompt_that_says_nothing_is_not_drawn(reader, tmp_path, prompts, said):
    with pytest.raises(UserError, match=said):
        job.generate(Request("texts", prompts=prompts), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    job.generate(Request("texts"), tmp_path / "out")
    with pytest.raises(UserError, match="no caption has a word"):
        reader.sample(jax.random.key(0), prompt="zebra")


def test_runs_and_what_they_drew_can_be_moved(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        loading, "load", lambda name, *_: models["plain"].replace(name=str(Path(name).resolve()), revision="7")
    )
    known = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    (tmp_path / "old" / "runs" / "mine").mkdir(parents=True)
    image.write_png(tmp_path / "old" / "known.png", known)
    request_of = lambda root: Request(str(root / "runs" / "mine"), image=str(root / "known.png"), strength=0.5, steps=2)
    job.generate(request_of(tmp_path / "old"), tmp_path / "old" / "out")
    recipe = read_manifest(tmp_path / "old" / "out" / "manifest.json")["recipe"]
    assert (recipe["model"], recipe["image"]) == ("../runs/mine", "../known.png")

    (tmp_path / "old").rename(tmp_path / "new")
    assert job.replay(tmp_path / "new" / "out" / "manifest.json", tmp_path / "again")
    job.generate(request_of(tmp_path / "new"), tmp_path / "new" / "out")
    assert "has 1 image already" in capsys.readouterr().out

    (tmp_path / "new" / "runs").rename(tmp_path / "runs")
    again = ["sample", "--replay", str(tmp_path / "new" / "out" / "manifest.json"), "--out", str(tmp_path / "third")]
    monkeypatch.setattr(devices, "start", lambda: None)
    assert cli.main(again) == 2
    assert f"{tmp_path / 'new' / 'runs' / 'mine'} is not there: say with --run or --model" in capsys.readouterr().err
    assert cli.main([*again, "--run", str(tmp_path / "runs" / "mine")]) == 0
    assert "1 of 1 image: the same, byte for byte" in capsys.readouterr().out
    models["plain"] = toys.model(seed=1)
    assert cli.main([*again[:-1], str(tmp_path / "other"), "--model", str(tmp_path / "runs" / "mine")]) == 2
    assert "checksum is" in capsys.readouterr().err


def test_a_manifest_from_when_places_were_absolute_is_replayed(models, tmp_path):
    job.generate(Request("plain", steps=2), tmp_path / "first")
    path = tmp_path / "first" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["recipe"]["model"] = str((tmp_path / "first" / manifest["recipe"]["model"]).resolve())
    path.write_text(json.dumps(manifest))
    assert job.replay(path, tmp_path / "second")
