"""Data sets and the pipeline that feeds them to training.

`load(config.data)` gives a `Dataset`; its `batches` are endless, shuffled, sharded and restorable, and `Prefetch`
places them on the devices ahead of time. Fields of the configuration (`default_config` has them all):

    name         "openmoji", "tinted_openmoji" (its objects in eight colours), "captioned_folder", "class_folder",
                 "captioned_table", "webdataset", or any TFDS name such as "cifar10"
    path         captioned_folder: the folder; `diffjax.data.captions` lists the layouts that are read
                 class_folder: a folder with a subfolder of pictures for each class
                 captioned_table: a .csv, .tsv, .jsonl or .parquet file, a folder of them or a pattern such as "part-*";
                 its pictures are files or URLs, and `diffjax prepare` fetches the latter
                 webdataset: a .tar file, a folder of them or a pattern such as "shards/*.tar"
    data_dir     where prepared data are looked for and put; "" is $TFDS_DATA_DIR, else the cache folder
    split        a TFDS split or slice: "train", "test", "train[:90%]"
    held_out     the split that is kept for `diffjax evaluate`, such as "train[90%:]"; leave it out of `split`
    subset       openmoji: "all", "no_skin_tones", or so many, such as "200" (everyday things first); of tinted_openmoji
                 all have no skin tones
    size         pixels a side of the square pictures; the shorter side is resized to it
    channels     3, or 1 for grey; 0: 1 where all pictures are grey, else 3
    background   the CSS colour behind transparent pictures
    crop         "center", or "random": anywhere along the longer side
    flip         mirror every other picture
    enlarge      accept pictures smaller than `size` and enlarge them, instead of refusing them
    caption      "any": one of the picture's captions each time; "first": always the main one
    templates    texts around the caption, one chosen each time, such as ("{}", "a {}")
    tag_dropout  probability of leaving out each comma-separated tag of a caption but the first
    workers      processes that decode; 0 decodes on threads of this one
"""

from diffjax.data.dataset import Dataset, default_config, fetch, load
from diffjax.data.pipeline import Batches, Prefetch

__all__ = ["Batches", "Dataset", "Prefetch", "default_config", "fetch", "load"]
