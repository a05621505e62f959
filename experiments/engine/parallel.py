"""Where a step runs: one device, a batch split over several, seeds in one program, or seeds spread over devices.

A step is a function of arguments of three kinds: what each seed has of its own, what each batch has, what all share.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.engine.errors import UsageError
from experiments.engine.settings import AnySettings, Settings, check_spread


@dataclasses.dataclass(frozen=True)
class Placement:
    """Hashable, so that jit takes it as a static argument."""

    mesh: Mesh | None = None  # the devices, on one axis; None is the default device
    stacked: bool = False  # all arrays of a seed have a leading axis of seeds, and run in one vmapped program
    spread: bool = False  # the mesh's axis is that of the seeds, else that of the batch

    def over_seeds(self, function: Callable[..., Any], own: tuple[bool, ...]) -> Callable[..., Any]:
        """The function for all seeds at once; own[i] says that argument i has the axis of seeds, as all outputs do."""
        if not self.stacked:
            return function
        mapped = jax.vmap(function, in_axes=tuple(0 if mine else None for mine in own))
        if not self.spread:
            return mapped
        seeds, shared = P("devices"), P()
        in_specs = tuple(seeds if mine else shared for mine in own)
        return jax.shard_map(mapped, mesh=self.mesh, in_specs=in_specs, out_specs=seeds, check_vma=False)

    def of_seeds(self, tree: Any) -> Any:
        """Put what each seed has of its own: parameters, optimiser state, keys."""
        return self._put(tree, P("devices") if self.spread else P())

    def shared(self, tree: Any) -> Any:
        """Put what all seeds and examples share: the data set."""
        return self._put(tree, P())

    def batch(self, index: np.ndarray) -> jax.Array | np.ndarray:
        """Put the indices of a batch, (batch,) or (seeds, batch), split over the devices where it divides evenly."""
        if self.mesh is None:
            return index  # jit puts it, which is faster
        if self.spread:
            return self._put(index, P("devices"))
        splits = self.mesh is not None and index.shape[-1] % self.mesh.size == 0
        return self._put(index, P(*[None] * (index.ndim - 1), "devices") if splits else P())

    def _put(self, tree: Any, spec: P) -> Any:
        if self.mesh is None:
            return jax.tree.map(jax.numpy.asarray, tree)
        sharding = NamedSharding(self.mesh, spec)
        if sharding.is_fully_addressable:
            return jax.device_put(tree, sharding)
        return jax.tree.map(lambda x: _of_all_processes(x, sharding), tree)


def _of_all_processes(x: Any, sharding: NamedSharding) -> jax.Array:
    """The global array of what is equal in all processes. `jax.device_put` would compare them, at every batch."""
    if isinstance(x, jax.Array) and jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(
            _of_all_processes(jax.random.key_data(x), sharding), impl=jax.random.key_impl(x)
        )
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


ONE_DEVICE = Placement()


def request_devices(count: int) -> None:
    """Ask for virtual devices, should this be a CPU. It has an effect only before JAX runs anything."""
    if count > 1:
        with contextlib.suppress(RuntimeError):  # JAX has started already: it has the devices that it has
            jax.config.update("jax_num_cpu_devices", count)


def check_devices(count: int) -> None:
    """Refuse more devices than there are."""
    if count > jax.device_count():
        platform = jax.devices()[0].platform
        raise UsageError(f"--devices {count} needs {count} devices, got {jax.device_count()} ({platform}); lower it")


def on_devices(settings: AnySettings) -> AnySettings:
    """The settings with the number of devices that they mean: of several processes all that there are."""
    asked, there = settings.devices, jax.device_count()
    check_devices(asked)
    if not settings.distributed:
        return settings
    if 1 < asked < there:
        raise UsageError(f"--distributed uses all devices, which are {there}, got --devices {asked}; leave it out")
    settings = dataclasses.replace(settings, devices=there)
    check_spread(settings)
    return settings


def placement(settings: Settings) -> Placement:
    """What --devices and --seeds-mode ask for.

    auto is sequential, on every platform: on a CPU a vmapped program is slower (vmap turns the convs of several seeds
    into grouped ones; `python -m benchmarks.seeds`, results/benchmarks/seeds.json). A GPU has not been measured yet.
    """
    stacked = settings.seeds_mode in ("vmap", "spread") and settings.seeds > 1
    if settings.devices == 1:
        return Placement(stacked=stacked)
    mesh = jax.make_mesh(
        (settings.devices,), ("devices",), axis_types=(AxisType.Auto,), devices=jax.devices()[: settings.devices]
    )
    return Placement(mesh, stacked, spread=stacked and settings.seeds_mode == "spread")
