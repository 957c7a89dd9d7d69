"""Repeated text in the tree: found where it occurred last, weighed by its record, and it never changes the answer."""

from __future__ import annotations

from math import exp, log

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.runtime.errors import InputError
from dovetail.runtime.tree.draft_tree import DraftTree, graft
from dovetail.runtime.tree.repeats import PRIOR, SIZES, EarlierTexts, Repeat, RepeatIndex, check_lookup_cache

TEXTS = st.lists(st.integers(0, 3), min_size=1, max_size=60)


def test_the_longest_run_comes_first_and_every_path_begins_otherwise() -> None:
    found = RepeatIndex().find([7, 8, 9, 1, 5, 7, 8, 9, 2, 6, 8, 9, 3, 7, 8, 9], 3)
    assert [(repeat.kind, repeat.tokens) for repeat in found] == [
        ((3, 0), (2, 6, 8)),
        ((3, 1), (1, 5, 7)),
        ((2, 1), (3, 7, 8)),
    ]
    [once] = RepeatIndex().find([7, 8, 9, 1, 5, 7, 8, 9, 1, 6, 7, 8, 9], 3)
    assert once.tokens == (1, 6, 7)
    assert RepeatIndex().find([1, 2, 3, 4, 5], 4) == [] == RepeatIndex().find([1], 4)


def test_a_long_run_comes_before_a_newer_short_one() -> None:
    """What followed sixteen tokens that occurred long ago, though eight, and four, of them occurred since."""
    run = list(range(100, 116))
    text = [*run, 1, 0, *run[8:], 2, 0, *run[12:], 3, 0, *run]
    found = RepeatIndex().find(text, 1)
    assert [(repeat.kind, repeat.tokens) for repeat in found] == [((16, 0), (1,)), ((8, 1), (2,)), ((4, 1), (3,))]


@given(TEXTS)
def test_what_is_found_did_occur_before(text: list[int]) -> None:
    found = RepeatIndex().find(text, 5)
    assert bool(found) == (text[-1] in text[:-1])
    for number, repeat in enumerate(found):
        size, contested = repeat.kind
        assert contested == (number > 0)
        paths = []
        for end in (end for end in range(size, len(text)) if text[end - size : end] == text[-size:]):
            path = list(text)
            for index in range(5):  # token by token, so that what is copied may be copied again
                path.append(path[end + index])
            paths.append(tuple(path[len(text) :]))
        assert repeat.tokens in paths[-2:]  # of the last two occurrences
    assert len({repeat.tokens[0] for repeat in found}) == len(found)


@given(TEXTS, TEXTS, st.integers(1, 7))
def test_an_index_that_grows_knows_what_a_fresh_one_knows(text: list[int], other: list[int], step: int) -> None:
    """Also when the conversation is another one all of a sudden."""
    index = RepeatIndex()
    for whole in (text, other):
        for end in range(1, len(whole) + 1, step):
            assert index.find(whole[:end], 4) == RepeatIndex().find(whole[:end], 4)


def test_probabilities_follow_the_record() -> None:
    text = [1, 2, 3, 4, 5, 6, 1, 2]
    index = RepeatIndex()
    [before] = index.find(text, 2)
    assert before.kind == (2, 0) and abs(exp(before.logprobs[0]) - PRIOR[2, 0][0]) < 1e-9
    for _ in range(40):
        index.learn(before, [9])
    [hostile] = index.find(text, 2)
    assert exp(hostile.logprobs[0]) < 0.05
    for _ in range(400):
        index.learn(before, [3, 4])
    [kind] = index.find(text, 2)
    assert exp(kind.logprobs[0]) > 0.85 and exp(kind.logprobs[1] - kind.logprobs[0]) > 0.95


