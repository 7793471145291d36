from __future__ import annotations

import pytest

from rest_jax import errors
from rest_jax.phases.lineage import BC, PPO, PolicyName, behaviour_policy, improve_index, starting_policy


def test_names_are_those_of_the_paper_and_of_the_folders():
    assert (BC.folder, BC.title("BC")) == ("bc", "BC G=0 I=0")
    assert (BC.title("GOLD-s"), BC.loss("GOLD-s")) == ("BC G=0 I=0", "BC")
    assert PolicyName(1, 1).title("GOLD-s") == "GOLD-s G=1 I=1"
    assert (PolicyName(2, 3).folder, PolicyName(2, 3).title("BC")) == ("g2_i3", "BC G=2 I=3")
    assert (PPO.folder, PPO.title("BC")) == ("ppo", "PPO")


def test_each_policy_names_the_verb_that_makes_it():
    names = (BC, PolicyName(1, 0), PolicyName(2, 3), PPO)
    assert [name.phase for name in names] == ["pretrain", "improve", "improve", "ppo"]


@pytest.mark.parametrize(
    "name", [BC, PPO, PolicyName(1, 1), PolicyName(1, 0), PolicyName(2, 10), PolicyName(13, 4)]
)
def test_a_folder_name_is_read_back(name):
    assert PolicyName.parse(name.folder) == name


@pytest.mark.parametrize(
    "text", ["", "BC", "g1", "g1_i", "g1_i2x", "g-1_i1", "g1_i1.tmp", "g0_i1", "g0_i0", "g01_i1"]
)
def test_what_names_no_policy_is_refused(text):
    with pytest.raises(errors.ConfigError, match="no policy is called .*Say bc, g1_i2 or ppo"):
        PolicyName.parse(text)


def test_later_policies_are_greater():
    names = [BC, PPO, PolicyName(1, 1), PolicyName(1, 2), PolicyName(2, 1), PolicyName(10, 1)]
    assert sorted(names[::-1]) == names


def test_the_family_tree_of_two_grow_steps_with_three_improve_steps():
    """By hand, from Algorithm 1 and Fig. 2: a policy comes from the one before, a Grow step from the last."""
    chain = [BC, *(PolicyName(g, i) for g in (1, 2) for i in (1, 2, 3))]
    for before, name in zip(chain, chain[1:], strict=False):
        assert starting_policy(name, three) == before
    assert [behaviour_policy(g, three) for g in (1, 2, 3)] == [BC, PolicyName(1, 3), PolicyName(2, 3)]
    assert [improve_index(name, three) for name in chain[1:]] == [0, 1, 2, 3, 4, 5]


def three(grow: int) -> int:
    return 3


def test_grow_steps_may_differ_in_their_improve_steps():
    """Three Improve steps after Grow 1, one after Grow 2, two after Grow 3."""
    steps_of = {1: 3, 2: 1, 3: 2}.__getitem__
    chain = [BC, *(PolicyName(g, i) for g in (1, 2, 3) for i in range(1, steps_of(g) + 1))]
    for before, name in zip(chain, chain[1:], strict=False):
        assert starting_policy(name, steps_of) == before
    assert [behaviour_policy(g, steps_of) for g in (1, 2, 3)] == [BC, PolicyName(1, 3), PolicyName(2, 1)]
    assert [improve_index(name, steps_of) for name in chain[1:]] == [0, 1, 2, 3, 4, 5]


def test_the_unfiltered_policy_is_a_side_branch():
    """It starts where the first Improve step starts, at its learning rate, and is in nobody's line."""
    assert starting_policy(PolicyName(1, 0), three) == BC
    assert starting_policy(PolicyName(2, 0), three) == starting_policy(PolicyName(2, 1), three)
    assert improve_index(PolicyName(2, 0), three) == improve_index(PolicyName(2, 1), three) == 3
    assert PolicyName(1, 0).title("BC") == "BC G=1 I=0"


def test_rest_em_always_starts_from_the_base():
    for name in (PolicyName(1, 1), PolicyName(1, 2), PolicyName(3, 1)):
        assert starting_policy(name, three, restart=True) == BC
