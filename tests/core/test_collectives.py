"""Collectives of compiled programs: kinds, groups, loops and bytes, told by hand and by XLA."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from effjax.core.collectives import Collective, by_kind, collectives

TEXT = """HloModule step, num_partitions=8

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%body (x: (s32[], f32[4,2])) -> (s32[], f32[4,2]) {
  %x = (s32[], f32[4,2]) parameter(0)
  %g = bf16[8,16]{1,0} all-gather(%w), channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  %h = f32[8,16]{1,0} all-gather(%w), replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}, dimensions={0}
  ROOT %t = (s32[], f32[4,2]) tuple(%i, %y)
}

%end (x: (s32[], f32[4,2])) -> pred[] {
  ROOT %p = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (w: f32[2,16]) -> f32[4,2] {
  %w = f32[2,16]{1,0} parameter(0)
  %l = (s32[], f32[4,2]) while(%init), condition=%end, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %r = (f32[10]{0}, f32[6]{0}) all-reduce(%u, %v), channel_id=3, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%sum
  %s = (f32[3]{0}, f32[24]{0}) all-gather-start(%q), channel_id=4, replica_groups={}, dimensions={0}
  %d = f32[24]{0} all-gather-done(%s)
  %z = f32[5]{0} reduce-scatter(%o), channel_id=5, replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%sum
  ROOT %p = f32[4,2]{1,0} collective-permute(%y), channel_id=6, source_target_pairs={{0,1},{1,0}}
}
"""


def test_every_form_of_a_program():
    found = {one.shapes: one for one in collectives(TEXT)}
    expected = [
        Collective("all-gather", ("bf16[8,16]",), 4, 256, 3, 3 * 192),  # 3/4 of 8 * 16 * 2 bytes, three times
        Collective("all-gather", ("f32[8,16]",), 2, 512, 3, 3 * 256),
        Collective("all-reduce", ("f32[10]", "f32[6]"), 2, 64, 1, 64),  # twice a half
        Collective("all-gather", ("f32[24]",), 8, 96, 1, 84),
        Collective("reduce-scatter", ("f32[5]",), 8, 160, 1, 140),
        Collective("collective-permute", ("f32[4,2]",), 8, 32, 1, 32),
    ]
    assert found == {one.shapes: one for one in expected}
    assert by_kind(list(found.values()))["all-gather"] == {"calls": 7, "sent_bytes": 576 + 768 + 84}
    with pytest.raises(ValueError, match=r"the loop 'l' holds all-gather and its length is not known"):
        collectives(TEXT.replace("known_trip_count", "unknown"))


@pytest.mark.optimized
def test_what_xla_compiles():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())

    def looped(x):
        step = lambda carry, _: (jnp.cos(carry + jax.lax.with_sharding_constraint(carry, whole).sum()), None)
        return jax.lax.scan(step, x, length=5)[0]

    compiled = jax.jit(looped, in_shardings=rows, out_shardings=rows).lower(jnp.ones(64)).compile()
    (one,) = collectives(compiled)
    assert one.times == 5
    assert (one.kind, one.devices) in {("all-reduce", 8), ("all-gather", 8)}
    assert one.bytes == (4 if one.kind == "all-reduce" else 256)
