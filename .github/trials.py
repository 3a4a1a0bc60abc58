# SPDX-License-Identifier: MIT
"""Compare settings of bagssl.py on training images held out: train with each combination, probe it, print a table.

    python .github/trials.py --try lr 0.1 0.2 0.4 --try batch-size 64 256 --preset cifar10-cpu --epochs 3
    python .github/trials.py --try projector 1024,1024,1024 2048,2048,2048 --preset cifar10-cpu --epochs 3

All flags but --try are bagssl.py's. A random tenth of the training images is held out; the encoder is trained on the
others, and the probes are fitted to 10,000 of these. Neither test images nor images without labels are read. Each
combination keeps its run in a folder of OUT (default: runs/trials), so that the same command continues an interrupted
table.
"""

import argparse
import contextlib
import io
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import bagssl
import eval_linear

LABELS = 10_000


def hold_out(images, labels):
    """(images, labels) to train on, and those held out, a random tenth of the images."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held, kept = order[:len(order) // 10], order[len(order) // 10:]
    return (images[kept], labels[kept]), (images[held], labels[held])


def trial(config, device, kept, held):
    """Train and probe with one config. Returns the last four cells of its row."""
    bagssl.training_images = lambda *_: (kept[0], None)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            bagssl.train(config, device)
    except FloatingPointError:
        return ["diverged", "", "", ""]
    out = Path(config.out)
    steps = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()[1:]]
    counts = np.diff([0, *(step["step"] for step in steps)])  # steps per line of the log
    cells = [f"{100 * np.average([step['clipped'] for step in steps], weights=counts):.0f}"]
    encoder, _ = bagssl.load_encoder(out / "checkpoint.pt")
    scale = (config.patch_scale[0] + config.patch_scale[-1]) / 2
    for side in (1, 4):
        bag = bagssl.BagOfPatches(encoder.backbone.to(device), side, scale, config.patch_size or None)
        features = [eval_linear.embed(bag, images, device) for images in (kept[0][:LABELS], held[0])]
        parts = features[0], kept[1][:LABELS], features[1], held[1]
        cells.append(f"{eval_linear.linear_probe(*parts)['top1']:.1f}")
    return [*cells, f"{eval_linear.knn_probe(*parts):.1f}"]


def main():
    parser = bagssl.Parser(description=__doc__, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--try", nargs="+", action="append", required=True, dest="settings",
                        metavar=("FLAG", "VALUE"), help="a flag of bagssl.py and its values, such as 0.1 or 64,64,64")
    arguments, flags = parser.parse_known_args()
    names = [name for name, *_ in arguments.settings]
    combinations = list(itertools.product(*(values for _, *values in arguments.settings)))
    if not combinations:
        parser.error("--try takes a flag and one or more values, such as --try lr 0.1 0.2")
    if bagssl.WORLD_SIZE > 1:
        raise bagssl.UserError("trials run in one process; start trials.py with python, not torchrun")
    configs = []
    for values in combinations:  # all of them, before the first is trained
        given = [word for name, value in zip(names, values) for word in (f"--{name}", *value.split(","))]
        config = bagssl.parse_config(["--out", "runs/trials", *flags, *given])
        bagssl.check_config(config, processes=1)
        # The epochs are part of the name, as otherwise a longer trial would continue a shorter one.
        config.out += f"/{config.epochs}-epochs" + "".join(f"-{name}={value}" for name, value in zip(names, values))
        configs.append(config)

    c = configs[0]
    if any((other.dataset, other.data, other.image_size, other.device) != (c.dataset, c.data, c.image_size, c.device)
           for other in configs) or "seed" in names and c.dataset == "demo":
        raise bagssl.UserError("all combinations share the images and the device: --try cannot vary these")
    device = bagssl.start_process(c.device)
    kept, held = hold_out(*bagssl.load_images(c.dataset, c.data, "train", c.image_size, c.cache, c.seed))
    if max(config.batch_size for config in configs) > len(kept[0]):
        raise bagssl.UserError(f"{len(kept[0])} training images are fewer than a batch; give a smaller --batch-size")
    print("|", " | ".join([*names, "clipped, %", "one patch", "bag of 16", "kNN, bag of 16"]), "|")
    print("|" + "---|" * (len(names) + 4))
    for values, config in zip(combinations, configs):
        print("|", " | ".join([*values, *trial(config, device, kept, held)]), "|", flush=True)


if __name__ == "__main__":
    bagssl.run_cli(main)
