"""All results on one page.

    python -m experiments.report            writes experiments/REPORT.md
    python -m experiments.report --check    says whether that page is what the results give

The page has every experiment's tables and figures, with the paper's own numbers beside them and whether they
agree, by the records in the experiments' folders. What has no record yet is left out, with the command
that makes it.

exit code: 0 the page is written, or is what the results give; 1 it is not
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.records import markdown

HERE = Path(__file__).parent
Record = dict[str, Any]


class Point(NamedTuple):
    """Something the paper says, with what is found here and whether that holds."""

    text: str
    holds: bool


class Found(NamedTuple):
    """What a section shows: tables, and what they say beside the paper, or else by themselves."""

    tables: str
    points: Sequence[Point] = ()
    remark: str = ""
    verdict: str = ""  # by default how many of the points hold


class Section(NamedTuple):
    """A part of the page: the records it is of, what makes them, and what is made of each or of all."""

    title: str
    folder: str
    command: str
    records: Sequence[str]
    text: Callable[..., Found]
    figures: Sequence[str] = ()
    together: bool = False


def verdict(found: Found) -> str:
    """Whether it agrees with the paper, in a few words."""
    if found.verdict or not found.points:
        return found.verdict or "the paper has no figure for it"
    held = sum(point.holds for point in found.points)
    if held in (0, len(found.points)):
        return "agrees" if held else "does not agree"
    return f"agrees in {held} of {len(found.points)} points"


def beside(found: Found) -> str:
    lines = [f"- {'yes' if point.holds else '**no**'}: {point.text}.\n" for point in found.points]
    parts = [
        f"**Beside the paper**: {verdict(found)}.\n",
        "".join(lines),
        found.remark and f"{found.remark}\n",
    ]
    return "\n".join(part for part in parts if part)


def joined(found: Sequence[Found]) -> Found:
    """One after the other, such as the same experiment on several models or machines."""
    if len(found) == 1:
        return found[0]
    return Found(
        "\n".join(x.tables for x in found),
        [point for x in found for point in x.points],
        "\n".join(f"- {x.remark}" for x in found if x.remark),
    )


def origin(record: Record) -> str:
    """The command, commit, machine and seeds of a record, in a line."""
    commit = f"commit `{record['commit'][:10]}`" if record["commit"] else "no commit"
    if record["uncommitted_changes"]:
        commit += " and uncommitted changes"
    versions, machine = record["versions"], record["machine"]
    where = f"{machine['platform']}, {machine['cpus']} cores, {', '.join(machine['devices'])}"
    seeds = ", ".join(map(str, sorted(seeds_of(record))))
    drawn = f"; seed{'s' if ',' in seeds else ''} {seeds}" if seeds else ""
    made_with = f"Python {versions['python']}, jax {versions['jax']}"
    return f"`{record['command']}`; {commit}; {where}; {made_with}{drawn}"


def seeds_of(record: Record) -> set[int]:
    """All that a record or its command calls a seed; a number of seeds stands for those from zero on."""
    found = set(map(int, re.findall(r"--seed (\d+)", record["command"])))

    def walk(node: Any) -> None:
        for name, value in node.items() if isinstance(node, dict) else ():
            if name == "seed" and isinstance(value, int):
                found.add(value)
            elif name == "seeds" and isinstance(value, int):
                found.update(range(value))
            elif name == "seeds" and isinstance(value, list) and all(isinstance(x, int) for x in value):
                found.update(value)
            else:
                walk(value)
        for value in node if isinstance(node, list) else ():
            walk(value)

    walk(record)
    return found


def listed(names: Iterable[Any]) -> str:
    return ", ".join(map(str, names)) or "none"


def printed(show: Callable[[Record], Any], record: Record) -> str:
    """What a function prints of a record, as it stands."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        show(record)
    return f"```\n{text.getvalue().strip(chr(10))}\n```\n"


# The paper's tables


