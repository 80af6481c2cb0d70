import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rk_optax
from rk_optax.experiment.config import DataConfig, ModelConfig, TrainOptimizerConfig
from rk_optax.experiment.entrants import build_optimizer
from rk_optax.experiment.errors import UsageError
from rk_optax.experiment.runs.train import Training
from rk_optax.experiment.tasks.data import batch_indices, load_dataset
from rk_optax.experiment.tasks.models import build_model
from rk_optax.experiment.tasks.supervised import METRICS, probe_loss
from rk_optax.linen import TrainState

from ..helpers import TRAIN, read_metrics, run_command, strict_loads, without_time, write_train_config


def changed(**changes):
    """The smoke configuration with fields replaced; `data__name` is a field of `data`."""
    config = TRAIN
    for path, value in changes.items():
        part, _, field = path.rpartition("__")
        if part:
            value = dataclasses.replace(getattr(config, part), **{field: value})
        config = dataclasses.replace(config, **{part or field: value})
    return config


@pytest.mark.slow
def test_metrics(finished):
    metrics = read_metrics(finished)
    assert [record["steps"] for record in metrics] == list(range(0, 25, 4))
    assert [record["gradients"] for record in metrics] == list(range(0, 49, 8))
    assert metrics[4]["epochs"] == pytest.approx(16 / 18)
    assert metrics[0]["train_loss"] is None
    assert metrics[-1]["validation_loss"] < metrics[0]["validation_loss"]
    assert metrics[-1]["train_loss"] < metrics[1]["train_loss"]
    assert all(0 <= record[f"{split}_accuracy"] <= 1 for record in metrics for split in ("validation", "test"))
    assert np.all(np.diff([record["seconds"] for record in metrics]) > 0)


@pytest.mark.slow
def test_the_last_few_checkpoints_are_kept(finished):
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == ["16", "20", "24"]


@pytest.mark.slow
def test_agrees_with_a_loop_over_our_train_state(finished):
    """The oracle: the README's loop with `rk_optax.linen.TrainState`, one jitted step after the other."""
    data, config = load_dataset(TRAIN.data), TRAIN
    model = build_model(config.model, 10)
    variables = model.init(jax.random.key(0), data.train.images[:1])
    key = jax.random.fold_in(jax.random.key(0), 0x64726F70)

    def loss_fn(params, batch_stats, x, y, dropout_key):
        logits, new = model.apply(
            {"params": params, "batch_stats": batch_stats},
            x,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": dropout_key},
        )
        penalty = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, y)
        return losses.mean() + 0.5 * config.model.l2 * penalty, new["batch_stats"]

    class State(TrainState):
        batch_stats: dict

    warm, decay = optax.linear_schedule(0.0, 0.1, 2), optax.cosine_decay_schedule(0.1, 22)
    tx = rk_optax.heun(loss_fn, optax.join_schedules([warm, decay], [2]), momentum=0.9, has_aux=True)
    state = State.create(apply_fn=model.apply, params=variables["params"], tx=tx, batch_stats=variables["batch_stats"])

    @jax.jit
    def step(state, x, y):
        batch = {"batch_stats": state.batch_stats, "x": x, "y": y, "dropout_key": jax.random.fold_in(key, state.step)}
        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, **batch)
        return state.apply_gradients(grads=grads, data=batch, batch_stats=stats), loss

    losses = []
    for batch in batch_indices(0, len(data.train.labels), 63, 0, 24):
        state, loss = step(state, data.train.images[batch], data.train.labels[batch])
        losses.append(float(loss))
    metrics = read_metrics(finished)
    found = [record["train_loss"] for record in metrics[1:]]
    np.testing.assert_allclose(found, np.reshape(losses, (-1, 4)).mean(axis=1), rtol=2e-4)
    logits = model.apply({"params": state.params, "batch_stats": state.batch_stats}, data.test.images)
    accuracy = float(np.mean(np.argmax(logits, -1) == data.test.labels))
    assert metrics[-1]["test_accuracy"] == pytest.approx(accuracy, abs=1.5 / len(data.test.labels))


def wind_back(run, step):
    """Removes the checkpoints after a step, as if the run had been killed before them."""
    for checkpoint in (run / "checkpoints").iterdir():
        if checkpoint.is_dir() and int(checkpoint.name) > step:
            shutil.rmtree(checkpoint)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("step", [0, 16])
def test_a_resumed_run_equals_an_uninterrupted_one(finished, run, step):
    wind_back(run, step)
    metrics = run / "metrics.jsonl"
    if step == 16:  # killed while it wrote a line, and while it wrote a checkpoint
        metrics.write_bytes(b"".join(metrics.read_bytes().splitlines(keepends=True)[:6])[:-30])
        (run / "checkpoints" / "20.orbax-checkpoint-tmp").mkdir()
    config = (run / "config.json").read_bytes()
    status, _, err = run_command("train", "--resume", run)
    assert (status, err) == (0, "")
    assert without_time(read_metrics(run)) == without_time(read_metrics(finished))
    assert (run / "config.json").read_bytes() == config
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["16", "20", "24"]


