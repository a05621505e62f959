"""The other remedies for covariate shift and dead units, a file each: the maths first, then a thin module.

    import linked_jax.remedies as remedies

They take and give features as Flax' own layers do, so they go with links and with everything in `flax.nnx`.
"""

__all__ = []
