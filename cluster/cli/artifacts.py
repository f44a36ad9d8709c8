"""Commands on what runs leave behind: sample, score, export, convert."""

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
            help="What to write; repeatable. Whole models: diffusers, safetensors, ckpt. Words: pt, safetensors, bin, "
            "png, webp, avif, jxl, kohya. Others: pt. optim: pt and the optimizer beside it, to train on in the webui.",
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option(help="Folder for the artefacts; the run's exports/ when left out.", show_default=False),
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Write a run's artifacts in other formats.

    From the newest checkpoint of a run, or from the one given.
    """
    with work():
        from dreamfleet.trainers.run.export import export_run

        written = export_run(run_or_checkpoint, format, out)
    _print_paths(written, as_json)


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN", parser=local_path, help="An embedding, a hypernetwork, a LoRA or a model."
        ),
    ],
    target: Annotated[
        Path, typer.Argument(metavar="OUT", parser=local_path, help="The same in the format its name says.")
    ],
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Convert an embedding, a hypernetwork, an aesthetic vector, a LoRA or a model to another format.

    Embeddings: .pt .bin .safetensors .png .webp .avif .jxl. Hypernetworks and aesthetic vectors: .pt, also from older
    forms. LoRA: .safetensors, from kohya's layout to diffusers' or back. Models: diffusers folder, .safetensors, .ckpt.
    """
    with work():
        from dreamfleet.trainers.artifacts.conversion import convert_artifact

        written = convert_artifact(source, target)
    _print_paths([str(written)], as_json)


def score(
    run_or_folder: Annotated[
        str, typer.Argument(metavar="RUN_OR_FOLDER", help="Run, artefact or folder of pictures.")
    ],
    real: Annotated[
        str | None, typer.Option(help="Folder of real pictures of the subject.", show_default=False)
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="What the pictures were asked to show; repeatable.", show_default=False),
    ] = None,
    clip: Annotated[
        str | None, typer.Option(help="CLIP to judge by: pocket or a folder.", show_default=False)
    ] = None,
    dino: Annotated[
        str | None, typer.Option(help="Folder of a DINO model, to judge by it too.", show_default=False)
    ] = None,
    num_images: Annotated[int, typer.Option(min=1, help="Pictures drawn per prompt of a run or model.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first of them.")] = 0,
    model: Annotated[
        str, typer.Option(help="What draws with an artefact that lies in no run's exports/.")
    ] = "pocket",
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Measure images: true to subject, true to prompts.

    CLIP-I and DINO compare with real images, CLIP-T with the prompts.
    """
    with work():
        from dreamfleet.trainers.evaluation.score import score_run

        told = score_run(
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
        print_json(told)
        return
    for name, value in told.items():
        if value is not None:
            print(f"{name:<20} {value:.4f}" if isinstance(value, float) else f"{name:<20} {value}")


def sample(
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="What to draw, in the webui's syntax; repeatable, a row of the grid each.",
            show_default=False,
        ),
    ] = None,
    prompt_file: Annotated[
        str | None,
        typer.Option(
            "--prompt-file",
            "--prompts",
            help="File of prompts, one a line, with kohya's options: a cat --n blurry --w 512 --h 768 --d 3 --s 30 "
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
            help="Textual Inversion file; its name is the word. A NAME-neg.pt beside NAME.pt joins the negative "
            "prompt wherever the prompt has NAME.",
            show_default=False,
        ),
    ] = None,
    hypernetwork: Annotated[
        list[str] | None,
        typer.Option(help="Hypernetwork file, F or F:0.8, in this order; repeatable.", show_default=False),
    ] = None,
    hypernetwork_dir: Annotated[
        str | None,
        typer.Option(help="Where prompts' <hypernet:NAME:0.8> are found.", show_default=False),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(help="LoRA file, F or F:0.8, in this order; repeatable.", show_default=False),
    ] = None,
    lora_dir: Annotated[
        str | None,
        typer.Option(help="Where prompts' <lora:NAME:0.8> are found.", show_default=False),
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
            help="The grid to write; a .png says how it was drawn, as the webui's do.",
        ),
    ] = Path("grid.png"),
    out_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            parser=local_path,
            help="Folder for each picture by itself too: 00000-SEED.png and so on, as in the webui.",
            show_default=False,
        ),
    ] = None,
    negative_prompt: Annotated[str, typer.Option(help="What not to draw.")] = "",
    num_images: Annotated[int, typer.Option(min=1, help="Pictures per prompt, a column each.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first column; the next ones count up.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 25,
    guidance_scale: Annotated[float, typer.Option(help="How much the prompt is insisted on.")] = 7.5,
    scheduler: Annotated[
        str, typer.Option(help="ddim, euler_a or dpm++; the webui's DDIM, Euler a, DPM++ 2M Karras too.")
    ] = "ddim",
    width: Annotated[
        int | None, typer.Option(help="Pixels; the model's own size when left out.", show_default=False)
    ] = None,
    height: Annotated[
        int | None, typer.Option(help="Pixels; the model's own size when left out.", show_default=False)
    ] = None,
    clip_skip: Annotated[
        int | None, typer.Option(min=1, max=12, help="2: CLIP's last layer but one.", show_default=False)
    ] = None,
    max_token_length: Annotated[
        int | None,
        typer.Option(
            min=75, help="Pad prompts to 150 or 225 tokens; longer ones get more anyway.", show_default=False
        ),
    ] = None,
    aesthetic: Annotated[
        str | None,
        typer.Option(help="Aesthetic vector file; prompts are tuned towards it.", show_default=False),
    ] = None,
    aesthetic_steps: Annotated[int, typer.Option(help="Steps a prompt is tuned; each takes time.")] = 5,
    aesthetic_lr: Annotated[float, typer.Option(help="Learning rate of these steps.")] = 1e-4,
    aesthetic_weight: Annotated[float, typer.Option(help="Share of the tuned encoding, 0 to 1.")] = 0.9,
    aesthetic_slerp: Annotated[
        str, typer.Option(help="Mix on an arc: off, channels, or tokens as in the webui.")
    ] = "off",
    aesthetic_text: Annotated[
        str, typer.Option(help="Bend the vector towards this text.", show_default=False)
    ] = "",
    aesthetic_text_negative: Annotated[
        bool, typer.Option("--aesthetic-text-negative", help="Bend it away from the text.")
    ] = False,
    aesthetic_slerp_angle: Annotated[float, typer.Option(help="How far it is bent, 0 to 1.")] = 0.1,
    aesthetic_clip: Annotated[
        str | None,
        typer.Option(help="CLIP of the text encoder; found for pocket and SD 1.x.", show_default=False),
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Draw a grid of images with any model or run."""
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
