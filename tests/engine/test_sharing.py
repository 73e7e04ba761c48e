"""Reading computes what texts have in common once, and reads the same as if each text were alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from steer_plugins.engine import batching, trie
from steer_plugins.engine.base import GenerateRequest
from steer_plugins.engine.batching import Group, TokenText, find_hosts, plan_groups
from steer_plugins.engine.local import LocalEngine
from steer_plugins.engine.session import Session, shared_prefix
from steer_plugins.steering.terms import Term

from .engines import vector

SYSTEMS = ("be as kind as you can be to everyone here", "be as rude as you can be to everyone here")
PROMPTS = [
    f"{system}. now tell me about {what}" for system in SYSTEMS for what in ("a cat", "a dog", "cars", "the sea", "ships", "tea")
]


@pytest.fixture(params=["llama", "gemma3", "qwen3next", "deepseek4"])
def engine(request, llama_cpp, tiny):
    with LocalEngine(tiny(request.param), n_ctx=512, n_threads=1, n_parallel=4) as opened:
        yield opened


@pytest.fixture
def computed(monkeypatch):
    """Numbers of tokens and outputs of all batches."""
    counts = []
    decode = Session.decode

    def counted(self, entries):
        counts.append((len(entries), sum(e.output for e in entries)))
        decode(self, entries)

    monkeypatch.setattr(Session, "decode", counted)
    return counts


def alone(engine, prompts, positions):
    return [engine.read([p], layers=LAYERS, positions=positions)[0] for p in prompts]


LAYERS = (0, 1)


def near(one, other):
    assert one.tokens == other.tokens and one.positions == other.positions and one.n_prompt == other.n_prompt
    for il in LAYERS:
        assert one.values[il].shape == other.values[il].shape
        size = np.linalg.norm(other.values[il])
        assert np.linalg.norm(one.values[il] - other.values[il]) < 2e-2 * size


@pytest.mark.parametrize("positions", ["last", "all", "mean"])
def test_shared_prefixes_change_nothing(engine, positions):
    texts = [*PROMPTS, PROMPTS[0], PROMPTS[0][:-4], PROMPTS[1] + " or two"]
    for one, other in zip(engine.read(texts, layers=LAYERS, positions=positions), alone(engine, texts, positions), strict=True):
        near(one, other)


def test_each_text_may_have_its_own_positions(engine):
    items = [(p, " fine" if i % 3 else []) for i, p in enumerate(PROMPTS)]
    words = ["all" if i in (2, 7) else "response_mean" if i % 3 else "last" for i in range(len(items))]
    found = engine.read_pairs(items, layers=LAYERS, positions=words)
    for item, word, one in zip(items, words, found, strict=True):
        near(one, engine.read_pairs([item], layers=LAYERS, positions=word)[0])


def test_few_tokens_and_no_logits_are_computed(llama_cpp, tiny, computed):
    with LocalEngine(tiny("llama"), n_ctx=512, n_threads=1, n_parallel=4) as engine:
        tokens = [engine.tokenize(p) for p in PROMPTS]
        engine.read(PROMPTS, layers=LAYERS)
        least = len({tuple(t[: i + 1]) for t in tokens for i in range(len(t))})
        total = sum(map(len, tokens))
        used = sum(n for n, _ in computed)
        assert used == least < 0.6 * total  # whatever is common, to two texts or to many, is computed once
        assert sum(outputs for _, outputs in computed) == 0
        computed.clear()
        engine.read(PROMPTS, layers=LAYERS, positions="all")
        assert sum(n for n, _ in computed) == used  # a prefix that is read is not computed again either


def test_beginnings_and_equals_cost_nothing(llama_cpp, tiny, computed):
    with LocalEngine(tiny("llama"), n_ctx=512, n_threads=1, n_parallel=4) as engine:
        whole = engine.tokenize(PROMPTS[0])
        found = engine.read([whole[:n] for n in range(2, len(whole) + 1)] + [whole], layers=LAYERS)
        assert sum(n for n, _ in computed) == len(whole)
        full = engine.read([whole], layers=LAYERS, positions="all")[0]
        for one in found:
            for il in LAYERS:
                assert one.values[il][0] == pytest.approx(full.values[il][len(one.tokens) - 1], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(("arch", "stem"), [("llama", 30), ("gemma3", 90)])
def test_texts_that_part_at_many_places(llama_cpp, tiny, computed, arch, stem):
    """Chains, forks of forks and batches that begin where the last one ended; gemma3's window is shorter than what is shared."""
    rng = np.random.default_rng(3)
    with LocalEngine(tiny(arch), n_ctx=512, n_threads=1, n_parallel=3, n_batch=64) as engine:
        words = lambda n: [int(t) for t in rng.integers(10, 40, n)]  # noqa: E731
        whole = words(stem)
        forks = [whole[: int(rng.integers(2, stem))] + words(int(rng.integers(1, 5))) for _ in range(5)]
        texts = [*forks, *(fork + words(int(rng.integers(1, 9))) for fork in forks for _ in range(2)), whole]
        spots = [["last", "all", "mean"][i % 3] for i in range(len(texts))]
        found = engine.read_pairs([(t, []) for t in texts], layers=LAYERS, positions=spots)
        used = sum(n for n, _ in computed)
        for tokens, spot, one in zip(texts, spots, found, strict=True):
            near(one, engine.read([tokens], layers=LAYERS, positions=spot)[0])
    least = len({tuple(t[: i + 1]) for t in texts for i in range(len(t))})
    assert used == least if arch == "llama" else least <= used < sum(map(len, texts))


