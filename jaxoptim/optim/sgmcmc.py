"""devinterp 2's one class for Langevin dynamics with a prior and a preconditioner."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, Self

import jax
import numpy as np

from jaxoptim.core import sketches
from jaxoptim.core.numerics import real_size
from jaxoptim.optim import devinterp_state
from jaxoptim.optim.optimizer import Groups, Number, Selectors
from jaxoptim.optim.parameter import Parameter
from jaxoptim.optim.prior import CompositePrior, GaussianPrior, Prior, Terms, centers_of, terms_of
from jaxoptim.optim.sampler import Sampler, warn_user
from jaxoptim.optim.sgld import warn_of_settings
from jaxoptim.rules import sgmcmc as rules
from jaxoptim.rules._components import COMPONENTS, SKETCHES

_KWARGS: dict[str, tuple[str, ...]] = {
    "identity": (),
    "rmsprop": ("alpha", "eps", "add_grad_correction"),
    "nht": ("diffusion_factor",),
}
"""What the options of each preconditioner are called."""
_GIVEN = ("prior", "mask", "preconditioner_kwargs")
"""What a group may be given by devinterp's names and keeps in the terms of the rule."""
_MEASURED = (*COMPONENTS, rules.COUNT)
"""What groups have of the last step."""
_ASIDE = (*_MEASURED, *SKETCHES, "sketch_start")
"""What a state dict does not bring."""


class Metrics(NamedTuple):
    r"""The parts of a step: :math:`\Delta w = -(\text{grad} + \text{localization} + \text{decay}) + \text{noise}`.

    The first six are norms, the next three scalar products of the parts. devinterp has a norm of the prior too, the
    root of the sum of two squares, which is none where both terms are on.

    Attributes:
        scaled_grad: of :math:`\tfrac{\epsilon}{2} M G\,n\beta g`.
        unscaled_grad: of :math:`\tfrac{\epsilon}{2} n\beta g`.
        localization: of :math:`\tfrac{\epsilon}{2} M G\,\gamma (w - c)`.
        weight_decay: of :math:`\tfrac{\epsilon}{2} M G\,\lambda w`.
        noise: of :math:`M \sqrt{\epsilon G}\,\sigma\xi`.
        distance: of :math:`w - w_0` before the step.
        dot_grad_prior: of the first part with the sum of the next two, the prior.
        dot_grad_noise: of the first part with the noise.
        dot_prior_noise: of the prior with the noise.
        numel: how many numbers moved.
    """

    scaled_grad: float
    unscaled_grad: float
    localization: float
    weight_decay: float
    noise: float
    distance: float
    dot_grad_prior: float
    dot_grad_noise: float
    dot_prior_noise: float
    numel: int


class Sketches(NamedTuple):
    """The parts of a step as sketches, ``(sketch_dim,)`` each; see :class:`Metrics` for what they are.

    Attributes:
        scaled_grad: that of the gradient.
        unscaled_grad: that of the gradient without preconditioner and mask.
        localization: that of the pull toward the center.
        weight_decay: that of the pull toward zero.
        noise: that of the noise.
    """

    scaled_grad: jax.Array
    unscaled_grad: jax.Array
    localization: jax.Array
    weight_decay: jax.Array
    noise: jax.Array


