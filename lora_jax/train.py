"""Training: a state, a step on one device or a mesh, and optax transformations that know what is trained."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax import nnx, sharding
from lora_jax import params as params_lib
from lora_jax.interpret import lora
from lora_jax.tree import Pattern, leaves_with_path, map_with_path
from lora_jax.weight import is_wrapped_leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a train step takes and gives: a pytree.

    Args:
        trainable: The trainable half of `partition`: the factors and the leaves trained in full.
        frozen: The frozen half; for an `nnx.Module`, the pair of its graphdef and its state.
        opt_state: The optimizer's state, for the trainable half alone.
        step: How many steps were taken: int32, shape ().
        key: The run's key, which no step changes: step t draws from `fold_in(key, t)`, so a run
            that goes on from a saved state repeats one that was never stopped.
    """

    trainable: Any
    frozen: Any
    opt_state: Any
    step: Any
    key: Any

    @classmethod
    def create(cls, wrapped: Any, tx: optax.GradientTransformation, key: jax.Array) -> TrainState:
        """The state before the first step.

        What is trained is copied, since a step gives its memory to the next state: `wrapped` stays
        good. The base's arrays are shared with `wrapped`, never copied. Where the base lies on a mesh
        the optimizer's state is made there, every device its own part.

        Args:
            wrapped: What `wrap` gave: a tree of any kind, or an `nnx.Module`.
            tx: An optax transformation.
            key: A key from `jax.random.key`, for dropout and for `loss_fn`.

        Raises:
            ValueError: `wrapped` has nothing to train: it does not come from `wrap`.
            TypeError: `key` is not a PRNG key, or `tx` no optax transformation.

        >>> import lora_jax
        >>> wrapped = lora_jax.wrap({"kernel": jnp.ones((8, 4))}, rank=2, targets="kernel")
        >>> state = TrainState.create(wrapped, optax.adam(1e-3), jax.random.key(0))
        >>> sorted({leaf.shape for leaf in jax.tree.leaves(state.opt_state)})
        [(), (2, 4), (8, 2)]
        """
        if not isinstance(key, jax.Array) or not (
            jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.dtype == jnp.uint32
        ):
            raise TypeError(f"key is {_show(key)}; write a PRNG key, for instance jax.random.key(0).")
        _check_optimizer(tx)
        params_lib.require_wrapped(nnx.opened(wrapped)[0], "TrainState.create")
        trainable, frozen = params_lib.partition(wrapped)
        trainable = jax.tree.map(_own, trainable)
        # A numpy array would travel to the device anew at every step.
        frozen = jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, frozen)
        step = jnp.zeros((), jnp.int32)
        init, mesh = tx.init, sharding.mesh_of((trainable, frozen))
        if mesh is not None:
            abstract = cls(trainable, frozen, jax.eval_shape(init, trainable), step, key)
            init = jax.jit(init, out_shardings=shardings(abstract, mesh).opt_state)
        state = cls(trainable, frozen, jax.tree.map(_own, init(trainable)), step, key)
        return _placed_with(state, (trainable, frozen))

    @property
    def wrapped(self) -> Any:
        """The wrapped tree, or module, with the values of this step.

        Its trained arrays are those of the state, which the next step takes: merge, save or copy
        them before.
        """
        return params_lib.combine(self.trainable, self.frozen)


def _own(leaf: Any) -> jax.Array:
    # A step donates these: none may be an array of the caller's, or occur twice (some optimizers
    # keep the parameters themselves). The explicit dtype drops a weak type, which no step keeps.
    return jnp.array(leaf, dtype=_dtype(leaf), copy=True)


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)


def _strong(leaf: Any) -> Any:
    """The same value without a weak type."""
    return lax.convert_element_type(leaf, _dtype(leaf))


Metrics = dict[str, Any]


class TrainStep(Protocol):
    """What `make_train_step` gives."""

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        """The state after the step, and its metrics."""
        ...

    def lower(self, state: TrainState, batch: Any) -> Any:
        """The step as `jax.jit(...).lower` gives it; state and batch may be abstract."""
        ...


