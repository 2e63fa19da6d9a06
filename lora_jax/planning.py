"""Will it fit? The train step compiled ahead of time for named hardware, and what the compiler says of it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import inspect
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.errors import JaxRuntimeError
from jax.experimental import topologies
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from lora_jax import nnx
from lora_jax import params as params_lib
from lora_jax.hlo import Collective, collectives
from lora_jax.interpret import RefusedError
from lora_jax.operations import bare_flops, flops, unread
from lora_jax.sharding import Rules, checked_batch_spec, put, put_part
from lora_jax.train import TrainState, make_train_step, shardings, take_apart
from lora_jax.tree import Pattern, map_with_path, nearest
from lora_jax.weight import FullWeight

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
        peak: What the compiled step takes in all, by the compiler, with the arrays that lie on the device
            though the step reads nothing of them; where it refused, what it asked for with those arrays.
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
        batch: The whole batch of a step, over all devices; arrays, `jax.ShapeDtypeStruct` or numbers.
        rank: As for `wrap`.
        tx: The optax transformation.
        topology: "v5e:2x4", "v5p:4x4x4", "v6e:4x4" and the like: a kind of TPU and the chips along each
            axis of a slice, two for v2, v3, v5e and v6e, three for v4, v5p and tpu7x; "cpu:8"; None for
            the local devices, which may be GPUs.
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
        ValueError: the topology is not known, or no slice of its kind; the mesh does not have its number
            of devices; the batch does not divide; too few CPU devices.
        TypeError: an argument of the wrong kind, or of a name that neither `plan` nor `wrap` has; no batch.
        RefusedError: what the model does with an adapted weight has no low-rank form, as for
            `lora_jax.lora`.

    >>> def loss_fn(params, batch, key):
    ...     return jnp.mean((batch["x"] @ params["kernel"] - batch["y"]) ** 2)
    >>> params = {"kernel": jax.ShapeDtypeStruct((512, 256), jnp.bfloat16)}
    >>> x, y = (jax.ShapeDtypeStruct((64, n), jnp.bfloat16) for n in (512, 256))
    >>> found = plan(loss_fn, params, {"x": x, "y": y}, rank=4, targets="kernel",
    ...              tx=optax.sgd(1e-3), topology="cpu:1")
    >>> found.trained, found.memory.base, found.flops.floor
    (3072, 262148, 16777216)
    """
    _check_names(wrap)
    on = _mesh(topology, mesh)
    params, batch = _abstract(params), _batch_on(on, batch, rules, batch_spec)
    place: dict[str, Any] = {"mesh": on, "rules": rules, "batch_spec": batch_spec}
    options: dict[str, Any] = {"accumulate": accumulate, "densify": densify}
    step = make_train_step(loss_fn, tx, **place, **options)
    with _named_as_plans():
        state = _state(lambda tree: params_lib.wrap(tree, rank, **wrap), params, tx, on, rules)
        with jax.set_mesh(on):
            # Without a mesh of its own, since a step that is being traced cannot set one.
            plain = make_train_step(loss_fn, tx, **options)
            operations = flops(plain, state, batch)
            floor, ceiling, recomputes = bare_flops(loss_fn, params, state.trainable, batch, accumulate)

    compiled = _compile(step, state, batch)
    if compiled.refusal:  # in which the compiler does not count what it was not given
        with jax.set_mesh(on):
            left_out = _bytes([x for x in unread(plain, state, batch) if x is not state.key])
        compiled = dataclasses.replace(compiled, peak=compiled.peak + left_out)
    memory = _states(state, batch, compiled.peak)
    limit = compiled.limit or _limit(on.devices.flat[0])
    fits = False if compiled.refusal else None if limit is None else (memory.peak or 0) <= limit
    everything = _state(_trained_in_full, params, tx, on, rules)
    peak = None
    if compile_full:  # in which there is nothing to densify
        peak = _compile(make_train_step(loss_fn, tx, **place, accumulate=accumulate), everything, batch).peak
    full = _states(everything, batch, peak)
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


# --- What is given --------------------------------------------------------------------------------


def _check_names(given: Mapping[str, Any]) -> None:
    """Raise for a keyword that `wrap` does not have, as a misspelt one of plan's own."""
    names = inspect.signature(params_lib.wrap).parameters
    known = [name for name in {**inspect.signature(plan).parameters, **names} if name != "wrap"]
    for name in given:
        if name in ("remat", "checkpoint", "rematerialize"):
            raise TypeError(
                f"plan has no argument {name!r}: what is recomputed is for loss_fn to say. Put "
                "jax.checkpoint (nn.remat, nnx.remat) around each layer there."
            )
        if name not in names:
            raise TypeError(f"plan has no argument {name!r}; the nearest is {nearest(name, known, 1)[0]!r}.")


