"""Gradient descent beside its gradient flow and its central flow: the three from one start, through time."""

import time
from typing import Any, NamedTuple

import jax
import numpy as np

import rk_optax
from rk_optax import spectrum
from rk_optax.experiment.config import FlowConfig, checked
from rk_optax.experiment.errors import require
from rk_optax.experiment.runs.progress import ProgressBar
from rk_optax.experiment.runs.protocol import piece
from rk_optax.experiment.store.checkpoints import Checkpoints
from rk_optax.experiment.store.run_folder import RunFolder
from rk_optax.experiment.tasks.supervised import build_task
from rk_optax.experiment.tasks.task import Params

DESCENT = "gradient_descent"


class Followed(NamedTuple):
    """One of the three, at the saved times."""

    name: str
    steps: np.ndarray  # (time,) of gradient descent
    times: np.ndarray  # (time,)
    loss: np.ndarray  # (time,)
    eigenvalues: np.ndarray  # (time, eigenvalue) the largest of the Hessian, descending
    distance: np.ndarray  # (time,) ‖θ − θ of gradient descent‖
    accepted: int
    refused: int
    gradients: int
    products: int
    seconds: float  # compilation included

    @property
    def sharpness(self) -> np.ndarray:
        """The largest eigenvalue of the Hessian at every time."""
        return self.eigenvalues[:, 0]


class FlowStudy:
    """Follows full-batch gradient descent, its gradient flow and its central flow from one start.

    Shows their sharpness beside 2/h, their losses and their distances through time.

    Attributes:
        loss_fn, params, data: the loss, `loss_fn(params, **data)`, where all three start, and all its examples.
        times: where they are looked at, multiples of the learning rate.
        flows: by name, what `rk_optax.gradient_flow` is told to follow each with.
    """

    def __init__(self, config: FlowConfig):
        """Loads the data and builds the network."""
        self.config = checked(config)
        task = build_task(config.data, config.model)
        start = task.init(config.seed)
        require(
            not start.statistics,
            f"model.name = {config.model.name!r} keeps statistics of its batches, so that its loss is no function of "
            "the parameters alone: take another network",
        )
        enough = config.examples is None or config.examples <= task.examples
        require(enough, f"examples = {config.examples} is more than the {task.examples} training examples")
        self.loss_fn = task.loss_fn
        self.params: Params = jax.tree.map(lambda leaf: config.initial_scale * leaf, start.params)
        self.data = {name: part[: config.examples] for name, part in task.source._asdict().items()}
        h = config.learning_rate
        self.times = h * np.arange(0, config.steps + 1, config.save_every)
        self.flows: dict[str, dict[str, Any]] = {
            DESCENT: {"solver": "euler", "step_size": h},
            "gradient_flow": {"solver": "tsit5", "rtol": config.rtol, "atol": config.atol},
            "central_flow": {
                "solver": rk_optax.CentralFlow(h, k=config.edge_eigenvalues),
                "step_size": h / config.central_steps,
            },
        }

    def follow(self, name: str, **options: Any) -> rk_optax.Flow:
        """One of the three, by `rk_optax.gradient_flow`, which takes the further options."""
        save = {"params": "params", "loss": "loss", "eigenvalues": self._eigenvalues}
        batches = self.config.micro_batch
        common = {"save": save, "data": self.data, "batches": batches, "max_steps": None}
        return rk_optax.gradient_flow(self.loss_fn, self.params, self.times, **self.flows[name], **common, **options)

    def run(self, folder: RunFolder, report: ProgressBar) -> list[Followed]:
        """Follows the three, each from its latest checkpoint in the folder or else from the start."""
        self._folder, self._report, self._descent = folder, report, None
        end = float(self.times[-1])
        report.start(end * len(self.flows))
        return [piece(folder, report, Followed, name, end, self._followed, name) for name in self.flows]

    def measured(self, name: str, flow: rk_optax.Flow, descent: rk_optax.Flow, seconds: float = np.nan) -> Followed:
        """What a whole flow that `follow` returned shows, beside that of gradient descent."""
        return Followed(
            name=name,
            steps=np.arange(0, self.config.steps + 1, self.config.save_every),
            times=self.times,
            loss=np.asarray(flow.values["loss"], float),
            eigenvalues=np.asarray(flow.values["eigenvalues"], float),
            distance=np.linalg.norm(_rows(flow) - _rows(descent), axis=1),
            accepted=int(flow.accepted),
            refused=int(flow.refused),
            gradients=int(flow.cost.gradients),
            products=int(flow.cost.products),
            seconds=seconds,
        )

    def _followed(self, name: str) -> Followed:
        flow, seconds = self._through(name)
        if name == DESCENT:
            self._descent = flow
        elif self._descent is None:  # a resumed run, which has been there
            self._descent = self._through(DESCENT, again=True)[0]
        followed = self.measured(name, flow, self._descent, seconds)
        columns = {"steps": followed.steps, "time": followed.times, "loss": followed.loss}
        columns |= {"sharpness": followed.sharpness, "distance": followed.distance}
        for row in zip(*columns.values(), strict=True):
            self._folder.log(name, flow=name, **dict(zip(columns, row, strict=True)))
        return followed

    def _through(self, name: str, *, again: bool = False) -> tuple[rk_optax.Flow, float]:
        """The flow to its end and its seconds, with checkpoints on the way; `again` where its work has been counted."""
        title, path = name.replace("_", " "), self._folder.path / "checkpoints" / name
        self._report.phase(title)
        path.parent.mkdir(exist_ok=True)
        with Checkpoints(path, keep=2) as checkpoints:
            restored = checkpoints.restore(lambda _: jax.eval_shape(lambda: self.follow(name).state))
            _, before, state = restored or (0, 0.0, None)
            began, done = time.perf_counter(), 0.0 if state is None else float(state.elapsed)
            self._report.advance(0 if again else done)

            def progress(flow: rk_optax.Flow) -> None:
                nonlocal done
                checkpoints.save(int(flow.state.attempts), before + time.perf_counter() - began, flow.state)
                self._report.advance(0 if again else float(flow.time) - done)
                done = float(flow.time)
                self._report.phase(f"{title}, t = {done:.4g}")

            flow = self.follow(name, state=state, progress=progress, steps_per_call=self.config.checkpoint_every)
        require(
            flow.result == rk_optax.FlowResult.REACHED_END,
            f"{title} ended at t = {float(flow.time):.4g} of {self.times[-1]:.4g}: "
            f"{rk_optax.FlowResult(int(flow.result)).message}; lower learning_rate or initial_scale",
        )
        return flow, before + time.perf_counter() - began

    def _eigenvalues(self, t: jax.Array, params: Params) -> jax.Array:
        options: dict[str, Any] = {"data": self.data, "batches": self.config.micro_batch, "tolerance": 1e-3}
        return spectrum.eigenpairs(self.loss_fn, params, self.config.eigenvalues, **options).values


def _rows(flow: rk_optax.Flow) -> np.ndarray:
    """The saved parameters (time, parameter)."""
    leaves = [np.asarray(leaf, float) for leaf in jax.tree.leaves(flow.values["params"])]
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)
