"""The loader for people: save, load and open checkpoints, with and without a store daemon.

`import stoker` offers what is here by name and imports a module only when its name is asked for:

- `sources` finds where the bytes are (the daemon's pool, or the disk) and gives one view of both,
- `open_file` is `stoker.open`: lazy, like safetensors' `safe_open`,
- `load` is `stoker.load_tensors` and `stoker.load_model`, `save` is `stoker.save_model`,
- `adapters` puts LoRA adapters on a loaded model.
"""
