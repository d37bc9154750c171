"""The page of a tiny run, by the command line: its parts, and what it refuses."""

import json
import sys
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

import diffjax
import diffjax.data
from diffjax import cli, config as configs
from diffjax.plan import rates
from diffjax.utils import image, seeds

SECTIONS = ["walk", "words", "guidance", "frequencies", "nearest", "closed_form", "cost", "training"]
VOID = {"meta", "link", "img", "input", "br", "path", "circle"}


@pytest.fixture(scope="module", autouse=True)
def quick():
    """A machine whose speed is known."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rates, "_measured", lambda kind: rates.Rates(1e11, 1e11, 1e11, 1e10, 1e-6))
        yield


@pytest.fixture(scope="module")
def run(request, tmp_path_factory):
    return tiny_run.make(request.config.rootpath, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("page")
    assert cli.main(["explain", "--run", str(run), "--prompt", "A red heart!", "--seed", "7", "--out", str(out)]) == 0
    return out


class Page(HTMLParser):
    """All elements in order, as (tag, attributes, the tags around it), and the text inside each."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.text = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs), tuple(self.open)))
        self.text.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs), tuple(self.open)))
        self.text.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.text:
            self.text[-1] += data

    def all(self, tag):
        return [attributes for name, attributes, _ in self.found if name == tag]

    def words(self, tag):
        return [text.strip() for (name, _, _), text in zip(self.found, self.text) if name == tag]


@pytest.fixture(scope="module")
def page(folder):
    return Page((folder / "index.html").read_text())


def test_the_page_has_every_section_and_each_is_linked(page):
    parts = [of["id"] for of in page.all("section") if of.get("class") == "part"]
    assert parts == SECTIONS
    assert [of["href"] for of in page.all("a")] == ["#content", *(f"#{name}" for name in SECTIONS)]
    assert "left-out" not in {of.get("class") for of in page.all("p")}


