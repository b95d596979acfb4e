"""The processes of a Stoker cluster; they meet only over gRPC."""
