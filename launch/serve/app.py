"""The application: its paths, what they answer, and the description of them that OpenAPI has.

FastAPI checks requests by the model's own columns. Every answer that is no success is a `Problem`.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

import engine
from engine.errors import RunError, UserError
from engine.predict.predictor import Predictor
from engine.predict.rows import Row
from launch.serve.batcher import Answer, Batcher, FullQueueError
from launch.serve.gate import GONE, Gate
from launch.serve.metrics import Metrics
from launch.serve.options import ServeConfig
from launch.serve.schema import About, Problem, State, one_line, request_model, response_model

#: what the statuses of a prediction mean, beyond 200
PROBLEMS = {
    400: "the body can't be read",
    408: "the body came too slowly",
    413: "the body is too large",
    422: "a row, or the number of rows, isn't what the model takes",
    500: "a failure of the server",
    503: "too much waits, or the server begins or stops; ask again after Retry-After",
    504: "no answer in time",
}


def build_app(predictor: Predictor, batcher: Batcher, config: ServeConfig, metrics: Metrics) -> Gate:
    """The application behind its gate."""
    app = FastAPI(
        title=f"zerobert: {predictor.model.folder.resolve().name}",
        description=f"Predictions of a model of {predictor.model.head}.",
        version=engine.__version__,
        redoc_url=None,
    )
    add_problems(app)
    paths = frozenset({"/", "/predict", "/health", "/ready", "/metrics", "/docs", "/openapi.json"})
    gate = Gate(app, paths, config, metrics)
    add_predict(app, predictor, batcher, config)
    add_states(app, gate, batcher)
    add_about(app, predictor, batcher)
    metrics.gauge("queue_rows", "Rows that wait", lambda: batcher.waiting)
    metrics.gauge("open_requests", "Requests whose answer isn't over", lambda: gate.open)
    metrics.gauge("ready", "1 if the model is open and the server doesn't stop", lambda: is_ready(gate, batcher))

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def tell_metrics() -> Response:
        """Figures for Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    app.openapi()  # now, because it takes long and is kept
    return gate


def problem(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An answer that tells why there is none."""
    retry = {"Retry-After": "1"} if status == 503 else {}
    told = message.encode("utf-8", "replace").decode()  # half a character of the request may be in it
    return JSONResponse({"error": told}, status, {**retry, **(headers or {})})


def add_problems(app: FastAPI) -> None:
    """Answer errors of the framework as all others."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return problem(422, one_line(error.errors()))

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        return problem(error.status_code, str(error.detail), dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        told = str(error) if isinstance(error, RunError) else "server: a failure, of which its log tells"
        return problem(500, told)


def add_predict(app: FastAPI, predictor: Predictor, batcher: Batcher, config: ServeConfig) -> None:
    """The path of predictions."""

    async def predict(request: Request, body: Any) -> Response:
        """Predictions of rows, in their order, as `zerobert predict` makes them."""
        if not batcher.ready.is_set():
            return problem(503, "model: it is being opened; ask again later")
        rows = [Row(number, row.model_dump(by_alias=True)) for number, row in enumerate(body.rows, 1)]
        request.scope["rows"] = len(rows)
        try:
            future = batcher.submit(rows)
            answer = await answer_of(future, request, config.timeout)
        except FullQueueError:
            return problem(503, f"server: {batcher.waiting} rows wait already (max_queue); ask again later")
        except asyncio.TimeoutError:
            return problem(504, f"server: no answer in {config.timeout:g} s (timeout); give fewer rows, or ask later")
        except UserError as error:
            return problem(422, str(error))
        if answer is None:
            return Response(status_code=GONE)
        return JSONResponse({"predictions": answer.columns, "truncated": answer.truncated})

    predict.__annotations__["body"] = request_model(predictor, config.max_rows)  # FastAPI reads the signature
    responses: dict[int | str, dict[str, Any]] = {
        status: {"model": Problem, "description": told} for status, told in PROBLEMS.items()
    }
    app.post("/predict", response_model=response_model(predictor), responses=responses)(predict)


async def answer_of(future: Future[Answer], request: Request, timeout: float) -> Answer | None:
    """The answer of a request; None if its client went away.

    Raises:
        asyncio.TimeoutError: it takes too long.
    """
    answer, gone = asyncio.wrap_future(future), asyncio.ensure_future(request.receive())
    try:
        done, _ = await asyncio.wait((answer, gone), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            raise asyncio.TimeoutError
        return answer.result() if answer in done else None
    finally:
        gone.cancel()
        answer.cancel()


def is_ready(gate: Gate, batcher: Batcher) -> bool:
    """Whether requests are taken."""
    return batcher.ready.is_set() and batcher.alive and not gate.draining


def add_states(app: FastAPI, gate: Gate, batcher: Batcher) -> None:
    """The paths for those who start and end servers."""
    down: dict[int | str, dict[str, Any]] = {503: {"model": Problem}}

    @app.get("/health", response_model=State, responses=down)
    async def health() -> Response:
        """Whether the process works; if not, start it again."""
        return JSONResponse({"status": "ok"}) if batcher.alive else problem(503, "server: it computes nothing any more")

    @app.get("/ready", response_model=State, responses=down)
    async def ready() -> Response:
        """Whether it takes requests: the model is open, and the server doesn't stop."""
        if is_ready(gate, batcher):
            return JSONResponse({"status": "ready"})
        return problem(503, "server: it stops" if gate.draining else "model: it is being opened")


def add_about(app: FastAPI, predictor: Predictor, batcher: Batcher) -> None:
    """The path that tells of the model."""
    model, config = predictor.model, predictor.config
    labelled = model.head in ("sequence_classification", "token_classification")
    about = About(
        model=model.folder.resolve().name,
        version=engine.__version__,
        architecture=str(model.config.model_type),
        head=model.head,
        labels=list(model.names) if labelled else None,
        columns=list(predictor.row_types()),
        predicted=list(predictor.column_types()),
        max_length=predictor.length,
        precision=config.precision,
        device=batcher.device.type,
        threads=batcher.threads,
    )

    @app.get("/")
    async def tell() -> About:
        """What is served."""
        return about
