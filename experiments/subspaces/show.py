"""What the measurements say, beside the paper: its claims, the tables of the README, and the figures."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import data
from experiments.records import markdown

SPACES = {
    "a": "A's directions, as in the paper",
    "in": "ΔW's among the inputs",
    "out": "ΔW's among the outputs",
}
COLORS = {"q": "#1f4e79", "v": "#c55a11"}


def name_of(rank: int, seed: int) -> str:
    return f"r{rank}_s{seed}"


def spread(values: Any, form: str = ".3g") -> str:
    """The median, and the smallest and largest in brackets."""
    values = np.asarray(values, float)
    low, middle, high = (format(float(x), form) for x in (values.min(), np.median(values), values.max()))
    return f"{middle} ({low} to {high})"


class Claim(NamedTuple):
    text: str
    found: str
    holds: np.ndarray  # in each of the cases

    @property
    def cases(self) -> str:
        return f"{self.holds.sum()} of {len(self.holds)}"

    @property
    def agrees(self) -> bool:
        """Whether it holds in most cases."""
        return bool(2 * self.holds.sum() > len(self.holds))


def claims(record: dict[str, Any]) -> list[Claim]:
    """What the paper says of GPT-3, what is found here, and in which cases that agrees."""
    low, high = sorted(record["settings"]["ranks"])
    seeds, d, layers = record["settings"]["seeds"], record["d"], range(record["layers"])

    def phi(kind: str, of: str, i: int, matrix: str) -> np.ndarray:
        """φ(i, i) of every pair of runs, in every layer."""
        found = [record["similarity"][f"{layer}/{matrix}"][kind][of]["equal"] for layer in layers]
        return np.array([run[i - 1] for runs in found for run in runs])

    def of_runs(quantity: str, rank: int, matrices: str = "qv") -> np.ndarray:
        places = [f"{layer}/{matrix}" for layer in layers for matrix in matrices]
        return np.array(
            [record["matrices"][place][name_of(rank, seed)][quantity] for place in places for seed in seeds]
        )

    found = []
    for of, words in SPACES.items():
        top, all_of_low = ({m: phi("ranks", of, i, m) for m in "qv"} for i in (1, low))
        one_seed = {m: np.median(phi("ranks of a seed", of, 1, m)) for m in "qv"}
        parts = [
            f"{m}: φ(1, 1) = {spread(top[m], '.2f')}, of one seed {one_seed[m]:.2f}; "
            f"φ({low}, {low}) = {spread(all_of_low[m], '.2f')}. "
            for m in "qv"
        ]
        found.append(
            Claim(
                f"r = {low} and r = {high} share their top direction: φ(1, 1) > 0.5. By {words}",
                "".join(parts) + f"Random: {1 / d:.3f} and {low / d:.3f}",
                np.concatenate([x > 0.5 for x in top.values()]),
            )
        )
    for of, words in SPACES.items():
        q, v = (phi("seeds", of, low, m) for m in "qv")
        found.append(
            Claim(
                f"Two seeds share more directions of q than of v. By {words}",
                f"φ({low}, {low}) at r = {high}: q {spread(q, '.2f')}, v {spread(v, '.2f')}. "
                f"Random: {low / d:.3f}",
                q > v,
            )
        )
    q, v = (of_runs("effective_rank", high, m) for m in "qv")
    found.append(
        Claim(
            "So q's ΔW has a higher intrinsic rank than v's. By the effective rank",
            f"r = {high}: q {spread(q)}, v {spread(v)}",
            q > v,
        )
    )
    random = np.array(record["similarity"]["random"]["ranks"]["a"]["equal"])
    found.append(
        Claim(
            "Gaussian matrices share no direction",
            f"φ(1, 1) = {spread(random[:, 0])}, φ({low}, {low}) = {spread(random[:, low - 1])}; "
            f"in the mean {1 / d:.3g} and {low / d:.3g}",
            random.max(-1) < 0.5,
        )
    )
    theirs = ", ".join(f"{x['onto_update'] / x['onto_random']:.3g}" for x in record["paper"].values())
    shares = ", ".join(f"{x['onto_update'] / x['onto_weight']:.2g}" for x in record["paper"].values())
    factors = ", ".join(f"{x['factor']:.3g}" for x in record["paper"].values())
    onto, own, of_random = (
        {rank: of_runs(f"onto_{x}", rank) for rank in (low, high)} for x in ("update", "weight", "random")
    )
    above = {rank: onto[rank] / of_random[rank] for rank in onto}
    share = {rank: onto[rank] / own[rank] for rank in onto}
    factor = {rank: of_runs("factor", rank) for rank in onto}
    for text, ours, paper, holds in (
        (
            "W has more along ΔW's directions than along random ones: the factor",
            above,
            theirs,
            np.concatenate([x > 1 for x in above.values()]),
        ),
        (
            "ΔW does not repeat W's top directions, along which W has over twice as much: the share",
            share,
            shares,
            np.concatenate([x < 0.5 for x in share.values()]),
        ),
        (
            "ΔW is larger than W along its directions, and more so at the smaller rank: the amplification",
            factor,
            factors,
            (factor[low] > factor[high]) & (factor[low] > 1),
        ),
    ):
        words = "; ".join(f"r = {rank}: {spread(x)}" for rank, x in ours.items())
        found.append(Claim(text, f"{words}. The paper's at r = 4 and 64: {paper}", holds))
    return found


def paper() -> dict[str, Any]:
    """Table 7's numbers, under the names of `analysis.amplification`."""
    table = data.paper()["section7_3"]
    found = {}
    for rank in ("r=4", "r=64"):
        x = table[rank]
        found[rank] = {
            "update": x["dW"],
            "weight": table["r=4"]["W_q"],
            "onto_update": x["proj_dW"],
            "onto_weight": x["proj_W"],
            "onto_random": x["proj_random"],
            "factor": x["dW"] / x["proj_dW"],
        }
    return found


