"""Ground floor: imports nothing else of effjax."""