def latency(record: Record) -> Found:
    from experiments.latency import run

    cells = record["cells"]

    def over_base(way: str) -> str:
        found = [(cell["setting"], *run.over_base(cell, way)) for cell in cells]
        return ", ".join(
            f"{run.percent(y)} ({run.percent(low)} to {run.percent(high)}) at {x['batch']} x {x['length']}"
            for x, y, low, high in found
        )

    def theirs(way: str) -> str:
        ratios = [run.published(record, way, cell["setting"]) for cell in cells]
        return ", ".join("none" if x is None else run.percent(x) for x in ratios)

    same = sum(cell["ways"]["merged"]["program"] == cell["ways"]["base"]["program"] for cell in cells)
    text = (
        f"Merged, LoRA adds no time: it is the base's own program at {same} of {len(cells)} settings, and "
        f"takes {over_base('merged')}"
    )
    points = [Point(text, same == len(cells))]
    for way in ("adapter_l", "adapter"):
        slower = all(run.over_base(cell, way)[1] > 1 for cell in cells)
        text = f"{run.NAMES[way]} adds time at every setting: {over_base(way)}; the paper's {theirs(way)}"
        points.append(Point(text, slower))
    by_size = sorted(cells, key=lambda cell: cell["setting"]["batch"] * cell["setting"]["length"])
    small, large = ([run.over_base(by_size[i], way)[0] for way in ("adapter_l", "adapter")] for i in (0, -1))
    pairs = [*zip(small, large, strict=True)]
    shares = ", ".join(f"{run.percent(x)} at the fewest and {run.percent(y)} at the most" for x, y in pairs)
    text = f"The fewer a batch's tokens, the larger the share that AdapterL and AdapterH add: {shares}"
    points.append(Point(text, all(x > y for x, y in pairs)))
    return Found(run.table(record), points)


def glue(record: Record) -> Found:
    from experiments.glue import table as made

    tasks, paper = record["tasks"], record["paper"]
    rows = {
        "full": "roberta-base FT 125M",
        "bitfit": "roberta-base BitFit 0.1M",
        "lora_qv": "roberta-base LoRA 0.3M",
    }
    points = []
    for way in ("lora_qv", "lora_all"):
        diverged = [name for name, x in tasks.items() if x["ways"].get(way, {}).get("diverged")]
        found = {name: x["ways"].get(way, {}).get("minus_full") for name, x in tasks.items()}
        found = {name: x for name, x in found.items() if x}
        if not found and not diverged:
            continue
        below, above = (
            [n for n, x in found.items() if x["high"] < 0],
            [n for n, x in found.items() if x["low"] > 0],
        )
        theirs = [
            f"{n} {paper[rows['lora_qv']][n] - paper[rows['full']][n]:+.1f}"
            for n in found
            if n in paper[rows["full"]]
        ]
        text = (
            f"{made.NAMES[way]}, is not below full fine-tuning on any of {len(found)} tasks: by the 95% "
            f"interval below on {listed(below)}, above on {listed(above)}, and else neither. "
            + (f"It diverged on {listed(diverged)}. " if diverged else "")
            + f"The paper's LoRA less its full fine-tuning, RoBERTa base: {listed(theirs)}"
        )
        points.append(Point(text, not below and not diverged))
    common = [
        name
        for name, x in tasks.items()
        if name in paper[rows["full"]] and all("scores" in x["ways"].get(way, {}) for way in rows)
    ]
    if common:
        scores = {
            way: [100 * tasks[n]["ways"][way]["scores"][tasks[n]["metric"]]["mean"] for n in common]
            for way in rows
        }
        ours = {way: statistics.mean(x) for way, x in scores.items()}
        theirs = {way: statistics.mean(paper[row][name] for name in common) for way, row in rows.items()}

        def order(means: dict[str, float]) -> str:
            best = sorted(means, key=means.__getitem__, reverse=True)
            return ", ".join(f"{made.NAMES[way]} {means[way]:.1f}" for way in best)

        ranks = [sorted(means, key=means.__getitem__) for means in (ours, theirs)]
        text = f"The order of the means of {len(common)} tasks is the paper's, {order(theirs)}: {order(ours)}"
        points.append(Point(text, ranks[0] == ranks[1]))
    return Found(made.report(record), points)


