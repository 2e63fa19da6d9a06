"""Where a tree's arrays lie on a mesh: rules for the base, and the factors' parts derived from its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta, spmd
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax import nnx
from lora_jax.tree import Pattern, is_box, leaves_with_path, map_with_path, matches, nearest
from lora_jax.weight import AxisKind, FullWeight, LoraWeight, is_wrapped_leaf

# {pattern: spec}, pairs of those, pairs of a logical axis name and mesh axes, or a tree of specs.
Rules = Any
Part = Any  # a mesh axis, a tuple of several, or None


def factor_specs(spec: P, axes: Sequence[AxisKind]) -> tuple[P, P, P]:
    """The specs of a, b and scale, derived from that of w: the rank axis is never sharded.

    a takes the parts of w's batch and in axes, b those of its batch and out axes, scale those of its
    batch axes.

    >>> [tuple(spec) for spec in factor_specs(P(None, "fsdp", "tensor"), ("batch", "in", "out"))]
    [(None, 'fsdp'), (None, None, 'tensor'), ()]
    """
    parts = (*spec, *(None,) * (len(axes) - len(spec)))
    batch, inner, outer = (
        [part for part, kind in zip(parts, axes, strict=True) if kind == which]
        for which in ("batch", "in", "out")
    )
    return _stripped((*batch, *inner)), _stripped((*batch, None, *outer)), _stripped(batch)


def _stripped(parts: Iterable[Part]) -> P:
    """The spec without None at its end, of which jax takes those with and without for two shardings."""
    parts = list(parts)
    while parts and parts[-1] is None:
        parts.pop()
    return P(*parts)


def factor_shardings(w: Any, axes: Sequence[AxisKind]) -> tuple[NamedSharding, ...] | None:
    """Where the factors of a weight that lies on a mesh belong; None for any other weight.

    >>> mesh = jax.make_mesh((1,), ("fsdp",))
    >>> w = jax.device_put(np.ones((8, 4), np.float32), NamedSharding(mesh, P("fsdp")))
    >>> [tuple(sharding.spec) for sharding in factor_shardings(w, ("in", "out"))]
    [('fsdp',), (), ()]
    """
    if isinstance(w, Tracer) or not isinstance(w, jax.Array) or not isinstance(w.sharding, NamedSharding):
        return None
    mesh = w.sharding.mesh
    return tuple(NamedSharding(mesh, spec) for spec in factor_specs(w.sharding.spec, axes))


def tree_shardings(tree: Any, mesh: Mesh, rules: Rules = None) -> Any:
    """A `NamedSharding` for every array of a tree; `lora_jax.shardings` says by which rules."""
    tree, _ = nnx.opened(tree)
    return assigned(tree, base_specs(tree, mesh, rules), mesh)


def base_specs(tree: Any, mesh: Mesh, rules: Rules = None) -> dict[str, P]:
    """The spec of every leaf of a plain or wrapped tree by path; of a LoraWeight that of its w."""
    check_mesh(mesh)
    by_path, by_name = _read_rules(rules)
    names = _axis_names(tree)
    if by_name and not names:
        raise ValueError(
            f"the sharding rules speak of axes by name, such as {by_name[0][0]!r}, and no parameter names "
            "its axes: boxes are lost by nn.unbox and in a plain checkpoint. Write {pattern: PartitionSpec}."
        )
    nodes = dict(leaves_with_path(tree, is_wrapped_leaf))
    items = {path: shape for path, node in nodes.items() if (shape := _shape(node)) is not None}
    unused = dict.fromkeys(pattern for pattern, _ in by_path)
    specs: dict[str, P] = {}
    for path, shape in items.items():
        node = nodes[path]
        found = [(pattern, spec) for pattern, spec in by_path if matches(pattern, path, node)]
        for pattern, _ in found:
            unused.pop(pattern, None)
        if found:
            spec = found[0][1]
        elif (placed := _placed_on(mesh, node)) is not None:
            spec = placed
        elif path in names:
            spec = _from_names(path, names[path], by_name, mesh)
        elif by_path:
            spec = P()
        else:
            spec = _largest(path, shape, mesh)
        specs[path] = _checked(path, spec, shape, mesh)
    if unused:
        pattern = next(iter(unused))
        raise ValueError(
            f"the sharding rule {pattern!r} matches no parameter. The nearest paths are "
            f"{', '.join(map(repr, nearest(str(pattern), items)))}."
        )
    return specs


def check_mesh(mesh: Any) -> None:
    """Raise unless it is a mesh whose axes are all Auto or all Explicit."""
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh is {mesh!r}; write jax.make_mesh((4, 2), ('fsdp', 'tensor')), for instance.")
    if len(set(mesh.axis_types)) > 1:
        raise ValueError(
            f"the mesh has axes of the types {mesh.axis_types}; make it of one kind: "
            f"jax.make_mesh({tuple(mesh.axis_sizes)}, {tuple(mesh.axis_names)}, "
            f"axis_types=(jax.sharding.AxisType.Auto,) * {len(mesh.axis_names)})."
        )


def assigned(tree: Any, specs: Mapping[str, P], mesh: Mesh, others: bool = True) -> Any:
    """A `NamedSharding` for every array, from the specs of the base's leaves.

    The parts of wrapped leaves, wherever they stand (gradients, an optimizer's moments), are known by
    the leaf's own path. A plain leaf is looked up by its path in the tree, unless `others` is False:
    then it is replicated, as is what has another number of axes than the parameter it belongs to.
    """

    def on(spec: P, x: Any = None) -> NamedSharding:
        return NamedSharding(mesh, spec if x is None or _fits(spec, x.shape, mesh) else P())

    def leaf(path: str, node: Any) -> Any:
        if not is_wrapped_leaf(node):
            return on(specs.get(path, P()) if others else P())
        spec = specs.get(path if others and path in specs else node.path, P())
        if isinstance(node, FullWeight):
            return _filled(node, value=lambda x: on(spec, x))
        a, b, scale = factor_specs(spec, node.axes)
        return _filled(
            node,
            w=lambda _: on(spec),
            a=lambda x: on(a, x),
            b=lambda x: on(b, x),
            scale=lambda _: on(scale),
        )

    return map_with_path(leaf, tree, is_leaf=is_wrapped_leaf)


def _fits(spec: P, shape: tuple[int, ...], mesh: Mesh) -> bool:
    sizes = [_count(mesh, part) for part in spec]
    return len(spec) <= len(shape) and all(n % size == 0 for n, size in zip(shape, sizes, strict=False))


def _filled(node: Any, **fields: Callable[[Any], NamedSharding]) -> Any:
    # A field may be a hole, or a whole subtree where an optimizer masks it.
    return node.replace(**{name: jax.tree.map(fn, getattr(node, name)) for name, fn in fields.items()})


def _base(node: Any) -> Any:
    """What stands for a leaf of the base: the weight, or the value that is trained in its place."""
    return node.w if isinstance(node, LoraWeight) else node.value if isinstance(node, FullWeight) else node


def _shape(node: Any) -> tuple[int, ...] | None:
    """The shape of a leaf of the base; None for what is no array."""
    value = _base(node)
    return tuple(value.shape) if hasattr(value, "shape") else None


def _placed_on(mesh: Mesh, node: Any) -> P | None:
    value = _base(node)
    sharding = None if isinstance(value, Tracer) else getattr(value, "sharding", None)
    if isinstance(sharding, NamedSharding) and sharding.mesh == mesh:
        return sharding.spec
    return None


def _read_rules(rules: Rules) -> tuple[list[tuple[Pattern, P]], list[tuple[str, Part]]]:
    """Rules by path, and rules for the names of logical axes."""
    if rules is None:
        return [], []
    if isinstance(rules, Mapping) and all(spec is None or isinstance(spec, P) for spec in rules.values()):
        rules = [(pattern, P() if spec is None else spec) for pattern, spec in rules.items()]
    by_path: list[tuple[Pattern, P]] = []
    by_name: list[tuple[str, Part]] = []
    if isinstance(rules, Sequence) and not isinstance(rules, str):
        for rule in rules:
            match rule:
                case (str() as pattern, P() as spec):
                    by_path.append((pattern, spec))
                case (predicate, P() as spec) if callable(predicate):
                    matching: Any = predicate
                    by_path.append((matching, spec))
                case (str() as name, None | str() | tuple() as part):
                    by_name.append((name, part))
                case _:
                    raise TypeError(
                        f"{rule!r} is no sharding rule; write (pattern, PartitionSpec), such as "
                        "('attn/(q|k|v)/kernel', PartitionSpec('fsdp', 'tensor')), or, for a model whose "
                        "axes have names, (name, mesh axis), such as ('embed', 'fsdp')."
                    )
        return by_path, by_name
    tree, _ = nnx.opened(rules)
    for path, spec in leaves_with_path(tree, is_leaf=lambda x: isinstance(x, P)):
        spec = spec.spec if isinstance(spec, NamedSharding) else spec
        if not isinstance(spec, P):
            raise TypeError(f"the sharding rules hold {spec!r} at {path!r}; write a PartitionSpec there.")
        by_path.append((_exactly(path), spec))
    return by_path, by_name


def _exactly(path: str) -> Pattern:
    return lambda other, _: bool(other == path)


def _axis_names(tree: Any) -> dict[str, tuple[Sequence[Part], Sequence[tuple[str, Part]]]]:
    """The names of the axes that Linen's boxes and NNX's Variables carry, and the rules beside them."""
    found = {}
    for path, node in leaves_with_path(tree, is_leaf=is_box):
        if isinstance(node, meta.AxisMetadata):
            names, rules = getattr(node, "names", None), getattr(node, "rules", None)
        elif is_box(node):
            about = node.get_metadata()
            names, rules = about.get("out_sharding"), about.get("sharding_rules")
            names = names.spec if isinstance(names, NamedSharding) else names
        else:
            continue
        if names is not None and not (isinstance(names, tuple) and not names):
            found[path] = (tuple(names), tuple(rules or ()))
    return found


def _from_names(path: str, named: Any, given: Sequence[tuple[str, Part]], mesh: Mesh) -> P:
    """The spec of axes with names: the first rule whose mesh axes are still free, as Flax reads them."""
    names, own = named
    rules = [*given, *own, *(spmd.get_logical_axis_rules() or ())]
    used: set[str] = set()
    parts = []
    for name in names:
        candidates = [part for key, part in rules if key == name]
        if name is not None and not candidates:
            if not set(_several(name)) <= set(mesh.axis_names):
                raise ValueError(
                    f"{path!r} has an axis named {name!r}, which is no axis of the mesh "
                    f"{tuple(mesh.axis_names)} and has no rule; write ({name!r}, mesh axis or None) into a "
                    "list of rules, in which (pattern, PartitionSpec) may stand too."
                )
            candidates = [name]
        free = [part for part in candidates if not used & set(_several(part))]
        part = free[0] if free else None
        used |= set(_several(part))
        parts.append(part)
    return P(*parts)


def _several(part: Part) -> tuple[str, ...]:
    return () if part is None else (part,) if isinstance(part, str) else tuple(part)


def _count(mesh: Any, part: Part) -> int:
    """Into how many pieces mesh axes divide an axis."""
    return math.prod(mesh.shape[name] for name in _several(part))


def _largest(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The default: the largest axis that divides is sharded over every mesh axis but `data`.

    Vectors are small, also where layers stack them, and are replicated.
    """
    names = tuple(name for name in mesh.axis_names if name != "data" and mesh.shape[name] > 1)
    size = _count(mesh, names)
    fitting = [i for i, n in enumerate(shape) if n and n % size == 0]
    if len(shape) < 2 or path.endswith(("scale", "bias")) or not names or not fitting:
        return P()
    axis = max(fitting, key=lambda i: shape[i])
    return P(*(None,) * axis, names[0] if len(names) == 1 else names)


def _checked(path: str, spec: P, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The spec, or an error that says by what it does not fit the shape."""
    if len(spec) > len(shape):
        raise ValueError(
            f"{path!r} has shape {shape} and is to be sharded by {spec}, which has {len(spec)} parts; write "
            "at most one for each axis."
        )
    if P.UNCONSTRAINED in spec:
        raise ValueError(f"{path!r} is to be sharded by {spec}; write None for an axis that stays whole.")
    used = [name for part in spec for name in _several(part)]
    twice = [name for name in used if used.count(name) > 1]
    if twice:
        raise ValueError(
            f"{path!r} is to be sharded by {spec}, which uses {twice[0]!r} twice; write it once."
        )
    for i, part in enumerate(spec):
        unknown = [name for name in _several(part) if name not in mesh.axis_names]
        if unknown:
            raise ValueError(
                f"{path!r} is to be sharded by {spec}, and the mesh has no axis {unknown[0]!r}; it has "
                f"{tuple(mesh.axis_names)}."
            )
        size = _count(mesh, part)
        if shape[i] % size:
            raise ValueError(
                f"axis {i} of {path!r} has size {shape[i]}, which {part!r} of size {size} does not divide; "
                f"write a rule for {path!r} that leaves it whole."
            )
    return _stripped([*spec])


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh of several devices on which some array of a tree lies."""
    for x in jax.tree.leaves(tree):
        where = x.sharding if isinstance(x, jax.Array) and not isinstance(x, Tracer) else None
        if isinstance(where, NamedSharding) and where.num_devices > 1 and isinstance(where.mesh, Mesh):
            return where.mesh
    return None


def checked_batch_spec(mesh: Mesh, rules: Rules, given: P | None) -> P:
    """How a batch's leading axes are sharded: as given, or by the names of the mesh's axes."""
    check_mesh(mesh)
    if given is not None:
        if not isinstance(given, P):
            example = given if isinstance(given, str) else mesh.axis_names[0]
            raise TypeError(
                f"batch_spec is {given!r}; write one PartitionSpec for all arrays of a batch, such as "
                f"batch_spec=jax.sharding.PartitionSpec({example!r})."
            )
        if not {name for part in given for name in _several(part)} <= set(mesh.axis_names):
            raise ValueError(
                f"batch_spec is {given!r}; write one PartitionSpec for all arrays of a batch, of the mesh's "
                f"axes {tuple(mesh.axis_names)}."
            )
        return given
    names = tuple(name for name in mesh.axis_names if name in ("data", "fsdp"))
    if names:
        return P(names)
    if rules is None:
        return P(mesh.axis_names)
    raise ValueError(
        f"the mesh's axes {tuple(mesh.axis_names)} do not tell over which of them the batch is sharded; "
        f"write batch_spec=PartitionSpec({mesh.axis_names[0]!r}), for instance."
    )


def process_shard(mesh: Mesh, batch_spec: P | None = None) -> tuple[int, int]:
    """Which part of every batch this process reads, and how many parts there are.

    Processes whose devices hold the same rows (they share a layer's width, say) have the same part and
    must read the same rows. With one process it is (0, 1).

    Args:
        mesh: The mesh of the train step.
        batch_spec: As for `make_train_step`.

    Returns:
        index, count: read rows `index::count` of every batch, or any other partition of it.

    Raises:
        ValueError: the rows of two processes overlap without being the same.

    >>> process_shard(jax.make_mesh((1,), ("data",)))
    (0, 1)
    """
    spec = checked_batch_spec(mesh, None, batch_spec)
    rows = NamedSharding(mesh, P(*spec[:1]))
    shards = _count(mesh, spec[0] if len(spec) else None)
    held: dict[int, set[int]] = {}
    for device, (part,) in rows.devices_indices_map((shards,)).items():
        held.setdefault(device.process_index, set()).add(part.indices(shards)[0])
    parts = sorted({tuple(sorted(starts)) for starts in held.values()})
    if sum(map(len, parts)) != shards:
        raise ValueError(
            f"on the mesh {dict(mesh.shape)} with the batch by {spec} the rows of some processes overlap in "
            "part; order the mesh's devices so that each process holds whole parts of the batch."
        )
    return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)


def put(x: Any, where: NamedSharding) -> Any:
    """An array, or an abstract one, in its place."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    if not isinstance(x, (jax.Array, np.ndarray)):
        return x  # numbers and functions in an Equinox module reach the model as they are
    if jax.process_count() > 1 and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        # jax has no device_put of typed keys to devices of other processes.
        data = jax.device_put(jax.random.key_data(x), where)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    return jax.device_put(x, where)


def put_part(path: str, x: Any, mesh: Mesh, spec: P) -> Any:
    """One array of a batch on the mesh, or an abstract one; of several processes x is this one's part."""
    if isinstance(x, Tracer) or isinstance(x, jax.Array) and not x.is_fully_addressable:
        return x
    there = getattr(x, "sharding", None)
    if isinstance(there, NamedSharding) and there.mesh == mesh:
        return x
    shape = np.shape(x)
    where = NamedSharding(mesh, P(*spec[: len(shape)]))
    abstract = isinstance(x, jax.ShapeDtypeStruct)
    if jax.process_count() > 1 and not abstract:
        return jax.make_array_from_process_local_data(where, np.asarray(x))
    try:
        where.shard_shape(shape)
    except ValueError as error:
        line = "jax.device_put(x, NamedSharding(mesh, P()))"
        if abstract:
            line = "jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))"
        raise ValueError(
            f"the batch's {path or 'array'!r} has shape {shape}, which does not divide over the mesh "
            f"{dict(mesh.shape)} by {where.spec}; write a batch size that does, or another batch_spec. "
            f"What is not by example put on the mesh yourself: {line}."
        ) from error
    return x.update(sharding=where) if abstract else jax.device_put(x, where)


def layout_of(tree: Any) -> tuple[Any, ...]:
    """For every array the sharding it has on a mesh of several devices, if it has one."""

    def of(x: Any) -> NamedSharding | None:
        where = None if isinstance(x, Tracer) else getattr(x, "sharding", None)
        if not isinstance(where, NamedSharding) or where.num_devices == 1:
            return None
        spec = where.spec
        # What comes out of a step may say the same in another form, and is to be known again.
        return NamedSharding(where.mesh, _stripped([*spec])) if spec and spec[-1] is None else where

    return tuple(map(of, jax.tree.leaves(tree)))


def explicit_parts(x: Any) -> int:
    """Over how many devices the first axis of an array is sharded by its type."""
    where = jax.typeof(x).sharding
    if AxisType.Explicit not in getattr(where.mesh, "axis_types", ()) or not len(where.spec):
        return 1
    return _count(where.mesh, where.spec[0])


def laid_out(tree: Any, layout: tuple[Any, ...]) -> Any:
    """The arrays of a tree, each constrained to its sharding."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef.unflatten(
        x if where is None else _constrained(x, where) for x, where in zip(leaves, layout, strict=True)
    )


def _constrained(x: jax.Array, where: NamedSharding) -> jax.Array:
    # With Explicit axes the sharding is part of the type, and one that differs has to be changed.
    explicit = AxisType.Explicit in where.mesh.axis_types
    return jax.sharding.reshard(x, where) if explicit else lax.with_sharding_constraint(x, where)