def shardings(tree: Any, mesh: Mesh, rules: sharding.Rules = None) -> Any:
    r"""Where every array of a tree belongs on a mesh: a tree of `NamedSharding`.

    For every leaf of the base, in this order: the first of `rules` whose pattern matches its path; the
    sharding it already has on this mesh; the names of its axes, which Linen's boxes
    (`nn.with_partitioning`, `nn.with_logical_partitioning`) and NNX's Variables (`out_sharding`) carry.
    What none of these tells is replicated if there are rules by path; without any its largest axis that
    divides is sharded over every mesh axis but `data` (biases and scales stay whole). Of a LoraWeight a
    takes the parts of w's batch and in axes, b those of its batch and out axes; the rank axis is not
    sharded. What belongs to them in an optimizer's state lies as they do; everything else is replicated.

    Args:
        tree: Parameters, a wrapped tree or a `TrainState`, of arrays or of `jax.ShapeDtypeStruct`.
        mesh: A `jax.sharding.Mesh` of Auto or of Explicit axes.
        rules: {pattern: PartitionSpec} or a list of such pairs; a tree of PartitionSpecs like the
            parameters; or, for models that name their axes, a list of (name, mesh axis) as in
            `nn.logical_axis_rules`.

    Returns:
        A tree of the same structure, for `jax.device_put` and `jax.jit(..., out_shardings=...)`, which
        take trees of arrays alone (`eqx.filter` first what holds functions). For an `nnx.Module` it is
        that of its state.

    Raises:
        ValueError: a rule matches nothing; a spec does not fit the shape or names no axis of the mesh.
        TypeError: what is given as a rule is none.

    >>> from jax.sharding import PartitionSpec
    >>> import lora_jax
    >>> mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"))
    >>> wrapped = lora_jax.wrap({"up": {"kernel": jnp.ones((8, 4))}}, rank=2)
    >>> where = shardings(wrapped, mesh, {"up/kernel": PartitionSpec("fsdp", "tensor")})
    >>> tuple(where["up"]["kernel"].a.spec), tuple(where["up"]["kernel"].b.spec)
    (('fsdp',), (None, 'tensor'))
    """
    if not isinstance(tree, TrainState):
        return sharding.tree_shardings(tree, mesh, rules)
    frozen = tree.frozen[1] if nnx.is_split(tree.frozen) else tree.frozen
    specs = sharding.base_specs(params_lib.combine(tree.trainable, frozen), mesh, rules)
    where = sharding.assigned(frozen, specs, mesh)
    replicated = NamedSharding(mesh, P())
    return TrainState(
        trainable=sharding.assigned(tree.trainable, specs, mesh),
        frozen=(tree.frozen[0], where) if nnx.is_split(tree.frozen) else where,
        opt_state=sharding.assigned(tree.opt_state, specs, mesh, others=False),
        step=replicated,
        key=replicated,
    )


def sharded_init(fn: Callable[..., Any], mesh: Mesh, rules: sharding.Rules = None) -> Callable[..., Any]:
    """A function whose results are made where they belong on a mesh: every device makes its own part.

    Nothing is ever whole on one device, and nothing passes through the host.

    Args:
        fn: A function of arrays that returns parameters, a wrapped tree, an `nnx.Module` or a `TrainState`.
        mesh: As for `shardings`.
        rules: As for `shardings`.

    Returns:
        A function with fn's arguments.

    >>> import lora_jax
    >>> tx = optax.adam(1e-3)
    >>> def init(key):
    ...     params = {"up": {"kernel": jax.random.normal(key, (8, 4))}}
    ...     return TrainState.create(lora_jax.wrap(params, rank=2), tx, key)
    >>> mesh = jax.make_mesh((1,), ("fsdp",))
    >>> state = sharded_init(init, mesh)(jax.random.key(0))
    >>> state.wrapped["up"]["kernel"].a.sharding.mesh == mesh
    True
    """

    def init(*args: Any) -> Any:
        rest: list[Static] = []

        def arrays(*args: Any) -> list[Any]:
            out = fn(*args)
            static, found = take_apart(nnx.split(out) if nnx.is_module(out) else out)
            rest[:] = [static]
            return found

        tree = jax.eval_shape(arrays, *args)
        tree = rest[0].join(tree)
        module = nnx.is_split(tree)
        where = jax.tree.leaves(shardings(tree[1] if module else tree, mesh, rules))
        where = [x for x, kind in zip(where, rest[0].kinds, strict=True) if kind is jax.Array]
        made = rest[0].join(jax.jit(arrays, out_shardings=where)(*args))
        return nnx.merge(*made) if module else made

    return init