@pytest.mark.parametrize("seed", range(10))
def test_a_trie_has_each_prefix_once(seed):
    """And its tokens in an order that llama.cpp takes: a sequence's tokens ascend, and belong to fewer and fewer sequences."""
    rng = np.random.default_rng(seed)
    texts = [text(*stem, *rng.integers(0, 3, 4)) for stem in ([1, 2, 1], [1, 2, 2, 2], [0]) for _ in range(7)]
    texts = [texts[i] for i in find_hosts(texts)]
    groups = trie.groups_of(texts, 4)
    held, seen = [], []
    for group, after in zip(groups, [*groups[1:], []], strict=True):
        batch = trie.plan_batch(texts, group, held, after)
        for k, i in enumerate(group):
            tokens, path = texts[i].tokens, batch.paths[k]
            assert tokens[: batch.kept[k]] == held[: batch.kept[k]]
            assert [node.token for node in path] == tokens[batch.kept[k] :]
            assert [node.position for node in path] == list(range(batch.kept[k], len(tokens)))
            assert all(set(a.sequences) >= set(b.sequences) for a, b in zip(path, path[1:], strict=False))
            seen += [tuple(tokens[: node.position + 1]) for node in path if node.sequences[0] == k + 1]
        order = {id(node): n for n, node in enumerate(batch.nodes)}
        assert all(order[id(a)] < order[id(b)] for path in batch.paths for a, b in zip(path, path[1:], strict=False))
        held = texts[group[-1]].tokens[: batch.next]
    assert len(seen) == len(set(seen)) == len({tuple(t.tokens[: i + 1]) for t in texts for i in range(len(t.tokens))})


def text(*tokens, scored=()):
    return TokenText(list(tokens), len(tokens), [len(tokens) - 1], list(scored))


def cost(texts, groups):
    """Tokens that are computed."""
    total, before = 0, []
    for group in groups:
        trunk = texts[group.texts[0]].tokens[: group.shared]
        assert all(texts[i].tokens[: group.shared] == trunk for i in group.texts)
        total += len(trunk) - (shared_prefix(before, trunk))
        total += sum(len(texts[i].tokens) - group.shared for i in group.texts)
        before = trunk
    return total


def test_groups_end_where_prefixes_end():
    first, second = range(100, 140), range(200, 240)
    texts = [text(*first, i) for i in range(5)] + [text(*second, i) for i in range(5)]
    assert plan_groups(texts, 8) == [Group([0, 1, 2, 3, 4], 40), Group([5, 6, 7, 8, 9], 40)]
    assert cost(texts, plan_groups(texts, 2)) == 90  # and go on over several groups
    assert [g.shared for g in plan_groups(texts, 8, share=False)] == [0, 0]


