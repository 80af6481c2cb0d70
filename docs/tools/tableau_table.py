"""The table of the named explicit methods for the site, apart from what the site alone needs."""

from __future__ import annotations

import rk_optax


def tableau_table() -> str:
    """Every named explicit method: its order and that of its embedded pair, its cost, how far it is stable."""
    lines = [
        "| name | order | stages | gradients | real interval | interval per gradient | ready as |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, tableau in rk_optax.TABLEAUS.items():
        order = f"{tableau.order}" if tableau.order_hat is None else f"{tableau.order}({tableau.order_hat})"
        gradients, interval = tableau.effective_stages, tableau.real_stability_interval
        ready = f"rk_optax.{name}" if hasattr(rk_optax, name) else f'runge_kutta(…, "{name}")'
        lines.append(
            f"| {name} | {order} | {tableau.stages} | {gradients} | {interval:.3f} | {interval / gradients:.2f} "
            f"| `{ready}` |"
        )
    return "\n".join(lines)
