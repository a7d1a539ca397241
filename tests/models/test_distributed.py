"""Two processes with half a batch each learn as one with a whole batch."""

import csv
import json
import subprocess
import sys

import pytest
import torch
import torch.multiprocessing as mp
from PIL import Image
from stripes import striped

from dpdiff.backbones import Backbone
from dpdiff.data import Sample
from dpdiff.data.features import FeatureCache
from dpdiff.prototypes import GlobalPrototypes

TINY = ["backbone=test_resnet", "pretrained=false", "image_size=64", "n_local=16", "n_global=8", "dim=24", "depth=1"]


def losses(folder):
    with open(folder / "metrics.csv") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def cli(folder, data, *options):
    command = [sys.executable, "-m", "dpdiff", "train", "--data", str(data), "--out", str(folder)]
    command += ["--accelerator", "cpu", "--precision", "32-true", "--steps", "41", "--lr", "0.003", *options]
    command += [part for setting in [*TINY, "num_heads=2"] for part in ("--set", setting)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return losses(folder)


@pytest.mark.timeout(900)
def test_two_processes_learn_as_one_of_twice_the_batch(products, tmp_path):
    data = products(20)[0].image.parent
    one = cli(tmp_path / "one", data, "--batch-size", "8", "--devices", "1")
    two = cli(tmp_path / "two", data, "--batch-size", "4", "--devices", "2")
    assert len(one) == len(two) == 4
    assert one[-1]["loss"] < 0.95 * one[0]["loss"]
    for a, b in zip(one, two):
        assert b == pytest.approx(a, rel=1e-3, abs=1e-5)


def _transport(rank, n_ranks, address, descriptors, out):
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=n_ranks)
    torch.manual_seed(0)
    prototypes = GlobalPrototypes(6, 10)
    clean, reconstructed = (x.chunk(n_ranks, 1)[rank].clone() for x in descriptors.split(1))
    reconstructed.requires_grad_()
    value, swapped = prototypes(clean[0], reconstructed[0])
    (value + swapped).backward()
    torch.save((value.detach(), swapped.detach(), reconstructed.grad), out / f"{n_ranks}-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_transport_and_its_gradient_are_of_the_images_of_all_processes(tmp_path):
    descriptors = torch.randn(2, 8, 10, generator=torch.Generator().manual_seed(1))
    for n in (1, 2):
        mp.spawn(_transport, (n, f"file://{tmp_path}/{n}", descriptors, tmp_path), nprocs=n)
    value, swapped, gradient = torch.load(tmp_path / "1-0.pt")
    parts = [torch.load(tmp_path / f"2-{rank}.pt") for rank in range(2)]
    for part in parts:
        torch.testing.assert_close(part[:2], (value, swapped))
    # What DDP averages over the two processes is the gradient of the whole.
    torch.testing.assert_close(torch.cat([part[2] for part in parts], 1) / 2, gradient)
    assert not torch.allclose(parts[0][2] / 2, gradient[:, :4] * 0)


def _cache(rank, samples, folder):
    torch.manual_seed(0)
    backbone = Backbone("test_resnet", pretrained=False)
    cache = FeatureCache(samples, backbone, 64, folder / "features", batch_size=2)
    times = {file.name: file.stat().st_mtime_ns for file in cache.path.glob("*.npy")}
    (folder / f"{rank}.json").write_text(json.dumps([times, float(cache.batch([3])[0].sum())]))


def test_processes_share_one_cache(tmp_path):
    samples = []
    for i in range(12):
        Image.fromarray(striped(i)).save(tmp_path / f"{i}.png")
        samples.append(Sample(tmp_path / f"{i}.png", "stripes"))
    mp.spawn(_cache, (samples, tmp_path), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert [path.name for path in (tmp_path / "features").iterdir()] == [next((tmp_path / "features").iterdir()).name]
