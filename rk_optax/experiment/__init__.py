"""The experiment runner behind the command line `rk-optax`.

It needs the `experiment` extra (`pip install 'rk-optax[experiment]'`), so `import rk_optax` does not import it.
"""
