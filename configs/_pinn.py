"""The races of physics-informed networks against the methods that are published for them, in float64 and float32.

    rk-optax race configs/race_poisson_small.py

Every entrant of a race has the same seconds, and at most two values of one argument to choose from on another seed. In
float32 natural gradients need more damping, since the rounding of the kernel matrix exceeds what is published.
"""

from rk_optax.experiment.config import EntrantConfig, RaceConfig


def race(
    problem: str,
    *,
    seconds: float,
    targets: tuple[float, ...],
    x64: bool,
    chunk: int = 2,
    small: bool = False,
    **options,
) -> RaceConfig:
    """The race on one problem.

    Args:
        problem: its name.
        seconds: of every run.
        targets: errors whose first crossing is reported.
        x64: whether in float64.
        chunk: steps between two looks at the error, of the entrants with expensive steps.
        small: whether the problem is small enough for a dense inverse Hessian; with arguments of its own, also for
            optimistix, whose steps cost a QR factorisation of N + P rows.
        **options: arguments of the problem.
    """
    dampings = (1e-10, 1e-8) if x64 else (1e-5, 1e-4)
    entrants = {
        "adam": EntrantConfig("adam", trials=(3e-3, 1e-2), seconds=seconds, chunk=20 * chunk),
        "lbfgs": EntrantConfig("lbfgs", trials=(50, 200), tunes="memory_size", seconds=seconds, chunk=10 * chunk),
        "engd_w": EntrantConfig("engd_w", trials=dampings, tunes="damping", seconds=seconds, chunk=chunk),
        "spring": EntrantConfig("spring", trials=dampings, tunes="damping", seconds=seconds, chunk=chunk),
        "residual_euler": EntrantConfig("residual_euler", seconds=seconds, chunk=2 * chunk),
        "residual_euler, path": EntrantConfig("residual_euler", rule="path_control", seconds=seconds, chunk=chunk),
    }
    if options.get("new_points"):
        entrants["residual_euler, search"] = EntrantConfig(
            "residual_euler", rule="line_search", seconds=seconds, chunk=chunk
        )
    if small:
        entrants["ssbroyden"] = EntrantConfig("ssbroyden", seconds=seconds, chunk=5 * chunk)
    if problem == "poisson":  # it maps a product over an N×N identity, which takes N times the memory of a loss
        entrants["somax"] = EntrantConfig(
            "somax_egn", trials=(1e-2, 1.0), tunes="damping", seconds=seconds, chunk=chunk
        )
    if small and options:
        entrants["optimistix"] = EntrantConfig("optimistix_lm", seconds=seconds, chunk=1)
    return RaceConfig(
        problem=problem,  # pyright: ignore[reportArgumentType]
        problem_options=options,
        entrants=entrants,
        tuning_fraction=0.5,
        x64=x64,
        targets=targets,
    )
