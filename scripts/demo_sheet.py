"""One sheet of a demo: what was asked for, large; held-out pairs, drawn above and true below; the figures.

    python scripts/demo_sheet.py runs/emoji drawn/demo drawn/demo/sheet.png

The run is one that `diffjax evaluate` has measured.
"""

import argparse
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from diffjax.utils import files, image

Sheet = UInt8[np.ndarray, "h w 3"]

LARGE, ACROSS = 256, 4
MARGIN, TEXT_SIZE = 12, 18


def asked(folder: Path) -> Sheet:
    """The pictures of a sampling job, each pixel a square, above their prompts."""
    entries = files.read_json(folder / "manifest.json")["images"]
    pictures = np.stack([image.read_png(folder / entry["file"])[0] for entry in entries])
    factor = max(1, LARGE // pictures.shape[2])
    large = pictures.repeat(factor, axis=1).repeat(factor, axis=2)
    return image.sheet(large, min(ACROSS, len(large)), [entry["prompt"] or "" for entry in entries])


def figures(result: dict) -> list[str]:
    """What `diffjax evaluate` measured, a line for each kind of prompts."""
    kinds = {"held-out pairs": result["held_out_prompts"], "training prompts": result}
    return [
        f"{of['num']} {kind}: {of['top1']:.1%} find their own picture among {of['among']}, the colour is right in "
        f"{of['class']:.1%}, PSNR {of['psnr']:.1f} dB"
        for kind, of in kinds.items()
    ]


def text(lines: list[str], width: int) -> Sheet:
    """Lines of text on white, at least so wide."""
    font = ImageFont.load_default(TEXT_SIZE)
    needed = max(round(font.getlength(line)) for line in lines) + MARGIN
    canvas = Image.new("RGB", (max(width, needed), len(lines) * (TEXT_SIZE + 6) + 2 * MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        draw.text((MARGIN // 2, MARGIN + number * (TEXT_SIZE + 6)), line, "black", font)
    return np.asarray(canvas)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    result = files.read_json(args.run / "evaluation.json")
    above, below = asked(args.pictures), image.read_png(args.run / "held_out.png")[0]
    width = max(above.shape[1], below.shape[1])
    heading = text(["Held out: no training picture shows these. Drawn above, true below."], width)
    image.write_png(args.out, image.stack([above, heading, below, text(figures(result), width)]))


if __name__ == "__main__":
    main()
