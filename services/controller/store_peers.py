"""Where the stores of all nodes reach each other: learnt from reports, told to every node when it changes."""

from __future__ import annotations

from stoker.ids import NodeId
from stoker.v1 import controller_pb2, node_agent_pb2


class StorePeers:
    """The peer addresses of the stores whose nodes report; used from the event loop."""

    def __init__(self) -> None:
        """Nobody has reported yet."""
        self._addresses: dict[NodeId, str] = {}
        self.version = 0
        """Rises with every change."""

    def reported(self, report: node_agent_pb2.NodeReport) -> None:
        """Take over what a node says of its store; a store that cannot be reached for now is where it was."""
        node_id = NodeId(report.node_id)
        if report.HasField("store"):
            self._set(node_id, report.store.peer_address)

    def disconnected(self, node_id: NodeId) -> None:
        """Forget a node whose stream of reports ended; stores that are linked to its store stay so."""
        self._set(node_id, "")

    def others(self, node_id: NodeId) -> controller_pb2.StorePeers:
        """Return the addresses of all stores but that of one node."""
        addresses = sorted(address for other, address in self._addresses.items() if other != node_id)
        return controller_pb2.StorePeers(addresses=addresses)

    def _set(self, node_id: NodeId, address: str) -> None:
        if self._addresses.get(node_id, "") == address:
            return
        if address:
            self._addresses[node_id] = address
        else:
            del self._addresses[node_id]
        self.version += 1
