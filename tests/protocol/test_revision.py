"""Two peers agree on the highest common revision, or on none; both come to the same answer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.revision import ENGINE_WIRE, LINK_WIRE, Span, agree

_SPAN = st.builds(Span, st.integers(0, 9), st.integers(0, 9))


@given(_SPAN, _SPAN)
def test_the_highest_common_revision(ours, theirs):
    common = set(range(ours.low, ours.high + 1)) & set(range(theirs.low, theirs.high + 1))
    assert agree(ours, theirs) == agree(theirs, ours) == (max(common) if common else None)


@pytest.mark.parametrize("span", [ENGINE_WIRE, LINK_WIRE])
def test_we_agree_with_ourselves(span):
    assert agree(span, span) == span.high
