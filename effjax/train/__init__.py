"""Training: the one trainer, the programs that it makes, and the loop that runs them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