def make_train_step(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    mesh: Mesh | None = None,
    rules: sharding.Rules = None,
    batch_spec: P | None = None,
    accumulate: int = 1,
    weight: str | None = None,
    densify: Pattern | None = None,
) -> TrainStep:
    r"""A compiled train step: gradients, optimizer update and metrics of the trainable part.

    With :math:`t` the trainable half and :math:`\ell` the loss, a step is

    .. math:: g = \nabla_t\, \ell(W(t), \text{batch}, k), \qquad t \leftarrow t + u(g)

    where :math:`W(t)` is the model with low-rank weights, run by `lora_jax.lora`, and :math:`u` is
    `tx`. The step's keys come from `fold_in(fold_in(state.key, state.step), i)` for microbatch i (0
    without accumulation), split in two: the first goes to `loss_fn`, the second to the dropout of
    the low-rank branches.

    The trainable half and the optimizer's state are donated: after `state, metrics = step(state,
    batch)` the old state is spent. The frozen half is an argument of the compiled step; it is neither
    donated nor copied, and the new state holds the very same arrays. Of an `nnx.Module` what
    `loss_fn` mutates (statistics, counts) is carried into the new state, from microbatch to
    microbatch; everything else stays.

    On a mesh the same function of the whole batch is computed, and every array stays where it is:
    gradients, parameters and the optimizer's state are constrained to their shardings. A state that does
    not lie as `shardings(state, mesh, rules)` says is first put there. The batch's arrays are put there by
    `batch_spec`; in a run of several processes they are each process's own part, and `process_shard` says
    which that is. Without `mesh` everything follows the arrays of the state and the batch.

    Args:
        loss_fn: `loss_fn(params, batch, key)`, plain code that knows nothing of LoRA and applies no
            `lora`. It returns a scalar loss, or a loss and a dict of auxiliary arrays.
        tx: An optax transformation. The loss reaches it as the extra argument `value`.
        mesh: The mesh to run on; the step runs under `jax.set_mesh(mesh)`.
        rules: How the base lies on the mesh, as for `shardings`.
        batch_spec: How the batch's leading axes are sharded; by default the first over those of the mesh
            axes `data` and `fsdp` that there are, or over the whole mesh where no rules are given.
        accumulate: Into how many microbatches the batch's leading axis is divided; microbatch i
            holds the examples i, i + accumulate, and so on, which leaves a batch that is sharded over
            devices where it is. The gradients' mean is that of the whole batch where the loss is a
            mean over examples, or over what `weight` counts.
        weight: The name of the auxiliary value that counts what the loss is a mean over, such as the
            tokens that are no padding: microbatches, and with their losses the other auxiliary values,
            are weighted by it, and its sum is among the metrics.
        densify: As for `lora_jax.lora`.

    Returns:
        `step(state, batch) -> (state, metrics)`. The metrics are arrays on the device: `loss`,
        `grad_norm` (the global 2-norm, before `tx`), `step` (the steps taken, this one included),
        and the auxiliary values; the loss and the auxiliary values are means over the microbatches,
        the latter as floats. Their copies to the host are under way when the step returns, so reading
        those of one step after the next was started does not wait. `step.lower(state, batch)`, also of
        abstract arrays, gives what `jax.jit(...).lower` gives, for its text and the compiler's analyses.

    Raises:
        ValueError: `accumulate` is no integer of at least 1; `batch_spec` is needed; when the step is
            called, the batch does not divide.
        TypeError: `loss_fn` does not take these three arguments; `tx` is no optax transformation; when
            the step is called, `loss_fn` does not return a scalar float loss, alone or with a dict.

    >>> import lora_jax
    >>> wrapped = lora_jax.wrap({"kernel": jnp.ones((8, 4))}, rank=2, targets="kernel")
    >>> def loss_fn(params, batch, key):
    ...     return jnp.mean((batch["x"] @ params["kernel"] - batch["y"]) ** 2)
    >>> tx = optax.sgd(1e-2)
    >>> state = TrainState.create(wrapped, tx, jax.random.key(0))
    >>> step = make_train_step(loss_fn, tx)
    >>> batch = {"x": jnp.ones((16, 8)), "y": jnp.zeros((16, 4))}
    >>> state, metrics = step(state, batch)
    >>> float(metrics["loss"]), int(metrics["step"])
    (64.0, 1)
    """
    if not isinstance(accumulate, int) or isinstance(accumulate, bool) or accumulate < 1:
        raise ValueError(f"accumulate is {accumulate!r}; write the number of microbatches, 1 or more.")
    _check_loss_fn(loss_fn)
    _check_optimizer(tx)
    optimizer = optax.with_extra_args_support(tx)
    place = _placer(mesh, rules, batch_spec)

    def objective(trainable: Any, frozen: Any, batch: Any, key: jax.Array) -> Any:
        loss_key, branch_key = jax.random.split(key)
        params = params_lib.combine(trainable, frozen)
        out = lora(loss_fn, key=branch_key, densify=densify)(params, batch, loss_key)
        loss, aux = _check_loss(out, loss_fn, weight)
        return loss, (aux, _mutated(params, frozen))

    differentiate = jax.value_and_grad(objective, has_aux=True)

    # The frozen half comes as its leaves: arrays, and apart from them what is no array (numbers and
    # functions in an Equinox module), which must reach the model as it is.
    def one_step(
        rest: Static,
        layout: tuple[Any, ...],
        trainable: Any,
        opt_state: Any,
        arrays: Any,
        step: Any,
        key: Any,
        batch: Any,
    ) -> tuple[Any, ...]:
        frozen = rest.join(arrays)
        key = jax.random.fold_in(key, step)
        if accumulate == 1:
            first = jax.random.fold_in(key, 0)
            (loss, (aux, mutated)), grads = differentiate(trainable, frozen, batch, first)
        else:
            loss, aux, mutated, grads = _accumulated(
                differentiate, objective, accumulate, weight, trainable, frozen, batch, key
            )
        grads = sharding.laid_out(grads, layout[0])
        updates, opt_state = optimizer.update(grads, opt_state, trainable, value=loss)
        trainable = sharding.laid_out(optax.apply_updates(trainable, updates), layout[0])
        # As strongly typed as the state that came in, or the second call would compile anew.
        opt_state = sharding.laid_out(jax.tree.map(_strong, opt_state), layout[1])
        step = step + jnp.ones((), jnp.int32)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), "step": step, **aux}
        return (*map(jax.tree.leaves, (trainable, opt_state)), step, mutated, metrics)

    @functools.lru_cache(maxsize=16)
    def jitted(trainable: tuple[Any, ...], opt_state: tuple[Any, ...], step: Any) -> Any:
        # Results leave as they came. XLA may say the same sharding in another form, where an axis of the
        # mesh has size one, and the next call would compile anew.
        where = ([*trainable], [*opt_state], step, None, None) if any(trainable + opt_state) else None
        return jax.jit(one_step, static_argnums=(0, 1), donate_argnums=(2, 3), out_shardings=where)

    def arguments(state: TrainState, batch: Any) -> tuple[TrainState, Any, tuple[Any, ...]]:
        if not isinstance(state, TrainState):
            raise TypeError(
                f"the step was given a {type(state).__name__} as its state; write "
                "state = lora_jax.TrainState.create(wrapped, tx, key), then step(state, batch)."
            )
        state, batch, (*layout, step) = place(state, batch)
        rest, arrays = take_apart(state.frozen)
        parts = (state.trainable, state.opt_state)
        compiled = jitted(*layout, step[0])
        return state, compiled, (rest, tuple(layout), *parts, arrays, state.step, state.key, batch)

    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        if mesh is not None and any(isinstance(x, Tracer) for x in jax.tree.leaves((state, batch))):
            raise ValueError(
                "a step with mesh= is compiled by itself and cannot be traced. Call it outside of jax.jit, "
                "or make it without mesh= and give it a state that lies on the mesh: "
                "jax.device_put(state, lora_jax.shardings(state, mesh, rules))."
            )
        with _on(mesh):
            state, compiled, args = arguments(state, batch)
            *changed, step, mutated, metrics = compiled(*args)
        _send(metrics)
        parts = (state.trainable, state.opt_state)
        trainable, opt_state = (
            jax.tree.unflatten(jax.tree.structure(t), x) for t, x in zip(parts, changed, strict=True)
        )
        frozen = _replaced(state.frozen, mutated) if mutated else state.frozen
        return TrainState(trainable, frozen, opt_state, step, state.key), metrics

    def lower(state: TrainState, batch: Any) -> Any:
        with _on(mesh):
            _, compiled, args = arguments(state, batch)
            return compiled.lower(*args)

    step_and_lower: Any = train_step
    step_and_lower.lower = lower
    return step_and_lower


