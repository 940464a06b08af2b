"""L-BFGS, with a fixed step or a search for the strong Wolfe conditions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxoptim.core import Hyperparameters, NonNegative, OptState, Packed, Scalar, factory, full_like, pack, rule, trees
from jaxoptim.core import transformation as transformation_of
from jaxoptim.core.flat import flatten, flatten_like, unflatten
from jaxoptim.core.numerics import explicit_sharding
from jaxoptim.core.placement import on_mesh_of
from jaxoptim.core.shown import shown
from jaxoptim.rules import _strong_wolfe
from jaxoptim.rules._strong_wolfe import Line, Sample
from jaxoptim.rules._terms import given_loss

LBFGSState = dict[str, jax.Array]
"""The optimizer state between steps, named as torch names it."""

_SMALLEST_CURVATURE = 1e-10
"""The bound on y.s below which a pair is not stored: it would make the inverse Hessian nearly indefinite."""


class Search(NamedTuple):
    """A step in progress, which asks for the loss and the gradient at ``point`` until it is ``done``.

    Attributes:
        point: the vector at which the loss and the gradient are wanted next.
        done: whether the step is over.
        progress: everything else, its scalars packed, because every array costs time in every call.
    """

    point: jax.Array
    done: jax.Array
    progress: Packed


class _Step(NamedTuple):
    """The contents of a :class:`Search`; only ``state`` outlives the step.

    Attributes:
        point: the vector at which the loss and the gradient are wanted next.
        done: whether the step is over.
        first_loss: the loss at the start of the step.
        x: the start of the current iteration.
        loss: the loss at ``x``; without meaning during a line search.
        grad: the gradient at ``x``; during a line search, at its ``low`` sample.
        slope: the derivative of the loss along the direction, at ``x``.
        reach: the largest component of the direction, by absolute value.
        iterations: iterations begun in this step.
        evals: evaluations made in this step.
        spoilt: whether the step ended at a loss that is not finite.
        line: the line search, or None.
        state: the state of the rule.
    """

    point: Any
    done: Any
    first_loss: jax.Array
    x: jax.Array
    loss: jax.Array
    grad: jax.Array
    slope: jax.Array
    reach: jax.Array
    iterations: jax.Array
    evals: jax.Array
    spoilt: jax.Array
    line: Line | None
    state: LBFGSState

    def packed(self) -> Search:
        return Search(self.point, self.done, pack(self._replace(point=None, done=None), max_size=1))

    @staticmethod
    def unpacked(search: Search) -> _Step:
        step: _Step = search.progress.unpack()
        return step._replace(point=search.point, done=search.done)


@rule
class LBFGS(Hyperparameters):
    r"""L-BFGS: quasi-Newton steps built from the last changes of the parameters and of the gradient.

    .. math::
        s_k &= \theta_{k+1} - \theta_k, \qquad y_k = g_{k+1} - g_k, \qquad \rho_k = 1 / (y_k^\top s_k) \\
        H_{k+1} &= (I - \rho_k s_k y_k^\top)\,H_k\,(I - \rho_k y_k s_k^\top) + \rho_k s_k s_k^\top,
        \qquad H^{(0)}_k = \frac{y_{k-1}^\top s_{k-1}}{y_{k-1}^\top y_{k-1}}\,I \\
        d_k &= -H_k\,g_k, \qquad \theta_{k+1} = \theta_k + t_k\,d_k

    :math:`H_k` stands for the last ``history_size`` pairs with :math:`y^\top s > 10^{-10}`, and is applied by
    the two-loop recursion without being formed. The very first iteration has
    :math:`t_0 = \gamma \min(1, 1 / \lVert g_0 \rVert_1)`, every other :math:`t_k = \gamma`; with a line search
    that is the first trial, and the :math:`t_k` found satisfies, if the evaluations suffice,

    .. math::
        f(\theta_k + t_k d_k) \le f(\theta_k) + 10^{-4}\,t_k\,g_k^\top d_k, \qquad
        |g_{k+1}^\top d_k| \le 0.9\,|g_k^\top d_k|

    One *step* is up to ``max_iter`` iterations. It ends early after ``max_eval`` evaluations, when no
    component of the gradient exceeds ``tolerance_grad``, or when the parameters, the loss or the directional
    derivative change by less than ``tolerance_change``. As in torch, a step without line search does not
    evaluate the point where it ends, and ``max_iter=1`` with line search leaves one trial, which is taken only
    if it lowers the loss.

    The transformation's ``update(grads, state, params, value=, grad=, value_fn=)`` makes one step.
    ``value_fn(params)`` is the loss, called inside a compiled loop: jit the update, or every call compiles its
    loop anew. ``value`` and ``grad`` (if absent, ``grads``), the loss and its gradient at ``params``, save the
    first evaluation. A parameter whose gradient is None is held fixed.

    To evaluate the loss anywhere else, drive the step yourself: ``search = rule.start(state, x)``; while not
    ``search.done``, ``search = rule.observe(search, loss, grad)`` with what you found at ``search.point``; at
    last ``first_loss, x, state = rule.finish(search)``. All of these are pure functions of flat vectors; jit
    them, and donate the search.

    Args:
        lr: the first trial of each iteration, :math:`\gamma \ge 0` (default 1).
        max_iter: the most iterations of one step, an int >= 1 (default 20).
        max_eval: the most evaluations of one step, an int >= 1; one line search may exceed it by one (default
            None: five for every four iterations).
        tolerance_grad: end at a gradient whose components are all at most this (default 1e-7).
        tolerance_change: end at changes below this (default 1e-9).
        history_size: the number of pairs kept, an int >= 1 (default 100). They take twice the memory of the
            parameters each.
        line_search_fn: ``"strong_wolfe"``, or None for fixed steps (default None).

    State:
        ``func_evals``, ``n_iter``, ``d``, ``t``, ``old_dirs`` (y), ``old_stps`` (s), ``ro``, ``H_diag``,
        ``prev_flat_grad`` and ``prev_loss``, as in torch; but the history is a ring of ``history_size`` rows, of
        which ``stored`` were ever written. :meth:`history` gives torch's lists.

    Where torch goes on with NaN, this does not: a step ends, and leaves its state finite, at a gradient that is
    not finite; a line search goes back from a trial that is not finite. With fixed steps a loss that is not finite
    ends the step at the last point whose loss was finite; the history is dropped, and the next step begins there with
    a move no longer than a first one, and half as long each time that this was too far.

    Raises:
        ``ValueError`` for a number out of range, ``TypeError`` for a count that is not an int, and
        ``RuntimeError`` for another line search. ``update`` raises ``ValueError`` without ``params`` or
        ``value_fn``.

    References:
        Liu, Nocedal, On the limited memory BFGS method for large scale optimization, Mathematical Programming
        45, 1989. Nocedal, Wright, Numerical Optimization, 2nd ed. 2006, algorithms 7.4 (two-loop recursion),
        3.5 and 3.6 (line search). The decisions are torch's, in torch's order.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxoptim, optax
        >>> loss = lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
        >>> tx, x = jaxoptim.lbfgs(line_search_fn="strong_wolfe"), jnp.array([-1.0, 1.5])
        >>> @jax.jit
        ... def step(x, state):
        ...     updates, state = tx.update(jax.grad(loss)(x), state, x, value_fn=loss)
        ...     return optax.apply_updates(x, updates), state
        >>> state = tx.init(x)
        >>> for _ in range(3):
        ...     x, state = step(x, state)
        >>> [round(value, 2) for value in x.tolist()]
        [1.0, 1.0]
    """

    lr: NonNegative = 1
    max_iter: int = 20
    max_eval: int | None = None
    tolerance_grad: Scalar = 1e-7
    tolerance_change: Scalar = 1e-9
    history_size: int = 100
    line_search_fn: str | None = None

    def check(self) -> None:
        for name in ("max_iter", "max_eval", "history_size"):
            count = getattr(self, name)
            if name == "max_eval" and count is None:
                continue
            if isinstance(count, bool) or not isinstance(count, int | np.integer):
                raise TypeError(
                    f"Invalid {name}: {shown(count)} ({type(count).__name__}). LBFGS takes an int for {name}."
                )
            if count < 1:
                raise ValueError(f"Invalid {name}: {shown(count)}. LBFGS takes {name} >= 1.")
        if self.line_search_fn not in (None, "strong_wolfe"):
            raise RuntimeError(
                f"only 'strong_wolfe' is supported as line_search_fn, but LBFGS got {self.line_search_fn!r}. "
                "Give 'strong_wolfe', or None for fixed steps."
            )

    @property
    def evaluations(self) -> int:
        """The maximal number of evaluations of one step."""
        return self.max_iter * 5 // 4 if self.max_eval is None else self.max_eval

    def init(self, flat: jax.Array) -> LBFGSState:
        """Initialize the state.

        Args:
            flat: the parameters as one real vector.

        Returns:
            A dict of arrays.
        """
        size, dtype = self.history_size, flat.dtype
        # Each array is one of its own, so that the state may be donated.
        return {
            "func_evals": jnp.zeros((), jnp.int32),
            "n_iter": jnp.zeros((), jnp.int32),
            "d": full_like(flat),
            "t": jnp.zeros((), dtype),
            "old_dirs": full_like(jnp.broadcast_to(flat, (size, *flat.shape))),
            "old_stps": full_like(jnp.broadcast_to(flat, (size, *flat.shape))),
            "ro": jnp.zeros(size, dtype),
            "H_diag": jnp.ones((), dtype),
            "prev_flat_grad": full_like(flat),
            "prev_loss": jnp.zeros((), dtype),
            "stored": jnp.zeros((), jnp.int32),
        }

    def start(self, state: LBFGSState, x: jax.Array) -> Search:
        """Begin a step; the first point wanted is ``x`` itself.

        Args:
            state: from :meth:`init` or the last :meth:`finish`.
            x: the parameters. They and the state go with the search when that is donated.

        Returns:
            The search to give to :meth:`observe`.
        """
        return self._started(state, x).packed()

    def observe(self, search: Search, loss: Any, grad: jax.Array) -> Search:
        """Take in an evaluation, and advance to the point of the next one, or to the end of the step.

        Args:
            search: a search that is not done. Donate it when the call is jitted.
            loss: the loss at ``search.point``.
            grad: its gradient there, a vector.

        Returns:
            The search with another ``point``, or done.
        """
        return self._observed(_Step.unpacked(search), loss, grad).packed()

    def finish(self, search: Search) -> tuple[jax.Array, jax.Array, LBFGSState]:
        """End a step.

        Args:
            search: a search that is done.

        Returns:
            The loss where the step began, the new parameters, and the new state.
        """
        step = _Step.unpacked(search)
        return step.first_loss, step.x, step.state

    def minimize(
        self,
        value_and_grad: Callable[[jax.Array], tuple[Any, jax.Array]],
        x: jax.Array,
        state: LBFGSState,
        first: tuple[Any, jax.Array] | None = None,
    ) -> tuple[jax.Array, jax.Array, LBFGSState]:
        """Make one whole step as one compiled loop.

        Args:
            value_and_grad: gives the loss and its gradient at a vector; traced by JAX.
            x: the parameters.
            state: from :meth:`init` or the last step.
            first: the loss and gradient at ``x``, if they are known.

        Returns:
            The loss at ``x``, the new parameters, and the new state.
        """
        return self.minimized(value_and_grad, x, state, first)[:3]

    def minimized(
        self,
        value_and_grad: Callable[[jax.Array], tuple[Any, jax.Array]],
        x: jax.Array,
        state: LBFGSState,
        first: tuple[Any, jax.Array] | None = None,
    ) -> tuple[jax.Array, jax.Array, LBFGSState, jax.Array]:
        """Make one step as :meth:`minimize` does; return also whether it ended at a loss that is not finite."""
        step = self._started(state, x)
        if first is not None:
            step = self._observed(step, *first)
        step = jax.lax.while_loop(
            lambda step: ~step.done,
            lambda step: self._observed(step, *value_and_grad(step.point)),
            step,
        )
        return step.first_loss, step.x, step.state, step.spoilt

    def history(self, state: LBFGSState) -> dict[str, list[jax.Array]]:
        """Return the history as torch stores it: ``old_dirs``, ``old_stps`` and ``ro`` as lists, oldest first.

        Args:
            state: from :meth:`init` or a step; not traced.

        Returns:
            A dict of three lists of equal length, at most ``history_size``.
        """
        stored, size = int(state["stored"]), len(state["ro"])
        rows = [k % size for k in range(max(stored - size, 0), stored)]
        return {name: [state[name][row] for row in rows] for name in ("old_dirs", "old_stps", "ro")}

    def with_history(self, state: LBFGSState, old_dirs: list[Any], old_stps: list[Any], ro: list[Any]) -> LBFGSState:
        """Return the state with another history: the inverse of :meth:`history`.

        Args:
            state: any state of this rule.
            old_dirs: changes of the gradient, oldest first.
            old_stps: changes of the parameters.
            ro: their inverse products.

        Returns:
            A state with the last ``history_size`` of these pairs.
        """
        new = dict(state)
        for name, given in (("old_dirs", old_dirs), ("old_stps", old_stps), ("ro", ro)):
            rows = np.zeros((self.history_size, *state[name].shape[1:]), state[name].dtype)
            kept = given[-self.history_size :]
            if kept:
                rows[: len(kept)] = np.stack([np.asarray(row) for row in kept])
            new[name] = jnp.asarray(rows)
        return new | {"stored": jnp.asarray(min(len(ro), self.history_size), jnp.int32)}

    def _started(self, state: LBFGSState, x: jax.Array) -> _Step:
        """Return a step before its first evaluation."""
        zero, count, no = jnp.zeros((), x.dtype), jnp.zeros((), jnp.int32), jnp.zeros((), bool)
        line = None if self.line_search_fn is None else _strong_wolfe.init_line(Sample(zero, zero, zero), zero)
        return _Step(jnp.copy(x), no, zero, x, zero, full_like(x), zero, zero, count, count, no, line, state)

    def _observed(self, step: _Step, loss: Any, grad: jax.Array) -> _Step:
        """Advance the step by one evaluation: at most, an iteration ends and another begins."""
        dtype = step.point.dtype
        rule, loss, grad = self.cast(dtype), jnp.asarray(loss, dtype), jnp.asarray(grad, dtype)
        first = step.evals == 0
        step = step._replace(
            evals=step.evals + 1,
            first_loss=jnp.where(first, loss, step.first_loss),
            state=step.state | {"func_evals": step.state["func_evals"] + 1},
        )
        # With a line search a loss can only be spoilt where the step begins, and infinity is no hindrance there.
        spoilt = ~jnp.isfinite(loss) if step.line is None else first & jnp.isnan(loss)
        step, arrived = rule._arrive(step._replace(spoilt=spoilt), loss, grad, first)
        going_on = arrived & ~spoilt & rule._is_worthwhile(step.grad) & (first | ~rule._has_converged(step))
        step, downhill = rule._turn(step, going_on)
        return rule._move(step._replace(done=spoilt | (arrived & ~downhill)), downhill)

    def _arrive(self, step: _Step, loss: Any, grad: jax.Array, first: jax.Array) -> tuple[_Step, jax.Array]:
        """End the iteration, at once with fixed steps, else when the line search has found its step."""
        if step.line is None:
            return self._here_or_back(step, first)._replace(loss=loss, grad=grad), jnp.ones((), bool)
        state = step.state
        start = Sample(jnp.zeros_like(loss), state["prev_loss"], step.slope)
        trial = Sample(step.line.t, loss, _dot(grad, state["d"]))
        exhausted = step.evals > self.evaluations
        line, source = _strong_wolfe.update_line(step.line, trial, start, step.reach, exhausted)
        lowest = jnp.where(source == _strong_wolfe.START, state["prev_flat_grad"], step.grad)
        ended = ~first & line.ended
        step = step._replace(
            x=jnp.where(ended, step.x + line.t * state["d"], step.x),
            loss=jnp.where(first, loss, line.low.loss),
            grad=jnp.where(first | (source == _strong_wolfe.TRIAL), grad, lowest),
            line=line,
            state=state | {"t": jnp.where(ended, line.t, state["t"])},
        )
        return step, first | ended

    def _here_or_back(self, step: _Step, first: jax.Array) -> _Step:
        """Accept a fixed step, or go back to the point before it, without history, if the loss there is not finite."""
        state, spoilt = step.state, step.spoilt
        # The last iteration of a step ends where nobody has evaluated the loss, and so the next one goes back over it.
        before = jnp.where(first, step.x - state["t"] * state["d"], step.x)
        moved = spoilt & (state["n_iter"] > 0) & (state["t"] > 0)
        first_scale = jnp.minimum(1, 1 / jnp.sum(jnp.abs(state["prev_flat_grad"]))).astype(state["H_diag"].dtype)
        shorter = state["H_diag"] * jnp.where(state["n_iter"] == 1, first_scale, 1) / 2
        scale = jnp.where(state["stored"] > 0, first_scale, shorter)
        state = state | {
            "t": jnp.where(spoilt, 0, state["t"]),  # no pair comes of a move that was taken back
            "H_diag": jnp.where(moved, scale, state["H_diag"]),
            "stored": jnp.where(moved, 0, state["stored"]),
        }
        return step._replace(x=jnp.where(moved, before, jnp.where(spoilt, step.x, step.point)), state=state)

    def _is_worthwhile(self, grad: jax.Array) -> jax.Array:
        """Whether a gradient is finite and not flat."""
        largest = _largest(grad)
        return (largest > self.tolerance_grad) & (largest < jnp.inf)

    def _has_converged(self, step: _Step) -> jax.Array:
        """Whether the step ends with the iteration that was just made."""
        state = step.state
        return (
            (step.iterations >= self.max_iter)
            | (step.evals >= self.evaluations)
            | (step.reach * jnp.abs(state["t"]) <= self.tolerance_change)
            | (jnp.abs(step.loss - state["prev_loss"]) < self.tolerance_change)
        )

    def _turn(self, step: _Step, going_on: jax.Array) -> tuple[_Step, jax.Array]:
        """Begin an iteration, if ``going_on``: store the last pair, and choose a direction and a first trial.

        Returns:
            The step, and whether there is an iteration with a descent direction.
        """
        state = _remember(step.state, step.grad, going_on)
        grad, one = step.grad, going_on.astype(jnp.int32)

        def aim() -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
            d = _two_loops(state, grad, going_on)
            return d, _dot(grad, d), _largest(d), 1 / jnp.sum(jnp.abs(grad))

        d, slope, reach, scale = jax.lax.cond(
            going_on, aim, lambda: (state["d"], step.slope, step.reach, jnp.zeros_like(step.slope))
        )
        n_iter = state["n_iter"] + one
        t = jnp.where(n_iter == 1, jnp.minimum(1, scale) * self.lr, self.lr).astype(slope.dtype)
        state |= {
            "n_iter": n_iter,
            "d": d,
            "t": jnp.where(going_on, t, state["t"]),
            "prev_flat_grad": jnp.where(going_on, grad, state["prev_flat_grad"]),
            "prev_loss": jnp.where(going_on, step.loss, state["prev_loss"]),
        }
        step = step._replace(slope=slope, reach=reach, iterations=step.iterations + one, state=state)
        return step, going_on & (slope <= -self.tolerance_change)

    def _move(self, step: _Step, downhill: jax.Array) -> _Step:
        """Move to the next point: the end of a fixed step, or the next trial of the line search."""
        x, state = step.x, step.state
        if step.line is None:
            point = jnp.where(downhill, x + state["t"] * state["d"], x)
            # Nobody needs the loss where the last iteration ends.
            is_last = step.iterations >= self.max_iter
            return step._replace(x=jnp.where(is_last, point, x), point=point, done=step.done | is_last)
        start = Sample(jnp.zeros_like(step.slope), state["prev_loss"], step.slope)
        fresh = _strong_wolfe.init_line(start, state["t"])
        line = jax.tree.map(lambda a, b: jnp.where(downhill, a, b), fresh, step.line)
        return step._replace(point=x + line.t * state["d"], line=line)


def _remember(state: LBFGSState, grad: jax.Array, going_on: jax.Array) -> LBFGSState:
    """Append the last change of parameters and gradient to the history, if it has positive curvature."""
    y, s = grad - state["prev_flat_grad"], state["t"] * state["d"]
    ys = _dot(y, s)
    stores = going_on & (ys > _SMALLEST_CURVATURE)
    row = state["stored"] % len(state["ro"])

    def written(ring: jax.Array, new: jax.Array) -> jax.Array:
        # Only the row is chosen: a choice between two rings would copy them.
        new = jnp.where(stores, new, _row(ring, row))
        return jax.lax.dynamic_update_index_in_dim(ring, new, row, 0)

    return state | {
        "old_dirs": written(state["old_dirs"], y),
        "old_stps": written(state["old_stps"], s),
        "ro": written(state["ro"], 1 / ys),
        "H_diag": jnp.where(stores, ys / _dot(y, y), state["H_diag"]),
        "stored": state["stored"] + stores.astype(jnp.int32),
    }


def _two_loops(state: LBFGSState, grad: jax.Array, going_on: jax.Array) -> jax.Array:
    """Compute the direction -H g (algorithm 7.4) from the pairs that are stored."""
    old_dirs, old_stps, ro, stored = (state[name] for name in ("old_dirs", "old_stps", "ro", "stored"))
    size = len(ro)
    # Under vmap the loops run for all members if they run for one: those that need no direction have none to do.
    filled = jnp.where(going_on, jnp.minimum(stored, size), 0)

    def newest_first(k: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        q, alphas = carry
        row = (stored - 1 - k) % size
        alpha = _dot(_row(old_stps, row), q) * _row(ro, row)
        return q - alpha * _row(old_dirs, row), jax.lax.dynamic_update_index_in_dim(alphas, alpha, row, 0)

    def oldest_first(k: Any, r: jax.Array) -> jax.Array:
        row = (stored - filled + k) % size
        beta = _dot(_row(old_dirs, row), r) * _row(ro, row)
        return r + (_row(alphas, row) - beta) * _row(old_stps, row)

    q, alphas = jax.lax.fori_loop(0, filled, newest_first, (-grad, jnp.zeros_like(ro)))
    return jax.lax.fori_loop(0, filled, oldest_first, state["H_diag"] * q)


def _row(ring: jax.Array, row: Any) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(ring, row, 0, keepdims=False)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST)


def _largest(x: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(x), initial=0)


@transformation_of.register
def _whole_tree(rule: LBFGS, /) -> optax.GradientTransformationExtraArgs:
    """Make the transformation: one step on the parameters as one vector."""

    def init(params: Any) -> OptState:
        return on_mesh_of(params, OptState(jnp.zeros((), jnp.int32), {}, rule.init(flatten(params))))

    def update(
        grads: Any,
        state: OptState,
        params: Any = None,
        *,
        value: Any = None,
        grad: Any = None,
        value_fn: Callable[[Any], Any] | None = None,
        **extra: Any,
    ) -> tuple[Any, OptState]:
        loss_fn = given_loss("LBFGS evaluates the loss at several points in one update", params, value_fn)
        if isinstance(params, Packed) and not isinstance(grads, Packed):
            grads = params.pack(grads, "grads")
        x = flatten(params)
        given = trees.leaves_like(grads, params, "grads")
        slope = flatten_like(grads if grad is None else grad, params)

        def loss_at(vector: jax.Array) -> Any:
            moved = jax.tree.leaves(unflatten(vector, params), is_leaf=trees.is_leaf)
            held, treedef = jax.tree.flatten(params, is_leaf=trees.is_leaf)
            leaves = [old if g is None else new for new, old, g in zip(moved, held, given, strict=True)]
            return loss_fn(jax.tree.unflatten(treedef, leaves))

        first = None if value is None else (value, slope)
        current = rule.at(state.step)
        _, new_x, shared = current.minimize(jax.value_and_grad(loss_at), x, state.shared, first)
        return _change(new_x - x, given, params), OptState(optax.safe_increment(state.step), {}, shared)

    return optax.GradientTransformationExtraArgs(init, update)


def _change(vector: jax.Array, grads: list[Any], params: Any) -> Any:
    """Return the updates as a pytree, in the dtypes of the gradients; None where there is no gradient."""
    held, treedef = jax.tree.flatten(params, is_leaf=trees.is_leaf)
    kinds = [
        param
        if param is None or grad is None
        else jax.ShapeDtypeStruct(jnp.shape(param), grad.dtype, sharding=explicit_sharding(param))
        for param, grad in zip(held, grads, strict=True)
    ]
    changes = jax.tree.leaves(unflatten(vector, jax.tree.unflatten(treedef, kinds)), is_leaf=trees.is_leaf)
    changes = [None if grad is None else change for change, grad in zip(changes, grads, strict=True)]
    return jax.tree.unflatten(treedef, changes)


lbfgs = factory(LBFGS, "lbfgs")