def test_the_clock_goes_on(run):
    wind_back(run, 20)
    before = read_metrics(run)[5]["seconds"]
    assert run_command("train", "--resume", run)[0] == 0
    metrics = read_metrics(run)
    assert metrics[5]["seconds"] == before
    assert metrics[6]["seconds"] > before


def test_a_finished_run_may_be_resumed(finished, run):
    status, out, _ = run_command("train", f"--resume={run}")
    assert status == 0
    assert out.startswith("24 steps, 48 gradients, ")
    assert read_metrics(run) == read_metrics(finished)


def test_the_stored_config_governs(run, tmp_path):
    wind_back(run, 16)
    path = write_train_config(tmp_path / "tiny.py")
    assert run_command("train", path, "--resume", run)[0] == 0
    status, out, err = run_command("train", path, "--resume", run, "--optimizer.learning-rate", "0.2")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert f"{run} holds a run with optimizer.learning_rate = 0.1, not 0.2" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "name a config file right after train"),
        (["--out", "x"], "name a config file right after train"),
        (["--resume"], "--resume takes the folder of a run and nothing else"),
        (["--resume", "x", "--steps", "3"], "--resume takes the folder of a run and nothing else"),
        (["--resume", "nowhere"], "nowhere holds no run to resume: start one with --out nowhere"),
    ],
)
def test_wrong_usage(argv, message):
    status, out, err = run_command("train", *argv)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_help(tmp_path):
    status, out, _ = run_command("train", "--help")
    assert status == 0
    assert "--resume DIR" in out
    status, out, _ = run_command("train", write_train_config(tmp_path / "tiny.py"), "--help")
    assert status == 0
    assert "--optimizer.learning-rate" in out
    assert "--data-dir" in out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 30}, r"steps = 30 must be a multiple of evaluate_every = 4: take steps = 32, or evaluate_every = 3"),
        ({"steps": None}, r"steps, epochs = \(None, None\) must be one number and one None"),
        ({"epochs": 1}, r"steps, epochs = \(24, 1\) must be one number and one None"),
        ({"steps": 0}, "steps = 0: must be greater than 0"),
        ({"steps": None, "epochs": 1}, "epochs = 1, which are 18 steps, must be a multiple of evaluate_every = 4"),
        ({"checkpoint_every": 6}, "checkpoint_every = 6 must be a multiple of evaluate_every = 4: take 8"),
        ({"keep_checkpoints": 0}, "keep_checkpoints = 0: must be greater than 0"),
        ({"seed": -1}, "seed = -1: must be greater than or equal to 0"),
        ({"optimizer__learning_rate": float("nan")}, r"optimizer\.learning_rate = nan: must be a finite number"),
        ({"optimizer__warmup_steps": 24}, r"optimizer\.warmup_steps = 24 must be less than the 24 steps"),
        ({"optimizer__factory": "rkk4"}, r"optimizer\.factory = 'rkk4' .*did you mean 'rk4'"),
        ({"optimizer__options": {"momentun": 0.9}}, r"optimizer\.options"),
        (
            {"optimizer__stage_batches": "split"},
            r"data\.batch_size = 63 must be a multiple of 2, because optimizer cuts",
        ),
        ({"optimizer__rule": "dal"}, r"optimizer\.rule = 'dal' sets the learning rate itself"),
        ({"data__name": "sums"}, r"model\.name = 'cnn' takes images, and data\.name = 'sums' is text"),
        ({"metrics": ("accuracies",)}, "metrics = 'accuracies' must be one of accuracy"),
        ({"data__batch_size": 5000}, r"data\.batch_size = 5000"),
        ({"model__dropout": 1.0}, r"model\.dropout = 1\.0: must be less than 1"),
        ({"model__heads": 3}, r"model: width = 64 must be a multiple of 3 heads"),
    ],
)
def test_impossible_configs(change, message):
    with pytest.raises(UsageError, match=message):
        Training(changed(**change))


