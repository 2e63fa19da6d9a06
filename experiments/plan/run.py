r"""Plans a LoRA run of GPT-3 or Llama 3 on hardware that need not be there.

    python -m experiments.plan.run --preset llama3-70b --topology v5p:4x4x4 --mesh fsdp=16,tensor=4 \
        --batch 64 --length 4096

Will it fit, and what does it take? The train step is compiled for the topology, by the TPU compiler where
that is one of TPUs (pip install "lora-jax[tpu]"; no TPU is needed), which takes from seconds to a few
minutes. The answer is a table of memory, operations and collectives, with what would help where the step
does not fit. The batch is sharded over the mesh axis fsdp, heads and hidden units over tensor, and the
parameters over both.

exit code: 0 it fits, or the device's limit is not known; 1 it does not fit; 2 the command is wrong
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.plan import models
from experiments.records import fill, markdown, provenance
from lora_jax import RefusedError
from lora_jax.planning import Memory, Plan, plan

HERE = Path(__file__).parent
# What is adapted: the paper's choice for GPT-3 (section 7), every linear layer of the blocks for Llama.
ADAPTED: dict[str, dict[str, Any]] = {
    "gpt3-175b": {"rank": 4, "targets": "attention/(q|v)/kernel"},
    "llama3-8b": {"rank": 16, "targets": None},
    "llama3-70b": {"rank": 16, "targets": None},
}


def parse(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.plan.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", choices=models.CONFIGS, required=True, help="the model, by its shapes")
    parser.add_argument(
        "--topology",
        help='"v5e:4x8", "v5p:4x4x4", "v6e:8x8": a slice of TPUs by its shape; "cpu:8": so many CPU devices, '
        "to try the command; without it the local devices",
    )
    parser.add_argument(
        "--mesh",
        default="fsdp=-1,tensor=1",
        help="how many devices each axis has, -1 for the rest (%(default)s)",
    )
    parser.add_argument("--batch", type=positive, default=64, help="sequences in a step, on all devices (64)")
    parser.add_argument(
        "--length", type=positive, help="tokens in a sequence; by default 2048, with --tiny 16, the most"
    )
    parser.add_argument("--rank", type=positive, help="by default 4 for GPT-3 and 16 for Llama")
    parser.add_argument(
        "--targets",
        help="a pattern of what is adapted; by default attention/(q|v)/kernel for GPT-3, and every linear "
        "layer of the blocks for Llama",
    )
    parser.add_argument("--accumulate", type=positive, default=1, help="microbatches in a step (1)")
    parser.add_argument("--no-remat", action="store_true", help="keep every layer's activations")
    parser.add_argument("--full", action="store_true", help="compile full fine-tuning as well")
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="the same model in miniature, with sequences of at most 16 tokens, to try the command",
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON, not as a table")
    parser.add_argument("--out", type=Path, help="also write the plan here, with versions and commit")
    return parser, parser.parse_args(arguments)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer of 1 or more")
    return int(text)


def device_count(topology: str | None) -> int:
    """How many devices a topology has; 0 for what is none, which `plan` refuses."""
    if topology is None:
        return len(jax.devices())
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology)
    cores = 2 if found and found[1] in ("v2", "v3", "tpu7x") else 1  # each a device
    return cores * math.prod(map(int, found[2].split("x"))) if found else 0


def mesh_of(text: str, topology: str | None) -> dict[str, int]:
    """The sizes of the mesh axes, with what -1 stands for on the topology's devices."""
    found = dict(re.findall(r"(fsdp|tensor)=(-1|[1-9]\d*)", text))
    written = ",".join(f"{name}={size}" for name, size in found.items())
    if written != text or text.count("=-1") > 1:
        raise ValueError(f"--mesh is {text!r}; write fsdp=16,tensor=4, of which one may be -1, for the rest")
    sizes = {name: int(found.get(name, 1)) for name in ("fsdp", "tensor")}
    devices = device_count(topology)
    if not devices:
        return sizes
    known = math.prod(size for size in sizes.values() if size != -1)
    sizes = {name: max(1, devices // known) if size == -1 else size for name, size in sizes.items()}
    if math.prod(sizes.values()) != devices:
        raise ValueError(
            f"--mesh {text} needs {math.prod(sizes.values())} devices, and {topology or 'this machine'} has "
            f"{devices}; write sizes with that product, such as --mesh fsdp={devices}"
        )
    return sizes


def check(options: argparse.Namespace, config: models.Config, length: int, mesh: dict[str, int]) -> None:
    """Raise, in the words of the command, where something does not divide over the mesh."""
    if length > config.length:
        raise ValueError(f"--length is {length}, and {options.preset} has {config.length} positions")
    fsdp, tensor = mesh["fsdp"], mesh["tensor"]
    if options.batch % (options.accumulate * fsdp):
        raise ValueError(
            f"--batch {options.batch} does not divide into {options.accumulate} (--accumulate) parts over "
            f"fsdp={fsdp} devices; write a multiple of {options.accumulate * fsdp}"
        )
    sizes = [
        (f"the length of {length} tokens", length, "tensor", tensor),
        (f"{config.heads} heads", config.heads, "tensor", tensor),
        (f"{config.kv_heads} key and value heads", config.kv_heads, "tensor", tensor),
        (f"{config.hidden} hidden units", config.hidden, "tensor", tensor),
        (f"a width of {config.width}", config.width, "fsdp x tensor", fsdp * tensor),
    ]
    if config.kind == "llama":
        sizes.append((f"a vocabulary of {config.vocabulary}", config.vocabulary, "tensor", tensor))
    for what, size, axis, parts in sizes:
        if size % parts:
            raise ValueError(
                f"--mesh has {axis} = {parts}, which does not divide {what}; write a size that does"
            )


def prepare(topology: str | None) -> None:
    """Tell jax what a topology needs, before anything uses it."""
    if topology is not None:
        jax.config.update("jax_platforms", "cpu")  # no accelerator of this machine is needed
    if topology is not None and topology.startswith("cpu:") and device_count(topology):
        jax.config.update("jax_num_cpu_devices", device_count(topology))


def check_out(out: Path) -> None:
    """Raise where the record could not be written, before the minutes that it takes to make."""
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; write the name of a file, such as {out / 'plan.json'}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        there = out.exists()
        out.open("a").close()  # which changes nothing of an earlier record
        if not there:
            out.unlink()
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written ({error.strerror}); write another path") from None


def planned(options: argparse.Namespace) -> Plan:
    mesh = mesh_of(options.mesh, options.topology)
    config = models.CONFIGS[options.preset]
    config = models.tiny(config) if options.tiny else config
    config = dataclasses.replace(config, remat=not options.no_remat)
    length = options.length or min(2048, config.length)
    check(options, config, length, mesh)
    if options.out:
        check_out(options.out)
    given = {name: getattr(options, name) for name in ("rank", "targets")}
    adapted = ADAPTED[options.preset] | {name: x for name, x in given.items() if x is not None}
    axes = ",".join(f"{name}={size}" for name, size in mesh.items())
    print(
        f"compiling {options.preset} for {options.topology or 'this machine'}, {axes}: a step of "
        f"{options.batch} x {length} tokens{', then that of full fine-tuning' if options.full else ''}; "
        "seconds to minutes, longer for more devices ...",
        file=sys.stderr,
        flush=True,
    )
    tokens = jax.ShapeDtypeStruct((options.batch, length), jnp.int32)
    try:
        return plan(
            models.loss_fn(config),
            jax.eval_shape(lambda key: models.init(key, config), jax.random.key(0)),
            {"tokens": tokens, "targets": tokens},
            tx=optax.adamw(1e-4),
            topology=options.topology,
            mesh=mesh,
            rules=models.rules(config),
            accumulate=options.accumulate,
            compile_full=options.full,
            axes={"layers/.*kernel": ("batch", "in", "out")},
            **adapted,
        )
    except (RefusedError, ValueError) as error:
        raise ValueError(in_flags(str(error))) from error


def main(arguments: Sequence[str] | None = None) -> int:
    parser, options = parse(arguments)
    started = time.perf_counter()
    try:
        found = planned(options)
    except (ValueError, ModuleNotFoundError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    seconds = time.perf_counter() - started
    print(f"done in {seconds:.0f} s", file=sys.stderr)
    print(json.dumps(dataclasses.asdict(found), indent=1) if options.json else found)
    if options.out:
        try:
            save(options, found, seconds, arguments)
        except OSError as error:
            parser.exit(2, f"{parser.prog}: --out {options.out} cannot be written ({error.strerror})\n")
    return 1 if found.fits is False else 0


def in_flags(text: str) -> str:
    """An error of the library without the sentences that say what to write in Python."""
    sentences = re.split(r"(?<=\.) (?=[A-Z])", text.replace("targets=", "--targets "))
    kept = [x for x in sentences if not re.search(r"\w[=(]", x)]
    if len(kept) < len(sentences):
        kept.append("Name linear layers of the blocks, such as --targets 'attention/(q|v)/kernel'.")
    return " ".join(kept)


def save(options: argparse.Namespace, found: Plan, seconds: float, arguments: Sequence[str] | None) -> None:
    """Write the record, and its table into the README where that has a place for the file."""
    given = " ".join(sys.argv[1:] if arguments is None else arguments)
    packages = ("libtpu",) if find_spec("libtpu") else ()
    claims = paper(found) if options.preset == "gpt3-175b" and not options.tiny else []
    result = {
        **provenance(f"python -m experiments.plan.run {given}", packages),
        "seconds": round(seconds, 1),
        "plan": dataclasses.asdict(found),
        "paper": claims,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    readme = HERE / "README.md"
    place = f"<!-- {options.out.name} -->\n"
    if options.out.resolve().parent == HERE / "results" and place in readme.read_text():
        text = f"```\n$ {result['command']}\n\n{found}\n```\n"
        if claims:
            rows = [[claim["what"], claim["paper"], claim["here"]] for claim in claims]
            text += "\n" + markdown(["the paper says", "paper", "here"], rows)
        fill(readme, {options.out.name: text})


def paper(found: Plan) -> list[dict[str, str]]:
    """What the LoRA paper says of GPT-3 (abstract, sections 1 and 4.2), beside what the plan counts."""
    lora, full, devices = found.memory, found.full, found.devices
    base = 2 * found.parameters  # two bytes a number, as in the paper
    claims = [
        ("trained parameters, r 4 on q and v", "-", f"{found.trained:,}"),
        ("fewer trained parameters", "10,000 times", f"{found.parameters / found.trained:,.0f} times"),
        ("checkpoint of the model", "350 GB", f"{base / 1e9:.0f} GB"),
        ("checkpoint of the adapter, two bytes a number", "35 MB", f"{2 * found.trained / 1e6:.1f} MB"),
        ("the same, in float32 as it is saved here", "-", f"{4 * found.trained / 1e6:.1f} MB"),
        ("training: parameters, gradients, optimizer", "1.2 TB to 350 GB", states(lora, full, devices)),
    ]
    if lora.peak is not None and full.peak is not None:
        claims.append(
            ("training: peak of the compiled step", "1.2 TB to 350 GB", change(full.peak, lora.peak, devices))
        )
    return [{"what": what, "paper": theirs, "here": ours} for what, theirs, ours in claims]


def states(lora: Memory, full: Memory, devices: int) -> str:
    before, after = (x.base + x.trained + x.gradients + x.optimizer for x in (full, lora))
    return change(before, after, devices)


def change(before: int, after: int, devices: int) -> str:
    """From one number of bytes a device to another, in all."""
    return f"{before * devices / 1e9:,.0f} GB to {after * devices / 1e9:,.0f} GB ({before / after:.2f} times)"


if __name__ == "__main__":
    prepare(parse(None)[1].topology)
    raise SystemExit(main())
