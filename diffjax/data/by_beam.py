"""Captioned pictures prepared by Apache Beam: on all cores of one machine, or by a cluster.

The prepared copy is the one that `captioned_pictures` writes alone, record for record: the same examples, order and
digest. A lot is what a worker takes at a time: a shard of webdataset, or some pictures of another source. The folder
that is written must be one that all workers see.
"""

import functools
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffjax.data.captioned_pictures import CaptionedPictures, PicturesConfig, distinct, features, judged
from diffjax.data.captions import Captioned
from diffjax.data.prepare import prepared
from diffjax.data.skipped import Skipped
from diffjax.data.webdataset import Shards
from diffjax.utils.errors import UserError

LOCAL = "--runner=DirectRunner --direct_running_mode=multi_processing --direct_num_workers=0"
"""Beam on all cores of this machine."""

LOT = 64
"""Pictures of a lot."""

Lot = Path | list[Captioned]


def prepare(settings: PicturesConfig, folder: Path, options: str = LOCAL) -> None:
    """Prepare the pictures of these settings in `folder`, if they are not, by Beam with these pipeline options.

    Raises `UserError` where Beam is not installed, none of the pictures can be used, or the folder cannot be written.
    """
    try:
        from apache_beam.options.pipeline_options import PipelineOptions  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError("--beam needs Apache Beam: pip install 'diffjax[beam]' in an environment of its own") from error
    import tensorflow_datasets as tfds

    download = tfds.download.DownloadConfig(beam_options=PipelineOptions(shlex.split(options)))
    try:
        prepared(lambda: _builder()(config=settings, data_dir=folder), download=download)
    except ValueError as error:
        if "number of generated examples is 0" not in str(error):
            raise
        raise UserError(f"none of the pictures in {settings.source.path} can be used") from error


@dataclass(frozen=True)
class Work:
    """What a worker does with a lot: (name, example) of each picture that is kept, and beside them its facts, or
    (name, reason) of one that is left out.
    """

    settings: PicturesConfig
    features: frozenset[str]

    def __call__(self, lot: Lot) -> Iterator[Any]:
        from apache_beam.pvalue import TaggedOutput  # pyright: ignore[reportMissingImports]

        source = self.settings.source
        pictures: Any = distinct(source.index(lot)) if isinstance(source, Shards) and isinstance(lot, Path) else lot
        for picture in pictures:
            kept = judged(picture, self.settings, self.features)
            yield from (TaggedOutput("left_out", entry) for entry in kept.left_out)
            if kept.example is not None:
                yield TaggedOutput("facts", (kept.grey, f"{kept.digest:x}"))
                yield picture.name, kept.example


def _lots(settings: PicturesConfig) -> list[Lot]:
    if isinstance(settings.source, Shards):
        return list(settings.source.files)
    pictures = settings.pictures
    return [pictures[i : i + LOT] for i in range(0, len(pictures), LOT)]


def _total(facts: Iterable[tuple[bool, str]]) -> tuple[bool, str]:
    """Whether all are grey, and the sum of the digests modulo 2^256, in hexadecimal: Beam counts to 2^63."""
    grey, content = True, 0
    for one, digest in facts:
        grey, content = grey and one, (content + int(digest, 16)) % 2**256
    return grey, f"{content:064x}"


@functools.cache
def _builder() -> type:
    import apache_beam as beam  # pyright: ignore[reportMissingImports]
    import tensorflow_datasets as tfds

    class BeamPictures(CaptionedPictures, skip_registration=True):
        """`captioned_pictures`, its examples made by Beam."""

        name = CaptionedPictures.name

        @functools.cached_property
        def _metadata(self) -> Any:
            return tfds.core.BeamMetadataDict()

        @functools.cached_property
        def _features(self) -> dict[str, Any]:
            source = self.builder_config.source
            if not isinstance(source, Shards):
                return super()._features
            return features(any(picture.captions for shard in source.files for picture in source.index(shard)), [])

        def _split_generators(self, dl_manager: Any, pipeline: Any) -> dict[str, Any]:  # pyright: ignore
            self._check_sizes()
            settings, skipped = self.builder_config, Skipped(Path(self.data_path))
            work = Work(settings.for_workers(), frozenset(self._features))
            made = (
                pipeline
                | "lots" >> beam.Create(_lots(settings), reshuffle=True)
                | "pictures" >> beam.FlatMap(work).with_outputs("left_out", "facts", main="examples")
            )
            total = made.facts | "facts" >> beam.CombineGlobally(_total)
            self._metadata["grey"] = total | "grey" >> beam.Map(lambda total: total[0])
            self._metadata["content"] = total | "content" >> beam.Map(lambda total: total[1])
            noted = made.left_out | "left out" >> beam.combiners.ToList()
            _ = noted | "note" >> beam.Map(lambda entries: skipped.add(sorted(entries)) if entries else None)
            return {"train": made.examples}

    return BeamPictures
