"""What a job will cost, said before it runs: parameters, bytes, memory, floating-point operations and time.

A job is a list of parts: programs, and how often each is called. They are traced on shapes: of a model's files only the
configurations are read, and nothing is computed.
"""

from diffjax.plan import latent
from diffjax.plan.figures import Part, compiled_bytes, estimate, live_bytes, tree_bytes, tree_size
from diffjax.plan.jobs import Asked, Job, experiment, published, run
from diffjax.plan.report import duration, peak, report
from diffjax.weights import hub


def model(name: str, asked: Asked) -> list[Job]:
    """The job of drawing with a published model: a folder, or a hub id, of which only JSON files are fetched.

    Raises `UserError` as `diffjax.load` does.
    """
    folder = hub.fetch(name, patterns=("*.json",)).folder
    return [latent.drawing(folder, asked, name) if (folder / "transformer").is_dir() else published(folder, asked, name)]