@contextlib.contextmanager
def _named_as_plans() -> Iterator[None]:
    """Where an error says what to write in wrap(...) or lora(...), say that plan takes it itself."""
    try:
        yield
    except (RefusedError, TypeError, ValueError) as error:
        text = str(error)
        names = [*inspect.signature(params_lib.wrap).parameters, "densify"]
        meant = [f"lora_jax.plan(..., {name}=...)" for name in names if re.search(rf"\b{name}=", text)]
        if meant and re.search(r"\b(wrap|lora)\(", text):
            error.add_note(f"plan takes this itself: {' or '.join(meant)}.")
        raise


# --- States and shards ----------------------------------------------------------------------------


def _is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray, jax.ShapeDtypeStruct))


def _is_float(x: Any) -> bool:
    return _is_array(x) and jnp.issubdtype(x.dtype, jnp.floating)


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if _is_array(x) else x, tree)


def _count(tree: Any) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree) if _is_float(x))


def _state(
    wrap: Callable[[Any], Any], params: Any, tx: optax.GradientTransformation, mesh: Mesh, rules: Rules
) -> TrainState:
    """The abstract state of a run, every array with its sharding."""
    rest, arrays = take_apart(params)
    rests = []

    def create(arrays: Sequence[Any]) -> list[Any]:
        static, made = take_apart(TrainState.create(wrap(rest.join(arrays)), tx, jax.random.key(0)))
        rests.append(static)
        return made

    shapes = jax.eval_shape(create, arrays)
    state = rests[-1].join(shapes)
    return jax.tree.map(put, state, shardings(state, mesh, rules))


def _trained_in_full(params: Any) -> Any:
    tree, close = nnx.opened(params)

    def leaf(path: str, x: Any) -> Any:
        return FullWeight(x, x.dtype, path) if _is_float(x) else x

    return close(map_with_path(leaf, tree, is_leaf=nnx.is_other_variable))


def _batch_on(mesh: Mesh, batch: Any, rules: Rules, spec: P | None) -> Any:
    """The abstract batch, every array with its sharding."""
    if batch is None:
        raise TypeError(
            "batch is None; write the whole batch of a step as loss_fn takes it, of arrays, "
            "jax.ShapeDtypeStruct or numbers, or {} where loss_fn reads none."
        )
    spec = checked_batch_spec(mesh, rules, spec)

    def leaf(path: str, x: Any) -> Any:
        if not isinstance(x, jax.ShapeDtypeStruct):
            try:
                kind = jax.typeof(x)  # of a number too, which the step takes as an array
            except TypeError:
                raise TypeError(
                    f"the batch's {path or 'leaf'!r} is {x!r}; write an array, a jax.ShapeDtypeStruct or a "
                    "number there, and give loss_fn what is none of these in another way."
                ) from None
            where = getattr(x, "sharding", None)
            where = where if isinstance(where, NamedSharding) else None
            x = jax.ShapeDtypeStruct(kind.shape, kind.dtype, sharding=where, weak_type=kind.weak_type)
        return put_part(path, x, mesh, spec)

    return map_with_path(leaf, batch)


def _bytes(tree: Any) -> int:
    """The bytes of a tree's arrays on one device."""
    arrays = [x for x in jax.tree.leaves(tree) if _is_array(x)]
    return sum(math.ceil(math.prod(x.sharding.shard_shape(x.shape)) * _bits(x.dtype) / 8) for x in arrays)


def _bits(dtype: Any) -> int:
    """The bits of a number on a device, where those of less than a byte lie close together."""
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits
    return jnp.finfo(dtype).bits if jnp.issubdtype(dtype, jnp.floating) else 8 * dtype.itemsize


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
    peak = max(peak, memory.states)
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
    return _Compiled(peak + _unread(compiled, state, batch), text=compiled.as_text())


def _unread(compiled: Any, state: TrainState, batch: Any) -> int:
    """The bytes of the arrays that jit leaves out of the compiled step, since it reads nothing of them."""
    changed = (state.trainable, state.opt_state)
    given = (*changed, take_apart(state.frozen)[1], state.step, None, batch)  # None: the key is 8 bytes
    given, where = (
        jax.tree.leaves(tree, is_leaf=lambda x: x is None) for tree in (given, compiled.input_shardings)
    )
    return _bytes([x for x, sharding in zip(given, where, strict=True) if sharding is None])


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
    leaf = max(jax.tree.leaves(batch), key=lambda x: len(x.shape), default=None)
    if leaf is None or not leaf.shape:
        examples, shards = 1, 1  # nothing that could be less
    else:
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


# --- Topologies -----------------------------------------------------------------------------------


