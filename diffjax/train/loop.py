"""The training loop: take a config, go on from the last checkpoint, step, and say what happens."""

import contextlib
import functools
import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Key, PyTree
from ml_collections import ConfigDict

import diffjax.data
from diffjax import build, config as configs, user_code
from diffjax.data.pipeline import Prefetch
from diffjax.parallel import devices, hosts, layout
from diffjax.train import record, sanity, transfer
from diffjax.train.checkpoint import Checkpoints, check_place
from diffjax.train.experiment import Experiment, check_conditions
from diffjax.train.finetune import FineTuning
from diffjax.train.metrics import Log, Pending, check_installed
from diffjax.train.parallel import Parallel, by_jit, by_pmap
from diffjax.train.state import State, create
from diffjax.train.step import Step
from diffjax.utils import files, seeds
from diffjax.utils.errors import UserError
from diffjax.utils.interrupt import Stop, stop_on_signal

WAYS = {"jit": by_jit, "pmap": by_pmap}


def train(config: ConfigDict, workdir: str | Path, allow_change: bool = False) -> None:
    """Train `config` in `workdir` up to `config.train.steps`, from the last checkpoint there if there is one.

    Stopped at any moment, even by `kill -9`, the same call goes on with the same numbers, bit for bit. Ctrl-C and
    SIGTERM save and then raise `KeyboardInterrupt`. With more steps than before a finished run goes on; its learning
    rates follow the new length. With `allow_change` a run goes on with another config or other data, as far as its
    state fits them; what has changed is printed and kept in `WORKDIR/changes.json`. A new run with `config.init_from`
    begins as `transfer.start` says.

    Raises `UserError` for a config that cannot be, a workdir that holds another run, and a loss that is not finite.
    """
    workdir = files.local(workdir)
    config = configs.settle(configs.complete(config), workdir)
    check(config)
    with contextlib.ExitStack() as stack:
        claimed = record.claim(workdir, config, allow_change)
        hosts.first(lambda: stack.enter_context(claimed))
        seen_by_all(workdir)
        checkpoints = Checkpoints(workdir, config.train.keep_last, config.train.keep_best)
        stack.callback(checkpoints.close)
        done = checkpoints.last() or 0
        if not done:
            check_place(workdir)
            hosts.first(lambda: record.forget_facts(workdir))
        if done >= config.train.steps and not checkpoints.damage(done):
            finished = f"{workdir} is finished: {done} of {config.train.steps} steps are done"
            hosts.say(f"{finished}; raise train.steps to go on")
            return
        hosts.first(lambda: user_code.keep(config, workdir))
        experiment = hosts.in_turn(lambda: begun(config, workdir))
        parallel = split(config, experiment.step())
        batches = Prefetch(experiment.batches(parallel.share), functools.partial(place, parallel, experiment))
        stack.callback(batches.close)
        state, done = first_state(experiment, workdir, parallel, checkpoints, batches, allow_change)
        batch, _ = batches.peek()
        with experiment.fitting():
            parallel.step.lower(state, batch)
        log = stack.enter_context(Log(workdir, config, done, lambda step: float(np.asarray(experiment.schedule(step)))))
        Training(experiment, workdir, parallel, batches, checkpoints, log, state, done).run()