def test_the_page_needs_nothing_beside_it(page, folder):
    for _, attributes, _ in page.found:
        for name in ("src", "href", "srcset", "action", "data"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
    text = (folder / "index.html").read_text()
    assert "@import" not in text and "url(" not in text and "fetch(" not in text and "import(" not in text
    assert len(text.encode()) < 1_500_000


def test_the_page_can_be_read_without_seeing_it(page):
    assert page.all("html")[0]["lang"] == "en" and page.words("title")[0] == "How run drew “red heart”"
    ids = [of["id"] for _, of, _ in page.found if "id" in of]
    assert len(ids) == len(set(ids))
    assert all(of["alt"] and of["width"] and of["height"] for of in page.all("img"))
    assert [of["for"] for of in page.all("label")] == [of["id"] for of in page.all("input")]
    levels = [int(tag[1]) for tag, _, _ in page.found if tag in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1 and max(np.diff(levels)) <= 1
    drawn = [inside for tag, of, inside in page.found if tag == "svg" and of.get("role") == "img"]
    titles = [inside for tag, _, inside in page.found if tag == "title" and inside[-1] == "svg"]
    assert len(drawn) == len(titles) > 5
    assert all(of.get("aria-hidden") or of.get("role") == "img" for of in page.all("svg"))


def test_every_figure_is_said_twice_and_names_its_file(page, request):
    figures = len(page.all("figure"))
    assert figures == len(page.words("h3")) == len([of for of in page.all("p") if of.get("class") == "plain"]) >= 12
    files = [text for (tag, _, inside), text in zip(page.found, page.text) if tag == "code" and "figcaption" in inside]
    assert len(files) == figures and all((request.config.rootpath / name.strip()).is_file() for name in files)


def test_the_slider_has_a_frame_for_every_step(page, folder):
    assert len([of for of in page.all("section") if of.get("class") == "frame"]) == 3
    assert page.all("input") == [
        {"type": "range", "id": "walk-place", "min": "1", "max": "3", "value": "1", "step": "1"}
    ]
    moves = json.loads((folder / "numbers.json").read_text())["walk"]["moves"]
    assert [of["step"] for of in moves] == [1, 2, 3] and moves[0]["logsnr"] is None


def test_the_picture_is_that_of_sampling(run, folder):
    drawn = diffjax.load(run).sample(seeds.key(7), prompt="red heart")
    shown = image.read_png(folder / "pictures" / "result.png")[0]
    assert np.abs(image.to_uint8(drawn)[0].astype(int) - shown).max() <= 1


def test_pictures_and_numbers_stand_beside_the_page(page, folder):
    assert len(list((folder / "pictures").glob("*.png"))) == len(page.all("img"))
    numbers = json.loads((folder / "numbers.json").read_text())
    assert list(numbers) == SECTIONS
    assert [of["word"] for of in numbers["words"]["without"]] == ["red", "heart"]
    assert {of["prompt"] for of in numbers["words"]["without"]} == {"red", "heart"}
    shares = numbers["words"]["attention"]
    assert 0 < sum(of["share"] for of in shares["words"]) <= shares["text"] + 1e-6 < 1
    assert np.shape(shares["maps"]) == (3, 2, 2, 2)
    by = numbers["nearest"]
    assert list(by) == ["verdict", "pixels", "features"] and by["pixels"]["pictures"] == by["features"]["pictures"] == 8
    verdicts = [of["verdict"] for of in (by, by["pixels"], by["features"])]
    assert verdicts[0] == min(verdicts[1:], key=("copied", "close", "new").index)
    assert numbers["cost"]["evaluations"] == 3 and {of["part"] for of in numbers["cost"]["parts"]} == {
        "text",
        "network",
    }
    assert numbers["cost"]["error"]["steps"] == [1, 2, 4, 8, 16, 32] and min(numbers["cost"]["error"]["rms"]) > 0
    assert numbers["guidance"]["scales"]["against"] == "training picture"
    assert numbers["training"]["pictures"] == 8 and numbers["training"]["twins"] == 0


def test_the_machine_of_one_picture_copies_it(run, folder):
    """One caption is the prompt, so that the machine of the text has one picture to take pixels from."""
    every, one = json.loads((folder / "numbers.json").read_text())["closed_form"]["pairs"]
    assert every["of"] == "everything" and one["of"] == "what this text names"
    data = diffjax.data.load(configs.read(run).data)
    assert data.captions()[one["sources"][0]["record"]] == ("red heart",)
    truth = image.read_png(run.parent / "data" / "0.png")[0]
    np.testing.assert_array_equal(image.read_png(folder / "pictures" / "machine-1-1.png")[0], truth)
    assert all(-1 <= pair["r"] <= 1 and pair["r_squared"] <= pair["r"] ** 2 + 1e-6 for pair in (every, one))


def test_the_attention_is_that_of_the_network_at_the_first_step(run, folder):
    """At t = 1 by hand: the mean over layers and heads of what image tokens give to the first token, red."""
    model = diffjax.load(run)
    inputs = model.inputs(seeds.key(7), np.arange(1), prompt="red heart")
    x = model.recipe().begin(inputs).x
    module = model.denoiser.apply.module
    given = {"params": model.denoiser.params}, x, np.full(1, 1000.0, np.float32)
    _, kept = module.apply(*given, **jax.tree.map(jnp.asarray, inputs.cond), mutable=["intermediates"])
    weights = np.asarray(kept["intermediates"]["blocks"]["attention"]["words"][0])
    shown = json.loads((folder / "numbers.json").read_text())["words"]["attention"]["maps"][0][0]
    np.testing.assert_allclose(np.ravel(shown), weights[:, 0, :, 0].mean(axis=0), atol=2e-6)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--prompt", "zebra"], 'no caption has a word of "zebra"'),
        (["--prompt", "red", "--revision", "9"], "no checkpoint of step 9"),
        (["--prompt", "red", "--steps", "0"], "--steps is 0"),
        (["--prompt", "red", "--label", "3"], "without classes"),
        (["--prompt", " "], "a prompt is empty"),
        (["--prompt", "red", "--seed", "-1"], "--seed is -1"),
        (["--prompt", "red", "--sampler", "eular"], "euler"),
    ],
)
def test_what_cannot_be_explained_is_said_in_one_line(run, tmp_path, capsys, given, said):
    assert cli.main(["explain", "--run", str(run), *given, "--out", str(tmp_path / "page")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("diffjax: ") and said in lines[-1]
    assert not (tmp_path / "page").exists()


def test_a_file_is_no_folder(run, tmp_path, capsys):
    (tmp_path / "page").write_text("mine")
    assert cli.main(["explain", "--run", str(run), "--prompt", "red", "--out", str(tmp_path / "page")]) == 2
    assert "is a file: give --out a folder" in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "page").read_text() == "mine"


def test_without_jinja2_it_is_said_before_anything_is_drawn(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert cli.main(["explain", "--run", str(run), "--prompt", "red", "--out", str(tmp_path / "page")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("pip install 'diffjax[explain]'")
