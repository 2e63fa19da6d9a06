"""Will it fit? The train step compiled ahead of time for named hardware, and what the compiler says of it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.errors import JaxRuntimeError
from jax.experimental import topologies
from jax.experimental.mesh_utils import create_device_mesh
from jax.extend.core import Literal
from jax.extend.core import primitives as p
from jax.sharding import AxisType, Mesh, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from lora_jax import nnx
from lora_jax import params as params_lib
from lora_jax.hlo import Collective, collectives
from lora_jax.rules.control import scan_parts
from lora_jax.sharding import Rules, checked_batch_spec, put, put_part
from lora_jax.train import TrainState, make_train_step, shardings
from lora_jax.tree import Pattern, leaves_with_path, map_with_path
from lora_jax.weight import FullWeight, LoraWeight, is_wrapped_leaf

# --- What a plan says -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes of a train step on one device.

    Attributes:
        base: The parameters that are not trained, by the shapes of their shards; so are the next four.
        trained: The factors and the leaves trained in full; in full fine-tuning every float parameter.
        optimizer: The optimizer's state.
        batch: The batch of one step.
        gradients: The gradients of what is trained; a compiled step has them among its activations.
        activations: What the compiled step holds beside base, trained, optimizer and batch: activations,
            and with them gathered weights, gradients and work space. None where nothing was compiled.
        peak: What the compiled step takes in all, by the compiler; where it refused, what it asked for.
    """

    base: int
    trained: int
    optimizer: int
    batch: int
    gradients: int
    activations: int | None = None
    peak: int | None = None

    @property
    def states(self) -> int:
        """What a device holds between steps, and the batch."""
        return self.base + self.trained + self.optimizer + self.batch


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one train step on all devices together, as `flops` counts them.

    They are those of the program as it is written: work that devices repeat, where an axis of the mesh
    shards nothing of it, counts once.

    Attributes:
        step: The step itself.
        floor: What every method pays that trains something at the adapted weights: the bare forward
            pass and the gradient of every activation back to the first adapted weight, but not the
            products that make the gradients of adapted weights. What the model recomputes in its
            backward pass is part of it.
        full: The bare forward pass and the gradients of all float parameters.
    """

    step: int
    floor: int
    full: int


@dataclass(frozen=True)
class Plan:
    """What `plan` found. `str` gives it as a table, `dataclasses.asdict` as plain data for JSON.

    Attributes:
        topology: The name that was asked for, or "local".
        device: The kind of device.
        devices: How many there are.
        mesh: The size of every mesh axis.
        fits: Whether the step fits the device's memory; None where the limit is not known, as on a CPU.
        limit: The bytes of a device that a program may use, or None.
        memory: The bytes of the step.
        full: Those of full fine-tuning with the same optimizer, every parameter and its state in the
            dtype that the parameter has.
        parameters: How many numbers full fine-tuning trains.
        trained: How many numbers are trained.
        flops: The operations of a step.
        collectives: The collectives of a step by kind, on one device; None where the compiler refused.
        advice: What would help where the step does not fit.
        refusal: The first line of the compiler's refusal, or None.
    """

    topology: str
    device: str
    devices: int
    mesh: dict[str, int]
    fits: bool | None
    limit: int | None
    memory: Memory
    full: Memory
    parameters: int
    trained: int
    flops: Flops
    collectives: dict[str, Collective] | None
    advice: tuple[str, ...]
    refusal: str | None

    def __str__(self) -> str:
        return _table(self)


def plan(
    loss_fn: Callable[..., Any],
    params: Any,
    batch: Any,
    *,
    rank: Any,
    tx: optax.GradientTransformation,
    topology: str | None = None,
    mesh: Mapping[str, int] | Mesh | None = None,
    rules: Rules = None,
    batch_spec: P | None = None,
    accumulate: int = 1,
    densify: Pattern | None = None,
    compile_full: bool = False,
    **wrap: Any,
) -> Plan:
    """Compile the train step for named hardware, there or not, and report what it would take.

    It is the step of `make_train_step` on the state of `TrainState.create(wrap(params, rank))`, lowered
    and compiled from shapes alone: nothing is run and nothing is allocated. TPU topologies are compiled
    for by the real TPU compiler, which the optional package `libtpu` holds.

    Args:
        loss_fn: As for `make_train_step`.
        params: The base, of arrays or of `jax.ShapeDtypeStruct`; for a model that is not made yet,
            `jax.eval_shape(init, key)`.
        batch: The whole batch of a step, over all devices; arrays or `jax.ShapeDtypeStruct`.
        rank: As for `wrap`.
        tx: The optax transformation.
        topology: "v5e:2x4", "v5p:4x4x4", "v6e:4x4" and the like; "cpu:8"; None for the local devices.
        mesh: The size of every mesh axis in order, {"fsdp": 16, "tensor": 4}, of which one may be -1, for
            the rest; by default one axis "fsdp" of all devices. A `jax.sharding.Mesh` also does, without a
            topology.
        rules: How the base lies on the mesh, as for `shardings`. Where params themselves lie is not
            looked at.
        batch_spec: How the batch's leading axes are sharded, as for `make_train_step`.
        accumulate: As for `make_train_step`.
        densify: As for `lora_jax.lora`.
        compile_full: Whether to compile full fine-tuning as well, for its activations and peak. Without
            it `Plan.full` holds the states alone.
        **wrap: Whatever else `lora_jax.wrap` takes: targets, train, alpha, axes, parts.

    Returns:
        A `Plan`. Where the compiler refuses the step for its memory, that is the answer: `fits` is False
        and `advice` says what would help. Any other error of the compiler is raised.

    Raises:
        ModuleNotFoundError: the topology is a TPU's and `libtpu` is not installed.
        ValueError: the topology is not known; the mesh does not have its number of devices; the batch
            does not divide; too few CPU devices.

    >>> def loss_fn(params, batch, key):
    ...     return jnp.mean((batch["x"] @ params["kernel"] - batch["y"]) ** 2)
    >>> params = {"kernel": jax.ShapeDtypeStruct((512, 256), jnp.bfloat16)}
    >>> x, y = (jax.ShapeDtypeStruct((64, n), jnp.bfloat16) for n in (512, 256))
    >>> found = plan(loss_fn, params, {"x": x, "y": y}, rank=4, targets="kernel",
    ...              tx=optax.sgd(1e-3), topology="cpu:1")
    >>> found.trained, found.memory.base, found.flops.floor
    (3072, 262148, 16777216)
    """
    on = _mesh(topology, mesh)
    params, batch = _abstract(params), _batch_on(on, _abstract(batch), rules, batch_spec)
    options: dict[str, Any] = {"accumulate": accumulate, "densify": densify}
    step = make_train_step(loss_fn, tx, mesh=on, rules=rules, batch_spec=batch_spec, **options)
    state = _state(lambda tree: params_lib.wrap(tree, rank, **wrap), params, tx, on, rules)
    with jax.set_mesh(on):
        # Without a mesh of its own, since a step that is being traced cannot set one.
        operations = flops(make_train_step(loss_fn, tx, **options), state, batch)
        floor, ceiling, recomputes = _bare_flops(loss_fn, params, state, batch, accumulate)

    compiled = _compile(step, state, batch)
    memory = _states(state, batch, compiled.peak)
    limit = compiled.limit or _limit(on.devices.flat[0])
    fits = False if compiled.refusal else None if limit is None else compiled.peak <= limit
    everything = _state(_trained_in_full, params, tx, on, rules)
    full = _states(everything, batch, _compile(step, everything, batch).peak if compile_full else None)
    return Plan(
        topology=topology or "local",
        device=on.devices.flat[0].device_kind,
        devices=on.size,
        mesh={str(name): size for name, size in on.shape.items()},
        fits=fits,
        limit=limit,
        memory=memory,
        full=full,
        parameters=_count(everything.trainable),
        trained=_count(state.trainable),
        flops=Flops(operations, floor, ceiling),
        collectives=None if compiled.text is None else collectives(compiled.text),
        advice=() if fits is not False else _advice(memory, limit, on, batch, accumulate, recomputes),
        refusal=compiled.refusal,
    )


# --- States and shards ----------------------------------------------------------------------------


def _is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray, jax.ShapeDtypeStruct))


def _is_float(x: Any) -> bool:
    return _is_array(x) and jnp.issubdtype(x.dtype, jnp.floating)


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if _is_array(x) else x, tree)


def _parted(tree: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """The arrays of a tree, and the function that puts others in their place; what is no array stays."""
    leaves, treedef = jax.tree.flatten(tree)
    places = [i for i, x in enumerate(leaves) if _is_array(x)]

    def join(arrays: Sequence[Any]) -> Any:
        new = list(leaves)
        for i, x in zip(places, arrays, strict=True):
            new[i] = x
        return treedef.unflatten(new)

    return [leaves[i] for i in places], join


def _count(tree: Any) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree) if _is_float(x))


def _state(
    wrap: Callable[[Any], Any], params: Any, tx: optax.GradientTransformation, mesh: Mesh, rules: Rules
) -> TrainState:
    """The abstract state of a run, every array with its sharding."""
    arrays, join = _parted(params)
    joins = []

    def create(arrays: Sequence[Any]) -> list[Any]:
        made, join_state = _parted(TrainState.create(wrap(join(arrays)), tx, jax.random.key(0)))
        joins.append(join_state)
        return made

    shapes = jax.eval_shape(create, arrays)
    state = joins[-1](shapes)
    return jax.tree.map(put, state, shardings(state, mesh, rules))


def _trained_in_full(params: Any) -> Any:
    tree, close = nnx.opened(params)

    def leaf(path: str, x: Any) -> Any:
        return FullWeight(x, x.dtype, path) if _is_float(x) else x

    return close(map_with_path(leaf, tree, is_leaf=nnx.is_other_variable))


def _batch_on(mesh: Mesh, batch: Any, rules: Rules, spec: P | None) -> Any:
    spec = checked_batch_spec(mesh, rules, spec)

    def leaf(path: str, x: Any) -> Any:
        placed = put_part(path, x, mesh, spec)
        try:
            placed.sharding.shard_shape(x.shape)
        except ValueError:
            raise ValueError(
                f"the batch's {path or 'array'!r} has shape {x.shape}, which does not divide over the mesh "
                f"{dict(mesh.shape)} by {spec}; write a batch size that does, or another batch_spec."
            ) from None
        return placed

    return map_with_path(leaf, batch)


def _bytes(tree: Any) -> int:
    """The bytes of a tree's arrays on one device."""
    arrays = [x for x in jax.tree.leaves(tree) if _is_array(x)]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in arrays)


