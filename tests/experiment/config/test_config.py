import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from rk_optax.experiment.config import (
    CompareConfig,
    FlowConfig,
    OptimizerConfig,
    RaceConfig,
    TrainConfig,
    checked,
    load,
)
from rk_optax.experiment.errors import UsageError
from rk_optax.experiment.runs.plan import make_plan
from rk_optax.experiment.runs.race import Race

ROOT = Path(__file__).parents[3]
CONFIGS = sorted((ROOT / "configs").glob("[!_]*.py"))


@pytest.mark.covering(most=6)
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path):
    if path.stem.startswith(("train_", "networks_")):
        load(path, TrainConfig)
    elif path.stem.startswith(("race_", "lorenz96")):
        Race(load(path, RaceConfig))
    elif path.stem.startswith("edge_of"):
        load(path, FlowConfig)
    else:
        make_plan(load(path, CompareConfig))


def test_digits_is_the_comparison_of_the_readme():
    config = load(ROOT / "configs" / "digits.py", CompareConfig)
    assert list(config.optimizers) == ["sgd", "momentum", "adam", "heun", "rk4"]
    assert len(config.seeds) == 3


@pytest.mark.parametrize("batch_size", [16, 64, 1024, 8192])
def test_mnist_is_the_study_of_results(batch_size):
    config = load(ROOT / "configs" / f"mnist_{batch_size}.py", CompareConfig)
    assert config.data.batch_size == batch_size
    assert config.data.data_dir is None
    assert len(config.seeds) == 5
    plan = make_plan(config)
    widths = [entrant.rates[-1] / entrant.rates[0] for entrant in plan]
    assert widths == pytest.approx([widths[0]] * 10)
    assert len({(entrant.whole.steps, entrant.tuning.steps, len(entrant.rates)) for entrant in plan}) == 1
    assert plan[0].whole.steps >= 200
    # At equal cost, too, every entrant is read where it was evaluated.
    assert all(
        entrant.whole.steps % (entrant.optimizer.gradients_per_step * config.budget.evaluate_every) == 0
        for entrant in plan
    )


def test_load_returns_what_the_file_returns(smoke_file, smoke_config):
    assert load(smoke_file, CompareConfig) == smoke_config


def test_a_config_may_define_its_own_dataclass(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        "import dataclasses\n"
        "from rk_optax.experiment.config import CompareConfig, OptimizerConfig\n"
        "@dataclasses.dataclass(frozen=True)\n"
        "class Mine(CompareConfig):\n"
        "    note: str = 'x'\n"
        "def get_config():\n"
        "    return Mine({'sgd': OptimizerConfig('sgd', (0.1, 1.0))})\n"
    )
    assert load(path, CompareConfig).note == "x"


def test_missing_file(tmp_path):
    with pytest.raises(UsageError, match=r"nothing\.py: no such config file"):
        load(tmp_path / "nothing.py", CompareConfig)


def test_other_kind_of_file(tmp_path):
    (tmp_path / "config.yaml").write_text("a: 1")
    with pytest.raises(UsageError, match=r"config\.yaml: .* ends in \.py"):
        load(tmp_path / "config.yaml", CompareConfig)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"some\.py: define get_config\(\)"),
        ("get_config = 3", r"some\.py: define get_config\(\)"),
        ("def get_config(): return {}", "must return a CompareConfig, got dict"),
        ("def get_config(\n", r"some\.py:1: SyntaxError"),
        ("import nonexistent_module", r"some\.py:1: ModuleNotFoundError: No module named"),
        ("\nraise SystemExit(3)", r"some\.py:2: SystemExit"),
        ("def get_config():\n    return 1 / 0", r"some\.py:2: ZeroDivisionError"),
        (
            "from rk_optax.experiment.config import *\ndef get_config():\n    return BudgetConfig(gradiens=3)",
            r"some\.py:3: TypeError: .*unexpected keyword argument 'gradiens'",
        ),
    ],
)
def test_broken_files(tmp_path, text, message):
    path = tmp_path / "some.py"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        load(path, CompareConfig)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("budget=BudgetConfig(gradients='many')", r"some\.py: budget\.gradients = 'many': must be a valid integer"),
        ("budget=BudgetConfig(gradients=2.5)", r"budget\.gradients = 2\.5"),
        ("budget=BudgetConfig(gradients=True)", r"budget\.gradients = True: must be a valid integer"),
        ("budget=BudgetConfig(updates=True)", r"budget\.updates = True: must be a valid integer"),
        ("budget=7", r"budget = 7: must be an instance of BudgetConfig"),
        ("seeds=[0, 1]", r"seeds = \[0, 1\]: must be a valid tuple"),
        ("seeds=(0, 'a')", r"seeds\.1 = 'a'"),
        ("data=DataConfig(name='digitz')", r"data\.name = 'digitz': .*'digits'"),
        ("data=DataConfig(batch_size=1.5)", r"data\.batch_size = 1\.5"),
        ("model=ModelConfig(hidden=64)", r"model\.hidden = 64"),
        ("model=ModelConfig(l2=None)", r"model\.l2 = None"),
    ],
)
def test_wrong_types_name_the_field(config_file, fields, message):
    path = config_file(f"return CompareConfig({{'sgd': OptimizerConfig('sgd', (0.1, 1.0))}}, {fields})")
    with pytest.raises(UsageError, match=message):
        load(path, CompareConfig)


