"""The command that encodes pictures once for all runs: data cache."""

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
    """Encode a recipe's pictures into data.cache_dir, for every later run to read.

    scaling.num_workers actors encode, on GPUs where there are any; 0 encodes in this process. Only pictures that are
    new, changed, or wanted at another size are encoded; the same again goes on where it stopped.
    """
    with work(), counting("pictures") as progress:
        from dreamfleet.trainers.driver.build_cache import cache_latents
        from dreamfleet.trainers.recipe import load_recipe

        loaded = load_recipe(recipe, overrides or [])
        made = cache_latents(loaded, address=address, shared=shared or (), progress=progress)
    if as_json:
        print_json({**plain(made), "pictures_per_second": made.per_second})
        return
    print(f"cache      {made.cache}")
    print(f"pictures   {made.pictures}")
    print(f"encoded    {made.encoded} in {made.seconds:.1f} s, {made.per_second:.1f} a second")
    print(f"reused     {made.reused}")
    print(f"bytes      {made.bytes}")
    left_out = list(made.left_out.items())
    for uri, reason in left_out[:SHOWN]:
        print(f"left out   {uri}: {reason}")
    if len(left_out) > SHOWN:
        print(f"left out   {len(left_out) - SHOWN} more (--json has all)")
