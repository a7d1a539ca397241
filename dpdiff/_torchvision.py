"""Make torchvision importable beside a torch that its compiled operators were not built for.

On Linux the torchvision of PyPI belongs to the CUDA build of torch. Beside a CPU-only torch its shared library can't
be loaded, and its Python code then fails with "operator torchvision::nms does not exist" when it registers fake
kernels for two operators that the library would have defined. Neither this project nor what it takes from timm,
torchmetrics and Lightning calls them, so defining their schemas is enough for everything else to work. Where
`import torchvision` succeeds, nothing is touched.
"""

import torch

_MISSING = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

try:
    import torchvision
except RuntimeError as error:
    if "torchvision::" not in str(error):
        raise
    _library = torch.library.Library("torchvision", "FRAGMENT")  # the definitions live as long as this object
    for _schema in _MISSING:
        _library.define(_schema)
    import torchvision  # noqa: F401
