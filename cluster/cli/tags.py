"""The command `data tags`: lists and edits tags."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dreamfleet.cluster.cli.base import AsJson, CaptionColumn, Verbose, print_json, work

if TYPE_CHECKING:
    from dreamfleet.datasets.tools.tags import Edited


def tags(
    folder: Annotated[
        str, typer.Argument(metavar="FOLDER", help="A folder of images with captions, local or s3://.")
    ],
    add: Annotated[
        list[str] | None, typer.Option(help="A tag to append; repeatable.", show_default=False)
    ] = None,
    prepend: Annotated[
        list[str] | None, typer.Option(help="A tag to prepend; repeatable.", show_default=False)
    ] = None,
    remove: Annotated[
        list[str] | None,
        typer.Option(help="A tag to remove, with * as wildcard; repeatable.", show_default=False),
    ] = None,
    replace: Annotated[
        list[str] | None,
        typer.Option(
            help="OLD=NEW (or OLD=>NEW), with * as wildcard in OLD; repeatable.", show_default=False
        ),
    ] = None,
    trigger: Annotated[str, typer.Option(help="A word that is put first, once.", show_default=False)] = "",
    dedupe: Annotated[bool, typer.Option("--dedupe", help="Remove repeated tags.")] = False,
    sort: Annotated[bool, typer.Option("--sort", help="Sort alphabetically.")] = False,
    spaces: Annotated[
        bool, typer.Option("--underscores-to-spaces", help="Except in emoticons such as >_<.")
    ] = False,
    escape: Annotated[bool, typer.Option("--escape-brackets", help=r"( becomes \(.")] = False,
    create: Annotated[
        bool, typer.Option("--create", help="Also create captions for images without one.")
    ] = False,
    out: Annotated[
        str | None, typer.Option(help="Write the captions into this new folder.", show_default=False)
    ] = None,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Overwrite the captions, after a backup.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the changes only.")] = False,
    top: Annotated[int, typer.Option(min=1, help="Number of tags to list.")] = 100,
    caption_column: CaptionColumn = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """List the tags of captions with their counts, or edit them.

    Order: spaces, replace, remove, dedupe, sort, prepend, add, trigger, escape. Images are not changed.
    """
    with work():
        from dreamfleet.datasets.errors import DataError
        from dreamfleet.datasets.tools.tags import Edit, edit_folder, parse_replacement

        edit = Edit(
            spaces=spaces,
            replace=tuple(parse_replacement(text) for text in replace or ()),
            remove=tuple(remove or ()),
            add=tuple(add or ()),
            prepend=tuple(prepend or ()),
            dedupe=dedupe,
            sort=sort,
            trigger=trigger,
            escape=escape,
        )
        if edit.changes and (out is not None) + in_place + dry_run != 1:
            raise DataError(
                "choose where edited captions are written: one of --in-place, --out FOLDER, --dry-run"
            )
        made = edit_folder(
            folder, edit, out=out, dry_run=dry_run, create=create, caption_column=caption_column
        )
    if as_json:
        print_json(made._asdict())
    elif edit.changes:
        _print(made, dry_run)
    else:
        print("\n".join(f"{count:>6}  {tag}" for tag, count in list(made.tags.items())[:top]))


def _print(made: Edited, dry_run: bool) -> None:
    for name, texts in made.changed.items() if dry_run else ():
        print(f"{name}\n- {texts['before']}\n+ {texts['after']}")
    verb = "would change" if dry_run else "changed"
    print(f"{verb} {len(made.changed)} of {made.captions} captions; {made.without} images have none")
    if made.backup:
        print(f"backup     {made.backup}")
