"""One step of the work each: load references, call one function, store, return a reference."""
