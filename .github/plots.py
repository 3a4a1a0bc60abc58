# SPDX-License-Identifier: MIT
"""Draw accuracy.png and curve.png, beside this file, mostly from tables of RESULTS.md; needs matplotlib.

    python .github/plots.py
    python .github/plots.py runs/cifar10-cpu/log.jsonl    # and learning.png, from the log of a run
"""

import itertools
import json
import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).parent
PFLOP_PER_PATCH = 25.36e-6 / 256  # 25.36 GFLOP a step of 256 patches (cifar10-cpu): `benchmark.py flops`
COLOURS = {"fixed scale": "tab:blue", "multi-scale": "tab:orange"}
BAGS = {"one patch": 1, "bag of 4": 4, "bag of 16": 16, "bag of 64": 64}


def table(section, first):
    """The rows, {column: cell}, of the table in a section of RESULTS.md whose first column is `first`."""
    lines = (HERE / "RESULTS.md").read_text().partition(f"# {section}\n")[2].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")]
                        for line in itertools.takewhile(lambda line: line.startswith("|"), lines[start:])]
    return [dict(zip(header, row)) for row in rows]


def save(figure, name, columns=2):
    """Write the figure with one legend for all its panels."""
    entries = {label: line for axis in figure.axes for line, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(entries.values(), entries.keys(), fontsize=8, loc="outside lower center", ncols=columns)
    figure.savefig(HERE / f"{name}.png", dpi=110)


def draw_accuracy():
    """accuracy.png: claim 1. Bars span the seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    axes[0].set(title="CIFAR-10", ylabel="accuracy of a linear probe, %")
    axes[1].set(title="Imagenette")
    for axis in axes:
        axis.set(xlabel="patches in the bag", xscale="log", xticks=[*BAGS.values()], xticklabels=[*BAGS.values()])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    rows = {row["pretraining"]: row for row in table("Claim 1", "pretraining")}
    for axis, (training, colour) in itertools.product(axes, COLOURS.items()):
        name = f"{axis.get_title()}, {training}"
        seeds = [row for key, row in rows.items() if key.startswith(f"{name}, seed")] or [rows[name]]
        values = [[float(row[bag]) for row in seeds] for bag in BAGS]
        means = [sum(of_bag) / len(of_bag) for of_bag in values]
        spread = [[mean - min(of_bag) for mean, of_bag in zip(means, values)],
                  [max(of_bag) - mean for mean, of_bag in zip(means, values)]]
        axis.errorbar(BAGS.values(), means, spread, fmt="o-", capsize=4, color=colour, label=f"{training}: bag")
        whole = sum(float(row["all pixels"]) for row in seeds) / len(seeds)
        axis.axhline(whole, color=colour, ls="--", label=f"{training}: whole image, all pixels")
        if training == "fixed scale":  # both runs start from the same untrained network
            untrained = sum(float(row["untrained, 16"]) for row in seeds) / len(seeds)
            axis.plot(16, untrained, "kx", label="untrained: bag of 16")
    save(figure, "accuracy", 3)


def draw_curve():
    """curve.png: the preset cifar10-cpu with several numbers of epochs, beside published figures."""
    rows = [row for row in table("The number of patches", "epochs") if row["epochs"].isdigit()]
    figure, axis = plt.subplots(figsize=(7, 5), layout="constrained")
    columns = {"linear probe": "bag of 16", "kNN, whitened": "on whitened h", "kNN": "kNN, bag of 16"}
    for (name, column), colour in zip(columns.items(), ("tab:blue", "tab:cyan", "tab:grey")):
        pflop = [int(row["patches"].replace(",", "")) * PFLOP_PER_PATCH for row in rows]
        axis.plot(pflop, [float(row[column]) for row in rows], "o-", color=colour, label=f"bag of 16, {name}")
    published = [(row["on CIFAR-10"], row["PFLOP"].split(" to "), float(row["accuracy"]))
                 for row in table("Published figures", "on CIFAR-10")]
    for name, style in (("EMP-SSL", "s:"), ("VICReg on two crops", "^")):
        points = [(float(pflop[0]), top1) for method, pflop, top1 in published if method == name]
        axis.plot(*zip(*points), style, color="tab:red", label=f"{name}, linear probe")
    for method, pflop, top1 in published:
        if method == "EMP-SSL, for few epochs":
            axis.plot([*map(float, pflop)], [top1] * len(pflop), "s-", color="tab:red", mfc="white", lw=1,
                      label=f"{method}, linear probe")
    for top1, style, label in ((79.6, "--", "k-means on patches, 2011, linear classifier"),
                               (81.1, "-.", "sparse manifold transform, 2022, kNN"),
                               (85.5, ":", "16,000 whitened patches, 2021, trained bottleneck")):
        axis.axhline(top1, color="tab:green", ls=style, lw=1, label=label)
    axis.set(xscale="log", ylim=(60, 95), xlabel="compute of training, PFLOP",
             ylabel="accuracy on CIFAR-10, %")
    axis.grid(alpha=0.3)
    save(figure, "curve")


def draw_learning(path):
    """learning.png: terms of the loss, online probe and effective rank, from a run's log.jsonl."""
    entries = [json.loads(line) for line in Path(path).read_text().splitlines()]
    config = json.loads(Path(path).with_name("config.json").read_text())
    patches = [entry["step"] * config["batch_size"] * config["num_patches"] / 1e6 for entry in entries]
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained")
    titles = "terms of the loss, unweighted", "accuracy of the online probe, %", "effective rank of h"
    for axis, title, names in zip(axes, titles, (("inv", "var", "cov"), ("probe",), ("effective_rank",))):
        for name in names:
            values = [entry.get(name, math.nan) for entry in entries]  # without labels, there is no probe
            axis.plot(patches, values, lw=1, alpha=0.3 if name == "probe" else 1, label=name)
        axis.set(title=title, xlabel="million patches")
        axis.grid(alpha=0.3)
    probe, width = axes[1].lines[0].get_ydata(), min(20, len(entries))  # of one batch each, so noisy: a running mean
    axes[1].plot(patches[width - 1:], np.convolve(probe, np.ones(width) / width, "valid"), "C0")
    axes[0].set(ylim=(0, None))
    axes[0].legend(fontsize=8)
    figure.savefig(HERE / "learning.png", dpi=110)


if __name__ == "__main__":
    draw_accuracy()
    draw_curve()
    if sys.argv[1:]:
        draw_learning(sys.argv[1])
