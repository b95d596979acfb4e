"""The edge: REST and gRPC to clients, text on the outside, tokens on the inside."""
