"""The metric ``fidelity``: likeness to the subject, minus penalties for what likeness alone would reward.

1 is as alike as real images are to each other, with every prompt followed, nothing copied and the class unchanged; 0
is the untuned model. With x_i the previews of prompt p, x0_i the untuned model's images of the same prompts and seeds,
y real images of the subject, t training images, z and z0 images of the class prompt by the tuned and the untuned
model, and cos the cosine similarity of features::

    fidelity_i = subject_i - 1.5 prompt_p - copy_i - 0.5 class

    subject_i = (S(x_i) - S0) / (S1 - S0),   S(x) = mean over y of cos(x, y),   S0 = mean of S(x0),   S1 = mean of S(y)
    prompt_p  = clip((f - T) / (f - U), 0, 1),   f = (B + U) / 2
    copy_i    = clip((n_i - c) / (1 - c), 0, 1),   n_i = max over t of cos(x_i, t),   c = (1 + max(r, n0_i)) / 2
    class     = clip((mean of S(z) - mean of S(z0)) / (S1 - S0), 0, 1)

CLIP judges the prompts; CLIP and, where ``validation.dino`` is given, DINO judge the rest, and their terms are
averaged. The y are held-out images, or training images if none are held out; where masks exist, their background is
replaced by CLIP's mean colour in S. T, B and U are the mean CLIP-T of prompt p for the previews, the untuned model's
images, and the real images, which show the subject but were not made for the prompt. r is the largest similarity of a
training image to another real image, and n0_i that of x0_i to a training image. ``class`` is PRES of the DreamBooth
paper (arXiv 2208.12242, section 4.3) relative to the untuned model. The reasons: docs/searches.md, "Fidelity".
"""

from __future__ import annotations

import torch
from torch import Tensor

from dreamfleet.trainers.evaluation.fidelity import ScoredImages

PROMPT_WEIGHT = (
    1.5  # more than likeness can gain: a model that ignores its prompts is worse than the untuned one
)
COPY_WEIGHT = (
    1.0  # as much as likeness can gain: a model that only copies is worth no more than the untuned one
)
CLASS_WEIGHT = 0.5  # less: likeness is worth something even if the whole class takes it on
LEAST_RANGE = 0.05  # smallest difference of similarities that another is divided by
LEAST_PROMPT_RANGE = 0.02  # of CLIP-T: below it, CLIP cannot tell whether a prompt was followed
ALIKE = 0.999  # similarity of real images from which one counts as a duplicate of the other

# Shapes: N previews, R real images, M training images, Z class images, P features.


def fidelity(scored: ScoredImages) -> dict[str, Tensor]:
    """Return the score and its four terms, weighted, for each preview, ``[N]``.

    A preview whose features are not finite counts as unlike everything.
    """
    terms = [judge_terms(scored, judge) for judge in scored.judges]
    subject, copy, drift = (torch.stack(values).mean(dim=0) for values in zip(*terms, strict=True))
    prompt = PROMPT_WEIGHT * prompt_shortfall(scored)
    copy, drift = COPY_WEIGHT * copy, CLASS_WEIGHT * drift.expand(len(subject))
    return {
        "fidelity": subject - prompt - copy - drift,
        "fidelity_subject": subject,
        "fidelity_prompt": prompt,
        "fidelity_copy": copy,
        "fidelity_class": drift,
    }


def judge_terms(scored: ScoredImages, judge: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the terms of one judge: subject and copy ``[N]``, and class, a scalar."""
    subject_RP = scored.features(judge, "subject")

    def likeness(name: str) -> Tensor:
        return (_finite(scored.features(judge, name)) @ subject_RP.T).mean(dim=1)

    low = likeness("base").mean()
    num, whole = len(subject_RP), (subject_RP @ subject_RP.T)
    high = (whole.sum() - whole.trace()) / (num * (num - 1)) if num > 1 else torch.ones(())
    span = (high - low).clamp(min=LEAST_RANGE)
    subject = ((likeness("images") - low) / span).clamp(-1, 2)
    drift = torch.zeros(())
    if scored.class_images and scored.base_class_images:
        change = likeness("class_images").mean() - likeness("base_class_images").mean()
        drift = (change / span).clamp(0, 1)
    training_MP, real_RP = scored.features(judge, "training"), scored.features(judge, "real")
    images_NP, base_NP = (_finite(scored.features(judge, name)) for name in ("images", "base"))
    return subject, copied(images_NP, base_NP, training_MP, real_RP), drift


def prompt_shortfall(scored: ScoredImages) -> Tensor:
    """Return how far each preview's prompt is below its floor, 0 to 1 (ignored entirely), ``[N]``.

    The mean CLIP-T of a prompt's images is compared, since that of a single image varies with its seed. A prompt that
    the untuned model's images fit no better than the real images has no floor, such as one that names no scene.
    """
    tuned, base = _finite(scored.prompt_similarity()), _finite(scored.prompt_similarity("base"))
    unmade = (scored.features("clip", "real") @ scored.text_features().T).mean(dim=0)
    shortfall = torch.zeros(len(tuned))
    for prompt in dict.fromkeys(scored.prompts):
        rows = torch.tensor([each == prompt for each in scored.prompts])
        start, end = unmade[rows].mean(), base[rows].mean()
        if end - start >= LEAST_PROMPT_RANGE:
            floor = (start + end) / 2
            shortfall[rows] = ((floor - tuned[rows].mean()) / (floor - start)).clamp(0, 1)
    return shortfall


def copied(images_NP: Tensor, base_NP: Tensor, training_MP: Tensor, real_RP: Tensor) -> Tensor:
    """Return how near each image is to an exact copy of a training image, 0 to 1 (a copy), ``[N]``.

    0 up to halfway between the larger of two references and 1: the largest similarity of a training image to a
    different real image, and the largest of the untuned model's image to a training image, which may show the same
    scene. 0 for all if no two real images differ.
    """
    among = torch.cat([training_MP, real_RP]) @ training_MP.T
    different = among[among < ALIKE]
    if not len(different):
        return torch.zeros(len(images_NP))
    nearest_N, usual_N = ((images @ training_MP.T).max(dim=1).values for images in (images_NP, base_NP))
    limit_N = (1 + usual_N.clamp(min=float(different.max()))) / 2
    return ((nearest_N - limit_N) / (1 - limit_N).clamp(min=1e-6)).clamp(0, 1)


def _finite(values: Tensor) -> Tensor:
    return values.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
