"""The sentences that stories are made of.

{S} is the character ({M} as an object, {h} {o} its pronouns), {O} the object, {carried} "carried {O}"; each becomes a
name, a noun or a pronoun.
"""

from __future__ import annotations

PROMPTS = (
    "{who} who finds {what}",
    "{who} who found {what}",
    "{who} and {what}",
    "{who} with {what}",
    "{who} dreams of {what}",
    "the adventures of {who} and {what}",
    "tell me about {who} and {what}",
    "tell me a story about {who} who has {what}",
    "tell a story of {who} with {what}",
    "write a story about {who} and {what}",
    "write a picture book about {who} who finds {what}",
    "make a picture story about {who} and {what}",
    "I want a bedtime story about {who} with {what}",
    "a story about {who} who meets {what}",
    "a children's story: {who} and {what}",
    "what happens when {who} finds {what}?",
    "can you tell me how {who} got {what}?",
    "please write about {who} who travels with {what}",
    "once upon a time there was {who} who loved {what}",
    "story of {who} that takes {what} on a long trip",
)
ADJECTIVES = (
    "",
    "",
    "",
    "",
    "little ",
    "happy ",
    "brave ",
    "curious ",
    "big ",
    "small ",
    "shy ",
    "young ",
    "kind ",
)
_HE = "Pip Milo Bo Finn Otto Max Ben Toby Leo Hugo Oscar Jasper Felix Theo Gus Nico Sam Rufus Barney Archie"
_SHE = "Luna Tia Mia Nell Ruby Ada Zoe Ivy Lily Maya Nora Ella Bella Coco Kiki Elsa Molly Poppy Hazel Dora"
NAMES = {"he": _HE.split(), "she": _SHE.split()}
CARRYING = {
    "small": (("carried {O}", "carry {O}"), ("took {O}", "take {O}"), ("brought {O}", "bring {O}")),
    **dict.fromkeys(
        ("house", "castle", "evergreen-tree", "palm-tree", "cactus", "fire"),
        (
            ("pulled {O} on a little cart", "pull {O} on a little cart"),
            ("brought {O} on a wagon", "bring {O} on a wagon"),
            ("rolled {O} on wooden wheels", "roll {O} on wooden wheels"),
        ),
    ),
    **dict.fromkeys(
        ("bicycle", "automobile", "bus", "locomotive", "sailboat", "rocket", "tractor"),
        (("pushed {O}", "push {O}"), ("took {O}", "take {O}"), ("travelled in {O}", "travel in {O}")),
    ),
    "bicycle": (("pushed {O}", "push {O}"), ("rode {O}", "ride {O}"), ("travelled on {O}", "travel on {O}")),
}
PLACE_NAMES = {
    "meadow": ("the meadow", "a wide green meadow", "a grassy meadow", "a meadow full of bees"),
    "beach": ("the beach", "a sandy beach", "a quiet beach", "the shore of the sea"),
    "snow": ("the land of snow", "the deep snow", "the white snow", "a valley of snow"),
    "forest": ("the forest", "a dark green forest", "the old forest", "a quiet forest"),
    "road": ("the road", "a long grey road", "an empty road", "the side of a road"),
    "desert": ("the desert", "a hot desert", "the wide desert", "the sandy desert"),
}
TIME_LEADS = {
    "day": (
        "the next morning",
        "early the next morning",
        "in the morning sunshine",
        "when the sun came out again",
        "when the sunshine came back again",
        "under a bright blue sky",
        "on the next sunny day",
    ),
    "sunset": (
        "that evening",
        "at sunset",
        "when evening came",
        "in the warm evening light",
        "as the sunset glowed",
    ),
    "night": (
        "that night",
        "late at night",
        "when the stars came out",
        "by the light of the moon",
        "in the middle of the night",
        "under a thousand stars",
    ),
    "rain": (
        "when the rain came",
        "as rain began to fall",
        "in the pouring rain",
        "on a cold and rainy day",
        "while it was raining",
        "in the soft grey rain",
    ),
}
MOVES = (
    "{S} {carried} to {to}",
    "{S} {carried} all the way to {to}",
    "{S} came to {to} with {O}",
    "{S} went on with {O} and reached {to}",
    "{S} arrived with {O} at {to}",
    "{S} walked to {to}, and {O} came along",
    "{S} moved on to {to}",
    "{S} {carried} and did not stop before {to}",
)
SIDES = (
    "{S} stood on the {side}, and {O} on the {other}.",
    "{S} stayed on the {side} and left {O} on the {other}.",
    "{S} stood to the {side} of {O}.",
    "{S} waited to the {side} of {O}.",
)
BEGINNINGS = (
    "{when}, {who} named {N} found {A} {where}.",
    "{where}, {who} named {N} found {A} {when}.",
    "{who} named {N} lived {where}. {when}, {S} saw {A}.",
    "once upon a time, {who} named {N} stood {where} {when} and saw {A}.",
    "once, {where}, {who} called {N} discovered {A} {when}.",
    "{when}, {who} called {N} came upon {A} {where}.",
    "there once was {who} named {N}. {when}, {S} discovered {A} {where}.",
    "{N} was {who} who lived {where}. {when}, {S} noticed {A}.",
    "{who} called {N} had always wanted {A}. {when}, {S} found one {where}.",
    "{when}, {A} was waiting {where} for {who} named {N}.",
    "{where} lived {who} named {N}. {when}, {S} was given {A}.",
    "{who} named {N} was playing with {A} {where} {when}.",
    "{when} {where}, {who} called {N} got {A} from a stranger.",
    "{A} stood {where} {when}, and {who} named {N} could not look away.",
)
SHORT_WISHES = (
    "{S} wished to {wish}.",
    "{S} wanted to {wish}.",
    "{S} hoped to {wish}.",
    "now {S} longed to {wish}.",
    "{S} decided to {wish}.",
    "{S} had one wish: to {wish}.",
)
LONG_WISHES = (
    "{S} closed {h} eyes and wished to {wish}.",
    "{S} had a great wish, and it was to {wish}.",
    "more than anything else, {S} wanted to {wish}.",
    "{S} looked at {O} for a long time and hoped to {wish}.",
    "{S} thought about it twice and then decided to {wish}.",
    "{S} told everybody about the plan to {wish}.",
    "{S} could think of nothing else and dreamed how to {wish}.",
)
WISHES = (
    {
        "to": ("give {O} to a friend", "share {O} with an old friend", "show {O} to a faraway friend"),
        "end": (
            "a friend ran to meet {M}, and they laughed and danced around {O}.",
            "{S} gave {O} to {h} friend, who had never been so glad.",
            "{S} and {h} friend sat beside {O} and told each other everything.",
            '"This is for you," {S} said, and {h} friend hugged {o} for a long time.',
        ),
    },
    {
        "to": ("bring {O} home", "take {O} safely home", "go home with {O}"),
        "end": (
            "{S} was home at last, with {O} by {h} side.",
            "home had never felt so good to {o}, because {O} was there too.",
            "{S} had come home with {O} and was tired but proud.",
            "everyone at home cheered for {M} and admired {O}.",
        ),
    },
    {
        "to": ("see the whole world with {O}", "travel far with {O}", "go on a great adventure with {O}"),
        "end": (
            "{S} had seen so much of the world, and {O} had always been there.",
            "the great adventure was over, and {S} thanked {O} for everything.",
            "{S} looked back at the long way and smiled at {O}.",
            "{S} knew now how big the world is, and so did {O}.",
        ),
    },
    {
        "to": (
            "find the best spot in the world for {O}",
            "find a good place for {O}",
            "know where {O} belongs",
        ),
        "end": (
            "this was the best spot in the world for {O}, and {S} stayed.",
            '"Here you belong," {S} said to {O}, and everything was right.',
            "at last {S} had found the place where {O} belonged.",
            "{S} put {O} down with care and never moved it again.",
        ),
    },
    {
        "to": ("learn the secret of {O}", "find out where {O} came from", "understand what {O} was for"),
        "end": (
            "now {S} knew the secret of {O}: it made everyone smile.",
            "{S} finally understood that {O} had been made for {o}.",
            "the secret was simple, and {S} kept it together with {O}.",
            "nobody else ever learned the secret that {S} shared with {O}.",
        ),
    },
    {
        "to": ("hold a party around {O}", "make a feast with {O}", "invite everyone to look at {O}"),
        "end": (
            "everyone came to the party, and {S} danced around {O}.",
            "what a feast it was, with music, with {M} and with {O} in the middle!",
            "the guests sang for {M} and clapped their hands for {O}.",
            "{S} had invited everyone, and everyone loved {O}.",
        ),
    },
    {
        "to": ("surprise {h} mother with {O}", "make {h} mother glad with {O}", "bring {O} to {h} mother"),
        "end": (
            "{h} mother kissed {M} and could not believe that {O} was real.",
            '"What a surprise!" cried {h} mother when {S} showed her {O}.',
            "{S} gave {O} to {h} mother, and they both were very happy.",
            "{h} mother had waited for {M}, and she loved {O} at once.",
        ),
    },
    {
        "to": ("keep {O} for ever", "never be alone again with {O}", "make {O} a true friend"),
        "end": (
            "{S} was never alone again, because {O} was always near.",
            "{S} and {O} stayed together for ever and ever.",
            "{S} fell asleep next to {O} and smiled in a dream.",
            "from then on {S} kept {O} close and was content.",
        ),
    },
)
ENDS = (
    "{S} was happy with {O} and lived happily ever after.",
    "{S} sat down beside {O} and was happy.",
    "so the story ends, and {S} and {O} are still together.",
    "{S} smiled at {O}, for the wish had come true.",
    "the wish had come true, and {S} sang a song about {O}.",
    "and that is how {S} and {O} found their luck.",
    "{S} laughed for joy and said thank you to {O}.",
    "everything had ended well for {M} and for {O}.",
    "{S} looked at {O} and knew that all was good.",
)
JOURNEYS = (
    "the way was long, but {S} sang a merry song to {O}.",
    "{S} made one step after another and talked to {O}.",
    "{S} counted the steps and never lost sight of {O}.",
    "nobody had ever seen anyone travel so far with {O} as {S} did.",
    "{S} whistled a tune and felt light with {O} so near.",
    "{S} asked everyone for the way and showed them {O}.",
    "people waved at {M} and wondered about {O}.",
    "{S} had never been so far away, but {O} gave {o} courage.",
    "step by step {S} went on, and {O} was always close.",
    "{S} {carried} over a small wooden bridge and hummed.",
)
RESTS = (
    "{S} rested beside {O} and ate some bread.",
    "{S} leaned against {O} and closed {h} eyes for a while.",
    "tired, {S} lay down next to {O} and thought hard.",
    "{S} drank some water and kept a careful eye on {O}.",
    "{S} took a long nap, and {O} stood quietly by.",
    "{S} sat down by {O} and told it an old tale.",
    "a little break did {M} good, and {O} was safe.",
)
PLOTS = (
    {
        "obstacle": (
            "{O} was too heavy, and {S} could not go on.",
            "{S} pushed and pulled, but {O} would not move.",
            "{S} grew so tired that {O} felt as heavy as a stone.",
            "oh no, {S} had no strength left for {O}!",
            "{S} wondered why {O} would not move at all.",
        ),
        "turn": (
            "then {S} had an idea and moved {O} with a long stick.",
            "{S} took a deep breath, tried once more, and {O} moved.",
            "{S} ate a good meal, and now {O} felt light.",
            "{S} tied a rope around {O}, and now it was easy.",
            "kind strangers helped {M}, and together they lifted {O}.",
        ),
    },
    {
        "obstacle": (
            "{S} had lost the way and held on to {O}.",
            "all paths looked the same, and {S} was lost with {O}.",
            "{S} walked in circles and only {O} was with {o}.",
            "no sign was to be seen, and {S} asked {O} for advice.",
            "{S} did not know where to go with {O}.",
        ),
        "turn": (
            "{S} found an old map right beside {O}.",
            "{S} climbed up high next to {O} and saw the way.",
            "{S} listened to {h} heart, and it led {o} and {O} on.",
            "a wise voice showed {M} the way, and {O} came along.",
            "{S} followed small footprints with {O} and knew the way again.",
        ),
    },
    {
        "obstacle": (
            "a strong wind blew, and {S} almost lost {O}.",
            "the wind pulled at {O}, and {S} held on tight.",
            "a storm of wind pushed {M} away from {O}.",
            "{S} fought against the wind to protect {O}.",
            "the wind howled so loudly that {S} hid behind {O}.",
        ),
        "turn": (
            "the wind grew tired, and {S} hugged {O}.",
            "{S} held on, until the wind became still around {O}.",
            "{S} tied {O} down with a strong knot, and it was safe.",
            "all at once the wind turned and helped {M} with {O}.",
            "{S} laughed at the wind, for {O} was safe again.",
        ),
    },
    {
        "obstacle": (
            "a deep river lay in the way of {M} and {O}.",
            "{S} stopped, for a high wall stood in the way of {O}.",
            "a big rock blocked the path, and {S} could not pass with {O}.",
            "{S} stood before a locked gate with {O} and sighed.",
            "the bridge was broken, and {S} could not get across with {O}.",
        ),
        "turn": (
            "{S} built a bridge of branches and brought {O} across.",
            "{S} found a secret way around and {O} fitted through.",
            "{S} worked hard for hours and made a path for {O}.",
            "an old key lay next to {O}, and {S} used it.",
            "{S} dug a tunnel, and {O} passed through it.",
        ),
    },
    {
        "obstacle": (
            "{S} heard a strange noise and hid behind {O}.",
            "something growled, and {S} was afraid for {O}.",
            "{S} was scared and did not dare to leave {O}.",
            "a dark shadow fell on {O}, and {S} shivered.",
            "{S} felt small and afraid, even with {O} so close.",
        ),
        "turn": (
            "{S} looked again: it was only the wind behind {O}.",
            "{S} sang loudly to {O}, and the fear went away.",
            "{S} took heart and stood bravely before {O}.",
            "it was only a shadow, and {S} laughed with relief beside {O}.",
            "{S} counted to ten, touched {O} and was brave again.",
        ),
    },
    {
        "obstacle": (
            "{O} was stuck in the mud, and {S} could not free it.",
            "a piece of {O} broke off, and {S} cried.",
            "{S} slipped, fell, and {O} was covered with dirt.",
            "{S} saw a crack in {O} and became very sad.",
            "{O} did not look well, and {S} worried a lot.",
        ),
        "turn": (
            "{S} cleaned {O} with care until it shone.",
            "{S} found some glue and mended {O}.",
            "{S} worked slowly and patiently, and {O} was like new.",
            "{S} did not give up, and soon {O} was fine again.",
            "with a little paint {S} made {O} more beautiful than before.",
        ),
    },
    {
        "obstacle": (
            "a stranger came and said that {O} was not for {M}.",
            '"Give it to me!" someone shouted at {M} and pointed at {O}.',
            "a thief crept up, but {S} did not leave {O}.",
            "someone mean laughed at {M} and at {O}.",
            "somebody wanted to buy {O}, but {S} did not want gold.",
        ),
        "turn": (
            "{S} stayed friendly, and everyone understood how much {O} meant.",
            '"Please let us go," {S} said, and {O} was safe.',
            "{S} told a joke, and nobody thought of taking {O} any more.",
            "{S} shared {h} lunch, and the quarrel over {O} was over.",
            "the stranger said sorry to {M} and helped with {O}.",
        ),
    },
    {
        "obstacle": (
            "{S} was all alone with {O} and felt sad.",
            "nobody wanted to play with {M} and {O}.",
            "{S} missed {h} family, and even {O} did not help.",
            "{S} asked everyone to come along with {O}, but nobody did.",
            "a tear ran down the face of {M} and fell on {O}.",
        ),
        "turn": (
            "then somebody small said hello to {M} and praised {O}.",
            "{S} played a tune next to {O}, and many came to listen.",
            "a letter for {M} lay under {O}, and it was full of kind words.",
            "{S} waved, and someone waved back and came to see {O}.",
            "{S} started a game around {O}, and soon everyone joined in.",
        ),
    },
)