def e2e(record: Record) -> Found:
    from experiments.e2e_nlg import compare

    model, paper, points = Path(record["settings"]["model"]).name, record["paper"] or {}, []
    for way, row in record["ways"].items():
        if way not in paper or way == "full":
            continue
        shown, against = [], []
        for name, found in row["metrics"].items():
            factor = 100 if name in compare.PERCENT else 1
            low, high = found["minus_full"]["interval"]
            theirs = paper[way][name] - paper["full"][name]
            if (theirs > 0 and high < 0) or (theirs < 0 and low > 0):
                against.append(name)
            shown.append(f"{name} {factor * found['minus_full']['value']:+.2f}, the paper's {theirs:+.2f}")
        text = (
            f"{model}: {compare.NAMES[way]} less full fine-tuning: {'; '.join(shown)}. The whole interval "
            f"lies on the other side of zero in {listed(against)}"
        )
        points.append(Point(text, not against))
    title = f"{model}, {record['steps']} steps, rank {record['settings']['rank']}"
    return Found(f"{title}:\n\n{compare.tables(record)}", points)


def which(record: Record) -> Found:
    from experiments.which import tables

    made, paper, points = record["tables"], record["paper"], []
    task = f"{record['settings']['task']} ({made['metric']})"
    better = [row["targets"] for row in made["matrices"] if row["difference"] and row["difference"][1] > 0]
    text = (
        f"Under one budget no matrices are better than {tables.REFERENCE}. Better on {task}: {listed(better)}"
    )
    points.append(Point(text, not better))
    for claim in made["claims"]:
        (first, rank), (second, other) = claim["pair"]
        _, low, high = claim["difference"]
        known = paper["ranks" if first == second else "matrices"]
        of = [known.get(name, {}).get(str(r), {}) for name, r in claim["pair"]]
        if not all(of):
            continue
        theirs = [of[0][corpus] - of[1][corpus] for corpus in tables.CORPORA]
        if first == second:
            words, holds = f"{first} does as well at rank {other} as at rank {rank}", low <= 0
        elif min(theirs) > 0:
            words, holds = f"{first} at rank {rank} is better than {second} at rank {other}", low > 0
        else:
            words, holds = f"{first} at rank {rank} is as good as {second} at rank {other}", low <= 0 <= high
        published = " and ".join(f"{x:+.1f} on {y}" for x, y in zip(theirs, tables.CORPORA, strict=True))
        less = tables.percent(claim["difference"])
        points.append(Point(f"{words}: the difference is {less} on {task}, the paper's {published}", holds))
    words = {
        "matrices": "One budget, spent on different matrices:",
        "ranks": "By rank:",
        "claims": "What the paper draws its conclusions from:",
        "rates": "The loss on held-out training rows by learning rate, of which the best was taken:",
    }
    parts = [f"{words[name]}\n\n{text}" for name, text in tables.texts(record).items()]
    return Found("\n".join(parts), points)


def which_e2e(record: Record) -> Found:
    from experiments.which import e2e as run

    paper, largest = record["paper"], max(row["rank"] for row in record["ranks"])
    losses = {row["rank"]: row["losses"] for row in record["ranks"]}
    best = min(losses, key=lambda rank: statistics.mean(losses[rank]))
    theirs = max(paper, key=paper.__getitem__)
    text = (
        f"The largest rank is not the best: the paper's BLEU is best at rank {theirs} of {', '.join(paper)}; "
        f"here the validation loss is at rank {best}, {statistics.mean(losses[best]):.4f}, and at rank "
        f"{largest} {statistics.mean(losses[largest]):.4f}. The seeds at rank {best} lie between "
        f"{min(losses[best]):.4f} and {max(losses[best]):.4f}"
    )
    return Found("\n".join(run.texts(record).values()), [Point(text, best != largest)])


