"""transformers models built on tensors that already lie where they will be used: skeleton, then weights."""
