"""effjax: methods that make neural networks cheaper to train, fine-tune and run, in JAX.

The eighteen methods, ``compare``, the loaders and the makers of tasks stand here; the other public names are
``effjax.<package>.<name>``. All are imported when first used: ``import effjax`` touches no device.
"""

import lazy_loader

__version__ = "0.1.0"
# __init__.pyi lists the names, for editors and type checkers as for this line.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
