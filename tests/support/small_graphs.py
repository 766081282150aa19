# SPDX-License-Identifier: Apache-2.0
"""Stand-in for `torch_geometric.data`, with the names and attributes that our examples use."""

import torch


class Data:
    """Graph with features of its nodes [nodes, features], edges [2, edges], and a label [1]."""

    def __init__(self, x, edge_index, y):
        self.x, self.edge_index, self.y = x, edge_index, y


class Batch:
    """Several graphs as one; `batch` has the number of each node's graph."""

    @classmethod
    def from_data_list(cls, graphs):
        """Return the graphs as one; an error if there are none, as in torch_geometric."""
        batch, sizes = cls(), [len(graph.x) for graph in graphs]
        firsts = [sum(sizes[:number]) for number in range(len(sizes))]
        batch.x = torch.cat([graph.x for graph in graphs])
        batch.edge_index = torch.cat([graph.edge_index + first for graph, first in zip(graphs, firsts, strict=True)], 1)
        batch.y = torch.cat([graph.y for graph in graphs])
        batch.batch = torch.arange(len(graphs)).repeat_interleave(torch.tensor(sizes))
        batch._graphs, batch.num_graphs = list(graphs), len(graphs)
        return batch

    def to_data_list(self):
        """Return the graphs one by one."""
        return self._graphs

    def to(self, device):
        """Return the graphs as they are: they are on the CPU."""
        return self
