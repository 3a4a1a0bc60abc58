# SPDX-License-Identifier: MIT
"""Plot what eval_linear.py and claims.py saved in runs' folders, beside this file; needs matplotlib.

    python eval_linear.py --checkpoint RUN/checkpoint.pt --patches 1 4 16 64             # for each run
    python .github/claims.py parts --checkpoint RUN/checkpoint.pt --patches 1 4 16 64    # for each run
    python .github/plots.py runs/cifar10-fixed runs/cifar10-multi runs/imagenette-fixed runs/imagenette-multi
    python .github/plots.py curve

accuracy.png: linear probe against the number of patches in the bag. cosine.png: cosine between the whole image's
embedding and the bag's. A panel for each data set, a colour for each kind of training. curve.png: the first table of
RESULTS.md's section "The number of patches", beside published figures.
"""

import itertools
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt

HERE = Path(__file__).parent
PFLOP_PER_PATCH = 25.36e-6 / 256  # of the preset cifar10-cpu, as `benchmark.py flops` counts


def patches_in(name):
    """The size of the bag that a row of eval.jsonl is about: "bag of 16" -> 16."""
    return 1 if "one patch" in name else int(name.rpartition(" ")[2])


def plot_accuracy(axis, training, rows, colour):
    top1 = {row["features"]: row["top1"] for row in rows}
    whole = max(row["top1"] for row in rows if row["features"].startswith("whole"))  # with all pixels, not shrunk
    bags = {patches_in(name): top1[name] for name in top1 if name.startswith(("one patch", "bag"))}
    axis.plot(*zip(*sorted(bags.items())), "o-", color=colour, label=f"{training}: bag")
    axis.axhline(whole, color=colour, ls="--", label=f"{training}: whole image, all pixels")
    for name in top1:
        if name.startswith("untrained"):
            marker = "+" if training == "multi-scale" else "x"  # often in the same place
            axis.plot(patches_in(name), top1[name], marker, color=colour, label=f"{training}, untrained: {name[11:]}")


def plot_cosine(axis, training, rows, colour):
    newest = {row["features"]: row for row in rows}
    for prefix, style in (("", "o-"), ("untrained, ", "x:")):
        chosen = {patches_in(name): row for name, row in newest.items()
                  if name.startswith((prefix + "one patch", prefix + "bag"))}
        for of, alpha in (("same image", 1.0), ("same class", 0.6), ("other class", 0.3)):
            axis.plot(chosen.keys(), [row[of] for row in chosen.values()], style, color=colour, alpha=alpha,
                      label=f"{training}, {prefix}{of}")


def draw(name, show, plot, label, runs):
    """One picture, with a panel for each data set. Of equal rows of a run's eval.jsonl, the newest is drawn."""
    panels = {}
    for run in runs:
        config = json.loads((run / "config.json").read_text())
        rows = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
        rows = [row for row in rows if row["show"] == show]
        if rows:
            training = "multi-scale" if len(config["patch_scale"]) == 2 else "fixed scale"
            panels.setdefault(Path(config["data"]).name, []).append((training, rows))
    if not panels:
        sys.exit(f"error: no run's eval.jsonl has rows of {show}; plots.py without arguments says what writes them")
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False, layout="constrained")
    for axis, (dataset, lines) in zip(axes[0], panels.items()):
        for training, rows in lines:
            plot(axis, training, rows, "tab:orange" if training == "multi-scale" else "tab:blue")
        axis.set(title=dataset, xlabel="patches in the bag", ylabel=label, xscale="log", xticks=[1, 4, 16, 64],
                 xticklabels=["1", "4", "16", "64"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    entries = {label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(entries.values(), entries.keys(), fontsize=7, loc="outside lower center", ncols=2)
    figure.savefig(HERE / f"{name}.png", dpi=110)


def draw_curve():
    """curve.png, from the first table of RESULTS.md's section on the number of patches."""
    section = (HERE / "RESULTS.md").read_text().partition("### The number of patches")[2].partition("| epochs |")[2]
    header, _, *rows = [[cell.strip() for cell in line.split("|")]
                        for line in itertools.takewhile(lambda line: "|" in line, section.splitlines())]
    rows = [row for row in rows if row[1].isdigit()]
    columns = {"linear probe": "bag of 16", "kNN, whitened": "on whitened h", "kNN": "kNN, bag of 16"}
    figure, axis = plt.subplots(figsize=(7, 5), layout="constrained")
    for (name, column), colour in zip(columns.items(), ("tab:blue", "tab:cyan", "tab:grey")):
        top1 = [float(row[header.index(column) + 2]) for row in rows]
        pflop = [int(row[2].replace(",", "")) * PFLOP_PER_PATCH for row in rows]
        axis.plot(pflop, top1, "o-", color=colour, label=f"bag of 16, {name}")
    axis.plot([3.5, 35, 104], [80.6, 90.7, 93.1], "s:", color="tab:red",
              label="EMP-SSL (ResNet-18, patches enlarged to 32 x 32; best test epoch), linear probe")
    for top1, style, label in ((79.6, "--", "k-means on patches, 2011, linear classifier"),
                               (81.1, "-.", "sparse manifold transform, 2022, kNN")):
        axis.axhline(top1, color="tab:green", ls=style, lw=1, label=label)
    axis.set(xscale="log", ylim=(60, 95), xlabel="compute of training, PFLOP",
             ylabel="CIFAR-10, % of test images right")
    axis.grid(alpha=0.3)
    figure.legend(fontsize=7, loc="outside lower center", ncols=2)
    figure.savefig(HERE / "curve.png", dpi=110)


if sys.argv[1:] == ["curve"]:
    draw_curve()
elif not sys.argv[1:]:
    print(__doc__)
else:
    runs = [Path(folder) for folder in sys.argv[1:]]
    draw("accuracy", "probe", plot_accuracy, "linear probe, % of test images right", runs)
    draw("cosine", "parts", plot_cosine, "cosine to the whole image's embedding", runs)
