import matplotlib.image
import numpy as np
import pytest

from rk_optax.experiment.runs.race import RaceRun
from rk_optax.experiment.show.curves import Curve
from rk_optax.experiment.show.figures import plot_comparison, plot_curves
from rk_optax.experiment.show.race_summary import on_grid


@pytest.mark.slow
def test_figure_is_drawn(smoke, tmp_path):
    plot_comparison([*smoke.results, *smoke.results[:2]], tmp_path / "comparison.png")
    image = matplotlib.image.imread(tmp_path / "comparison.png")
    assert image.shape[1] > 1000
    # Every entrant's colour is there: black, orange, blue, green, vermilion.
    pixels = {tuple(pixel) for pixel in np.rint(255 * image[..., :3].reshape(-1, 3)).astype(int)}
    for color in ("000000", "E69F00", "0072B2", "009E73", "D55E00"):
        assert tuple(bytes.fromhex(color)) in pixels


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("damage", [np.nan, np.inf, 1e30])
def test_diverged_runs_do_not_spoil_it(smoke, tmp_path, damage):
    result = smoke.results[0]
    loss = result.runs.train_loss.copy()
    loss[1:, 2:] = damage
    damaged = result._replace(runs=result.runs._replace(train_loss=loss))
    plot_comparison([damaged, *smoke.results[1:]], tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").stat().st_size > 20_000


def test_perfect_accuracy_has_a_place_on_the_logarithmic_axis(smoke, tmp_path):
    result = smoke.results[0]
    perfect = result._replace(runs=result.runs._replace(test_accuracy=np.ones_like(result.runs.test_accuracy)))
    plot_comparison([perfect], tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").exists()


@pytest.mark.slow
def test_more_entrants_than_colours(smoke, tmp_path):
    plot_comparison(smoke.results * 3, tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").exists()


def test_a_loss_below_zero_has_a_linear_axis(tmp_path):
    curve = Curve("a", *np.arange(12.0).reshape(3, 4), np.array([0.0, -1, -2, -3]), np.array([1.0, 0.1, 0.01, 0.001]))
    plot_curves([curve], "steps", tmp_path / "curves.svg")
    assert (tmp_path / "curves.svg").read_text().startswith("<?xml")


def test_a_method_that_counts_no_gradient_has_a_place_on_the_axis_of_gradients():
    counts, nothing = np.array([0.0, 1.0, 2.0]), np.zeros(3)
    run = RaceRun(counts, counts, nothing, nothing, counts, nothing, counts, np.array([3.0, 2.0, 1.0]), v_seconds=1.0)
    grid, errors = on_grid([run, run], "gradients")
    assert np.all(grid > 0)
    assert errors.shape == (2, len(grid))
    assert np.all(errors == 1)
