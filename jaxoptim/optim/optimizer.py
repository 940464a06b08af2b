"""The base of every torch-style optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar

import jax
from jax.sharding import Mesh
from optax import GradientTransformation, GradientTransformationExtraArgs

from jaxoptim.core import Rule, trees
from jaxoptim.core import Sampler as SamplerRule
from jaxoptim.core.loss import Loss, LossFunctions
from jaxoptim.core.modules import ModuleDef, ModuleLoss, Parts, Rest, parts_of
from jaxoptim.core.precision import checked
from jaxoptim.engine.owner import Minimization
from jaxoptim.engine.programs import Measured
from jaxoptim.optim import functional, gradient_transforms, option_names, placement, state_checks, state_dicts, subclass
from jaxoptim.optim.description import Table, described, has_schedule, options_at
from jaxoptim.optim.grad_scaler import GradScaler
from jaxoptim.optim.groups import Groups as Groups
from jaxoptim.optim.groups import Selectors as Selectors
from jaxoptim.optim.groups import chosen, is_group, listed, parameters_in, selected
from jaxoptim.optim.hooks import Hooked, hooked
from jaxoptim.optim.hooks import register_optimizer_step_post_hook as register_optimizer_step_post_hook
from jaxoptim.optim.hooks import register_optimizer_step_pre_hook as register_optimizer_step_pre_hook
from jaxoptim.optim.minimization import loss_of, minimization, undecidable
from jaxoptim.optim.parameter import zeros_like
from jaxoptim.optim.part import Part
from jaxoptim.optim.state import State
from jaxoptim.optim.storage import Storage, labelled
from jaxoptim.optim.subclass import Number as Number


class _Required:
    """The default of an option that every group must give."""

    def __repr__(self) -> str:
        return "<required parameter>"


required = _Required()
"""Stands for a default that every group must give."""


class Optimizer(Hooked):
    r"""The base of the torch-style optimizers: ``torch.optim.Optimizer`` over pytrees of JAX arrays.

    A step takes the parameters :math:`\theta` of each group through the group's rule,

    .. math::
        \theta, s \leftarrow \mathrm{step}(\mathrm{rule}(\text{options of the group}), \theta, g, s),

    in one compiled call for all groups, whose numbers (learning rate, betas, ...) are data.

    A subclass is a rule and one line: ``class Mine(optim.Optimizer): rule = MyRule``. It takes the
    hyperparameters of the rule after ``params``.

    Args:
        params: one of these. Arrays are copied: yours stay yours.

            - a pytree of arrays;
            - a module of equinox (its inexact arrays are trained) or of nnx (its ``nnx.Param`` are trained);
            - linen's variables with ``"batch_stats"`` (their ``"params"`` are trained);
            - an iterable of :class:`Parameter` or of ``(name, Parameter)``;
            - torch's list of group dicts, whose ``"params"`` is a tree or an iterable.
        defaults: the options of groups that do not give their own.
        groups: options for some parameters of one pytree, ``[(selector, {"lr": 0.1}), ...]``. A selector is a
            regular expression that matches the whole dotted path (``"encoder\\..*\\.bias"``), a predicate of the
            path or of ``(path, array)``, or a tree of bools like ``params``, or a prefix of one. A parameter
            belongs to the first group that selects it. A last group takes all other parameters (default None: one
            group).
        frozen: a selector, or a list of them, of parameters that :meth:`freeze` freezes at once (default None: none).
        wrt: a filter of nnx for the variables of an nnx module that are trained, such as ``nnx.LoRAParam`` or
            ``nnx.All(nnx.Param, nnx.PathContains("head"))`` (default None: ``nnx.Param``). The other variables are kept
            as they are; if a loss changes an ``nnx.Param`` among them, the change is dropped.
        gradient_transform: a transformation of optax for the gradients of all parameters (default None: none). It is
            applied before each step, after the clipping of :meth:`minimize`. A group may have one too, under this key,
            which is applied afterwards. A missing gradient counts as zero. :meth:`state_dict` has its state as one more
            entry; the state begins afresh if parameters are added or removed. Samplers and L-BFGS take none.
        master_weights: keep the values of float16 and bfloat16 parameters in float32 too (default False); this and the
            next two are those of :meth:`jaxoptim.Rule.with_precision`. Samplers and L-BFGS have none of the three.
        rounding: of float16 and bfloat16 parameters and state, ``"nearest"`` (default) or ``"stochastic"``.
        state_dtype: of the state, bfloat16 or float16 (default None: that of the parameter, float32 at least).
        mesh: a mesh whose devices all have the parameters; those that are sharded over it already stay as they are
            (default None: each parameter where it is).
        zero: the name of an axis of ``mesh``, or several, over whose devices state is in parts, as by
            :func:`jaxoptim.distributed.zero` (default None: state is where its parameter is). Samplers and L-BFGS have
            neither.

    Attributes:
        param_groups: a list of dicts, the options of each group and its ``"params"``, a list of
            :class:`Parameter`. What you write there takes effect at the next step.
        state: the slots of each parameter, ``state[param]["exp_avg"]``: a live view, by torch's names.
        defaults: as given.
        last: the measurements of the last call of :meth:`minimize` that measures, arrays on the device: ``grad_norm``
            (before clipping), ``update_norm``, ``skipped``, ``num_skipped`` (so far) and ``loss_scale``; None before.

    Raises:
        The errors of torch, with the name of the parameter: ``TypeError`` for objects that cannot be optimized, such as
        a parameter of torch, and for an option that does not exist; ``ValueError`` for an empty list, an option out of
        range, a parameter in two groups, or an axis that ``mesh`` lacks. ``TypeError`` also for ``wrt`` without an nnx
        module, and for ``zero`` without ``mesh``. A call that raises leaves parameters, state and counts as they were.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from jaxoptim import optim
        >>> params = {"w": jnp.array([1.0, -2.0]), "b": jnp.zeros(2)}
        >>> opt = optim.SGD(params, lr=0.1, groups=[("b", {"lr": 0.5})])
        >>> opt.step({"w": jnp.ones(2), "b": jnp.ones(2)})
        >>> jax.tree.map(lambda x: [round(y, 3) for y in x.tolist()], opt.params)
        {'b': [-0.5, -0.5], 'w': [0.9, -2.1]}
    """

    rule: ClassVar[type[Any]]
    """What computes the update of one parameter."""
    step_type: ClassVar[type | None] = jax.Array
    """How ``state`` shows the count of steps: a float32 array, an ``int``, or None for not at all."""

    starts_at_once: ClassVar[bool] = False
    """Whether the state of the first groups is there from the construction on, as the parent's."""

    storage_class: ClassVar[type[Storage]] = Storage
    """What keeps the parameters and makes the updates."""
    decays: ClassVar[tuple[str, str] | None] = None
    """An option of each group that a step multiplies by another one, and that other: ``("lr", "lrd")``."""
    _module: ModuleDef | None = None  # the module that the parameters came in
    _rest = Rest()  # its other arrays
    _mesh: Mesh | None = None  # where new parameters go
    fixed: Mapping[str, Any] = {}
    """Hyperparameters of the rule that the class sees to itself, and the values that they have there."""
    may_lack: ClassVar[frozenset[str]] = frozenset()
    """Options that a state dict may lack, because the parent has not got them; they stay as they are."""

    unlisted: ClassVar[frozenset[str]] = frozenset()
    """Options that groups have only where they are given, because the parent has not got them."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in ("step", "minimize"):
            if name in vars(cls):
                setattr(cls, name, hooked(vars(cls)[name]))
        if "rule" in vars(cls):
            subclass.check_rule(cls)
            if issubclass(cls.rule, SamplerRule) and cls.storage_class is Storage:
                raise TypeError(f"{cls.rule.__name__} is a sampler. Write `class {cls.__name__}(optim.Sampler):`.")
            subclass.complete(cls)

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        groups: Groups | None = None,
        frozen: Selectors | None = None,
        wrt: Any = None,
        gradient_transform: GradientTransformation | None = None,
        master_weights: bool = False,
        rounding: str = "nearest",
        state_dtype: Any = None,
        mesh: Mesh | None = None,
        zero: str | tuple[str, ...] | None = None,
    ) -> None:
        self._prepare()
        self._mesh = placement.checked(mesh, zero)
        self._storage.axes = placement.data_axes(mesh, zero)
        self.defaults = defaults
        gradient_transforms.check(gradient_transform)
        self._storage.gradient_transform = gradient_transform
        self._storage.precision = checked(master_weights, rounding, state_dtype)
        if (parts := parts_of(params, wrt)) is not None:
            self._module, params, self._rest = parts
        self._add_all(params, groups)
        if frozen is not None:
            self.freeze(frozen)
        placement.warn_of_whole(self._storage, 4)
        if self.starts_at_once:
            self._storage.start()

    def _add_all(self, params: Any, groups: Groups | None) -> None:
        """Add the parameters in their groups."""
        params = listed(params)
        if isinstance(params, list | tuple) and params and is_group(params[0]):
            if groups is not None:
                raise TypeError("groups selects parameters of one pytree, but params is a list of group dicts already.")
            self._storage.is_list = True
            for group in params:
                self.add_param_group(group)
            return
        tree, names = parameters_in(params)
        if not jax.tree.leaves(tree):
            raise ValueError("optimizer got an empty parameter list")
        self._storage.forest = [tree]
        for group in selected(tree, names, groups or [], self._check_selected):
            self._add(group)

    def _check_selected(self, options: dict[str, Any]) -> None:
        """Raise for options that this class does not have; only torch's group dicts have keys of the user's own."""
        known = [*self.defaults, *self.unlisted, *[gradient_transforms.KEY] * self._storage.takes_transforms]
        option_names.check_all(type(self).__name__, options, known)

    def _prepare(self) -> None:
        if not hasattr(self, "rule"):
            raise TypeError(f"{type(self).__name__} has no rule. Write `class Mine(optim.Optimizer): rule = MyRule`.")
        self._storage = self.storage_class(self.rule, self.step_type, self.fixed)
        self._storage.unlisted = self.unlisted
        self._state = State(self._storage)
        self._prepare_hooks()
        self._awaits_gradients = True
        """Whether each ``grad`` may be None because nobody knows that it is to be set."""
        self.last: Measured | None = None
        self._loss_functions = LossFunctions("minimize", "opt.minimize(loss_fn, batch)")

    # Parameters and their groups.

    @property
    def params(self) -> Any:
        """The current parameters, in the structure that was given; each array is valid as long as you hold it.

        A list of group dicts gives a list with one tree for each group, an iterable of parameters the list of
        their values. After :meth:`add_param_group` it is a list: the tree so far, and one for each new group. A module
        gives a module, with the statistics and counts of its last evaluation by :meth:`minimize`.
        """
        values = self._storage.values()
        if self._module is None:
            return values
        if not self._storage.is_list:
            return self._module.joined(values, self._rest)
        first, *others = values
        return [self._module.joined(first, self._rest), *others]

    @property
    def parts(self) -> Parts | None:
        """The module that the parameters came in, split into its parts; None for others, and with groups added to it.

        Cheaper than :attr:`params`, which joins the parts to a module of its own.
        """
        if self._module is None or self._storage.is_list:
            return None
        return Parts(self._module, self._storage.values(), self._rest)

    @property
    def wrt(self) -> Any:
        """The predicate of nnx for the trained variables of an nnx module; None for other ``params``."""
        return getattr(self._module, "wrt", None)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups; see :class:`Optimizer`."""
        return self._storage.groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._storage.groups = groups

    @property
    def state(self) -> State:
        """The state of each parameter; see :class:`Optimizer`."""
        return self._state

    @state.setter
    def state(self, state: Mapping[Any, Any]) -> None:
        self.state.clear()
        self.state.update(state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, such as a layer that was frozen so far.

        Args:
            param_group: a dict with ``"params"`` (a pytree, or an iterable of parameters) and options. As in
                torch it is completed in place: ``"params"`` becomes a list, missing options are filled in.

        Raises:
            ``TypeError`` for anything but a dict, for objects in it that cannot be optimized, and for a misspelt option
            (other unknown keys are the user's own, as in torch). ``ValueError`` for a missing required option, an
            option out of range, names for some parameters only, or a parameter of another group. ``KeyError`` without
            ``"params"``. A parameter that is given twice is a warning; for samplers and L-BFGS a ``ValueError``.

        Examples:
            >>> from jaxoptim import optim
            >>> opt = optim.SGD([1.0], lr=0.1)
            >>> opt.add_param_group({"params": [2.0], "lr": 0.5})
            >>> [group["lr"] for group in opt.param_groups]
            [0.1, 0.5]
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        if "params" not in param_group:
            raise KeyError("param_group has no 'params'. Give {'params': a pytree or a list of Parameters, ...}.")
        tree, names = parameters_in(param_group["params"])
        param_group["params"] = jax.tree.leaves(tree)
        if names is not None:
            param_group["param_names"] = names
        self._add(param_group)
        self._storage.forest.append(tree)
        self._storage.is_list = self._storage.is_list or len(self._storage.forest) > 1

    def _add(self, group: dict[str, Any]) -> None:
        """Append a group of parameters that stand in the user's trees, or will."""
        self._storage.allowed = self.defaults.keys()
        self._storage.check_keys(type(self).__name__, group)
        gradient_transforms.check(group.get(gradient_transforms.KEY))
        for name, default in self.defaults.items():
            if default is required and name not in group:
                raise ValueError(f"parameter group didn't specify a value of required optimization parameter {name}")
            group.setdefault(name, default)
        rule = self._storage.rule_of(group)
        for index, param in enumerate(group["params"]):
            self._storage.check_param(rule, param.name or f"params[{index}]", param)
        placement.place(group["params"], self._mesh)
        if len(group["params"]) != len(set(group["params"])):
            self._storage.check_repeated(group["params"])
            warnings.warn(
                "optimizer contains a parameter group with duplicate parameters; in future, this will cause an error; "
                "see github.com/pytorch/pytorch/issues/40967 for more information",
                stacklevel=3,
            )
        for other in self.param_groups:
            if ("param_names" in group) != ("param_names" in other):
                kind = "with names" if "param_names" in group else "without names"
                raise ValueError(
                    "all optimizer param groups should be with/without names. "
                    f"cannot add param group {kind} to the optimizer"
                )
            if shared := set(other["params"]) & set(group["params"]):
                raise ValueError(f"some parameters appear in more than one parameter group: {shared.pop()}")
        self.param_groups.append(group)

    def freeze(self, selectors: Selectors) -> None:
        r"""Freeze parameters: steps leave them, their state and their counts unchanged.

        Their ``requires_grad`` is False then, which you may also set yourself. ``minimize`` does not differentiate by
        them, and so compiles once for each choice of frozen parameters; for ``step`` frozen parameters are data, unless
        they are large.

        Args:
            selectors: a selector (see :class:`Optimizer`) or a list of them. A regular expression selects what lies
                below a path too: ``"encoder"``, ``r"blocks\.[0-5]"``.

        Raises:
            ``ValueError`` for a selector that selects nothing, ``TypeError`` for anything but a selector. Nothing is
            changed then.

        Examples:
            >>> import jax.numpy as jnp
            >>> from jaxoptim import optim
            >>> params = {"encoder": {"w": jnp.ones(2)}, "head": jnp.ones(2)}
            >>> opt = optim.SGD(params, lr=0.5, frozen=["encoder"])
            >>> def loss(params):
            ...     return jnp.sum(params["encoder"]["w"] * params["head"])
            >>> value = opt.minimize(loss)
            >>> opt.params["encoder"]["w"].tolist(), opt.params["head"].tolist()
            ([1.0, 1.0], [0.5, 0.5])
            >>> opt.unfreeze("encoder")
            >>> value = opt.minimize(loss)
            >>> opt.params["encoder"]["w"].tolist(), opt.params["head"].tolist()
            ([0.75, 0.75], [0.0, 0.0])
        """
        self._train(selectors, False, "freeze")

    def unfreeze(self, selectors: Selectors = ".*") -> None:
        """Unfreeze parameters that :meth:`freeze` has frozen; they continue with the state that they had.

        Args:
            selectors: see :meth:`freeze` (default: all parameters).

        Raises:
            As :meth:`freeze`.

        Examples:
            See :meth:`freeze`.
        """
        self._train(selectors, True, "unfreeze")

    def _train(self, selectors: Selectors, is_trained: bool, what: str) -> None:
        tree = self._storage.tree()
        params = list(jax.tree.leaves(tree))
        labels = labelled(tree)
        picked = chosen(selectors, tree, [labels[param] for param in params], what)
        for param, is_picked in zip(params, picked, strict=True):
            if is_picked:
                param.requires_grad = is_trained

    def current_options(self) -> list[dict[str, Any]]:
        """Return the options of each group as the next step uses them.

        A schedule is replaced by its value at the largest count of steps in the group.

        Returns:
            For each group a dict of its options and the keys of your own, without its parameters.

        Examples:
            >>> from jaxoptim import optim, schedules
            >>> opt = optim.SGD([1.0], lr=schedules.step_lr(0.5, step_size=1, gamma=0.5))
            >>> opt.step([0.5])
            >>> opt.current_options()[0]["lr"]
            0.25
        """
        counts = dict.fromkeys(map(id, self.param_groups), 0)
        if any(map(has_schedule, self.param_groups)):
            for part in self._storage.parts():
                counts[id(part.group)] = max(part.count or 0, counts.get(id(part.group), 0))
        options = [options_at(group, counts[id(group)]) for group in self.param_groups]
        if self.decays is not None:
            rate, factor = self.decays
            options = [{**of, rate: of[rate] * of[factor]} for of in options]
        return options

    def describe(self) -> Table:
        """Return a table of what the next step does with each parameter.

        Returns:
            A tuple of rows ``(name, shape, dtype, group, rate, decay, trained)``, one for each leaf of the parameters,
            None included, or for each array of a module that is trained. Printed, it is a table.

        Examples:
            >>> import jax.numpy as jnp
            >>> from jaxoptim import optim
            >>> params = {"b": jnp.zeros(3), "w": jnp.ones((2, 3)), "x": None}
            >>> print(optim.AdamW(params, groups=[("b", {"weight_decay": 0.0})]).describe())
            name  shape   dtype    group  rate   decay  trained
            b     (3,)    float32  0      0.001  0      trained
            w     (2, 3)  float32  1      0.001  0.01   trained
            x     -       -        -      -      -      frozen
        """
        return described(self._storage, self.current_options(), with_none=self._module is None)

    # Steps.

    @hooked
    def step(self, grads: Any = None, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters once.

        Args:
            grads: a tree like ``params``, None where a parameter is to be skipped (default: each parameter's
                ``grad``). For complex parameters the convention of torch and optax: the conjugate of what
                ``jax.grad`` returns. As in torch, a function in this place is the closure.
            closure: a function that sets each parameter's ``grad`` and returns the loss.

        Returns:
            What the closure returned, else None.

        Raises:
            ``ValueError`` for a tree or shape that does not fit, ``RuntimeError`` for sparse or dense gradients
            where the other is needed, ``TypeError`` for both arguments at once, and for a key of a group that is an
            option misspelt. A warning, once, for a step where no gradient was ever set.

        Examples:
            >>> import jax.numpy as jnp
            >>> from jaxoptim import optim
            >>> opt = optim.Adam({"w": jnp.ones(2)}, lr=0.1)
            >>> opt.step({"w": jnp.ones(2)})
            >>> [round(x, 3) for x in opt.params["w"].tolist()]
            [0.9, 0.9]
        """
        loss, grads = self._evaluated(grads, closure)
        self._update_along(grads, lambda: self._storage.advance(grads))
        return loss

    def _update_along(self, grads: Any, run: Callable[[], Any]) -> None:
        """Make one update along gradients."""
        try:
            self._update(run)
        except TypeError:  # looked for now only, as it takes long where there are many
            if (wrong := trees.first_no_data(grads)) is None:
                raise
            raise TypeError(f"The gradient of {wrong[0]!r} is {wrong[1]}, no array. {trees.NONE_ELSE}") from None

    def _evaluated(self, grads: Any, closure: Callable[[], Any] | None) -> tuple[Any, Any]:
        """Return the result of the closure, and the gradients of a step."""
        if callable(grads) and jax.tree_util.all_leaves([grads]):
            if closure is not None:
                raise TypeError("step takes gradients or a closure, but got two functions.")
            grads, closure = None, grads
        if closure is not None and grads is not None:
            raise TypeError("step takes gradients or a closure that sets them, but got both.")
        loss = None if closure is None else closure()
        if grads is not None:
            grads = grads if self._module is None else self._module.gradients(grads)
            return loss, trees.owned_arrays(grads)
        if self._awaits_gradients:
            self._look_for_gradients()
        return loss, self._storage.own_gradients()

    def _look_for_gradients(self) -> None:
        """Warn, once, of a step by gradients that nobody has ever set."""
        if self._storage.groups and not any(param.had_grad for param in self._storage.parameters()):
            warnings.warn(
                f"{type(self).__name__}.step() did nothing, because no parameter has ever had a grad. Give the "
                "gradients, step(grads) with grads = jax.grad(loss_fn)(opt.params), or call minimize(loss_fn).",
                stacklevel=5,
            )
        self._awaits_gradients = False

    @hooked
    def minimize(
        self,
        loss_fn: Callable[..., Any],
        *args: Any,
        has_aux: bool = False,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        accumulate: int | None = None,
        accumulate_mean: bool = True,
        skip_nonfinite: bool = False,
        measure: bool = False,
        loss_scale: GradScaler | None = None,
        static: Collection[str] = (),
        **kwargs: Any,
    ) -> Any:
        r"""Update the parameters once along the gradient of a loss, all in one compiled and donated program.

        It is compiled once for each ``loss_fn`` and shapes of ``args``; pass one function again and again, and
        the data as arguments. The whole gradient is clipped as torch does, first its norm, then each number:

        .. math::
            g \leftarrow g \min\Bigl(1, \frac{c}{\lVert g \rVert_2 + 10^{-6}}\Bigr), \qquad
            g \leftarrow \mathrm{clip}(g, -v, v)

        Args:
            loss_fn: ``loss_fn(params, *args, **kwargs)`` returns a real scalar, or ``(scalar, aux)``; ``params`` has
                the structure of :attr:`params`. Its changes of an nnx module (batch statistics, random counts) are
                kept, and so are linen's collections if they are its auxiliary output, which ``apply(..., mutable=)``
                returns. They go from one micro-batch to the next. L-BFGS keeps those of the first evaluation of a step.
            args: pytrees of arrays of JAX, NumPy or torch.
            has_aux: whether ``loss_fn`` returns an auxiliary output too (default False).
            clip_norm: :math:`c \ge 0`, a bound on the norm of the gradient of all parameters (default None: none).
            clip_value: :math:`v \ge 0`, a bound on each number of the gradient (default None: none).
            accumulate: the number of equal micro-batches into which the leading axis of every array among the
                arguments is cut, with one gradient in memory at a time (default None: the batch is taken whole).
                Keys get the number of the micro-batch folded in. The loss may then be ``(sum, weight)``, whose mean is
                that over all weights. An auxiliary output comes back with one entry for each micro-batch.
            accumulate_mean: whether the loss is the mean over micro-batches (default True), or their sum.
            skip_nonfinite: leave parameters and state as they are if the loss or a gradient is not finite (default
                False). The loss of such a step is nan, and it is counted in :attr:`last`.
            measure: leave the norms of gradient and update in :attr:`last` (default False; the options above do so
                too).
            loss_scale: a :class:`GradScaler`, whose factor the loss has when it is differentiated, for parameters or
                activations of float16. A step whose gradient is not finite is left out (default None: no factor).
            static: the names of keyword arguments that are fixed in the program, such as a flag (default: none).
            kwargs: keyword arguments of ``loss_fn``.

        Returns:
            The loss before the update, or ``(loss, aux)``.

        Raises:
            ``TypeError`` for a function that cannot be hashed, and for text that is not static; ``ValueError`` for a
            bound below zero, and for a batch that cannot be cut; what ``loss_fn`` raises.

        Examples:
            >>> import jax.numpy as jnp
            >>> from jaxoptim import optim
            >>> opt = optim.SGD({"w": jnp.ones(2)}, lr=0.1)
            >>> def loss(params, target):
            ...     return jnp.sum((params["w"] - target) ** 2)
            >>> [round(float(opt.minimize(loss, 3.0)), 3) for _ in range(3)]
            [8.0, 5.12, 3.277]
            >>> loss_before = opt.minimize(loss, 3.0, clip_norm=1.0)
            >>> round(float(opt.last.grad_norm), 3), round(float(opt.last.update_norm), 3)
            (2.896, 0.1)
        """
        self._loss_functions.check(loss_fn)
        given = args
        loss, args = loss_of(loss_fn, has_aux, args, kwargs, static)
        if self._module is not None:
            loss, args = self._of_module(loss, args, self._module)
        job = minimization(
            loss,
            args,
            clip_norm,
            clip_value,
            accumulate,
            accumulate_mean,
            skip_nonfinite,
            measure,
            self.last,
            loss_scale,
        )
        try:
            value, aux = self._update(lambda: self._minimized(job))
        except (jax.errors.ConcretizationTypeError, jax.errors.TracerIntegerConversionError) as error:
            if (advice := undecidable(given, kwargs, static)) is None:
                raise
            raise advice from error
        if loss_scale is not None and self.last is not None and self.last.loss_scale is not None:
            loss_scale.state = self.last.loss_scale
        if loss.carries:
            aux, changing = aux
            self._rest = self._rest._replace(changing=changing)
        return (value, aux) if has_aux else value

    def _of_module(self, loss: Loss, args: tuple[Any, ...], module: ModuleDef) -> tuple[Loss, tuple[Any, ...]]:
        """Return the loss of a module as one of the parameters, and its arguments, with the rest of the module."""
        if self._storage.is_list:
            raise TypeError("A loss takes one module, but parameters were added to it with add_param_group.")
        changes = self._rest.changing is not None
        function = ModuleLoss(module, loss.function, loss.has_aux)
        loss = loss._replace(function=function, has_aux=loss.has_aux or changes, carries=changes, num_whole=2)
        return loss, (*self._rest, *args)

    def _minimized(self, job: Minimization) -> tuple[Any, Any]:
        value, aux, measured = self._storage.minimize(job)
        if measured is not None:
            self.last = measured.after(self.last)
        return value, aux

    def _update(self, run: Callable[[], Any]) -> Any:
        """Make one update; classes that change their options at each step extend it."""
        return run()

    def _pure_rule(self, part: Part) -> Rule:
        """Return the rule with which the pure face continues."""
        return part.rule

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of all parameters.

        Args:
            set_to_none: set them to None (default), which makes ``step()`` skip the parameters, or to zero.

        Examples:
            >>> from jaxoptim import optim
            >>> weight = optim.Parameter(1.0)
            >>> weight.grad = 0.5
            >>> optim.SGD([weight]).zero_grad()
            >>> weight.grad is None
            True
        """
        for param in self._storage.parameters():
            if param.grad is not None:
                param.grad = None if set_to_none else zeros_like(param.grad)

    # The pure face.

    def to_functional(self) -> tuple[GradientTransformationExtraArgs, Any, Any]:
        """Return the transformation, the parameters and the state of this moment, for the pure face.

        Returns:
            ``(transformation, params, state)``, ``params`` as :attr:`params`, of a module the tree of what is trained.
            Frozen parameters stay as they are. Parameters that share options and count have one ``jaxoptim.OptState``;
            where groups differ, it is that of ``optax.partition``.

        Examples:
            >>> import jax.numpy as jnp, optax
            >>> from jaxoptim import optim
            >>> opt = optim.Adam({"w": jnp.ones(2)}, lr=0.1)
            >>> tx, params, state = opt.to_functional()
            >>> updates, state = tx.update({"w": jnp.ones(2)}, state, params)
            >>> opt.from_functional(optax.apply_updates(params, updates), state)
            >>> [round(x, 3) for x in opt.params["w"].tolist()]
            [0.9, 0.9]
        """
        return functional.leave(self._storage, self._pure_rule)

    def from_functional(self, params: Any, state: Any) -> None:
        """Take over parameters and state from the pure face.

        Args:
            params: a tree like that of :meth:`to_functional`.
            state: of the transformation that :meth:`to_functional` gave.

        Raises:
            ``ValueError`` for a tree or a state of another structure; nothing is changed then.

        Examples:
            See :meth:`to_functional`.
        """
        functional.enter(self._storage, self._pure_rule, params, state)

    # Saving and loading.

    def state_dict(self) -> dict[str, Any]:
        """Return the state in torch's layout.

        Returns:
            ``{"state": {id: slots}, "param_groups": [options and the ids of "params"]}``, the ids counted over
            all groups. Arrays are JAX arrays.

        Examples:
            >>> from jaxoptim import optim
            >>> optim.SGD([1.0], lr=0.1).state_dict()["param_groups"][0]["params"]
            [0]
        """
        for before in self._state_dict_pre_hooks.values():
            before(self)
        result = state_dicts.saved(self)
        for after in self._state_dict_post_hooks.values():
            changed = after(self, result)
            result = result if changed is None else changed
        return result

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True, keep: Collection[str] = ()) -> None:
        """Load the result of :meth:`state_dict`, of this class or of torch's. It brings options too.

        Slots keep the dtypes they have here. Where both sides name all parameters (``param_names``, the names of
        :class:`Parameter`, the paths of a pytree), they are matched by name, else by position: that of
        ``jax.tree.leaves``, which sorts the keys of a dict.

        Args:
            state_dict: in torch's layout, with arrays of JAX, NumPy or torch. It is not changed.
            strict: check class, parameters, options, slots and shapes (default True); otherwise, as torch does,
                take what there is.
            keep: options that stay as they are here, such as ``["lr"]`` (default: none). With ``lr`` goes its
                ``initial_lr``, from which schedulers start.

        Raises:
            ``ValueError`` for a state dict of another class, of other parameters or groups, for an option that
            is unknown or out of range, or is to be kept and not there, and for a slot of another name or shape,
            with the name of the parameter;
            ``KeyError`` for a missing option. Nothing is changed then.

        Examples:
            >>> import jax.numpy as jnp
            >>> from jaxoptim import optim
            >>> old, new = optim.Adam({"w": jnp.ones(2)}, lr=0.1), optim.Adam({"w": jnp.ones(2)})
            >>> old.step({"w": jnp.ones(2)})
            >>> new.load_state_dict(old.state_dict())
            >>> new.param_groups[0]["lr"]
            0.1
        """
        self._load(state_dict, strict, keep=keep)

    def _load(self, state_dict: dict[str, Any], strict: bool, **correspondence: Any) -> None:
        """Load a state dict that may have other names and axes; see :func:`state_dicts.to_load`."""
        state_checks.check_layout(state_dict)
        state_dict = state_dict.copy()
        for before in self._load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self.__setstate__(state_dicts.to_load(self, state_dict, strict, **correspondence))
        for after in self._load_state_dict_post_hooks.values():
            after(self)

    def _transferred(self, state: Mapping[Any, Any], transfer: state_dicts.Transfer) -> Mapping[Any, Any]:
        """Return the state by parameter in the form of the other side."""
        return state_dicts.transferred(self, state, transfer)

    def _adopt(self, group: dict[str, Any]) -> None:
        """Convert a group of a state dict into our form."""

    def _check_state(self, group: dict[str, Any], state: Mapping[Any, Any]) -> None:
        """Raise for state that this class could not have made with the options of a group."""
        state_checks.check_slots(self, group, state)

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes to pickle and copy: all but the hooks, as in torch."""
        storage = self._storage
        state = self._storage.states() | self._storage.other_state
        return {
            "defaults": self.defaults,
            "state": state,
            "param_groups": self.param_groups,
            "forest": storage.forest,
            "is_list": storage.is_list,
            "module": self._module,
            "rest": self._rest,
            "precision": storage.precision,
            "axes": storage.axes,
            gradient_transforms.KEY: (storage.gradient_transform, storage.transform_state()),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over some of ``defaults``, ``param_groups`` and ``state``."""
        if "_storage" not in vars(self):
            self._prepare()
        if "forest" in state:
            self._storage.forest, self._storage.is_list = state["forest"], state["is_list"]
        self._module, self._rest = state.get("module", self._module), state.get("rest", self._rest)
        self._storage.precision = state.get("precision", self._storage.precision)
        self._storage.axes = state.get("axes", self._storage.axes)
        if "defaults" in state:
            self.defaults = state["defaults"]
            self._storage.allowed = self.defaults.keys()
        if "param_groups" in state:
            self.param_groups = state["param_groups"]
        if "state" in state:
            self.state = state["state"]
        if gradient_transforms.KEY in state:
            self._storage.gradient_transform, self._storage.loaded_transform_state = state[gradient_transforms.KEY]

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} ("]
        for index, group in enumerate(self.param_groups):
            lines.append(f"Parameter Group {index}")
            lines += [f"    {key}: {group[key]}" for key in sorted(group) if key != "params"] + [""]
        return "\n".join([*lines[:-1], ")"]) if self.param_groups else lines[0] + ")"
