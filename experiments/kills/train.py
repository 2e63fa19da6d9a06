"""A small training run that may be killed at any moment: start the same command again, and it goes on.

    python -m experiments.kills.train --directory runs/small --steps 400

Everything that a resumed run could get wrong is in it: shuffled input from grain, dropout, Adam's
moments and a learning rate that follows the step, a save with a metric of which the best is kept.
"""

import argparse
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax
from lora_jax import checkpoint

WIDTH, CLASSES, EXAMPLES, BATCH = 64, 16, 1000, 32
TX = optax.adamw(optax.cosine_decay_schedule(1e-2, 2000))


def make_params() -> dict[str, Any]:
    rng = np.random.default_rng(1)
    shapes = {"up": (WIDTH, 4 * WIDTH), "down": (4 * WIDTH, WIDTH), "head": (WIDTH, CLASSES)}
    return {name: {"kernel": rng.standard_normal(s, np.float32) / s[0] ** 0.5} for name, s in shapes.items()}


def model(params: Any, x: jax.Array) -> jax.Array:
    x = x + jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"]
    return x @ params["head"]["kernel"]


def loss_fn(params: Any, batch: Any, key: jax.Array) -> jax.Array:
    x = batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape, jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(model(params, x), batch["y"]).mean()


def make_state() -> lora_jax.TrainState:
    wrapped = lora_jax.wrap(make_params(), rank=4, train="head", dropout=0.1)
    return lora_jax.TrainState.create(wrapped, TX, jax.random.key(1))


def make_data() -> grain.IterDataset:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((EXAMPLES, WIDTH), np.float32)
    y = rng.integers(0, CLASSES, EXAMPLES).astype(np.int32)
    examples = grain.MapDataset.range(EXAMPLES).seed(0).shuffle().map(lambda i: {"x": x[i], "y": y[i]})
    return examples.repeat().batch(BATCH).to_iter_dataset(grain.ReadOptions(num_threads=1))


def train(directory: str, steps: int, every: int) -> lora_jax.TrainState:
    step = lora_jax.make_train_step(loss_fn, TX)
    evaluate = jax.jit(lora_jax.lora(lambda params, batch: loss_fn(params, batch, jax.random.key(2))))
    held_out = next(iter(make_data()))
    run = checkpoint.Run(directory, make_state(), make_data(), every=every, keep=2, best="loss", steps=steps)
    with run:
        print(f"goes on from step {run.step}", flush=True)
        for batch in run:
            run.state, metrics = step(run.state, batch)
            run.log(metrics)
            if run.step % (5 * every) == 0:
                run.save(loss=evaluate(run.state.wrapped, held_out))
    return run.state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--directory", required=True, help="where the run lives")
    parser.add_argument("--steps", type=int, default=400, help="how many steps it has in all")
    parser.add_argument("--every", type=int, default=8, help="steps between two saves")
    options = parser.parse_args()
    train(options.directory, options.steps, options.every)


if __name__ == "__main__":
    main()
