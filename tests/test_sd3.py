"""Stable Diffusion 3.5 as a model: the whole pipeline, against diffusers' own on the same folders."""

import functools

import jax
import numpy as np
import pytest
import sd3_folder

import diffjax
from diffjax.errors import UserError

PROMPTS, NEGATIVE = ["a cat in a hat", "it is 12 o'clock"], "the mat"
CASES = {"large": ("large", True), "medium": ("medium", True), "no_t5": ("large", False)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return functools.cache(lambda name: sd3_folder.write(tmp_path_factory.mktemp(name), *CASES[name]))


def latents():
    return np.random.RandomState(1).standard_normal((2, 8, 12, 4)).astype(np.float32)


def published(folder):
    import torch
    from diffusers import StableDiffusion3Pipeline

    left_out = {} if (folder / "text_encoder_3").exists() else {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **left_out)
    pipeline.set_progress_bar_config(disable=True)
    given = torch.from_numpy(latents()).permute(0, 3, 1, 2)
    call = functools.partial(pipeline, PROMPTS, height=16, width=24, latents=given, output_type="np")
    with torch.no_grad():
        return call(num_inference_steps=6, guidance_scale=4.5, negative_prompt=[NEGATIVE] * 2).images


@pytest.mark.reference
@pytest.mark.parametrize("name", CASES)
def test_draws_what_diffusers_draws(folders, name):
    theirs = published(folders(name))
    told = {"prompt": PROMPTS, "negative_prompt": NEGATIVE, "init": latents(), "size": (16, 24)}
    ours = diffjax.load(folders(name)).sample(jax.random.key(0), num=2, steps=6, sampler="euler", guidance=4.5, **told)
    error = np.abs((np.asarray(ours) + 1) / 2 - theirs).max()
    print(name, "max abs error", error, "spread", theirs.std())
    assert error <= 1e-4 and theirs.std() > 0.05
