"""Models by their id: downloaded once into the cache folder, and found there again, with a network or without.

A repository's folder, `models--OWNER--NAME`, is laid out as the hub's own client lays out its cache:

    blobs/CHECKSUM            a file's content; CHECKSUM.partial while it is under way (`download`)
    snapshots/COMMIT/PATH     a link to it
    refs/REVISION             the commit at which a branch or a tag stood when it was last asked for
    listings/COMMIT.json      the names of all files of a commit: without them nobody could say whether a snapshot is
                              whole
"""

import contextlib
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from diffjax.utils import files
from diffjax.utils.errors import UserError
from diffjax.weights import download, published
from diffjax.weights.folder import belongs, check_variant, choose, forms, forms_within, is_weights, nothing

ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
COMMIT = re.compile(r"[0-9a-f]{40}")
SHORT = re.compile(r"[0-9a-f]{7,39}")
RUNS = "runs"
"""The folder in which the documentation keeps runs."""

PATTERNS = ("*.json", "*.txt", "*.model", "*.safetensors", "*.bin")
"""Configurations, tokenizers and weights."""

JSON = ("*.json",)


class Fetched(NamedTuple):
    """A folder that holds the files, and the commit they are of (`None` for a folder of the user's own)."""

    folder: Path
    revision: str | None


def fetch(
    name: str | Path, revision: str | None = None, patterns: Sequence[str] = PATTERNS, variant: str | None = None
) -> Fetched:
    """The folder of a model: `name` itself when it exists, else the cached files of that hub id.

    `revision` is a branch, a tag or a commit; None is the newest. Of the repository's files those that match `patterns`
    are downloaded, and of several forms of the same weights the one that `folder.choose` chooses. A commit that is in
    the cache asks nobody; with HF_HUB_OFFLINE=1, or where the hub does not answer, what is cached is used. Raises
    `UserError` saying what to do when the model is not there, not cached, or behind a licence, and for a `variant` that
    it has not.
    """
    path = Path(name).expanduser()
    if str(name) and path.exists():
        check_variant(variant, forms_within(path), str(name))
        return Fetched(path, None)
    _refuse_a_path(str(name))
    repo = Repo(str(name), revision or "main", tuple(patterns), variant)
    if COMMIT.fullmatch(repo.revision) and (cached := repo.cached()) and not repo.absent(*cached):
        return Fetched(*cached)
    return repo.offline() if _is_off() else repo.online()


def configs(
    name: str | Path, revision: str | None = None, patterns: Sequence[str] = JSON, variant: str | None = None
) -> Path:
    """The folder of a model's configurations. Those of well-known models come with the package, and ask no network.

    What exists as a folder, and what was downloaded, goes before them; so does asking for a revision or a variant.
    Raises `UserError` as `fetch` does.
    """
    packaged = published.folder(str(name))
    if packaged is None or revision or variant or Path(name).expanduser().exists():
        return fetch(name, revision, patterns, variant).folder
    cached = Repo(str(name), "main", tuple(patterns), None)
    with contextlib.suppress(UserError):
        return cached.offline().folder
    return packaged


def no_run(path: Path) -> UserError:
    """The error for the name of a run that is not there; it names those beside it."""
    runs = _runs_beside(path)
    there = f", or name one of {', '.join(runs[:5])}" if runs else ""
    return UserError(f"there is no run {path}: train one with `diffjax train --workdir {path}`{there}")


def _runs_beside(path: Path) -> list[str]:
    return sorted(str(run.parent) for run in path.parent.glob("*/run.json"))


def _refuse_a_path(name: str) -> None:
    """Raise `UserError` for what is no hub id: a path, or the name of a run that is not there."""
    path = Path(name)
    if path.parts[:1] == (RUNS,) or (path.parent != Path() and _runs_beside(path)):
        raise no_run(path)
    if path.is_absolute() or name.startswith((".", "~")) or not ID.fullmatch(name):
        raise UserError(f"there is no folder {name}; give an existing folder or a hub id such as google/ddpm-cat-256")


def _is_off() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


