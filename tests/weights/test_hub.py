import types

import pytest
from diffjax import files
from diffjax.errors import UserError
from diffjax.weights.hub import fetch, needed

huggingface_hub = pytest.importorskip("huggingface_hub")
SHA = "0123456789abcdef0123456789abcdef01234567"
DDPM = ["README.md", "config.json", "diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors", "a.png"]


@pytest.fixture
def hub(monkeypatch):
    """A hub that holds one model and records what is asked of it."""
    asked = types.SimpleNamespace(downloads=[], error=None)

    def model_info(self, repo, revision=None):
        if asked.error:
            raise asked.error
        siblings = [types.SimpleNamespace(rfilename=name) for name in DDPM]
        return types.SimpleNamespace(sha=SHA, siblings=siblings)

    def snapshot_download(repo, **options):
        asked.downloads.append((repo, options))
        folder = options["cache_dir"] / "snapshots" / SHA
        if options.get("local_files_only") and not folder.exists():
            raise huggingface_hub.errors.LocalEntryNotFoundError("not cached")
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return asked


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFJAX_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def failure(kind, *message):
    return kind.__new__(kind, *message)


def test_downloads_only_what_is_needed_at_the_revision_it_resolved(hub):
    folder, revision = fetch("google/ddpm-cat-256", "main")
    assert revision == SHA and folder.name == SHA and files.home() in folder.parents
    ((repo, options),) = hub.downloads
    assert (repo, options["revision"]) == ("google/ddpm-cat-256", SHA)
    assert options["allow_patterns"] == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_folders_never_ask_the_hub(hub, tmp_path):
    (tmp_path / "google" / "ddpm-cat-256").mkdir(parents=True)
    assert fetch("google/ddpm-cat-256") == (fetch(tmp_path / "google/ddpm-cat-256").folder.relative_to(tmp_path), None)
    for absent in (tmp_path / "absent", "./absent", "../a/b", "a/b/c", "", "a b"):
        with pytest.raises(UserError, match="there is no folder"):
            fetch(absent)
    assert not hub.downloads


def test_offline_uses_the_cache_and_says_when_it_is_empty(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        fetch("google/ddpm-cat-256")
    hub.error = AssertionError("asked the hub")
    (files.home() / "hub" / "snapshots" / SHA).mkdir(parents=True)
    assert fetch("google/ddpm-cat-256").revision == SHA


def test_without_a_network_the_cache_serves(hub):
    hub.error = ConnectionError("no route")
    with pytest.raises(UserError, match=r"could not be downloaded \(no route\); run again"):
        fetch("google/ddpm-cat-256")
    (files.home() / "hub" / "snapshots" / SHA).mkdir(parents=True)
    assert fetch("google/ddpm-cat-256").revision == SHA


@pytest.mark.parametrize(
    "kind, told",
    [
        ("GatedRepoError", "licence .* `hf auth login`"),
        ("RepositoryNotFoundError", "knows no model"),
        ("RevisionNotFoundError", "no revision v9"),
    ],
)
def test_refusals_say_what_to_do(hub, kind, told):
    hub.error = failure(getattr(huggingface_hub.errors, kind), "refused")
    with pytest.raises(UserError, match=told):
        fetch("google/ddpm-cat-256", "v9")


def test_a_full_disk_is_no_network_trouble(hub):
    hub.error = OSError(28, "No space left on device")
    with pytest.raises(UserError, match="No space left on device; free some space"):
        fetch("google/ddpm-cat-256")


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
    assert needed(pipeline) == [
        "model_index.json",
        "text_encoder/model.safetensors",
        "text_encoder_3/model-00001-of-00002.safetensors",
        "text_encoder_3/model-00002-of-00002.safetensors",
        "text_encoder_3/model.safetensors.index.json",
        "tokenizer/spiece.model",
        "tokenizer/vocab.json",
        "unet/diffusion_pytorch_model.bin",
    ]
    assert needed(["model.fp16.safetensors", "config.json"]) == ["config.json", "model.fp16.safetensors"]
    assert needed(pipeline, ["tokenizer/*"]) == ["tokenizer/spiece.model", "tokenizer/vocab.json"]
