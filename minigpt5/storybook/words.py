"""How people call what the picture world has: other words for its things, places and times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")

NAMES = {
    "fox": ("fox", "red fox", "vixen"),
    "rabbit-face": ("rabbit", "bunny", "hare"),
    "penguin": ("penguin", "baby penguin"),
    "owl": ("owl", "night owl"),
    "elephant": ("elephant", "grey elephant"),
    "lion": ("lion", "king of the beasts"),
    "cat": ("cat", "kitty", "kitten"),
    "dog": ("dog", "puppy", "hound"),
    "cow-face": ("cow", "dairy cow"),
    "pig": ("pig", "piglet", "hog"),
    "horse": ("horse", "pony", "stallion"),
    "duck": ("duck", "duckling"),
    "bird": ("bird", "songbird", "birdie"),
    "turtle": ("turtle", "tortoise"),
    "frog": ("frog", "toad"),
    "whale": ("whale", "blue whale"),
    "bear": ("bear", "brown bear"),
    "panda": ("panda", "panda bear"),
    "tiger": ("tiger", "striped tiger"),
    "monkey": ("monkey", "ape", "chimp"),
    "mouse": ("mouse", "tiny mouse"),
    "chicken": ("chicken", "hen", "rooster"),
    "snail": ("snail", "slow snail"),
    "unicorn": ("unicorn", "magic unicorn"),
    "dragon": ("dragon", "green dragon"),
    "robot": ("robot", "android"),
    "ghost": ("ghost", "phantom", "spook"),
    "princess": ("princess", "royal princess"),
    "snowman": ("snowman", "man of snow"),
    "butterfly": ("butterfly", "blue butterfly"),
    "house": ("house", "home", "cottage"),
    "castle": ("castle", "palace", "fortress"),
    "tent": ("tent", "camping tent"),
    "evergreen-tree": ("pine tree", "fir tree", "spruce", "evergreen tree"),
    "palm-tree": ("palm tree", "palm", "coconut palm"),
    "cactus": ("cactus", "green cactus"),
    "mushroom": ("mushroom", "toadstool"),
    "sunflower": ("sunflower", "yellow sunflower"),
    "tulip": ("tulip", "pink tulip"),
    "red-apple": ("apple", "red apple"),
    "banana": ("banana", "ripe banana"),
    "balloon": ("balloon", "red balloon"),
    "bicycle": ("bicycle", "bike", "cycle"),
    "automobile": ("car", "automobile", "auto"),
    "bus": ("bus", "coach", "omnibus"),
    "locomotive": ("train", "locomotive", "steam engine"),
    "sailboat": ("sailboat", "sailing boat", "boat", "yacht"),
    "rocket": ("rocket", "spaceship", "space rocket"),
    "tractor": ("tractor", "farm tractor"),
    "fire": ("fire", "campfire", "bonfire"),
    "wrapped-gift": ("gift", "present", "gift box"),
    "birthday-cake": ("cake", "birthday cake"),
    "soccer-ball": ("ball", "football", "soccer ball"),
    "umbrella": ("umbrella", "parasol"),
}
"""By sprite; the first is the world's own."""

WHERE = {
    "meadow": ("in the meadow", "on a green meadow", "in a grassy field", "on the grass", "in a pasture", "on a lawn"),
    "beach": ("on the beach", "at the seaside", "by the sea", "on the shore", "at the coast", "by the ocean"),
    "snow": ("in the snow", "in a snowy landscape", "on snowy ground", "in deep snow", "in a white winter land"),
    "forest": ("in the forest", "in the woods", "in a woodland", "deep in the forest", "at the edge of the wood"),
    "road": ("on the road", "on the street", "by the roadside", "along a lane", "on a highway"),
    "desert": (
        "in the desert",
        "on the desert sand",
        "between desert dunes",
        "in a hot, dry desert",
        "among sand dunes",
    ),
}
PLACE_NOUNS = {
    "meadow": ("meadow", "field", "lawn"),
    "beach": ("beach", "coast", "seashore"),
    "snow": ("snowfield", "winter landscape", "field of snow"),
    "forest": ("forest", "wood", "woodland"),
    "road": ("road", "street", "country lane"),
    "desert": ("desert", "sandy desert", "land of dunes"),
}
WHEN = {
    "day": ("on a sunny day", "in the sunshine", "during the day", "at noon", "in broad daylight", "in bright sun"),
    "sunset": ("at sunset", "in the evening", "at dusk", "as the sun goes down", "in the evening light", "at twilight"),
    "night": ("at night", "under the stars", "in the moonlight", "after dark", "at midnight", "under a starry sky"),
    "rain": ("in the rain", "on a rainy day", "while it rains", "in wet weather", "in a downpour", "in a rain shower"),
}
TIME_ADJECTIVES = {
    "day": ("sunny", "sunlit", "bright"),
    "sunset": ("sunset", "evening", "twilit"),
    "night": ("moonlit", "night-time", "starlit"),
    "rain": ("rainy", "rain-swept", "wet"),
}
TIME_NOUNS = {
    "day": ("day", "midday", "daytime"),
    "sunset": ("sunset", "evening", "dusk"),
    "night": ("night", "midnight", "night-time"),
    "rain": ("rain", "a rainy day", "rainy weather"),
}
ADJECTIVES = ("little", "happy", "brave", "curious", "big", "cute", "funny", "lovely", "friendly", "cheerful", "small")
"""They mean nothing in this world."""

IRREGULAR_PLURALS = {"mouse": "mice", "man of snow": "men of snow", "snowman": "snowmen", "cactus": "cacti"}


def pick(choices: Sequence[T], rng: np.random.Generator) -> T:
    """One of them, drawn by chance."""
    return choices[int(rng.integers(len(choices)))]