def sharing(record: Record) -> Found:
    from experiments.which import sharing as run

    parts, curves = run.texts(record), record["curves"]
    largest = ", ".join(f"{x['largest_difference']:.1e} in {kind}" for kind, x in curves.items())
    rows = record["costs"]["rows"]
    most = max(rows, key=lambda x: x["members"])
    one, each = most["together"], most["apart"]
    remark = (
        f"The losses of a stack and of separate runs differ by at most {largest}. {most['members']} members "
        f"in one run ({most['stack']}) take {one['compilations']} compilation for {each['compilations']}, "
        f"{one['bytes'] / each['bytes_of_all']:.2f} of the memory of as many at once, and "
        f"{most['wall'][0]:.2f} of the time of one after another."
    )
    return Found("\n".join(parts.values()), remark=remark)


def subspaces(record: Record) -> Found:
    from experiments.subspaces import show

    points = [Point(claim.text, claim.agrees) for claim in show.claims(record)]  # the table has the numbers
    return Found(show.tables(record), points)


def low_data(record: Record) -> Found:
    from experiments.glue.table import NAMES
    from experiments.low_data import run

    paper, points = record["paper"], []

    def published(name: str, columns: Sequence[int]) -> str:
        less = [x - y for x, y in zip(paper[name], paper["FT"], strict=True)]
        return ", ".join(f"{less[i]:+.1f} of {paper['columns'][i]:,}" for i in columns)

    every = range(len(paper["columns"]))
    for name, task in record["tasks"].items():
        for way, row, few in (("lora_qv", "LoRA", False), ("prefix", "PreLayer", True)):
            found = [x for x in task["ways"].get(way, []) if "minus_full" in x]
            found = found[:1] if few else found
            if not found:
                continue
            below = [f"{x['examples']:,}" for x in found if x["minus_full"]["high"] < 0]
            ours = ", ".join(f"{100 * x['minus_full']['value']:+.1f} of {x['examples']:,}" for x in found)
            claim = (
                f"with {found[0]['examples']:,} examples {NAMES[way]} is below full fine-tuning"
                if few
                else f"{NAMES[way]}, is not below full fine-tuning at any number of examples"
            )
            theirs = published(row, every[:1] if few else every)
            text = f"{name}: {claim}; below by the interval: {listed(below)}. Less full: {ours}"
            points.append(Point(f"{text}; the paper's {theirs}", bool(below) == few))
    return Found(run.report(record), points)


def merging_cost(*records: Record) -> Found:
    from experiments.merging_cost import run

    lines = []
    for record in records:
        of = {dtype: found[-1] for dtype, found in record["dtypes"].items()}  # as it was trained
        parts = [
            f"{run.share(x['leaf_lost']['median'])} of ΔW in {dtype}, which moves the outputs by "
            f"{run.share(x['weights_alone']['rms'])} (the unmerged model's own rounding: "
            f"{run.share(x['unmerged']['rms'])})"
            for dtype, x in of.items()
        ]
        size = run.number(record["training"]["size"])
        lines.append(
            f"- {record['model']}, as trained (rms ΔW/W = {size}): merging loses {'; '.join(parts)}."
        )
    tables = f"{run.costs_table(records)}\nWays to serve the adapter:\n\n{run.ways_table(records)}"
    return Found(tables, remark="\n".join(lines))


def counts(record: Record) -> Found:
    from experiments.counts import claims, run

    rows = [row for row in record["rows"] if row["published"].endswith("M")]
    wrong = [
        f"{row['model']}, {row['targets']}, rank {row['rank']}: {row['published']}"
        for row in rows
        if not claims.agrees(row["published"], row["counted"]["trainable"])
    ]
    same = sum(map(run.same, record["rows"]))
    remark = (
        f"Those that do not round to what is counted: {'; '.join(wrong) or 'none'}. "
        f"{same} of {len(record['rows'])} counts are those that were worked out from the shapes by hand."
    )
    return Found(run.table(record["rows"]), remark=remark, verdict=_agreeing(rows, wrong))


