"""The checkpoint layout on disk: plan, write, read, verify (docs/design.md, "Checkpoint layout")."""
