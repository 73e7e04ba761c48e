"""The words behind the mood score: English, hand-written, by weight.

Base forms only; endings are taken off by :mod:`.mood`. Weights say how surely a word speaks of the mood of the text
itself: 1.5 is the mood named outright, 1 an emotional word, 0.5 a hint. Words that both moods use (letter, friend,
night, old) and words with a common neutral sense (well, like, pretty, kind, fine) are left out on purpose.
"""

from __future__ import annotations

_CHEERFUL = {
    1.5: """
        bliss blissful cheer cheerful cheery delight delighted delightful ecstatic elated elation euphoric exhilarated
        exhilarating exuberant glee gleeful happy jolly joy joyful joyous jubilant lighthearted merriment merry
        overjoyed radiant rapture rejoice thrilled upbeat
        """,
    1.0: """
        admire adorable adore adventure affection amazed amazing amuse amused amusing applause appreciate awe awesome
        beautiful beauty beloved best bless blessing blissfully bloom blossom bounty bravo breathtaking breezy bright
        brighten brilliance brilliant bubbly buoyant carefree celebrate celebration charm charming cheers cherish
        chirp chirpy chuckle cosy cozy cuddle cuddly dazzle delicious eager effervescent elegant embrace enchant
        enchanted enchanting encourage encouraging energetic enjoy enjoyable enjoyment enthusiasm enthusiastic
        excellent excite excited excitement exciting exquisite fabulous fantastic favorite favourite feast festive
        festivity flourish fond fortunate fragrant friendly frolic fun funny genial giggle glad gladden gleam glisten
        glitter glorious glory glow gorgeous graceful grateful gratitude great grin harmonious harmony heartfelt
        heartwarming hearty heaven heavenly hilarious hooray hug hurrah hurray idyllic incredible infectious
        inspiration inspire inspiring inviting jest joke jovial keen kindness kiss laugh laughter lively lovable love
        loveable loveliness lovely loving luckily lucky luminous lush magic magical magnificent majestic marvel
        marvellous marvelous miracle miraculous mirth optimism optimistic outstanding paradise passionate peaceful
        perfect perfection picturesque playful pleasant pleased pleasing pleasure positive positivity praise precious
        pride promising proud rainbow refreshed refreshing reward rewarding romantic rosy satisfaction satisfied
        satisfying scrumptious serene serenity shimmer shine shiny smile smitten soothe sparkle sparkly spirited
        splendid splendor splendour success successful sunbeam sunlit sunny sunrise sunshine superb sweet tasty
        terrific thankful thrill thrive treasure triumph triumphant twinkle uplift vibrancy vibrant victory vivacious
        warmth welcoming whimsical wonderful wondrous yay yummy zest
        """,
    0.5: """
        abundance adventurous aglow alive anticipation aroma balance balmy beam better birdsong breeze butterfly calm
        candy care caring colorful colourful comfort comfortable confidence confident congratulate
        congratulation courage creative cute dance delightedly easy effortless enrich fascinate flower flutter freedom
        fresh friendship gentle gift golden good goodness heal healthy help helpful holiday hope hopeful ideal impress
        impressive improve lullaby melody music neat nice opportunity party peace picnic play prosper prosperity
        purr quaint relax relief safe sing solace song special strong support supportive surprise talented thank
        together treasured treat unforgettable unity vivid warm welcome win wonder wow
        """,
}

_SOMBRE = {
    1.5: """
        anguish bereaved bereavement bleak brokenhearted cheerless dejected depressed depressing depression desolate
        desolation despair despondent dismal doleful downcast dreary forlorn funereal gloom gloomy glum grief grieve
        heartache heartbreak heartbreaking heartbroken hopeless inconsolable joyless lament lamentation melancholic
        melancholy miserable misery morose mourn mournful sad sadden saddened somber sombre sorrow sorrowful sullen
        tearful unhappy weep woe woeful wretched
        """,
    1.0: """
        abandon abandonment abyss ache afraid agony aimless alas alienated alone ash awful barren bereft betray
        betrayal bitter bitterness burden cemetery coffin collapse corpse cruel cruelty crumble crush cry curse dark
        darken darkness dead deadly death decay defeat demise deserted desperate desperation destroy destruction
        devastate devastating die disappoint disappointed disappointing disappointment disaster discourage dishearten
        disillusioned distraught distress doom downhearted drab drained dread dreadful drear dull eerie emptiness
        empty estranged exhaust exhausted exhaustion exile fail failure fatal fear fearful feeble foreboding forgotten
        forsaken frail friendless frightened fruitless funeral futile futility ghostly grave graveyard gray grey grim
        groan guilt guilty harsh haunt heaviness helpless helplessness hollow homesick horrible horror hurt hurtful
        isolated isolation lifeless lone loneliness lonely lonesome lose loss lost loveless meaningless moan
        monotonous monotony murky nightmare numb oblivion ominous oppressive orphan overwhelmed pain painful pessimism
        pessimistic pitiful pity plight pointless powerless purposeless regret regretful relentless remorse ruin scar
        scream shadow shadowy shatter shiver shroud sigh sob solemn solitary solitude stark starve stifle strife
        struggle suffer suffocate sunless tears terrible terror thankless tired tomb torment torn tragedy tragic
        trapped trauma troubled trudge unbearable uneasy unforgiving unloved unrelenting unwanted vain vanish void
        wail weariness weary widow widowed wilt wither worried worry worse worsen worst worthless wound
        """,
    0.5: """
        absence anger angry anxiety anxious arduous awkward bad bare blame bleed bored boredom boring broken chaos
        cold complain complaint confused cramped creak damp danger dangerous difficult difficulty dim dirty discomfort
        dusk dusty endless error extinguish fade fatigue fleeting fog foggy frown frustrated frustrating frustration
        gaunt ghost grumble hardship hate heavy howl hunger hungry idle ill illness impossible indifferent lack leaden
        linger longing loom lurk mess mildew mist mundane neglect nowhere ordeal pale poor poverty problem quiver rain
        rainy reluctant rot rotten rust rusty scared scold severe sick silence silent sinister slump smother sorry
        spent stale stern storm stormy stuck tense tension threaten toil toll tough treacherous trouble twisted ugly
        unable uncertain uncertainty unfamiliar unfortunate unpleasant upset vacant war weak weakness whimper worn
        wrong yearn
        """,
}