def _states(state: TrainState, batch: Any, peak: int | None) -> Memory:
    trained = _bytes(state.trainable)
    memory = Memory(
        base=_bytes(state.frozen),
        trained=trained,
        optimizer=_bytes(state.opt_state),
        batch=_bytes(batch),
        gradients=trained,
    )
    if peak is None:
        return memory
    return dataclasses.replace(memory, activations=peak - memory.states, peak=peak)


# --- The compiler's word --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Compiled:
    peak: int
    limit: int | None = None
    text: str | None = None
    refusal: str | None = None


def _compile(step: Any, state: TrainState, batch: Any) -> _Compiled:
    lowered = step.lower(state, batch)
    try:
        compiled = lowered.compile()
    except JaxRuntimeError as error:
        return _refused(error)
    memory = compiled.memory_analysis()
    platform = state.step.sharding.mesh.devices.flat[0].platform
    # A TPU's figure is the one that its compiler holds against the limit. That of the others leaves the
    # arguments out, and they set aside all temporaries at once.
    peak = (
        memory.peak_memory_in_bytes
        if platform == "tpu"
        else (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes
            + memory.generated_code_size_in_bytes
        )
    )
    return _Compiled(peak, text=compiled.as_text())


_SIZE = r"([\d.]+)([KMGTP]?)"
_OVER = re.compile(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)|Used {_SIZE} of {_SIZE} hbm")


