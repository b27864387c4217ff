"""Whether skipping a block for some examples can pay: multiply-adds saved against bytes moved."""

from typing import NamedTuple

from effjax.core.errors import check_choice, check_number

__all__ = ["BreakEven", "Device", "break_even"]


class Device(NamedTuple):
    """What a machine can do at best.

    Attributes:
      flops_per_s: floating-point operations a second, two to a multiply-add.
      bytes_per_s: of its main memory.
      step_s: seconds that a decision costs for a batch: sorting the gates and choosing a branch.
    """

    flops_per_s: float
    bytes_per_s: float
    step_s: float = 0.0


# Peak figures of the makers: H200 and TPU v5e in bfloat16. The core is what we measured of convolutions in float32.
DEVICES = {
    "cpu": Device(1.2e11, 1e10, 5e-5),
    "gpu": Device(9.9e14, 4.8e12, 2e-5),
    "tpu": Device(1.97e14, 8.2e11, 5e-6),
}


class BreakEven(NamedTuple):
    """What a block and skipping it cost, in seconds for one example of a batch.

    Attributes:
      compute_s: of the block's arithmetic.
      stream_s: of reading its input and writing its output.
      weights_s: of reading its weights, which the examples of a batch share, and which no skip saves.
      move_s: of gathering inputs and scattering outputs, where the gate is open.
      copy_s: of copying what a closed block leaves as it is, open or not.
      decide_s: of the decision, which the examples share too.
    """

    compute_s: float
    stream_s: float
    weights_s: float
    move_s: float
    copy_s: float
    decide_s: float

    @property
    def block_s(self) -> float:
        """The block without gates."""
        return max(self.compute_s, self.stream_s + self.weights_s)

    @property
    def rate(self) -> float:
        """Share of open examples below which skipping is faster than running all; 0 where it never is."""
        left = self.block_s - self.copy_s - self.decide_s
        computing = left / (self.compute_s + self.move_s)
        streaming = (left - self.weights_s) / max(self.stream_s + self.move_s, 1e-30)
        return max(0.0, min(1.0, computing, streaming))

    def ratio(self, open_rate: float) -> float:
        """Time of the ladder over that of the block without gates where this share of the examples is open."""
        check_number("open_rate", open_rate, low=0, high=1)
        run = max(open_rate * self.compute_s, open_rate * self.stream_s + self.weights_s) if open_rate else 0.0
        return (run + open_rate * self.move_s + self.copy_s + self.decide_s) / self.block_s

    def __str__(self) -> str:
        say = lambda seconds: f"{1e6 * seconds:.3g} us"
        head = f"block {say(self.block_s)}, moving {say(self.move_s)}, deciding {say(self.decide_s)} for each example: "
        if not self.rate:
            return head + "skipping never pays"
        return head + f"skipping pays below {self.rate:.0%} open; at 50 % open {self.ratio(0.5):.2f} x the dense time"


def break_even(
    macs: float, activation_bytes: float, *, device: Device | str, batch: int, weight_bytes: float = 0.0
) -> BreakEven:
    r"""Roofline estimate of a gated block under the ladder.

    .. math::
       t(r) = \max\Bigl(\frac{2 m r}{F}, \frac{2 a r + w / B}{M}\Bigr) + \frac{4 a r + 2 a}{M} + \frac{d}{B}
       \qquad\text{against}\qquad \max\Bigl(\frac{2 m}{F}, \frac{2 a + w / B}{M}\Bigr)

    for a share r of open examples, m multiply-adds and a bytes of input for each example, w bytes of weights, B
    examples, F operations and M bytes a second, d seconds of a decision. Gather and scatter each read and write one
    copy of the activations of open examples, and the scatter begins with a copy of all.

    Args:
      macs: m, multiply-adds of the branch for one example, such as ``BlockMacs`` has them.
      activation_bytes: a, of the block's input, which is taken to be as large as its output.
      device: a ``Device``, or ``"cpu"`` (one core of a server), ``"gpu"`` (H200) or ``"tpu"`` (v5e).
      batch: B.
      weight_bytes: w.

    Returns:
      A ``BreakEven``; at its ``rate`` the two are equal.

    Raises:
      ValueError: numbers out of range, or an unknown device.

    Example:
      >>> wide, narrow = 218e6, 4.7e6  # a ResNet-50 bottleneck of stage 3; 16 channels on 32 x 32
      >>> round(break_even(wide, 401_408, device="gpu", batch=256).rate, 2)
      0.25
      >>> break_even(narrow, 32_768, device="gpu", batch=256).rate
      0.0

    An estimate at peak rates: measure before you believe it. What it does not see are kernels too small to fill the
    machine, which make small rungs dearer.
    """
    check_number("macs", macs, low=0, open_low=True)
    check_number("activation_bytes", activation_bytes, low=0)
    check_number("weight_bytes", weight_bytes, low=0)
    check_number("batch", batch, low=1, integer=True)
    if not isinstance(device, Device):
        device = DEVICES[check_choice("device", device, tuple(DEVICES))]
    memory = device.bytes_per_s
    return BreakEven(
        compute_s=2 * macs / device.flops_per_s,
        stream_s=2 * activation_bytes / memory,
        weights_s=weight_bytes / batch / memory,
        move_s=4 * activation_bytes / memory,
        copy_s=2 * activation_bytes / memory,
        decide_s=device.step_s / batch,
    )
