"""Models by their id, with the hub's own client against a hub on loopback: online, offline, cut off, refused."""

import concurrent.futures
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pytest
import served_hub
from huggingface_hub import constants

from diffjax import cli, weights
from diffjax.utils import files
from diffjax.utils.errors import UserError
from diffjax.weights import download, hub, lora, published

NAME = "someone/cats"
CLOSED = "http://127.0.0.1:9"  # the port of "discard", where nobody listens
WEIGHTS = np.random.default_rng(0).bytes(3_000_000)
FILES = {
    "README.md": b"# cats",
    "config.json": b'{"_class_name": "UNet2DModel"}',
    "diffusion_pytorch_model.safetensors": WEIGHTS,
    "diffusion_pytorch_model.bin": WEIGHTS[:-1],
    "diffusion_pytorch_model.fp16.safetensors": WEIGHTS[:1000],
    "flax_model.msgpack": b"flax",
    "onnx/model.onnx": b"onnx",
    "sample.png": b"png",
}
NEEDED = {"config.json", "diffusion_pytorch_model.safetensors"}
PATIENT = {"HF_HUB_ETAG_TIMEOUT": "60", "HF_HUB_DOWNLOAD_TIMEOUT": "60"}
"""For processes of their own, on machines that are busy with other tests."""


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFJAX_HOME", str(tmp_path / "home"))
    for name in (
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "http_proxy",
        "https_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(download, "PAUSE", 0.0)
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "home"
    huggingface_hub.close_session()


@pytest.fixture
def at(monkeypatch):
    """A function: let the client ask this address, as HF_ENDPOINT would."""

    def ask(url):
        huggingface_hub.close_session()
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")

    return ask


@pytest.fixture
def served(at):
    """A hub that is asked, with one model."""
    with served_hub.serve(served_hub.Hub()) as found:
        found.sha = found.add(NAME, FILES)
        at(found.url)
        yield found


@pytest.fixture
def offline(monkeypatch):
    """A function: as with HF_HUB_OFFLINE=1."""
    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def asked(served):
    """The requests, but for one by which the client tells how it is used."""
    return [(verb, path) for verb, path in served.asked if not path.startswith("/api/agent")]


def holds(folder, names=NEEDED, contents=FILES):
    """Whether these files, and no others, are in the folder."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
    return found == {name: contents[name] for name in names}


def test_online_again_and_offline(served, at, offline):
    folder, revision = hub.fetch(NAME)
    assert holds(folder) and revision == served.sha and files.home() in folder.parents
    assert served.downloaded() - {None} == NEEDED and not served.authorised_elsewhere
    served.forget()
    assert hub.fetch(NAME) == (folder, revision)
    assert asked(served) == [("GET", f"/api/models/{NAME}/revision/main")]
    at(CLOSED)
    with pytest.warns(
        UserWarning, match=f"the copy of {NAME} in the cache is used, commit {revision}, for .* could not"
    ):
        assert hub.fetch(NAME) == (folder, revision)
    offline()
    assert hub.fetch(NAME) == (folder, revision)


def test_environment_variables_in_a_process_of_its_own(served, home):
    fetch = f"from diffjax.weights import hub; print(hub.fetch({NAME!r}).revision)"
    env = os.environ | {"HF_ENDPOINT": served.url, "HF_HOME": str(home / "hf")} | PATIENT
    run = lambda **more: subprocess.run([sys.executable, "-c", fetch], env=env | more, capture_output=True, text=True)
    first = run()
    assert first.stdout.strip() == served.sha, first.stderr
    served.forget()
    assert run(HF_HUB_OFFLINE="1").stdout.strip() == served.sha and not served.asked


def test_offline_without_a_copy(served, offline):
    offline()
    with pytest.raises(
        UserError, match=f"{NAME} is not in .* and the hub is off .*; unset it once to download, or give a"
    ):
        hub.fetch(NAME)
    assert not asked(served)


def test_by_branch_tag_and_commit(served, offline):
    newer = {**FILES, "diffusion_pytorch_model.safetensors": WEIGHTS[::-1]}
    first, second = served.sha, served.add(NAME, newer, "main", "v2")
    served.repositories[NAME].refs |= {"v1": first, "pull/1": first}
    for revision, sha in {
        None: second,
        "v2": second,
        "v1": first,
        "pull/1": first,
        second: second,
        first[:8]: first,
    }.items():
        folder, found = hub.fetch(NAME, revision)
        assert found == sha and holds(folder, contents=newer if sha == second else FILES), revision
    assert served.sent["diffusion_pytorch_model.safetensors"] == 2 * len(WEIGHTS) and served.sent["config.json"] == 30
    served.forget()
    assert hub.fetch(NAME, first).revision == first and not asked(served)
    with pytest.raises(UserError, match="has no revision v9; leave --revision out"):
        hub.fetch(NAME, "v9")
    offline()
    for revision, sha in {None: second, "v2": second, "pull/1": first, first: first, second[:7]: second}.items():
        assert hub.fetch(NAME, revision).revision == sha
    with pytest.raises(UserError, match=f"{NAME} at v9 is not in .* and the hub is off"):
        hub.fetch(NAME, "v9")


def test_what_came_in_part_is_not_taken_for_whole(served, offline, monkeypatch):
    hub.fetch(NAME, patterns=("*.json",))
    served.cuts = [1000] + [0] * 9
    with pytest.raises(UserError, match="could not be downloaded .*run the same command again to go on"):
        hub.fetch(NAME)
    assert sum(served.sent.values()) < len(WEIGHTS)
    offline()
    with pytest.raises(UserError, match="in part: 1 of its files are missing, as diffusion_pytorch_model.safetensors"):
        hub.fetch(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    served.cuts = []
    assert holds(hub.fetch(NAME).folder)
    assert served.sent["diffusion_pytorch_model.safetensors"] == len(WEIGHTS) and served.sent["config.json"] == 30


def test_a_newer_commit_that_came_in_part_leaves_the_older_one(served, offline):
    hub.fetch(NAME)
    newer = {**FILES, "diffusion_pytorch_model.safetensors": WEIGHTS[::-1]}
    sha = served.add(NAME, newer)
    served.cuts = [1000] + [0] * 9
    with pytest.raises(UserError, match="run the same command again to go on"):
        hub.fetch(NAME)
    offline()
    assert hub.fetch(NAME).revision == served.sha and holds(hub.fetch(NAME).folder)
    with pytest.raises(UserError, match="in part|is not in"):
        hub.fetch(NAME, sha)


def test_a_connection_that_is_cut_now_and_then_is_taken_up_again(served):
    served.cuts = [10, 700_000, 0, 0, 1_000_000, 0, 3]
    assert holds(hub.fetch(NAME).folder)
    assert served.sent["diffusion_pytorch_model.safetensors"] + served.sent["config.json"] == len(WEIGHTS) + 30


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_process_that_is_stopped_half_way(served, home, how):
    served.cuts, served.stall = [2_000_000], threading.Event()
    script = f"""
        import signal
        from diffjax.weights import hub
        signal.signal(signal.SIGINT, signal.default_int_handler)
        hub.fetch({NAME!r})
    """
    env = os.environ | {"HF_ENDPOINT": served.url} | PATIENT
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], env=env, stderr=subprocess.PIPE, text=True
    )
    held = lambda: sum(path.stat().st_size for path in home.rglob("*.partial"))
    end = time.monotonic() + 60
    while held() < 1_900_000 and time.monotonic() < end and process.poll() is None:
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()[1]
    begin = time.monotonic()
    process.send_signal(how)
    served.stall.set()
    process.communicate(timeout=30)
    assert time.monotonic() - begin < 5 and held() > 1_900_000
    served.forget()
    served.cuts = []
    assert holds(hub.fetch(NAME).folder)
    assert served.sent["diffusion_pytorch_model.safetensors"] < 1_200_000


def test_gated(served, at, monkeypatch):
    served.repositories[NAME].token = "hf_right"
    with pytest.raises(UserError, match="wants its licence accepted: .*`hf auth login`, or set HF_TOKEN$"):
        hub.fetch(NAME)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match="wants its licence accepted"):
        hub.fetch(NAME)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert holds(hub.fetch(NAME).folder) and not served.authorised_elsewhere
    monkeypatch.delenv("HF_TOKEN")
    served.repositories[NAME].private = True
    with pytest.warns(UserWarning, match="in the cache is used.*private"):
        assert holds(hub.fetch(NAME).folder)


def test_files_by_their_names(served):
    served.add(
        "some/adapters",
        {"README.md": b"", "pytorch_lora_weights.safetensors": WEIGHTS[:9], "more.safetensors": b"more"},
    )
    patterns = ("pytorch_lora_weights.safetensors", "adapter_config.json")
    assert holds(hub.fetch("some/adapters", None, patterns).folder, patterns[:1], {patterns[0]: WEIGHTS[:9]})
    with pytest.raises(
        UserError, match="someone/cats has no file .*adapter_config.json; it holds README.md, config.json"
    ):
        hub.fetch(NAME, None, patterns)


def test_refused_without_a_word(served):
    served.busy = [403]
    with pytest.raises(UserError, match="does not let this login have .* accept its licence"):
        hub.fetch(NAME)


def test_a_token_that_is_none(served, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    served.expired.add("hf_expired")
    with pytest.raises(UserError, match="the hub does not know this token: log in anew"):
        hub.fetch(NAME)


NAMES = [("google/ddpm-cat-265", "did you mean google/ddpm-cat-256?"), ("no/one", "check the name")]


@pytest.mark.parametrize("name, told", NAMES)
def test_a_name_that_the_hub_does_not_know(served, name, told):
    with pytest.raises(UserError) as error:
        hub.fetch(name)
    assert f"no folder {name}, and the hub knows no model of that name" in str(error.value) and told in str(error.value)


def damaged(served, change):
    served.spoil = {"diffusion_pytorch_model.safetensors"}
    return "safetensors arrived damaged: run the same command again"


def hostile(served, change):
    served.add(NAME, {"../../../escaped.json": b"{}"})
    return "makes no sense: check HF_ENDPOINT"


def small_disk(served, change):
    change.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 9))
    return "needs 0.003 GB and .* has .*: free some space, or set DIFFJAX_HOME"


def a_portal(served, change):
    change.setattr(served_hub._Handler, "info", lambda self, *_: self.reply(200, b"<html>log in here</html>"))
    return r"could not be downloaded \(Expecting value"


def a_hub_that_hangs(served, change):
    change.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    change.setattr(served_hub._Handler, "info", lambda self, *_: time.sleep(1))
    return "could not be downloaded .*timed out"


def a_busy_hub(served, change):
    served.busy = [503]
    return r"could not be downloaded \(HTTP 503\): run the same command again"


def other_formats(served, change):
    kept = ("README.md", "config.json", "flax_model.msgpack", "onnx/model.onnx")
    served.add(NAME, {name: FILES[name] for name in kept} | {"cats-Q4.gguf": b"GGUF"})
    return (
        "cats holds no weights that diffjax reads .*cats-Q4.gguf is GGUF.* flax_model.msgpack is of Flax, "
        "model.onnx is an"
    )


def two_forms(served, change):
    served.add(NAME, FILES | {"diffusion_pytorch_model.ema.safetensors": b"", "diffusion_pytorch_model.ema.bin": b""})
    return "--variant diffusion_pytorch_model.safetensors or --variant ema$"


FAULTS = [damaged, hostile, small_disk, a_portal, a_hub_that_hangs, a_busy_hub, other_formats, two_forms]


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_the_hub_are_one_line_and_leave_nothing_behind(served, monkeypatch, fault):
    with monkeypatch.context() as change:
        told = fault(served, change)
        with pytest.raises(UserError, match=told) as error:
            hub.fetch(NAME)
        assert "\n" not in str(error.value) and error.value.__cause__ is None
    assert not list(files.home().rglob("escaped*")) and len(served.downloaded() - NEEDED) <= 1
    served.spoil = set()
    served.add(NAME, FILES)
    assert holds(hub.fetch(NAME).folder)


def test_a_disk_that_fills_up(served):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, hard))
    try:
        with pytest.raises(UserError, match="cannot write .*File too large; free some space, or set DIFFJAX_HOME"):
            hub.fetch(NAME)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert holds(hub.fetch(NAME).folder)
    assert served.sent["diffusion_pytorch_model.safetensors"] < 1.7 * len(WEIGHTS)


def test_many_at_once_download_once(served):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: hub.fetch(NAME), range(4)))
    assert len(folders) == 1 and served.sent["diffusion_pytorch_model.safetensors"] == len(WEIGHTS)


def test_a_cache_that_cannot_be_written_serves(served, monkeypatch):
    folder = hub.fetch(NAME).folder
    for note in ("refs", "listings"):
        shutil.rmtree(files.home() / "hub" / f"models--{NAME.replace('/', '--')}" / note)
    monkeypatch.setattr(files, "open_atomic", refuse)
    assert hub.fetch(NAME).folder == folder


def refuse(path):
    raise UserError(f"cannot write to {path}")


def test_a_cache_that_another_program_filled(served, offline):
    huggingface_hub.snapshot_download(NAME, cache_dir=files.home() / "hub", allow_patterns=sorted(NEEDED))
    offline()
    assert holds(hub.fetch(NAME).folder) and hub.fetch(NAME).revision == served.sha


def test_a_copy_of_which_only_the_commit_is_known(served, offline):
    options = {"cache_dir": files.home() / "hub", "allow_patterns": sorted(NEEDED)}
    huggingface_hub.snapshot_download(NAME, revision=served.sha, **options)
    offline()
    assert hub.fetch(NAME).revision == served.sha
    (files.home() / "hub" / "models--someone--cats" / "snapshots" / ("0" * 40)).mkdir()
    with pytest.raises(UserError, match="the hub is off"):
        hub.fetch(NAME)


def test_a_variant_alone_is_downloaded(served, offline):
    wanted = {"config.json", "diffusion_pytorch_model.fp16.safetensors"}
    assert holds(hub.fetch(NAME, variant="fp16").folder, wanted)
    with pytest.raises(UserError, match=f"unknown variant of {NAME} fp61: did you mean fp16"):
        hub.fetch(NAME, variant="fp61")
    offline()
    assert holds(hub.fetch(NAME, variant="fp16").folder, wanted)
    with pytest.raises(UserError, match="in part: 1 of its files"):
        hub.fetch(NAME)


@pytest.mark.parametrize(
    "address, proxy, told",
    [
        (CLOSED, None, "refused"),
        ("http://no-such-host.invalid", None, "not known|resol|No address"),
        ("http://no-such-host.invalid", CLOSED, "refused"),
        ("https://no-such-host.invalid", "socks9://nowhere", "proxy|Proxy"),
        ("nonsense", None, "protocol"),
    ],
)
def test_without_a_network(at, monkeypatch, capsys, address, proxy, told):
    if proxy:
        monkeypatch.setenv("http_proxy", proxy)
        monkeypatch.setenv("https_proxy", proxy)
    at(address)
    assert cli.main(["plan", "--model", "google/ddpm-cat-265"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "google/ddpm-cat-265 is no folder here and could not be downloaded (" in line
    assert line.endswith("did you mean google/ddpm-cat-256?")
    assert any(word in line for word in told.split("|"))


def test_a_run_that_is_not_there_is_no_hub_id(served, capsys, tmp_path):
    files.write_json(tmp_path / "mine" / "emoji64" / "run.json", {})
    absent = ["runs/emoji", "mine/emoji", "./emoji", str(tmp_path / "emoji"), "a/b/c", "~/no such folder", ""]
    for name in absent:
        with pytest.raises(UserError, match="there is no (run|folder)"):
            hub.fetch(name)
    with pytest.raises(UserError, match="or name one of mine/emoji64"):
        hub.fetch("mine/emoji")
    commands = [
        ["sample", "--model", "runs/emoji", "--out", "out"],
        ["sample", "--run", "emoji", "--out", "out"],
        ["sample", "--cascade", "emoji", "other", "--out", "out"],
        ["plan", "--model", "runs/emoji"],
        ["plan", "--run", "emoji"],
        ["fit-grid", "--run", "emoji", "--steps", "4"],
        ["fit-grid", "--model", "runs/emoji", "--steps", "4"],
        ["convert", "runs/emoji", "out"],
        ["evaluate", "--run", "emoji"],
    ]
    for command in commands:
        assert cli.main(command) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) <= 2 and "there is no run" in lines[-1] and "diffjax train" in lines[-1], command
    assert not asked(served)


def test_folders_never_ask_the_hub(served, tmp_path):
    (tmp_path / "google" / "ddpm-cat-256").mkdir(parents=True)
    assert hub.fetch("google/ddpm-cat-256") == (Path("google/ddpm-cat-256"), None)
    with pytest.raises(UserError, match="there is no folder"):
        hub.fetch("/no/folder")
    assert not asked(served)


def test_one_form_of_each_component_s_weights():
    pipeline = [
        "model_index.json",
        "sd3.5_large.safetensors",
        "text_encoders/clip_g.safetensors",
        "text_encoder/model.safetensors",
        "text_encoder/model.fp16.safetensors",
        "text_encoder_3/model-00001-of-00002.safetensors",
        "text_encoder_3/model-00002-of-00002.safetensors",
        "text_encoder_3/model.safetensors.index.json",
        "text_encoder_3/model.fp16-00001-of-00002.safetensors",
        "text_encoder_3/model.safetensors.index.fp16.json",
        "tokenizer/vocab.json",
        "tokenizer/spiece.model",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.bin",
        "checkpoint-500/unet/diffusion_pytorch_model.bin",
        "checkpoint-500/optimizer.bin",
    ]
    assert hub.needed(pipeline) == [
        "model_index.json",
        "text_encoder/model.safetensors",
        "text_encoder_3/model-00001-of-00002.safetensors",
        "text_encoder_3/model-00002-of-00002.safetensors",
        "text_encoder_3/model.safetensors.index.json",
        "tokenizer/spiece.model",
        "tokenizer/vocab.json",
        "unet/diffusion_pytorch_model.bin",
    ]
    assert hub.needed(["model.fp16.safetensors", "config.json"]) == ["config.json", "model.fp16.safetensors"]
    assert hub.needed(pipeline, ["tokenizer/*"]) == ["tokenizer/spiece.model", "tokenizer/vocab.json"]
    assert hub.needed(pipeline, ["sd3.5_large.safetensors"]) == ["sd3.5_large.safetensors"]
    assert hub.needed(pipeline, ["text_encoder*/*"], "fp16") == [
        "text_encoder/model.fp16.safetensors",
        "text_encoder_3/model.fp16-00001-of-00002.safetensors",
        "text_encoder_3/model.safetensors.index.fp16.json",
    ]


def test_packaged_configurations_ask_nobody_and_yield_to_what_is_there(served, offline):
    for name in published.FOLDERS:
        assert (hub.configs(name) / "config.json").is_file() or (hub.configs(name) / "model_index.json").is_file()
    offline()
    assert hub.configs("google/ddpm-cat-256") == published.folder("google/ddpm-cat-256")
    assert not asked(served)


def test_what_was_downloaded_goes_before_what_is_packaged(served, tmp_path):
    name = "google/ddpm-cat-256"
    served.add(name, FILES)
    folder = hub.fetch(name).folder
    served.forget()
    assert hub.configs(name) == folder and not asked(served)
    assert hub.configs(name, "main") == folder and asked(served)
    files.write_json(tmp_path / name / "config.json", {})
    assert hub.configs(name) == Path(name)


def test_every_packaged_file_is_in_the_wheel():
    import tomllib

    root, package = Path(hub.__file__).parents[2], Path(published.__file__).parent
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        published.__name__
    ]
    packed = {path for pattern in patterns for path in package.glob(pattern)}
    assert packed == {path for path in package.rglob("*.*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert {path.name for path in package.iterdir() if path.is_dir()} - {"__pycache__"} == set(
        published.FOLDERS.values()
    )
    for path in packed:
        assert path.name == "README.md" or isinstance(json.loads(path.read_text()), dict)


def test_a_model_of_the_hub_draws_as_its_folder_does(served, offline, at, tmp_path):
    from diffjax import loading
    from diffjax.nets.unet import UNet
    from diffjax.weights.scheduler import Scheduler

    module = UNet(
        sample_size=8, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        layers_per_block=1, norm_num_groups=4,
    )  # fmt: skip
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.01, np.float32), weights.shapes(module))
    weights.save_pipeline(tmp_path / "ddpm", module, params, Scheduler())
    paths = [path for path in (tmp_path / "ddpm").rglob("*") if path.is_file()]
    sha = served.add("some/ddpm", {str(path.relative_to(tmp_path / "ddpm")): path.read_bytes() for path in paths})
    draw = lambda model: np.asarray(model.sample(jax.random.key(0), num=2, steps=2))
    local, online = loading.load(tmp_path / "ddpm"), loading.load("some/ddpm")
    assert (online.name, online.revision) == ("some/ddpm", sha)
    np.testing.assert_array_equal(draw(online), draw(local))
    offline()
    few = ["--revision", "main", "--num", "1", "--steps", "2"]
    assert cli.main(["sample", "--model", "some/ddpm", *few, "--out", str(tmp_path / "out")]) == 0
    recipe = json.loads((tmp_path / "out" / "manifest.json").read_text())["recipe"]
    assert (recipe["model"], recipe["revision"], recipe["variant"]) == ("some/ddpm", sha, None)
    assert cli.main(["convert", "some/ddpm", str(tmp_path / "again"), "--revision", sha[:9]]) == 0
    np.testing.assert_array_equal(draw(loading.load(tmp_path / "again")), draw(local))


def test_adapters_come_by_their_repository_or_by_a_file_in_it(served, at, offline):
    usual = {"pytorch_lora_weights.safetensors": b"usual", "adapter_config.json": b"{}", "README.md": b"style"}
    served.add("someone/style", usual | {"other.safetensors": b"other", "checkpoint/other.safetensors": b"earlier"})
    served.add("someone/odd", {"odd.safetensors": b"odd"})
    given = {
        "someone/style:0.5": b"usual",
        "someone/style/other.safetensors": b"other",
        "someone/odd/odd.safetensors:-1": b"odd",
    }
    for turn in ("online", "offline"):
        for name, content in given.items():
            (source,) = lora.sources(name)
            assert source.file.read_bytes() == content and str(source) in (name, f"{name}:1.0", f"{name}.0"), turn
        with pytest.raises(UserError, match="someone/odd has no file missing.safetensors"):
            lora.sources("someone/odd/missing.safetensors")
        offline()
    assert served.sent["README.md"] == 0


def test_adapters_of_another_name_must_be_named(served):
    served.add("someone/odd", {"odd.safetensors": b"odd"})
    with pytest.raises(UserError, match="it holds odd.safetensors; name the file itself"):
        lora.sources("someone/odd")
