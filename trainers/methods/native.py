"""Native training: fine-tunes the model on captioned images with the objective of its original training.

Sources: Rombach et al. 2022 (arXiv 2112.10752); naifu-diffusion and kohya's `fine_tune.py` for buckets, tags,
long prompts, masks, noise schedules and weight averages, which other recipe sections configure for every
method.
"""

from __future__ import annotations

from dreamfleet.trainers.methods.whole_model import WholeModelMethod


class Native(WholeModelMethod):
    """Fine-tune the model on a set of captioned images. Exports a whole checkpoint, or a LoRA."""
