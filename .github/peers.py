# SPDX-License-Identifier: MIT
"""What two other methods reach on CIFAR-10 on this machine.

    pip install lightly scikit-learn
    python .github/peers.py lightly --minutes 30     # VICReg on two crops of each image, ResNet-18; lightly's parts
    python .github/peers.py kmeans --centres 4000    # k-means on patches of 6 x 6 pixels, no network

`lightly`: loss, head, transform and optimiser are lightly's; their settings are those of solo-learn for VICReg on
CIFAR-10, whose 1,000 epochs reach 92 %, except batches of 128 images, not 256, for more steps in a short time.
The learning rate falls to zero at the end of the given time. The network computes in bfloat16 where bagssl.py's does.
As there, batch normalisation's statistics are re-estimated on plain images at the end. The whole image's embedding is
probed as by eval_linear.py.

`kmeans`: Coates, Ng, Lee, "An Analysis of Single-Layer Networks in Unsupervised Feature Learning" (2011), with their
linear support vector machine; its cost is chosen on held-out training images.
"""

import argparse
import functools
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.transforms.functional import to_pil_image

sys.path.insert(0, str(Path(__file__).parents[1]))
import bagssl
import eval_linear

CPU = torch.device("cpu")


# ---- Whole images, with lightly --------------------------------------------------------------------------------------


def crops(transform, images):
    """Two crops of each image of a batch (B, 3, H, W): (2 B, 3, 32, 32), all first ones, then all second ones."""
    first, second = zip(*(transform(to_pil_image(image)) for image in images))
    return torch.stack([*first, *second])


def whole_images(arguments, train, labels, test, test_labels):
    """Train a ResNet-18 on two crops of each image for the given time, then probe its whole-image embedding."""
    from lightly.loss import VICRegLoss
    from lightly.models.modules.heads import BarlowTwinsProjectionHead
    from lightly.models.utils import get_weight_decay_parameters
    from lightly.transforms import VICRegTransform
    from lightly.utils.lars import LARS

    B, transform = 128, VICRegTransform(input_size=32, min_scale=0.2, gaussian_blur=0.0)
    batches = torch.utils.data.DataLoader(train, B, shuffle=True, drop_last=True, num_workers=2,
                                          collate_fn=functools.partial(crops, transform))
    torch.manual_seed(0)
    backbone = bagssl.make_backbone("resnet18", 1).to(memory_format=torch.channels_last)  # a stem for 32 x 32 pixels
    head, criterion = BarlowTwinsProjectionHead(512, 2048, 2048), VICRegLoss()  # the two methods' heads are the same
    decayed, others = get_weight_decay_parameters([backbone, head])
    groups = [{"params": decayed, "weight_decay": 1e-4}, {"params": others}]  # LARS scales only what decays
    peak = 0.3 * B / 256
    optimizer = LARS(groups, lr=peak, momentum=0.9, trust_coefficient=0.02)
    begun, steps, done = time.time(), 0, 0.0
    while done < 1:
        for x in batches:
            for group in optimizer.param_groups:
                group["lr"] = peak * min(1, done / 0.1 + 1e-3) * (1 + math.cos(math.pi * done)) / 2
            with bagssl.autocast(CPU):
                z = head(backbone(x.contiguous(memory_format=torch.channels_last)))
            loss = criterion(*z.float().chunk(2))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps, done = steps + 1, (time.time() - begun) / (60 * arguments.minutes)
            if steps % 20 == 0 or done >= 1:
                print(f"step {steps}, {2 * B * steps:,} crops, {done:.0%} of the time: loss {loss:.2f}", flush=True)
            if done >= 1:
                break
    with bagssl.autocast(CPU):
        torch.optim.swa_utils.update_bn(map(bagssl.normalize, train[torch.randperm(len(train))[:6_400]].split(64)),
                                        backbone)
    whole = bagssl.BagOfPatches(backbone.eval(), 1, 1.0)  # one patch, the whole image
    features = [eval_linear.embed(whole, images, CPU) for images in (train, test)]
    row = eval_linear.linear_probe(features[0], labels, features[1], test_labels)
    row["knn"] = eval_linear.knn_probe(features[0], labels, features[1], test_labels)
    print(f"lightly, {2 * B * steps:,} crops: top1 {row['top1']:.2f} %, knn {row['knn']:.2f} %")


# ---- k-means ---------------------------------------------------------------------------------------------------------

SIDE = 6  # of a block, in pixels


def blocks_of(images):
    """All blocks of 6 x 6 pixels, contrast-normalised: uint8 (B, 3, H, W) -> float32 (B, positions, 108)."""
    blocks = F.unfold(images.float(), SIDE).transpose(1, 2)
    return (blocks - blocks.mean(2, keepdim=True)) / (blocks.var(2, keepdim=True) + 10).sqrt()


