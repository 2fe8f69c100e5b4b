import pytest

from sequoia.topology import TokenTree, Topology

#       0
#     /   \
#    1     2
#   / \     \
#  3   4     5
TREE = Topology((-1, 0, 0, 1, 1, 2))


@pytest.mark.parametrize(
    ("parents", "complaint"),
    [
        ((), "begins with its root"),
        ((0,), "begins with its root"),
        ((-1, -1), "a parent must be in 0..0"),
        ((-1, 1), "a parent must be in 0..0"),
        ((-1, 0, 3, 0), "a parent must be in 0..1"),
        ((-1, 0, 1, 0), "level order"),
    ],
)
def test_parents_that_are_no_tree_are_refused(parents: tuple[int, ...], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Topology(parents)


def test_everything_else_follows_from_the_parents() -> None:
    assert (TREE.size, TREE.levels) == (6, 3)
    assert TREE.depths == (0, 1, 1, 2, 2, 2)
    assert TREE.children == ((1, 2), (3, 4), (5,), (), (), ())
    assert TREE.ranks == (0, 0, 1, 0, 1, 0)
    assert TREE.internal_nodes == (0, 1, 2)


def test_the_mask_shows_a_node_its_ancestors_and_itself() -> None:
    assert TREE.ancestor_mask[4].tolist() == [True, True, False, False, True, False]
    assert TREE.ancestor_mask[0].tolist() == [True, False, False, False, False, False]


def test_the_root_alone_is_a_chain_of_one_level() -> None:
    assert Topology.root_only() == Topology.chain(1)
    assert (Topology.chain(4).size, Topology.chain(4).levels) == (4, 4)


def test_truncating_drops_the_deepest_levels() -> None:
    assert TREE.truncated(2) == Topology((-1, 0, 0))
    assert TREE.truncated(3) == TREE


def test_a_token_tree_has_one_token_per_node() -> None:
    with pytest.raises(ValueError, match="2 token ids for 1 nodes"):
        TokenTree(Topology.root_only(), (7, 8))


def test_following_tokens_walks_as_far_as_the_tree_has_them() -> None:
    tree = TokenTree(TREE, (9, 10, 11, 12, 13, 14))
    assert tree.follow((10, 13, 15)) == (1, 4)
    assert tree.follow((12,)) == ()