ROWS = {
    "weight": "‖W‖",
    "update": "‖ΔW‖",
    "onto_update": "‖UᵀWV‖, directions of ΔW",
    "onto_weight": "‖UᵀWV‖, W's own",
    "onto_random": "‖UᵀWV‖, random",
    "factor": "amplification, ‖ΔW‖ / ‖UᵀWV‖",
}


def tables(record: dict[str, Any]) -> str:
    """The README's tables."""
    low, high = sorted(record["settings"]["ranks"])
    seeds, middle = record["settings"]["seeds"], record["middle"]
    claimed = [[x.text, x.found, x.cases] for x in claims(record)]
    runs = [
        [
            name,
            f"{x['loss']:.3f}",
            ", ".join(f"{metric} {value:.3f}" for metric, value in x["scores"].items()),
        ]
        for name, x in record["runs"].items()
    ]

    columns = {f"paper, {name}": x for name, x in record["paper"].items()}
    for matrix, rank in itertools.product("qv", (low, high)):
        of_runs = record["matrices"][f"{middle}/{matrix}"]
        columns[f"{matrix}, r={rank}"] = of_runs[name_of(rank, seeds[0])]
    norms = [[words, *(f"{x[key]:.4g}" for x in columns.values())] for key, words in ROWS.items()]

    head = ["layer"]
    quantities = {"effective_rank": "effective rank", "stable_rank": "stable rank", "factor": "amplification"}
    head += [f"{words}, r={rank}" for words in quantities.values() for rank in (low, high)]
    head += [f"φ(1, 1), r={low} and {high}: in", "out", f"φ({low}, {low}), two seeds: in", "out"]
    every = []
    for place, of_runs in record["matrices"].items():
        layer, matrix = place.split("/")
        numbers = [
            np.mean([of_runs[name_of(rank, seed)][key] for seed in seeds])
            for key in quantities
            for rank in (low, high)
        ]
        similar = record["similarity"][place]
        numbers += [np.mean([x[0] for x in similar["ranks"][of]["equal"]]) for of in ("in", "out")]
        numbers += [similar["seeds"][of]["equal"][0][low - 1] for of in ("in", "out")]
        every.append([f"{int(layer) + 1} {matrix}", *(f"{x:.3g}" for x in numbers)])

    return "\n".join(
        [
            "What the paper says of GPT-3 and what is found here: the median over layers and seeds, with the "
            "smallest and\nthe largest in brackets, and in how many cases the claim holds.\n",
            markdown(["claim", "found", "holds in"], claimed, words=3),
            f"Section 7.3's table for layer {middle + 1} of {record['layers']} and the first seed, beside "
            "the paper's for q in layer\n48 of GPT-3's 96:\n",
            markdown(["", *columns], norms),
            "Every matrix, in the mean of the seeds; φ by ΔW's directions among inputs or outputs:\n",
            markdown(head, every),
            "What was trained:\n",
            markdown(["run", "loss at the end", "development set"], runs),
        ]
    )


