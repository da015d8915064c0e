"""Page arithmetic: the entries of a table share out the pages exactly."""

from dataclasses import replace

import numpy as np
import pytest
from kernel_cases import GRANULARITIES, LAYER, LAYERS, make_address, table_shape


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_every_page_belongs_to_one_entry_layer_and_head(granularity):
    heads, entries = 3, 4
    layers, table_heads = table_shape(granularity, heads)
    pages = []
    for layer in range(LAYERS):
        address = make_address(granularity, heads)
        if granularity == "shared":
            address = replace(address, layer_offset=layer * heads)
        for head in range(heads):
            # Entries are dealt out over the table's layers and heads.
            first = (layer if layers > 1 else 0) * table_heads + (head if table_heads > 1 else 0)
            own = range(first, entries * layers * table_heads, layers * table_heads)
            pages += [address.page(entry, head) for entry in own]
    np.testing.assert_array_equal(np.sort(pages), np.arange(entries * LAYERS * heads))


def test_an_address_can_be_taken_apart_and_put_together():
    address = make_address("shared", 4)
    common, layer = address.split_layer()
    assert common == make_address("shared", 4).split_layer()[0]
    assert common.join_layer(layer.tolist()) == address
    assert address.layer_offset == LAYER * 4