@dataclass(frozen=True)
class Repo:
    """What is wanted of a repository of the hub."""

    name: str
    revision: str
    patterns: tuple[str, ...]
    variant: str | None

    @property
    def folder(self) -> Path:
        """Where it is kept."""
        return files.home() / "hub" / f"models--{self.name.replace('/', '--')}"

    def snapshot(self, commit: str) -> Path:
        """The folder of a commit's files."""
        return self.folder / "snapshots" / commit

    def online(self) -> Fetched:
        """Asks which commit is meant and which files it has, and downloads those that are missing."""
        try:
            commit, names = self.ask()
        except Refused as refused:
            return self.instead(refused)
        wanted = self.needed(names)
        try:
            with _calls(self):
                download.download_files(self.name, commit, wanted, self.folder)
        except Refused as refused:
            raise UserError(str(refused)) from None
        self.note(commit, names)
        return Fetched(self.snapshot(commit), commit)

    def ask(self) -> tuple[str, list[str]]:
        """The commit of the revision, and the names of its files."""
        import huggingface_hub
        from huggingface_hub import constants

        with _calls(self):
            info = huggingface_hub.HfApi().model_info(
                self.name, revision=self.revision, timeout=constants.HF_HUB_ETAG_TIMEOUT
            )
        names = [file.rfilename for file in info.siblings or ()]
        if info.sha is None or not COMMIT.fullmatch(info.sha) or any(_leaves(name) for name in names):
            raise UserError(f"what the hub says of {self.name} makes no sense: check HF_ENDPOINT and the proxy")
        return info.sha, names

    def instead(self, refused: "Refused") -> Fetched:
        """The cached files of an earlier answer, with a warning; raises `UserError` where there are none."""
        cached = None if refused.final else self.cached()
        if cached is None or self.absent(*cached):
            raise UserError(str(refused)) from None
        warnings.warn(f"the copy of {self.name} in the cache is used, commit {cached[1]}, for {refused}", stacklevel=2)
        return Fetched(*cached)

    def offline(self) -> Fetched:
        """The cached files. Raises `UserError` where they are not all there."""
        cached = self.cached()
        asked = self.name if self.revision == "main" else f"{self.name} at {self.revision}"
        if cached is None:
            near = published.suggestion(self.name)
            raise UserError(
                f"{asked} is not in {self.folder.parent} and the hub is off (HF_HUB_OFFLINE); unset it once to "
                f"download, or give a folder{near}"
            )
        if absent := self.absent(*cached):
            raise UserError(
                f"{asked} is in {self.folder.parent} in part: {len(absent)} of its files are missing, as {absent[0]}; "
                "unset HF_HUB_OFFLINE and run this again to go on"
            )
        return Fetched(*cached)

    def cached(self) -> tuple[Path, str] | None:
        """The snapshot that the revision means, as far as is known here, and its commit."""
        ref = self.folder / "refs" / self.revision
        commit = ref.read_text().strip() if not _leaves(self.revision) and ref.is_file() else self.revision
        if SHORT.fullmatch(commit) or commit == "main":
            found = [path.name for path in self.snapshot("").glob("*" if commit == "main" else f"{commit}*")]
            commit = found[0] if len(found) == 1 else commit
        there = COMMIT.fullmatch(commit) and self.snapshot(commit).is_dir()
        return (self.snapshot(commit), commit) if there else None

    def absent(self, snapshot: Path, commit: str) -> list[str]:
        """The files that a snapshot lacks; without a listing, what is there counts as all."""
        listing = self.folder / "listings" / f"{commit}.json"
        if listing.is_file():
            names = json.loads(listing.read_text())
        else:
            names = [str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_file()]
        return [name for name in self.needed(names) if not (snapshot / name).is_file()]

    def needed(self, names: Sequence[str]) -> list[str]:
        """`needed` of this repository. Raises `UserError` when it has not the variant, no weights that can be read,
        or nothing.
        """
        wanted = needed(names, self.patterns, self.variant, self.name)
        found = [form for folder in _folders(names) for form in forms(_inside(names, folder))]
        check_variant(self.variant, found, self.name)
        if self.patterns == PATTERNS and not found:
            raise UserError(f"{self.name} {nothing(os.path.basename(name) for name in names)}")
        if not wanted:
            listed = ", ".join(sorted(names)[:5]) or "nothing"
            raise UserError(
                f"{self.name} has no file {' or '.join(self.patterns)}; it holds {listed}; name the file itself"
            )
        return wanted

    def note(self, commit: str, names: Sequence[str]) -> None:
        """Keep what the hub said, for when it cannot be asked; a cache that cannot be written serves as it is."""
        notes = {self.folder / "listings" / f"{commit}.json": json.dumps(sorted(names))}
        if not COMMIT.fullmatch(self.revision) and not _leaves(self.revision):
            notes[self.folder / "refs" / self.revision] = commit
        for path, text in notes.items():
            if not path.is_file() or path.read_text() != text:
                with contextlib.suppress(UserError):
                    files.write_atomic(path, text.encode())


