from dpdiff.data.dataset import AnomalyDataset
from dpdiff.data.folder import scan
from dpdiff.data.images import check, load_image, load_mask
from dpdiff.data.samples import Catalogue, Sample, walk_images

__all__ = ["AnomalyDataset", "Catalogue", "Sample", "check", "load_image", "load_mask", "scan", "walk_images"]
