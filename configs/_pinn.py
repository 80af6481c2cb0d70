"""The races of physics-informed networks: what everybody uses, what is published for them, and our methods.

    rk-optax race configs/race_poisson_small.py

Every entrant has about the same seconds and at most two values of one argument to choose from, on another seed. In
float32 natural gradients need more damping, since the rounding of the kernel matrix exceeds what is published.
"""

from rk_optax.experiment.config import EntrantConfig, RaceConfig


def race(
    problem: str,
    *,
    seconds: float,
    adam_steps: int,
    targets: tuple[float, ...],
    x64: bool = False,
    chunk: int = 2,
    first_order: bool = False,
    constant: bool = True,
    small: bool = True,
    further: dict[str, EntrantConfig] | None = None,
    **options,
) -> RaceConfig:
    """The race on one problem.

    Args:
        problem: its name.
        seconds: of every run, but for Adam's.
        adam_steps: of Adam, whose cosine schedule needs them; about as many as take `seconds` on one core.
        targets: errors whose first crossing is reported.
        x64: whether in float64.
        chunk: steps between two looks at the error, of the entrants with expensive steps.
        first_order: whether methods run, too, that are not for high accuracy; two of them shorter.
        constant: whether the points stay; L-BFGS and self-scaled Broyden need that.
        small: whether the network is small enough for a dense P × P matrix that every step changes.
        further: more entrants, or others in the place of these.
        **options: arguments of the problem.
    """
    # In float64 the published one: a quarter of the seconds would choose 1e-10, which is late at the start.
    dampings = (1e-8,) if x64 else (1e-3, 1e-1)
    more = (1e-8, 1e-5) if x64 else (1e-3, 1e-1)  # with momentum: with less, SPRING diverges

    def entrant(factory: str, steps: int = chunk, **arguments) -> EntrantConfig:
        return EntrantConfig(factory, seconds=seconds, chunk=steps, **arguments)

    entrants = {
        "adam": EntrantConfig(
            "adam", trials=(3e-3, 1e-2), schedule="cosine", steps=adam_steps, seconds=600, chunk=adam_steps // 40
        )
    }
    if constant:
        entrants["lbfgs"] = entrant("lbfgs", 10 * chunk, trials=(50, 200), tunes="memory_size")
    if first_order:
        entrants["adam, lbfgs"] = entrant(
            "adam_then_lbfgs",
            25 * chunk,
            trials=(3e-3, 1e-2),
            options={"adam_steps": adam_steps // 5, "memory_size": 50},
        )
        entrants["nesterov"] = EntrantConfig("nesterov", trials=(1e-4, 1e-3), seconds=5.0, chunk=100 * chunk)
        entrants["rkc"] = EntrantConfig("rkc", seconds=10.0, chunk=chunk)
        entrants["rosenbrock_euler"] = entrant("rosenbrock_euler", options={"max_iterations": 100})
    if constant and small:
        entrants["ssbroyden"] = entrant("ssbroyden", 5 * chunk)
        entrants["rosenbrock_euler, secant"] = entrant("rosenbrock_euler", 5 * chunk, options={"curvature": "secant"})
    entrants["engd_w"] = entrant("engd_w", trials=dampings, tunes="damping")
    entrants["spring"] = entrant("spring", trials=more, tunes="damping")
    entrants["residual_euler"] = entrant("residual_euler", 2 * chunk)
    entrants["residual_euler, path"] = entrant("residual_euler", rule="path_control")
    if not constant:
        entrants["residual_euler, search"] = entrant("residual_euler", rule="line_search")
    return RaceConfig(
        problem=problem,  # pyright: ignore[reportArgumentType]
        problem_options=options,
        entrants={**entrants, **(further or {})},
        tuning_fraction=0.25,
        x64=x64,
        targets=targets,
    )


def libraries(*, x64: bool, seconds: float, iterations: bool) -> dict[str, EntrantConfig]:
    """Gauss–Newton of somax and, if asked for, Levenberg–Marquardt of optimistix.

    A step of somax maps a product over an N × N identity, one of optimistix costs a QR factorisation of N + P rows.
    """
    found = {"somax": EntrantConfig("somax_egn", trials=(1e-2, 1.0), tunes="damping", seconds=seconds, chunk=2)}
    if iterations:
        found["optimistix"] = EntrantConfig("optimistix_lm", seconds=seconds, chunk=1)
    return found


def poisson_small(*, x64: bool) -> RaceConfig:
    """2-D Poisson by one hidden layer of 64, which has fewer weights than there are residuals."""
    return race(
        "poisson",
        seconds=12.0,
        adam_steps=20_000 if x64 else 30_000,
        targets=(1e-4, 1e-6, 1e-8),
        x64=x64,
        chunk=10,
        further=libraries(x64=x64, seconds=12.0, iterations=True),
        width=64,
        layers=1,
    )


def periodic(problem: str, targets: tuple[float, ...], *, x64: bool) -> RaceConfig:
    """Burgers' equation with ν = 0.01 or that of Allen and Cahn."""
    return race(problem, seconds=30.0, adam_steps=2_400 if x64 else 4_000, targets=targets, x64=x64)


def poisson_5d(*, new_points: bool) -> RaceConfig:
    """Poisson in five dimensions in float64, at points that stay or are new in each step."""
    return race(
        "poisson_5d",
        seconds=45.0,
        adam_steps=800,
        targets=(1e-1, 1e-2, 3e-3),
        x64=True,
        constant=not new_points,
        small=False,
        new_points=new_points,
        inside=1100,
        boundary=200,
    )