def _refused(error: RuntimeError) -> _Compiled:
    """The figures of a refusal for memory; any other error is raised again."""
    found = _OVER.search(str(error))
    if "RESOURCE_EXHAUSTED" not in str(error) or found is None:
        raise error
    number, unit, limit, limit_unit = (x for x in found.groups() if x is not None)
    used, limit = _read_size(number, unit), _read_size(limit, limit_unit)
    return _Compiled(used, limit, refusal=str(error).strip().splitlines()[0])


def _read_size(number: str, unit: str) -> int:
    return round(float(number) * 1024 ** " KMGTP".index(unit or " "))


@functools.cache
def _limit(device: Any) -> int | None:
    """The bytes of a device that a program may use, if that is known."""
    if device.platform == "tpu":
        # The compiler knows, and says so where it is asked for more than any chip has.
        shape = jax.ShapeDtypeStruct((2**42,), jnp.int8, sharding=SingleDeviceSharding(device))
        try:
            jax.jit(jnp.bitwise_not).lower(shape).compile()
        except JaxRuntimeError as error:
            return _refused(error).limit
        return None
    try:
        stats = device.memory_stats()
    except JaxRuntimeError:
        return None
    return (stats or {}).get("bytes_limit")


def _advice(
    memory: Memory, limit: int | None, mesh: Mesh, batch: Any, accumulate: int, recomputes: bool
) -> tuple[str, ...]:
    if limit is None or memory.peak is None:
        return ()
    left = limit - memory.states
    if left <= 0:
        return (
            f"more shards: parameters and optimizer alone take {_size(memory.states)}; "
            f"{math.ceil(mesh.size * memory.states / limit)} devices in place of {mesh.size} would hold them "
            "if they were divided evenly, without any activation.",
        )
    needed = memory.peak - memory.states
    lines = [f"{_size(left)} are left for activations, and they take {_size(needed)}."]
    if not recomputes:
        lines.append(
            "remat: the model recomputes nothing in its backward pass; put jax.checkpoint (nn.remat, "
            "nnx.remat) around each layer."
        )
    leaf = max(jax.tree.leaves(batch), key=lambda x: len(x.shape))
    examples, shards = leaf.shape[0], leaf.shape[0] // leaf.sharding.shard_shape(leaf.shape)[0]
    most = examples // accumulate * left // needed
    if sizes := [n for n in range(shards, most + 1, shards) if examples % n == 0]:
        # A part of what counts as activations, gathered weights for instance, does not grow with the batch.
        size = max((n for n in sizes if 2 * n <= most), default=sizes[0])
        lines.append(
            f"smaller batch: fewer than {most + 1} examples at a time in place of {examples // accumulate}; "
            f"accumulate={examples // size} has {size} at a time and the same gradient."
        )
    lines.append(
        f"more shards: about {math.ceil(mesh.size * memory.peak / limit)} devices in place of {mesh.size}, "
        "if all is divided evenly; an axis that divides each example, too, helps most with activations."
    )
    return tuple(lines)


