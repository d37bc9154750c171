"""The parts of a page: formulas, charts, pictures, frequencies, nearest pictures, words."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

import diffjax.data
from diffjax.explain import attention, chart, closed_form, formula, frequencies, nearest, page, pictures, subject
from diffjax.explain.chart import Chart, Line
from diffjax.text.learned import CaptionTokenizer

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("x_s = alpha_s x0", "x<sub>s</sub> = α<sub>s</sub> x<sub>0</sub>"),
        ("r^(2 eta) - eps", "r<sup>2 η</sup> − ε"),
        ("A_(uj) <= -0.5", "A<sub>uj</sub> &lt;= −0.5"),
        ("log-SNR = (-∞)", "log-SNR = (−∞)"),
        (
            "the alphabet, d_1 / mean(d_2 ... d_51)",
            "the alphabet, d<sub>1</sub> / mean(d<sub>2</sub> ... d<sub>51</sub>)",
        ),
    ],
)
def test_formulas_are_written_as_in_the_code(text, html):
    assert formula.html(text) == html


def test_numbers_of_formulas():
    assert [formula.number(value) for value in (0.25, -1 / 3, 12345.0, -np.inf)] == [
        "0.25",
        "(-0.3333)",
        "1.234e+04",
        "(-∞)",
    ]


@pytest.mark.parametrize(
    ("log_x", "log_y", "falling"), [(False, False, False), (True, True, False), (False, True, True)]
)
def test_a_chart_is_svg_with_every_point_inside(log_x, log_y, falling):
    x, y = np.array([1.0, 2.0, 30.0, 40.0]), np.array([1e-4, np.inf, 3.0, np.nan])
    drawn = Chart(
        "a < b & c", "x", "y", (Line("one", x, y, 0), Line("two", x, 0 * x, 7, dashed=True)), log_x, log_y, falling
    )
    svg = ElementTree.fromstring(drawn.svg())
    assert svg.find("title").text == "a < b & c"
    dots = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in svg.iter("circle")]
    assert len(dots) == 2 and (dots[0][0] > dots[1][0]) == falling and dots[0][1] > dots[1][1]
    for across, down in dots:
        assert chart.LEFT <= across <= chart.WIDTH - chart.RIGHT and chart.TOP <= down <= chart.HEIGHT - chart.BOTTOM
    assert drawn.rows()[0] == ("1", "0.0001", "0")


def test_a_chart_places_points_by_its_ticks():
    axis = chart.Axis.over([np.array([0.0, 10.0])], False, 0.0, 100.0)
    assert (axis.low, axis.high) == (0, 10) and axis.place(2.5) == 25
    axis = chart.Axis.over([np.array([1.0, 1000.0])], True, 0.0, 300.0)
    assert np.allclose(axis.place(np.array(axis.ticks)), [0, 100, 200, 300]) and axis.ticks == (1, 10, 100, 1000)
    axis = chart.Axis.over([np.array([0.3, 4.0])], True, 0.0, 1.0)
    assert axis.ticks[0] <= 0.3 and axis.ticks[-1] >= 4 and len(axis.ticks) >= 4


def test_small_pictures_are_embedded_exactly_and_large_ones_made_smaller(tmp_path):
    small, large = (RANDOM.integers(0, 256, (side, side, 3), np.uint8) for side in (32, 400))
    exact, made = pictures.uri(small, 64), pictures.uri(large, 64)
    assert exact.startswith("data:image/png;base64,") and made.startswith("data:image/webp;base64,")
    assert np.array_equal(np.asarray(opened(exact, tmp_path)), small)
    assert opened(made, tmp_path).size == (64, 64)


def opened(uri, folder):
    import base64

    (folder / "picture").write_bytes(base64.b64decode(uri.partition(",")[2]))
    return Image.open(folder / "picture")


def test_heat_is_dark_at_nothing_and_bright_at_most():
    drawn = pictures.heat(np.array([[0.0, 1.0], [0.0, 5.0]]), (8, 8), 1.0)
    assert drawn.shape == (8, 8, 3)
    assert np.array_equal(drawn[0, 0], pictures.HEAT[0]) and np.array_equal(drawn[-1, -1], pictures.HEAT[-1])
    assert (np.diff(drawn[0].astype(int).sum(axis=-1)) >= 0).all()


def test_no_infinity_reaches_json():
    assert page.finite({"a": (1.0, np.inf, [float("nan")]), "b": "x"}) == {"a": [1.0, None, [None]], "b": "x"}


@pytest.mark.parametrize("shape", [(16, 16), (8, 24)])
def test_bands_part_all_coefficients_and_keep_the_power(shape):
    where = frequencies.bands(*shape)
    assert np.array_equal(np.sum(where, axis=0), np.ones(shape))
    x = RANDOM.normal(size=(*shape, 3))
    assert np.isclose((frequencies.coefficients(x) ** 2).sum(), (x**2).sum(), rtol=1e-12)
    flat = frequencies.coefficients(np.ones((*shape, 1)))
    assert np.isclose(flat[0, 0, 0] ** 2, flat.size)


def test_commit_is_the_step_from_which_a_band_stays():
    settled = np.array([[0.5, 0.96, 0.0], [0.99, 0.5, 0.2], [0.97, 0.99, 0.3], [1.0, 1.0, 1.0]])
    assert frequencies.commit(settled) == [1, 2, 3]


@pytest.mark.parametrize(
    ("first", "said"), [([0, 0, 0, 3], "first step"), ([0, 2, 4], "from coarse"), ([3, 1, 4], "not simply")]
)
def test_the_order_of_the_octaves_is_said(first, said):
    assert said in frequencies._order(first)


def test_wiener_is_what_the_best_guess_of_gaussian_data_settles():
    """E |x0_hat - x0|^2 of the posterior mean, coefficient by coefficient, drawn."""
    variance, (alpha, sigma) = RANDOM.uniform(0.1, 3.0, (4, 4, 1)), np.array([[0.3, 0.8], [0.9, 0.4]])
    theory = frequencies.wiener(variance, variance, alpha, sigma)
    x0, eps = RANDOM.normal(size=(2, 40_000, 4, 4, 1))
    x0 = x0 * np.sqrt(variance)
    for k, (a, s) in enumerate(zip(alpha, sigma)):
        guess = a * variance / (a**2 * variance + s**2) * (a * x0 + s * eps)
        error = ((guess - x0) ** 2).mean(axis=0)
        found = [1 - error[of].sum() / variance[of].sum() for of in frequencies.bands(4, 4)]
        np.testing.assert_allclose(theory[k], found, atol=0.01)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(60):
        Image.fromarray(RANDOM.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("red" if i < 2 else f"number {i}")
    return diffjax.data.load(ConfigDict({"name": "captioned_folder", "path": str(folder), "size": 8}))


def test_nearest_pictures_are_those_of_a_direct_sum(data, monkeypatch):
    monkeypatch.setattr(nearest, "AT_ONCE", 7)
    records = nearest.chosen(data)
    every = data.examples(records)["image"]
    drawn = RANDOM.integers(0, 256, (2, 8, 8, 3), np.uint8)
    direct = np.sqrt((((drawn[:, None].astype(float) - every) / 127.5) ** 2).mean(axis=(2, 3, 4)))
    for found, distance in zip(nearest.find(drawn, data, records), direct):
        order = np.argsort(distance)
        assert np.array_equal(found.records, order[: nearest.AFTER + 1])
        np.testing.assert_allclose(found.distances, distance[order[: nearest.AFTER + 1]], rtol=1e-5)
        assert np.isclose(found.ratio, distance[order[0]] / distance[order[1 : nearest.AFTER + 1]].mean(), rtol=1e-5)


def test_a_copy_is_called_one_and_noise_is_new(data):
    records = nearest.chosen(data)
    every = data.examples(records)["image"]
    usual = [of.ratio for of in nearest.find(every, data, records, records)]
    assert all(0.5 < ratio < 1.2 for ratio in usual)
    ratio = lambda pixels: nearest.find(pixels[None], data, records)[0].ratio
    assert ratio(every[7]) < 1e-3 and nearest.judged(ratio(every[7]), usual) == "copied"
    assert nearest.judged(ratio(RANDOM.integers(0, 256, (8, 8, 3), np.uint8)), usual) == "new"
    assert [nearest.judged(of, np.linspace(0.2, 0.5, 50)) for of in (0.1, 0.3)] == ["copied", "new"]
    half = (every[7].astype(int) + RANDOM.integers(0, 256, (8, 8, 3))) // 2
    assert nearest.judged(ratio(half.astype(np.uint8)), usual) == "close"


def test_a_pair_is_measured_by_correlation_and_by_what_is_left():
    network = RANDOM.normal(size=(8, 8, 3))
    pair = lambda machine: closed_form.Pair("", network, machine, [])
    assert np.isclose(pair(network).r, 1) and np.isclose(pair(network).r_squared, 1)
    assert np.isclose(pair(2 * network + 1).r, 1) and pair(2 * network + 1).r_squared < 0
    mean = np.full_like(network, network.mean())
    assert np.isclose(pair(mean).r_squared, 0)
    noisy = network + 0.5 * RANDOM.normal(size=network.shape)
    assert (
        np.isclose(pair(noisy).r, np.corrcoef(network.ravel(), noisy.ravel())[0, 1])
        and 0.5 < pair(noisy).r_squared < 0.9
    )


def test_words_are_found_in_the_tokens_of_a_prompt():
    tokenizer = CaptionTokenizer.train(["red heart", "heart with arrow"], 8)
    readers = [(tokenizer.rules, 0, 8), (tokenizer.rules, 77, 1)]
    assert attention.places("heart with heart", readers) == [("heart", [0, 77]), ("with", [1]), ("heart", [2])]
    spelled = dict(attention.places("red xy", readers[:1]))
    assert spelled["red"] == [0] and len(spelled["xy"]) >= 2 and 0 not in spelled["xy"]


def test_each_word_is_left_out_once():
    assert subject.knocked_out("red  red heart") == [("red", "red heart"), ("red", "red heart"), ("heart", "red red")]
    assert subject.knocked_out("heart") == [("heart", "")]
    assert subject.knocked_out("frog + red heart")[0] == ("frog", "red heart")
    assert [word for word, _ in subject.knocked_out("frog + heart")] == ["frog", "heart"]


def test_layers_of_several_resolutions_are_joined_on_the_finest():
    fine, coarse = RANDOM.random((3, 2, 32, 5)), RANDOM.random((2, 8, 5))
    found = attention._joined([attention._patched(kept, (8, 16)) for kept in (fine, coarse)])
    assert found.shape == (4, 8, 5)
    first = coarse[0].reshape(2, 4, 5)
    for u in ((0, 0), (3, 5)):
        expected = (fine[:, 0].reshape(3, 4, 8, 5)[:, *u].sum(0) + first[u[0] // 2, u[1] // 2]) / 4
        np.testing.assert_allclose(found[u], expected)


def test_the_grid_of_patches_is_that_of_the_state():
    assert attention.grid(16, (32, 32)) == (4, 4) and attention.grid(50, (40, 80)) == (5, 10)


def test_every_formula_names_a_file_that_is_there(request):
    for path in (request.config.rootpath / "diffjax" / "explain").glob("*.py"):
        for file in re.findall(r'"(diffjax/\w+/\w+\.py)"', path.read_text()):
            assert (request.config.rootpath / file).exists(), file
