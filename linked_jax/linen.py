"""The layers of `linked_jax.layers`, but the transposed convolution, for Flax Linen, over the same functions.

    z' = f(z) K + b

They are Flax' own layers with one more field, `link`, and all of Flax' fields. The parameters have Flax' names, so a
dense layer has `kernel` and `bias`, and the kernel's inputs are the d*C features of the link.
"""

import functools
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Float

from linked_jax.activations import lk_relu, prelu
from linked_jax.convolution import conv_general_dilated
from linked_jax.initializers import Initializer, check_groups, default_kernel_init
from linked_jax.layers import check_link, conv_start
from linked_jax.learned import Share, apply_slopes, check_share
from linked_jax.linking import Activation, Layout, Link, linked


class _StartsAsItsLinkAsks(nn.Module):
    @nn.nowrap
    def param(self, name: str, init_fn: Any, *arguments: Any, **options: Any) -> Any:
        """As of any Flax module, but that a kernel without an initialiser gets that of its link and geometry."""
        if name == "kernel" and init_fn is None:
            init_fn = self._start()
        return super().param(name, init_fn, *arguments, **options)

    @nn.nowrap
    def _start(self) -> Initializer:
        raise NotImplementedError

    @nn.nowrap
    def _check_channels(self, z: Array, link: Activation, groups: int = 1) -> None:
        """Refuse other channels than those at init, in z's own number: the kernel has d times as many rows."""
        if self.has_variable("params", "kernel"):
            kernel: Any = nn.unbox(self.get_variable("params", "kernel"))
            if groups * kernel.shape[-2] != link.arity * z.shape[-1]:
                channels = groups * kernel.shape[-2] // link.arity
                raise ValueError(f"z has {channels} channels on its last axis, as at init, got shape {z.shape}")


class LinkedDense(_StartsAsItsLinkAsks, nn.Dense):
    """A dense layer on linked pre-activations: z (..., C) -> f(z) K + b (..., features).

    Args:
      features: the number of outputs; all other fields of `flax.linen.Dense` are keyword arguments too.
      link: a `Link`, or a module such as `LinkedPReLU`.
      kernel_init: init(key, shape, dtype) for the whole kernel (d*C, features); `default_kernel_init(link)` if None.
        Wrap that one for a partitioned kernel: nn.with_partitioning(default_kernel_init(link), names).

    Raises:
      ValueError: when called, if z has other channels than at init.
      TypeError: if link is not a link.

    Examples:
      >>> import flax.linen as nn
      >>> import jax, jax.numpy as jnp
      >>> from linked_jax import lk_swish
      >>> from linked_jax.linen import LinkedDense
      >>> net = nn.Sequential([nn.Dense(16), LinkedDense(3, link=lk_swish)])
      >>> params = net.init(jax.random.key(0), jnp.ones((2, 8)))
      >>> params["params"]["layers_1"]["kernel"].shape, net.apply(params, jnp.ones((2, 8))).shape
      ((32, 3), (2, 3))
    """

    kernel_init: Initializer | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    promote_dtype: Any = promote_dtype  # Flax' Protocol cannot be checked at runtime
    link: Activation = lk_relu

    def __post_init__(self):
        check_link(self.link)
        super().__post_init__()

    @nn.nowrap
    def _start(self) -> Initializer:
        return default_kernel_init(self.link)

    @nn.remat  # only z is kept
    @nn.compact
    def __call__(self, z: Float[Array, "... c"]) -> Float[Array, "... c_out"]:
        """z (..., C) -> (..., features)."""
        self._check_channels(z, self.link)
        return super().__call__(self.link(z))