@dataclass
class Training:
    """A run under way: `state`, on the devices, is what `done` steps have made of the parameters.

    It is None while a step may spoil it, and for good once one has. The newest checkpoint is that of step `saved`.
    """

    experiment: Experiment
    workdir: Path
    parallel: Parallel
    batches: Prefetch
    checkpoints: Checkpoints
    log: Log
    state: State | None
    done: int

    def __post_init__(self):
        self.saved = self.done

    def run(self) -> None:
        """Step to the end, logging, saving and drawing when they are due, or until a signal asks to stop.

        However it ends, all steps that are done are in a checkpoint.
        """
        every = self.experiment.config.train
        with self.log.compiling():
            self.parallel.step.lower(self.state, self.batches.peek()[0]).compile()
        vote = hosts.Vote()
        with stop_on_signal() as stop, self.saving():
            leave = stop.is_set if hosts.count() == 1 else lambda: False  # the others count on this host's batch
            stopping = False
            while not stopping and self.done < every.steps and self.batches.wait(leave):
                self.advance()
                stopping = vote.ask(stop.is_set())
                if self.due(every.log_every):
                    self.flush()
                if self.due(every.save_every):
                    self.save()
                if self.due(every.preview_every) and not stopping:
                    self.show(stop)
            if stopping:
                stop.take(signal.SIGTERM)

    def due(self, every: int) -> bool:
        """Whether what is done every so many steps, 0 for never, and at the end, is due."""
        return self.done == self.experiment.config.train.steps or bool(every and self.done % every == 0)

    def held(self) -> State:
        """The state between two steps."""
        assert self.state is not None, "the last step failed"
        return self.state

    def advance(self) -> None:
        """Start the next step."""
        batch, rows = next(self.batches)
        state, self.state = self.held(), None
        self.state, values = self.parallel.step(state, batch)
        self.done += 1
        self.log.add(self.done, rows, values)

    def flush(self) -> None:
        """Wait for the steps and log them. Raises `UserError` when one is not finite."""
        if broken := self.log.flush():
            self.state = None
            raise not_finite(broken, self.workdir, self.checkpoints)

    def save(self) -> None:
        """Begin to write a checkpoint, unless there is one of this step."""
        if self.saved == self.done:
            return
        self.flush()
        self.checkpoints.save(
            self.parallel.gather(self.held()), self.batches.get_state().decode(), self.log.mean_loss()
        )
        self.saved = self.done

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """A block after which all that is done is in a checkpoint that is wholly written, even if it fails, where this
        can be.
        """
        try:
            yield
        except Exception:
            if self.state is not None and hosts.count() == 1:
                with contextlib.suppress(Exception):
                    self.save()
                    self.checkpoints.last()
            raise
        self.save()
        self.checkpoints.last()

    def show(self, stop: Stop) -> None:
        """Draw the preview and the sanity panel; what cannot be shown is said and does not end the training. Of several
        hosts, the first one draws.
        """
        frozen, ema = self.parallel.own((self.held().frozen, self.held().ema))
        if hosts.index():
            return
        experiment = self.experiment.holding(frozen)
        try:
            self.log.preview(self.done, experiment.preview(ema))
            if experiment.seen and not stop.is_set():  # pictures, not latents
                self.log.sanity(self.done, sanity.look(experiment, ema))
        except UserError as error:
            self.log.terminal.say(f"step {self.done}: no preview: {error}")


def begun(config: ConfigDict, workdir: Path) -> Experiment:
    """The experiment of a run that begins or goes on; rehearsed first where its data are still to be prepared, which
    takes longer than to find by its first step what does not go together.
    """
    if "model" in config:
        return FineTuning.begin(config, workdir, diffjax.data.load(config.data))
    return Experiment.begin(
        config, workdir, diffjax.data.load(config.data, lambda: Experiment.before_data(config).rehearse())
    )


def check(config: ConfigDict) -> None:
    """Raises `UserError` for an experiment that cannot be trained here, and for numbers that no run can have."""
    if "train" not in config:
        raise UserError("this experiment has nothing to train: `diffjax sample --config` draws with it")
    if "data" not in config:
        raise UserError("the config has no data: add it, a table such as {'name': 'openmoji'}")
    check_installed(config)
    build.named("train.parallel", WAYS, config.train.parallel)
    check_conditions(config)
    layout.check_batch(config.train.batch, config.train.accumulate, mesh(config))


def mesh(config: ConfigDict) -> Mesh:
    """The devices as `config.train` splits them. Raises `UserError` where it cannot."""
    shard, replicas = config.train.shard, config.train.replicas
    if config.train.parallel == "pmap" and (shard != "data" or replicas != 1):
        raise UserError(f"train.parallel=pmap cannot split a state (train.shard={shard}): set train.parallel=jit")
    if config.train.offload:
        check_offload(config)
    return layout.mesh(shard, replicas, list(devices.data_mesh().devices.flat))


