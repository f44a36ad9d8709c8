"""The metric ``fidelity``: likeness to the subject, minus penalties for what likeness alone would reward.

For every preview i of prompt p, with x a preview, y a real image of the subject, t a training image, z an image of the
class prompt, and cos the cosine similarity of features::

    fidelity_i = subject_i - prompt_p - copy_i - class

    subject_i = mean over judges and y of cos(x_i, y)
    prompt_p  = 2 * clip((f_p - T_p) / max(|f_p|, 0.1), 0, 1),   f_p = B_p - 0.1 |B_p|
    copy_i    = 0.5 * mean over judges of clip((n_i - r) / (1 - r), 0, 1),   n_i = max over t of cos(x_i, t)
    class     = max(0, mean over judges, z and y of cos(z, y) - the same for the untuned model's z)

The judges are CLIP and, where ``validation.dino`` is given, DINO. The y are held-out images, or training images if
none are held out; where masks exist, the background of the y is replaced by CLIP's mean colour. T_p is the mean CLIP-T
of the previews of prompt p, and B_p that of the untuned model's images of the same prompt and seeds. r is the largest
similarity between a training image and another real image. The class term is PRES of the DreamBooth paper (arXiv
2208.12242, section 4.3), relative to the untuned model; it is 0 without a class prompt. The reasons of the constants:
docs/methods.md, "Fidelity".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dreamfleet.trainers.evaluation.fidelity import ScoredImages

PROMPT_FLOOR = 0.9  # share of the untuned model's CLIP-T below which previews are penalised
PROMPT_WEIGHT = 2.0  # penalty of a prompt that is ignored entirely, more than likeness can gain
LEAST_FLOOR = 0.1  # smallest floor that a shortfall is divided by
COPY_WEIGHT = 0.5  # penalty of an exact copy of a training image
ALIKE = 0.999  # similarity of real images from which one counts as a duplicate of the other

# Shapes: N previews, R real images, M training images, Z class images, P features.


def fidelity(scored: ScoredImages) -> dict[str, Tensor]:
    """Return the score and its terms for each preview, ``[N]``: fidelity is the subject minus the three penalties.

    A preview whose features are not finite counts as unlike everything.
    """
    judged = {judge: _finite(scored.features(judge)) for judge in scored.judges}
    subject = torch.stack(
        [(mine @ scored.features(judge, "subject").T).mean(dim=1) for judge, mine in judged.items()]
    ).mean(dim=0)
    copies = [
        copied(mine, scored.features(judge, "training"), scored.features(judge, "real"))
        for judge, mine in judged.items()
    ]
    prompt = PROMPT_WEIGHT * prompt_shortfall(
        scored.prompts, _finite(scored.prompt_similarity()), _finite(scored.prompt_similarity("base"))
    )
    copy = COPY_WEIGHT * torch.stack(copies).mean(dim=0)
    drift = class_drift(scored).expand(len(subject))
    return {
        "fidelity": subject - prompt - copy - drift,
        "fidelity_subject": subject,
        "fidelity_prompt": prompt,
        "fidelity_copy": copy,
        "fidelity_class": drift,
    }


def prompt_shortfall(prompts: Sequence[str], tuned: Tensor, base: Tensor) -> Tensor:
    """Return how far the mean CLIP-T of each preview's prompt is below its floor, 0 to 1, ``[N]``.

    ``tuned`` and ``base``: CLIP-T ``[N]`` of the previews and of the untuned model's images. The mean over the images
    of a prompt is compared, since that of a single image varies with its seed.
    """
    shortfall = torch.zeros(len(prompts))
    for prompt in dict.fromkeys(prompts):
        rows = torch.tensor([each == prompt for each in prompts])
        before = base[rows].mean()
        floor = before - (1 - PROMPT_FLOOR) * before.abs()
        shortfall[rows] = ((floor - tuned[rows].mean()) / floor.abs().clamp(min=LEAST_FLOOR)).clamp(0, 1)
    return shortfall


def copied(images_NP: Tensor, training_MP: Tensor, real_RP: Tensor) -> Tensor:
    """Return how much nearer each image is to a training image than real images are, 0 to 1 (a copy), ``[N]``.

    The reference is the largest similarity of a training image to a different real image; 0 for all if there is none.
    """
    among = torch.cat([training_MP, real_RP]) @ training_MP.T
    different = among[among < ALIKE]
    if not len(different):
        return torch.zeros(len(images_NP))
    reference = different.max()
    return ((images_NP @ training_MP.T).max(dim=1).values - reference).div(1 - reference).clamp(0, 1)


def class_drift(scored: ScoredImages) -> Tensor:
    """Return how much more the class images resemble the subject than the untuned model's do; 0 without any."""
    if not scored.class_images or not scored.base_class_images:
        return torch.zeros(())
    drifts = []
    for judge in scored.judges:
        subject_RP = scored.features(judge, "subject")
        tuned, base = (
            _finite(scored.features(judge, name)) @ subject_RP.T
            for name in ("class_images", "base_class_images")
        )
        drifts.append(tuned.mean() - base.mean())
    return torch.stack(drifts).mean().clamp(min=0)


def _finite(values: Tensor) -> Tensor:
    return values.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
