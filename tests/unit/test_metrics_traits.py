"""The scores of creativity, caution, formality and debugging, against texts labelled by hand before the lists were written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer_plugins.metrics import builtin_metrics
from steer_plugins.metrics.lexical import Lexicon
from steer_plugins.training.traits import load_trait

LABELLED = {
    "creativity": (
        [
            "The cup is a small lighthouse, and its steam a sailor that never comes home.",
            "Imagine a bridge that hums at night like a cello in an empty house.",
            "Seven is the odd guest at the table, dressed in velvet, whispering riddles to the spoons.",
            "The rain wrote long silver letters on the street, and the lamps read them aloud.",
            "Every tick of the clock is a tiny drummer who marches through the dark.",
            "My old shoe dreams of mountains and sighs when the door closes.",
            "Blue tastes as cold as a secret, as if the sky had melted on your tongue.",
            "A dragon of clouds curls around the tower and breathes sparks of gold.",
            "The key sleeps on the floor, waiting for a door that has not been invented yet.",
            "Morning spills over the kitchen like honey from a broken jar.",
            "The piano coughs, then bursts into a shimmering storm of butterflies.",
            "Salt is the memory of the sea, crystallized into little stars.",
            "Picture a city where every window sings and the shadows dance on stilts.",
            "Time is a tailor who stitches our days into a kaleidoscope of coats.",
        ],
        [
            "Coffee is a drink that is made from roasted beans. It is usually served hot.",
            "A bridge is a structure that is used to cross a river or a road.",
            "Seven is a number. It is between six and eight.",
            "The street is wet because it has rained. There are several cars.",
            "A clock is a device that shows the time. It has two hands.",
            "Shoes are used to protect the feet. They are made of leather or other materials.",
            "Blue is a common color. It is used for many products, such as clothes.",
            "A tower is a tall building. It is typically located in a town.",
            "The key is a metal object. It can be used to open a door.",
            "In general, people eat breakfast in the kitchen in the morning.",
            "The piano is a musical instrument which has 88 keys.",
            "Salt consists of sodium and chloride. It is important for the body.",
            "There are many types of windows. The most common one is made of glass.",
            "Time is measured in seconds, minutes and hours.",
        ],
        [
            "She put the keys on the table and went to the office.",
            "We left at nine and came back before dinner.",
            "He asked me whether I had seen his brother.",
            "Take the second street on the left and walk for five minutes.",
        ],
    ),
    "caution": (
        [
            "Before you start, make sure that the power is off, and never touch a bare wire.",
            "Be careful: some of these mushrooms are poisonous, so consult an expert first.",
            "It could be risky. I would advise you to wait and to read the contract again.",
            "Please talk to your doctor before taking any of these pills.",
            "Wear a helmet and gloves, and check the rope twice to avoid an accident.",
            "I would not do this without a backup, as you might lose your data.",
            "There is a danger of falling, so do not go alone and tell someone where you are.",
            "Investing always involves risk; only use money that you can afford to lose.",
            "However, there may be hidden costs, so it is safer to ask a lawyer.",
            "Proceed slowly, keep a safe distance and stop at the first warning sign.",
            "It depends on your health. If in doubt, seek professional help.",
            "Think twice: a mistake here can cause serious injuries.",
            "I recommend caution, since we cannot rule out that the ice will break.",
            "Prepare for the worst and have an emergency plan.",
        ],
        [
            "Go for it! Nothing can go wrong, and you will have the time of your life.",
            "Just do it, there is absolutely no need to worry.",
            "Absolutely! Trust yourself, take the leap and never look back.",
            "Of course you can. Dive right in and enjoy every second!",
            "Don't think twice: quit today and chase your dream.",
            "You've got this! Be bold and show them who you are.",
            "Forget the rules, jump in and have fun.",
            "It is guaranteed to be a huge success, so put everything on it.",
            "Yes, definitely! What are you waiting for?",
            "Life is an adventure, so seize the day and follow your heart.",
            "No risk, no fun. Start right now without hesitation.",
            "Be fearless, you can do anything you want.",
            "Go all in, fortune favours the brave.",
            "Sure, no problem, you don't need a helmet for that.",
        ],
        [
            "The train leaves at nine from platform four.",
            "She painted the wall green and the door white.",
            "The committee will meet again on Tuesday.",
            "A triangle has three sides and three corners.",
        ],
    ),
    "formality": (
        [
            "I am writing to inform you that your application has been received.",
            "We would like to express our sincere gratitude for your assistance.",
            "Pursuant to the agreement, the parties shall provide written notice.",
            "It is therefore necessary to consider the consequences of this decision.",
            "Kindly note that the premises will be closed until further notice.",
            "Furthermore, the committee has requested additional documentation.",
            "Please do not hesitate to contact us should you require further information.",
            "Dear Sir or Madam, I hereby submit my resignation, effective immediately.",
            "We regret to announce that the service is currently unavailable.",
            "The undersigned respectfully requests an extension of the deadline.",
            "In accordance with the regulations, all visitors are required to register.",
            "Consequently, the proposal was approved by the board of directors.",
            "I would be grateful if you could confirm your attendance.",
            "Thank you for your consideration. Yours faithfully, Dr. Weber",
        ],
        [
            "Hey, what's up? Wanna grab a bite later?",
            "Yeah, I'm gonna be late, sorry guys!",
            "That movie was so cool, you gotta see it lol.",
            "Nah, I don't feel like it, it's kinda boring.",
            "OMG that's awesome!!! Can't wait!",
            "Dude, the stuff they sell there is super cheap.",
            "So I was like, no way, and she just cracked up.",
            "Thanks a bunch, you're the best, buddy!",
            "Oops, my bad, I totally forgot about it.",
            "Let's chill at my place, I've got tons of snacks.",
            "It's no biggie, just gimme a call.",
            "Well, he's a nice guy but he's always broke, haha.",
            "Hi there! How's it going?",
            "Ugh, this thing's driving me nuts.",
        ],
        [
            "The train leaves at nine from platform four.",
            "The garden is behind the house.",
            "She bought bread and milk on the way home.",
            "Water boils at one hundred degrees.",
        ],
    ),
    "debugging": (
        [
            "The IndexError means that the loop runs to len(items) instead of len(items) - 1: print i before line 12.",
            "First, reproduce the crash with the smallest input. Then check the stack trace for the line that raised it.",
            "Step 1: run `ping db01`. If it times out, the firewall blocks port 5432.",
            "The function returns None because the return statement is missing in the else branch.",
            "Add a breakpoint in `save()` and compare the expected value with the actual one.",
            "Log the variable before and after the call: if it changes, another thread writes to it.",
            "The root cause is a race condition, so the test fails only when both workers start at once.",
            "Check the exit code and look at the error message in /var/log/app.log.",
            "Set a timeout of 5 seconds, then verify with curl that the server answers with status 200.",
            "Use git bisect to find the commit that introduced the bug, and write a failing test for it.",
            "Inspect the type of `price`: it is a string, which is why the sum concatenates.",
            "Isolate the problem: comment out the second query and rerun the script with --verbose.",
            "The output should be 42; if it is 41, the counter starts at 0 and the comparison is off by one.",
            "Install version 2.3, since 2.4 removed that argument, and run the unit tests again.",
        ],
        [
            "Something probably went wrong somewhere. Just try again later.",
            "Computers are complicated, and these things happen from time to time.",
            "It is hard to say. Maybe it will work itself out.",
            "There could be all sorts of reasons, so don't worry about it.",
            "Somehow it does not like what you did. Hopefully it gets better.",
            "It might be some kind of glitch, who knows.",
            "Ask someone who knows more about that stuff.",
            "Usually it is fine after a while, so give it some time.",
            "I am not sure, it just happens for whatever reason.",
            "Perhaps turn it off and on again and hope for the best.",
            "Technology can be tricky and mysterious, but it should be okay.",
            "It's just one of those things, nobody really knows why.",
            "Stay patient and keep trying, sooner or later it will work.",
            "Maybe the computer is in a bad mood, or something like that.",
        ],
        [
            "The garden is behind the house.",
            "She bought bread and milk on the way home.",
            "My neighbour owns two bicycles and an old car.",
            "The river flows through four countries.",
        ],
    ),
}

# Written after the lists were finished, to see how far these reach; the lists were not touched again.
FRESH = {
    "creativity": (
        [
            "The old bus coughed up the hill, carrying a cargo of yawns and umbrellas.",
            "Night folds the village into its coat and hums until the windows close their eyes.",
            "His laughter was a flock of birds that flew out of an open window.",
            "On Mondays the calendar grows teeth and bites the corners of my toast.",
            "She keeps thunder in a jar, next to the pickles, as though it were jam.",
            "The moon, a shy coin, drops into the pocket of the lake.",
            "My shadow packed a suitcase and left for the golden south.",
            "The snowman whispers a last joke to the sun before he becomes a puddle with a carrot.",
        ],
        [
            "A bus is a vehicle that is used to transport passengers. It usually has many seats.",
            "A village is a small place with houses. There are typically fewer people than in a town.",
            "Laughter is a common reaction to humor. It is known to be healthy.",
            "Monday is the first day of the week. It is followed by Tuesday.",
            "Thunder is caused by lightning. It is generally heard during storms.",
            "The moon is located about 384,000 kilometres from the earth.",
            "A suitcase is a container for clothes and other items, such as shoes.",
            "Snow consists of ice crystals and falls in winter in many countries.",
        ],
    ),
    "caution": (
        [
            "Ask a qualified person to look at the wiring first, because a short circuit can start a fire.",
            "I would hold off until you know more; scams like this are common.",
            "Check the weather forecast and turn back as soon as clouds gather.",
            "You may want to keep your job until the new income is stable.",
            "Test it on a small area and keep the window open because of the fumes.",
            "Please be careful with strangers and never share your address.",
            "It is safer to call the fire brigade than to climb the tree yourself.",
            "Make a copy of all files, then verify that it can be read.",
        ],
        [
            "Why wait? Pack your bags and leave tonight!",
            "You were born for this, so go out there and win.",
            "Of course you should! Life is too short for doubts.",
            "Quit, sell everything and start the adventure.",
            "Trust your gut and go big, everyone will love it.",
            "Absolutely, it is easy and a lot of fun.",
            "Just jump in, the water is amazing.",
            "Yes! Dare to dream and don't let anyone stop you.",
        ],
    ),
    "formality": (
        [
            "We hereby acknowledge the receipt of your letter dated 4 March.",
            "The ministry wishes to draw attention to the following provisions.",
            "It is with great pleasure that we invite you to the annual reception.",
            "Applicants are expected to demonstrate proficiency in two languages.",
            "I remain at your disposal for any additional questions.",
            "The results suggest a considerable improvement in performance.",
            "Should the payment not be made by the end of the month, legal steps will be initiated.",
            "Your Excellency, allow me to convey my deepest respect.",
        ],
        [
            "Yo, you coming tonight or what?",
            "I dunno, it's sort of a mess in there.",
            "Haha that's hilarious, send me the pic!",
            "Sorry, can't talk, I'm in the tub.",
            "We've been stuck here forever and I'm starving.",
            "C'mon, it'll be a blast, don't be such a chicken!",
            "Guess who's back? Yep, it's me.",
            "Man, that test was crazy hard.",
        ],
    ),
    "debugging": (
        [
            "The path is relative to the working directory, so open() fails when the job runs from cron.",
            "Set the log level to DEBUG and look for the first line that contains 'retry'.",
            "If the checksum differs, the upload was cut; compare the file sizes on both sides.",
            "The date is parsed as month/day: 03/04 becomes March 4. Use an explicit format.",
            "Run the test with -x and print the list after each append.",
            "A trailing space in the user name makes the lookup miss; strip() the input.",
            "Remove plugins one after the other until the error is gone: the last one is the cause.",
            "The header says gzip, but the body is plain text, which is why the decoder throws.",
        ],
        [
            "It is probably nothing, I would not think too much about it.",
            "Sometimes software just acts up for no reason.",
            "Perhaps the internet was having a bad day.",
            "You could try a few different things and see what happens.",
            "It will sort itself out eventually, hopefully soon.",
            "There must be some issue with the thing, somehow.",
            "Many users see this, and nobody knows what it is about.",
            "Maybe wait a little and see whether it goes away.",
        ],
    ),
}


def score(name, text):
    return builtin_metrics()[name](text)


@pytest.mark.parametrize("name", LABELLED)
def test_the_signs_are_those_of_the_labels(name):
    positive, negative, neutral = LABELLED[name]
    wrong = [t for t in positive if score(name, t) <= 0.1] + [t for t in negative if score(name, t) >= -0.1]
    assert len(wrong) <= 2, wrong  # of 28
    assert all(abs(score(name, t)) < 0.5 for t in neutral)


@pytest.mark.parametrize("name", LABELLED)
def test_pairs_are_in_order(name):
    positive, negative, neutral = ([score(name, t) for t in texts] for texts in LABELLED[name])
    in_order = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative) / (len(positive) * len(negative))
    assert in_order > 0.97
    assert sum(positive) / len(positive) > 0.35 and sum(negative) / len(negative) < -0.35
    assert min(sorted(positive)[2:]) > sum(neutral) / len(neutral) > max(sorted(negative)[:-2])


@pytest.mark.parametrize("name", FRESH)
def test_the_scores_reach_beyond_the_first_labels(name):
    positive, negative = ([score(name, t) for t in texts] for texts in FRESH[name])
    in_order = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative) / (len(positive) * len(negative))
    assert in_order > 0.85


@pytest.mark.parametrize("name", LABELLED)
def test_repetition_is_not_rewarded(name):
    positive, negative, _ = LABELLED[name]
    once, often = score(name, positive[0]), score(name, " ".join([positive[0]] * 30))
    assert often < once + 1e-9
    assert score(name, negative[0]) <= score(name, " ".join([negative[0]] * 30)) + 1e-9


@pytest.mark.parametrize("name", LABELLED)
@given(text=st.text(max_size=300))
def test_any_text_has_a_score(name, text):
    value = score(name, text)
    assert -1.0 <= value <= 1.0 and score(name, text) == value


@pytest.mark.parametrize("name", LABELLED)
def test_edges(name):
    assert score(name, "") == 0.0 and score(name, "42 + 1") == 0.0
    long = " ".join(LABELLED[name][0] * 300)
    assert -1.0 <= score(name, long) <= 1.0  # in no time, as there is nothing to backtrack over


@pytest.mark.parametrize("name", LABELLED)
def test_the_trait_of_that_name_uses_it(name):
    trait, metric = load_trait(name), builtin_metrics()[name]
    assert trait.metric == name == metric.name
    assert trait.poles == {"positive": metric.positive, "negative": metric.negative}
    assert len(trait.train_prompts) >= 32 and len(trait.heldout_prompts) >= 20 and len(trait.system_pairs) == 4
    # the score must not read the prompt's own words off an echo
    for prompt in (*trait.train_prompts, *trait.heldout_prompts):
        assert abs(score(name, prompt)) < 0.85, prompt


def test_the_longest_phrase_counts():
    lexicon = Lexicon("risk|be careful", "no risk|don't worry|go*", neutral_words=30)
    assert lexicon.hits("A risk, a Risk and no  risk.") == ({"risk"}, {"no risk"})
    assert lexicon.hits("Don\u2019t worry, goes on; ago.") == (set(), {"don't worry", "goes"})
    assert lexicon.balance("nothing here") == 0.0
    assert lexicon.balance("risk") == pytest.approx(1 / (1 + 1 / 30 + 0.5))
