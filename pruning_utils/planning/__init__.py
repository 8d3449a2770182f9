"""Memory, arithmetic and time of work before it is begun, from a configuration alone."""
