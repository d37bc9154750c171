"""Data sets and the pipeline that feeds them to training.

`load(config.data)` gives a `Dataset`; its `batches` are endless, shuffled, sharded and restorable, and `Prefetch`
places them on the devices ahead of time. `default_config` has every field of the configuration with its default; what
each means stands in `diffjax.config.base`, from which docs/configs.md has it.
"""

from diffjax.data.dataset import Dataset, default_config, fetch, load, prepare_by_beam
from diffjax.data.pipeline import Batches, Prefetch

__all__ = ["Batches", "Dataset", "Prefetch", "default_config", "fetch", "load", "prepare_by_beam"]
