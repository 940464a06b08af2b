"""The keywords of a run, checked."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxoptim.core.batches import size_of
from jaxoptim.core.noise import check_key, fold_in
from jaxoptim.core.placement import check_mesh
from jaxoptim.interop.numpyro import required
from jaxoptim.sampling.control_variates import ControlVariates
from jaxoptim.sampling.metropolis import ACCEPTANCE
from jaxoptim.sampling.observables import Function, Observable
from jaxoptim.sampling.swaps import SWAP_RATE, Swaps

METHODS = ("auto", "vmap", "map")

# The chains fold their numbers into the key of a run; what they share has its keys from the other end.
_BATCHES, _REFERENCES, _SWAPS = (np.uint32(2**32 - number) for number in (1, 2, 3))


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """The keywords of :func:`jaxoptim.sampling.sample`, checked."""

    key: Any
    num_chains: int = 10
    num_draws: int = 100
    num_burnin_steps: int = 0
    num_steps_bw_draws: int = 1
    batch_size: int | None = None
    chain_method: str = "auto"
    observables: Mapping[str, Observable | Callable[[Any], Any]] | None = None
    progress: bool = False
    checkpoint: str | os.PathLike[str] | None = None
    probes: Mapping[str, Any] | None = None
    microbatches: int = 1
    same_batches: bool = False
    start_noise: float = 0.0
    store: str | os.PathLike[str] | None = None
    until_mcse: float | None = None
    control_variates: ControlVariates | None = None
    metropolis: bool = False
    num_steps_bw_swaps: int | None = None
    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        check_key(self.key)
        at_least = {"num_chains": 1, "num_draws": 1, "num_burnin_steps": 0, "num_steps_bw_draws": 1, "microbatches": 1}
        if self.num_steps_bw_swaps is not None:
            at_least["num_steps_bw_swaps"] = 1
        for name, least in at_least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
                raise ValueError(f"Invalid {name}: {value!r}. It is an int >= {least}.")
            object.__setattr__(self, name, int(value))
        if isinstance(self.batch_size, np.integer):
            object.__setattr__(self, "batch_size", int(self.batch_size))
        noise = self.start_noise
        if isinstance(noise, str | bool | None) or np.ndim(noise) or not 0 <= noise < math.inf:
            raise ValueError(f"Invalid start_noise: {noise!r}. It is a finite number >= 0.")
        object.__setattr__(self, "start_noise", float(noise))
        bound = self.until_mcse
        if bound is not None:
            if isinstance(bound, str | bool) or np.ndim(bound) or not 0 < bound < math.inf:
                raise ValueError(f"Invalid until_mcse: {bound!r}. It is a finite number > 0, or None.")
            object.__setattr__(self, "until_mcse", float(bound))
            required()
        if not isinstance(self.same_batches, bool):
            raise ValueError(f"Invalid same_batches: {self.same_batches!r}. It is True or False.")
        check_mesh(self.mesh)
        _check_probes(self.probes)
        if self.chain_method not in METHODS:
            allowed = ", ".join(map(repr, METHODS))
            raise ValueError(f"Invalid chain_method: {self.chain_method!r}. It is one of {allowed}.")
        _check_path("checkpoint", self.checkpoint)
        _check_path("store", self.store)
        self.watched()

    @property
    def saved_at(self) -> str | os.PathLike[str] | None:
        """The file where the chains are saved; None if they are not."""
        return self.checkpoint if self.checkpoint is not None or self.store is None else f"{os.fspath(self.store)}.run"

    @property
    def num_steps(self) -> int:
        """The steps of each chain."""
        return self.steps_of(self.num_draws)

    def steps_of(self, draws: int) -> int:
        """Return the number of steps after which a chain has so many draws."""
        return self.num_burnin_steps + draws * self.num_steps_bw_draws

    def draws_at(self, step: int) -> int:
        """Return the number of draws that are whole after so many steps."""
        return max(step - self.num_burnin_steps, 0) // self.num_steps_bw_draws

    @property
    def batch_key(self) -> jax.Array | None:
        """The key from which the batches of all chains follow; None if each chain's follow from its own."""
        return fold_in(self.key, _BATCHES) if self.same_batches else None

    @property
    def reference_key(self) -> jax.Array:
        """The key of the batches that stand for all data."""
        return fold_in(self.key, _REFERENCES)

    @property
    def swaps(self) -> Swaps | None:
        """The schedule on which chains swap their positions; None if they do not."""
        every = self.num_steps_bw_swaps
        return None if every is None else Swaps(fold_in(self.key, _SWAPS), np.int32(every))

    def size_at_once(self, data: Any) -> int | None:
        """The number of data on which the loss is evaluated at once; None for all."""
        if self.microbatches == 1:
            return self.batch_size
        return (self.batch_size or size_of(data)) // self.microbatches

    @property
    def axes(self) -> dict[str, tuple[str, tuple[str, ...]]]:
        """The named axes of each observable's result, by the observable's name; see ``Observable.axes``."""
        return {name: of.axes(name) for name, of in self.watched()}

    def watched(self) -> tuple[tuple[str, Observable], ...]:
        """The observables by name."""
        if not isinstance(self.observables, Mapping | None):
            raise TypeError(
                f"observables is a mapping of names, but got a {type(self.observables).__name__}. Give a dict."
            )
        own = {ACCEPTANCE: self.metropolis, SWAP_RATE: self.num_steps_bw_swaps is not None}
        taken = ["loss", "params", *(name for name, is_there in own.items() if is_there)]
        watched = []
        for name, observable in (self.observables or {}).items():
            if not isinstance(name, str):
                raise TypeError(f"observables: the name {name!r} is no string. Give one.")
            is_class = isinstance(observable, type) and issubclass(observable, Observable)
            if is_class or not (callable(observable) or isinstance(observable, Observable)):
                kind = f"the class {observable!r}" if is_class else type(observable).__name__
                raise TypeError(
                    f"observables: {name!r} is {kind}. Give a function of the parameters, or an instance of an "
                    "Observable."
                )
            if name in taken:
                raise ValueError(f"observables: the name {name!r} is taken. Choose another one.")
            observed = observable if isinstance(observable, Observable) else Function(observable)
            try:
                hash(observed)
            except TypeError:
                raise TypeError(
                    f"observables: {name!r} cannot be hashed, but names a compiled program. Decorate its class with "
                    "@dataclasses.dataclass(frozen=True)."
                ) from None
            watched.append((name, observed))
        return tuple(watched)


def _check_probes(probes: Any) -> None:
    """Raise for probes that are not data sets with names."""
    if not isinstance(probes, Mapping | None):
        raise TypeError(f"probes is a mapping of names to data, but got {type(probes).__name__}.")
    for name, data in (probes or {}).items():
        if not isinstance(name, str):
            raise TypeError(f"probes is a mapping of names to data, but {name!r} is no name.")
        size_of(data, f"probes[{name!r}]")


def _check_path(what: str, given: Any) -> None:
    """Raise for a path that cannot be written: at the end of a run it would be too late."""
    if given is None:
        return
    kind, other = ("file", "folder") if what == "checkpoint" else ("folder", "file")
    if not isinstance(given, str | os.PathLike):
        raise TypeError(f"{what} is the path of a {kind}, but got {type(given).__name__}. Give a str or a Path.")
    path = Path(given)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"The folder {path.parent}, where the {what} should go, does not exist. Make it.")
    if path.is_dir() if kind == "file" else path.is_file():
        error = IsADirectoryError if kind == "file" else NotADirectoryError
        raise error(f"The {what} {path} is a {other}. Give the path of a {kind}{' in it' if kind == 'file' else ''}.")
