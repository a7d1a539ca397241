"""Train DPDiff-AD on a folder of normal images and list the most anomalous images of another.

    python examples/own_images.py NORMAL_FOLDER NEW_FOLDER [--steps 500] [--out runs/own]

On the command line: `dpdiff train --data NORMAL_FOLDER --out runs/own`, then `dpdiff predict NEW_FOLDER ...`.
"""

import argparse
from pathlib import Path

import torch

import dpdiff
from dpdiff.data import check, load_image, scan, walk_images
from dpdiff.training import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("normal", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("runs/own"))
    arguments = parser.parse_args()

    samples, unreadable = check(scan(arguments.normal, need="train").train, on_error="skip")
    print(f"{len(samples)} normal images, {len(unreadable)} unreadable")
    model = train(dpdiff.DPDiffAD(), samples, arguments.out, max_steps=arguments.steps)

    scores = {}
    for path in walk_images(arguments.new):
        image = load_image(path, model.image_size)
        scores[path] = model.predict(torch.stack([image])).scores.item()
    for path in sorted(scores, key=scores.get, reverse=True)[:10]:
        print(f"{scores[path]:8.3f}  {path}")


if __name__ == "__main__":
    main()
