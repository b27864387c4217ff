"""Methods that make neural networks cheaper to train, fine-tune and run, in JAX.

Methods, as pure functions, Flax modules or Optax transformations (``help(effjax.samuel)`` shows one)::

    samuel             learning-rate experts by multiplicative weights
    dcl                distributionally constrained learning: stated levels instead of penalty weights
    cola               Chain of LoRA: fine-tuning by adapters that are merged and restarted
    BucketSampler      length-aware batches of few static shapes
    token_drop         drop insignificant tokens anew in every epoch
    icpc               input compression with positional consistency: one transformer for inputs of several sizes
    axformer           accuracy-driven pruning of the blocks, heads and neurons of a fine-tuned transformer
    irnn               incremental RNN: the state is the increment of an ODE run at every input
    tarnn              time-adaptive RNN: a learned time constant of input and state
    fptt               forward propagation through time: updates in every part of a sequence
    global_layer       Global layer: an advection-diffusion equation in place of the blocks that widen the view
    fastrain           fast and accurate self-training of graph neural networks
    disk               selective distillation: a guide takes off a small student what it cannot learn
    geeni              ensembles of graph networks that run as one, without the messages of doubtful nodes
    selective          selective classification: predict or abstain, with a guarantee
    hybrid             a small model that asks a large one only where that pays
    si_cnn             residual blocks that compute on a grid of anchor pixels and interpolate between them
    dynamic_inference  residual networks whose layers and channels run only for the images that need them

Comparing them on data::

    compare            run a study, or arms of your own on a task of your own
    task, text_task, image_task, sequence_task, node_task, lm_task, prompt_task
                       what is learned: a network, data, a loss and a metric
    load_data, read_data, node_data, load_tokenizer, load_pretrained, save_pretrained
                       data sets by name, files of your own, weights

Other public names stand in ``effjax.optim``, ``finetune``, ``transformers``, ``recurrent``, ``graph``, ``hardness``,
``vision``, ``models``, ``data``, ``tasks`` and ``train``: ``help(effjax.optim)``. The command ``effjax methods`` lists
all of them. Everything is imported when first used: ``import effjax`` touches no device.
"""

import lazy_loader

__version__ = "0.1.0"
# __init__.pyi lists the names, for editors and type checkers as for this line.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