def check_offload(config: ConfigDict) -> None:
    """Raises `UserError` where devices do not reach the memory of their host, or `pmap` would."""
    if config.train.parallel == "pmap":
        raise UserError("train.parallel=pmap keeps nothing in the memory of hosts: set train.parallel=jit")
    kinds = {memory.kind for memory in jax.local_devices()[0].addressable_memories()}
    if layout.HOST not in kinds:
        raise UserError(f"{devices.describe()} reaches no memory of its host: set train.offload=False")


def split(config: ConfigDict, step: Step) -> Parallel:
    """The step on the devices, as `config.train` splits them."""
    if config.train.parallel == "pmap":
        return by_pmap(step, mesh(config))
    return by_jit(step, mesh(config), layout.RULES[config.train.shard], config.train.offload)


def seen_by_all(workdir: Path) -> None:
    """Raises `UserError` where the folder that the first host has claimed is not what another one sees by its name."""
    if hosts.count() == 1:
        return
    token = hosts.first(lambda: json.loads((workdir / "run.json").read_text())[-1])
    own = workdir / "run.json"
    if not hosts.everywhere(own.exists() and json.loads(own.read_text())[-1] == token):
        raise UserError(
            f"not every host sees {workdir} as the first one does: choose a --workdir that all of them share"
        )


def place(
    parallel: Parallel, experiment: Experiment, batch: dict[str, np.ndarray]
) -> tuple[dict[str, Any], np.ndarray]:
    """What the step reads of a batch, on the devices, and the record numbers of its rows."""
    return parallel.feed({name: batch[name] for name in experiment.reads}), batch["index"]


def first_state(
    experiment: Experiment,
    workdir: Path,
    parallel: Parallel,
    checkpoints: Checkpoints,
    batches: Prefetch,
    allow_change: bool,
) -> tuple[State, int]:
    """The state to start from, on the devices, and its step; a restored one moves `batches` to where it was."""
    config = experiment.config
    init_key, key = jax.random.split(seeds.key(config.seed))
    new = lambda params: create(params, experiment.optimizer, key)
    restored = None
    if checkpoints.last() is not None:
        restored = checkpoints.restore(jax.eval_shape(lambda: new(experiment.init(init_key))))
    frozen = parallel.place(experiment.frozen_params)
    if restored is None:
        return replace(new_state(experiment, workdir, parallel, new, init_key), frozen=frozen), 0
    state, position = restored
    changed = batches.set_state(position.encode(), allow_change)
    if changed and hosts.index() == 0:
        record.note(workdir, changed)
    step = int(state.step)
    hosts.say(f"going on from step {step} of {config.train.steps}")
    return replace(parallel.place(state), frozen=frozen), step


def new_state(
    experiment: Experiment, workdir: Path, parallel: Parallel, new: Callable[[PyTree], State], key: Key[Array, ""]
) -> State:
    """The state `new(params)` of the parameters that a run begins with, made where it will lie."""
    config = experiment.config
    if "model" in config:
        params = experiment.init(key)
    elif config.get("init_from"):
        made = jax.device_get(parallel.own(parallel.create(experiment.init, key)))
        params = hosts.in_turn(lambda: transfer.start(made, experiment, config.init_from, workdir))
    else:
        with experiment.fitting():
            return parallel.create(lambda key: new(experiment.init(key)), key)
    with experiment.fitting():
        return parallel.create(new, parallel.place(params))


def not_finite(broken: Pending, workdir: Path, checkpoints: Checkpoints) -> UserError:
    """The error that ends a run whose loss or gradient is not finite; `not_finite.json` lists the batch."""
    numbers = {name: float(broken.values[name]) for name in ("loss", "grad_norm")}
    path = workdir / "not_finite.json"
    found = {"step": broken.step, **{k: str(v) for k, v in numbers.items()}, "records": broken.rows.tolist()}
    if hosts.index() == 0:
        files.write_json(path, found)
    good = checkpoints.last()
    return UserError(
        f"step {broken.step}: the loss is {numbers['loss']:g} and the gradient's norm {numbers['grad_norm']:g}, on the"
        f" records {', '.join(map(str, broken.rows[:8]))}, ... (all in {path}); the last good checkpoint is"
        f" {'none' if good is None else f'step {good}'}; lower the learning rate and train in another --workdir"
    )
