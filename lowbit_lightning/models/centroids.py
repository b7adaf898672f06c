"""A linear head that starts as the nearest-centroid classifier instead of at random.

Forward-only training makes small steps in a noisy direction: from a random head it spends thousands of forward passes
on what one pass over a few examples gives exactly. Class means are also the honest zero-shot baseline of fine-tuning.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

_SCALES = torch.logspace(-3, 3, 121, dtype=torch.float64)  # steps of 12 %; the loss is flat around its minimum


def centroid_head(features: Tensor, labels: Tensor, num_labels: int) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the linear layer whose largest logit is that of the nearest class mean.

    ``-s |x - c|² / 2`` is linear in x but for a term that all classes share. The scale s, which decides no prediction,
    is the one with the least cross-entropy on these features, each compared with class means that leave itself out, so
    that training starts from calibrated probabilities: in as many dimensions as there are examples, means fit those
    they are made of perfectly, and the best scale would be without end.

    Args:
        features: (examples, width), any floating dtype.
        labels: (examples,) int64; every class must occur.
        num_labels: number of classes.

    Returns:
        Weight (num_labels, width) and bias (num_labels,), fp32.
    """
    features = features.double()
    members = torch.nn.functional.one_hot(labels, num_labels).double()
    counts = members.sum(0)
    centroids = members.T @ features / counts[:, None]
    center = centroids.mean(0)
    weight = centroids - center
    bias = (center.square().sum() - centroids.square().sum(1)) / 2
    # Without x itself its class mean is n/(n - 1) times as far away. A class of one has no mean then.
    compared = counts[labels] > 1
    away = torch.where(members.bool(), (counts / (counts - 1).clamp_min(1)).square(), 1.0)
    logits = (-torch.cdist(features, centroids).square() * away / 2)[compared]
    scales = _SCALES.to(logits.device) / (features @ weight.T).std().clamp_min(torch.finfo(torch.float64).tiny)
    scale = scales[len(scales) // 2]
    if compared.any():
        losses = torch.stack([cross_entropy(scale * logits, labels[compared]) for scale in scales])
        scale = scales[losses.argmin()]
    return (scale * weight).float(), (scale * bias).float()