def claimed(record: Record) -> Found:
    from experiments.counts import claims

    rows = record["rows"]
    ratios = [claims.value(row["published"]) / row["computed"] for row in rows]
    wrong = [(row, ratio) for row, ratio in zip(rows, ratios, strict=True) if not row["agrees"]]
    far = [f"{row['claim']} ({row['section']}), {x:.2f} of it" for row, x in wrong if not 0.9 < x < 1.1]
    remark = (
        f"Of the {len(wrong)} that do not round to what is computed {len(wrong) - len(far)} are within a "
        f"tenth of it; further away: {'; '.join(far) or 'none'}."
    )
    return Found(claims.table(rows), remark=remark, verdict=_agreeing(rows, wrong))


def _agreeing(rows: Sequence[Any], wrong: Sequence[Any]) -> str:
    return f"{len(rows) - len(wrong)} of {len(rows)} published figures agree"


def plans(*records: Record) -> Found:
    from experiments.counts import claims

    rows, points = [], []
    for record in records:
        found, memory = record["plan"], record["plan"]["memory"]
        model = re.search(r"--preset (\S+)", record["command"])[1]
        mesh = " × ".join(f"{name} {size}" for name, size in found["mesh"].items())
        fits = "yes" if found["fits"] else "**no**"
        floor = f"{found['flops']['step'] / found['flops']['floor']:.4f}"
        sizes = [f"{memory['peak'] / 2**30:.1f}", f"{found['limit'] / 2**30:.1f}"]
        rows.append([model, found["topology"], mesh, f"{found['trained']:,}", *sizes, fits, floor])
        for claim in record["paper"]:
            if claim["paper"] == "-":
                continue
            pairs = zip(_figures(claim["paper"]), _figures(claim["here"]), strict=False)
            text = f"{found['topology']}: {claim['what']}: the paper's {claim['paper']}; here {claim['here']}"
            points.append(Point(text, all(claims.agrees(x, claims.value(y)) for x, y in pairs)))
    head = [
        "model",
        "slice",
        "mesh",
        "trained",
        "peak, GiB a device",
        "of",
        "fits",
        "operations over the floor",
    ]
    return Found(markdown(head, rows, words=3), points)


def _figures(text: str) -> list[str]:
    return re.findall(r"[\d.,]*\d ?(?:times|[MGT]B)", text)


# What the paper has no tables of


def quickstart(record: Record) -> Found:
    from experiments import quickstart as run

    results, main = record["results"], f"LoRA, rank {record['settings']['rank']}"
    ours, full = (results[name]["accuracy"] for name in (main, "full"))
    less = statistics.mean(ours) - statistics.mean(full)
    remark = (
        f"{main}, is {100 * less:+.1f} points from full fine-tuning in the mean of {len(ours)} seeds, with "
        f"{results[main]['share']:.1%} of its numbers; the seeds' standard deviations are "
        f"{100 * statistics.stdev(ours):.1f} and {100 * statistics.stdev(full):.1f} points."
    )
    return Found(printed(run.print_tables, record), remark=remark)


def e2e_run(record: Record) -> Found:
    from experiments.e2e_nlg import run

    loss, texts = record["validation_loss"], record["decoding"]
    remark = (
        f"The validation loss falls from {loss['untouched']:.2f} to {loss['adapted']:.2f}; merged, the model "
        f"decodes the same text for {texts['merged_equals_adapted']} of {texts['inputs']} inputs."
    )
    return Found(printed(lambda x: print(run.summary(x)), record), remark=remark)


