"""The processes of a Stoker cluster; they meet only over gRPC."""

import os

# gRPC's older poller, unless an operator chose: the newer one hands each message to one more thread, and a
# round trip takes a fifth longer (docs/decisions/0023-first-token.md). Read when gRPC is imported.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")
