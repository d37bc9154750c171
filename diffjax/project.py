"""Around the package: a folder to work in, and what an extra needs."""

import shlex
from pathlib import Path

from diffjax import config
from diffjax.utils.errors import UserError

IGNORED = "runs/\ndrawn/\npictures/\n__pycache__/\n"


def create(folder: str | Path) -> str:
    """Write the experiments and a .gitignore into a folder, and say what to do there. What is there alike is left.

    Raises `UserError` when a file is there and another one, before anything is written, and when the folder cannot
    be written.
    """
    folder, source = Path(folder), config.experiments()
    texts = {
        Path(config.EXPERIMENTS, file.relative_to(source)): file.read_text() for file in sorted(source.rglob("*.py"))
    }
    texts[Path(".gitignore")] = IGNORED
    try:
        if other := [
            name for name, text in texts.items() if (folder / name).exists() and (folder / name).read_text() != text
        ]:
            raise UserError(f"{folder / other[0]} is there and another one: choose an empty folder")
        for name, text in texts.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
    except OSError as error:
        raise UserError(f"cannot write {error.filename}: {error.strerror}; choose another folder") from error
    return (
        f"{folder / config.EXPERIMENTS} holds {len(texts) - 1} experiments; go on with\n"
        f"  cd {shlex.quote(str(folder))}\n"
        "  diffjax config --config experiments/emoji.py      # every field, with its meaning\n"
        "  diffjax train --config experiments/emoji.py --workdir runs/emoji"
    )