# --- Operations -----------------------------------------------------------------------------------


def flops(fn: Callable[..., Any], *args: Any) -> int:
    """The floating-point operations of a function's products: two for each multiplication and addition.

    Counted on the traced program are dot_general, convolution (the positions that padding or dilation
    leave empty are not), ragged_dot, and what a Pallas kernel estimates of itself; nothing elementwise.
    A scan's body counts once for each of its steps, where XLA's cost analysis counts it once; a while
    loop, whose steps are not known, once; of a cond the costliest branch; a shard_map's body once for
    each shard. What no result depends on is not counted.

    Args:
        fn: Any function that JAX can trace.
        *args: Its arguments; arrays may be abstract.

    >>> x, w = jax.ShapeDtypeStruct((8, 16), jnp.float32), jax.ShapeDtypeStruct((6, 16, 16), jnp.float32)
    >>> flops(lambda w, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0], w, x)
    24576
    """
    arrays, join = _parted(args)
    jaxpr = jax.make_jaxpr(lambda arrays: _parted(fn(*join(arrays)))[0])(arrays)
    return _walk(jaxpr, [_NEEDED] * len(jaxpr.out_avals), {})[0]


def _bare_flops(
    loss_fn: Any, params: Any, state: TrainState, batch: Any, accumulate: int
) -> tuple[int, int, bool]:
    """The operations of the floor and of full fine-tuning; and whether the model recomputes anything."""
    tree, close = nnx.opened(params)
    arrays, join = _parted(tree)
    floats = [i for i, x in enumerate(arrays) if _is_float(x)]

    def loss(trained: Sequence[Any], arrays: Sequence[Any], batch: Any) -> Any:
        arrays = list(arrays)
        for i, x in zip(floats, trained, strict=True):
            arrays[i] = x
        out = loss_fn(close(join(arrays)), batch, jax.random.key(0))
        return out if isinstance(out, tuple) else (out, ())

    if accumulate > 1:
        batch = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((x.shape[0] // accumulate, *x.shape[1:]), x.dtype), batch
        )
    gradients = jax.value_and_grad(loss, has_aux=True)
    jaxpr = jax.make_jaxpr(gradients)([arrays[i] for i in floats], arrays, batch)

    kinds = {
        node.path: _GRADIENT if isinstance(node, LoraWeight) else _NEEDED
        for _, node in leaves_with_path(state.trainable, is_wrapped_leaf)
        if is_wrapped_leaf(node)
    }
    paths = [path for path, x in leaves_with_path(tree) if _is_array(x)]
    values = [_NEEDED] * (len(jaxpr.out_avals) - len(floats))
    floor, *_ = _walk(jaxpr, values + [kinds.get(paths[i], _DEAD) for i in floats], {})
    full, *_ = _walk(jaxpr, values + [_NEEDED] * len(floats), {})
    return accumulate * floor, accumulate * full, _recomputes(jaxpr)


# What a value is for: nothing; a gradient that is not counted, and reaches it through no further
# product; or anything else. The larger one counts where there are several.
_DEAD, _GRADIENT, _NEEDED = 0, 1, 2


def _walk(jaxpr: Any, wanted: Sequence[int], seen: dict[Any, Any]) -> tuple[int, list[int]]:
    """The operations of the products that are needed, and what each input is for."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    key = (id(jaxpr), tuple(wanted))
    if key not in seen:
        uses: dict[Any, int] = {}

        def use(variables: Iterable[Any], kinds: Iterable[int]) -> None:
            for variable, kind in zip(variables, kinds, strict=True):
                if not isinstance(variable, Literal):
                    uses[variable] = max(uses.get(variable, _DEAD), kind)

        use(jaxpr.outvars, wanted)
        total = 0
        for eqn in reversed(jaxpr.eqns):
            outs = [uses.get(variable, _DEAD) for variable in eqn.outvars]
            if any(outs) or eqn.effects:
                count, ins = _equation(eqn, outs, seen)
                total += count
                use(eqn.invars, ins)
        seen[key] = total, [uses.get(variable, _DEAD) for variable in jaxpr.invars]
    return seen[key]


def _equation(eqn: Any, outs: list[int], seen: dict[Any, Any]) -> tuple[int, list[int]]:
    params, inputs = eqn.params, len(eqn.invars)
    product = _PRODUCTS.get(eqn.primitive.name)
    if product is not None:
        return product(eqn) if max(outs) == _NEEDED else 0, [_NEEDED] * inputs
    if eqn.primitive is p.scan_p:
        consts, carry = scan_parts(params)
        total, ins = _loop(params["jaxpr"], outs, consts, carry, seen)
        return params["length"] * total, ins
    if eqn.primitive is p.while_p:
        first, second = params["cond_nconsts"], params["body_nconsts"]
        test, test_ins = _walk(params["cond_jaxpr"], [_NEEDED], seen)
        outs = list(map(max, outs, test_ins[first:]))
        total, ins = _loop(params["body_jaxpr"], outs, second, len(outs), seen)
        return test + total, test_ins[:first] + ins
    if eqn.primitive is p.cond_p:
        counts, uses = zip(*(_walk(branch, outs, seen) for branch in params["branches"]), strict=True)
        return max(counts), [_NEEDED, *map(max, *uses, [_DEAD] * (inputs - 1))]
    inner = next((params[name] for name in ("jaxpr", "call_jaxpr") if name in params), None)
    if inner is None:
        return 0, [_NEEDED if eqn.effects else max(outs)] * inputs
    shards = 1
    if eqn.primitive.name == "shard_map":
        shards = math.prod(params["mesh"].shape[name] for name in params["newly_manual_axes"])
    total, ins = _walk(inner, outs, seen)
    return shards * total, ins


def _loop(body: Any, outs: list[int], consts: int, carry: int, seen: dict[Any, Any]) -> tuple[int, list[int]]:
    """A body whose first results are carried into its next step."""
    while True:
        total, ins = _walk(body, outs, seen)
        carried = list(map(max, outs[:carry], ins[consts : consts + carry]))
        if carried == outs[:carry]:
            return total, ins
        outs = carried + outs[carry:]


def _dot(eqn: Any) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    return _product(eqn, contracted)


def _ragged_dot(eqn: Any) -> int:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = numbers.dot_dimension_numbers
    # Where the ragged axis is contracted, every group has a result of its own, of its part of the axis.
    groups = eqn.outvars[0].aval.shape[0] if set(numbers.lhs_ragged_dimensions) & set(contracted) else 1
    return _product(eqn, contracted) // max(groups, 1)


def _product(eqn: Any, contracted: Sequence[int]) -> int:
    shape = eqn.invars[0].aval.shape
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)


def _convolution(eqn: Any) -> int:
    params = eqn.params
    numbers = params["dimension_numbers"]
    left, right = (variable.aval.shape for variable in eqn.invars)
    out = eqn.outvars[0].aval.shape
    total = 2 * math.prod(out[i] for i in numbers.out_spec[:2]) * right[numbers.rhs_spec[1]]
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
    windows = zip(*(params[name] for name in names), strict=True)
    specs = (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec)
    spatial = zip(*(spec[2:] for spec in specs), strict=True)
    for (i, j, k), (stride, (low, _), spread, dilation) in zip(spatial, windows, strict=True):
        at = np.arange(out[k])[:, None] * stride - low + np.arange(right[j]) * dilation
        total *= int(np.sum((at >= 0) & (at <= (left[i] - 1) * spread) & (at % spread == 0)))
    return total


def _kernel(eqn: Any) -> int:
    return getattr(eqn.params.get("cost_estimate"), "flops", 0)


_PRODUCTS: dict[str, Callable[[Any], int]] = {
    "dot_general": _dot,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _convolution,
    "pallas_call": _kernel,
}


def _recomputes(jaxpr: Any) -> bool:
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive is p.remat_p:
            return True
        for param in eqn.params.values():
            inner = param if isinstance(param, (tuple, list)) else [param]
            if any(hasattr(getattr(x, "jaxpr", x), "eqns") and _recomputes(x) for x in inner):
                return True
    return False


# --- Topologies -----------------------------------------------------------------------------------


_FORMS = (
    'write "v5e:2x4", "v5p:4x4x4" or "v6e:4x4" for a slice of TPUs, "cpu:8", or None for the local devices'
)


def _mesh(topology: str | None, mesh: Mapping[str, int] | Mesh | None) -> Mesh:
    if isinstance(mesh, Mesh):
        if topology is not None:
            raise ValueError(
                f"a Mesh has its devices, and the topology {topology!r} others; give the mesh as sizes, "
                f"mesh={dict(mesh.shape)}, or leave the topology out."
            )
        return mesh
    devices = _devices(topology)
    sizes = {"fsdp": -1} if mesh is None else dict(mesh)
    rest = [name for name, size in sizes.items() if size == -1]
    if len(rest) > 1:
        raise ValueError(f"the mesh {sizes} has several axes of size -1, and only one can be the rest.")
    if rest:
        sizes[rest[0]] = max(1, len(devices) // math.prod(size for size in sizes.values() if size != -1))
    if math.prod(sizes.values()) != len(devices):
        product = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(
            f"the mesh {product} needs {math.prod(sizes.values())} devices, and {topology or 'this machine'} "
            f"has {len(devices)}; write sizes with that product, such as mesh={{'fsdp': {len(devices)}}}."
        )
    # A mesh axis may take a part of one of the slice's own axes, which jax.make_mesh does not do.
    placed = create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    return Mesh(placed, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _devices(topology: str | None) -> Sequence[Any]:
    if topology is None:
        return jax.devices()
    found = re.fullmatch(r"([a-z]\w*):(\d+(?:x\d+)*)", topology)
    if not found:
        raise ValueError(f"the topology is {topology!r}; {_FORMS}.")
    sizes = [int(size) for size in found[2].split("x")]
    if 0 in sizes:  # of which the TPU library makes the process end
        raise ValueError(f"the topology {topology!r} has no devices; {_FORMS}.")
    if found[1] != "cpu":
        return _tpus(topology)
    count = math.prod(sizes)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(
            f"{topology!r} needs {count} CPU devices, and there are {len(devices)}. Write "
            f'jax.config.update("jax_num_cpu_devices", {count}) before anything else uses jax, or set '
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}."
        )
    return devices[:count]


def _tpus(topology: str) -> Sequence[Any]:
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise ModuleNotFoundError(
            f"compiling for {topology!r} takes the TPU compiler, which is in the package libtpu: "
            'pip install "lora-jax[tpu]". No TPU is needed.',
            name="libtpu",
        )
    with _without_tpu():
        try:
            # Four chips share a host, unless there is only one.
            alone = {"chips_per_host_bounds": [1, 1, 1]} if re.fullmatch(r"\w+:1(x1)*", topology) else {}
            return topologies.get_topology_desc(topology, platform="tpu", **alone).devices
        except JaxRuntimeError as error:
            raise ValueError(f"libtpu knows no topology {topology!r} ({error}); {_FORMS}.") from None


@contextlib.contextmanager
def _without_tpu() -> Iterator[None]:
    """What libtpu reads from the environment as it starts, where jax has found no TPU on this machine."""
    if "TPU_SKIP_MDS_QUERY" not in os.environ:
        yield
        return
    # Else it looks for the machine's name and kind and complains; and a second process that compiles at
    # the same time would be refused, as if both wanted the same chips.
    missing = {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    missing = {name: value for name, value in missing.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            del os.environ[name]


# --- The table ------------------------------------------------------------------------------------


def _scaled(value: float, units: Sequence[str], base: int) -> str:
    power = 0
    while abs(value) >= base and power < len(units) - 1:
        value, power = value / base, power + 1
    return f"{value:,.0f} {units[0]}" if not power else f"{value:,.2f} {units[power]}"


def _size(count: int | None) -> str:
    return "-" if count is None else _scaled(count, ("B", "KiB", "MiB", "GiB", "TiB"), 1024)


def _operations(count: float) -> str:
    return _scaled(count, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"), 1000)


def _table(plan: Plan) -> str:
    memory, full, operations = plan.memory, plan.full, plan.flops
    verdict = {True: "fits", False: "does not fit", None: "not known whether it fits"}[plan.fits]
    mesh = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
    of = "" if plan.limit is None else f" of {_size(plan.limit)}"
    rows: list[tuple[str, ...]] = [
        ("memory of one device", "LoRA", "full fine-tuning"),
        ("  base, frozen", _size(memory.base), _size(full.base)),
        ("  trained", _size(memory.trained), _size(full.trained)),
        ("  optimizer", _size(memory.optimizer), _size(full.optimizer)),
        ("  batch", _size(memory.batch), _size(full.batch)),
        ("  activations", _size(memory.activations), _size(full.activations)),
        ("    gradients among them", _size(memory.gradients), _size(full.gradients)),
        ("  peak", _size(memory.peak), _size(full.peak)),
        (),
        ("parameters", "LoRA", "full fine-tuning"),
        ("  trained", f"{plan.trained:,}", f"{plan.parameters:,}"),
        (),
        ("products in a step, all devices", "operations", "over the floor"),
        *(
            (f"  {name}", _operations(count), f"{count / max(operations.floor, 1):.4f}")
            for name, count in (
                ("this step", operations.step),
                ("floor", operations.floor),
                ("full fine-tuning", operations.full),
            )
        ),
        (),
        ("collectives in a step, one device", "count", "bytes"),
    ]
    if plan.collectives is None:
        rows.append(("  not known: the compiler refused the step", "", ""))
    else:
        rows += [(f"  {kind}", f"{x.count:,}", _size(x.bytes)) for kind, x in plan.collectives.items()]
        if not plan.collectives:
            rows.append(("  none", "", ""))
    widths = [max(len(row[i]) for row in rows if row) for i in range(3)]
    lines = [
        f"{verdict}: {_size(memory.peak)}{of} on each of {plan.devices} x {plan.device} "
        f"({plan.topology}, {mesh})",
        *(f"  {line}" for line in plan.advice),
        "",
        *(
            f"{row[0]:{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}".rstrip() if row else ""
            for row in rows
        ),
    ]
    return "\n".join(lines)
