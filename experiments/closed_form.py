r"""New pictures without a network and without training: every pixel is one of a training picture, chosen by its
surroundings.

    diffjax sample --config experiments/closed_form.py --prompt "frog + red heart" --out pictures
    diffjax sample --config experiments/closed_form.py --config.closed_form.mixing=0.8 --prompt "fox and rocket" \
        --out more
    diffjax sample --config experiments/closed_form.py --config.closed_form.data.size=128 --prompt "owl, tomato" \
        --out large

Time: 8.5 s for four pictures on 2 busy CPU cores, compilation included; after that 0.1 s each with its sources. What is
drawn, where each pixel is from, and how: docs/closed_form.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The experiment: fields of `diffjax.models.options.Request`, and the table of `diffjax.models.closed_form`."""
    return ConfigDict(
        {
            "model": "closed_form",
            "closed_form": {
                "data": {"name": "openmoji", "path": "", "subset": "200", "size": 32, "background": "white"},
                "machine": "local",
                "windows": "",
                "mixing": 0.5,
                "process": {"name": "flow"},
            },
            "prompts": (),
            "num": 4,
            "seed": 0,
        }
    )
