"""What the three flows show: whether gradient descent hovers at its edge, and which flow it keeps to."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rk_optax.experiment.runs.flow import DESCENT, Followed
from rk_optax.experiment.runs.summary import Spread


def flow_summary(results: Sequence[Followed], learning_rate: float) -> dict[str, Any]:
    """The edge 2/h, and a record of each flow over the second half of the time, when the oscillation has grown.

    The sharpness is over 2/h; the distance is that from gradient descent. `distance_ratio` is the distance from the
    central flow over that from the gradient flow.
    """
    edge, late = 2 / learning_rate, slice(len(results[0].times) // 2, None)
    by_name = {result.name: result for result in results}
    ratio = by_name["central_flow"].distance[late] / np.maximum(by_name["gradient_flow"].distance[late], 1e-30)
    reached = np.flatnonzero(by_name[DESCENT].sharpness >= edge)
    return {
        "edge": edge,
        "reached_at": float(results[0].times[reached[0]]) if len(reached) else None,
        "late_from": float(results[0].times[late][0]),
        "flows": [
            {
                "flow": result.name,
                "sharpness": Spread.of(result.sharpness[late] / edge)._asdict(),
                "distance": Spread.of(result.distance[late])._asdict(),
                "final_loss": float(result.loss[-1]),
                **{name: getattr(result, name) for name in ("accepted", "refused", "gradients", "products", "seconds")},
            }
            for result in results
        ],
        "distance_ratio": Spread.of(ratio)._asdict(),
    }