def make_eval_step(
    loss_fn: Callable[..., Any],
    *,
    mesh: Mesh | None = None,
    rules: sharding.Rules = None,
    batch_spec: P | None = None,
    densify: Pattern | None = None,
) -> Callable[[TrainState, Any], Metrics]:
    """A compiled evaluation: the loss and the auxiliary values of a batch, without dropout.

    `loss_fn` is called with None in the place of the key, and no branch of LoRA drops anything. What
    the model itself does otherwise in evaluation is for `loss_fn` to say: `deterministic=key is None`,
    or for NNX `nnx.view(model, deterministic=True, use_running_average=True)`. What an `nnx.Module`
    mutates is discarded. A mean over several batches of unequal size is the user's to
    take, with what `loss_fn` returns beside the loss.

    Args:
        loss_fn: As for `make_train_step`; it must do without a key.
        mesh: As for `make_train_step`, and so for the other two.
        rules: How the base lies on the mesh.
        batch_spec: How the batch's leading axes are sharded.
        densify: As for `lora_jax.lora`.

    Returns:
        `evaluate(state, batch) -> metrics`: arrays on the device, `loss` and the auxiliary values. The
        state is not donated.

    >>> import lora_jax
    >>> wrapped = lora_jax.wrap({"kernel": jnp.ones((8, 4))}, rank=2, targets="kernel")
    >>> def loss_fn(params, batch, key):
    ...     return jnp.mean((batch["x"] @ params["kernel"]) ** 2), {"examples": len(batch["x"])}
    >>> state = TrainState.create(wrapped, optax.sgd(1e-2), jax.random.key(0))
    >>> metrics = make_eval_step(loss_fn)(state, {"x": jnp.ones((16, 8))})
    >>> float(metrics["loss"]), float(metrics["examples"])
    (64.0, 16.0)
    """
    _check_loss_fn(loss_fn)
    place = _placer(mesh, rules, batch_spec)

    @functools.partial(jax.jit, static_argnums=(0,))
    def compiled(rest: Static, trainable: Any, arrays: Any, batch: Any) -> Metrics:
        params = params_lib.combine(trainable, rest.join(arrays))
        loss, aux = _check_loss(lora(loss_fn, densify=densify)(params, batch, None), loss_fn)
        return {"loss": loss, **aux}

    def evaluate(state: TrainState, batch: Any) -> Metrics:
        with _on(mesh):
            state, batch, _ = place(state, batch)
            rest, arrays = take_apart(state.frozen)
            metrics = compiled(rest, state.trainable, arrays, batch)
        _send(metrics)
        return metrics

    return evaluate


