"""Parts of transformers by name: layers, heads, embeddings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxoptim.core import trees
from jaxoptim.core.modules import trained_of
from jaxoptim.sampling.restrictions import slices

LAYERS = r"(?i)(?:^|\.)(?:[a-z_]*(?:block|layer)s?|h)[._]?(\d+)(?=\.)"
"""The pattern in the path of a layer's arrays; its group is the layer's number."""

_PROJECTIONS = {
    "query": r"(w_?|to_)?q(uery)?(_proj)?",
    "key": r"(w_?|to_)?k(ey)?(_proj)?",
    "value": r"(w_?|to_)?v(alue)?(_proj)?",
    "qkv": r"(w_?|to_)?qkv(_proj)?|c_attn|in_proj|query_key_value",
}
_OUT = r"(w_?|to_|attn_)?o(ut(put)?)?(_proj)?|c_proj|proj|dense"
_ATTENTION, _MLP, _NORM = r".*(attn|attention).*", r".*(mlp|ffn|feed_?forward).*|ff", r".*norm.*|(.*_)?ln(_?\w)?"
_OUTSIDE = {
    "norm": _NORM,
    "unembed": r".*unembed.*|(.*_)?head|logits|classifier|readout",
    "embed": r".*embed.*|.*token.*|pos(ition)?s?|wte|wpe",
}
ROLES = (*_PROJECTIONS, "out", "attn", "mlp", *_OUTSIDE)
_OF_ATTENTION = (*_PROJECTIONS, "out", "attn")
LAYOUTS = ("concatenated", "interleaved")


def restriction(
    params: Any,
    names: str | Sequence[str],
    *,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    qkv: str = "concatenated",
    layers: str = LAYERS,
    roles: Mapping[str, str] | None = None,
) -> Any:
    r"""Make a mask that lets chains move only some parts of a transformer, given by their names.

    - ``"full"``: everything. ``"embed"``: embeddings, of positions too. ``"unembed"``: the layer that makes logits.
    - ``"layer0"``: all of a layer, which is ``"layer0 attn"``, ``"layer0 mlp"`` and ``"layer0 norm"``. What belongs
      neither to the attention nor to a norm is the ``mlp``.
    - ``"layer0 head1"``: the parts of the projections that the output of one head depends on: of query, output, key
      and value, and of the biases of all but the output. With grouped queries, key and value are those of its group,
      which other heads use too. What all heads have in common (the bias of the output, norms of queries and keys)
      belongs to ``attn`` alone.
    - ``"layer0 group0"``: all heads that share a key and a value.
    - The path of an array or of a subtree, such as ``"blocks.0.mlp"``.

    Arrays are known by the names of their path, as modules of flax (linen and nnx) and equinox have them: ``query``,
    ``q_proj``, ``wq``, ``qkv``, ``out``, ``lm_head``, ... A ``weight`` has its outputs first, as in equinox, any other
    array last, as in flax; the axis of the heads may be one with that of their sizes. :func:`preview` shows what a
    name selects.

    Args:
        params: a pytree of arrays or a module, as for :func:`sample`. Layers that are stacked for a scan have no
            numbers in their paths: use :func:`slices` for them.
        names: one of the names above, or a list of them, whose parts add up.
        num_heads: the number of heads (default None: that of an axis of its own, if there is one). The size of a
            head follows from the length of its projection, and not from that of the model.
        num_kv_heads: the number of heads of keys and values (default None: it follows from the lengths of the
            projections of queries and keys; if they are fused, ``num_heads``).
        qkv: how queries, keys and values that are one projection follow each other: ``"concatenated"``, all queries,
            then all keys, then all values; or ``"interleaved"``, the queries of a group, its key, its value, then the
            next group (default ``"concatenated"``).
        layers: a regular expression that is found in the paths of layers, whose first group is the layer's number
            (default: names with ``block`` or ``layer`` in them, or ``h``, and a number).
        roles: regular expressions that match the whole paths of arrays, for those with names of their own: by
            ``"query"``, ``"key"``, ``"value"``, ``"qkv"``, ``"out"``, ``"attn"``, ``"mlp"``, ``"norm"``,
            ``"unembed"`` or ``"embed"`` (default None).

    Returns:
        A tree of booleans that broadcast to the arrays, such as ``(1, num_heads, 1)``: for ``optimize_over`` of a
        rule, and for ``selections`` of :func:`estimate_llc`.

    Raises:
        ``ValueError`` for a name that selects nothing, with those that do; for heads whose number is not known, or
        does not divide their axis; for an unknown layout or role. ``TypeError`` for names that are no strings.

    References:
        Wang, Hoogland, van Wingerden, Furman, Murfet, Differentiation and specialization of attention heads via the
        refined local learning coefficient, 2024.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxoptim import sampling
        >>> attention = {name: {"kernel": jnp.ones((4, 2, 3))} for name in ("query", "key", "value")}
        >>> attention["out"] = {"kernel": jnp.ones((2, 3, 4)), "bias": jnp.ones(4)}
        >>> params = {"embed": jnp.ones((5, 4)), "layer_0": {"attention": attention, "mlp": jnp.ones((4, 4))}}
        >>> mask = sampling.restriction(params, "layer0 head1")
        >>> mask["layer_0"]["attention"]["query"]["kernel"].shape
        (1, 2, 1)
        >>> print(sampling.preview(params, mask))
        layer_0.attention.key.kernel    (4, 2, 3)  12 of 24
        layer_0.attention.out.kernel    (2, 3, 4)  12 of 24
        layer_0.attention.query.kernel  (4, 2, 3)  12 of 24
        layer_0.attention.value.kernel  (4, 2, 3)  12 of 24
        all arrays                                 48 of 136
    """
    wanted = [names] if isinstance(names, str) else list(names) if isinstance(names, Iterable) else [names]
    if not wanted or not all(isinstance(name, str) for name in wanted):
        raise TypeError(f"names is a name or a list of names, such as 'layer0 head1', but got {names!r:.80}.")
    if qkv not in LAYOUTS:
        raise ValueError(f"Invalid qkv: {qkv!r}. It is {' or '.join(map(repr, LAYOUTS))}.")
    if unknown := sorted(set(roles or {}) - set(ROLES)):
        raise ValueError(f"roles: there is no role {unknown[0]!r}. The roles are {', '.join(ROLES)}.")
    arrays = trained_of(params)
    shapes = {
        path: np.shape(leaf)
        for path, leaf in zip(trees.names(arrays), jax.tree.leaves(arrays, is_leaf=trees.is_leaf), strict=True)
        if leaf is not None
    }
    found = _places(list(shapes), layers, roles or {})
    chosen: dict[str, list[Any]] = {}
    for name in wanted:
        parts = _selected(name, found, shapes, num_heads, num_kv_heads, qkv)
        for path, part in parts.items():
            chosen.setdefault(path, []).append(part)
    return slices(params, {re.escape(path): True if True in parts else parts for path, parts in chosen.items()})


class _Place(NamedTuple):
    """The place of an array: the number of its layer, None outside of all; its role, None if it has none."""

    layer: int | None
    role: str | None


def _places(paths: Sequence[str], layers: str, roles: Mapping[str, str]) -> dict[str, _Place]:
    """The place of each array."""
    ends: dict[str, tuple[int, int] | None] = {}  # the number of the layer, and how many parts of the path name it
    for path in paths:
        found = re.search(layers, path)
        if found is not None and not (found.groups() and (found[1] or "").isdigit()):
            raise ValueError(f"layers: {layers!r} has no group of digits, such as in r'blocks\\.(\\d+)\\.'.")
        ends[path] = None if found is None else (int(found[1]), path[: found.end()].rstrip(".").count(".") + 1)
    parents = set()  # of queries, keys and values
    for path, end in ends.items():
        parts = path.split(".")
        own = range(end[1], len(parts)) if end is not None else ()
        in_mlp = any(_is(_MLP, parts[at]) for at in own)
        parents |= {tuple(parts[:at]) for at in own if _projection(parts[at]) is not None and not in_mlp}

    def role_of(path: str) -> str | None:
        for role, pattern in roles.items():
            if re.fullmatch(pattern, path):
                return role
        end, parts = ends[path], path.split(".")
        if end is None:
            return next((role for part in parts for role, words in _OUTSIDE.items() if _is(words, part)), None)
        for at in range(end[1], len(parts)):
            if _is(_NORM, parts[at]) or _is(_MLP, parts[at]):
                return "norm" if _is(_NORM, parts[at]) else "mlp"
            below = tuple(parts[: at + 1])
            is_own = _projection(parts[at]) or (_is(_OUT, parts[at]) and below[:-1] in parents)
            if is_own or _is(_ATTENTION, parts[at]) or below in parents:
                return _role_in_attention(parts[at:])
        return "mlp"

    return {path: _Place(None if end is None else end[0], role_of(path)) for path, end in ends.items()}


def _is(words: str, part: str) -> bool:
    return re.fullmatch(words, part, re.IGNORECASE) is not None


def _projection(part: str) -> str | None:
    return next((role for role, words in _PROJECTIONS.items() if _is(words, part)), None)


def _role_in_attention(parts: Sequence[str]) -> str:
    """Return the role of an array of an attention layer."""
    if any(_is(_NORM, part) for part in parts):
        return "attn"
    known = (_projection(part) or ("out" if _is(_OUT, part) else None) for part in parts)
    return next((role for role in known if role is not None), "attn")


def _selected(
    name: str,
    found: Mapping[str, _Place],
    shapes: Mapping[str, tuple[int, ...]],
    num_heads: int | None,
    num_kv_heads: int | None,
    qkv: str,
) -> dict[str, Any]:
    """Return the selection of a name, by path: True for all of an array, or ``(axis, parts, indices)``."""
    if name == "full":
        return dict.fromkeys(found, True)
    if below := [path for path in found if path == name or path.startswith(f"{name}.")]:
        return dict.fromkeys(below, True)
    if name in ("embed", "unembed"):
        if whole := [path for path, place in found.items() if place == (None, name)]:
            return dict.fromkeys(whole, True)
        tied = " Logits may be made by the embedding itself, which is 'embed'." if name == "unembed" else ""
        raise ValueError(f"There is no array known as {name!r}.{tied} {_allowed(found)}")
    parsed = re.fullmatch(r"layer(\d+)(?: (attn|mlp|norm|head(\d+)|group(\d+)))?", name)
    layer = {} if parsed is None else {p: x.role for p, x in found.items() if x.layer == int(parsed[1])}
    if parsed is None or not layer:
        raise ValueError(f"There is no {name!r}. {_allowed(found)}")
    if parsed[3] is None and parsed[4] is None:
        of = {None: ROLES, "attn": _OF_ATTENTION}.get(parsed[2], (parsed[2],))
        if whole := [path for path, role in layer.items() if role in of]:
            return dict.fromkeys(whole, True)
        raise ValueError(f"There is no {name!r}: its layer has {', '.join(layer)}. Give roles={{{parsed[2]!r}: ...}}.")
    projections = {path: _Projection(path, role, shapes[path]) for path, role in layer.items() if role in _SLICED}
    heads = _Heads.of(f"layer{parsed[1]}", list(projections.values()), num_heads, num_kv_heads, qkv)
    of_heads = heads.of_group(int(parsed[4])) if parsed[3] is None else heads.of_head(int(parsed[3]))
    parts = {path: heads.part(projection, of_heads) for path, projection in projections.items()}
    return {path: part for path, part in parts.items() if part is not None}


def _allowed(found: Mapping[str, _Place]) -> str:
    """Return a sentence that lists the names."""
    numbers = sorted({place.layer for place in found.values() if place.layer is not None})
    outside = [role for role in ("embed", "unembed") if (None, role) in found.values()]
    layers = [f"layer{number}" for number in numbers]
    some = [*layers[:2], "...", layers[-1]] if len(layers) > 3 else layers
    parts = " (alone or with attn, mlp, norm, head0, group0, ...)" if layers else ", but no layers (see layers=)"
    return f"The names are {', '.join(['full', *outside, *some])}{parts}, and the paths {', '.join(found)}."


_SLICED = (*_PROJECTIONS, "out")


class _Projection(NamedTuple):
    """An array of a projection.

    Attributes:
        path: its path.
        role: ``"query"``, ``"key"``, ``"value"``, ``"qkv"`` or ``"out"``.
        shape: its shape.
    """

    path: str
    role: str
    shape: tuple[int, ...]

    @property
    def is_bias(self) -> bool:
        """Whether the array is a bias: without an axis of inputs or, for the output projection, of heads."""
        return self.path.rpartition(".")[2].lower().endswith("bias") or len(self.shape) < 2

    @property
    def axis(self) -> int:
        """The first axis of the heads."""
        last = self.path.rpartition(".")[2].lower()
        return 0 if self.is_bias else int((self.role == "out") == last.endswith("weight"))

    @property
    def length(self) -> int:
        """The length of the first axis of the heads."""
        return self.shape[self.axis]

    @property
    def num_axes(self) -> int:
        """The number of axes of the heads, their sizes, and what is fused with them."""
        return len(self.shape) - (not self.is_bias)

    @property
    def has_own_axis(self) -> bool:
        """Whether the heads have an axis of their own, beside that of their sizes."""
        return self.num_axes > 1


class _Heads(NamedTuple):
    """The heads of a layer.

    Attributes:
        layer: its name.
        num_heads: how many heads there are.
        num_groups: how many heads of keys and values.
        qkv: how those of a fused projection follow each other.
    """

    layer: str
    num_heads: int
    num_groups: int
    qkv: str

    @classmethod
    def of(
        cls, layer: str, projections: Sequence[_Projection], count: int | None, groups: int | None, qkv: str
    ) -> _Heads:
        """Return the heads of some projections."""
        kernels = {x.role: x for x in projections if not x.is_bias}
        if not kernels.keys() >= {"query", "key", "value", "out"} and not kernels.keys() >= {"qkv", "out"}:
            raise ValueError(
                f"{layer} has no heads: of query, key, value (or qkv) and out its arrays have only "
                f"{', '.join(kernels) or 'none'}. Give roles={{'query': ...}}, regular expressions of paths."
            )
        query, key, fused = (kernels.get(role) for role in ("query", "key", "qkv"))
        own = None if query is None or not query.has_own_axis else query.length
        if own is None and fused is not None and fused.num_axes == 3:
            own = fused.shape[fused.axis + (qkv == "concatenated")]
        count = own if count is None else count
        if count is None:
            path = (query or fused or projections[0]).path
            raise ValueError(f"{path!r} has one axis for all heads. Give num_heads=.")
        if own not in (None, count):
            raise ValueError(f"num_heads is {count}, but {layer} has {own} heads.")
        if query is None or key is None:
            groups = count if groups is None else groups
        else:
            found = key.length if key.has_own_axis else key.length * count / query.length
            if groups not in (None, found):
                raise ValueError(f"num_kv_heads is {groups}, but {layer} has {found:g} heads of keys and values.")
            groups = int(found)
        if groups < 1 or count % groups:
            raise ValueError(
                f"{layer} has {count} heads and {groups} of keys and values, which do not divide them. Give num_heads= "
                "and num_kv_heads=."
            )
        return cls(layer, count, groups, qkv)

    def of_head(self, head: int) -> list[int]:
        """Return the heads of a selection of one head, a list of its number."""
        if head >= self.num_heads:
            raise ValueError(f"There is no '{self.layer} head{head}'. The heads are head0 to head{self.num_heads - 1}.")
        return [head]

    def of_group(self, group: int) -> list[int]:
        """Return the query heads of a group, which share keys and values."""
        if group >= self.num_groups:
            raise ValueError(f"There is no '{self.layer} group{group}'. The last group is group{self.num_groups - 1}.")
        size = self.num_heads // self.num_groups
        return list(range(group * size, (group + 1) * size))

    def part(self, projection: _Projection, heads: Sequence[int]) -> Any:
        """The part of a projection that some heads use, all of one group; None for no part."""
        axis, size = projection.axis, self.num_heads // self.num_groups
        group = heads[0] // size
        if projection.role == "out":
            return None if projection.is_bias else (axis, self.num_heads, list(heads))
        if projection.role == "query":
            return axis, self.num_heads, list(heads)
        if projection.role != "qkv":
            return axis, self.num_groups, [group]
        if projection.has_own_axis:
            return self._part_of_stacked(projection, heads)
        if self.qkv == "concatenated":
            indices = [*heads, self.num_heads + group, self.num_heads + self.num_groups + group]
        else:
            first = group * (size + 2)
            indices = [*(first + head % size for head in heads), first + size, first + size + 1]
        return axis, self.num_heads + 2 * self.num_groups, indices

    def _part_of_stacked(self, projection: _Projection, heads: Sequence[int]) -> Any:
        """The part of a fused projection with more axes than one for queries, keys and values, all as many."""
        if self.num_groups != self.num_heads:
            raise ValueError(f"{projection.path!r} has an axis of queries, keys and values: num_kv_heads is num_heads.")
        return projection.axis + (self.qkv == "concatenated"), self.num_heads, list(heads)
