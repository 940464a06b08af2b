"""The signatures of the classes in classes.py, written by ``python tests/stub.py``."""

# fmt: off
from typing import Any

from jax.sharding import Mesh
from optax import GradientTransformation

from jaxoptim.optim.counts_by_number import CountsByNumber
from jaxoptim.optim.decaying_rate import DecayingRate
from jaxoptim.optim.decoupled import Decoupled
from jaxoptim.optim.optimizer import Groups, Number, Optimizer, Selectors
from jaxoptim.optim.sampler import Sampler
from jaxoptim.optim.sgld import MeasuredSampler
from jaxoptim.optim.sgnht import ThermostatSampler

class Adadelta(Optimizer):
    def __init__(self, params: Any, lr: Number = 1.0, rho: Number = 0.9, eps: Number = 1e-06, weight_decay: Number = 0,
        foreach: bool | None = None, *, capturable: bool = False, maximize: bool = False, differentiable: bool = False,
        groups: Groups | None = None, frozen: Selectors | None = None, wrt: Any = None,
        gradient_transform: GradientTransformation | None = None, master_weights: bool = False,
        rounding: str = 'nearest', state_dtype: Any = None, mesh: Mesh | None = None,
        zero: str | tuple[str, ...] | None = None) -> None: ...

class Adafactor(Optimizer):
    def __init__(self, params: Any, lr: Number = 0.01, beta2_decay: Number = -0.8,
        eps: tuple[Number | None, Number] = (None, 0.001), d: Number = 1.0, weight_decay: Number = 0.0, *,
        foreach: bool | None = None, maximize: bool = False, groups: Groups | None = None,
        frozen: Selectors | None = None, wrt: Any = None, gradient_transform: GradientTransformation | None = None,
        master_weights: bool = False, rounding: str = 'nearest', state_dtype: Any = None, mesh: Mesh | None = None,
        zero: str | tuple[str, ...] | None = None) -> None: ...

class Adagrad(Optimizer):
    def __init__(self, params: Any, lr: Number = 0.01, lr_decay: Number = 0, weight_decay: Number = 0,
        initial_accumulator_value: Number = 0, eps: Number = 1e-10, foreach: bool | None = None, *,
        maximize: bool = False, differentiable: bool = False, fused: bool | None = None, groups: Groups | None = None,
        frozen: Selectors | None = None, wrt: Any = None, gradient_transform: GradientTransformation | None = None,
        master_weights: bool = False, rounding: str = 'nearest', state_dtype: Any = None, mesh: Mesh | None = None,
        zero: str | tuple[str, ...] | None = None) -> None: ...

class Adam(Optimizer):
    def __init__(self, params: Any, lr: Number = 0.001, betas: tuple[Number, Number] = (0.9, 0.999),
        eps: Number = 1e-08, weight_decay: Number = 0, amsgrad: bool = False, *, foreach: bool | None = None,
        maximize: bool = False, capturable: bool = False, differentiable: bool = False, fused: bool | None = None,
        decoupled_weight_decay: bool = False, groups: Groups | None = None, frozen: Selectors | None = None,
        wrt: Any = None, gradient_transform: GradientTransformation | None = None, master_weights: bool = False,
        rounding: str = 'nearest', state_dtype: Any = None, mesh: Mesh | None = None,
        zero: str | tuple[str, ...] | None = None) -> None: ...

class Adamax(Optimizer):
    def __init__(self, params: Any, lr: Number = 0.002, betas: tuple[Number, Number] = (0.9, 0.999),
        eps: Number = 1e-08, weight_decay: Number = 0, foreach: bool | None = None, *, maximize: bool = False,
        differentiable: bool = False, capturable: bool = False, groups: Groups | None = None,
        frozen: Selectors | None = None, wrt: Any = None, gradient_transform: GradientTransformation | None = None,
        master_weights: bool = False, rounding: str = 'nearest', state_dtype: Any = None, mesh: Mesh | None = None,
        zero: str | tuple[str, ...] | None = None) -> None: ...

class AdamW(Decoupled):
    def __init__(self, params: Any, lr: Number = 0.001, betas: tuple[Number, Number] = (0.9, 0.999),
        eps: Number = 1e-08, weight_decay: Number = 0.01, amsgrad: bool = False, *, maximize: bool = False,
        foreach: bool | None = None, capturable: bool = False, differentiable: bool = False, fused: bool | None = None,
        groups: Groups | None = None, frozen: Selectors | None = None, wrt: Any = None,
        gradient_transform: GradientTransformation | None = None, master_weights: bool = False,
        rounding: str = 'nearest', state_dtype: Any = None, mesh: Mesh | None = None,
        zero: str | tuple[str, ...] | None = None) -> None: ...