def _on(mesh: Mesh | None) -> Any:
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def _send(metrics: Metrics) -> None:
    """Start the copies of the numbers to the host, so that whoever reads them later does not wait."""
    for x in jax.tree.leaves(metrics):
        if isinstance(x, jax.Array) and not isinstance(x, Tracer) and x.size == 1:
            x.copy_to_host_async()


def _placer(mesh: Mesh | None, rules: sharding.Rules, batch_spec: P | None) -> Callable[..., Any]:
    """A function of a state and a batch that puts both where they belong, and says how the state lies."""
    if mesh is None:
        for name, value in (("rules", rules), ("batch_spec", batch_spec)):
            if value is not None:
                raise ValueError(f"{name} says how arrays lie on a mesh; give mesh= as well.")

        def follow(state: TrainState, batch: Any) -> tuple[TrainState, Any, Any]:
            state = _placed_with(state, batch)
            return state, batch, _changing_layout(state)

        return follow
    spec = sharding.checked_batch_spec(mesh, rules, batch_spec)

    known = set()  # the layouts that are those which the rules give

    def place(state: TrainState, batch: Any) -> tuple[TrainState, Any, Any]:
        layout = _changing_layout(state)
        rest = sharding.layout_of((state.frozen, state.key))
        if (layout, rest) not in known:
            state = jax.tree.map(sharding.put, state, shardings(state, mesh, rules))
            layout = _changing_layout(state)
            known.add((layout, sharding.layout_of((state.frozen, state.key))))
        batch = map_with_path(lambda path, x: sharding.put_part(path, x, mesh, spec), batch)
        return state, batch, layout

    return place


def _changing_layout(state: TrainState) -> tuple[tuple[Any, ...], ...]:
    """How the three parts of a state lie that a step makes anew."""
    return tuple(map(sharding.layout_of, (state.trainable, state.opt_state, state.step)))


