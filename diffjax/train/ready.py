"""What training would do before its first step, done beforehand, by any number of processes."""

import jax
from jax.experimental.multihost_utils import sync_global_devices
from ml_collections import ConfigDict

from diffjax import data
from diffjax.data.dataset import Dataset
from diffjax.text import frozen
from diffjax.train import finetune
from diffjax.train.experiment import check_conditions


def make_ready(config: ConfigDict, retry: bool = False, beam: str | None = None) -> Dataset:
    """The data set of an experiment, its pictures prepared, its captions and latents encoded where training reads such.

    Process 0 fetches and prepares the pictures, by Apache Beam with the pipeline options `beam` where these are given;
    of what is encoded every process does its part, into a cache folder that all see. What is done already is not done
    again. Raises `UserError` for prepared pictures that cannot be read.
    """
    check_conditions(config)
    if jax.process_index() == 0:
        data.fetch(config.data, retry)
        if beam is not None:
            data.prepare_by_beam(config.data, beam)
        data.load(config.data)
    sync_global_devices("prepared")
    found, part = data.load(config.data), (jax.process_index(), jax.process_count())
    found.records.digest()
    if frozen.is_frozen(config.get("text")):
        texts = frozen.captions(found, config.sample.prompts)
        frozen.encoded(config.text, texts[part[0] :: part[1]])
    if "model" in config:
        finetune.encode(config, found, part)
    sync_global_devices("encoded")
    return found