# Emoji speak for themselves; variation selectors are tokens of their own and weigh nothing.
_EMOJI = {
    1.0: "😀😃😄😁😆😂🤣😊😇🙂😍🥰😘😋😎🤗🥳🤩❤💖💕💛🎉🎊🌞☀🌈🌻🌸👍✨",
    -1.0: "😞😔😟😕🙁☹😣😖😫😩🥺😢😭😿💔🖤🥀😥😓⚰🌧",
}

WEIGHTS: dict[str, float] = {
    **{word: weight for weight, block in _CHEERFUL.items() for word in block.split()},
    **{word: -weight for weight, block in _SOMBRE.items() for word in block.split()},
    **{character: weight for weight, characters in _EMOJI.items() for character in characters},
}
"""Base form -> weight, above 0 for cheerful and below for sombre."""

_PHRASES = {
    1.5: """
        cried with laughter / cry with laughter / in high spirits / light hearted / made my day / makes my day / on
        cloud nine / on top of the world / over the moon / tears of happiness / tears of joy / warm hearted
        """,
    1.0: """
        can't wait / cannot wait / full of life / heart warming / light heart / spring in my step / thumbs up / worth
        living
        """,
    0.5: """
        good old / look forward / looked forward / looking forward / with love
        """,
    0.0: """
        a good deal / a great deal / as good as / as well as / at best / best regards / dead end / for good / good
        morning / great aunt / great britain / great uncle / great wall / hope this email finds you well / hope this
        finds you well / hope this letter finds you well / hope this message finds you well / i wonder / i wondered /
        lost in / no doubt / no matter / no wonder / nothing but / thank you for / warm regards
        """,
    -0.5: """
        are gone / is gone / miss her / miss him / miss them / miss you / no reason to / used to be / was gone / were
        gone
        """,
    -1.0: """
        fallen apart / falling apart / feel blue / feel down / feeling blue / feeling down / fell apart / gave up /
        given up / heart sank / heart sinks / in vain / no one left / no point / nothing left / passed away / too late
        / weighs on me / what is the use / what's the use / worn out
        """,
    -1.5: """
        broken heart / broken hearted / down in the dumps / grief stricken / heart is heavy / heart was heavy / heavy
        heart / heavy hearted / no one cares / nobody cares
        """,
}

PHRASES: dict[str, list[tuple[tuple[str, ...], float]]] = {}
"""First word -> (phrase, weight) pairs, the longest phrase first; weight 0 silences the words inside."""

for _weight, _block in _PHRASES.items():
    for _words in (tuple(phrase.split()) for phrase in _block.split("/")):
        PHRASES.setdefault(_words[0], []).append((_words, _weight))
for _found in PHRASES.values():
    _found.sort(key=lambda item: -len(item[0]))

IRREGULAR = dict(
    bled="bleed", died="die", dies="die", dying="die", sang="sing", shone="shine", sung="sing", wept="weep", won="win"
)
"""Forms that taking off an ending does not lead back."""

NO_STEM = frozenset(
    """
    barely career dancer goods helper helping hopper mister number player severed singer sober supporter wares
    wines
    """.split()
)
"""Words that look like a form of a word of the lexicon and are none."""

NEGATIONS = frozenset(
    """
    no not never none nothing nobody neither nor without cannot hardly barely scarcely rarely lack lacks lacked lacking
    """.split()
)
"""Besides every word that ends in "n't"."""

NOT_NEGATED_BY = frozenset("only just merely simply".split())
"""Right after a negation, these take it back: "not only happy"."""

SUPERLATIVE_NEGATIONS = frozenset("never nothing nobody couldn't can't cannot".split())
SUPERLATIVE_MARKS = frozenset("more so such this".split())
"""After such a negation, a comparative or one of these makes praise or blame: "never been so happy"."""

CLAUSE_STARTS = frozenset("but although though however yet because while whereas".split())

FUNCTION_WORDS = frozenset("a an any are be been being ever is was were will would".split())
"""These do not count when the distance to a negation is measured."""

DEGREES = {
    **dict.fromkeys(
        """
        absolutely all awfully completely deeply especially extremely exceedingly filled fully immensely incredibly
        intensely more most overwhelmingly particularly profoundly pure purely quite really simply so such terribly
        thoroughly too totally truly unbelievably utter utterly very
        """.split(),
        1.5,
    ),
    **dict.fromkeys("almost bit fairly faintly less little mildly partly relatively slight slightly somewhat".split(), 0.5),
}
"""Factor that a word puts on the weight of the next one; there it has no weight of its own ("terribly good")."""