class Static(NamedTuple):
    """A tree without its arrays: hashable, so that jit knows it again."""

    treedef: Any
    kinds: tuple[Any, ...]  # 1 == 1.0 == True, and they are three different leaves
    leaves: tuple[Any, ...]

    def join(self, arrays: Iterable[Any]) -> Any:
        """The tree with these arrays in the places of its own."""
        remaining = iter(arrays)
        return self.treedef.unflatten(
            next(remaining) if kind is jax.Array else leaf
            for kind, leaf in zip(self.kinds, self.leaves, strict=True)
        )


def take_apart(tree: Any) -> tuple[Static, list[Any]]:
    """A tree without its arrays, whose `join` makes it whole again, and the arrays, abstract ones too.

    >>> rest, arrays = take_apart({"kernel": jnp.ones(2), "activation": jnp.tanh})
    >>> len(arrays), rest.join([3.0])["kernel"]
    (1, 3.0)
    """
    leaves, treedef = jax.tree.flatten(tree)
    arrays, kinds = [], []
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)):
            arrays.append(leaf)
            kinds.append(jax.Array)
            leaves[i] = None
        else:
            kinds.append(type(leaf))
    return Static(treedef, tuple(kinds), tuple(leaves)), arrays


def _mutated(params: Any, frozen: Any) -> dict[str, Any]:
    """The frozen leaves of a module that a call replaced, by their number among `frozen`'s leaves."""
    if not nnx.is_graph_node(params):
        return {}
    before = leaves_with_path(frozen[1])
    after = jax.tree.leaves(params_lib.partition(params)[1][1])
    changed = {}
    offset = len(jax.tree.leaves(frozen)) - len(before)
    for i, ((path, old), new) in enumerate(zip(before, after, strict=True)):
        if new is old:
            continue
        if jnp.shape(new) != jnp.shape(old) or _dtype(new) != _dtype(old):
            raise TypeError(
                f"loss_fn changes the module's {path!r} from {_show(old)} to {_show(new)}; what a train "
                "step mutates must keep its shape and dtype. Cast it to those it had."
            )
        changed[str(offset + i)] = _strong(new)
    return changed


def _replaced(frozen: Any, mutated: dict[str, Any]) -> Any:
    leaves, treedef = jax.tree.flatten(frozen)
    for number, value in mutated.items():
        (where,) = sharding.layout_of(leaves[int(number)]) or (None,)
        leaves[int(number)] = value if where is None else jax.device_put(value, where)
    return treedef.unflatten(leaves)


