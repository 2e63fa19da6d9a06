"""Many adapters of one base trained in one run, by one compiled step: `jax.vmap` over a stack of them.

`lora_jax.stack` wants the same leaves adapted in every member, and fills up smaller ranks with zeros. A
member that leaves a matrix as it is gets a pair of zeros there, `filled`: the gradient of each factor is a
product with the other one, so both stay zero under Adam, to the bit.

Members stand in a table of seeds by configurations. Those of one seed see the same batches, and vmap computes
once what they share: the embeddings, and the first layer's products with the base. A step holds the
activations of all that one vmap goes over. So it can go over a few members at a time, the others in turn
inside of the same compiled step (`jax.lax.map` with a batch size): on a CPU, where activations that leave the
caches cost more than larger products save.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import lora_jax

WARMUP = 0.06  # the share of the steps in which the rate rises


@optax.inject_hyperparams
def optimizer(peak: float, steps: int) -> optax.GradientTransformation:
    """Adam; the rate rises linearly and falls linearly to zero. Both arguments may differ by member."""

    def rate(count: Any) -> Any:
        up = WARMUP * steps
        return peak * jnp.minimum((count + 1) / up, (steps - count) / (steps - up))

    return optax.adam(rate)


TX = optimizer(peak=1.0, steps=1)  # its update reads both from the state


# --- The stack -----------------------------------------------------------------------------------------


def is_trained(node: Any) -> bool:
    return isinstance(node, (lora_jax.LoraWeight, lora_jax.FullWeight))


def filled(adapter: Any, union: Any) -> Any:
    """An adapter with pairs of zeros wherever only `union` is adapted: its function, in union's form.

    Args:
        adapter: A wrapped tree, or plain parameters, which become a member that has zeros everywhere.
        union: A wrapped tree of the same base, with all of adapter's leaves adapted and more.

    Raises:
        ValueError: the adapter has a leaf that `union` leaves as it is.
    """

    def leaf(mine: Any, spare: Any) -> Any:
        if is_trained(mine):
            if not is_trained(spare):
                raise ValueError(f"{mine.path!r} is adapted, and not in the union; wrap it there too.")
            return mine
        if isinstance(spare, lora_jax.LoraWeight):
            return spare.replace(a=jnp.zeros_like(spare.a), b=jnp.zeros_like(spare.b))
        return spare

    return jax.tree.map(leaf, adapter, union, is_leaf=is_trained)


def stacked(adapters: Sequence[Sequence[Any]]) -> tuple[Any, Any]:
    """Adapters in rows, one for each seed: what is trained and the scales, with axes (seeds, members)."""
    seeds, members = len(adapters), len(adapters[0])
    stack = lora_jax.stack([adapter for row in adapters for adapter in row])
    stack = jax.tree.map(lambda x: x.reshape(seeds, members, *x.shape[1:]), stack)
    return lora_jax.partition(stack)


def member(trainable: Any, scales: Any, frozen: Any, seed: int, number: int) -> Any:
    """One of the stack as a wrapped tree."""
    stack = lora_jax.combine(trainable, scales)
    return lora_jax.combine(jax.tree.map(lambda x: x[seed, number], stack), frozen)


def over_members(fn: Callable[..., Any], batch_by_seed: bool, vmapped: int) -> Callable[..., Any]:
    """fn(member's things, shared things, batch) for all of them; each seed has a batch, or all have one.

    One vmap goes over at most `vmapped` members of a seed at a time, or over the whole table if it is 0.
    """

    def of_seed(mine: Any, shared: Any, batch: Any) -> Any:
        if vmapped == 0:
            return jax.vmap(fn, in_axes=(0, None, None))(mine, shared, batch)
        return jax.lax.map(lambda x: fn(x, shared, batch), mine, batch_size=vmapped)

    def of_all(mine: Any, shared: Any, batch: Any) -> Any:
        if vmapped == 0:
            return jax.vmap(of_seed, in_axes=(0, None, 0 if batch_by_seed else None))(mine, shared, batch)
        if batch_by_seed:
            return jax.lax.map(lambda x: of_seed(x[0], shared, x[1]), (mine, batch))
        return jax.lax.map(lambda x: of_seed(x, shared, batch), mine)

    return of_all


def make_step(loss_fn: Callable[..., Any], vmapped: int = 0) -> Callable[..., Any]:
    """step((trainable, opt_state), scales, frozen, batches) -> (new pair, losses of (seeds, members))."""

    def step(changing: Any, scales: Any, frozen: Any, batches: Any) -> Any:
        def one(mine: Any, frozen: Any, batch: Any) -> Any:
            (trainable, opt_state), scales = mine

            def loss(trainable: Any) -> Any:
                wrapped = lora_jax.combine(lora_jax.combine(trainable, scales), frozen)
                return lora_jax.lora(loss_fn)(wrapped, batch, None)

            value, gradients = jax.value_and_grad(loss)(trainable)
            updates, opt_state = TX.update(gradients, opt_state, trainable)
            return (optax.apply_updates(trainable, updates), opt_state), value

        return over_members(one, True, vmapped)((changing, scales), frozen, batches)

    return jax.jit(step, donate_argnums=0)


def start(trainable: Any, rates: Sequence[float], steps: int) -> Any:
    """The optimizer's state of a stack: `rates` has one for each configuration."""

    def one(trainable: Any, rate: Any) -> Any:
        return optimizer(rate, steps).init(trainable)

    dtype = jax.tree.leaves(trainable)[0].dtype
    return jax.vmap(jax.vmap(one), in_axes=(0, None))(trainable, jnp.asarray(rates, dtype))


def make_eval(fn: Callable[..., Any], vmapped: int = 0) -> Callable[..., Any]:
    """evaluate(trainable, scales, frozen, batch): fn(params, batch) of every member, on one batch."""

    def evaluate(trainable: Any, scales: Any, frozen: Any, batch: Any) -> Any:
        def one(mine: Any, frozen: Any, batch: Any) -> Any:
            return lora_jax.lora(fn)(lora_jax.combine(lora_jax.combine(*mine), frozen), batch)

        return over_members(one, False, vmapped)((trainable, scales), frozen, batch)

    return jax.jit(evaluate)


# --- A run ---------------------------------------------------------------------------------------------


class Trained(NamedTuple):
    trainable: Any  # (seeds, members, ...)
    scales: Any
    frozen: Any
    losses: np.ndarray  # (steps, seeds, members)
    costs: dict[str, Any]


def train(
    loss_fn: Callable[..., Any],
    adapters: Sequence[Sequence[Any]],
    rates: Sequence[float],
    batches: Iterable[Any],
    steps: int,
    name: str,
    vmapped: int = 0,
) -> Trained:
    """Train a table of adapters, all of one form, each seed on its own batches.

    Args:
        loss_fn: `loss_fn(params, batch, key)`, plain code; the key is None.
        adapters: For each seed a row of wrapped trees, the configurations.
        rates: For each configuration its peak learning rate.
        batches: For each step the seeds' batches, stacked along a first axis. A step is compiled for every
            shape that comes.
        steps: How many there are.
        name: What the progress bar says.
        vmapped: How many members of a seed one vmap goes over at a time; 0 for all of the table. What is
            trained does not depend on it but for rounding.
    """
    _, frozen = lora_jax.partition(adapters[0][0])
    trainable, scales = stacked(adapters)
    changing = trainable, start(trainable, rates, steps)
    step, compiled, losses = make_step(loss_fn, vmapped), {}, []
    costs = {"compilations": 0, "compile_seconds": 0.0, "largest_bytes": 0, "seconds": 0.0}
    costs["vmapped"] = vmapped or len(adapters) * len(rates)
    for batch in tqdm(batches, total=steps, desc=name, unit=" steps", mininterval=1):
        shape = str(jax.tree.map(np.shape, batch))
        begin = time.perf_counter()
        if shape not in compiled:
            compiled[shape] = step.lower(changing, scales, frozen, batch).compile()
            costs["compilations"] += 1
            costs["compile_seconds"] += time.perf_counter() - begin
            costs["largest_bytes"] = max(costs["largest_bytes"], memory(compiled[shape]))
            begin = time.perf_counter()
        changing, loss = compiled[shape](changing, scales, frozen, batch)
        losses.append(np.asarray(loss))
        costs["seconds"] += time.perf_counter() - begin
    return Trained(changing[0], scales, frozen, np.stack(losses), costs)


def memory(compiled: Any) -> int:
    """The compiler's count of the bytes that a step holds at once; what it donates counts once."""
    found = compiled.memory_analysis()
    held = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    return held - found.alias_size_in_bytes


def factor_numbers(adapter: Any) -> int:
    """How many numbers the low-rank factors of a wrapped tree have; leaves trained in full do not count."""
    leaves = jax.tree.leaves(adapter, is_leaf=is_trained)
    return sum(x.a.size + x.b.size for x in leaves if isinstance(x, lora_jax.LoraWeight))


def rank_for(budget: int, one: int) -> int:
    """The rank whose numbers come nearest to a budget, if rank 1 has `one`; of two as near, the smaller."""
    low = max(1, budget // one)
    return low if abs(low * one - budget) <= abs((low + 1) * one - budget) else low + 1
