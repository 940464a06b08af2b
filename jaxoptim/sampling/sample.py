"""Sampling with many chains."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxoptim.sampling.control_variates import ControlVariates
from jaxoptim.sampling.labelled import dataset
from jaxoptim.sampling.observables import Observable
from jaxoptim.sampling.options import RunOptions
from jaxoptim.sampling.run import SamplerLike, check_sampler, prepare, run, stacked
from jaxoptim.sampling.target import problem


@dataclasses.dataclass(frozen=True)
class Samples:
    """The draws of chains.

    Attributes:
        loss: the loss at each draw before its step, ``(chains, draws)``, of the batch that drove it, or as
            :class:`ControlVariates` estimate it.
        observables: by name what was observed, each with a first axis of chains; traces have a second one of draws.
            The sampler's own metrics (``thermostat``, ``noise_norm``, ...) are among them.
        params: where the chains have ended, as the parameters were given, with a first axis of chains; of a module all
            arrays have it, so that ``jax.vmap`` (``eqx.filter_vmap``) takes the chains' modules one by one. Float16 and
            bfloat16 parameters are rounded to their dtype here; a ``checkpoint`` continues from float32.
        diverged: for each chain the first draw whose loss is not finite, -1 if there is none.
        axes: by name of an observable what :meth:`to_xarray` calls it, and the names of its axes behind that of chains.

    The loss and other traces that have left the device between the pieces of a run are NumPy's arrays.
    """

    loss: jax.Array
    observables: dict[str, Any]
    params: Any
    diverged: np.ndarray
    axes: dict[str, tuple[str, tuple[str, ...]]] = dataclasses.field(default_factory=dict, repr=False)

    def to_xarray(self, *, init_loss: float | None = None) -> Any:
        """Return the draws as an ``xarray.Dataset``, which arviz reads.

        Traces are variables ``(chain, draw, ...)``: ``sampling_loss``, what was observed under its own name, a
        :class:`Losses` called NAME as ``loss_NAME`` with axes ``(chain, draw, batch_NAME, token_pos)``; these are
        devinterp's names. Of a tree each array is a variable, with a dotted name. What each chain has one of, such as
        ``diverged`` and a :class:`Covariance`, are coordinates. Arrays of float16 and bfloat16 become float32. The
        parameters at the end are not in it.

        Args:
            init_loss: the loss where the chains began, which analyses compare with; it becomes the coordinate
                ``init_loss`` (default None: there is none).

        Returns:
            An ``xarray.Dataset``. ``arviz.summary`` and ``arviz.plot_trace`` take it.

        Raises:
            ``ImportError`` without xarray; ``ValueError`` for observables whose names there coincide.

        Examples:
            >>> import jax, jax.numpy as jnp
            >>> from jaxoptim import rules, sampling
            >>> samples = sampling.sample(
            ...     lambda w: jnp.sum(w**2) / 2, jnp.zeros(3), rules.SGLD(lr=0.01, nbeta=10.0), key=jax.random.key(0),
            ...     num_chains=2, num_draws=100, observables={"w": lambda w: w})
            >>> dict(samples.to_xarray()["w"].sizes)
            {'chain': 2, 'draw': 100, 'w_dim_0': 3}
        """
        about: dict[str, Any] = {"diverged": self.diverged} | ({} if init_loss is None else {"init_loss": init_loss})
        return dataset({"loss": self.loss} | self.observables, self.axes, about)


def sample(
    loss_fn: Callable[..., Any],
    params: Any,
    sampler: SamplerLike,
    data: Any = None,
    *,
    key: jax.Array,
    num_chains: int = 10,
    num_draws: int = 100,
    num_burnin_steps: int = 0,
    num_steps_bw_draws: int = 1,
    start_noise: float = 0.0,
    batch_size: int | None = None,
    microbatches: int = 1,
    same_batches: bool = False,
    chain_method: str = "auto",
    mesh: Mesh | None = None,
    observables: Mapping[str, Observable | Callable[[Any], Any]] | None = None,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    probes: Mapping[str, Any] | None = None,
    store: str | os.PathLike[str] | None = None,
    until_mcse: float | None = None,
    control_variates: ControlVariates | None = None,
    metropolis: bool = False,
) -> Samples:
    r"""Run chains of a sampler from one point, all of them and all draws in one compiled program.

    Every chain makes ``num_burnin_steps`` steps, and then ``num_steps_bw_draws`` for each draw. The program is
    compiled once for each loss function, structure of the sampler, and shapes; numbers (learning rate, temperature,
    how many steps, keys) are data, and traces have room up to the next power of two.

    Chain number c depends on ``fold_in(key, c)`` alone (its batches on ``key`` if they are the same for all): it is
    the same whatever the number of chains and, to rounding, whatever ``chain_method``. A repeated run is the same to
    the last bit.

    Chains of float16 and bfloat16 parameters move in float32, so that steps below the resolution of these are not
    lost; the loss and functions to observe get them in their own dtype. What the loss computes in that is rounded: a
    bfloat16 loss has 8 bits, too few for small differences. Take its mean in float32.

    Args:
        loss_fn: ``loss_fn(params)``, or ``loss_fn(params, batch)`` where there are data: the *mean* loss, a real
            scalar. Define it once and pass what changes as data.
        params: where every chain begins: a pytree of arrays; a module of equinox, whose inexact arrays are sampled, or
            of nnx, whose ``nnx.Param`` are; linen's variables, whose ``"params"`` are, if there are ``"batch_stats"``.
            Whatever else a module has is fixed: batch statistics and random counts are at every step those given, and
            what a loss changes in them is dropped. Call ``model.eval()`` of an nnx module before, if its layers are
            to use their statistics, and no dropout.
        sampler: a rule, such as ``rules.SGLD(lr=1e-4, nbeta=50.0)``, or a transformation. The noise of a rule follows
            the chain's key, and so does that of a transformation if its state holds a typed key.
        data: a pytree of arrays whose first axes run over the data, which stay on the device (default None). Where
            they do not fit, batches, each such a tree and all of one shape; they have a size of their own, and
            ``batch_size`` is None:

            - an iterable of batches, such as a ``DataLoader`` of torch or grain, a generator, or
              ``dataset.with_format("numpy").iter(batch_size)`` of ``datasets``. Step t of chain c is given batch number
              ``t * num_chains + c``, or number t if ``same_batches``. It begins anew at its end if it can, and may be
              read further than the steps take. At once the batches of as many steps go to the device as fit into 64
              MiB, of 32 at the most.
            - a function ``key -> batch``, which becomes part of the program: each batch is made on the device. Step t
              has the key ``fold_in(key, t)`` of its chain's key, or of one for all if ``same_batches``.
        key: a typed JAX key.
        num_chains: how many chains, an int >= 1 (default 10).
        num_draws: how many draws of each, an int >= 1 (default 100).
        num_burnin_steps: steps before the first draw, an int >= 0 (default 0).
        num_steps_bw_draws: steps for each draw, an int >= 1 (default 1).
        start_noise: :math:`s \ge 0`: each chain begins at the parameters plus noise :math:`s\,N(0, 1)` of its own,
            where a rule's mask lets them move, and in its box (of a transformation neither is known: all of them).
            The center of the sampler's localization stays where it is. Chains that begin further apart than the
            draws are, and agree after burn-in, are what :math:`\hat R` is made for (default 0: all begin at one point).
        batch_size: how many data make the batch of a step, shuffled anew in each epoch (default None: all data, or the
            batches that are given).
        microbatches: into how many equal parts a batch is cut. Loss and gradient of a step are the means over the
            parts, evaluated one after the other: those of the batch to rounding, in the memory that one part takes. It
            divides ``batch_size``, the number of data, or the size of the batches that are given (default 1).
        same_batches: whether all chains see the same batches in the same order, so that they differ in their noise
            alone. What the batches add to an estimate's error is then the same in all, and not in the spread between
            them (default False: each has its own).
        chain_method: ``"vmap"`` takes the chains at once, ``"map"`` one after the other; ``"auto"`` the faster one:
            at once on accelerators and for small parameters (default ``"auto"``). Where there are several devices,
            the chains are spread over as many as divide their number. A CPU is one device, whose cores share the work
            of a step; ``jax.config.update("jax_num_cpu_devices", cores)`` before anything else lets each core run
            chains of its own, which is faster.
        mesh: the devices to spread the chains over, each of which runs as many and never waits for another:
            ``jax.make_mesh((8,), ("chains",))`` takes 8, and all of its axes count. They divide the number of chains,
            and what is given to all chains is whole on each. They may be of several processes, which all make this call
            with the same arguments: what comes back is then whole on all of them but for ``Samples.params``, whose
            chains stay where they are; Ctrl-C saves nothing there, and there is no ``store`` (default None: devices of
            this process, as ``chain_method`` says).
        observables: by name what to observe at the draws besides the loss: functions of the parameters, as the loss
            gets them, or :class:`Observable` (default None). Of a module that a function returns, the sampled arrays
            are kept.
        progress: show a bar with tqdm (default False).
        checkpoint: a file that the run is saved to every minute and at its end, and from which the same run
            continues, to the last bit as if never interrupted, also with more draws than before (default None). An
            iterable is to be given from its beginning again, in the same order (a loader that shuffles needs a seed):
            what the steps so far have taken is skipped. That its first batch is the same is checked.
        probes: by name data sets for observables, each a pytree of arrays whose first axes run over its data (default
            None). They are arguments of the program, as the data are: see :class:`Losses`, and ``Draw.probes``.
        store: a folder on disk that grows by the draws, of which the device then holds no more than 64 MiB (or one, if
            that is larger). It is the zarr group of :meth:`Samples.to_xarray`,
            or, where zarr and xarray are not installed or the name ends in ``.safetensors``, a file of safetensors for
            each block of draws. The chains are saved beside it, in ``<store>.run`` unless there is a ``checkpoint``:
            with both the same run continues, to the last bit as if never interrupted. What comes back is read from it,
            NumPy's arrays in the memory of the host, at the end of the run. Where that is too small all draws are in
            the store by then, and ``xarray.open_zarr(store, consolidated=False)`` reads of them what is looked at
            (default None).
        until_mcse: a bound > 0 on the Monte-Carlo standard error of the mean loss, see :func:`mcse`, of the chains that
            have not diverged. Where it is no larger the run stops, its draws the first ones of the run without a bound,
            of which ``num_draws`` is then the most. The error is looked at when there are 64 draws, and then each time
            there are a quarter more. With a ``checkpoint`` the run goes on under a smaller bound (default None: all
            draws are taken; else it needs numpyro).
        control_variates: what makes the gradients of batches vary less: see :class:`ControlVariates` (default None).
        metropolis: whether each step of the rule ``SGLD`` is a proposal that is accepted with the probability of
            :func:`mala_acceptance`, by the loss of all data (``batch_size=None``), and else the chain stays: the
            Metropolis-adjusted Langevin algorithm, which samples :math:`e^{-U}` exactly, whatever the step size.
            ``observables["metropolis_acceptance"]`` has the probability of the step from each draw; step sizes are
            good where it is about 0.57. A chain keeps loss and gradient, so that a step evaluates them once. Not with a
            box, or ``noise_level`` other than 1 (default False).

    Returns:
        :class:`Samples`.

    Memory:
        Each chain keeps its parameters, the sampler's slots (SGLD: one copy of the parameters; SGNHT, SGHMC and PSGLD:
        two), all of them in float32 at least, what its observables remember, and what is written down at each draw, the
        draws rounded up to a power of two (beyond 4096 to a multiple of it). Where that would be more than 64 MiB for
        all chains, the device holds so much of it (or one draw, if that is larger), and the run goes in pieces, after
        each of which what is written down moves to the memory of the host, or to a ``store``: the same to the last bit.
        With ``"vmap"`` the gradients of all chains exist at once, with ``"map"`` those of one.

        Arrays that the mask of a rule, ``optimize_over``, holds altogether are one copy for all chains, without slots
        and gradients, as long as nothing depends on them that chains keep: they are in every chain if SGLD tracks
        ``weight_norm``, or devinterp's ``grad_norm``, or has ``save_noise`` or ``save_mala_vars``. The noise of the
        others is the same in both cases, the losses are to rounding. In ``Samples.params`` they are copied.
        The masks are one copy for all chains too, in the shapes that they were given in.

    Raises:
        ``ValueError`` for a number out of range, for data or a probe of different lengths, for batches of different
        shapes, or that end before the last step, for an unknown ``chain_method``, for a mesh that does not divide the
        chains, and for a checkpoint or a store of another run; ``TypeError`` for a key that is not typed, for a loss
        that is not a real scalar, for what is no sampler, for a ``batch_size`` of batches, and for a module among other
        parameters. A chain that diverges raises nothing: see ``Samples.diverged``.

    References:
        Welling, Teh, Bayesian learning via stochastic gradient Langevin dynamics, ICML 2011. Roberts, Tweedie,
        Exponential convergence of Langevin distributions and their discrete approximations, Bernoulli 1996.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from jaxoptim import rules, sampling
        >>> def loss(params, batch):
        ...     return jnp.mean((batch["x"] @ params - batch["y"]) ** 2) / 2
        >>> x = jax.random.normal(jax.random.key(0), (512, 3))
        >>> data = {"x": x, "y": x @ jnp.ones(3)}
        >>> sampler = rules.SGLD(lr=1e-3, nbeta=100.0)
        >>> samples = sampling.sample(loss, jnp.ones(3), sampler, data, key=jax.random.key(1), num_chains=4,
        ...                           num_draws=200, batch_size=128)
        >>> samples.loss.shape, samples.params.shape
        ((4, 200), (4, 3))
    """
    options = RunOptions(
        key,
        num_chains,
        num_draws,
        num_burnin_steps,
        num_steps_bw_draws,
        batch_size,
        chain_method,
        observables,
        progress,
        checkpoint,
        probes=probes,
        microbatches=microbatches,
        same_batches=same_batches,
        start_noise=start_noise,
        mesh=mesh,
        store=store,
        until_mcse=until_mcse,
        control_variates=control_variates,
        metropolis=metropolis,
    )
    check_sampler(sampler)
    given = problem(loss_fn, params, data, options)
    return samples_of(run(prepare(given, sampler, stacked(sampler, 1), 1, options)), options.axes)


def samples_of(found: dict[str, Any], axes: dict[str, tuple[str, tuple[str, ...]]]) -> Samples:
    """Return the results of a run as :class:`Samples`."""
    own = ("loss", "params")
    observables = {name: x for name, x in found.items() if name not in own}
    return Samples(found["loss"], observables, found["params"], first_divergence(found["loss"]), axes)


def first_divergence(loss: Any) -> np.ndarray:
    """Return the first draw of each chain whose loss is not finite, -1 if there is none."""
    bad = ~np.isfinite(np.asarray(loss))
    return np.where(bad.any(-1), bad.argmax(-1), -1)
