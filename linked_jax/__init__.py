"""Linked neurons for JAX."""
__version__ = "0.1.0"
from linked_jax.linking import *
from linked_jax.activations import *
from linked_jax.linking import Link, linked
