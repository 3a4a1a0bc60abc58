# SPDX-License-Identifier: MIT
"""Plot accuracy and cosine against the size of the bag, beside this file; needs matplotlib.

    python .github/plots.py runs/FIXED runs/MULTI    # folders with the eval.json of --show probe and --show parts
"""

import json
import re
import sys
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt


def by_size(results, value, prefix=""):
    """[(n, value)] of the rows for one patch and bags of n, of the trained network or, by prefix, the untrained."""
    sizes = [(1 if "one patch" in row["features"] else int(re.search(r"bag of (\d+)", row["features"] + "bag of 0")[1]), row)
             for row in results if row["features"].startswith(prefix) and (prefix or "untrained" not in row["features"])]
    return sorted((size, row[value]) for size, row in sizes if size)


figure, (accuracy, cosine) = plt.subplots(1, 2, figsize=(10, 4))
for colour, folder in zip(("C0", "C1", "C2", "C3"), map(Path, sys.argv[1:])):
    known = json.loads((folder / "eval.json").read_text())
    rows = known["probe"]["results"]
    accuracy.plot(*zip(*by_size(rows, "top1")), "o-", color=colour, label=folder.name)
    whole = next(row["top1"] for row in rows if row["features"] == "whole image, one pass")
    accuracy.axhline(whole, color=colour, linestyle=":", label=f"{folder.name}, whole image")
known = json.loads((Path(sys.argv[-1]) / "eval.json").read_text())["parts"]["results"]
for marker, of in zip("os^", ("same image", "same class", "other class")):
    cosine.plot(*zip(*by_size(known, of)), marker + "-", color="C1", label=of)
    cosine.plot(*zip(*by_size(known, of, "untrained")), marker + "--", color="grey", label=f"untrained, {of}")
accuracy.set(ylabel="linear probe, top-1 in %", title="Accuracy")
cosine.set(ylabel="mean cosine", title=f"Bag against whole image ({Path(sys.argv[-1]).name})")
for axes in (accuracy, cosine):
    axes.set(xscale="log", xlabel="patches in the bag")
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
figure.tight_layout()
figure.savefig(Path(__file__).with_name("plots.png"), dpi=110)