class Refused(Exception):
    """Why the hub gave nothing, in one line; `final` where an earlier answer does not help."""

    def __init__(self, line: str, final: bool = False):
        super().__init__(line)
        self.final = final


@contextlib.contextmanager
def _calls(repo: Repo) -> Iterator[None]:
    """Calls of the hub: their errors become `Refused`, and what its client says beside is not shown."""
    from huggingface_hub import errors

    logger = logging.getLogger("huggingface_hub")
    level, name = logger.level, repo.name
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except errors.GatedRepoError:
        raise Refused(
            f"{name} wants its licence accepted: do so on the model's page, then `hf auth login`, or set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise Refused(
            f"{name} has no revision {repo.revision}; leave --revision out for the newest", final=True
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise _unknown(name) from None
    except (errors.HTTPError, OSError, ValueError, RuntimeError, ImportError) as error:  # pyright: ignore[reportPrivateImportUsage]
        raise _unreachable(name, error) from None
    finally:
        logger.setLevel(level)


def _unknown(name: str) -> Refused:
    near = published.suggestion(name)
    return Refused(
        f"there is no folder {name}, and the hub knows no model of that name, or it is private: check the name, or log "
        f"in with `hf auth login` or HF_TOKEN{near}"
    )


def _unreachable(name: str, error: Exception) -> Refused:
    """The error of a network that is not there, an answer that is none, or a disk that is full."""
    if isinstance(error, OSError) and error.errno is not None:
        folder = files.home() / "hub"
        return Refused(f"cannot write {folder}: {error.strerror}; free some space, or set DIFFJAX_HOME", final=True)
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if response is not None and status == 401 and "Invalid credentials" in response.headers.get("X-Error-Message", ""):
        return Refused(
            "the hub does not know this token: log in anew with `hf auth login`, or set HF_TOKEN to a valid one"
        )
    if status == 401:
        return _unknown(name)
    if status == 403:
        return Refused(
            f"the hub does not let this login have {name}: accept its licence on the model's page, and use a token "
            "that may read it"
        )
    told = " ".join(str(error).split()) or type(error).__name__
    reason = f"HTTP {status}" if status else told[:150]
    near = published.suggestion(name)
    return Refused(
        f"{name} is no folder here and could not be downloaded ({reason}): run the same command again to go on, or "
        f"give a folder{near}"
    )


def needed(
    names: Sequence[str], patterns: Sequence[str] = PATTERNS, variant: str | None = None, where: str = "the model"
) -> list[str]:
    """Of a repository's files, those to download: matching `patterns`, and one form of each folder's weights.

    Left out: weights by other names than the libraries' own, unless a pattern is that very name, and folders within
    folders (checkpoints of a training). Raises `UserError` as `folder.choose` does.
    """
    names = [name for name in names if name.count("/") < 2 and any(fnmatch(name, pattern) for pattern in patterns)]
    found = [name for name in names if name in patterns or not is_weights(name)]
    for folder in _folders(names):
        inside = _inside(names, folder)
        if form := choose(forms(inside), variant, f"{where}/{folder}".rstrip("/")):
            found += [os.path.join(folder, name) for name in inside if belongs(name, form)]
    return sorted(set(found))


def _folders(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(os.path.dirname(name) for name in names))


def _inside(names: Sequence[str], folder: str) -> list[str]:
    return [os.path.basename(name) for name in names if os.path.dirname(name) == folder]


def _leaves(name: str) -> bool:
    """Whether a path leads out of the folder that it is joined to."""
    return os.path.isabs(name) or ".." in name.split("/")