def crossing(record: Record) -> Found:
    results = record["results"]
    rows = [
        [
            name,
            f"{x['held_out_loss_in_lora_jax']:.6f}",
            f"{x['held_out_loss_in_PEFT']:.6f}",
            f"{x['largest_logit_difference'] / x['largest_logit']:.1e}",
            f"{x['largest_logit_difference_merged'] / x['largest_logit']:.1e}",
        ]
        for name, x in results.items()
        if name.startswith("trained in")
    ]
    head = ["", "held-out loss, opened in lora_jax", "in PEFT", "logits differ by", "merged"]
    remark = (
        f"From one start {len(results['curves']['PEFT'])} losses of PEFT and of lora_jax differ by at most "
        f"{results['largest_difference']:.1e}, from {results['curves']['PEFT'][0]:.2f} down to "
        f"{results['curves']['PEFT'][-1]:.2f}."
    )
    return Found(markdown(head, rows), remark=remark)


def step(record: Record, paper: Record) -> Found:
    from experiments.benchmarks import step as run
    from experiments.benchmarks import tables

    ours, full = (record["methods"][name] for name in ("lora_jax", "full"))
    times, operations = (
        (1 - ours["seconds"]["median"] / full["seconds"]["median"]),
        1 - ours["gflop"] / full["gflop"],
    )
    (claim,) = [row["published"] for row in paper["rows"] if row["claim"] == "faster training"]
    text = (
        f"A gradient takes less time than full fine-tuning's: {times:.0%} less, with {operations:.0%} less "
        f"operations; the paper's training of GPT-3 {claim}"
    )
    return Found(
        run.as_text(record).replace(tables.origin(record), "").rstrip() + "\n", [Point(text, times > 0)]
    )


def tracing(record: Record) -> Found:
    from experiments.benchmarks import tables
    from experiments.benchmarks import tracing as run

    held = record["requirements"]
    missed = [x["name"] for x in held if x["met"] is False]
    remark = f"{len(held) - len(missed)} of {len(held)} limits are met; not met: {listed(missed)}."
    return Found(run.as_text(record).replace(tables.origin(record), "").rstrip() + "\n", remark=remark)


def merging(record: Record) -> Found:
    from experiments.merging import run

    resident, speed = record["merge"]["resident_gigabytes"], record["speed_of_the_copy"]
    held = "are held" if record["held"] else "are **not** held"
    remark = (
        f"Under {run.RESIDENT / 1e9:g} GB resident ({resident:.2f}) and at least {run.SPEED:g} of the copy's "
        f"speed ({speed:.2f}) {held}."
    )
    return Found(run.text(record), remark=remark)


def programs(record: Record) -> Found:
    refused = record["refused_share_by_primitive"]
    rows = [[f"`{name}`", f"{share:.2%}"] for name, share in list(refused.items())[:8]]
    remark = (
        f"Of {record['programs']:,} drawn programs of {record['operations']:,} operations "
        f"{record['mismatches']} break the law; {record['refused_share']:.1%} are refused by name; the "
        "largest relative difference is "
        f"{record['largest_relative_difference']:.1e}, where {record['tolerance']:g} is allowed."
    )
    return Found(markdown(["refused at", "of the programs"], rows), remark=remark)


def meshes(record: Record) -> Found:
    worst, bounds = record["largest_relative_difference"], record["bounds"]
    rows = [[dtype, f"{worst[dtype]:.1e}", f"{bound:g}"] for dtype, bound in bounds.items()]
    held = sum(worst[dtype] <= bound for dtype, bound in bounds.items())
    remark = (
        f"{record['curves']} curves of {record['steps']} steps are within the bound of a single device's in "
        f"{held} of {len(bounds)} dtypes."
    )
    return Found(markdown(["dtype", "largest relative difference", "bound"], rows), remark=remark)


def kills(record: Record) -> Found:
    rows = [[where, str(count)] for where, count in record["killed"].items()]
    same = sum(all(run.values()) for run in record["runs"])
    remark = (
        f"{same} of {len(record['runs'])} runs, killed {record['kills']} times, have the curve and the state "
        f"of one never killed bit for bit; a kill lost {record['lost_steps']['mean']:g} steps in the mean, "
        f"with a save every {record['save_every']}."
    )
    return Found(markdown(["killed", "times"], rows), remark=remark)