def _accumulated(
    differentiate: Any,
    objective: Any,
    count: int,
    weight: str | None,
    trainable: Any,
    frozen: Any,
    batch: Any,
    key: jax.Array,
) -> tuple[Any, Any, Any, Any]:
    size = _batch_size(batch, count)
    for path, x in leaves_with_path(batch):
        shards = sharding.explicit_parts(x)
        if (size // count) % shards:
            raise ValueError(
                f"a microbatch of {size // count} examples (accumulate={count}) does not divide over the "
                f"{shards} Explicit shards of {path or 'the batch'!r}; write a larger batch, or a smaller "
                "accumulate."
            )
    # Splitting the axis with the microbatches innermost keeps each device's examples on it.
    split = jax.tree.map(lambda x: jnp.reshape(x, (size // count, count, *x.shape[1:])), batch)

    def microbatch(i: Any) -> Any:
        return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, axis=1, keepdims=False), split)

    def body(carry: Any, i: Any) -> Any:
        sums, mutated = carry
        (loss, (aux, new)), grads = differentiate(
            trainable, _replaced(frozen, mutated), microbatch(i), jax.random.fold_in(key, i)
        )
        if weight is not None:
            # A microbatch of nothing but padding has no mean: 0 / 0 must not reach the sum.
            n = aux[weight]
            others = {name: value for name, value in aux.items() if name != weight}
            loss, grads, others = jax.tree.map(
                lambda x: jnp.where(n > 0, n.astype(x.dtype) * x, jnp.zeros_like(x)), (loss, grads, others)
            )
            aux = {**others, weight: n}
        return (jax.tree.map(jnp.add, sums, grads), new), (loss, aux)

    mutated: dict[str, Any] = {}
    if nnx.is_split(frozen):
        # Which leaves the carry holds is known only from a trace.
        shapes = jax.eval_shape(lambda: objective(trainable, frozen, microbatch(0), key))
        leaves = jax.tree.leaves(frozen)
        mutated = {number: jnp.asarray(leaves[int(number)]) for number in shapes[1][1]}
    zeros = jax.tree.map(jnp.zeros_like, trainable)
    indices = jnp.arange(count, dtype=jnp.int32)
    (sums, mutated), (losses, aux) = lax.scan(body, (zeros, mutated), indices)
    total = jnp.asarray(count, jnp.float32) if weight is None else jnp.sum(aux[weight])
    by = jnp.where(total > 0, total, jnp.ones_like(total))  # nothing counts in a batch of padding alone
    grads = jax.tree.map(lambda x: x / by.astype(x.dtype), sums)
    loss, aux = jax.tree.map(lambda x: jnp.sum(x, axis=0) / by.astype(x.dtype), (losses, aux))
    return loss, aux if weight is None else {**aux, weight: total}, mutated, grads


def _batch_size(batch: Any, count: int) -> int:
    shapes = {path: jnp.shape(leaf) for path, leaf in leaves_with_path(batch)}
    listing = ", ".join(f"{path or 'batch'}: {shape}" for path, shape in shapes.items())
    sizes = {shape[:1] for shape in shapes.values()}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            f"accumulate={count} divides the batch's leading axis, which every leaf must have in the same "
            f"size; the shapes are {listing}. Give what is not by example to loss_fn in another way."
        )
    (size,) = sizes.pop()
    if size % count or not size:
        raise ValueError(
            f"a batch of {size} examples does not divide into accumulate={count} microbatches ({listing}); "
            "write a batch size that is a multiple of it."
        )
    return size


def _check_loss_fn(loss_fn: Any) -> None:
    """Raise unless it takes params, batch and key, as far as its signature tells."""
    if not callable(loss_fn):
        raise TypeError(f"loss_fn is {_show(loss_fn)}; write a function loss_fn(params, batch, key).")
    try:
        # What a decorator wraps does not count: it may take other arguments than the decorator gives it.
        signature = inspect.signature(loss_fn, follow_wrapped=False)
    except (TypeError, ValueError):
        return
    try:
        signature.bind("params", "batch", "key")
    except TypeError:
        name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
        raise TypeError(
            f"loss_fn is called as {name}(params, batch, key), and takes {signature}; give it these three "
            "arguments, also where it does not use the key."
        ) from None


def _check_optimizer(tx: Any) -> None:
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(
            f"tx is {_show(tx)}; write an optax transformation, such as optax.adamw(1e-4), or of "
            "optax.MultiSteps its .gradient_transformation()."
        )


def _check_loss(out: Any, loss_fn: Any, weight: str | None = None) -> tuple[Any, dict[str, Any]]:
    name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
    wanted = "return a scalar float loss, or (loss, dict of arrays)"
    loss, aux = out if isinstance(out, tuple) and len(out) == 2 else (out, {})
    if not isinstance(loss, (jax.Array, np.ndarray, np.generic, float)):
        raise TypeError(f"{name} returned {_show(out)}; {wanted}.")
    if jnp.shape(loss) != () or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        raise TypeError(f"{name} returned a loss that is {_show(loss)}; {wanted}.")
    if not isinstance(aux, dict):
        raise TypeError(f"{name} returned a loss and {_show(aux)}; {wanted}.")
    taken = sorted({"loss", "grad_norm", "step"} & set(aux))
    if taken:
        raise TypeError(f"{name} returned auxiliary values named {taken}, as metrics are; rename them.")
    if weight in aux and jnp.result_type(aux[weight]) == jnp.bool_:
        raise TypeError(
            f"{name} returned a boolean {weight!r}, which weight={weight!r} is to count by; sum it."
        )
    values = {}
    for key, value in aux.items():
        for path, leaf in leaves_with_path(value):
            if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, int, float)) or not jnp.issubdtype(
                jnp.result_type(leaf), jnp.number
            ) | (jnp.result_type(leaf) == jnp.bool_):
                where = f"{key}/{path}" if path else key
                raise TypeError(f"{name} returned the auxiliary value {where!r}, {_show(leaf)}; {wanted}.")
        values[key] = jax.tree.map(_as_float, value)
    if weight is not None and (weight not in values or jnp.shape(values[weight]) != ()):
        raise TypeError(
            f"{name} returned the auxiliary values {sorted(values)}, and weight={weight!r} names none "
            "of them that is a single number; return what the loss is a mean over under that name."
        )
    return jnp.asarray(loss), values


