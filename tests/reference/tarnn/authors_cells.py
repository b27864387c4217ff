"""Two more cells of the authors' code (anilkagak2/TARNN, ``pytorch/tarnn.py``), for parity alone.

They are built from the products and the inputs of one step earlier that ``tarnn`` is built from.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from effjax.recurrent.cells import fused_dot
from effjax.recurrent.tarnn import _before


def b_tarnn_lstm(params, xs, carry):
    r"""Class ``B_TARNN_LSTM``: an LSTM's gates around an increment of the joint state H = (h, c).

    .. math::
        (i, f, g, o) &= x_t W + x_{t-1} W_p + H U + b \\
        H' &= \sigma(f) \odot H + \sigma(i) \odot \left( \tanh(g) + x_t B_x + H B_h \right) \\
        H &\leftarrow \sigma(o) \odot \tanh(H')

    The authors' two biases are one here.
    """
    now = fused_dot(xs, {"gates": (params["W"], params["b"]), "drive": (params["Bx"], None)}, None)
    gates = now["gates"] + _before(xs, "repeat") @ params["Wp"]

    def step(carry, projected):
        gates, drive = projected
        state = jnp.concatenate(carry, -1)
        i, f, g, o = jnp.split(state @ params["U"] + gates, 4, -1)
        increment = jnp.tanh(g) + drive + state @ params["Bh"]
        state = nn.sigmoid(o) * jnp.tanh(nn.sigmoid(f) * state + nn.sigmoid(i) * increment)
        h, c = jnp.split(state, 2, -1)
        return (h, c), h

    return jax.lax.scan(step, carry, (gates, now["drive"]))


def old_b_tarnn(params, xs, h0):
    r"""Class ``oldB_TARNN``: one inner step whose size depends on the input.

    .. math::
        \eta &= \sigma(s U_2 + x_{t-1} B_p + b_2), \qquad g = \sigma(s U_g + x_t W_g + b_g) \\
        F &= \tanh(s U_1 + s U_3 + x_t W_1 + x_{t-1} W_2 + b_1) - 2 s + x_t B_x + s B_h \\
        h &= (1 - g) \odot \tanh(s) + g \odot \tanh((1 - \eta) \odot s + \eta \odot F) \\
        o &= \sigma(s U_o + x_t W_o + x_{t-1} W_p + b_o) \odot h
    """
    kernels = {"pre": ("W1", "b1"), "gate": ("Wg", "bg"), "drive": ("Bx", None), "out": ("Wo", "bo")}
    now = fused_dot(xs, {part: (params[w], b and params[b]) for part, (w, b) in kernels.items()}, None)
    then = {"pre": (params["W2"], None), "step": (params["Bp"], params["b2"]), "out": (params["Wp"], None)}
    then = fused_dot(_before(xs, "repeat"), then, None)
    projected = {**now, **then, "pre": now["pre"] + then["pre"], "out": now["out"] + then["out"]}
    kernels = {"step": params["U2"], "gate": params["Ug"], "pre": params["U1"] + params["U3"], "out": params["Uo"]}
    recurrent = {name: (kernel, None) for name, kernel in (kernels | {"drive": params["Bh"]}).items()}

    def step(h, projected):
        parts = jax.tree.map(jnp.add, fused_dot(h, recurrent, None), projected)
        eta, gate = nn.sigmoid(parts["step"]), nn.sigmoid(parts["gate"])
        field = jnp.tanh(parts["pre"]) - 2 * h + parts["drive"]
        new = (1 - gate) * jnp.tanh(h) + gate * jnp.tanh((1 - eta) * h + eta * field)
        return new, nn.sigmoid(parts["out"]) * new

    return jax.lax.scan(step, h0, projected)
