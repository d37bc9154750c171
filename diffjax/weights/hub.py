"""Models fetched by their id: downloaded once into the cache folder, resumed when broken off, pinned to a revision."""

import os
import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from diffjax import files
from diffjax.errors import UserError
from diffjax.weights.folder import STEMS

ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
# Configurations, tokenizers and safetensors; the pickles only where there is nothing else.
PATTERNS = ("*.json", "*.txt", "*.model", "*.safetensors", "*.bin")
OTHER = 9


class Fetched(NamedTuple):
    """A folder that holds the files, and the revision they are of (`None` for a folder of the user's own)."""

    folder: Path
    revision: str | None


def fetch(name: str | Path, revision: str | None = None, patterns: Sequence[str] = PATTERNS) -> Fetched:
    """The folder of a model: `name` itself when it exists or is absolute, else the cached files of that hub id.

    Of the repository's files those that match `patterns` are downloaded, and of several forms of the same weights only
    the best. With HF_HUB_OFFLINE=1, or no network, what is cached is used. Raises `UserError` saying what to do when
    the model is not there, not cached, or behind a licence.
    """
    path = Path(name).expanduser()
    if str(name) and path.exists():
        return Fetched(path, None)
    if path.is_absolute() or str(name).startswith(".") or not ID.fullmatch(str(name)):
        raise UserError(f"there is no folder {name}; give an existing folder or a hub id such as google/ddpm-cat-256")
    return _download(str(name), revision, patterns)


def _download(repo: str, revision: str | None, patterns: Sequence[str]) -> Fetched:
    import huggingface_hub
    from huggingface_hub import constants, errors

    cache = files.home() / "hub"
    try:
        if constants.HF_HUB_OFFLINE:
            return _cached(repo, revision, cache)
        info = huggingface_hub.HfApi().model_info(repo, revision=revision)
        wanted = needed([file.rfilename for file in info.siblings or ()], patterns)
        folder = huggingface_hub.snapshot_download(repo, revision=info.sha, cache_dir=cache, allow_patterns=wanted)
        return Fetched(Path(folder), info.sha)
    except errors.GatedRepoError as error:
        raise UserError(
            f"{repo} wants its licence accepted: do so on the model's page, then `hf auth login` (or set HF_TOKEN)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{repo} has no revision {revision}; leave --revision out for the newest") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise UserError(
            f"the hub knows no model {repo}, or it is private: check the name, or log in with `hf auth login`"
        ) from error
    except (errors.HTTPError, OSError) as error:
        return _without_network(repo, revision, cache, error)


def _without_network(repo: str, revision: str | None, cache: Path, error: Exception) -> Fetched:
    """The cached model, when the hub does not answer."""
    if isinstance(error, OSError) and error.errno is not None:
        raise UserError(f"cannot write {cache}: {error.strerror}; free some space, or set DIFFJAX_HOME") from error
    try:
        return _cached(repo, revision, cache)
    except UserError:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{repo} could not be downloaded ({reason}); run again to go on where it stopped") from error


def _cached(repo: str, revision: str | None, cache: Path) -> Fetched:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        folder = huggingface_hub.snapshot_download(repo, revision=revision, cache_dir=cache, local_files_only=True)
    except (errors.LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{repo} is not in {cache} and the hub is off; unset HF_HUB_OFFLINE once to download it, or give a folder"
        ) from error
    return Fetched(Path(folder), Path(folder).name)


def needed(names: Sequence[str], patterns: Sequence[str] = PATTERNS) -> list[str]:
    """Of a repository's files, those to download: matching `patterns`, and one form of each folder's weights.

    safetensors go before pickles and the plain form before variants such as `model.fp16.safetensors`. Left out: weights
    by other names than the libraries' own, and folders within folders (checkpoints of the training).
    """
    names = [name for name in names if any(fnmatch(name, pattern) for pattern in patterns) and name.count("/") < 2]
    best: dict[str, int] = {}
    for name in names:
        rank, folder = _rank(name), os.path.dirname(name)
        if rank is not None and rank < OTHER:
            best[folder] = min(rank, best.get(folder, rank))
    return sorted(name for name in names if _rank(name) in (None, best.get(os.path.dirname(name))))


def _rank(name: str) -> int | None:
    """How late a file of weights is chosen, None for other files."""
    base = os.path.basename(name)
    forms = [part in base.split(".") for part in ("safetensors", "bin")]
    if not any(forms):
        return None
    if not base.startswith(STEMS):
        return OTHER
    plain = re.fullmatch(r"\w+(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?", base)
    return 2 * forms.index(True) + (plain is None)