def triangle_features(images, whitening, mean, centres, batch=2):
    """Each centre's activation, max(0, mean distance to all centres - its own), summed over quadrants: (N, 4 K).

    With a small batch, the distances, (batch, positions, K), stay in the processor's cache.
    """
    side = images.shape[-1] - SIDE + 1  # positions along a side
    features = torch.empty(len(images), 4 * len(centres))  # filled in place: for 50,000 images and 4,000 centres, 3 GB
    for some, rows in zip(images.split(batch), features.split(batch)):
        distance = torch.cdist((blocks_of(some) - mean) @ whitening, centres[None])  # (batch, side * side, K)
        active = (distance.mean(2, keepdim=True) - distance).relu_().unflatten(1, (side, side))
        top, bottom = active.tensor_split(2, 1)
        quadrants = (*top.tensor_split(2, 2), *bottom.tensor_split(2, 2))
        torch.cat([quadrant.sum((1, 2)) for quadrant in quadrants], 1, out=rows)
    return features


def fit_svm(features, labels, classes, cost, iterations=300, block=8192):
    """One-vs-rest support vector machines: minimise |W|^2 / 2 + cost * mean over images of the sum of squared hinges.

    scikit-learn's LinearSVC minimises the same, but copies the features, 50,000 x 16,000, in float64.

    features: standardised (N, D); labels: int64 (N,). Returns (D + 1, classes); the last row is the bias, also decayed.
    """
    weight = torch.zeros(features.shape[1] + 1, classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=iterations, history_size=20, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum() / 2
        loss.backward()
        for x, y in zip(features.split(block), labels.split(block)):
            sign = 2 * F.one_hot(y, classes) - 1
            hinge = (1 - sign * torch.addmm(weight[-1], x, weight[:-1])).relu()
            part = cost * hinge.square().sum() / len(features)
            part.backward()
            loss = loss + part
        return loss.detach()

    optimizer.step(closure)
    return weight.detach()


def kmeans(arguments, train, labels, test, test_labels):
    """Learn centres of whitened blocks, pool each image's activations, fit a linear classifier."""
    from sklearn.cluster import KMeans

    begun, generator = time.time(), torch.Generator().manual_seed(0)
    chosen, blocks = torch.randperm(len(train), generator=generator)[:10_000], []
    for some in map(blocks_of, train[chosen].split(100)):
        blocks.append(some[:, torch.randperm(some.shape[1], generator=generator)[:40]].flatten(0, 1))
    blocks = torch.cat(blocks)  # (400,000, 108)
    mean = blocks.mean(0)
    variances, axes = torch.linalg.eigh(torch.cov(blocks.T))
    whitening = (axes / (variances + 0.1).sqrt()) @ axes.T
    clusters = KMeans(arguments.centres, init="random", n_init=1, max_iter=50, tol=0, random_state=0)
    clusters.fit(((blocks - mean) @ whitening).numpy())
    centres = torch.from_numpy(clusters.cluster_centers_).float()
    print(f"{arguments.centres} centres after {(time.time() - begun) / 60:.1f} min", flush=True)
    x, test_x = (triangle_features(images, whitening, mean, centres) for images in (train, test))
    print(f"features of {x.shape[1]} dimensions after {(time.time() - begun) / 60:.1f} min", flush=True)
    mean, std = x.mean(0), (x.var(0) + 0.01).sqrt()
    for features in (x, test_x):
        features.sub_(mean).div_(std)
    held, kept = torch.randperm(len(x), generator=generator).tensor_split([len(x) // 10])
    accuracy = {}  # by cost; 100 is the authors' choice
    for cost in (1, 10, 100, 1000):
        weight = fit_svm(x[kept], labels[kept], 10, cost)
        accuracy[cost] = round(eval_linear.top_k(x[held] @ weight[:-1] + weight[-1], labels[held], 1), 2)
    print("held-out accuracies:", accuracy, flush=True)
    best = max(accuracy, key=accuracy.get)
    weight = fit_svm(x, labels, 10, best)
    top1 = eval_linear.top_k(test_x @ weight[:-1] + weight[-1], test_labels, 1)
    print(f"kmeans, {arguments.centres} centres, cost {best}: top1 {top1:.2f} %")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=["lightly", "kmeans"])
    parser.add_argument("--minutes", type=float, default=30, help="training time (lightly)")
    parser.add_argument("--centres", type=int, default=4000, help="number of centres (k-means)")
    parser.add_argument("--data", default="cifar10", help="cifar10, or a folder with its images")
    arguments = parser.parse_args()
    sets = [part for split in ("train", "test") for part in bagssl.load_images(arguments.data, split)]
    {"lightly": whole_images, "kmeans": kmeans}[arguments.method](arguments, *sets)


if __name__ == "__main__":
    bagssl.run_cli(main)