# The kinds of TPU that are served: how many axes their network has, and the chips of the largest slice. A
# pod of a network of two axes is a square. By Google's pages on each kind; libtpu takes some slices that
# there are not (three axes of v6e, two of v5p), and at others, such as three axes of v5e, ends the process.
_TPUS = {
    "v2": (2, 16 * 16),
    "v3": (2, 32 * 32),
    "v4": (3, 16 * 16 * 16),
    "v5e": (2, 16 * 16),
    "v5p": (3, 16 * 16 * 24),
    "v6e": (2, 16 * 16),
    "tpu7x": (3, 9216),
}
_FORMS = (
    'write "v5e:2x4", "v5p:4x4x4" or "v6e:4x4" for a slice of TPUs, "cpu:8" for so many CPU devices, or '
    "leave it out for the local devices"
)


def _mesh(topology: Any, mesh: Any) -> Mesh:
    if isinstance(mesh, Mesh):
        if topology is not None:
            raise ValueError(
                f"a Mesh has its devices, and the topology {topology!r} others; give the mesh as sizes, "
                f"mesh={dict(mesh.shape)}, or leave the topology out."
            )
        return mesh
    sizes = {"fsdp": -1} if mesh is None else _sizes(mesh)
    devices = _devices(topology)
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


def _sizes(mesh: Any) -> dict[str, int]:
    if not isinstance(mesh, Mapping) or not mesh or not all(isinstance(name, str) for name in mesh):
        example = {mesh: -1} if isinstance(mesh, str) and mesh else {"fsdp": mesh if _is_size(mesh) else -1}
        raise TypeError(
            f"mesh is {mesh!r}; write the size of every axis by its name, such as mesh={example}, with -1 "
            "for the rest of the devices, or give a jax.sharding.Mesh."
        )
    for name, size in mesh.items():
        if not _is_size(size):
            raise ValueError(
                f"the mesh axis {name!r} has the size {size!r}; write how many devices it has, or -1 for the "
                f"rest: mesh={{{name!r}: -1}}."
            )
    return {name: int(size) for name, size in mesh.items()}


def _is_size(x: Any) -> bool:
    return isinstance(x, (int, np.integer)) and not isinstance(x, bool) and bool(x >= 1 or x == -1)


def _devices(topology: Any) -> Sequence[Any]:
    if topology is None:
        return jax.devices()
    if not isinstance(topology, str):
        raise TypeError(f"the topology is {topology!r}; {_FORMS}.")
    found = re.fullmatch(r"([a-z]\w*):(\d+(?:x\d+)*)", topology)
    if not found:
        raise ValueError(f"the topology is {topology!r}; {_FORMS}.")
    sizes = [int(size) for size in found[2].split("x")]
    if 0 in sizes:
        raise ValueError(f"the topology {topology!r} has no devices; {_FORMS}.")
    if re.fullmatch(r"v\d\w*|tpu\w*", found[1]):
        return _tpus(found[1], sizes)
    if found[1] != "cpu":
        raise ValueError(
            f"the topology {topology!r} is none that is served: elsewhere than where it runs, plan compiles "
            f"for slices of TPUs and for CPUs only. For a GPU run it on a machine with one. Or {_FORMS}."
        )
    count = math.prod(sizes)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(
            f"{topology!r} needs {count} CPU devices, and there are {len(devices)}. Write "
            f'jax.config.update("jax_num_cpu_devices", {count}) before anything else uses jax, or set '
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}."
        )
    return devices[:count]


def _tpus(kind: str, sizes: Sequence[int]) -> Sequence[Any]:
    shape = "x".join(map(str, sizes))
    topology = f"{kind}:{shape}"
    if kind not in _TPUS:
        raise ValueError(
            f"the topology {topology!r} is of no kind of TPU that is served, which are {', '.join(_TPUS)}; "
            f"{_FORMS}."
        )
    axes, chips = _TPUS[kind]
    if len(sizes) != axes:
        example = f"{kind}:{'x'.join(['4'] * axes)}"
        raise ValueError(
            f"the topology {topology!r} has {len(sizes)} axes, and the network of {kind} has {axes}; "
            f'write the chips along each of these, such as "{example}".'
        )
    longest = math.isqrt(chips) if axes == 2 else chips
    if max(sizes) > longest or math.prod(sizes) > chips:
        most = f"{longest}x{longest}" if axes == 2 else f"{chips} chips"
        raise ValueError(
            f"the topology {topology!r} is larger than the largest slice of {kind}, of {most}; {_FORMS}."
        )
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise ModuleNotFoundError(
            f"compiling for {topology!r} takes the TPU compiler, which is in the package libtpu: "
            'pip install "lora-jax[tpu]". No TPU is needed.',
            name="libtpu",
        )
    # Four chips share a host, unless there is only one.
    options: dict[str, Any] = {"chips_per_host_bounds": [1, 1, 1]} if math.prod(sizes) == 1 else {}
    if kind == "v4":  # its two cores are one device, which they are by themselves in later kinds
        options["chip_config_name"] = "megacore"
    with _without_tpu():
        try:
            return topologies.get_topology_desc(topology, platform="tpu", **options).devices
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
