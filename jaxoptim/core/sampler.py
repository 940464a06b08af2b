"""The base class of rules that draw noise at every step."""

from __future__ import annotations

import abc
import dataclasses
import itertools
from collections.abc import Collection
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxoptim.core import noise
from jaxoptim.core.packing import split
from jaxoptim.core.rearrangement import Rearrangement
from jaxoptim.core.rule import Arrays, Rule, Slots, rule

_LARGE = 16384
"""The size of an array beyond which its noise is drawn separately.

A draw for each of many small arrays would take long to compile, and to start.
"""
_TOGETHER = np.uint32(2**32 - 1)
"""The number folded into the key for the arrays that are drawn together; no array has it as its index."""


@rule
class Sampler(Rule):
    r"""The base of every rule that samples: an update of one array that takes standard-normal noise.

    In the update number :math:`t = 1, 2, \ldots` the array that is number :math:`i` in the tree has the noise

    .. math::
        \xi_{t, i} = \mathrm{normal}(\mathrm{fold\_in}(\mathrm{fold\_in}(\text{key}, t), i))

    if it is large, of more than 16384 numbers. All smaller ones, one after the other, are parts of one vector, with
    :math:`2^{32} - 1` in the place of :math:`i`. So any step of any chain can be repeated. The key stays as it is, in
    ``state.shared["key"]``; that of :math:`t = 0` is for what an array has at the start, such as a momentum. For an
    array without gradient none is drawn, and the others stand closer.

    Parameters of float16 and bfloat16 are rounded after each update like those of any rule, so that small steps are
    lost and another distribution is sampled. :func:`jaxoptim.sampling.sample` keeps them in float32; in loops of your
    own ``with_precision(master_weights=True)`` does. Stochastic rounding would not do: what it adds to the noise makes
    the chain too hot.

    A subclass is decorated with ``@rule`` and writes :meth:`init` and :meth:`update`. What belongs to all arrays
    together, such as a thermostat, it adds in :meth:`init_shared` and renews in :meth:`update_shared`.

    Args:
        key: a typed JAX key, ``jax.random.key(seed)`` (default None: that of seed 0).
        noise_impl: the generator of the noise, ``"key"`` (default) or ``"hash"``, as
            :func:`jaxoptim.core.noise.normal` says.

    Raises:
        As :class:`Rule`; ``TypeError`` for a key that is no typed key.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxoptim
        >>> from jaxoptim.core import Sampler, rule
        >>> @rule
        ... class Diffusion(Sampler):
        ...     def init(self, param, noise):
        ...         return {}
        ...
        ...     def update(self, grad, slots, param, step, noise, shared):
        ...         return -grad / 2 + noise, slots
        >>> params, sampler = {"w": jnp.ones(2)}, Diffusion()
        >>> state = jaxoptim.init(sampler, params)
        >>> params, state = jaxoptim.step(sampler, params, {"w": jnp.ones(2)}, state, noise={"w": jnp.zeros(2)})
        >>> params["w"].tolist()
        [0.5, 0.5]
    """

    key: Arrays = dataclasses.field(default=None, kw_only=True)
    noise_impl: str = dataclasses.field(default="key", kw_only=True)

    takes: ClassVar[tuple[str, ...]] = ("noise",)

    def check(self) -> None:
        noise.check_impl(self.noise_impl)
        if self.key is not None:
            noise.check_key(self.key)

    @abc.abstractmethod
    def init(self, param: jax.Array, noise: jax.Array) -> Slots:  # type: ignore[override]
        """Initialize the slots of one array; ``noise`` is standard-normal."""

    @abc.abstractmethod
    def update(  # type: ignore[override]
        self, grad: jax.Array, slots: Slots, param: Any, step: jax.Array, noise: jax.Array, shared: dict[str, Any]
    ) -> tuple[jax.Array, Slots]:
        """Return the change of ``param``, its new slots, and scalars to be summed for :meth:`update_shared`."""

    def init_shared(self) -> dict[str, Any]:
        # A copy, because whoever donates a state keeps the key.
        return {"key": jax.random.key(0) if self.key is None else jnp.copy(self.key)}

    def draw_noise(
        self, shared: dict[str, Any], step: Any, likes: dict[int, Any], only: Collection[int] | None = None
    ) -> dict[int, Any]:
        small: dict[Any, list[int]] = {}
        large: list[int] = []
        for number, like in likes.items():
            if like.size <= _LARGE:
                small.setdefault(like.dtype, []).append(number)
            elif only is None or number in only:
                large.append(number)
        keys = noise.fold_in(shared["key"], step, np.array([*large, _TOGETHER], np.uint32))
        # Made in the loops that use it.
        apart = noise.normals(keys[:-1], [likes[number] for number in large], self.noise_impl)
        drawn: dict[int, Any] = dict(zip(large, apart, strict=True))
        for dtype, numbers in small.items():
            ends = list(itertools.accumulate(likes[number].size for number in numbers))
            start = 0
            wanted = itertools.groupby(zip(numbers, ends, strict=True), lambda x: only is None or x[0] in only)
            for is_wanted, run in wanted:
                members, stops = zip(*run, strict=True)
                if is_wanted:
                    vector = noise.part_of_normal(keys[-1], ends[-1], start, stops[-1], dtype, self.noise_impl)
                    parts = zip(members, split(vector, [likes[number].size for number in members]), strict=True)
                    drawn |= {number: part.reshape(likes[number].shape) for number, part in parts}
                start = stops[-1]
        return drawn

    @property
    def leaves_out_held(self) -> bool:
        """Whether arrays that ``optimize_over`` holds may be left out of the pytree, as nothing else depends on them.

        Chains then share them; without this every chain has a copy.
        """
        return False

    def update_with(
        self, grad: jax.Array, slots: Slots, param: Any, step: jax.Array, shared: dict[str, Any], **given: Any
    ) -> tuple[jax.Array, Slots]:
        return self.update(grad, slots, param, step, shared=shared, **given)

    @property
    def elementwise(self) -> bool:
        """False: packed arrays would have other noise."""
        return False

    def rearranged(self, slots: Slots, move: Rearrangement) -> Slots:
        return {name: move(slot) if jnp.shape(slot) == move.shape else slot for name, slot in slots.items()}
