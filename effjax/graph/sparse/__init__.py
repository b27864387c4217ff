"""Message passing as sparse products: matrices, layers, propagation, sampling, padding, sharding. No method is here."""
