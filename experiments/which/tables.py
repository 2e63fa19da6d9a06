"""What came out of `experiments.which.run`, beside the paper: intervals, Markdown tables and the figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import data
from experiments.glue import metrics
from experiments.glue.cells import unpacked
from experiments.records import fill, markdown

HERE = Path(__file__).parent
REFERENCE = "q,v"  # what the paper adapts
CORPORA = "WikiSQL", "MNLI"
Which = tuple[str, int]  # a set and a rank
# The comparisons that the paper draws its conclusions from; without a rank, the one under the budget.
CLAIMS = (
    (("q,v", None), ("q", None)),
    (("q,v", None), ("k", None)),
    (("v", None), ("q", None)),
    (("o", None), ("q", None)),
    (("q,k,v,o", None), ("q", None)),
    (("q,k,v,o", None), ("q,v", None)),
    (("q", 64), ("q", 1)),
    (("q,v", 64), ("q,v", 1)),
    (("q,k,v,o", 64), ("q,k,v,o", 1)),
)


def of(members: list[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """The members that have these values."""
    return [x for x in members if all(x[name] == value for name, value in wanted.items())]


def best(members: list[dict[str, Any]]) -> dict[str, Any]:
    """The one of the smallest development loss; one that diverged is none."""
    return min(members, key=lambda x: x["dev_loss"] if np.isfinite(x["dev_loss"]) else np.inf)


def made_of(found: dict[str, Any], labels: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """The sets under the budget against `REFERENCE`, each set's ranks against its largest, and `CLAIMS`."""
    metric, one, ranks = metrics.OF_TASK[settings["task"]][0], found["rank_one"], found["under_the_budget"]
    budget, draws = settings["budget_rank"] * one["q"], settings["draws"]

    def members(which: Which) -> list[dict[str, Any]]:
        return of(found["members"], targets=which[0], rank=which[1])

    def bootstrap(*systems: Which) -> metrics.Interval:
        predictions = (np.array([unpacked(x["predictions"]) for x in members(which)]) for which in systems)
        return metrics.bootstrap(metrics.METRICS[metric], labels, *predictions, draws=draws)

    def row(which: Which, other: Which) -> dict[str, Any]:
        name, rank = which
        trained = rank * one.get(name, 0)
        return {
            "targets": name,
            "rank": rank,
            "trained": trained,
            "over_budget": trained / budget - 1,
            "scores": [x["scores"][metric] for x in members(which)],
            "interval": bootstrap(which)[1:],
            "difference": None if which == other else bootstrap(which, other),
            "dev_losses": [x["dev_loss"] for x in members(which)],
        }

    by_rank = {}
    for name, more in settings["ranks"].items():
        listed = sorted({*more, ranks[name]})
        by_rank[name] = [row((name, rank), (name, listed[-1])) for rank in listed]
    reference = REFERENCE, ranks[REFERENCE]
    claims = []
    for pair in CLAIMS:
        pair = [(name, ranks.get(name, 0) if rank is None else rank) for name, rank in pair]
        if all(map(members, pair)):
            claims.append({"pair": pair, "difference": bootstrap(*pair)})
    return {
        "metric": metric,
        "matrices": [row(which, reference) for which in ranks.items()],
        "ranks": by_rank,
        "claims": claims,
    }


def paper() -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """The paper's Tables 5 and 6, each by set and rank: where both have a configuration they may differ."""
    known = data.paper()
    five, six = known["table5_which_matrices"], known["table6_rank"]
    columns = [column.rsplit(" r", 1) for column in five["columns"]]
    return {
        "matrices": {
            name: {rank: {corpus: five[corpus][i] for corpus in CORPORA}}
            for i, (name, rank) in enumerate(columns)
        },
        "ranks": {
            name: {
                str(rank): {corpus: six[f"{corpus} {name}"][i] for corpus in CORPORA}
                for i, rank in enumerate(six["ranks"])
            }
            for name in ("q", "q,v", "q,k,v,o")
        },
    }


def percent(interval: Sequence[float]) -> str:
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * x for x in interval))


