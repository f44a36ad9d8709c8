"""Selects the pocket model's training data: the emoji, their names in captions, and which are held out.

Image files in `@lobehub/fluent-emoji-3d` are named by code point. Names come from `emoji-datasource-google`;
`WORLD` replaces them by simpler ones for the U-Net's subjects. The number of subjects is small on purpose:
from a few hundred subjects that are recognisable at 64 pixels, with several hundred views each, a small U-Net
learns shapes; from thousands of subjects with a few dozen views each it learns colours only.
"""

from __future__ import annotations

import json
import random
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "pocket"
PACKAGES = {"pictures": "@lobehub/fluent-emoji-3d@1.1.0", "names": "emoji-datasource-google@16.0.0"}

# The demo's subject: the nine faces of the subcategory cat-face, and "cat face"; no stage trains on them.
CAT_FACES = ("1f431", "1f638", "1f639", "1f63a", "1f63b", "1f63c", "1f63d", "1f63e", "1f63f", "1f640")
# Two more families are held out for tests: monkey faces, and all hearts of the category Smileys.
MONKEY_FACES = ("1f435", "1f648", "1f649", "1f64a")
HEART_SUBCATEGORIES = ("heart", "emotion")
HELD_OUT_SHARE = 0.05
HELD_OUT_SEED = 20

# code point -> name in captions
# fmt: off
WORLD = {
    # plants
    "1f332": "evergreen tree", "1f333": "green tree", "1f334": "palm tree", "1f335": "cactus",
    "1f340": "four leaf clover", "1f341": "maple leaf", "1f344": "red mushroom", "1fab4": "potted plant",
    "1f337": "pink tulip", "1f338": "cherry blossom", "1f339": "red rose", "1f33b": "sunflower",
    "1fab7": "lotus flower", "1f33a": "hibiscus flower",
    # animals with four legs
    "1f401": "mouse", "1f404": "cow", "1f405": "tiger", "1f407": "rabbit", "1f408-200d-2b1b": "black cat",
    "1f408": "cat", "1f40e": "horse", "1f411": "sheep", "1f412": "monkey", "1f415": "dog", "1f416": "pig",
    "1f418": "elephant", "1f428": "koala", "1f429": "poodle", "1f42a": "camel", "1f42d": "mouse face",
    "1f42e": "cow face", "1f42f": "tiger face", "1f430": "rabbit face", "1f434": "horse face",
    "1f436": "dog face", "1f437": "pig face", "1f439": "hamster face", "1f43a": "wolf face",
    "1f43b-200d-2744-fe0f": "polar bear face", "1f43b": "bear face", "1f43c": "panda face",
    "1f43e": "paw prints", "1f43f-fe0f": "squirrel", "1f981": "lion face", "1f984": "unicorn face",
    "1f987": "bat", "1f98a": "fox face", "1f98c": "deer", "1f98d": "gorilla", "1f98f": "rhinoceros",
    "1f992": "giraffe", "1f993": "zebra", "1f994": "hedgehog", "1f998": "kangaroo", "1f999": "llama",
    "1f99b": "hippopotamus", "1f99d": "raccoon", "1f9a5": "sloth", "1f9a3": "mammoth",
    # reptiles, sea animals, insects, birds
    "1f432": "dragon face", "1f40a": "crocodile", "1f40d": "snake", "1f422": "turtle", "1f98e": "lizard",
    "1f995": "long necked dinosaur", "1f996": "green dinosaur", "1f438": "frog face", "1f433": "whale",
    "1f419": "octopus", "1f41a": "seashell", "1f41f": "fish", "1f420": "tropical fish",
    "1f421": "puffer fish", "1f42c": "dolphin", "1f980": "crab", "1f988": "shark", "1f990": "shrimp",
    "1f991": "squid", "1f99e": "lobster", "1f9ad": "seal", "1fabc": "jellyfish", "1f40c": "snail",
    "1f41b": "caterpillar", "1f41c": "ant", "1f41d": "bee", "1f41e": "ladybug", "1f577-fe0f": "spider",
    "1f98b": "butterfly", "1f982": "scorpion", "1f413": "rooster", "1f414": "chicken",
    "1f423": "hatching chick", "1f425": "yellow chick", "1f426": "red bird", "1f427": "penguin",
    "1f54a-fe0f": "white dove", "1f985": "eagle", "1f986": "duck", "1f989": "owl", "1f99a": "peacock",
    "1f99c": "parrot", "1f9a2": "swan", "1f9a9": "flamingo", "1f983": "turkey",
    # food
    "1f32d": "hot dog", "1f32e": "taco", "1f354": "hamburger", "1f355": "slice of pizza",
    "1f356": "meat on a bone", "1f357": "chicken leg", "1f35e": "loaf of bread", "1f35f": "french fries",
    "1f373": "fried egg", "1f37f": "popcorn", "1f950": "croissant", "1f953": "bacon", "1f957": "green salad",
    "1f95a": "egg", "1f95e": "pancakes", "1f968": "pretzel", "1f96a": "sandwich", "1f9c0": "cheese",
    "1f9c7": "waffle", "1f336-fe0f": "red pepper", "1f33d": "ear of corn", "1f346": "eggplant",
    "1f951": "avocado", "1f955": "carrot", "1f966": "broccoli", "1f9c4": "garlic", "1f9c5": "onion",
    "1f954": "potato", "1f345": "tomato", "1f347": "grapes", "1f349": "slice of watermelon", "1f34a": "orange",
    "1f34b": "lemon", "1f34c": "banana", "1f34d": "pineapple", "1f34e": "red apple", "1f34f": "green apple",
    "1f350": "pear", "1f351": "peach", "1f352": "cherries", "1f353": "strawberry", "1f95d": "kiwi",
    "1f965": "coconut", "1fad0": "blueberries", "1f96d": "mango", "1f359": "rice ball", "1f35d": "spaghetti",
    "1f363": "sushi", "1f364": "fried shrimp", "1f366": "ice cream cone", "1f368": "bowl of ice cream",
    "1f369": "doughnut", "1f36a": "cookie", "1f36b": "chocolate bar", "1f36c": "candy", "1f36d": "lollipop",
    "1f36e": "custard", "1f36f": "honey pot", "1f370": "slice of cake", "1f382": "birthday cake",
    "1f9c1": "cupcake", "1f377": "glass of red wine", "1f378": "cocktail", "1f37a": "mug of beer",
    "1f95b": "glass of milk", "1f964": "cup with a straw", "2615": "cup of coffee", "1fad6": "teapot",
    # objects
    "1f697": "red car", "1f695": "yellow taxi", "1f68c": "bus", "1f692": "fire engine", "1f691": "ambulance",
    "1f682": "steam train", "1f69c": "tractor", "1f6b2": "bicycle", "1f680": "rocket", "1f681": "helicopter",
    "2708-fe0f": "airplane", "26f5": "sailing boat", "1f3e0": "house", "1f3f0": "castle",
    "2602-fe0f": "umbrella", "1f451": "golden crown", "1f3b8": "guitar", "26bd": "soccer ball",
    "1f3c0": "basketball", "1f388": "red balloon", "1f381": "gift box", "1f9f8": "teddy bear",
    "26c4": "snowman", "1f383": "pumpkin lantern", "1f3c6": "golden trophy", "1f3a9": "top hat",
}
# fmt: on