def test_what_is_scored_is_computed_for_each():
    texts = [text(*range(50), i, 7, scored=range(20, 51)) for i in range(4)]
    assert all(group.shared == 20 for group in plan_groups(texts, 8))


def test_at_least_one_token_is_left():
    texts = [text(*range(30)), text(*range(30)), text(*range(29))]
    groups = plan_groups(texts, 8)
    assert all(group.shared < len(texts[i].tokens) for group in groups for i in group.texts)


@pytest.mark.parametrize("seed", range(20))
def test_all_texts_are_in_a_group_and_cost_no_more_than_alone(seed):
    rng = np.random.default_rng(seed)
    stems = [list(rng.integers(0, 3, rng.integers(1, 30))) for _ in range(3)]
    texts = [text(*stems[rng.integers(3)], *rng.integers(0, 3, rng.integers(1, 9))) for _ in range(rng.integers(1, 40))]
    groups = plan_groups(texts, 5)
    assert sorted(i for group in groups for i in group.texts) == list(range(len(texts)))
    assert all(1 <= len(group.texts) <= 5 and (group.shared == 0 or group.shared >= batching.MIN_SHARED) for group in groups)
    assert cost(texts, groups) <= sum(len(t.tokens) for t in texts)


def test_hosts_carry_their_beginnings():
    texts = [text(1, 2), text(1, 2, 3), text(1, 3), text(1, 2), text(1)]
    hosts = find_hosts(texts)
    assert {host: sorted(members) for host, members in hosts.items()} == {2: [2], 1: [0, 1, 3, 4]}


# ---- steered and scored texts, prompts of replies ----

STEERINGS = ("none", "all", "response", "prompt", "3-9")


def steered(engine, scope):
    return None if scope == "none" else Term(vector(engine, scope=scope), 1.0)


def nested(engine):
    """Prompts that part at many places, that begin others, and that are equal; answers that begin alike."""
    whole = engine.tokenize(PROMPTS[0])
    prompts = [*map(engine.tokenize, PROMPTS), whole[:-4], whole, [*whole, 61, 62], whole[:12]]
    return [(prompt, [*answer, 70 + i % 2]) for prompt in prompts for i, answer in enumerate(([60, 61], [60, 63], [64]))]


@pytest.mark.parametrize("scope", STEERINGS)
def test_scores_are_those_of_each_text_alone(engine, scope):
    items, steering = nested(engine), steered(engine, scope)
    plain = engine.logprobs(items)
    found = engine.logprobs(items, steering=steering)
    for item, one in zip(items, found, strict=True):
        assert np.abs(one - engine.logprobs([item], steering=steering)[0]).max() < 5e-2
    if steering is not None:
        assert max(np.abs(a - b).max() for a, b in zip(plain, found, strict=True)) > 0.5


@pytest.mark.parametrize("scope", STEERINGS)
def test_reads_of_steered_texts_are_those_of_each_alone(engine, scope):
    items, steering = nested(engine), steered(engine, scope)
    words = [("last", "all", "response_mean")[i % 3] for i in range(len(items))]
    found = engine.read_pairs(items, layers=LAYERS, positions=words, steering=steering)
    for item, word, one in zip(items, words, found, strict=True):
        near(one, engine.read_pairs([item], layers=LAYERS, positions=word, steering=steering)[0])


def acts(scope, position, n_prompt):
    response = position >= n_prompt - 1
    places = {"none": False, "all": position > 0, "response": response, "prompt": position > 0 and not response}
    return places.get(scope, 3 <= position <= 9)


@pytest.mark.parametrize("scope", STEERINGS)
def test_scoring_computes_each_steered_prefix_once(llama_cpp, tiny, computed, scope):
    with LocalEngine(tiny("llama"), n_ctx=512, n_threads=1, n_parallel=4) as engine:
        items = [(engine.tokenize(p), [*answer, 70]) for p in PROMPTS for answer in ([60, 61], [60, 63], [64])]
        engine.logprobs(items, steering=steered(engine, scope))

        texts = [[(t, acts(scope, p, len(a))) for p, t in enumerate([*a, *b])] for a, b in items]
        least = len({tuple(keys[: i + 1]) for keys in texts for i in range(len(keys))})
        used = sum(n for n, _ in computed)
        # a batch begins with what the last one held, but for positions whose logits it needs itself
        assert least <= used < 1.2 * least < 0.6 * sum(map(len, texts))
        assert sum(outputs for _, outputs in computed) <= sum(len(b) + 1 for _, b in items)


