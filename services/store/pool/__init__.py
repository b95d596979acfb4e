"""The pool: its memory and chunks, who is in it, who may come in, who goes."""
