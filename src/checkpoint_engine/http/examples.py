"""Examples of answers, which the OpenAPI schema shows. A test compares their shapes with what the routes answer."""

from __future__ import annotations

from typing import Any

from checkpoint_engine.http.records import Failed

OK = {"status": "ok"}
_STAGES = {
    "lift": {"nbytes": 1_000_000_000, "seconds": 0.02, "gb_per_s": 50.0},
    "share": {"nbytes": 1_000_000_000, "seconds": 0.01, "gb_per_s": 100.0},
    "load": {"nbytes": 1_000_000_000, "seconds": 0.01, "gb_per_s": 100.0},
}
UPDATE_REPORT: dict[str, Any] = {
    "version": "step-12@0123456789ab",
    "method": "broadcast",
    "nbytes": 1_000_000_000,
    "seconds": 0.05,
    "gb_per_s": 20.0,
    "passes": 1,
    "stages": _STAGES,
    "ranks": [_STAGES],
}
PROBLEM = {
    "type": "CheckpointNotFoundError",
    "message": "checkpoint 'step-12' is not registered on any rank",
    "rank": 0,
    "names": {"name": "step-12"},
    "notes": [],
}
INVALID = {
    "type": "RequestValidationError",
    "message": "body.timeout: Input should be greater than 0",
    "rank": 0,
    "names": {},
    "notes": [],
}
UPDATE = {
    "id": "1-a1b2c3",
    "checkpoint": "step-12",
    "version": "step-12@0123456789ab",
    "state": "committed",
    "started": 1767225600.0,
    "seconds": 0.06,
    "nbytes": 1_000_000_000,
    "done": [],
    "attempts": 1,
    "report": UPDATE_REPORT,
    "error": None,
    "timeline": True,
}
_BEGUN = {"state": "starting", "version": None, "seconds": 0.0, "nbytes": 0, "attempts": 0, "report": None, "timeline": False}
STARTED = {**UPDATE, **_BEGUN}
TIMELINE = {
    "id": "1-a1b2c3",
    "version": "step-12@0123456789ab",
    "method": "broadcast",
    "nbytes": 1_000_000_000,
    "seconds": 0.05,
    "bound": "lift on rank 0 bounds the update: at work for 80% of its 0.050 s, 50% of that alone, at 91% of its ceiling.",
    "stages": ["lift", "load"],
    "ranks": [
        {
            "rank": 0,
            "host": "gpu-1",
            "spans": [
                {"stage": "lift", "bucket": 0, "start": 0.004, "seconds": 0.04, "nbytes": 1_000_000_000, "count": 1},
                {"stage": "load", "bucket": 0, "start": 0.024, "seconds": 0.024, "nbytes": 1_000_000_000, "count": 1},
            ],
        }
    ],
}
TRACE = {
    "displayTimeUnit": "ms",
    "otherData": {"version": "step-12@0123456789ab", "method": "broadcast"},
    "traceEvents": [
        {"ph": "M", "name": "process_name", "pid": 1, "tid": 1000, "ts": 0, "args": {"name": "rank 0 (gpu-1)"}},
        {"ph": "X", "name": "lift 0", "cat": "lift", "pid": 1, "tid": 1000, "ts": 4000.0, "dur": 40000.0, "args": {"bucket": 0}},
    ],
}
CHECKPOINT = {
    "name": "step-12",
    "nbytes": 1_000_000_000,
    "tensors": 291,
    "version": "step-12@0123456789ab",
    "parts": [{"rank": 0, "nbytes": 1_000_000_000, "tensors": 291}],
}
DETAIL = {
    "checkpoint": CHECKPOINT,
    "listed": 291,
    "tensors": [{"name": "lm_head.weight", "dtype": "bfloat16", "shape": [32000, 4096], "nbytes": 262_144_000, "rank": 0}],
}
MANIFEST = {
    "checkpoint": "step-12",
    "ranks": [{"rank": 0, "host": "gpu-1", "device": "GPU-0a1b", "regions": [[1024, [["w", "float32", [16, 16], 0, 12345]]]]}],
}
LEASE = {"seconds": 30.0, "listed": True, "reason": ""}
WEIGHTS = {
    "workers": [{"rank": 0, "version": "step-12@0123456789ab", "dirty": False}],
    "engines": [{"endpoint": "http://127.0.0.1:30000", "version": "step-12@0123456789ab", "dirty": False, "error": None}],
}
FLEET = {
    "world_size": 1,
    "met": True,
    "error": None,
    "server_version": "0.1.0",
    "ranks": [
        {
            "rank": 0,
            "host": "gpu-1",
            "error": None,
            "state": {
                "server": {
                    "rank": 0,
                    "world_size": 1,
                    "host": "gpu-1",
                    "pid": 4711,
                    "device": "GPU-0a1b",
                    "checkpoints": [{"name": "step-12", "nbytes": 1_000_000_000, "tensors": 291}],
                    "kept_bytes": 0,
                    "ring_bytes": 0,
                },
                "running": False,
                "done": 0,
                "version": "step-12@0123456789ab",
                "dirty": False,
            },
        }
    ],
    "running": None,
    "ceilings": {"lift": 55e9, "load": 1.5e12, "share": 200e9},
}
_WORDS = {
    400: "Something in the request cannot be used",
    401: "No token, or another one",
    404: "There is no such checkpoint or update",
    409: "Not now, or not twice",
    421: "This is not rank 0",
    422: "A parameter or the body is not as described",
    500: "The update failed",
    502: "An engine did not do what it was asked",
    503: "A rank is gone, or the ranks have not met",
    504: "A wait ended without what it waited for",
}


def answers(
    example: object, *, errors: tuple[int, ...], status: int = 200, media: str = "application/json"
) -> dict[int | str, Any]:
    """FastAPI's `responses`: an example of success, and the errors' shape."""
    told: dict[int | str, Any] = {status: {"content": {media: {"example": example}}}}
    for code in errors:
        content = {"application/json": {"example": {"error": PROBLEM}}}
        told[code] = {"description": _WORDS[code], "model": Failed, "content": content}
    return told


def mend_validation_errors(schema: dict[str, Any]) -> dict[str, Any]:
    """FastAPI's OpenAPI schema with our shape of 422, which it documents by itself wherever a route takes anything."""
    shape = {"schema": {"$ref": "#/components/schemas/Failed"}, "example": {"error": INVALID}}
    for operations in schema["paths"].values():
        for operation in operations.values():
            if "422" in operation["responses"]:
                operation["responses"]["422"] = {"description": _WORDS[422], "content": {"application/json": shape}}
    for unused in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(unused, None)
    return schema