def requests(engine, scope, n_tokens=6):
    term = steered(engine, scope)
    steerings = [None] if term is None else [None, term, Term(term.vector, -0.5), Term(term.vector, 1.0)]
    prompts = PROMPTS[:5] + PROMPTS[6:8]
    return [GenerateRequest(p, s, max_tokens=n_tokens + i % 3) for i, p in enumerate(prompts) for s in steerings]


def alone_reply(engine, request):
    return engine.generate(request.prompt, steering=request.steering, max_tokens=request.max_tokens)


def check_as_alone(engine, request, one):
    """The reply is the one to the request alone, up to the first tie."""
    alone = alone_reply(engine, request)
    if one.tokens == alone.tokens:
        assert (one.text, one.finish_reason, one.prompt_tokens) == (alone.text, alone.finish_reason, alone.prompt_tokens)
        return
    # a random model has ties, which the shape of a batch may decide, on one processor and not on another
    at = next(i for i, (a, b) in enumerate(zip(one.tokens, alone.tokens, strict=False)) if a != b)
    ends = [(request.prompt, reply.tokens[: at + 1]) for reply in (one, alone)]
    scores = [found[-1] for found in engine.logprobs(ends, steering=request.steering)]
    assert abs(scores[0] - scores[1]) < 0.02


@pytest.mark.parametrize("scope", STEERINGS)
def test_replies_to_prompts_that_begin_alike_are_those_of_each_alone(engine, scope):
    asked = requests(engine, scope)
    for request, one in zip(asked, engine.generate_many(asked), strict=True):
        check_as_alone(engine, request, one)
    # nothing is left that the next call could depend on
    session = engine._sessions["many"]
    assert not any(session.kv.values()) and all(
        session.c.llama_memory_seq_pos_max(session.memory, s) == -1 for s in range(session.limits.n_seq)
    )


@pytest.mark.parametrize("scope", STEERINGS)
def test_the_beginnings_of_prompts_are_copied(llama_cpp, tiny, computed, scope):
    """As far as they are steered alike."""
    with LocalEngine(tiny("llama"), n_ctx=512, n_threads=1, n_parallel=4) as engine:
        asked = [replace(request, max_tokens=1) for request in requests(engine, scope)]
        engine.generate_many(asked)
        texts = []
        for request in asked:
            tokens, strength = engine.tokenize(request.prompt), request.steering.strength if request.steering else 0.0
            texts.append([(t, strength * acts(scope, p, len(tokens))) for p, t in enumerate(tokens)])
        # the last token of each is computed for its logits
        least = len({tuple(keys[: i + 1]) for keys in texts for i in range(len(keys) - 1)}) + len(asked)
        used, total = sum(n for n, _ in computed), sum(map(len, texts))
        # a reply waits for no less than MIN_SHARED tokens, and there are no more sources than sequences
        assert least <= used <= least + batching.MIN_SHARED * len(asked)
        assert used < (0.75 if scope == "all" else 0.6) * total, (used, least, total)


def test_a_window_that_is_shorter_than_what_is_copied(llama_cpp, tiny):
    """gemma3 looks back less far than these prompts are long."""
    with LocalEngine(tiny("gemma3"), n_ctx=512, n_threads=1, n_parallel=4, n_batch=64) as engine:
        stem = [int(t) for t in np.random.default_rng(0).integers(10, 40, 420)]
        asked = [GenerateRequest([*stem, 50 + i], max_tokens=12) for i in range(9)]
        found = engine.generate_many(asked)
        for request, one in zip(asked, found, strict=True):
            check_as_alone(engine, request, one)
        assert len({tuple(one.tokens) for one in found}) > 1
