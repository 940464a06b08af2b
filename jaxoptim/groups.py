"""Lists of ``(selector, options)`` for the ``groups`` of a torch-style optimizer.

They are plain lists of regular expressions and dicts: print them, change them, add to them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from typing import Any

import jax

from jaxoptim.core import trees
from jaxoptim.core.modules import trained_of
from jaxoptim.core.names import listing
from jaxoptim.core.shown import shown
from jaxoptim.optim.groups import Groups, Selector, is_named_pair, selection

__all__ = [
    "combined",
    "layer_decay",
    "no_decay",
]
__dir__ = listing(__all__)

List = list[tuple[str, dict[str, Any]]]
"""The groups that the helpers return: pairs of a regular expression for names and the options of what it selects."""


def no_decay(params: Any, *names: Selector, max_ndim: int = 1, option: str = "weight_decay") -> List:
    """Turn off weight decay for scalars, vectors and named parameters: the biases and scales of most networks.

    Args:
        params: the parameters of the optimizer: a pytree of arrays or parameters, or pairs of name and parameter.
        names: selectors of further parameters without decay, such as ``".*pos_embed"``.
        max_ndim: the most axes of an array without decay (default 1). Layers that are stacked for a scan have one axis
            more: give 2 where all are.
        option: the name of the option that is set to zero (default ``"weight_decay"``).

    Returns:
        A list with one ``(selector, options)``, or none if all are to decay.

    Raises:
        ``ValueError`` for a selector that selects nothing.

    Examples:
        >>> import jax.numpy as jnp, jaxoptim
        >>> params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2), "table": jnp.ones((3, 2))}
        >>> jaxoptim.groups.no_decay(params, "table")
        [('b|table', {'weight_decay': 0.0})]
        >>> opt = jaxoptim.optim.AdamW(params, groups=jaxoptim.groups.no_decay(params))
        >>> [group["weight_decay"] for group in opt.param_groups]
        [0.0, 0.01]
    """
    tree, paths, leaves = _named(params)
    chosen = [len(getattr(leaf, "shape", ())) <= max_ndim for leaf in leaves]
    for selector in names:
        more = selection(selector, tree, paths)
        if not any(more):
            raise ValueError(f"no_decay: {selector!r} selects none of {', '.join(paths[:20])}.")
        chosen = [a or b for a, b in zip(chosen, more, strict=True)]
    return _list([itertools.compress(paths, chosen)], [{option: 0.0}])


def layer_decay(
    params: Any,
    layers: str | re.Pattern[str],
    decay: float,
    *,
    lr: float,
    embedding: Selector = r".*(embed|stem|token).*",
    min_scale: float = 0.0,
) -> List:
    r"""Decay learning rates layer by layer from the head of a network to its embedding, for fine-tuning.

    Layer :math:`i` of :math:`L`, from the embedding (0) through the blocks to the head (:math:`L - 1`), has the rate

    .. math::
        \gamma_i = \gamma \max(s_{\min}, d^{L-1-i}) .

    Schedulers keep the factors, because they multiply the rates of groups or start from them. Where a scheduler is
    given rates (``max_lr`` of ``OneCycleLR`` and ``CyclicLR``, ``swa_lr`` of ``SWALR``, ``min_lr`` of
    ``ReduceLROnPlateau``), give it a list: ``[top * group["lr"] / lr for group in opt.param_groups]``, before a
    scheduler has changed them. ``eta_min`` of the cosines is one for all groups: leave it at 0.

    Args:
        params: the parameters of the optimizer: a pytree of arrays or parameters, or pairs of name and parameter.
        layers: a regular expression that is found in the names of blocks, whose first group is the number of the
            block, such as ``r"blocks\.(\d+)\."``.
        decay: :math:`d`, in (0, 1], such as 0.75.
        lr: :math:`\gamma`, the rate of the head, a number > 0.
        embedding: selector of layer 0 among the parameters of no block (default: names with ``embed``, ``stem`` or
            ``token`` in them). All others belong to the head.
        min_scale: :math:`s_{\min}`, the least factor (default 0).

    Returns:
        A list of ``(selector, {"lr": rate})``, one for each layer that has parameters, the head too.

    Raises:
        ``ValueError`` if no name matches ``layers``, if it has no group of digits, and for a number out of range.

    References:
        Bao et al., "BEiT: BERT Pre-Training of Image Transformers", ICLR 2022; the formula is timm's.

    Examples:
        >>> import jaxoptim
        >>> params = {"embed": 1.0, "blocks": [{"w": 1.0}, {"w": 1.0}], "head": 1.0}
        >>> for selector, options in jaxoptim.groups.layer_decay(params, r"blocks\.(\d+)\.", 0.5, lr=0.8):
        ...     print(selector, options)
        embed {'lr': 0.1}
        blocks\.0\.w {'lr': 0.2}
        blocks\.1\.w {'lr': 0.4}
        head {'lr': 0.8}
    """
    if not 0 < decay <= 1:
        raise ValueError(f"Invalid decay: {decay!r}. layer_decay takes a number in (0, 1].")
    if callable(lr) or not lr > 0:
        raise ValueError(
            f"Invalid lr: {shown(lr)}. layer_decay takes a number > 0, the rate of the head; schedulers of "
            "optim.lr_scheduler multiply the rates of all groups."
        )
    tree, paths, _ = _named(params)
    blocks = {path: _number_of(found, layers) for path in paths if (found := re.search(layers, path))}
    if not blocks:
        raise ValueError(f"layer_decay: {layers!r} is found in none of {', '.join(paths[:20])}.")
    first, last = min(blocks.values()), max(blocks.values())
    head = last - first + 2
    at_start = dict(zip(paths, selection(embedding, tree, paths), strict=True))
    of_path = {path: blocks[path] - first + 1 if path in blocks else 0 if at_start[path] else head for path in paths}
    scales = {layer: max(min_scale, decay ** (head - layer)) for layer in sorted(set(of_path.values()))}
    members = [[path for path in paths if of_path[path] == layer] for layer in scales]
    return _list(members, [{"lr": lr * scale} for scale in scales.values()])


def combined(params: Any, *lists: Groups) -> List:
    r"""Join several lists into one, in which a parameter has the options that each list gives it.

    Args:
        params: the parameters of the optimizer.
        lists: lists of ``(selector, options)``; in each the first that selects a parameter counts.

    Returns:
        A list with one entry for each set of options that occurs, in the order of ``params``.

    Raises:
        ``ValueError`` for an option that two lists give one parameter.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxoptim import groups
        >>> params = {"blocks": [{"w": jnp.ones((2, 2)), "b": jnp.ones(2)}], "head": jnp.ones((2, 2))}
        >>> layers = groups.layer_decay(params, r"blocks\.(\d+)\.", 0.5, lr=0.1)
        >>> for selector, options in groups.combined(params, groups.no_decay(params), layers):
        ...     print(selector, options)
        blocks\.0\.b {'weight_decay': 0.0, 'lr': 0.05}
        blocks\.0\.w {'lr': 0.05}
        head {'lr': 0.1}
    """
    tree, paths, _ = _named(params)
    options: list[dict[str, Any]] = [{} for _ in paths]
    for entries in lists:
        selected = [(selection(selector, tree, paths), given) for selector, given in entries]
        for at, path in enumerate(paths):
            given = next((given for selects, given in selected if selects[at]), {})
            if twice := options[at].keys() & given.keys():
                raise ValueError(f"combined: two lists give {path!r} the option {sorted(twice)[0]!r}. Leave one out.")
            options[at] |= given
    kinds = [given for at, given in enumerate(options) if given and given not in options[:at]]
    members = [[path for path, its in zip(paths, options, strict=True) if its == kind] for kind in kinds]
    return _list(members, kinds)


def _named(params: Any) -> tuple[Any, list[str], list[Any]]:
    """Return the parameters as selectors see them: a pytree, the names, and the arrays."""
    if isinstance(params, list | tuple) and params and all(map(is_named_pair, params)):
        return [value for _, value in params], [name for name, _ in params], [value for _, value in params]
    trained = trained_of(params)
    return trained, trees.array_names(trained), jax.tree.leaves(trained)


def _number_of(found: re.Match[str], layers: Any) -> int:
    """Return the number of a block."""
    if not found.groups() or found[1] is None or not found[1].isdigit():
        raise ValueError(f"layer_decay: {layers!r} has no group of digits, such as in r'blocks\\.(\\d+)\\.'.")
    return int(found[1])


def _list(members: Iterable[Iterable[str]], options: Iterable[dict[str, Any]]) -> List:
    selectors = ["|".join(map(re.escape, names)) for names in members]
    return [(selector, dict(its)) for selector, its in zip(selectors, options, strict=True) if selector]
