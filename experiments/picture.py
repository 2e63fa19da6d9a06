"""Draw the README's picture of LoRA: python -m experiments.picture [FILE]."""

import argparse
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, Polygon, Rectangle

FROZEN, TRAINED, INK = "#c9d6e8", "#f4b183", "#333333"


def draw(path: pathlib.Path) -> None:
    figure, ax = plt.subplots(figsize=(7.2, 3.1), dpi=160)
    ax.set_xlim(0, 12)
    ax.set_ylim(0, 5.2)
    ax.axis("off")

    def box(x: float, y: float, width: float, height: float, text: str) -> None:
        ax.add_patch(Rectangle((x, y), width, height, facecolor="white", edgecolor=INK))
        ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=10, color=INK)

    def arrow(x0: float, y0: float, x1: float, y1: float) -> None:
        ax.add_patch(FancyArrowPatch((x0, y0), (x1, y1), arrowstyle="-|>", mutation_scale=10, color=INK))

    box(0.2, 2.1, 1.5, 0.9, "x\n(…, d)")
    ax.add_patch(Rectangle((3.6, 3.0), 4.2, 1.9, facecolor=FROZEN, edgecolor=INK))
    ax.text(5.7, 3.95, "W  (d, k), frozen", ha="center", va="center", fontsize=11, color=INK)
    ax.add_patch(
        Polygon([(3.6, 0.3), (3.6, 2.2), (5.5, 1.55), (5.5, 0.95)], facecolor=TRAINED, edgecolor=INK)
    )
    ax.text(4.45, 1.25, "A\n(d, r)", ha="center", va="center", fontsize=10, color=INK)
    ax.add_patch(
        Polygon([(5.9, 0.95), (5.9, 1.55), (7.8, 2.2), (7.8, 0.3)], facecolor=TRAINED, edgecolor=INK)
    )
    ax.text(6.95, 1.25, "B\n(r, k)", ha="center", va="center", fontsize=10, color=INK)
    arrow(5.5, 1.25, 5.9, 1.25)
    arrow(1.7, 2.75, 3.6, 3.95)
    arrow(1.7, 2.35, 3.6, 1.25)
    arrow(7.8, 3.95, 9.05, 2.75)
    arrow(7.8, 1.25, 9.05, 2.35)
    ax.text(8.55, 1.35, "· α / r", fontsize=10, color=INK)
    ax.add_patch(plt.Circle((9.3, 2.55), 0.3, facecolor="white", edgecolor=INK))
    ax.text(9.3, 2.53, "+", ha="center", va="center", fontsize=13, color=INK)
    arrow(9.6, 2.55, 10.2, 2.55)
    box(10.2, 2.1, 1.6, 0.9, "y\n(…, k)")
    ax.text(5.7, 2.6, "y = x W + (α / r) (x A) B", ha="center", va="center", fontsize=11, color=INK)
    figure.savefig(path, bbox_inches="tight")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "file", nargs="?", default=pathlib.Path(__file__).with_name("lora.png"), type=pathlib.Path
    )
    draw(parser.parse_args().file)