class ASGD(Optimizer):
    def __init__(self, params: Any, lr: Number = 0.01, lambd: Number = 0.0001, alpha: Number = 0.75,
        t0: Number = 1000000.0, weight_decay: Number = 0, foreach: bool | None = None, maximize: bool = False,
        differentiable: bool = False, capturable: bool = False, *, groups: Groups | None = None,
        frozen: Selectors | None = None, wrt: Any = None, gradient_transform: GradientTransformation | None = None,
        master_weights: bool = False, rounding: str = 'nearest', state_dtype: Any = None, mesh: Mesh | None = None,
        zero: str | tuple[str, ...] | None = None) -> None: ...

class Muon(Optimizer):
    def __init__(self, params: Any, lr: Number = 0.001, weight_decay: Number = 0.1, momentum: Number = 0.95,
        nesterov: bool = True, ns_coefficients: tuple[Number, Number, Number] = (3.4445, -4.775, 2.0315),
        eps: Number = 1e-07, ns_steps: int = 5, adjust_lr_fn: str | None = None, *,
        flatten: tuple[int, ...] | None = None, groups: Groups | None = None, frozen: Selectors | None = None,
        wrt: Any = None, gradient_transform: GradientTransformation | None = None, master_weights: bool = False,
        rounding: str = 'nearest', state_dtype: Any = None, mesh: Mesh | None = None,
        zero: str | tuple[str, ...] | None = None) -> None: ...

class NAdam(Optimizer):
    def __init__(self, params: Any, lr: Number = 0.002, betas: tuple[Number, Number] = (0.9, 0.999),
        eps: Number = 1e-08, weight_decay: Number = 0, momentum_decay: Number = 0.004,
        decoupled_weight_decay: bool = False, *, foreach: bool | None = None, maximize: bool = False,
        capturable: bool = False, differentiable: bool = False, groups: Groups | None = None,
        frozen: Selectors | None = None, wrt: Any = None, gradient_transform: GradientTransformation | None = None,
        master_weights: bool = False, rounding: str = 'nearest', state_dtype: Any = None, mesh: Mesh | None = None,
        zero: str | tuple[str, ...] | None = None) -> None: ...

class RAdam(Optimizer):
    def __init__(self, params: Any, lr: Number = 0.001, betas: tuple[Number, Number] = (0.9, 0.999),
        eps: Number = 1e-08, weight_decay: Number = 0, decoupled_weight_decay: bool = False, *,
        foreach: bool | None = None, maximize: bool = False, capturable: bool = False, differentiable: bool = False,
        groups: Groups | None = None, frozen: Selectors | None = None, wrt: Any = None,
        gradient_transform: GradientTransformation | None = None, master_weights: bool = False,
        rounding: str = 'nearest', state_dtype: Any = None, mesh: Mesh | None = None,
        zero: str | tuple[str, ...] | None = None) -> None: ...

class RMSprop(Optimizer):
    def __init__(self, params: Any, lr: Number = 0.01, alpha: Number = 0.99, eps: Number = 1e-08,
        weight_decay: Number = 0, momentum: Number = 0, centered: bool = False, capturable: bool = False,
        foreach: bool | None = None, maximize: bool = False, differentiable: bool = False, *,
        groups: Groups | None = None, frozen: Selectors | None = None, wrt: Any = None,
        gradient_transform: GradientTransformation | None = None, master_weights: bool = False,
        rounding: str = 'nearest', state_dtype: Any = None, mesh: Mesh | None = None,
        zero: str | tuple[str, ...] | None = None) -> None: ...

class Rprop(Optimizer):
    def __init__(self, params: Any, lr: Number = 0.01, etas: tuple[Number, Number] = (0.5, 1.2),
        step_sizes: tuple[Number, Number] = (1e-06, 50), *, capturable: bool = False, foreach: bool | None = None,
        maximize: bool = False, differentiable: bool = False, groups: Groups | None = None,
        frozen: Selectors | None = None, wrt: Any = None, gradient_transform: GradientTransformation | None = None,
        master_weights: bool = False, rounding: str = 'nearest', state_dtype: Any = None, mesh: Mesh | None = None,
        zero: str | tuple[str, ...] | None = None) -> None: ...

class SGD(Optimizer):
    def __init__(self, params: Any, lr: Number = 0.001, momentum: Number = 0, dampening: Number = 0,
        weight_decay: Number = 0, nesterov: bool = False, *, maximize: bool = False, foreach: bool | None = None,
        differentiable: bool = False, fused: bool | None = None, groups: Groups | None = None,
        frozen: Selectors | None = None, wrt: Any = None, gradient_transform: GradientTransformation | None = None,
        master_weights: bool = False, rounding: str = 'nearest', state_dtype: Any = None, mesh: Mesh | None = None,
        zero: str | tuple[str, ...] | None = None) -> None: ...