class LinkedConv(_StartsAsItsLinkAsks, nn.Conv):
    """A convolution on linked pre-activations: z (N, *space, C) -> f(z) * K + b (N, *space', features).

    With G groups (`feature_group_count`) the members of a unit stay in its group: the link's layout is "interleaved".

    Args:
      features: the number of output channels.
      kernel_size: an integer or one per spatial axis; all other fields of `flax.linen.Conv` are keyword arguments too.
      link: a `Link` with axis -1, or a module such as `LinkedPReLU`.
      kernel_init: init(key, shape, dtype) for the whole kernel (*kernel_size, d*C / G, features);
        `default_kernel_init` of the link and the geometry if None.

    Raises:
      ValueError: if groups would split the members of a unit; when called, if z has other channels than at init.
      TypeError: if link is not a link.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from linked_jax.linen import LinkedConv
      >>> LinkedConv(8, (3, 3), strides=2).init_with_output(jax.random.key(0), jnp.ones((2, 8, 8, 4)))[0].shape
      (2, 4, 4, 8)
    """

    kernel_init: Initializer | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    promote_dtype: Any = promote_dtype  # Flax' Protocol cannot be checked at runtime
    conv_general_dilated: Any = conv_general_dilated
    link: Activation = lk_relu

    def __post_init__(self):
        check_link(self.link)
        check_groups(self.link, self.feature_group_count)
        super().__post_init__()

    @nn.nowrap
    def _start(self) -> Initializer:
        return conv_start(
            self.link,
            strides=self.strides or 1,
            padding=self.padding,
            input_dilation=self.input_dilation,
            kernel_dilation=self.kernel_dilation,
            feature_group_count=self.feature_group_count,
        )

    @nn.remat
    @nn.compact
    def __call__(self, z: Float[Array, "... c"]) -> Float[Array, "... c_out"]:
        """z (N, *space, C) -> (N, *space', features)."""
        if z.shape[-1] % self.feature_group_count:
            raise ValueError(f"{self.feature_group_count} groups divide the channels of z, got shape {z.shape}")
        self._check_channels(z, self.link, self.feature_group_count)
        return super().__call__(self.link(z))


class ChannelPReLU(nn.Module):
    """PReLU with learned slopes: z where z > 0, else a * z (equation 3).

    Args:
      negative_slope: the slopes' initial value. 0.25 is He's; do not apply weight decay to slopes.
      share: "channel" (a slope per channel, He's), "layer" (one) or "element" (one per element of an example).
      param_dtype: of the slopes.

    Raises:
      ValueError: if share is unknown.

    Reference: He et al., Delving deep into rectifiers, 2015.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from linked_jax.linen import ChannelPReLU
      >>> ChannelPReLU().init_with_output(jax.random.key(0), jnp.array([[-4.0, 4.0]]))[0]
      Array([[-1.,  4.]], dtype=float32)
    """

    negative_slope: float = 0.25
    share: Share = "channel"
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        check_share(self.share)
        super().__post_init__()

    @property
    def arity(self) -> int:
        """The number of members d."""
        return self.link.arity

    @property
    def link(self) -> Link:
        """The link that this module is at the start; initialisers read it."""
        return Link((functools.partial(prelu, negative_slope=self.negative_slope),))

    @nn.compact
    def __call__(self, z: Float[Array, "..."]) -> Float[Array, "..."]:
        """z (..., C) -> (..., C)."""
        return apply_slopes(z, self._slopes("negative_slope", z))

    def _slopes(self, name: str, z: Array) -> Array:
        shape = {"layer": (), "channel": z.shape[-1:], "element": z.shape[1:]}[self.share]
        return self.param(name, nn.initializers.constant(self.negative_slope), shape, self.param_dtype)


class LinkedPReLU(ChannelPReLU):
    """Two PReLUs, each with its own slopes, on z and on -z; at z = 0 the Jacobian is that of z -> 0+.

        f(z) = (prelu(z, a), prelu(-z, b))

    Args:
      negative_slope: the slopes' initial value; 0.25 is He's, 0 starts as lk_relu.
      share: "channel", "layer" or "element", see `ChannelPReLU`.
      param_dtype: of the slopes.
      layout: "blocked" or "interleaved", see `Link`.

    Raises:
      ValueError: if share or layout is unknown.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from linked_jax.linen import LinkedPReLU
      >>> LinkedPReLU().init_with_output(jax.random.key(0), jnp.array([[-4.0]]))[0]
      Array([[-1.,  4.]], dtype=float32)
    """

    layout: Layout = "blocked"

    def __post_init__(self):
        super().__post_init__()
        self.link  # noqa: B018 - Link checks the layout

    @property
    def link(self) -> Link:
        """The link that this module is at the start; initialisers read it."""
        return linked(super().link, layout=self.layout)

    @nn.compact
    def __call__(self, z: Float[Array, "... c"]) -> Float[Array, "... c_linked"]:
        """z (..., C) -> (..., 2*C)."""
        return apply_slopes(z, self._slopes("positive", z), self._slopes("mirrored", z), layout=self.layout)