@given(TEXTS, st.floats(0.01, 1.0))
def test_what_is_less_probable_than_the_least_is_left_out(text: list[int], least: float) -> None:
    """Of a path the first tokens stay, which are as probable; a path without any is none."""
    some = {repeat.tokens[0]: repeat for repeat in RepeatIndex().find(text, 6, least=least)}
    for whole in RepeatIndex().find(text, 6):
        count = sum(logprob >= log(least) for logprob in whole.logprobs)
        kept = some.get(whole.tokens[0])
        if kept is None or kept.kind != whole.kind:  # of a shorter run, after a longer one that was left out
            assert not count
        else:
            assert (kept.tokens, kept.logprobs) == (whole.tokens[:count], whole.logprobs[:count])
    assert all(logprob >= log(least) for repeat in some.values() for logprob in repeat.logprobs)


@given(st.lists(TEXTS, max_size=12), st.integers(0, 80), TEXTS)
def test_earlier_texts_are_searched_as_far_as_they_are_kept(
    texts: list[list[int]], capacity: int, text: list[int]
) -> None:
    """Found is what a search of all kept tokens finds, wherever the own text has no run of that length."""
    earlier, kept = EarlierTexts(capacity), list[list[int]]()
    for each in texts:
        earlier.add(each)
        cut = each[max(len(each) - capacity, 0) :]
        while sum(map(len, kept)) + len(cut) > capacity:
            del kept[0]
        kept += [cut] if len(cut) > 1 else []
    assert sum(map(len, earlier._texts.values())) == sum(map(len, kept)) <= capacity
    assert len(earlier._ends) <= len(SIZES) * capacity
    expected: dict[int, tuple[tuple[int, ...], tuple[int, int]]] = {}
    for size in (size for size in SIZES if size <= len(text)):
        paths = followed([text], text[-size:])  # own ones loop at their end, earlier ones stop
        paths = [tuple((path * 5)[:5]) for path in paths]
        far = 0 if paths else 2
        for path in paths or (followed(kept, text[-size:]) if not expected else ()):
            expected.setdefault(path[0], (path, (size, min(len(expected), 1) + far)))
    found = RepeatIndex().find(text, 5, earlier)
    assert [(repeat.tokens, repeat.kind) for repeat in found] == list(expected.values())
    assert all(len(repeat.logprobs) == len(repeat.tokens) for repeat in found)


def followed(texts: list[list[int]], run: list[int]) -> list[tuple[int, ...]]:
    """What followed the last two occurrences of `run`, at most 5 tokens, the newest first."""
    places = [
        tuple(text[end : end + 5])
        for text in texts
        for end in range(len(run), len(text))
        if text[end - len(run) : end] == run
    ]
    return places[:-3:-1]


def test_a_text_comes_before_earlier_ones_unless_their_run_is_longer() -> None:
    earlier = EarlierTexts(100)
    earlier.add([7, 8, 9, 1, 2, 3])
    assert [each.tokens for each in RepeatIndex().find([4, 8, 9], 2, earlier)] == [(1, 2)]
    assert [each.tokens for each in RepeatIndex().find([8, 9, 5, 6, 8, 9], 2, earlier)] == [(5, 6)]
    longer = RepeatIndex().find([9, 5, 6, 8, 9], 2, earlier)
    assert [(each.tokens, each.kind) for each in longer] == [((1, 2), (2, 2)), ((5, 6), (1, 1))]
    assert [each.tokens for each in RepeatIndex().find([2], 9, earlier)] == [(3,)]  # a text ends where it ended


def test_the_record_of_earlier_texts_is_one_apart() -> None:
    """Earlier texts are right less often, and their failures say nothing about the text's own repeats."""
    earlier, index = EarlierTexts(100), RepeatIndex()
    earlier.add([7, 8, 9, 1])
    far, own = [4, 8, 9], [8, 9, 5, 6, 8, 9]
    [before], [mine] = index.find(far, 1, earlier), index.find(own, 1, earlier)
    assert exp(before.logprobs[0]) == pytest.approx(PRIOR[2, 2][0]) and PRIOR[2, 2] < PRIOR[2, 0]
    for _ in range(40):
        index.learn(before, [2])
    assert index.find(own, 1, earlier) == [mine]
    assert exp(index.find(far, 1, earlier)[0].logprobs[0]) < 0.05


