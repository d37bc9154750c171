"""The page in a real browser, opened from disk, as wide as a phone and as a desk: it moves and complains of nothing."""

import re
import shutil
import subprocess

import numpy as np
import pytest

from diffjax.explain import page
from diffjax.explain.chart import Chart, Line
from diffjax.explain.section import Figure, Frame, Section, Shown, Slider, Strip, Table, Text

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")

WATCH = """<script>
window.complaints = [];
addEventListener("error", (event) => complaints.push(String(event.message || event.target.src)), true);
addEventListener("securitypolicyviolation", (event) => complaints.push(event.blockedURI));
for (const kind of ["error", "warn"]) console[kind] = (...said) => complaints.push(said.join(" "));
</script>"""
TRY = """<script>
addEventListener("load", () => {
  const input = document.querySelector("input"), frames = [...document.querySelectorAll(".frame")];
  const seen = () => frames.map((frame) => getComputedStyle(frame).display !== "none" ? "1" : "0").join("");
  const found = [seen()];
  for (const place of [3, 2]) {
    input.value = place;
    input.dispatchEvent(new Event("input"));
    found.push([seen(), document.querySelector("output").textContent, input.getAttribute("aria-valuetext")].join(" "));
  }
  found.push("broken " + [...document.images].filter((image) => !image.naturalWidth).length);
  found.push("wide " + (document.documentElement.scrollWidth > innerWidth));
  found.push("complaints " + JSON.stringify(complaints));
  document.body.innerHTML = "<pre>" + found.join("\\n") + "</pre>";
});
</script>"""

AROUND = """<iframe src="page.html" style="width:{width}px;height:900px;border:0"></iframe><script>
addEventListener("load", () => setTimeout(() => {{
  document.body.innerHTML = document.querySelector("iframe").contentDocument.body.innerHTML;
}}, 1000));
</script>"""
SCHEME = "--blink-settings=preferredColorScheme"


def shown(name, side=8):
    return Shown(name, np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8), "x_t: noise", "noise")


@pytest.fixture(scope="module")
def text():
    x = np.arange(1.0, 4.0)
    frames = tuple(Frame(f"step {i}", (shown(f"a{i}"), shown(f"b{i}", 200)), ("x_s = alpha_s x0",)) for i in (1, 2, 3))
    chart = Chart("falls", "t", "error", (Line("one", x, x, 0), Line("two", x, 2 * x, 1, dashed=True)), falling=True)
    blocks = (Slider("walk", "step", frames), Strip((shown("c"),)), Table(("a", "b"), (("1", "2"),)), chart, Text("so"))
    figure = Figure(
        "A <figure> & more", "Plainly.", "x_t = alpha x0 + sigma eps", "diffjax/diffusion/process.py", blocks
    )
    sections = [Section("one", "One", (figure,), {}), Section("two", "Two", left_out="Nothing here.")]
    return page.render("A title", "What it is.", "How it was made.", shown("result"), sections)


@pytest.mark.parametrize(("width", "scheme"), [(390, 1), (1280, 0)])
def test_the_slider_moves_and_nothing_is_complained_of(text, tmp_path, width, scheme):
    tried = text.replace("<head>", f"<head>{WATCH}").replace("</body>", f"{TRY}</body>")
    (tmp_path / "page.html").write_text(tried)
    (tmp_path / "index.html").write_text(AROUND.format(width=width))
    found = dump(tmp_path / "index.html", f"--user-data-dir={tmp_path / 'profile'}", f"{SCHEME}={scheme}")
    assert found == ["100", "001 step 3 step 3", "010 step 2 step 2", "broken 0", "wide false", "complaints []"]


def dump(path, *flags):
    """The lines that the page leaves in its body."""
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", *flags]
    command += ["--window-size=1400,1000", "--virtual-time-budget=5000", "--dump-dom", path.as_uri()]
    said = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    return re.search(r"<pre>(.*?)</pre>", said, re.S).group(1).splitlines()