@pytest.mark.parametrize(
    ("entrant", "message"),
    [
        ("OptimizerConfig('sgd', 0.1)", r"optimizers\.a\.learning_rates = 0\.1"),
        ("OptimizerConfig('sgd', (0.1, 1.0, 2.0))", r"optimizers\.a\.learning_rates"),
        ("OptimizerConfig(3, (0.1, 1.0))", r"optimizers\.a\.factory = 3"),
        ("OptimizerConfig('sgd', (0.1, 1.0), options={'momentum': [0.9]})", r"optimizers\.a\.options\.momentum"),
        ("OptimizerConfig('rk4', (0.1, 1.0), preconditioner='adagrat')", r"optimizers\.a\.preconditioner = 'adagrat'"),
        ("OptimizerConfig('rk4', (0.1, 1.0), rule='dahl')", r"optimizers\.a\.rule = 'dahl'"),
        ("OptimizerConfig('rk4', (0.1, 1.0), stage_batches='cut')", r"optimizers\.a\.stage_batches = 'cut'"),
        ("'sgd'", r"optimizers\.a = 'sgd': must be an instance of OptimizerConfig"),
    ],
)
def test_wrong_types_inside_an_entrant(config_file, entrant, message):
    with pytest.raises(UsageError, match=message):
        load(config_file(f"return CompareConfig({{'a': {entrant}}})"), CompareConfig)


@pytest.mark.parametrize(
    ("where", "field", "value", "message"),
    [
        ("budget", "gradients", -5, r"budget\.gradients = -5: must be greater than 0"),
        ("budget", "gradients", 0, r"budget\.gradients = 0: must be greater than 0"),
        ("budget", "evaluate_every", 0, r"budget\.evaluate_every = 0: must be greater than 0"),
        ("data", "batch_size", 0, r"data\.batch_size = 0"),
        ("data", "test_fraction", 0.0, r"data\.test_fraction = 0\.0: must be greater than 0"),
        ("data", "validation_fraction", 0.9, r"data: validation_fraction \+ test_fraction = 1\.1 must be below 1"),
        ("data", "validation_fraction", float("nan"), r"data\.validation_fraction = nan"),
        ("data", "split_seed", -1, r"data\.split_seed"),
        ("model", "hidden", (8, 0), r"model\.hidden\.1 = 0: must be greater than 0"),
        ("model", "l2", -1.0, r"model\.l2"),
        ("model", "l2", float("inf"), r"model\.l2"),
        ("budget", "gradients", None, r"budget: gradients, updates = \(None, None\) must be one number and one"),
        ("budget", "updates", 40, r"budget: gradients, updates = \(48, 40\) must be one number and one None"),
        ("budget", "updates", 0, r"budget\.updates = 0: must be greater than 0"),
        ("budget", "scored_examples", 0, r"budget\.scored_examples = 0: must be greater than 0"),
        (None, "timed_updates", 4, r"timed_updates = 4 needs a budget in updates"),
        ("tuning", "fraction", 0.0, r"tuning\.fraction = 0\.0: must be greater than 0"),
        ("tuning", "fraction", 1.5, r"tuning\.fraction = 1\.5: must be less than or equal to 1"),
        ("tuning", "trials", 1, r"tuning\.trials = 1: must be greater than or equal to 2"),
        ("tuning", "seeds", (1, 7), r"tuning\.seeds = \(1, 7\) must not contain a seed of the comparison"),
        ("tuning", "seeds", (), r"tuning\.seeds = \(\)"),
        (None, "seeds", (3, 3), r"seeds = \(3, 3\)"),
        (None, "seeds", (-1,), r"seeds\.0 = -1: must be greater than or equal to 0"),
        (None, "timed_runs", 0, "timed_runs = 0"),
        (None, "optimizers", {}, r"optimizers = \{\}: .* at least 1 item"),
        (None, "optimizers", {"a/b": OptimizerConfig("sgd", (0.1, 1.0))}, "'a/b': is no name for an entrant"),
        (
            None,
            "optimizers",
            {"a": OptimizerConfig("sgd", (1.0, 0.1))},
            r"optimizers\.a: learning_rates = \(1\.0, 0\.1\) must have",
        ),
        (None, "optimizers", {"a": OptimizerConfig("sgd", (0.0, 0.1))}, r"a\.learning_rates\.0 = 0\.0: must be"),
        (
            None,
            "optimizers",
            {"a": OptimizerConfig("sgd", (0.1, float("nan")))},
            r"a\.learning_rates\.1 = nan: must be a finite number",
        ),
    ],
)
def test_impossible_values_name_the_field(smoke_config, where, field, value, message):
    if where is None:
        config = dataclasses.replace(smoke_config, **{field: value})
    else:
        part = dataclasses.replace(getattr(smoke_config, where), **{field: value})
        config = dataclasses.replace(smoke_config, **{where: part})
    with pytest.raises(UsageError, match=message):
        checked(config)


def test_importing_the_package_leaves_the_experiment_alone():
    code = "import sys, rk_optax; sys.exit('rk_optax.experiment' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