def mutations(record: Record) -> Found:
    rows = [
        [kind, *(f"{of.get(how, 0):,}" for how in ("refused", "loaded", "failed"))]
        for kind, of in record["ended"].items()
    ]
    remark = (
        f"Of {record['cases']:,} damaged adapters {len(record['failures'])} end otherwise than in an error "
        "or in what the bytes say."
    )
    return Found(markdown(["damage", "refused", "loaded as the bytes say", "failed"], rows), remark=remark)


DATA = "LORA_JAX_DATA=path/to/data "
SECTIONS = [
    Section(
        "Table 1, latency",
        "latency",
        f"{DATA}python -m experiments.latency.run",
        ["latency/results/*.json"],
        latency,
        ["latency/results/*.png"],
    ),
    Section(
        "Table 2, GLUE",
        "glue",
        f"{DATA}python -m experiments.glue.run grid",
        ["glue/results/glue.json"],
        glue,
        ["glue/results/glue.png"],
    ),
    Section(
        "Table 3, E2E",
        "e2e_nlg",
        f"{DATA}python -m experiments.e2e_nlg.compare --config experiments/e2e_nlg/compare.json",
        ["e2e_nlg/results/compare*.json"],
        e2e,
        ["e2e_nlg/results/compare*.png"],
    ),
    Section(
        "Tables 5 and 6, which matrices and which rank",
        "which",
        f"{DATA}python -m experiments.which.run",
        ["which/results/SST-2.json"],
        which,
        ["which/results/SST-2.png"],
    ),
    Section(
        "Table 18, rank on E2E",
        "which",
        f"{DATA}python -m experiments.which.e2e",
        ["which/results/E2E.json"],
        which_e2e,
        ["which/results/E2E.png"],
    ),
    Section(
        "Section 7, inside the update",
        "subspaces",
        f"{DATA}python -m experiments.subspaces.run",
        ["subspaces/results/subspaces.json"],
        subspaces,
        ["subspaces/results/heat_maps.png", "subspaces/results/spectra.png"],
    ),
    Section(
        "Table 16, few examples",
        "low_data",
        f"{DATA}python -m experiments.low_data.run",
        ["low_data/results/low_data.json"],
        low_data,
        ["low_data/results/low_data.png"],
    ),
    Section(
        "Parameter counts",
        "counts",
        f"{DATA}python -m experiments.counts.run",
        ["counts/results/counts.json"],
        counts,
    ),
    Section(
        "Sizes and memory",
        "counts",
        f"{DATA}python -m experiments.counts.claims",
        ["counts/results/claims.json"],
        claimed,
    ),
    Section(
        "GPT-3 and Llama 3 on slices of TPUs",
        "plan",
        "python -m experiments.plan.run --preset gpt3-175b ...",
        ["plan/results/*.json"],
        plans,
        together=True,
    ),
    Section(
        "One gradient",
        "benchmarks",
        "python -m experiments.benchmarks.step",
        ["benchmarks/results/step.json", "counts/results/claims.json"],
        step,
        together=True,
    ),
    Section(
        "What merging costs",
        "merging_cost",
        f"{DATA}python -m experiments.merging_cost.run",
        ["merging_cost/results/*.json"],
        merging_cost,
        ["merging_cost/results/merging_cost.png"],
        together=True,
    ),
    Section(
        "Many adapters in one run",
        "which",
        f"{DATA}python -m experiments.which.sharing",
        ["which/results/sharing.json"],
        sharing,
    ),
    Section(
        "Digits it has never seen",
        "quickstart_results",
        "python -m experiments.quickstart --out experiments/quickstart_results",
        ["quickstart_results/quickstart.json"],
        quickstart,
        ["quickstart_results/quickstart.png"],
    ),
    Section(
        "E2E from the files to the texts",
        "e2e_nlg",
        f"{DATA}python -m experiments.e2e_nlg.run --config experiments/e2e_nlg/config.json",
        ["e2e_nlg/results/stories260K.json"],
        e2e_run,
        ["e2e_nlg/results/stories260K.png"],
    ),
    Section(
        "The crossing with PEFT",
        "crossing",
        f"{DATA}python -m experiments.crossing.run",
        ["crossing/results/stories260K.json"],
        crossing,
        ["crossing/results/crossing.png"],
    ),
    Section(
        "Tracing and compiling 48 layers",
        "benchmarks",
        "python -m experiments.benchmarks.tracing",
        ["benchmarks/results/tracing.json"],
        tracing,
    ),
    Section(
        "Merging a checkpoint",
        "merging",
        "python -m experiments.merging.run --gigabytes 8 --repeat 3",
        ["merging/results/merge.json"],
        merging,
    ),
    Section(
        "Drawn programs",
        "programs",
        "python -m experiments.programs.run --programs 10000 --seed 0",
        ["programs/results/*.json"],
        programs,
    ),
    Section("Every mesh", "meshes", "python -m experiments.meshes.run", ["meshes/results/*.json"], meshes),
    Section(
        "Kills",
        "kills",
        "python -m experiments.kills.run --kills 50 --seed 0",
        ["kills/results/*.json"],
        kills,
    ),
    Section(
        "Damaged adapters",
        "mutations",
        "python -m experiments.mutations.run --cases 10000 --seed 0",
        ["mutations/results/*.json"],
        mutations,
    ),
]