class SGMCMC(Sampler):
    r"""devinterp 2's ``SGMCMC``: Langevin dynamics with a prior and a preconditioner.

    .. math::
        U(w) &= n\beta\,L(w) + \tfrac{\lambda}{2}\|w\|^2 + \tfrac{\gamma}{2}\|w - c\|^2 \\
        w_{t+1} &= w_t + M\left(-\tfrac{\epsilon}{2}\,G_t \nabla U(w_t) + \sqrt{\epsilon G_t}\,\sigma\,\xi_t\right),
        \qquad \xi_t \sim N(0, 1)

    and then the box :math:`|w - w_0| \le b`. The preconditioner weighs the loss, the prior and the noise:
    ``"identity"`` has :math:`G = 1`, ``"rmsprop"``

    .. math:: V_t = \alpha V_{t-1} + (1 - \alpha)\,g_t^2, \qquad G_t = 1/(\delta + \sqrt{V_t}),

    and ``"nht"`` :math:`G = 1` with :math:`\sqrt{2A}\,\xi_t` for the noise. :meth:`sgld`, :meth:`rmsprop_sgld` and
    :meth:`sgnht` make the three with devinterp's arguments and warnings.

    **Not the thermostat.** ``"nht"``, and so :meth:`sgnht`, is what devinterp 2 computes under the name SGNHT: its
    momentum never moves, and what is sampled is SGLD's distribution at the temperature :math:`2A`, of
    :math:`e^{-U/2A}`. :class:`SGNHT` is the thermostat; a warning says so.

    Args:
        params: see :class:`Optimizer`.
        lr: step size :math:`\epsilon \ge 0` (default 0.01).
        noise_level: :math:`\sigma \ge 0`; only 1 samples from the posterior (default 1).
        nbeta: inverse temperature :math:`n\beta \ge 0` times the number of data (default 1).
        prior: a :class:`~jaxoptim.optim.prior.GaussianPrior` or a
            :class:`~jaxoptim.optim.prior.CompositePrior`; a number, the strength :math:`\gamma` around the initial
            parameters; ``"initial"``, the same of strength 1; a tree like the parameters, the center :math:`c` of
            strength 1; or None (default).
        preconditioner: ``"identity"``, ``"rmsprop"`` or ``"nht"`` (default ``"identity"``).
        preconditioner_kwargs: a dict of its options, ``alpha`` (:math:`\alpha`, default 0.99) and ``eps``
            (:math:`\delta`, default 0.1) of ``"rmsprop"``, ``diffusion_factor`` (:math:`A`, default 0.01) of ``"nht"``
            (default None: none).
        bounding_box_size: :math:`b \ge 0`, of which zero lets nothing move, or None for no box (default None).
        mask: :math:`M` of zeros and ones: one that broadcasts to every parameter, or a tree or list with one for each,
            None where one moves freely (default None).
        save_metrics: measure each step, for :meth:`get_metrics` (default False).
        sketch_dim: sketch each step in so many numbers, an int >= 1, for :meth:`get_sketches` (default None: not).
        sketch_seed: an int in :math:`[0, 2^{32})` (default 0). Sketches can be compared if parameters of the same
            shapes in the same groups were sketched with the same ``sketch_dim`` and seed.
        key: a typed JAX key (default None: ``jax.random.key(0)``), in the place of torch's generator.
        noise_impl: the generator of the noise (default ``"key"``; see :func:`jaxoptim.core.noise.normal`).
        groups: see :class:`Optimizer`. A group may have its own ``prior``, ``mask``, ``preconditioner`` and
            ``preconditioner_kwargs``, and keeps them as ``weight_decay``, ``localization``, ``optimize_over``,
            ``alpha``, ``eps`` and ``diffusion_factor``, which may be changed at any time.
        frozen: see :class:`Optimizer`.
        wrt: see :class:`Optimizer`.

    State has devinterp's names: ``prior_center`` (of a composite ``prior_center_0``, ``prior_center_1``) if there is
    localization, ``square_avg`` of ``"rmsprop"``, and ``initial_param`` with a box or metrics. A localization that is
    first switched on later pulls to where the parameters are then. :meth:`load_state_dict` takes devinterp's state dict
    as it is. devinterp keeps priors and preconditioners as Python objects in its groups, which no other side can make:
    after it has loaded ours, put the objects that its groups had before back into them.

    Differences from devinterp:
        A sign that is wrong is an error (there it is taken, or for a prior of a factory left out). A mask broadcasts.
        Sketches hash the place of each number, where devinterp keeps tables of 12 bytes for each parameter: they take
        no memory and can be compared with those of :func:`jaxoptim.sampling.sketch`, but are other numbers than there.

    Raises:
        ``ValueError`` for a number out of range, for an unknown ``preconditioner``, and for a mask or center that does
        not fit; ``TypeError`` for an option that the preconditioner has not; ``NotImplementedError`` for
        ``add_grad_correction``, which devinterp has not either (:class:`jaxoptim.rules.PSGLD` has it, ``gamma``).

    References:
        Welling, Teh, Bayesian learning via stochastic gradient Langevin dynamics, ICML 2011. Li, Chen, Carlson, Carin,
        Preconditioned stochastic gradient Langevin dynamics for deep neural networks, AAAI 2016. Lau, Furman, Wang,
        Murfet, Wei, The local learning coefficient, 2023. Of sketches: see :func:`jaxoptim.sampling.sketch`.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from jaxoptim import optim
        >>> chain = optim.SGMCMC.rmsprop_sgld(
        ...     {"w": jnp.ones(2)}, lr=1e-3, nbeta=50.0, localization=10.0, save_metrics=True, key=jax.random.key(1)
        ... )
        >>> for _ in range(3):
        ...     loss = chain.minimize(lambda params: jnp.sum(params["w"] ** 2) / 2)
        >>> chain.get_metrics().numel
        2
    """

    rule = rules.SGMCMC
    may_lack: ClassVar[frozenset[str]] = Sampler.may_lack | {
        "weight_decay",
        "localization",
        "center_slot",
        "alpha",
        "eps",
        "diffusion_factor",
        "optimize_over",
        "sketch_start",
    }
    unlisted: ClassVar[frozenset[str]] = frozenset(("sketch_start",))

    _center: Any = "initial"  # of groups that do not say

    def __init__(
        self,
        params: Any,
        *,
        lr: Number = 0.01,
        noise_level: Number = 1.0,
        nbeta: Number = 1.0,
        prior: Any = None,
        preconditioner: str | None = "identity",
        preconditioner_kwargs: Mapping[str, Any] | None = None,
        bounding_box_size: Number | None = None,
        mask: Any = None,
        save_metrics: bool = False,
        sketch_dim: int | None = None,
        sketch_seed: int = 0,
        key: Any = None,
        noise_impl: str = "key",
        groups: Groups | None = None,
        frozen: Selectors | None = None,
        wrt: Any = None,
    ) -> None:
        self.fixed = {"sketch_dim": sketch_dim, "sketch_seed": None}
        if sketch_dim is not None:
            sketches.check(sketch_dim, sketch_seed, "sketch_")
            self.fixed |= {"sketch_seed": np.uint32(sketch_seed)}
        terms = terms_of(prior)
        self._center = terms.center
        self._centers: dict[Parameter, jax.Array] = {}
        conditioner = {"alpha": 0.99, "eps": 0.1, "diffusion_factor": 0.01}
        defaults = {
            "lr": lr,
            "noise_level": noise_level,
            "nbeta": nbeta,
            **_of_prior(terms),
            **conditioner,
            **_conditioner(preconditioner, preconditioner_kwargs),
            "bounding_box_size": bounding_box_size,
            "optimize_over": mask,
            "metrics": "components" if save_metrics else None,
            "key": key,
            "noise_impl": noise_impl,
        }
        super().__init__(params, defaults, groups=groups, frozen=frozen, wrt=wrt)
        self._place_centers()

    @classmethod
    def sgld(
        cls,
        params: Any,
        lr: Number = 0.01,
        noise_level: Number = 1.0,
        weight_decay: float = 0.0,
        localization: float = 0.0,
        nbeta: Number = 1.0,
        bounding_box_size: Number | None = None,
        mask: Any = None,
        save_metrics: bool = False,
        sketch_dim: int | None = None,
        sketch_seed: int = 0,
        *,
        key: Any = None,
        noise_impl: str = "key",
        groups: Groups | None = None,
        frozen: Selectors | None = None,
        wrt: Any = None,
    ) -> Self:
        r"""SGLD with weight decay and localization; :class:`SGLD` is the same with other metrics.

        Args:
            params: see :class:`SGMCMC`, as what is not listed here.
            lr: see :class:`SGMCMC`.
            noise_level: see :class:`SGMCMC`; another than 1 warns.
            weight_decay: :math:`\lambda \ge 0`, toward zero (default 0).
            localization: :math:`\gamma \ge 0`, toward the initial parameters (default 0).
            nbeta: see :class:`SGMCMC`; 1 warns.
            bounding_box_size: see :class:`SGMCMC`.
            mask: see :class:`SGMCMC`.
            save_metrics: see :class:`SGMCMC`.
            sketch_dim: see :class:`SGMCMC`.
            sketch_seed: see :class:`SGMCMC`.
            key: see :class:`SGMCMC`.
            noise_impl: see :class:`SGMCMC`.
            groups: see :class:`SGMCMC`.
            frozen: see :class:`SGMCMC`.
            wrt: see :class:`SGMCMC`.

        Examples:
            >>> import jax.numpy as jnp
            >>> from jaxoptim import optim
            >>> chain = optim.SGMCMC.sgld({"w": jnp.ones(2)}, lr=0.5, nbeta=2.0)
            >>> chain.step({"w": jnp.ones(2)}, noise={"w": jnp.zeros(2)})
            >>> chain.params["w"].tolist()
            [0.5, 0.5]
        """
        warn_of_settings("SGLD", noise_level, nbeta, prefix="")
        return cls(
            params,
            lr=lr,
            noise_level=noise_level,
            nbeta=nbeta,
            prior=_prior(weight_decay, localization),
            bounding_box_size=bounding_box_size,
            mask=mask,
            save_metrics=save_metrics,
            sketch_dim=sketch_dim,
            sketch_seed=sketch_seed,
            key=key,
            noise_impl=noise_impl,
            groups=groups,
            frozen=frozen,
            wrt=wrt,
        )

    @classmethod
    def rmsprop_sgld(
        cls,
        params: Any,
        lr: Number = 0.01,
        noise_level: Number = 1.0,
        weight_decay: float = 0.0,
        localization: float = 0.0,
        nbeta: Number = 1.0,
        alpha: Number = 0.99,
        eps: Number = 0.1,
        add_grad_correction: bool = False,
        bounding_box_size: Number | None = None,
        mask: Any = None,
        save_metrics: bool = False,
        sketch_dim: int | None = None,
        sketch_seed: int = 0,
        *,
        key: Any = None,
        noise_impl: str = "key",
        groups: Groups | None = None,
        frozen: Selectors | None = None,
        wrt: Any = None,
    ) -> Self:
        r"""SGLD with RMSprop's preconditioner, weight decay and localization; :class:`PSGLD` has more options.

        Args:
            params: see :meth:`sgld`, as what is not listed here.
            lr: see :meth:`sgld`.
            noise_level: see :meth:`sgld`.
            weight_decay: see :meth:`sgld`.
            localization: see :meth:`sgld`.
            nbeta: see :meth:`sgld`.
            alpha: decay rate :math:`\alpha` in [0, 1) (default 0.99).
            eps: :math:`\delta > 0` (default 0.1).
            add_grad_correction: False; see :class:`SGMCMC`.
            bounding_box_size: see :meth:`sgld`.
            mask: see :meth:`sgld`.
            save_metrics: see :meth:`sgld`.
            sketch_dim: see :meth:`sgld`.
            sketch_seed: see :meth:`sgld`.
            key: see :meth:`sgld`.
            noise_impl: see :meth:`sgld`.
            groups: see :meth:`sgld`.
            frozen: see :meth:`sgld`.
            wrt: see :meth:`sgld`.

        Examples:
            >>> import jax.numpy as jnp
            >>> from jaxoptim import optim
            >>> chain = optim.SGMCMC.rmsprop_sgld({"w": jnp.ones(2)}, lr=0.5, nbeta=2.0, alpha=0.0, eps=1.0)
            >>> chain.step({"w": jnp.ones(2)}, noise={"w": jnp.zeros(2)})
            >>> chain.params["w"].tolist()
            [0.75, 0.75]
        """
        warn_of_settings("RMSProp-SGLD", noise_level, nbeta, prefix="")
        return cls(
            params,
            lr=lr,
            noise_level=noise_level,
            nbeta=nbeta,
            prior=_prior(weight_decay, localization),
            preconditioner="rmsprop",
            preconditioner_kwargs={"alpha": alpha, "eps": eps, "add_grad_correction": add_grad_correction},
            bounding_box_size=bounding_box_size,
            mask=mask,
            save_metrics=save_metrics,
            sketch_dim=sketch_dim,
            sketch_seed=sketch_seed,
            key=key,
            noise_impl=noise_impl,
            groups=groups,
            frozen=frozen,
            wrt=wrt,
        )

    @classmethod
    def sgnht(
        cls,
        params: Any,
        lr: Number = 0.01,
        diffusion_factor: Number = 0.01,
        nbeta: Number = 1.0,
        bounding_box_size: Number | None = None,
        save_metrics: bool = False,
        sketch_dim: int | None = None,
        sketch_seed: int = 0,
        *,
        key: Any = None,
        noise_impl: str = "key",
        groups: Groups | None = None,
        frozen: Selectors | None = None,
        wrt: Any = None,
    ) -> Self:
        r"""SGLD at the temperature :math:`2A`, which devinterp 2 calls SGNHT; :class:`SGNHT` is the thermostat.

        Args:
            params: see :meth:`sgld`, as what is not listed here.
            lr: see :meth:`sgld`.
            diffusion_factor: :math:`A \ge 0` (default 0.01).
            nbeta: see :meth:`sgld`.
            bounding_box_size: see :meth:`sgld`.
            save_metrics: see :meth:`sgld`.
            sketch_dim: see :meth:`sgld`.
            sketch_seed: see :meth:`sgld`.
            key: see :meth:`sgld`.
            noise_impl: see :meth:`sgld`.
            groups: see :meth:`sgld`.
            frozen: see :meth:`sgld`.
            wrt: see :meth:`sgld`.

        Examples:
            >>> import warnings, jax.numpy as jnp
            >>> from jaxoptim import optim
            >>> with warnings.catch_warnings(record=True) as caught:
            ...     warnings.simplefilter("always")
            ...     chain = optim.SGMCMC.sgnht({"w": jnp.zeros(2)}, lr=0.25, diffusion_factor=0.5, nbeta=2.0)
            >>> str(caught[0].message)[:43]
            'preconditioner="nht" is SGLD at temperature'
            >>> chain.step({"w": jnp.zeros(2)}, noise={"w": jnp.ones(2)})
            >>> chain.params["w"].tolist()
            [0.5, 0.5]
        """
        warn_of_settings("SGNHT", 1.0, nbeta, prefix="")
        return cls(
            params,
            lr=lr,
            nbeta=nbeta,
            preconditioner="nht",
            preconditioner_kwargs={"diffusion_factor": diffusion_factor},
            bounding_box_size=bounding_box_size,
            save_metrics=save_metrics,
            sketch_dim=sketch_dim,
            sketch_seed=sketch_seed,
            key=key,
            noise_impl=noise_impl,
            groups=groups,
            frozen=frozen,
            wrt=wrt,
        )

    @classmethod
    def get_method(cls, method: str) -> Callable[..., Self]:
        """Return the factory of this name, one of the three.

        Args:
            method: ``"sgld"``, ``"rmsprop_sgld"`` or ``"sgnht"``.

        Raises:
            ``ValueError`` for another name.

        Examples:
            >>> from jaxoptim import optim
            >>> optim.SGMCMC.get_method("sgld") == optim.SGMCMC.sgld
            True
        """
        methods: dict[str, Callable[..., Self]] = {
            "sgld": cls.sgld,
            "rmsprop_sgld": cls.rmsprop_sgld,
            "sgnht": cls.sgnht,
        }
        if method not in methods:
            raise ValueError(f"Invalid method: {method!r}. It must be one of {', '.join(map(repr, methods))}.")
        return methods[method]

    # Metrics.

    def get_metrics(self) -> Metrics:
        """Return the metrics of the last step, over all groups.

        Returns:
            :class:`Metrics`, of numbers; zeros before the first step.

        Raises:
            ``RuntimeError`` without ``save_metrics=True``.

        Examples:
            >>> import jax.numpy as jnp
            >>> from jaxoptim import optim
            >>> chain = optim.SGMCMC({"w": jnp.ones(2)}, lr=0.5, prior=2.0, save_metrics=True)
            >>> chain.step({"w": jnp.array([3.0, 4.0])}, noise={"w": jnp.zeros(2)})
            >>> chain.get_metrics().scaled_grad, chain.get_metrics().distance
            (1.25, 0.0)
        """
        columns = zip(_MEASURED, zip(*self.iter_group_metrics(), strict=True), strict=True)
        return Metrics._make(math.hypot(*x) if name.endswith("_norm") else sum(x) for name, x in columns)

    def iter_group_metrics(self) -> Iterator[Metrics]:
        """Yield the metrics of the last step, group by group; see :meth:`get_metrics`."""
        self._storage.start()  # groups that were just loaded have none
        for group in self.param_groups:
            if rules.COUNT not in group:
                raise RuntimeError("Metrics not enabled. Set save_metrics=True.")
            yield Metrics._make(group[name].item() for name in _MEASURED)

    def get_sketches(self) -> Sketches:
        r"""Return sketches of the parts of the last step, over all groups; they keep products nearly.

        With all parameters in one vector, group after group, that of a part v is :math:`S v` for a random matrix S that
        is the same in all steps and all chains. Over seeds

        .. math::
            E\,Sv \cdot Su = v \cdot u, \qquad
            \mathrm{Var}\,Sv \cdot Su = \frac{1}{k}\Big(\|v\|^2 \|u\|^2 + (v \cdot u)^2 - 2 \sum_i v_i^2 u_i^2\Big),

        with :math:`k` the ``sketch_dim``. What :func:`jaxoptim.sampling.sketch` makes of a list of trees, one for each
        group, with the same dim and seed can be compared too.

        Returns:
            :class:`Sketches`; zeros before the first step.

        Raises:
            ``RuntimeError`` without ``sketch_dim``.

        Examples:
            >>> import jax.numpy as jnp
            >>> from jaxoptim import optim
            >>> chain = optim.SGMCMC({"w": jnp.ones(3)}, lr=0.5, sketch_dim=1000)
            >>> chain.step({"w": jnp.array([2.0, 4.0, 4.0])}, noise={"w": jnp.zeros(3)})
            >>> float(jnp.linalg.norm(chain.get_sketches().scaled_grad))
            1.5
        """
        if self.fixed["sketch_dim"] is None:
            raise RuntimeError("Sketches not enabled. Set sketch_dim, such as sketch_dim=1024.")
        self._storage.start()  # groups that were just loaded have none
        return Sketches._make(sum(group[name] for group in self.param_groups) for name in SKETCHES)

    def get_params(self) -> Iterator[Parameter]:
        """Yield each parameter, in the order of the groups."""
        for group in self.param_groups:
            yield from group["params"]

    # Groups.

    def _check_selected(self, options: dict[str, Any]) -> None:
        super()._check_selected({name: option for name, option in options.items() if name not in _GIVEN})

    def _add(self, group: dict[str, Any]) -> None:
        center = self._center
        if "prior" in group:
            terms = terms_of(group.pop("prior"), group.get("localization") or 1.0)
            center = terms.center
            group |= _of_prior(terms)
        if "mask" in group:
            group["optimize_over"] = group.pop("mask")
        if "preconditioner" in group or "preconditioner_kwargs" in group:
            kind = group.get("preconditioner", self.defaults["preconditioner"])
            group |= _conditioner(kind, group.pop("preconditioner_kwargs", None))
        found = {}
        if not isinstance(center, str):
            found = dict(zip(group["params"], centers_of(center, group["params"]), strict=True))
        if self.fixed["sketch_dim"] is not None:
            group["sketch_start"] = max(map(_sketch_end, self.param_groups), default=0)
        super()._add(group)
        self._centers |= found
        if group["preconditioner"] == "nht":
            warn_user(
                'preconditioner="nht" is SGLD at temperature 2A, twice its diffusion_factor, as devinterp 2 computes '
                "it: its momentum never moves. optim.SGNHT is the thermostat."
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see :meth:`Sampler.add_param_group`, and ``groups`` of :class:`SGMCMC` for its options."""
        super().add_param_group(param_group)
        self._place_centers()

    def _place_centers(self) -> None:
        """Put the centers that were given into the state."""
        slots = {param: group["center_slot"] for group in self.param_groups for param in group["params"]}
        for param, center in self._centers.items():
            self.state[param][slots[param]] = center
        if self._centers:
            self._centers = {}
            self._storage.settle()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"prior_center": self._center}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._centers = {}
        self._center = state.get("prior_center", self._center)
        super().__setstate__(state)

    # Saving and loading.

    def state_dict(self) -> dict[str, Any]:
        """Return the state in devinterp's layout, with the places of parameters; see :meth:`Optimizer.state_dict`."""
        return devinterp_state.with_places(super().state_dict())

    def _load(self, state_dict: dict[str, Any], strict: bool, **correspondence: Any) -> None:
        super()._load(devinterp_state.read(state_dict, aside=_ASIDE), strict, **correspondence)


def _sketch_end(group: Mapping[str, Any]) -> int:
    """Return the place after the last number of a group in the vector that is sketched."""
    return group.get("sketch_start", 0) + sum(real_size(param.value) for param in group["params"])


def _prior(weight_decay: float, localization: float) -> Prior:
    """Return the prior of the factories: devinterp makes a member for each strength that is not zero."""
    members = [GaussianPrior(weight_decay, center=None), GaussianPrior(localization)]
    return CompositePrior([member for member in members if member.localization])


def _of_prior(terms: Terms) -> dict[str, Any]:
    """Return a prior in the terms of the rule, without its center."""
    return {"weight_decay": terms.weight_decay, "localization": terms.localization, "center_slot": terms.slot}


def _conditioner(kind: str | None, kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a preconditioner and its options in the terms of the rule."""
    kind, options = kind or "identity", dict(kwargs or {})
    allowed = _KWARGS.get(kind, ())  # of others the rule tells
    if kind in _KWARGS and (unknown := [name for name in options if name not in allowed]):
        takes = ", ".join(allowed) or "none"
        raise TypeError(f"preconditioner_kwargs: {unknown[0]!r} is no option of {kind!r}. It takes {takes}.")
    if options.pop("add_grad_correction", False):
        raise NotImplementedError(
            "add_grad_correction=True: devinterp has no such term either. Give rules.PSGLD(gamma=True) to "
            "sampling.sample, which estimates the curvature that it takes."
        )
    return {"preconditioner": kind} | options
