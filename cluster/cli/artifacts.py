"""Commands on artifacts: sample, score, export, convert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dreamfleet.cluster.cli.base import AsJson, Verbose, local_path, print_json, work


def export(
    run_or_checkpoint: Annotated[
        str, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="A run, or one checkpoint in it.")
    ],
    format: Annotated[
        list[str],
        typer.Option(
            "--format",
            help="Format to write; repeatable. Whole models: diffusers, safetensors, ckpt. LoRA: diffusers_lora, "
            "kohya_lora. Embeddings: pt, safetensors, bin, png, webp, avif, jxl, kohya. Others: pt. optim: pt and the "
            "optimizer state beside it, to continue training in the webui.",
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option(help="Folder for the artifacts; default: the run's exports/.", show_default=False),
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Export a run's artifacts in other formats.

    From the newest checkpoint of a run, or from the given one.
    """
    with work():
        from dreamfleet.trainers.run.export import export_run

        written = export_run(run_or_checkpoint, format, out)
    _print_paths(written, as_json)


def convert(
    source: Annotated[
        Path,
        typer.Argument(metavar="IN", parser=local_path, help="An artifact of any kind."),
    ],
    target: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            parser=local_path,
            help="Output path; its suffix selects the format, and no suffix writes a folder.",
        ),
    ],
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Convert an artifact to another format.

    Embeddings: .pt .bin .safetensors .png .webp .avif .jxl. Hypernetworks and aesthetic vectors: .pt, also from older
    forms. LoRA: .safetensors, from kohya's layout to diffusers' or back. Models: diffusers folder, .safetensors, .ckpt.
    Classifiers: transformers folder, .pth. Kinds from installed packages: their own formats.
    """
    with work():
        from dreamfleet.trainers.artifacts.conversion import convert_artifact

        written = convert_artifact(source, target)
    _print_paths([str(written)], as_json)


def score(
    run_or_folder: Annotated[
        str, typer.Argument(metavar="RUN_OR_FOLDER", help="Run, artifact or folder of images.")
    ],
    real: Annotated[
        str | None, typer.Option(help="Folder of real images of the subject.", show_default=False)
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Prompt of the images; repeatable.", show_default=False),
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option(help="CLIP that computes the scores: pocket or a folder.", show_default=False),
    ] = None,
    dino: Annotated[
        str | None, typer.Option(help="Folder of a DINO model, for the DINO score.", show_default=False)
    ] = None,
    num_images: Annotated[int, typer.Option(min=1, help="Images per prompt, for a run or model.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first image.")] = 0,
    model: Annotated[
        str, typer.Option(help="Base model of an artifact outside a run's exports/.")
    ] = "pocket",
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Score images: subject and prompt fidelity.

    CLIP-I and DINO compare with real images, CLIP-T with the prompts.
    """
    with work():
        from dreamfleet.trainers.evaluation.score import score_run

        scores = score_run(
            run_or_folder,
            clip=clip,
            dino=dino,
            real=real,
            prompts=prompt,
            num_images=num_images,
            seed=seed,
            model=model,
        )
    if as_json:
        print_json(scores)
        return
    for name, value in scores.items():
        if value is not None:
            print(f"{name:<20} {value:.4f}" if isinstance(value, float) else f"{name:<20} {value}")


