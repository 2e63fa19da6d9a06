"""LoRA on every device there is: one file to copy to a laptop, a GPU node, a SLURM job or a TPU pod slice.

    python train.py --dir RUN                               # the devices of this machine
    srun python train.py --dir /shared/RUN                  # SLURM; the processes find one another
    gcloud compute tpus tpu-vm ssh NAME --worker=all --command "python train.py --dir gs-mount/RUN"
    python train.py --dir RUN --coordinator localhost:9876 --processes 2 --index 0     # by hand: one line
    python train.py --dir RUN --coordinator localhost:9876 --processes 2 --index 1     # for each process

Started again with the same line, also with another number of processes or devices, it goes on where its
last save was. Replace `Decoder`, `RULES` and `Sequences` by your model, its sharding rules and your data.
"""

import argparse
import os

import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import lora_jax

VOCAB, D, LAYERS, LENGTH = 64, 64, 4, 32
RULES = {
    "(q|k|v|up)/kernel": P(None, "fsdp", "tensor"),  # (layers, in, out)
    "(o|down)/kernel": P(None, "tensor", "fsdp"),
    "embed": P("tensor", "fsdp"),
}


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.RMSNorm(name="before_attention")(x)
        q, k, v = (nn.Dense(D, use_bias=False, name=n)(h).reshape(*x.shape[:2], 4, D // 4) for n in "qkv")
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
        x = x + nn.Dense(D, use_bias=False, name="o")(y)
        h = nn.gelu(nn.Dense(4 * D, use_bias=False, name="up")(nn.RMSNorm(name="before_mlp")(x)))
        return x + nn.Dense(D, use_bias=False, name="down")(h), None


class Decoder(nn.Module):
    """A causal language model of scanned, rematerialised layers; it knows nothing of LoRA."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCAB, D, name="embed")
        layers = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS
        )
        x, _ = layers(name="layers")(embed(tokens), None)
        return embed.attend(nn.RMSNorm(name="last")(x))


class Sequences:
    """A million sequences that count up, each by a step of its own; any one of them by its number."""

    def __len__(self):
        return 2**20

    def __getitem__(self, number):
        start, stride = np.random.default_rng(number).integers(1, VOCAB, 2)
        return ((start + stride * np.arange(LENGTH + 1)) % VOCAB).astype(np.int32)


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", required=True, help="the run's folder, which all processes can reach")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32, help="examples in a step, over all processes")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--tensor", type=int, default=1, help="devices that share a layer's width")
    parser.add_argument(
        "--fsdp", type=int, default=None, help="devices that share the weights; all by default"
    )
    parser.add_argument("--every", type=int, default=50, help="steps between saves")
    parser.add_argument("--coordinator", help="host:port of process 0, where no cluster tells it")
    parser.add_argument("--processes", type=int, help="with --coordinator: how many there are")
    parser.add_argument("--index", type=int, help="with --coordinator: which of them this is")
    return parser.parse_args()


def main():
    options = parse()
    if options.coordinator:
        jax.distributed.initialize(options.coordinator, options.processes, options.index)
    elif int(os.environ.get("SLURM_NTASKS", "1")) > 1 or "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
        jax.distributed.initialize()  # the cluster tells the rest

    fsdp = options.fsdp or jax.device_count() // options.tensor
    data = jax.device_count() // (fsdp * options.tensor)
    mesh = jax.make_mesh(
        (data, fsdp, options.tensor), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3
    )
    model, tx = Decoder(), optax.adamw(optax.linear_schedule(0.0, 1e-2, 20))

    def init(key):
        params = model.init(key, jnp.zeros((1, LENGTH), jnp.int32))["params"]  # or read your checkpoint
        return lora_jax.TrainState.create(lora_jax.wrap(params, rank=options.rank), tx, key)

    def loss_fn(params, batch, key):
        logits = model.apply({"params": params}, batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    state = lora_jax.sharded_init(init, mesh, RULES)(jax.random.key(0))  # every device makes its own part
    step = lora_jax.make_train_step(loss_fn, tx, mesh=mesh, rules=RULES)
    # Each process reads its own rows; together they read the same batches however many there are.
    index, count = lora_jax.process_shard(mesh)
    rows = grain.MapDataset.source(Sequences()).seed(0).shuffle()[index::count]
    batches = rows.batch(options.batch // count).repeat().to_iter_dataset()

    with lora_jax.checkpoint.Run(
        options.dir, state, batches, every=options.every, steps=options.steps
    ) as run:
        for batch in run:
            run.state, metrics = step(run.state, batch)
            run.log(metrics)
            if jax.process_index() == 0 and run.step % 50 == 0:
                print(f"step {run.step}: loss {float(metrics['loss']):.4f}", flush=True)
    lora_jax.save_adapter(os.path.join(options.dir, "adapter"), run.state.wrapped, overwrite=True)


if __name__ == "__main__":
    main()
