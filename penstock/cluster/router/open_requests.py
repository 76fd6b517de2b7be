"""The router's open requests: by the router's key, by each waiting client's id, and by content that clients may
share."""

from __future__ import annotations

from penstock.cluster.router.routed_request import RoutedRequest
from penstock.cluster.router.unclaimed_parts import Asked
from penstock.engine.api import OnEvent

SHARING_MAX = 64  # clients of one shared answer


class OpenRequests:
    """Changed on the router's thread only; any thread may read. Two clients never have the same id."""

    def __init__(self) -> None:
        self.by_key: dict[str, RoutedRequest] = {}
        self._of_client: dict[str, RoutedRequest] = {}
        self._shared: dict[Asked, RoutedRequest] = {}

    def __len__(self) -> int:
        return len(self.by_key)

    def of_client(self, client: str) -> RoutedRequest | None:
        """The request for which this client waits."""
        return self._of_client.get(client)

    def same_answer(self, routed: RoutedRequest) -> RoutedRequest | None:
        """The open request whose answer this one may share."""
        known = self._shared.get(routed.asked) if routed.asked is not None else None
        return known if known is not None and len(known.clients) < SHARING_MAX else None

    def add(self, routed: RoutedRequest) -> None:
        """Add a request under `routed.id`, for all its clients."""
        self.by_key[routed.id] = routed
        for client in routed.clients:
            self._of_client[client] = routed
        if routed.shared and routed.asked is not None:
            self._shared.setdefault(routed.asked, routed)

    def share(self, known: RoutedRequest, client: str, on_event: OnEvent) -> None:
        """Add a client that waits for the answer of an open request."""
        known.clients[client] = on_event
        self._of_client[client] = known

    def drop_client(self, client: str) -> OnEvent:
        """Remove a client. Raises KeyError for an unknown id."""
        return self._of_client.pop(client).clients.pop(client)

    def change_key(self, routed: RoutedRequest, key: str) -> None:
        """Change a request's key to the one under which engines know it already."""
        del self.by_key[routed.id]
        routed.id = key
        self.by_key[key] = routed

    def remove(self, routed: RoutedRequest) -> bool:
        """Remove a request; False when it was not open."""
        if self.by_key.get(routed.id) is not routed:
            return False
        del self.by_key[routed.id]
        for client in routed.clients:
            self._of_client.pop(client, None)
        if routed.asked is not None and self._shared.get(routed.asked) is routed:
            del self._shared[routed.asked]
        return True
