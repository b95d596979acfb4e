"""The controller: registry, placement and scaling; the one process that decides.

Pure modules decide (`view`, `fold`, `fleet`, `estimate`, `place`, `scaling`, `answer`); shells do I/O
(`cluster`, `orders`, `registry`, `leadership`, `grpc_service`). The simulator drives the same pure modules.
"""
