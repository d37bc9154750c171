"""Pages of what is not a run of text: classes, and, slower, published pixel and latent models."""

import json

import jax
import numpy as np
import pytest
import tiny_run
import toys

from diffjax import cli
from diffjax.explain import guidance, walk, words
from diffjax.explain.subject import Subject
from diffjax.models.options import Request

CLOSED = """
from ml_collections import ConfigDict

def get_config():
    data = {{"name": "captioned_folder", "path": {data!r}, "size": 8}}
    table = {{"model": "closed_form", "closed_form": {{"data": data}}, "prompts": ("red heart + blue ball",)}}
    return ConfigDict({{**table, "steps": 4}})
"""


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_class_is_left_out_and_guides(scale):
    request = Request(model="toy", labels=("b",), steps=3, sampler="dpmpp_2m", guidance=scale)
    subject = Subject(toys.model(classes=("a", "b"), guidance=None), request)
    recipe = subject.recipe()
    inputs = subject.inputs(recipe)
    steps = walk.run(recipe, inputs)
    told = words.section(subject, recipe, inputs, steps)
    assert told.title == "What the class did" and [of["word"] for of in told.numbers["without"]] == ["the class"]
    assert told.numbers["without"][0]["distance"] > 0.01
    found = guidance.section(subject, steps, None, 1e-3).numbers
    apart = walk.draw(subject, subject.recipe(guidance=1.0), "") - walk.draw(subject, subject.recipe(guidance=1.0))
    assert found["scale"] == scale and found["scales"]["error"][3][0] == 0 < found["scales"]["error"][3][1]
    if scale == 1:
        assert np.isclose(told.numbers["without"][0]["distance"], np.sqrt(np.mean(apart**2)), rtol=1e-5)


def test_the_difference_that_guidance_makes_is_that_of_both_branches():
    request = Request(model="toy", labels=("b",), steps=3, sampler="ddim", guidance=1.0)
    subject = Subject(toys.model(classes=("a", "b"), guidance=None), request)
    steps = walk.run(subject.recipe(), subject.inputs(subject.recipe()))
    guided = subject.recipe(guidance=2.0)
    cond = subject.inputs(guided).cond
    for step, (c, u) in zip(steps, guidance.pairs(subject, steps)):
        for x0, branch in ((c, cond["cond"]), (u, cond["null"])):
            alone = subject.model.denoiser(step.seen.x, step.t, jax.tree.map(jax.numpy.asarray, branch)).x0
            np.testing.assert_allclose(x0, alone, rtol=1e-5, atol=1e-5)


def test_what_does_not_apply_is_left_out_in_words():
    request = Request(model="toy", steps=2, sampler="ddim")
    subject = Subject(toys.model(guidance=None), request)
    recipe = subject.recipe()
    steps = walk.run(recipe, subject.inputs(recipe))
    told = words.section(subject, recipe, subject.inputs(recipe), steps)
    assert told.left_out == "This picture was drawn without words." and not told.figures
    assert "nothing to guide by" in guidance.section(subject, steps, None, 1e-3).left_out


def test_a_closed_form_is_explained_too(request, tmp_path):
    data = tiny_run.make(request.config.rootpath, tmp_path).parent / "data"
    (tmp_path / "closed.py").write_text(CLOSED.format(data=str(data)))
    given = ["--config", str(tmp_path / "closed.py"), "--out", str(tmp_path / "page")]
    assert cli.main(["explain", *given]) == 0
    numbers = json.loads((tmp_path / "page" / "numbers.json").read_text())
    assert [of["word"] for of in numbers["words"]["without"]] == ["red", "heart", "blue", "ball"]
    assert "attention" not in numbers["words"] and numbers["nearest"]["pixels"]["pictures"] == 8
    assert not numbers["cost"]["parts"] and numbers["cost"]["evaluations"] == 4
    text = (tmp_path / "page" / "index.html").read_text()
    assert "Here there is none" in text and "without a network in the first place" in text


@pytest.mark.slow
@pytest.mark.parametrize("t5", [True, False])
def test_a_published_latent_model_has_words_guidance_and_decoded_steps(tmp_path, t5):
    import sd3_folder

    folder, out = sd3_folder.write(tmp_path / "sd3", "medium", t5), tmp_path / "page"
    given = ["--model", str(folder), "--prompt", "a cat and a hat", "--steps", "3", "--out", str(out)]
    assert cli.main(["explain", *given]) == 0
    numbers = json.loads((out / "numbers.json").read_text())
    attention = {of["word"]: of["tokens"] for of in numbers["words"]["attention"]["words"]}
    assert attention["cat"] == ([2, 78] if t5 else [2])
    assert np.shape(numbers["words"]["attention"]["maps"]) == (3, 5, 4, 4)
    assert len(numbers["words"]["without"]) == 5 and len(numbers["walk"]["moves"]) == 3
    assert {of["part"] for of in numbers["cost"]["parts"]} >= {"transformer", "vae", "text_encoder"}
    text = (out / "index.html").read_text()
    assert "are not here, so none can be compared with" in text and "This model was published" in text