# --- Figures -------------------------------------------------------------------------------------------


def heat_maps(rows: Sequence[tuple[str, list[tuple[str, np.ndarray]]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, axes = plt.subplots(
        len(rows),
        len(rows[0][1]),
        figsize=(2.4 * len(rows[0][1]), 2.2 * len(rows)),
        dpi=110,
        squeeze=False,
        layout="constrained",
    )
    image = None
    for line, (label, row) in zip(axes, rows, strict=True):
        for axis, (title, phi) in zip(line, row, strict=True):
            i, j = phi.shape
            image = axis.imshow(
                phi, vmin=0, vmax=1, cmap="viridis", aspect="auto", extent=(0.5, j + 0.5, i + 0.5, 0.5)
            )
            axis.set_title(title, fontsize=8)
            axis.tick_params(labelsize=7)
            axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        line[0].set_ylabel(f"{label}\ni", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("j", fontsize=8)
    figure.colorbar(image, ax=axes, shrink=0.8, aspect=40, label="φ(i, j)")
    figure.savefig(path)
    plt.close(figure)


def spectra(record: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    low, high = sorted(record["settings"]["ranks"])
    seeds, layers = record["settings"]["seeds"], np.arange(record["layers"])
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.4), dpi=110, layout="constrained")
    for axis, rank in zip(axes, (low, high), strict=False):
        for place, of_runs in record["matrices"].items():
            values = np.array(of_runs[name_of(rank, seeds[0])]["singular_values"])
            layer, matrix = place.split("/")
            axis.semilogy(
                np.arange(1, rank + 1),
                values,
                color=COLORS[matrix],
                alpha=0.35 + 0.65 * (int(layer) + 1) / len(layers),
            )
        axis.set_title(f"singular values of ΔW, r = {rank}", fontsize=9)
        axis.set_xlabel("i")
    for axis, key, title in (
        (axes[2], "effective_rank", "effective rank"),
        (axes[3], "factor", "amplification, ‖ΔW‖ / ‖UᵀWV‖"),
    ):
        for matrix, (rank, style) in itertools.product("qv", ((low, "o--"), (high, "s-"))):
            means = [
                np.mean([record["matrices"][f"{n}/{matrix}"][name_of(rank, s)][key] for s in seeds])
                for n in layers
            ]
            axis.plot(
                layers + 1, means, style, color=COLORS[matrix], label=f"{matrix}, r = {rank}", markersize=4
            )
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("layer")
        axis.set_ylim(0)
    axes[2].legend(frameon=False, fontsize=8)
    for matrix, color in COLORS.items():
        axes[0].plot([], [], color=color, label=f"{matrix}; later layers darker")
    axes[0].legend(frameon=False, fontsize=8)
    for axis in axes:
        axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    plt.close(figure)
