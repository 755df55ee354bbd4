"""POST /v1/images/edits: an image, where it may change, and what it shall become."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from coordinator.bodies import FieldTable, whole_number
from coordinator.forms import form_values
from coordinator.openai import images
from coordinator.records import StoredInput
from coordinator.services import services
from coordinator.uploads import is_multipart, read_form, uploads
from protocol.faults import refuse

FIELDS = FieldTable(
    passed=images.FIELDS.passed | {"strength"},
    handled=images.FIELDS.handled,
    ignored=images.FIELDS.ignored,
    fixed={**images.FIELDS.fixed, "input_fidelity": ("low",), "markup": ()},
)
MASKED_STRENGTH = 1.0  # where the mask lets it, the picture is made anew
_TYPES: dict[str, type] = {
    "n": int,
    "steps": int,
    "seed": int,
    "output_compression": int,
    "partial_images": int,
    "guidance": float,
    "strength": float,
    "stream": bool,
}


async def create(request: Request) -> Response:
    """Change an image; with a mask, only its fully transparent places."""
    if not is_multipart(request):
        raise refuse("unsupported_media_type", "Expected a body of type multipart/form-data with the image in it.")
    async with uploads(services(request)) as blobs:
        form = await read_form(request, blobs, {"image": "image", "image[]": "image", "mask": "mask"})
        passed, handled = FIELDS.pick(form_values(form, _TYPES))
        inputs = to_inputs(form.files)
        if "mask" in form.files:
            passed.setdefault("strength", MASKED_STRENGTH)
        quality = handled.get("quality", "")
        if (number := whole_number(quality, 1, 100)) is not None:  # a form has texts only; a number is the encoder's
            handled["quality"] = number
        return await images.answer(request, passed, handled, inputs)


ROUTES = [Route("/v1/images/edits", create, methods=["POST"])]


def to_inputs(files: dict[str, StoredInput]) -> tuple[StoredInput, ...]:
    """The image and its mask. Raises FaultError(invalid_parameter)."""
    given = [file for name, file in files.items() if name != "mask"]
    if not given:
        raise refuse("invalid_parameter", "image: The image is required.", "image")
    if len(given) > 1:
        raise refuse("unsupported", "image: One image only.", "image")
    return tuple(files.values())
