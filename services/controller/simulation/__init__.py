"""The cluster on a virtual clock: the controller's own decisions against other policies, over real traces."""
