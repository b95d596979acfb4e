"""The checkpoint layout: plan it, write it, read it, verify it.

A stored checkpoint stays a valid safetensors checkpoint; `stoker.json` beside it says where each tensor
lies and what each chunk's digest is. Reading, indexing and verifying need neither torch nor transformers:

- `index.open_checkpoint` is the one view that everything serves from,
- `convert.convert` writes the layout, `verify.verify` proves it,
- `manifest`, `safetensors_header`, `execution_order` and `plan` are pure.
"""
