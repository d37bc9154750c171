"""The plan of Stable Diffusion 3.5, from configurations alone, against published counts."""

import re

import jax.numpy as jnp
import pytest
import reference
import sd3_folder

from diffjax import cli, plan, weights
from diffjax.nets.clip import ClipText
from diffjax.nets.mmdit import MMDiT
from diffjax.nets.t5 import T5Encoder
from diffjax.nets.vae import AutoencoderKL
from diffjax.plan import latent, rates
from diffjax.utils import files
from diffjax.utils.errors import UserError
from diffjax.weights import clip, mmdit, single_file, t5, vae

CLIP_G = ClipText(
    hidden_size=1280,
    num_hidden_layers=32,
    num_attention_heads=20,
    intermediate_size=5120,
    projection_dim=1280,
    hidden_act="gelu",
)
COMPONENTS = {
    "text_encoder": (clip.FORMAT, ClipText()),
    "text_encoder_2": (clip.FORMAT, CLIP_G),
    "text_encoder_3": (t5.FORMAT, T5Encoder()),
    "transformer": (mmdit.FORMAT, MMDiT()),
    "vae": (vae.FORMAT, AutoencoderKL()),
}


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """SD3.5 large, its configurations only."""
    folder = tmp_path_factory.mktemp("large")
    for name, (kind, module) in COMPONENTS.items():
        files.write_json(folder / name / "config.json", kind.config(module))
    return folder


@pytest.fixture(scope="module")
def job(large):
    return plan.model(str(large), plan.Asked(steps=28, guidance=4.5))[0]


def test_operations_are_the_published_ones(job):
    figures = {part.name: plan.estimate(part) for part in job.parts}
    per_row = {name: figure.cost.flops / 2 for name, figure in figures.items()}
    assert per_row["transformer"] == pytest.approx(31.12e12, rel=1e-3)
    assert figures["transformer"].cost.times(28).flops == pytest.approx(1.743e15, rel=1e-3)
    assert per_row["text_encoder_3"] == pytest.approx(2.40e12, rel=5e-3)
    assert per_row["text_encoder"] == pytest.approx(13e9, rel=0.03) and per_row["text_encoder_2"] == pytest.approx(
        98e9, rel=0.01
    )
    doubling = 2 * 9 * (512**2 * (256**2 + 512**2) + 256**2 * 1024**2)
    assert figures["vae"].cost.flops + doubling * 5 / 9 == pytest.approx(10.47e12, rel=2e-3)
    assert figures["transformer"].parameters == 8_146_280_768 and figures["transformer"].held == 16_292_561_536
    assert figures["text_encoder_3"].parameters == 4_762_310_656 and figures["vae"].parameters == 83_819_683


def test_ways_need_ever_less_until_they_split(job):
    figures = {id(part): plan.estimate(part) for way in job.ways for stage in way.stages for part in stage}
    peaks = [plan.peak(way, figures, job.loop) for way in job.ways]
    together, texts_first, *_, int8, int4, two, four, eight = peaks
    texts, rest = 9.52e9 + 1.39e9 + 0.25e9, 16.29e9 + 0.17e9
    assert texts + rest < together < texts + rest + 3.5e9 and rest < texts_first < rest + 3.5e9
    assert rest - 8.0e9 < int8 < texts_first - 7.9e9 and rest - 11.8e9 < int4 < texts_first - 11.7e9
    assert texts_first > two >= four >= eight > texts


def test_choices(large):
    part = lambda **asked: latent.drawing(large, plan.Asked(**asked), "large").parts
    *_, transformer, decoder = part(num=5, batch=2, steps=3, sampler="heun", size=512)
    assert (transformer.calls, decoder.calls) == (18, 3)
    assert transformer.given[0].shape == (4, 64, 64, 16) and decoder.given[0].shape == (2, 64, 64, 16)
    assert transformer.held["params"]["pos_embed"].dtype == jnp.bfloat16


def test_a_component_that_is_missing_is_said(large, tmp_path):
    (tmp_path / "transformer").symlink_to(large / "transformer")
    with pytest.raises(UserError, match="text_encoder/config.json"):
        latent.drawing(tmp_path, plan.Asked(), "large")


def test_turbo_is_known_by_its_name(large):
    job = latent.drawing(large, plan.Asked(), "stable-diffusion-3.5-large-turbo")
    assert job.title.endswith("1 image of 1024 x 1024 pixels, 4 steps of euler")
    assert job.parts[3].given[0].shape == (1, 128, 128, 16) and job.parts[3].calls == 4


def test_without_t5(large, tmp_path):
    for name in ("text_encoder", "text_encoder_2", "transformer", "vae"):
        (tmp_path / name).symlink_to(large / name)
    job = latent.drawing(tmp_path, plan.Asked(), "large")
    assert [part.name for part in job.parts] == ["text_encoder", "text_encoder_2", "transformer", "vae"]
    assert not any("T5" in way.name for way in job.ways)


def test_a_single_file_is_planned_like_the_folder_it_came_from(tmp_path):
    sd3_folder.write(tmp_path, t5=False)
    module = sd3_folder.TRANSFORMERS["medium"]
    params = reference.params(mmdit.FORMAT, module, reference.checkpoint(mmdit.FORMAT, module))
    single_file.write_transformer(tmp_path / "one.safetensors", module, params)
    (job,) = plan.model(str(tmp_path / "one.safetensors"), plan.Asked(steps=2, size=16))
    weights.save(tmp_path / "transformer", module, params)
    (same,) = plan.model(str(tmp_path), plan.Asked(steps=2, size=16))
    figures = lambda job: [(part.name, part.parameters, plan.estimate(part).cost) for part in job.parts]
    assert figures(job) == figures(same)


def test_the_command(large, capsys):
    assert cli.main(["plan", "--model", str(large), "--size", "1024", "--steps", "28", "--device", "t4"]) == 0
    said = capsys.readouterr().out
    assert "1 image of 1024 x 1024 pixels, 28 steps" in said.replace("\n", " ")
    assert re.search(r"texts first +\d\d\.\d GB  too much", said)
    assert "what fits 12 GB: texts first, --quantize int8" in said
    assert all(len(line) <= 60 or "/" in line for line in said.splitlines())
    assert rates.NAMED["h100"].fused and not rates.NAMED["t4"].fused