def _as_float(value: Any) -> jax.Array:
    dtype = jnp.result_type(value)
    return jnp.asarray(value, dtype if jnp.issubdtype(dtype, jnp.inexact) else jnp.float32)


def _show(x: Any) -> str:
    return f"{x.dtype}{list(x.shape)}" if hasattr(x, "dtype") else f"{type(x).__name__} {str(x)[:60]}"


def _placed_with(state: TrainState, others: Any) -> TrainState:
    """A state put where other arrays were put, as the results of a step on both will be.

    The first step would otherwise differ from the second, which would compile anew.
    """
    if not isinstance(state.step, jax.Array) or _is_placed(state.step) is not False:
        return state
    placed = [x.sharding for x in jax.tree.leaves(others) if _is_placed(x)]
    if not placed:
        return state
    where = max(placed, key=lambda sharding: len(sharding.device_set))
    if isinstance(where, NamedSharding):
        where = NamedSharding(where.mesh, P())

    def place(x: Any) -> Any:
        return sharding.put(x, where) if _is_placed(x) is False else x

    changing = (state.trainable, state.opt_state, state.step, state.key)
    trainable, opt_state, step, key = jax.tree.map(place, changing)
    frozen = state.frozen
    if len(where.device_set) > 1 or nnx.is_split(frozen):
        # Else every step would send the base anew; and a module's statistics come back placed.
        frozen = jax.tree.map(place, frozen)
    return TrainState(trainable, frozen, opt_state, step, key)


def _is_placed(x: Any) -> bool | None:
    """Whether an array is bound to its devices; None for what is no concrete array."""
    return x.committed if isinstance(x, jax.Array) and not isinstance(x, Tracer) else None


@jax.tree_util.register_static
class _Keep:
    """The update of a frozen leaf: whatever it is added to stays, bit for bit.

    A zero would not do: -0.0 + 0.0 is 0.0, and subnormal numbers may be flushed in any sum. It is a
    pytree without leaves, so nothing of the base's size is made and no transformation sees it.
    """

    __array_ufunc__ = None  # so that numpy arrays leave the sum to __radd__

    def __radd__(self, leaf: Any) -> Any:
        return leaf

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Keep)

    def __hash__(self) -> int:
        return hash(_Keep)

    def __repr__(self) -> str:
        return "keep"


def only_trainable(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """An optax transformation for a whole wrapped tree, which touches its trainable part alone.

    For training loops that keep one tree. `tx` sees the factors and the leaves trained in full, as
    in `partition`'s first half, and its state exists for those only. For every other leaf the update
    is a pytree without leaves that `optax.apply_updates` adds as nothing: the leaf stays bit for bit
    what it was, be it -0.0, an integer or a boolean. (`optax.masked` would pass its raw gradient on.)
    It belongs outermost: `only_trainable(optax.chain(...))`.

    A loop over both halves, as `make_train_step` has, is cheaper: differentiating by the whole tree
    also computes the base's gradients, unless the caller stops them.

    Args:
        tx: An optax transformation.

    Raises:
        ValueError: when it is used, on a tree that does not come from `wrap`.

    >>> import lora_jax
    >>> wrapped = lora_jax.wrap({"kernel": -jnp.zeros((8, 4))}, rank=2, targets="kernel")
    >>> tx = only_trainable(optax.sgd(1.0))
    >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, wrapped), tx.init(wrapped), wrapped)
    >>> new = optax.apply_updates(wrapped, updates)["kernel"]
    >>> bool(jnp.all(jnp.signbit(new.w))), float(new.b[0, 0])
    (True, -1.0)
    """
    inner = optax.with_extra_args_support(tx)

    def trainable_part(tree: Any) -> Any:
        return params_lib.partition(tree)[0]

    def init(params: Any) -> Any:
        return inner.init(trainable_part(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        part = None if params is None else trainable_part(params)
        new, state = inner.update(trainable_part(updates), state, part, **extra)
        return jax.tree.map(_kept, updates, new, is_leaf=_is_hole_or_wrapped), state

    return optax.GradientTransformationExtraArgs(init, update)


def _is_hole_or_wrapped(node: Any) -> bool:
    return node is None or is_wrapped_leaf(node)


def _kept(old: Any, new: Any) -> Any:
    if not is_wrapped_leaf(old):
        return _Keep()
    # A wrapped leaf keeps its frozen fields beside the new values of the trained ones.
    return jax.tree.map(
        lambda _, value: _Keep() if value is None else value, old, new, is_leaf=lambda x: x is None
    )
