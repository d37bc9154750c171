"""What training would do before its first step, done beforehand, by any number of processes."""

from ml_collections import ConfigDict

from diffjax import data
from diffjax.data.dataset import Dataset
from diffjax.parallel import hosts
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

    def fetch() -> None:
        data.fetch(config.data, retry)
        if beam is not None:
            data.prepare_by_beam(config.data, beam)

    hosts.first(fetch)
    found, part = hosts.in_turn(lambda: data.load(config.data)), (hosts.index(), hosts.count())
    found.records.digest()
    if frozen.is_frozen(config.get("text")):
        texts = frozen.captions(found, config.sample.prompts)
        frozen.encoded(config.text, texts[part[0] :: part[1]])
    if "model" in config:
        finetune.encode(config, found, part)
    hosts.meet()
    return found