def test_epochs():
    training = Training(changed(steps=None, epochs=2, evaluate_every=None))
    assert training.steps == 2 * 18


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_schedules(schedule, warmup):
    config = TrainOptimizerConfig("sgd", 0.5, schedule=schedule, warmup_steps=warmup)
    tx = build_optimizer("optimizer", config, probe_loss(TRAIN.model), has_rate=True).make(None, 0.5, 24)

    def step(state, _):
        update, state = tx.update(jnp.ones(()), state)
        return state, -update

    rates = np.asarray(jax.lax.scan(step, tx.init(jnp.zeros(())), length=25)[1])
    assert rates[:warmup] == pytest.approx([0.5 * step / 4 for step in range(warmup)])
    assert rates[warmup] == pytest.approx(0.5)
    if schedule == "constant":
        assert rates[-1] == pytest.approx(0.5)
    else:
        assert rates[-1] == pytest.approx(0, abs=1e-6)
        assert np.all(np.diff(rates[warmup:]) < 0)
        straight = np.allclose(np.diff(rates[warmup:], 2), 0, atol=1e-6)
        assert straight == (schedule == "linear")


@pytest.mark.slow
def test_tensorboard(tmp_path):
    path = write_train_config(tmp_path / "tiny.py")
    assert run_command("train", path, "--tensorboard", "--out", tmp_path / "out")[0] == 0
    (events,) = (tmp_path / "out" / "tensorboard").iterdir()
    content = events.read_bytes()
    for name in (b"train_loss", b"test_accuracy"):
        assert name in content


def test_tensorboard_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", None)
    path = write_train_config(tmp_path / "tiny.py")
    status, _, err = run_command("train", path, "--tensorboard", "--out", tmp_path / "out")
    assert (status, err.count("\n")) == (2, 1)
    assert "pip install 'rk-optax[tensorboard]'" in err
    assert not (tmp_path / "out").exists()


def test_a_diverged_run_says_so(tmp_path):
    optimizer = TrainOptimizerConfig("sgd", 1e30)
    path = write_train_config(tmp_path / "tiny.py", changed(optimizer=optimizer, steps=4, model=ModelConfig(hidden=())))
    status, out, _ = run_command("train", path, "--out", tmp_path / "out")
    assert status == 0
    assert "test: diverged" in out
    assert read_metrics(tmp_path / "out")[-1]["test_loss"] is None


@pytest.mark.slow
def test_a_data_directory_is_stored_whole(tmp_path, monkeypatch):
    from ..helpers import write_idx

    write_idx(tmp_path / "data", train=200, size=(8, 8))
    model = ModelConfig(hidden=())
    path = write_train_config(tmp_path / "tiny.py", changed(data__name="mnist", steps=4, model=model))
    monkeypatch.chdir(tmp_path)
    assert run_command("train", path, "--data-dir", "data", "--out", "run")[0] == 0
    config = strict_loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert config["data"]["data_dir"] == str(tmp_path / "data")
    assert run_command("train", path, "--data-dir", "data", "--resume", "run")[0] == 0
    monkeypatch.chdir("/")
    assert run_command("train", "--resume", tmp_path / "run")[0] == 0


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("factory", ["rkc", "rosenbrock_euler", "residual_euler"])
def test_stiff_methods_train_and_go_on(tmp_path, factory):
    """Without a learning rate; what their steps cost is counted one by one, and a resumed run counts on."""
    model = ModelConfig(hidden=(), loss="squared_error", l2=0.0)
    config = changed(
        optimizer=TrainOptimizerConfig(factory), model=model, data__batch_size=63, steps=4, evaluate_every=2
    )
    run = tmp_path / "run"
    assert run_command("train", write_train_config(tmp_path / "tiny.py", config), "--out", run)[0] == 0
    whole = read_metrics(run)
    assert whole[-1]["validation_loss"] < whole[0]["validation_loss"]
    assert whole[-1]["gradients"] > 4
    wind_back(run, 2)
    assert run_command("train", "--resume", run)[0] == 0
    assert without_time(read_metrics(run)) == without_time(whole)


def test_a_further_metric(tmp_path, monkeypatch):
    monkeypatch.setitem(METRICS, "ones", lambda model, variables, piece: jnp.ones(len(piece.labels)))
    config = changed(steps=4, model=ModelConfig(hidden=()), metrics=("ones",))
    assert run_command("train", write_train_config(tmp_path / "tiny.py", config), "--out", tmp_path / "run")[0] == 0
    assert read_metrics(tmp_path / "run")[-1]["test_ones"] == 1


@pytest.mark.slow
def test_a_transformer_trains(tmp_path):
    model = ModelConfig("transformer", width=8, blocks=1, heads=2, activation="gelu", dropout=0.1)
    data = DataConfig("sums", batch_size=63, context=16, validation_fraction=0.01, test_fraction=0.9)
    path = write_train_config(tmp_path / "tiny.py", changed(model=model, data=data, steps=8))
    assert run_command("train", path, "--out", tmp_path / "out")[0] == 0
    first, *_, last = read_metrics(tmp_path / "out")
    assert last["validation_loss"] < first["validation_loss"]
    assert json.dumps(last)
