"""The command `data cache`: encodes images once for all runs."""

from __future__ import annotations

from dreamfleet.cluster.cli.base import (
    Address,
    AsJson,
    Overrides,
    RecipePath,
    Shared,
    Verbose,
    counting,
    plain,
    print_json,
    work,
)

SHOWN = 20


def cache(
    recipe: RecipePath,
    overrides: Overrides = None,
    address: Address = None,
    shared: Shared = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Encode a recipe's images into data.cache_dir, from which later runs read the latents.

    scaling.num_workers actors encode, on GPUs if there are any; 0 encodes in this process. The cache is keyed by file
    content and size: rerunning the command encodes only new or changed images.
    """
    with work(), counting("images") as progress:
        from dreamfleet.trainers.driver.build_cache import cache_latents
        from dreamfleet.trainers.recipe import load_recipe

        loaded = load_recipe(recipe, overrides or [])
        made = cache_latents(loaded, address=address, shared=shared or (), progress=progress)
    if as_json:
        print_json({**plain(made), "pictures_per_second": made.per_second})
        return
    print(f"cache      {made.cache}")
    print(f"images     {made.pictures}")
    print(f"encoded    {made.encoded} in {made.seconds:.1f} s, {made.per_second:.1f} per second")
    print(f"reused     {made.reused}")
    print(f"bytes      {made.bytes}")
    left_out = list(made.left_out.items())
    for uri, reason in left_out[:SHOWN]:
        print(f"skipped    {uri}: {reason}")
    if len(left_out) > SHOWN:
        print(f"skipped    {len(left_out) - SHOWN} more (all with --json)")