def test_earlier_texts_are_searched_where_the_text_repeats_in_vain() -> None:
    """The least probability leaves out repeats of the text itself, not those of earlier texts with a better rate."""
    earlier, index = EarlierTexts(100), RepeatIndex()
    earlier.add([7, 8, 9, 1])
    own = [8, 9, 5, 6, 8, 9]
    for _ in range(40):
        index.learn(index.find(own, 1)[0], [2])
    assert [repeat.kind for repeat in index.find(own, 1, least=0.1)] == [(1, 0)]
    assert [repeat.kind for repeat in index.find([4, 8, 9], 1, earlier, 0.1)] == [(2, 2)]
    assert index.find([4, 8, 9], 1, earlier, 0.3) == []


def test_every_kind_of_path_has_a_rate() -> None:
    """Later tokens of a path are right at least as often as its first one."""
    assert PRIOR.keys() == {(size, place) for size in SIZES for place in range(4)}
    assert all(0 < first <= later < 1 for first, later in PRIOR.values())


@pytest.mark.parametrize("wrong", [-1, 10**6 + 1, 1.5, True, "many"])
def test_a_cache_of_another_size_is_refused(wrong: object) -> None:
    with pytest.raises(InputError, match=r"lookup_cache .* is out of range, .*: give tokens to keep"):
        check_lookup_cache(wrong)  # type: ignore[arg-type]  # what a user may pass


def random_tree(rng: np.random.Generator, size: int) -> DraftTree:
    parents, tokens, logprobs = [-1], [0], [0.0]
    for node in range(1, size):
        parent = int(rng.integers(0, node))
        parents.append(parent)
        tokens.append(100 * parent + node)  # siblings differ
        logprobs.append(logprobs[parent] - float(rng.exponential()))
    return DraftTree(np.array(tokens), np.array(parents), np.array(logprobs, np.float32))


@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(0, 6), st.integers(1, 16), st.booleans())
def test_a_grafted_tree_holds_the_best_nodes_of_both(seed: int, size: int, count: int, width: int, same: bool) -> None:
    rng = np.random.default_rng(seed)
    tree = random_tree(rng, size)
    path = [5000 + i for i in range(count)]
    if same and size > 1:  # begins like the tree
        path[:1] = [int(tree.tokens[tree.parents.tolist().index(0)])][: len(path)]
    logprobs = np.cumsum(-rng.exponential(size=count)).tolist()
    grown = graft(tree, [Repeat(tuple(path), tuple(logprobs), (1, 0))], width)
    assert len(grown) <= width
    values: dict[tuple[int, ...], float] = {}
    for source in (tree, chain(path, logprobs)):
        for words, value in paths(source).items():
            values[words] = max(value, values.get(words, -np.inf))
    assert len(grown) == min(width, len(values))
    kept = paths(grown)
    assert all(abs(values[words] - value) < 1e-5 for words, value in kept.items())
    left_out = [value for words, value in values.items() if words not in kept]
    assert not left_out or max(left_out) <= min(kept.values()) + 1e-5


def test_paths_that_begin_alike_share_their_nodes() -> None:
    paths_ = [Repeat((5, 6, 7), (-0.1, -0.2, -0.9), (2, 0)), Repeat((5, 6, 8), (-0.3, -0.4, -0.5), (1, 0))]
    grown = graft(DraftTree.root(1), paths_, 16)
    assert paths(grown).keys() == {(), (5,), (5, 6), (5, 6, 7), (5, 6, 8)}
    assert grown.tokens.tolist()[:4] == [1, 5, 6, 8]  # the principal chain takes the better end
    assert abs(paths(grown)[5, 6] + 0.2) < 1e-6


def chain(path: list[int], logprobs: list[float]) -> DraftTree:
    return DraftTree(np.array([0, *path]), np.arange(-1, len(path)), np.array([0.0, *logprobs], np.float32))


def paths(tree: DraftTree) -> dict[tuple[int, ...], float]:
    """Tokens from the root to each node -> its log-probability."""
    found: dict[tuple[int, ...], float] = {}
    words: list[tuple[int, ...]] = []
    for token, parent, logprob in zip(tree.tokens.tolist(), tree.parents.tolist(), tree.logprobs.tolist(), strict=True):
        words.append((*words[parent], token) if parent >= 0 else ())
        found[words[-1]] = logprob
    return found