def texts(record: dict[str, Any]) -> dict[str, str]:
    """The README's tables, by the names of their places."""
    made, known, rates = record["tables"], record["paper"], record["rates"]

    def published(table: str, name: str, rank: int) -> dict[str, float]:
        return known[table].get(name, {}).get(str(rank), {})

    def figures(row: dict[str, Any], table: str) -> list[str]:
        low, high = row["interval"]
        theirs = published(table, row["targets"], row["rank"])
        return [
            f"{100 * np.mean(row['scores']):.1f}",
            " ".join(f"{100 * x:.1f}" for x in row["scores"]),
            f"{100 * low:.1f} to {100 * high:.1f}",
            percent(row["difference"]) if row["difference"] else "",
            f"{np.mean(row['dev_losses']):.3f}",
            *(f"{theirs[corpus]:.1f}" if theirs else "" for corpus in CORPORA),
        ]

    matrices = []
    for row in made["matrices"]:
        over, rate = f"{row['over_budget']:+.1%}" if row["rank"] else "", f"{rates[row['targets']]:g}"
        matrices.append(
            [
                row["targets"],
                str(row["rank"] or ""),
                f"{row['trained']:,}",
                over,
                rate,
                *figures(row, "matrices"),
            ]
        )
    ranks = [
        [name, str(row["rank"]), f"{row['trained']:,}", *figures(row, "ranks")]
        for name, rows in made["ranks"].items()
        for row in rows
    ]
    claims = []
    for x in made["claims"]:
        (_, low, high), (first, second) = x["difference"], x["pair"]
        table = "ranks" if first[0] == second[0] else "matrices"
        theirs = [published(table, *which) for which in (first, second)]
        words = "higher" if low > 0 else "lower" if high < 0 else "no difference seen"
        differences = [f"{theirs[0][y] - theirs[1][y]:+.1f}" if all(theirs) else "" for y in CORPORA]
        text = " less ".join(f"{name} r{rank}" for name, rank in x["pair"])
        claims.append([text, percent(x["difference"]), words, *differences])
    tried = record["settings"]["sweep"]["rates"]
    sweep = []
    for name, chosen in rates.items():
        losses = {x["rate"]: x["dev_loss"] for x in of(record["sweep"]["members"], targets=name)}
        sweep.append([name, *(f"**{losses[x]:.3f}**" if x == chosen else f"{losses[x]:.3f}" for x in tried)])
    head = [f"{made['metric']}, %", "by seed", "95% interval", "{}", "loss", "paper: WikiSQL", "MNLI"]
    first, second = ([x.format(y) for x in head] for y in (f"less {REFERENCE}'s", "less the largest rank's"))
    return {
        "matrices": markdown(["adapted", "rank", "trained", "over budget", "rate", *first], matrices),
        "ranks": markdown(["adapted", "rank", "trained", *second], ranks),
        "claims": markdown(["compared", f"{made['metric']}, %", "here", "paper: WikiSQL", "MNLI"], claims),
        "rates": markdown(["adapted", *(f"{x:g}" for x in tried)], sweep),
    }


def publish(texts: dict[str, str], out: Path) -> None:
    """Print the tables; if `out` is the committed results' folder, write them into the README's places."""
    print("\n".join(texts.values()))
    if out.resolve() == HERE / "results":
        fill(HERE / "README.md", texts)


def draw(record: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    made, known = record["tables"], record["paper"]
    colours = {"q": "#c55a11", "q,v": "#1f4e79", "q,k,v,o": "#548235"}
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), dpi=130, sharex="col", layout="constrained")
    (sets, ranks), (their_sets, their_ranks) = axes
    names = [row["targets"] for row in made["matrices"]]
    for row in made["matrices"]:
        name, scores = row["targets"], 100 * np.array(row["scores"])
        sets.vlines(name, *(100 * x for x in row["interval"]), color="#bfd0e0", linewidth=7)
        sets.plot([name] * len(scores), scores, "_", color="#333333")
        sets.plot(name, scores.mean(), "o", color="#1f4e79")
    sets.set_title(f"{record['settings']['task']}, one budget (bars: 95%; ticks: the seeds)")
    for name, rows in made["ranks"].items():
        if name in colours:
            x, scores = [row["rank"] for row in rows], 100 * np.array([row["scores"] for row in rows])
            ranks.plot(x, scores.mean(1), "o-", color=colours[name], label=name)
            ranks.fill_between(x, scores.min(1), scores.max(1), color=colours[name], alpha=0.15, linewidth=0)
    ranks.set_title("by rank (bands: the seeds)")
    values = [known["matrices"].get(x["targets"], {}).get(str(x["rank"])) for x in made["matrices"]]
    values = [np.nan if value is None else value["WikiSQL"] for value in values]
    their_sets.plot(names, values, "s", color="#1f4e79")
    for name, colour in colours.items():
        x = sorted(map(int, known["ranks"][name]))
        values = [known["ranks"][name][str(rank)]["WikiSQL"] for rank in x]
        their_ranks.plot(x, values, "s-", color=colour, label=name)
    their_ranks.set_xscale("log", base=2)
    their_ranks.set_xticks([1, 2, 4, 8, 16, 32, 64], [1, 2, 4, 8, 16, 32, 64])
    their_sets.set_title("the paper's: GPT-3, WikiSQL, one budget")
    their_ranks.set_title("the paper's: GPT-3, WikiSQL, by rank")
    their_ranks.set_xlabel("rank")
    for axis, text in ((sets, f"{made['metric']} × 100"), (their_sets, "accuracy, %")):
        axis.set_ylabel(text)
    for axis in (ranks, their_ranks):
        axis.legend(frameon=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    plt.close(figure)
