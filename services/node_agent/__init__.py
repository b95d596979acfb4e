"""One per host: supervises inference workers, reports what is true on the host."""