HEAD = """\
# Results

Made by `python -m experiments.report` from the results in this folder; no number, no "yes" and no "no" is
typed. A point of the paper holds where the numbers here say what it says: that a way is not worse than
another, unless a whole 95% interval says it is; that it is worse, only where one does. The models here are
small and the paper's are not: each experiment's page says what was chosen, and what falls short.
"""


def page(root: Path) -> str:
    """The whole page, from the records under a folder like this one."""
    overview, parts, missing = [], [], []
    for section in SECTIONS:
        paths = [sorted(root.glob(pattern)) for pattern in section.records]
        if not all(paths):
            missing.append(f"- {section.title}: `{section.command}`\n")
            continue
        records = [json.loads(path.read_text()) for found in paths for path in found]
        found = section.text(*records) if section.together else joined([*map(section.text, records)])
        figures = [path for pattern in section.figures for path in sorted(root.glob(pattern))]
        readme = f"{section.folder}/README.md"
        anchor = re.sub(r"[^\w\- ]", "", section.title.lower()).replace(" ", "-")
        link = f"[{section.title}](#{anchor})"
        overview.append([link, verdict(found)])
        parts.append(
            f"\n## {section.title}\n\n{found.tables.rstrip()}\n\n"
            + "".join(f"![{section.title}]({path.relative_to(root)})\n\n" for path in figures)
            + f"{beside(found)}\nMade by\n\n"
            + "".join(f"- {origin(record)}\n" for record in records)
            + (f"\n[{readme}]({readme})\n" if (root / readme).exists() else "")
        )
    text = HEAD + "\n" + markdown(["", "beside the paper"], overview, words=2)
    if missing:
        text += f"\nNot here, since their results have not been made:\n\n{''.join(missing)}"
    return text + "".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing: is REPORT.md what the results give?"
    )
    check = parser.parse_args(arguments).check
    try:
        text = page(HERE)
    except ImportError as error:
        raise SystemExit(f'{error}; write: pip install -e ".[experiments]"') from None
    out = HERE / "REPORT.md"
    if not check:
        out.write_text(text)
        print(f"written to {out}")
        return 0
    old = out.read_text() if out.exists() else ""
    changes = list(
        difflib.unified_diff(old.splitlines(), text.splitlines(), "REPORT.md", "results", lineterm="", n=0)
    )
    print("\n".join(changes[:40]) or "REPORT.md is what the results give")
    return 1 if changes else 0


if __name__ == "__main__":
    sys.exit(main())
