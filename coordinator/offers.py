"""A claimed row as an offer for its worker."""

from __future__ import annotations

import msgspec

from coordinator.blobs.base import Blobs
from coordinator.blobs.bounds import bounds_of
from coordinator.records import JobRecord
from protocol import link_wire as wire


def to_offer(record: JobRecord, left_ms: int, blobs: Blobs, ttl_s: float) -> wire.Offer:
    """The offer.

    Args:
        record: the claimed row.
        left_ms: time until its deadline, 0 when it has none.
        blobs: where its files are.
        ttl_s: how long the worker may fetch inputs and leave outputs.
    """
    return wire.Offer(
        kind=record.kind,
        model=record.model,
        params=msgspec.Raw(record.params),
        inputs=tuple(
            wire.FileRef(
                name=file.name,
                url=blobs.url(file.blob, ttl_s),
                size=file.size,
                sha256=file.sha256,
                mime=file.mime,
            )
            for file in record.inputs
        ),
        upload=blobs.upload_template(record.id, record.attempt, ttl_s, bounds_of(record.kind)),
        stream=record.stream,
        deadline_ms=left_ms,
        traceparent=record.traceparent,
        labels=record.labels,
        tenant=record.tenant,
        priority=record.priority,
        vram_gb_estimate=record.vram_gb_estimate,
        alone=record.alone,
    )
