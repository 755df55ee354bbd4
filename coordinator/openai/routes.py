"""All routes of this package."""

from __future__ import annotations

from starlette.routing import Route

from coordinator.openai import (
    batches,
    chat,
    completions,
    embeddings,
    files,
    image_edits,
    images,
    models,
    rerank,
    speech,
    transcriptions,
    videos,
)

ROUTES: list[Route] = [
    *chat.ROUTES,
    *completions.ROUTES,
    *embeddings.ROUTES,
    *rerank.ROUTES,
    *transcriptions.ROUTES,
    *speech.ROUTES,
    *images.ROUTES,
    *image_edits.ROUTES,
    *videos.ROUTES,
    *files.ROUTES,
    *batches.ROUTES,
    *models.ROUTES,
]
