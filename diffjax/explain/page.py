"""The page: all sections as one HTML file that needs nothing beside it, and the pictures and numbers behind them."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffjax.explain import formula, pictures
from diffjax.explain.section import Section, Shown
from diffjax.utils import files, image
from diffjax.utils.errors import UserError

LARGEST = 5_000_000
"""Bytes of a page at most."""

SIDES = (256, 192, 128, 96, 64)
"""Pixels a side of the pictures in a page at most, the first with which it is small enough."""


def write(out: str | Path, title: str, lead: str, footer: str, result: Shown, sections: Sequence[Section]) -> Path:
    """Write `index.html`, `numbers.json` and `pictures/*.png` into a folder; the path of the page.

    Raises `UserError` where jinja2 is not installed, or the folder cannot be written.
    """
    out = Path(out)
    shown = [result, *(picture for section in sections for figure in section.figures for picture in figure.pictures)]
    page = render(title, lead, footer, result, sections)
    for picture in shown:
        image.write_png(out / "pictures" / f"{picture.name}.png", picture.pixels)
    files.write_json(out / "numbers.json", finite({section.name: section.numbers for section in sections}))
    files.write_atomic(out / "index.html", page.encode())
    return out / "index.html"


def render(title: str, lead: str, footer: str, result: Shown, sections: Sequence[Section]) -> str:
    """The page as text, below `LARGEST` bytes."""
    template, folder = _template(), Path(__file__).parent
    parts = {name: (folder / f"page.{kind}").read_text() for name, kind in (("style", "css"), ("script", "js"))}
    parts |= {"title": title, "lead": lead, "footer": footer, "result": result, "sections": sections}
    for longest in SIDES:
        page = template.render(**parts, uri=lambda picture, side=longest: pictures.uri(picture.pixels, side))
        if len(page.encode()) < LARGEST:
            return page
    raise UserError(f"the page would be {len(page.encode()) / 1e6:.0f} MB: explain with fewer --steps")


def check_installed() -> None:
    """Raises `UserError` where what makes the page is not installed."""
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise UserError("the page is made with jinja2: pip install 'diffjax[explain]'") from error


def _template() -> Any:
    check_installed()
    import jinja2
    from markupsafe import Markup

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    environment.globals["formula"] = lambda text: Markup(formula.html(text))
    environment.globals["sized"] = lambda picture: Markup(_sized(picture))
    return environment.get_template("page.html")


def _sized(picture: Shown) -> str:
    height, width = picture.pixels.shape[:2]
    small = ' class="small"' if max(height, width) <= pictures.SMALL else ""
    return f' width="{width}" height="{height}"{small}'


def finite(value: Any) -> Any:
    """JSON types with null for what is infinite or no number."""
    if isinstance(value, dict):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
