"""What must start, stop or be prepared, and when: rules over the cluster view. Pure."""