def sample(
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="Prompt in the webui's syntax; repeatable, one row of the grid each.",
            show_default=False,
        ),
    ] = None,
    prompt_file: Annotated[
        str | None,
        typer.Option(
            "--prompt-file",
            "--prompts",
            help="File of prompts, one per line, with kohya's options: a cat --n blurry --w 512 --h 768 --d 3 --s 30 "
            "--l 7 --ss euler_a.",
            show_default=False,
        ),
    ] = None,
    plain_prompts: Annotated[
        bool, typer.Option("--plain-prompts", help="Prompts are literal text, without the webui's syntax.")
    ] = False,
    model: Annotated[
        str, typer.Option(help="pocket, a diffusers folder, a run folder, or a single file.")
    ] = "pocket",
    embedding: Annotated[
        list[str] | None,
        typer.Option(
            help="Textual Inversion file; its name is the word. NAME-neg.pt beside NAME.pt joins the negative "
            "prompt wherever the prompt contains NAME.",
            show_default=False,
        ),
    ] = None,
    hypernetwork: Annotated[
        list[str] | None,
        typer.Option(help="Hypernetwork file, F or F:0.8, applied in order; repeatable.", show_default=False),
    ] = None,
    hypernetwork_dir: Annotated[
        str | None,
        typer.Option(
            help="Folder of the files that prompts name as <hypernet:NAME:0.8>.", show_default=False
        ),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(help="LoRA file, F or F:0.8, applied in order; repeatable.", show_default=False),
    ] = None,
    lora_dir: Annotated[
        str | None,
        typer.Option(help="Folder of the files that prompts name as <lora:NAME:0.8>.", show_default=False),
    ] = None,
    artifact: Annotated[
        list[str] | None,
        typer.Option(
            help="Artifact of any kind, F or F:0.8, whose kind is detected; also kinds that installed packages add; "
            "repeatable.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            metavar="PATH",
            parser=local_path,
            help="Grid to write; a .png records how it was generated, as the webui's do.",
        ),
    ] = Path("grid.png"),
    out_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            parser=local_path,
            help="Folder for the single images: 00000-SEED.png and so on, as in the webui.",
            show_default=False,
        ),
    ] = None,
    negative_prompt: Annotated[str, typer.Option(help="Negative prompt.")] = "",
    num_images: Annotated[int, typer.Option(min=1, help="Images per prompt, one column each.")] = 4,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the first column; each further column adds 1.")
    ] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 25,
    guidance_scale: Annotated[
        float, typer.Option(help="Weight of the prompt in classifier-free guidance.")
    ] = 7.5,
    scheduler: Annotated[
        str, typer.Option(help="ddim, euler_a or dpm++; the webui's DDIM, Euler a, DPM++ 2M Karras too.")
    ] = "ddim",
    width: Annotated[
        int | None, typer.Option(help="Pixels; default: the model's own size.", show_default=False)
    ] = None,
    height: Annotated[
        int | None, typer.Option(help="Pixels; default: the model's own size.", show_default=False)
    ] = None,
    clip_skip: Annotated[
        int | None, typer.Option(min=1, max=12, help="2: the last but one layer of CLIP.", show_default=False)
    ] = None,
    max_token_length: Annotated[
        int | None,
        typer.Option(
            min=75, help="Pad prompts to 150 or 225 tokens; longer prompts use more.", show_default=False
        ),
    ] = None,
    aesthetic: Annotated[
        str | None,
        typer.Option(help="Aesthetic vector file; prompts are tuned towards it.", show_default=False),
    ] = None,
    aesthetic_steps: Annotated[int, typer.Option(help="Tuning steps per prompt.")] = 5,
    aesthetic_lr: Annotated[float, typer.Option(help="Learning rate of the tuning steps.")] = 1e-4,
    aesthetic_weight: Annotated[float, typer.Option(help="Weight of the tuned encoding, 0 to 1.")] = 0.9,
    aesthetic_slerp: Annotated[
        str, typer.Option(help="Spherical interpolation: off, over channels, or over tokens as in the webui.")
    ] = "off",
    aesthetic_text: Annotated[
        str, typer.Option(help="Rotate the vector towards this text.", show_default=False)
    ] = "",
    aesthetic_text_negative: Annotated[
        bool, typer.Option("--aesthetic-text-negative", help="Rotate it away from the text.")
    ] = False,
    aesthetic_slerp_angle: Annotated[float, typer.Option(help="How far it is rotated, 0 to 1.")] = 0.1,
    aesthetic_clip: Annotated[
        str | None,
        typer.Option(
            help="CLIP of the text encoder; found automatically for pocket and SD 1.x.", show_default=False
        ),
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Generate a grid of images with any model, run or artifact."""
    with work():
        from dreamfleet.cluster.sample_grid import GridRequest, draw_grid
        from dreamfleet.trainers.config.image_request import ImageRequest
        from dreamfleet.trainers.config.samplers import plain_sampler
        from dreamfleet.trainers.models.stable_diffusion.aesthetic import AestheticSettings

        request = GridRequest(
            out=out,
            out_dir=out_dir,
            model=model,
            prompts=prompt or [],
            prompt_file=prompt_file,
            num_images=num_images,
            defaults=ImageRequest(
                negative_prompt=negative_prompt,
                seed=seed,
                steps=steps,
                guidance_scale=guidance_scale,
                scheduler=plain_sampler(scheduler),
                width=width,
                height=height,
                plain=plain_prompts,
            ),
            embeddings=embedding or [],
            hypernetworks=hypernetwork or [],
            hypernetwork_dir=hypernetwork_dir,
            loras=lora or [],
            lora_dir=lora_dir,
            aesthetic=aesthetic,
            aesthetic_settings=AestheticSettings(
                steps=aesthetic_steps,
                learning_rate=aesthetic_lr,
                weight=aesthetic_weight,
                slerp=aesthetic_slerp,  # type: ignore[arg-type]  # checked by the class
                text=aesthetic_text,
                text_negative=aesthetic_text_negative,
                slerp_angle=aesthetic_slerp_angle,
            ),
            aesthetic_clip=aesthetic_clip,
            artifacts=artifact or [],
            clip_skip=clip_skip,
            max_token_length=max_token_length,
        )
        cells = draw_grid(request)
    if as_json:
        print_json({"out": str(out), "pictures": cells})
    else:
        print(out)


def _print_paths(paths: list[str], as_json: bool) -> None:
    if as_json:
        print_json(paths)
    else:
        print("\n".join(paths))
