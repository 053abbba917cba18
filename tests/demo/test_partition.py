"""Clusters of equal size."""

from __future__ import annotations

import pytest
import torch

from kt_demo.partition import assign_evenly, balanced_clusters


def assign_by_loop(similarity: torch.Tensor, size: int) -> torch.Tensor:
    """Slow and obvious: all pairs, most similar first."""
    num_items, num_clusters = similarity.shape
    owner, held = [-1] * num_items, [0] * num_clusters
    for pair in similarity.flatten().argsort(descending=True).tolist():
        item, cluster = divmod(pair, num_clusters)
        if owner[item] < 0 and held[cluster] < size:
            owner[item] = cluster
            held[cluster] += 1
    return torch.tensor(owner)


@pytest.mark.parametrize(("num_clusters", "size"), [(1, 5), (2, 1), (3, 7), (16, 64)])
def test_assignment_equals_the_loop_over_all_pairs(num_clusters: int, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    # float64: no ties, whose order the loop would leave open
    similarity = torch.rand(
        num_clusters * size, num_clusters, generator=generator, dtype=torch.float64
    )
    assert torch.equal(assign_evenly(similarity, size), assign_by_loop(similarity, size))


def test_finds_planted_clusters() -> None:
    generator = torch.Generator().manual_seed(3)
    planted = torch.arange(4).repeat_interleave(8)[torch.randperm(32, generator=generator)]
    points = torch.eye(4)[planted] + 0.05 * torch.rand(32, 4, generator=generator)
    clusters = balanced_clusters(points, 4, seed=1)
    for cluster in clusters:
        assert planted[cluster].unique().numel() == 1, planted[clusters]


def test_clusters_are_a_partition_even_of_silent_and_equal_items() -> None:
    points = torch.zeros(24, 5)
    points[12:] = 1.0
    clusters = balanced_clusters(points, 3, seed=0)
    assert clusters.shape == (3, 8)
    assert clusters.flatten().sort().values.tolist() == list(range(24))


def test_items_that_cannot_be_dealt_out_evenly_are_refused() -> None:
    with pytest.raises(ValueError, match="10 items cannot be dealt out evenly to 3"):
        balanced_clusters(torch.rand(10, 2), 3, seed=0)
