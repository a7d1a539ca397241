"""DPDiff-AD and DLSR: anomaly and out-of-distribution detectors on the operators of dpdiff_kernels."""

import dpdiff._torchvision  # noqa: F401  (before anything that imports torchvision)
from dpdiff.detector import Prediction
from dpdiff.dlsr import DLSR
from dpdiff.dpdiff_ad import DPDiffAD
from dpdiff.serialization import load, save

__all__ = ["DLSR", "DPDiffAD", "Prediction", "load", "save"]