class SparseAdam(Optimizer):
    def __init__(self, params: Any, lr: Number = 0.001, betas: tuple[Number, Number] = (0.9, 0.999),
        eps: Number = 1e-08, maximize: bool = False, *, groups: Groups | None = None, frozen: Selectors | None = None,
        wrt: Any = None, gradient_transform: GradientTransformation | None = None, master_weights: bool = False,
        rounding: str = 'nearest', state_dtype: Any = None, mesh: Mesh | None = None,
        zero: str | tuple[str, ...] | None = None) -> None: ...

class AdagradRMSProp(Optimizer):
    def __init__(self, params: Any, eta: Number = 1.0, delta: Number = 1e-16, t: Number = 0.1, *,
        groups: Groups | None = None, frozen: Selectors | None = None, wrt: Any = None,
        gradient_transform: GradientTransformation | None = None, master_weights: bool = False,
        rounding: str = 'nearest', state_dtype: Any = None, mesh: Mesh | None = None,
        zero: str | tuple[str, ...] | None = None) -> None: ...

class ClippedAdam(DecayingRate):
    def __init__(self, params: Any, lr: Number = 0.001, betas: tuple[Number, Number] = (0.9, 0.999),
        eps: Number = 1e-08, weight_decay: Number = 0, clip_norm: Number = 10.0, lrd: Number = 1.0,
        centered_variance: bool = False, *, groups: Groups | None = None, frozen: Selectors | None = None,
        wrt: Any = None, gradient_transform: GradientTransformation | None = None, master_weights: bool = False,
        rounding: str = 'nearest', state_dtype: Any = None, mesh: Mesh | None = None,
        zero: str | tuple[str, ...] | None = None) -> None: ...

class DCTAdam(CountsByNumber):
    def __init__(self, params: Any, lr: Number = 0.001, betas: tuple[Number, Number] = (0.9, 0.999),
        eps: Number = 1e-08, clip_norm: Number = 10.0, lrd: Number = 1.0, subsample_aware: bool = False, *,
        dct_dim: int | None = None, subsample: Any = None, groups: Groups | None = None,
        frozen: Selectors | None = None, wrt: Any = None, gradient_transform: GradientTransformation | None = None,
        master_weights: bool = False, rounding: str = 'nearest', state_dtype: Any = None, mesh: Mesh | None = None,
        zero: str | tuple[str, ...] | None = None) -> None: ...

class SGLD(MeasuredSampler):
    def __init__(self, params: Any, lr: Number = 0.01, noise_level: Number = 1.0, weight_decay: Number = 0.0,
        localization: Number = 0.0, nbeta: Number = 1.0, bounding_box_size: Number | None = None,
        save_noise: bool = False, save_mala_vars: bool = False, optimize_over: Any = None, noise_norm: bool = False,
        grad_norm: bool = False, weight_norm: bool = False, distance: bool = False, temperature: float | None = None, *,
        box: str = 'clamp', metrics: str = 'devinterp', center: Any = None, key: Any = None, noise_impl: str = 'key',
        groups: Groups | None = None, frozen: Selectors | None = None, wrt: Any = None) -> None: ...

class SGNHT(ThermostatSampler):
    def __init__(self, params: Any, lr: Number = 0.01, diffusion_factor: Number = 0.01,
        bounding_box_size: Number | None = None, save_noise: bool = False, save_mala_vars: bool = False,
        nbeta: Number = 1.0, *, weight_decay: Number = 0.0, localization: Number = 0.0, optimize_over: Any = None,
        box: str = 'clamp', order: str = 'kick_friction', metrics: str | None = None, center: Any = None,
        key: Any = None, noise_impl: str = 'key', groups: Groups | None = None, frozen: Selectors | None = None,
        wrt: Any = None) -> None: ...

class PSGLD(Sampler):
    def __init__(self, params: Any, lr: Number = 0.01, alpha: Number = 0.99, eps: Number = 0.1,
        weight_decay: Number = 0.0, localization: Number = 0.0, nbeta: Number = 1.0,
        bounding_box_size: Number | None = None, optimize_over: Any = None, bias_correction: bool = False,
        frozen_after: int | None = None, gamma: bool = False, box: str = 'clamp', metrics: str | None = None,
        center: Any = None, *, key: Any = None, noise_impl: str = 'key', groups: Groups | None = None,
        frozen: Selectors | None = None, wrt: Any = None) -> None: ...

class SGHMC(Sampler):
    def __init__(self, params: Any, lr: Number = 0.01, alpha: Number = 0.1, beta: Number = 0.0, nbeta: Number = 1.0,
        weight_decay: Number = 0.0, localization: Number = 0.0, bounding_box_size: Number | None = None,
        optimize_over: Any = None, box: str = 'clamp', order: str = 'euler', metrics: str | None = None,
        center: Any = None, *, key: Any = None, noise_impl: str = 'key', groups: Groups | None = None,
        frozen: Selectors | None = None, wrt: Any = None) -> None: ...