# Subjects for the VAE and CLIP only: they resemble another subject, or their shape is hard to recognise at 64
# pixels. A small U-Net generates clearly better images of half as many subjects.
# fmt: off
SET_ASIDE = frozenset((
    "hibiscus flower", "lotus flower", "potted plant", "mouse", "tiger", "rabbit", "horse", "monkey", "pig",
    "poodle", "polar bear face", "hamster face", "wolf face", "paw prints", "squirrel", "bat", "deer", "gorilla",
    "rhinoceros", "hedgehog", "kangaroo", "llama", "raccoon", "sloth", "mammoth", "crocodile", "lizard",
    "green dinosaur", "tropical fish", "puffer fish", "squid", "seal", "caterpillar", "ant", "scorpion", "chicken",
    "eagle", "peacock", "turkey", "taco", "meat on a bone", "chicken leg", "bacon", "green salad", "pretzel",
    "sandwich", "garlic", "onion", "potato", "coconut", "mango", "rice ball", "spaghetti", "fried shrimp",
    "bowl of ice cream", "candy", "custard", "honey pot", "chocolate bar", "glass of milk", "fire engine",
    "ambulance", "steam train", "tractor", "bicycle", "helicopter",
))
# fmt: on

# Categories of further subjects for the VAE and CLIP.
WIDE_CATEGORIES = ("Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects",
                   "Smileys & Emotion")  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """One emoji: its code point, its name in captions, its image file, and its part of the data."""

    code: str
    name: str
    path: Path
    part: str  # "train", "held_out" (the random 5%) or "wide" (VAE and CLIP only)


def fetch_packages() -> tuple[Path, Path]:
    """Download and unpack the two npm packages if missing; return the image folder and emoji.json."""
    found = []
    for kind, spec in PACKAGES.items():
        folder = CACHE / "npm" / kind
        if not (folder / "package" / "package.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            done = subprocess.run(
                ["npm", "pack", "--silent", spec], cwd=folder, check=True, capture_output=True
            )
            with tarfile.open(folder / done.stdout.decode().split()[-1]) as archive:
                archive.extractall(folder, filter="data")
        found.append(folder / "package")
    return found[0] / "assets", found[1] / "emoji.json"


def _strip_code(code: str) -> str:
    """Return a code point sequence in a form that is equal for both packages."""
    parts = [part.lstrip("0") for part in code.lower().split("-") if part != "fe0f"]
    return "-".join(parts)


def _is_family(entry: dict, code: str) -> bool:
    """Return whether an entry belongs to a family that is held out from all training."""
    name = f"{entry['name'] or ''} {entry['short_name']}".lower()
    return (
        code in CAT_FACES
        or code in MONKEY_FACES
        or entry["subcategory"] in ("cat-face", "monkey-face", *HEART_SUBCATEGORIES)
        or "heart" in name
    )


def list_subjects() -> list[Subject]:
    """Return all subjects in a fixed order: those of `WORLD` (train and held out), then the part "wide"."""
    assets, names = fetch_packages()
    images = {_strip_code(path.stem): path for path in sorted(assets.glob("*.webp"))}
    codes = sorted(WORLD)
    held = set(random.Random(HELD_OUT_SEED).sample(codes, round(HELD_OUT_SHARE * len(codes))))
    subjects = [
        Subject(code, WORLD[code], images[_strip_code(code)], "held_out" if code in held else "train")
        for code in codes
    ]
    known = {_strip_code(code) for code in codes}
    for entry in json.loads(names.read_text(encoding="utf-8")):
        code = _strip_code(entry["unified"])
        wanted = entry["category"] in WIDE_CATEGORIES and code in images and code not in known
        if wanted and not _is_family(entry, code):
            name = (entry["name"] or entry["short_name"]).lower().replace("-", " ").replace("_", " ")
            subjects.append(Subject(code, name, images[code], "wide"))
    return subjects


def find_family(codes: tuple[str, ...]) -> list[Path]:
    """Return the image files of a held-out family, for the demo and the tests only."""
    assets, _ = fetch_packages()
    return [assets / f"{code}.webp" for code in codes]
